"""Nothing that turns bytes into code, anywhere: read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cache", "forebay", "gpu_worker", "producer", "scheduler", "service", "wire")

FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_NAMES = {"compile", "eval", "exec", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    # These pickle, or unpickle, what they are given.
    "torch.load",
    "torch.save",
    "torch.distributed.rpc",
    "numpy.load",
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
    # These give a string to a shell.
    "os.system",
    "os.popen",
    "subprocess.getoutput",
}
ALIASES = {"np": "numpy", "dist": "torch.distributed"}


def forbidden_uses(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each forbidden use in `source`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    if alias.name.partition(".")[0] in FORBIDDEN_MODULES:
                        yield node.lineno, alias.name
            case ast.ImportFrom(module=module, names=names):
                if str(module).partition(".")[0] in FORBIDDEN_MODULES:
                    yield node.lineno, str(module)
                for alias in names:
                    if is_forbidden(f"{module}.{alias.name}"):
                        yield node.lineno, f"{module}.{alias.name}"
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_NAMES:
                yield node.lineno, name
            case ast.Attribute() if is_forbidden(dotted(node)):
                yield node.lineno, dotted(node)
            case ast.keyword(arg="shell", value=ast.Constant(value=True)):
                yield node.value.lineno, "shell=True"
            case ast.keyword(
                arg="allow_pickle" | "trust_remote_code", value=ast.Constant(value=True)
            ):
                yield node.value.lineno, str(node.arg)


def is_forbidden(name: str) -> bool:
    return name in FORBIDDEN_ATTRIBUTES or name.rpartition(".")[2] in FORBIDDEN_ATTRIBUTES


def dotted(node: ast.expr) -> str:
    match node:
        case ast.Attribute(value=value, attr=attribute):
            return f"{dotted(value)}.{attribute}"
        case ast.Name(id=name):
            return ALIASES.get(name, name)
        case _:
            return "?"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_runs_no_bytes_as_code(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        uses = list(forbidden_uses(path.read_text()))
        assert not uses, f"{path.relative_to(ROOT)}: {uses}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "import numpy as np\nnp.load(path)",
        "dist.broadcast_object_list(items)",
        "from torch.distributed import all_gather_object",
        "subprocess.run(text, shell=True)",
        "np.fromfile(path, allow_pickle=True)",
    ],
)
def test_the_reader_sees_what_it_looks_for(source: str) -> None:
    assert list(forbidden_uses(source))


@pytest.mark.parametrize("source", ["model.eval()", "re.compile(x)", "torch.compile(f)"])
def test_the_reader_lets_namesakes_pass(source: str) -> None:
    assert not list(forbidden_uses(source))
