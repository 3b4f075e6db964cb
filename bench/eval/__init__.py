"""`tandem eval`: the experiments of the field, each one command, with published figures beside ours."""
