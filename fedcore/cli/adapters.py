"""``fedcore aggregate --lora``: folders with adapters in, one folder out."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import typer

from fedcore.adapters.methods import BASES, Method
from fedcore.errors import ConfigError
from fedcore.words import plural

__all__ = ["Lora", "aggregate_adapters", "weights_of"]


class Lora(enum.StrEnum):
    """The methods, as the command line takes them."""

    FACTORS = "factors"
    FREEZE_A = "freeze-a"
    ALTERNATE = "alternate"
    SHARE_A = "share-a"
    EXACT = "exact"


def weights_of(text: str | None) -> list[int] | None:
    """Return the numbers in a text such as ``3,5``; None where there is no text."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text}: expected integers with commas between them") from None


def aggregate_adapters(
    folders: Sequence[Path],
    out: Path,
    *,
    lora: str | None,
    weights: Sequence[int] | None,
    max_rank: int | None,
    base: Path | None,
    allow: Sequence[str],
    threads: int,
    as_json: bool,
    given: Sequence[str],
) -> None:
    """Combine adapters and print how wrong the mean of their factors is.

    Args:
        folders: the sites' adapters.
        out: the folder to write.
        lora: the method.
        weights: one for each folder.
        max_rank: the greatest rank of what comes out.
        base: the adapter that the sites started from.
        allow: what is averaged where the method refuses it.
        threads: worker threads.
        as_json: print JSON and nothing else.
        given: options that were given and do not go with adapters.

    Raises:
        ConfigError: options do not go together.
    """
    from fedcore.adapters.combine import combine_adapters
    from fedcore.adapters.refusals import TRAITS

    if lora is None:
        raise ConfigError("--max-rank, --allow and --json go with --lora alone")
    if given:
        raise ConfigError(f"--lora does not go with {', '.join(given)}: leave that out")
    known = [trait.name for trait in TRAITS if trait.allowable] + [BASES]
    for name in allow:
        if name not in known:
            raise ConfigError(f"--allow {name}: expected one of {', '.join(known)}")
    method = cast("Method", str(lora))
    report = combine_adapters(
        folders,
        weights,
        out,
        method=method,
        max_rank=max_rank,
        base=base,
        allow=allow,
        threads=threads,
    )
    if as_json:
        typer.echo(json.dumps(report.values(), indent=2))
        return
    for line in report.lines():
        typer.echo(line)
    typer.echo(f"{out}: {plural(report.sites, 'adapter')} combined by {method}")
