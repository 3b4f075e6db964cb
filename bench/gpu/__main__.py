"""`python -m bench.gpu`: see bench/gpu/run.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.gpu import run
from bench.gpu.model import SHAPES
from tandem.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=run.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated; 1b and 8b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-results/gpu"))
    given = parser.parse_args()
    try:
        print(run.run(run.Options(given.device, tuple(given.shape or run.DEFAULT), given.rounds, given.out)))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
