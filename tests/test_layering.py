"""Imports run one way, dangerous calls do not exist, and files and functions stay small.

`tandem` ← `kvstore` ← `prefill_worker`, `decode_worker`; `tandem` ← `router`; `decode_worker` and `router`
← `bench`; all ← `deploy`. Siblings never import each other. Only the engine knows torch, so that the router
and the store start fast and stay small. Everything is read from the syntax trees; one test also watches a
real interpreter.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "tandem" / "pb"
ALL = {"tandem", "kvstore", "prefill_worker", "decode_worker", "router", "deploy", "bench"}
MAY_IMPORT = {
    "tandem": set(),
    "kvstore": {"tandem"},
    "prefill_worker": {"tandem", "kvstore"},
    "decode_worker": {"tandem", "kvstore"},
    "router": {"tandem"},
    "bench": {"tandem", "kvstore", "decode_worker", "router"},
    "deploy": ALL,
}
USERS_OF_THE_ENGINE = {"prefill_worker", "decode_worker", "deploy", "bench"}
HEAVY = {"torch", "transformers", "safetensors"}
BANNED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BANNED_CALLS = {
    "eval",
    "exec",
    "os.popen",
    "os.system",
    "torch.hub.load",
    "torch.jit.load",
    "torch.load",
    "yaml.full_load",
    "yaml.load",
    "yaml.unsafe_load",
}
BANNED_TRUE = {"shell", "allow_pickle", "trust_remote_code"}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40


@cache
def sources() -> dict[Path, ast.Module]:
    """Our own Python files, without the generated stubs."""
    files = [path for package in sorted(ALL) for path in sorted((ROOT / package).rglob("*.py"))]
    ours = [path for path in [*files, ROOT / "protos" / "generate.py"] if STUBS not in path.parents]
    return {path.relative_to(ROOT): ast.parse(path.read_text()) for path in ours}


def imports(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every imported name in full, wherever in the file it stands: (line, "package.module.name")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.parts[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def aliases(path: Path, tree: ast.Module) -> dict[str, str]:
    """What each local name of an import stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                found[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return found


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression that is only names; otherwise empty."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def all_imports() -> Iterator[tuple[Path, int, str]]:
    for path, tree in sources().items():
        yield from ((path, line, name) for line, name in imports(path, tree))


def test_imports_between_our_packages_run_one_way():
    wrong = [
        f"{path}:{line} imports {name}"
        for path, line, name in all_imports()
        if path.parts[0] in ALL
        and (target := name.split(".")[0]) in ALL
        and target != path.parts[0]
        and target not in MAY_IMPORT[path.parts[0]]
    ]
    assert wrong == []


def module_of(name: str, known: set[str]) -> str:
    """The module that an imported name is, or is in; empty for what is not ours."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def imported_modules() -> dict[str, set[str]]:
    """Of each module, by its name, wherever in the file and for whatever purpose."""
    names = {path: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sources()}
    known = set(names.values())
    found: dict[str, set[str]] = {name: set() for name in known}
    for path, _, name in all_imports():
        found[names[path]].add(module_of(name, known))
    return {name: targets - {name, ""} for name, targets in found.items()}


def test_no_modules_need_each_other_in_a_circle():
    try:
        TopologicalSorter(imported_modules()).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_torch_is_known_to_the_engine_and_the_bench_only():
    wrong = [
        f"{path}:{line} imports {name}"
        for path, line, name in all_imports()
        if name.split(".")[0] in HEAVY and path.parts[:2] != ("tandem", "engine") and path.parts[0] != "bench"
    ]
    assert wrong == []


def test_the_engine_is_known_to_those_who_compute_only():
    wrong = [
        f"{path}:{line} imports {name}"
        for path, line, name in all_imports()
        if name.startswith("tandem.engine")
        and path.parts[:2] != ("tandem", "engine")
        and path.parts[0] not in USERS_OF_THE_ENGINE
    ]
    assert wrong == []


def test_nothing_imports_the_tests():
    assert [f"{path}:{line}" for path, line, name in all_imports() if name.split(".")[0] == "tests"] == []


IMPORT_ALL = """
import importlib, pkgutil, sys
OPTIONAL = {"ray", "redis", "bitsandbytes"}
for top in sys.argv[1:]:
    package = importlib.import_module(top)
    for module in pkgutil.walk_packages(package.__path__, top + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name.split(".")[0] not in OPTIONAL:
                raise
print(sorted({"torch", "transformers", "ray", "redis"} & set(sys.modules)))
"""


def test_importing_router_and_kvstore_loads_no_torch():
    command = [sys.executable, "-c", IMPORT_ALL, "router", "kvstore"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_code_runs_from_data():
    wrong = [
        f"{path}:{line} imports {name}"
        for path, line, name in all_imports()
        if name.split(".")[0] in BANNED_MODULES
    ]
    for path, tree in sources().items():
        meaning = aliases(path, tree)
        wrong += [f"{path}:{line} {what}" for line, what in dangerous_calls(tree, meaning)]
    assert wrong == []


def dangerous_calls(tree: ast.Module, meaning: dict[str, str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = dotted(node.func).partition(".")
        name = ".".join(part for part in (meaning.get(first, first), rest) if part)
        if name in BANNED_CALLS:
            yield node.lineno, f"calls {name}"
        for keyword in node.keywords:
            is_off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in BANNED_TRUE and not is_off:
                yield node.lineno, f"passes {keyword.arg}"


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "import os\nos.system('ls')",
        "import torch as t\nt.load('x')",
        "from torch import load as l\nl('x')",
        "import yaml\nyaml.load('x')",
        "import torch.hub\ntorch.hub.load('x')",
        "run('ls', shell=True)",
        "run('ls', shell=flag)",
        "load('x', allow_pickle=True)",
    ],
)
def test_the_check_sees_what_it_should(code):
    tree = ast.parse(code)
    assert list(dangerous_calls(tree, aliases(Path("x.py"), tree)))


@pytest.mark.parametrize("code", ["model.eval()", "run('ls', shell=False)", "import json\njson.load(f)"])
def test_the_check_leaves_the_rest_alone(code):
    tree = ast.parse(code)
    assert not list(dangerous_calls(tree, aliases(Path("x.py"), tree)))


def test_files_stay_small():
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    assert {str(path): count for path, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_stay_small():
    functions = (
        (path, node)
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    long = [
        f"{path}:{node.lineno} {node.name} has {count} lines"
        for path, node in functions
        if (count := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_every_module_says_what_it_holds():
    silent = [str(path) for path, tree in sources().items() if tree.body and not ast.get_docstring(tree)]
    assert silent == []
