"""fedcore: federated fine-tuning of language models with a compiled core.

``import fedcore`` is light: it loads neither torch nor NumPy nor the compiled core. Training scripts import
``fedcore.client`` (or ``fedcore.client.lightning``, ``fedcore.client.hf``).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fedcore-fl")
except PackageNotFoundError:  # the source tree is imported without being installed
    __version__ = "0+uninstalled"

__all__ = ["__version__"]
