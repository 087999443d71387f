"""``python -m fedcore`` is the ``fedcore`` command."""

from fedcore.cli.app import main

main()
