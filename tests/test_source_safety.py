"""Nothing in this repository's own code unpickles, evaluates text as code, or hands text to a shell.

A checkpoint, a picture or a request may come from anybody. What the tests themselves do is not looked at: they make
malicious files on purpose.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("pipeline", "prompting", "weights", "web", "training", "benchmarks", "scripts", "app.py")

UNPICKLERS = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})
HARMLESS = ("pickle.UnpicklingError",)
"""What torch raises where it refuses a file."""
_BUILTINS = ("eval", "exec", "__import__")
FORBIDDEN = frozenset(
    {
        *_BUILTINS,
        *(f"{module}.{name}" for module in ("builtins", "__builtins__") for name in _BUILTINS),
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
    }
)


def faults(source: str) -> list[str]:
    """What is not allowed in a module, each with its line."""
    tree = ast.parse(source)
    names = imported_names(tree)
    return sorted({f"line {line}: {what}" for line, what in _faults(tree, names)})


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Name in the module -> what it was imported as: `import torch as t` makes `t` stand for `torch`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _faults(tree: ast.AST, names: dict[str, str]) -> Iterator[tuple[int, str]]:
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            modules = []
        for module in modules:
            if module not in HARMLESS and UNPICKLERS.intersection(module.split(".")):
                yield node.lineno, f"imports {module}"
        if isinstance(node, ast.Name | ast.Attribute):
            full = _full_name(node, names)
            if full in FORBIDDEN:
                yield node.lineno, full
            elif full in ("torch.load", "torch.serialization.load") and id(node) not in called:
                yield node.lineno, "torch.load under another name, so that nobody sees how it is called"
        if isinstance(node, ast.Call):
            yield from _call_faults(node, _full_name(node.func, names))


def _call_faults(call: ast.Call, full: str) -> Iterator[tuple[int, str]]:
    literal = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
    given = {word.arg for word in call.keywords}
    if full in ("torch.load", "torch.serialization.load") and literal.get("weights_only") is not True:
        yield call.lineno, "torch.load without a literal weights_only=True"
    if full in ("numpy.load", "np.load") and "allow_pickle" in given and literal.get("allow_pickle") is not False:
        yield call.lineno, "numpy.load that may unpickle"
    for word, allowed in (("shell", False), ("verify", True), ("trust_remote_code", False)):
        if word in given and literal.get(word) is not allowed:
            yield call.lineno, f"{word}= something other than {allowed}"


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    """`t.load` -> `torch.load`, where `t` was imported so; empty for what has no name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = _full_name(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def own_files() -> list[Path]:
    return [
        file for place in PLACES for file in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
    ]


def test_the_repository_has_none_of_it() -> None:
    files = own_files()
    assert len(files) > 150 and all(any(str(file).startswith(str(ROOT / place)) for file in files) for place in PLACES)
    found = {str(file.relative_to(ROOT)): told for file in files if (told := faults(file.read_text(encoding="utf-8")))}
    assert found == {}


def test_checkpoints_are_read_somewhere() -> None:
    """Or else the rule for torch.load would hold because nothing is looked at."""
    trees = [ast.parse(text) for file in own_files() if "torch.load" in (text := file.read_text(encoding="utf-8"))]
    calls = [
        node
        for tree in trees
        for names in [imported_names(tree)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _full_name(node.func, names) == "torch.load"
    ]
    assert len(calls) >= 2


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('a.pt')",
        "import torch\ntorch.load('a.pt', weights_only=False)",
        "import torch\nsafe = True\ntorch.load('a.pt', weights_only=safe)",
        "import torch\ntorch.load('a.pt', **options)",
        "import torch as t\nt.load('a.pt')",
        "from torch import load\nload('a.pt')",
        "from torch import load as read\nread('a.pt', weights_only=1)",
        "import torch.serialization\ntorch.serialization.load('a.pt')",
        "import torch\nread = torch.load",
        "from functools import partial\nimport torch\npartial(torch.load, weights_only=True)",
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from pickle import UnpicklingError, loads",
        "import cloudpickle",
        "def later():\n    import joblib",
        "from torch import _pickle",
        "eval('1')",
        "run = exec",
        "import builtins\nbuiltins.eval('1')",
        "__import__('os')",
        "import os\nos.system('ls')",
        "from os import system\nsystem('ls')",
        "from os import system as run\nlist(map(run, ['ls']))",
        "import os\nos.popen('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=wanted)",
        "import subprocess\nsubprocess.getoutput('ls')",
        "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
        "requests.get(url, verify=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_is_not_allowed_is_found(source: str) -> None:
    assert faults(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('a.pt', map_location='cpu', weights_only=True)",
        "from torch import load as read\nread('a.pt', weights_only=True)",
        "import json\njson.load(file)",
        "from pickle import UnpicklingError",
        "import numpy as np\nnp.load('a.npy', mmap_mode='r')\nnp.load('b.npy', allow_pickle=False)",
        "model.eval()\nself.model.eval().requires_grad_(False)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import os\nos.path.join('a', 'b')",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "'''torch.load, pickle and eval( in words only'''",
        "checkpoints.load(state)",
    ],
)
def test_what_is_allowed_is_left_alone(source: str) -> None:
    assert faults(source) == []
