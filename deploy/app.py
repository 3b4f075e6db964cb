"""The Ray Serve application: `serve run deploy.app:app model=PATH prefill=2 decode=2`.

Annotations here are real classes, not text: Serve reads them to turn `name=value` pairs into arguments.
"""

from ray.serve import Application

from deploy.cluster.application import build
from deploy.cluster.args import AppArgs


def app(args: AppArgs) -> Application:
    """A router with its store, prefill workers and decode workers. Raises `ConfigError`."""
    return build(args.config_tree(), args)
