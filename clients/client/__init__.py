"""What a training script imports to take part in a run.

For PyTorch Lightning ``import fedcore.client.lightning as fl``, for ``transformers.Trainer``
``import fedcore.client.hf as fl``, and for any other loop::

    import fedcore.client as fl

    fl.init(model)                       # a torch module, or a dict of arrays
    while fl.is_running():
        params = fl.receive()            # name -> tensor (or array) of the global model
        model.load_state_dict(params, strict=False)
        metrics = evaluate(model)        # scores the global model
        examples = train(model)
        fl.send(model.state_dict(), weight=examples, metrics=metrics)

Where the server is and which site this is comes from the environment (see `fedcore.site.settings`).
Importing this module loads neither torch nor NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

from .plain import (
    answer,
    init,
    is_evaluate,
    is_infer,
    is_running,
    is_submit,
    is_train,
    load,
    log,
    outcome,
    receive,
    send,
    shutdown,
    system_info,
)
from .restoring import restore
from .tasks import Task, task

__all__ = [
    "Task",
    "answer",
    "init",
    "is_evaluate",
    "is_infer",
    "is_running",
    "is_submit",
    "is_train",
    "load",
    "log",
    "outcome",
    "receive",
    "restore",
    "send",
    "shutdown",
    "system_info",
    "task",
]

_NO_PATCH: Final = (
    "fedcore.client has no patch(): a Lightning Trainer is patched by `import fedcore.client.lightning as fl`, a "
    "transformers.Trainer by `import fedcore.client.hf as fl`; a loop of your own calls fl.receive() and fl.send()"
)


def __dir__() -> list[str]:
    """List what a script may use, and not what this module imports."""
    return sorted(__all__)


if not TYPE_CHECKING:  # a type checker is to know which names there are

    def __getattr__(name: str) -> NoReturn:
        raise AttributeError(
            _NO_PATCH if name == "patch" else f"module {__name__!r} has no attribute {name!r}"
        )
