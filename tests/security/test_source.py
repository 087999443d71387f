"""No byte from elsewhere is ever run: nothing in the package unpickles or evaluates."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN_MODULES = {
    "cloudpickle", "cPickle", "dill", "jsonpickle", "joblib", "marshal", "pickle", "shelve", "_pickle", "runpy",
    "hickle", "pickletools", "xmlrpc",
}  # fmt: skip
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    ("torch", "load"), ("torch.jit", "load"), ("torch.hub", "load"), ("torch.serialization", "load"),
    ("os", "system"), ("os", "popen"), ("yaml", "load"), ("yaml", "load_all"), ("yaml", "full_load"),
    ("yaml", "unsafe_load"), ("builtins", "eval"), ("builtins", "exec"), ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"), ("pandas", "read_pickle"), ("pd", "read_pickle"),
    ("code", "interact"),
}  # fmt: skip
# Whatever they are called on: methods that unpickle what comes from another process.
FORBIDDEN_METHODS = {
    "recv_pyobj", "send_pyobj", "all_gather_object", "broadcast_object_list", "gather_object",
    "scatter_object_list", "recv_object_list", "read_pickle", "unsafe_load",
}  # fmt: skip
# A subprocess is given words, not a line that a shell reads; `shell` may also come by position.
SHELLS = {"sh", "bash", "/bin/sh", "/bin/bash"}


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
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_METHODS:
            found.append(node.attr)
        elif isinstance(node, ast.Attribute) and split(dotted(node)) in FORBIDDEN_CALLS:
            found.append(dotted(node))  # handed on, to be called elsewhere
    return found


def split(name: str) -> tuple[str, str]:
    module, _, attribute = name.rpartition(".")
    return module, attribute


def called(node: ast.Call) -> list[str]:
    name = dotted(node.func)
    found = [name] if name in FORBIDDEN_NAMES else []
    if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
        reached = (dotted(node.args[0]), node.args[1].value)
        found += [name] if reached in FORBIDDEN_CALLS else []
    if name.startswith("subprocess.") and node.args and isinstance(node.args[0], ast.List):
        words = [word.value for word in node.args[0].elts if isinstance(word, ast.Constant)]
        found += [f"{name}({words[0]})"] if words and words[0] in SHELLS else []
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
        "import numpy as np\nnp.memmap\nnp.lib.format.read_array(f, allow_pickle=True)",
        "import torch\nload = torch.load",
        "import torch\ngetattr(torch, 'load')(path)",
        "import torch\ntorch.hub.load('a/b', 'c')",
        "import torch.distributed as dist\ndist.broadcast_object_list(found)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.UnsafeLoader)",
        "import yaml\nyaml.full_load(text)",
        "import marshal\nmarshal.loads(data)",
        "import shelve\nshelve.open(path)",
        "import dill",
        "import pandas as pd\npd.read_pickle(path)",
        "socket.recv_pyobj()",
        "import runpy\nrunpy.run_path(path)",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.getoutput(text)",
        "import subprocess\nsubprocess.Popen(text, shell=flag)",
        "import subprocess\nsubprocess.run(['sh', '-c', text])",
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
    assert not offences("import subprocess\nsubprocess.run([sys.executable, path], shell=False)")
    assert not offences("import yaml\nyaml.safe_load(text)\nnp.load(p)")


def test_the_search_covers_the_whole_package_and_the_demo() -> None:
    names = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert len(names) > 50
    assert {"fedcore/_pump.pyx", "fedcore/server/run.py", "fedcore/site/session.py"} <= names
    assert {"clients/demo/work.py", "clients/examples/plain_loop.py"} <= names
