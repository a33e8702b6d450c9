"""The runtime is what the board runs: Python 3.6, the standard library, numpy and OpenCV in every module of it.

Only the source is read, so this runs under any Python. `tests/runtime` runs the same modules under a real 3.6 where
there is one.
"""
import ast
import sys
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parent.parent / "jetson_det" / "runtime"
MODULES = sorted(RUNTIME.rglob("*.py"))
ALLOWED = {"numpy", "cv2"}  # beside the standard library and the runtime itself
# inside the functions that need them, or tried
LAZY = {"onnxruntime", "tensorrt", "pycuda", "redis", "simplejpeg", "yaml"}
NOT_IN_36 = {
    "dataclasses", "contextvars", "graphlib", "zoneinfo", "tomllib", "importlib.metadata", "importlib.resources"
}
NAMES_NOT_IN_36 = {
    "typing": (
        "Literal Protocol Final TypedDict runtime_checkable Annotated ForwardRef SupportsIndex get_origin get_args"
        " ParamSpec TypeAlias Self".split()
    ),
    "contextlib": ["nullcontext", "AsyncExitStack", "asynccontextmanager", "chdir"],
    "functools": ["cached_property", "cache", "singledispatchmethod"],
    "math": ["prod", "dist", "comb", "perm", "isqrt", "lcm", "nextafter"],
    "time": ["perf_counter_ns", "time_ns", "monotonic_ns", "process_time_ns"],
    "datetime": ["UTC"],
    "__future__": ["annotations"],
    "itertools": ["pairwise", "batched"],
    "statistics": ["fmean", "quantiles", "NormalDist"],
    "shlex": ["join"],
    "asyncio": ["run", "to_thread"],
    "importlib": ["metadata", "resources"],
}
METHODS_NOT_IN_36 = {
    "removeprefix", "removesuffix", "fromisoformat", "is_relative_to", "with_stem", "unlink_missing", "isascii"
}
KEYWORDS_NOT_IN_36 = {"capture_output", "missing_ok", "dirs_exist_ok", "stacklevel_skip"}


def problems(source, depth=0):
    """What a Python 3.6 would not take, and imports that a board can't serve: `line: what`. A module lies `depth`
    folders below the runtime."""
    try: tree = ast.parse(source, feature_version=(3, 6))
    except SyntaxError as e: return ["{}: not Python 3.6: {}".format(e.lineno, e.msg)]
    found = []
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside.update(id(n) for n in ast.walk(node) if n is not node)
        if isinstance(node, ast.Try) and any(getattr(h.type, "id", "") == "ImportError" for h in node.handlers):
            inside.update(id(n) for line in node.body for n in ast.walk(line))
    for node in ast.walk(tree):
        line = getattr(node, "lineno", "?")
        faults = _syntax(node) + _names(node) + _imports(node, id(node) in inside, depth)
        found += ["{}: {}".format(line, fault) for fault in faults]
    return found


def _syntax(node):
    "Newer grammar that `feature_version` lets through or that older Pythons of this test know."
    if isinstance(node, ast.NamedExpr): return ["assignment expression"]
    if isinstance(node, ast.arguments) and node.posonlyargs: return ["positional-only parameter"]
    if type(node).__name__ in ("Match", "TryStar", "TypeAlias"): return [type(node).__name__ + " statement"]
    annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
    for part in ast.walk(annotation) if annotation is not None else ():
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitOr): return ["X|Y in an annotation"]
        name = getattr(part.value, "id", "") if isinstance(part, ast.Subscript) else ""
        if name in ("list", "dict", "tuple", "set", "type", "frozenset"):
            return ["{}[...] in an annotation".format(name)]
    return []


def _names(node):
    "Names that came after 3.6."
    if isinstance(node, ast.Attribute):
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        if node.attr in NAMES_NOT_IN_36.get(owner, ()): return ["{}.{}".format(owner, node.attr)]
        if node.attr in METHODS_NOT_IN_36: return ["." + node.attr]
    if isinstance(node, ast.Call):
        names = [k.arg for k in node.keywords if k.arg in KEYWORDS_NOT_IN_36]
        owner = ""
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name): owner = node.func.value.id
        if owner == "subprocess" and any(k.arg == "text" for k in node.keywords): names.append("text")
        return ["{}= of a call".format(n) for n in names]
    return []


def _imports(node, lazy, depth):
    "Imports that are new, foreign, or of the package above the runtime."
    if isinstance(node, ast.Import): modules = [(a.name, []) for a in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [a.name for a in node.names]
        if "*" in names: return ["import *"]
        if 1 <= node.level <= depth + 1: return []  # the runtime's own
        if node.level > 1: return ["imports {}{}, above the runtime".format("." * node.level, node.module or "")]
        modules = [(node.module, names)]
    else: return []
    found = []
    for module, names in modules:
        top = module.split(".")[0]
        if module in NOT_IN_36: found.append("imports {}, which 3.6 has not".format(module))
        found += ["{}.{}".format(module, n) for n in names if n in NAMES_NOT_IN_36.get(module, ())]
        if top == "jetson_det":
            found += [] if module.startswith("jetson_det.runtime") else ["imports {}, above the runtime".format(module)]
        elif top not in sys.stdlib_module_names and top not in ALLOWED and not (lazy and top in LAZY):
            found.append("imports {}".format(top))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(RUNTIME).as_posix())
def test_module_is_python36_and_a_leaf(path):
    depth = len(path.relative_to(RUNTIME).parts) - 1
    assert problems(path.read_text(encoding="utf-8"), depth) == []


def test_there_are_modules():
    there = {p.relative_to(RUNTIME).as_posix() for p in MODULES}
    names = ("geometry", "nms", "contract", "preprocess", "postprocess", "sessions", "boards", "stream/sources")
    assert {name + ".py" for name in names} <= there


@pytest.mark.parametrize("source", [
    "if (n := 3) > 2: pass",
    "def f(a, /, b): pass",
    "from __future__ import annotations",
    "def f(a:int|None): pass",
    "def f()->list[int]: pass",
    "x:dict[str, int] = {}",
    "import dataclasses",
    "from typing import Literal",
    "import typing\ntyping.Protocol",
    "from importlib import metadata",
    "import importlib.resources",
    "import torch",
    "import onnxruntime",
    "from ..core import rng_for",
    "from jetson_det.core import rng_for",
    "from .geometry import *",
    "match 3:\n    case 3: pass",
    "import time\ntime.perf_counter_ns()",
    "import subprocess\nsubprocess.run([], capture_output=True)",
    "import subprocess\nsubprocess.run([], text=True)",
    "from contextlib import nullcontext",
    "'a'.removeprefix('b')",
])
def test_the_check_finds(source):
    assert problems(source)


def test_the_check_knows_folders_of_the_runtime():
    assert problems("from ..geometry import Fit", depth=1) == []
    assert problems("from ...core import rng_for", depth=1) == ["1: imports ...core, above the runtime"]


def test_the_check_allows():
    source = """
import numpy as np
from typing import NamedTuple
from .nms import nms
def f(a:int=3)->'x':
    import onnxruntime
    return f'{a}'
x:int = 2
"""
    assert problems(source) == []
