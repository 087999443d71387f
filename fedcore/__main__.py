"""``python -m fedcore`` is the ``fedcore`` command."""

from .cli import main

main()
