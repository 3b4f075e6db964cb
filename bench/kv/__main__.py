"""`python -m bench.kv`: see bench/kv/run.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.kv import run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=run.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", action="append", default=[], help="URL of a store; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-results/kv"))
    parser.add_argument("--full", action="store_true", help="up to a million objects, which takes gigabytes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    document = run.run(options.backend, options.rounds, options.out, options.full, options.json)
    if options.json:
        print(json.dumps(document))


if __name__ == "__main__":
    main()
