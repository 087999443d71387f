"""Tests use what is public: no private member is read or replaced where a clock, a link or a setting will do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]
ROOTS: Final = ("fedcore", "benchmarks")
MODULES: Final = {"_core", "_cuda", "_device", "_pump"}
PUBLIC: Final = {"_asdict", "_exit", "_fields", "_replace", "__version__"}
"""Members of the standard library that are public in spite of their names."""
OF_OTHERS: Final = {
    "_average_model",
    "_get_backend",
    "_get_train_sampler",
    "_name_or_path",
    "_register_state_dict_hook",
    "_shared_state",
    "_timeout",
    "_fedcore",  # what Lightning's trainer carries for the adapter
}
"""Members of other packages' objects, for which there is no public way."""
FREE: Final = MODULES | PUBLIC | OF_OTHERS


def private(name: str) -> bool:
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not dunder and name not in FREE


def replaced(call: ast.Call) -> list[str]:
    """Return the private members that a call of ``monkeypatch`` replaces."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("setattr", "delattr"):
        return []
    given = [value.value for value in call.args[:2] if isinstance(value, ast.Constant)]
    return [v for v in given if isinstance(v, str) and private(v.rpartition(".")[2])]


def private_uses(source: str) -> Iterator[tuple[int, str]]:
    """Yield where a module reads, imports or replaces a private member of anything but its own objects."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if private(node.attr) and not own:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(ROOTS):
            for alias in node.names:
                if private(alias.name):
                    yield node.lineno, f"from {node.module} import {alias.name}"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, f"{name} is replaced") for name in replaced(node))


def test_no_test_uses_a_private_member() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{line}: {what}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, what in private_uses(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_each_way_to_a_private_member_is_found() -> None:
    source = (
        "from fedcore.clock import _start\n"
        "server._link\n"
        "monkeypatch.setattr(module, '_SECONDS', 1)\n"
        "monkeypatch.setattr('fedcore.module._SECONDS', 1)\n"
        "self._own, point._replace, fedcore._core, object.__new__\n"
    )
    assert [line for line, _ in private_uses(source)] == [1, 2, 3, 4]
