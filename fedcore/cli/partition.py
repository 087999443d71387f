"""``fedcore partition``: one file of examples in, one file per site out."""

from __future__ import annotations

import contextlib
import csv
import enum
import json
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedcore.errors import ConfigError

from .common import reported

if TYPE_CHECKING:
    from fedcore.files.partition import Partition

__all__ = ["partition"]

_SHOWN_VALUES: Final = 6
_KEPT_VALUES: Final = 100


class _By(enum.StrEnum):
    IID = "iid"
    LABEL = "label"
    SOURCE = "source"
    LENGTH = "length"


@reported
def partition(
    file: Annotated[Path, typer.Argument(help="A .jsonl or .csv file.", metavar="FILE")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the sites' files.")],
    by: Annotated[_By, typer.Option(help="What tells the sites apart.")] = _By.IID,
    column: Annotated[
        str | None,
        typer.Option(help="Column with the label, source or text; as --by is called if left out."),
    ] = None,
    sites: Annotated[
        int | None,
        typer.Option(help="How many sites; may be left out with --by source: one per source."),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="With --by label: the smaller, the fewer labels a site sees.")
    ] = 0.5,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="With --by label: as many rows at each site.")
    ] = False,
    min_size: Annotated[
        int, typer.Option(help="With --by label, unbalanced: least number of rows of a site.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same split.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw who holds what; needs the package's plot extra.")
    ] = None,
) -> None:
    """Split a file of examples into one file per site.

    Writes OUT/site-1, site-2, ... with the ending of FILE, rows in their order, and OUT/partition.json with the
    settings and each site's counts. Files that are there already are refused.

    \b
    Examples:
      fedcore partition reviews.jsonl --by label --alpha 0.5 --sites 4 --seed 0 --out sites
      fedcore partition notes.csv --by source --column hospital --out sites --plot sites.png
    """
    try:
        values = list(_values(file, by, column))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text: {error.reason}") from None
    split = _split(values, by, sites, alpha=alpha, balanced=balanced, min_size=min_size, seed=seed)
    names = [f"site-{place + 1}" for place in range(len(split.sites))]
    _write(file, out, split, names)
    shown: list[Hashable] = [_length_class(v) for v in values] if by is _By.LENGTH else values
    counts = split.counts(shown)
    about: dict[str, Any] = {"file": file.name, "rows": len(values), "by": str(by), "seed": seed}
    if by is not _By.IID:
        about["column"] = column or ("text" if by is _By.LENGTH else str(by))
    if by is _By.LABEL:
        about |= {"alpha": alpha, "balanced": balanced, "min_size": min_size}
    about["sites"] = {
        name: {"rows": size, **_kept(count)}
        for name, size, count in zip(names, split.sizes, counts, strict=True)
    }
    (out / "partition.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        from fedcore.files.partition import plot as draw

        draw(split, shown, plot, names=names, title=f"{file.name} by {by}")
    for name, size, count in zip(names, split.sizes, counts, strict=True):
        typer.echo(f"{out / name}{file.suffix}: {size} rows{_listed(count, by)}")


def _split(
    values: list[Any],
    by: _By,
    sites: int | None,
    *,
    alpha: float,
    balanced: bool,
    min_size: int,
    seed: int,
) -> Partition:
    from fedcore.files import partition as split

    if by is _By.SOURCE:
        return split.by_source(values, sites, seed=seed)
    if sites is None:
        raise ConfigError("--sites: missing; say how many sites there are")
    if by is _By.LABEL:
        return split.dirichlet(
            values, sites, alpha=alpha, balanced=balanced, min_size=min_size, seed=seed
        )
    if by is _By.LENGTH:
        return split.by_length(values, sites, seed=seed)
    return split.iid(len(values), sites, seed=seed)


def _values(file: Path, by: _By, column: str | None) -> Iterator[Hashable]:
    name = column or ("text" if by is _By.LENGTH else str(by))
    for place, (row, _) in enumerate(_rows(file, parse=by is not _By.IID)):
        if by is _By.IID:
            yield ""
            continue
        if name not in row:
            raise ConfigError(
                f"{file}: row {place + 1} has no {name!r}; --column names another one of "
                f"{', '.join(map(repr, row)) or 'none'}"
            )
        value = row[name]
        if by is _By.LENGTH:
            number = isinstance(value, int | float)
            yield value if number else len(value if isinstance(value, str) else json.dumps(value))
        else:
            yield value if isinstance(value, str | int | float | bool) else json.dumps(value)


def _rows(file: Path, *, parse: bool) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Yield each row's values, and what to write for it: a line's bytes, or a list of cells.

    The header of a CSV file is left out. Without ``parse`` the values of JSON lines are empty.
    """
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parsed(file, number, line) if parse else {}, line.rstrip(b"\r\n")
    elif file.suffix == ".csv":
        with file.open(encoding="utf-8", newline="") as text:
            reader = csv.reader(text)
            header = next(reader, [])
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise ConfigError(
                        f"{file}:{reader.line_num}: {len(cells)} cells, but the header has {len(header)}"
                    )
                if cells:
                    yield dict(zip(header, cells, strict=True)), cells
    else:
        raise ConfigError(f"{file}: expected a file that ends in .jsonl or .csv")


def _parsed(file: Path, number: int, line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{file}:{number}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{file}:{number}: expected a JSON object, got {type(row).__name__}")
    return row


def _write(file: Path, out: Path, split: Partition, names: list[str]) -> None:
    """Write each site's file; all of them appear once all are complete."""
    paths = [out / f"{name}{file.suffix}" for name in names]
    for path in (*paths, out / "partition.json"):
        if path.exists():
            raise ConfigError(f"{path} is there already; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    where = {index: site for site, held in enumerate(split.sites) for index in held}
    partial = [path.with_name(f".{path.name}.partial") for path in paths]
    with contextlib.ExitStack() as stack:
        if file.suffix == ".csv":
            with file.open(encoding="utf-8", newline="") as text:
                header = next(csv.reader(text), [])
            writers = [
                csv.writer(stack.enter_context(path.open("w", encoding="utf-8", newline="")))
                for path in partial
            ]
            for writer in writers:
                writer.writerow(header)
            for index, (_, cells) in enumerate(_rows(file, parse=False)):
                writers[where[index]].writerow(cells)
        else:
            files = [stack.enter_context(path.open("wb")) for path in partial]
            for index, (_, line) in enumerate(_rows(file, parse=False)):
                files[where[index]].write(line + b"\n")
    for before, path in zip(partial, paths, strict=True):
        before.rename(path)


def _length_class(value: Any) -> str:
    """Return the power of two below a length, in words."""
    low = 1 << max(0, int(value).bit_length() - 1)
    return f"{low:>6} to {2 * low - 1}" if value >= 1 else "     0"


def _kept(count: Mapping[Any, int]) -> dict[str, Any]:
    if len(count) > _KEPT_VALUES or set(count) == {""}:
        return {}
    return {"counts": {str(value).strip(): count[value] for value in sorted(count, key=str)}}


def _listed(count: Mapping[Any, int], by: _By) -> str:
    if by is _By.IID:
        return ""
    most = sorted(count.items(), key=lambda item: (-item[1], str(item[0])))
    text = ", ".join(f"{str(value).strip()} {number}" for value, number in most[:_SHOWN_VALUES])
    more = f" and {len(most) - _SHOWN_VALUES} more" if len(most) > _SHOWN_VALUES else ""
    return f" ({text}{more})"
