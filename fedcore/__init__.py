"""fedcore: federated fine-tuning of language models with a compiled core.

``import fedcore`` is light: it loads neither torch nor NumPy nor the compiled core. Training scripts import
``fedcore.client`` (or ``fedcore.client.lightning``, ``fedcore.client.hf``).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

if find_spec("fedcore._core") is None:
    raise ImportError(
        f"{__path__[0]} is fedcore's source, with no compiled core, and Python found it before an installed "
        "fedcore, as it looks first in the folder of the script: put the script into another folder, or start it "
        "with `python -P`; `pip install .` in the checkout installs fedcore"
    )

try:
    __version__ = version("fedcore-fl")
except PackageNotFoundError:  # built, and imported without being installed
    __version__ = "0+uninstalled"

__all__ = ["__version__"]
