"""Generates tandem/pb from the .proto files, with a virtual import path so nothing is patched afterwards.

python protos/generate.py           write the stubs
python protos/generate.py --check   exit 1 if the committed stubs differ
"""

from __future__ import annotations

import filecmp
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos" / "tandem"
STUBS = Path("tandem") / "pb"


def generate(out: Path) -> None:
    """Write messages, services and type stubs below `out`, each folder with an `__init__.py`."""
    plugins = Path(sys.executable).parent
    arguments = [
        "protoc",
        f"-I{STUBS}={PROTOS}",
        f"-I{resources.files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *(str(STUBS / path.relative_to(PROTOS)) for path in sorted(PROTOS.rglob("*.proto"))),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed")
    for folder in {path.parent for path in (out / STUBS).rglob("*_pb2.py")}:
        while folder != out / STUBS.parent:
            (folder / "__init__.py").touch()
            folder = folder.parent


def differences(fresh: Path) -> list[str]:
    """Paths of generated files that are missing, stale or left over in the tree."""
    made = {path.relative_to(fresh) for path in (fresh / STUBS).rglob("*.py*")}
    kept = {
        path.relative_to(ROOT) for path in (ROOT / STUBS).rglob("*.py*") if "__pycache__" not in path.parts
    }
    stale = {path for path in made & kept if not filecmp.cmp(fresh / path, ROOT / path, shallow=False)}
    return sorted(map(str, (made ^ kept) | stale))


def main() -> None:
    if "--check" not in sys.argv:
        return generate(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        if stale := differences(Path(folder)):
            raise SystemExit("run `make proto` and commit; out of date: " + ", ".join(stale))
    return None


if __name__ == "__main__":
    main()
