"""``fedcore rollback``: an earlier round's model becomes the last one of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcore.errors import ConfigError

from .common import reported

__all__ = ["rollback"]


@reported
def rollback(
    folder: Annotated[Path, typer.Argument(help="The run folder.", metavar="RUN_FOLDER")],
    round_: Annotated[
        int, typer.Argument(min=0, help="The round whose model becomes the last.", metavar="ROUND")
    ],
) -> None:
    """Go back to an earlier round of a run.

    No server may work on the run. The later models, best/, final/ and the summary move to RUN_FOLDER/discarded-N,
    with a copy of the journal; nothing is removed. The run has another id from then on: start the sites again too.

    \b
    Examples:
      fedcore rollback runs/sentiment 3
    """
    from fedcore.server.storage.store import Store

    if not (folder / "run.sqlite").is_file():
        raise ConfigError(f"{folder} is no run folder: it has no journal (run.sqlite)")
    store = Store(folder, None)
    try:
        aside = store.roll_back(round_)
        anew = round_ in store.left_states
    finally:
        store.close()
    typer.echo(f"{folder} is at round {round_}; what came after it is in {aside}")
    if anew:
        typer.echo(
            f"the server optimizer begins anew after round {round_}: its state is kept for the last model alone"
        )
