"""No byte from elsewhere is ever run: nothing in the package unpickles or evaluates."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN_MODULES = {
    "cloudpickle", "cPickle", "dill", "jsonpickle", "joblib", "marshal", "pickle", "shelve", "_pickle",
}  # fmt: skip
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    ("torch", "load"), ("torch.jit", "load"), ("os", "system"), ("os", "popen"), ("yaml", "load"),
    ("yaml", "unsafe_load"), ("builtins", "eval"), ("builtins", "exec"),
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def offences(source: str) -> list[str]:
    """Return what in a Python source could run foreign bytes."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            found += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if (node.module, alias.name) in FORBIDDEN_CALLS
            ]
        found += [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            found += called(node)
    return found


def called(node: ast.Call) -> list[str]:
    name = dotted(node.func)
    module, _, attribute = name.rpartition(".")
    found = [name] if name in FORBIDDEN_NAMES or (module, attribute) in FORBIDDEN_CALLS else []
    for keyword in node.keywords:
        harmless = isinstance(keyword.value, ast.Constant) and not keyword.value.value
        if keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and not harmless:
            found.append(f"{name}({keyword.arg}=...)")
    return found


SOURCES = sorted(
    path
    for folder in ("fedcore", "clients")
    for path in (ROOT / folder).rglob("*.py*")
    if path.suffix in (".py", ".pyx")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        assert offences(text) == []
    else:  # not Python's grammar
        assert not any(word in text for word in ("pickle", "eval(", "exec("))


@pytest.mark.parametrize(
    "added",
    [
        "import pickle",
        "import pickle as json",
        "from pickle import loads",
        "import os, marshal",
        "import torch\nstate = torch.load(path)",
        "import torch\ndef f(p):\n    return torch.load(p, weights_only=True)",
        "from torch import load",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=flag)",
        "x = eval(text)",
        "exec(code)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(p, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_is_for(added: str) -> None:
    assert offences(added)


def test_the_search_lets_pass_what_is_harmless() -> None:
    assert not offences(
        "import re\nre.compile('x')\nmodel.eval()\nnp.load(p, allow_pickle=False)\nself.load(x)"
    )
    assert len(SOURCES) > 50
