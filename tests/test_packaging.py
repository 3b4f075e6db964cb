"""What is installed is what was meant: seven packages and their data, stubs for protos, known versions."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"tandem", "kvstore", "prefill_worker", "decode_worker", "router", "deploy", "bench"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROTOS = sorted((ROOT / "protos" / "tandem").rglob("*.proto"))
STUB_ENDINGS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """The names of the files in a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_seven_packages_and_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert all(f"{package}/__init__.py" in wheel for package in PACKAGES)


def test_every_module_of_ours_is_in_the_wheel(wheel):
    ours = {
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    assert ours <= wheel


def test_package_data_ships(wheel):
    """Stub types, kernel sources, and the bundled pair with its tokenizer."""
    assert any(name.startswith("tandem/pb/") and name.endswith(".pyi") for name in wheel)
    endings = {".safetensors", ".json", ".cpp", ".h", ".yaml", ".pyi", ".typed"}
    data = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in endings}
    assert {path.relative_to(ROOT).as_posix() for path in data} <= wheel
    for model in ("target", "draft"):
        assert f"tandem/models/{model}/config.json" in wheel
        assert f"tandem/models/{model}/model.safetensors" in wheel
    assert any(re.fullmatch(r"tandem/models/.*tokenizer\.json", name) for name in wheel)


def test_the_command_and_the_license_are_part_of_the_wheel(wheel):
    (entry_points,) = (name for name in wheel if name.endswith(".dist-info/entry_points.txt"))
    assert entry_points.startswith("tandem_serve-")
    assert any(name.endswith("LICENSE") for name in wheel)


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.stem)
def test_every_proto_has_stubs(proto):
    base = ROOT / "tandem" / "pb" / proto.relative_to(ROOT / "protos" / "tandem").with_suffix("")
    for ending in STUB_ENDINGS:
        assert base.with_name(base.name + ending).is_file(), ending
    assert (base.parent / "__init__.py").is_file()


def test_no_stub_is_left_over_from_a_proto_that_went():
    stems = {path.relative_to(ROOT / "protos" / "tandem").with_suffix("").as_posix() for path in PROTOS}
    stubs = (ROOT / "tandem" / "pb").rglob("*_pb2.py")
    found = {path.relative_to(ROOT / "tandem" / "pb").as_posix().removesuffix("_pb2.py") for path in stubs}
    assert found == stems


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.stem)
def test_stubs_name_every_message_and_method_of_their_proto(proto):
    """A cheap look for drift; `make proto-check` compares byte by byte."""
    text = re.sub(r"//.*", "", proto.read_text())
    base = ROOT / "tandem" / "pb" / proto.relative_to(ROOT / "protos" / "tandem").with_suffix("")
    types = base.with_name(f"{base.name}_pb2.pyi").read_text()
    calls = base.with_name(f"{base.name}_pb2_grpc.py").read_text()
    messages = re.findall(r"^\s*message (\w+)", text, re.MULTILINE)
    methods = re.findall(r"^\s*rpc (\w+)", text, re.MULTILINE)
    assert [name for name in messages if f"class {name}(" not in types] == []
    assert [name for name in methods if f"def {name}(" not in calls] == []


def constraints() -> dict[str, str]:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def requirements() -> list[Requirement]:
    """What `make setup` installs, and what builds the wheel."""
    project = PYPROJECT["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["dev"]
    return [Requirement(text) for text in texts + PYPROJECT["build-system"]["requires"]]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_every_requirement_is_pinned_to_a_version_it_allows(requirement):
    version = constraints()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"


def test_core_installs_without_ray_redis_or_a_gpu():
    names = {canonicalize_name(Requirement(text).name) for text in PYPROJECT["project"]["dependencies"]}
    assert not names & {"ray", "redis", "hiredis", "bitsandbytes", "triton", "vllm"}


def test_the_tests_can_build_the_wheel_they_check():
    dev = {
        canonicalize_name(Requirement(t).name) for t in PYPROJECT["project"]["optional-dependencies"]["dev"]
    }
    assert "hatchling" in dev
