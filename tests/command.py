"""The `tandem` command without a process of its own: importing torch costs one more than most commands do."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from deploy.cli import main


def tandem(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `main` in this process; what it would have printed, and its exit code."""
    argv = ["tandem", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
