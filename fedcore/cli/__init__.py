"""The commands ``fedcore`` and ``fedcore-server``."""

from .app import main, server_main

__all__ = ["main", "server_main"]
