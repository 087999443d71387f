"""``python -m benchmarks.experiments``: federated beside alone and beside all data in one place, with real models.

What is trained is kept in --out: the same command goes on where it was stopped. Times are CPU time of one core.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedcore.errors import ConfigError, FedcoreError

from ..report import console

if TYPE_CHECKING:
    from .peft import Source

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

Out = Annotated[Path, typer.Option(help="Folder for everything that comes out.")]
Cache = Annotated[Path | None, typer.Option(help="Folder for downloads.  [default: FEDCORE_CACHE]")]
Model = Annotated[
    str | None, typer.Option(help="A folder, or a name at the Hub.  [default: from a package]")
]
Quick = Annotated[bool, typer.Option("--quick", help="A short form: to see that it runs.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the training.")]


@app.callback()
def _experiments() -> None:
    """Keep the command's name, also while there is but one."""


_LOCAL: Final = (
    "local_piqa",
    "local_openbookqa",
    "local_commonsense_qa",
    "local_social_iqa",
    "local_boolq",
)


def notice(text: str) -> None:
    """One line, with the time of day."""
    console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, soft_wrap=True)


def cache_folder(cache: Path | None) -> Path:
    """Where downloads go, unless told: as for the demo."""
    return (
        cache or Path(os.environ.get("FEDCORE_CACHE", Path.home() / ".cache" / "fedcore"))
    ).resolve()


def numbers(text: str, kind: type[Any], option: str) -> list[Any]:
    """Read a list with commas between its parts."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers with commas between them") from None


def newsgroups(model: str | None, cache: Path | None) -> Source:
    """Return 20 Newsgroups with the encoder, or with another ``model``."""
    from fedcore.demo.assets import MINILM, NEWSGROUPS, ensure

    from .peft import Source
    from .swing import load_topics

    folder = cache_folder(cache)
    texts = load_topics(ensure(NEWSGROUPS, folder))
    return Source(model or ensure(MINILM, folder), texts, NEWSGROUPS.requirement)


@app.command()
def peft(
    *,
    out: Out = Path("runs/experiments/peft"),
    methods: Annotated[
        str,
        typer.Option(
            help="lora, p-tuning, ia3: the first on every split, the others on the natural one and at alpha 1."
        ),
    ] = "lora,p-tuning,ia3",
    alphas: Annotated[str, typer.Option(help="Dirichlet skews.")] = "10,5,1,0.3",
    seeds: Annotated[str, typer.Option(help="Seeds of split, start and batches.")] = "0,1,2",
    model: Model = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A .jsonl file, or a name at the Hub.  [default: four domains, from a package]"
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of a data set from the Hub.")] = "train",
    columns: Annotated[
        str, typer.Option(help="Its columns with text, label and source.")
    ] = "text,label,source",
    layers: Annotated[int, typer.Option(help="Layers of the encoder that are used; 0: all.")] = 6,
    frozen: Annotated[int, typer.Option(help="How many of them lie below the adapter.")] = 5,
    steady: Annotated[bool, typer.Option(help="Try what steadies averaging at alpha 0.3.")] = True,
    confirm: Annotated[
        bool,
        typer.Option(help="Run the first natural split again with a real server and real sites."),
    ] = True,
    report: Annotated[
        bool, typer.Option("--report", help="Train nothing: tables and figure of what is in --out.")
    ] = False,
    quick: Quick = False,
    threads: Threads = 1,
    cache: Cache = None,
) -> None:
    """Sentiment at four sites with LoRA, p-tuning and IA3: each site alone, federated, all texts in one place.

    The default takes about 30 s of CPU time for each of 48 cells, a method and a split from one seed, and half an
    hour in all; --quick a few seconds, for one seed, two rounds and few rows.
    """
    import torch

    from fedcore.demo.assets import MINILM, ensure

    from .peft import Cell, Settings, Source, cells, run_cells
    from .reports import peft_report
    from .sentiment import VADER, load_texts, load_vader

    torch.set_num_threads(threads)
    folder = cache_folder(cache)
    if dataset is None:
        texts, name = load_vader(ensure(VADER, folder)), VADER.requirement
    else:
        names = columns.split(",")
        if len(names) != 3:
            raise ConfigError(f"--columns {columns}: expected three: text, label, source")
        texts, name = load_texts(dataset, split, names), Path(dataset).name
    settings = Settings(layers=layers, frozen=frozen)
    seed_list, alpha_list = numbers(seeds, int, "--seeds"), numbers(alphas, float, "--alphas")
    if quick:
        settings = replace(settings, train_rows=16, test_rows=8, rounds=2, steps=1, batch_size=4)
        seed_list, alpha_list = seed_list[:1], alpha_list[-1:]
    source = Source(model or ensure(MINILM, folder), texts, name)
    kinds = methods.split(",")
    wanted = cells(kinds, alpha_list, seed_list, steady=steady)
    if report:
        wanted = [cell for cell in wanted if (out / "cells" / f"{cell.name}.json").is_file()]
        confirm = confirm and (out / "confirmed.json").is_file()
    notice(f"{len(wanted)} cells; --quick took seconds, the default about 30 s of CPU time each")
    found = run_cells(out, settings, source, wanted, notice)
    confirmed = None
    if confirm:
        from .confirm import confirm as compare

        first = Cell(kinds[0], "natural", seed_list[0])
        confirmed = compare(out, settings, source, first, threads)
    peft_report(out, found, settings, source, confirmed)


@app.command()
def swing(
    *,
    out: Out = Path("runs/experiments/swing"),
    seeds: Annotated[str, typer.Option(help="Seeds of split, start, sites and batches.")] = "0,1,2",
    sites: Annotated[int, typer.Option(min=2, help="Sites that hold a part of the texts.")] = 10,
    sampled: Annotated[int, typer.Option(min=1, help="Sites that train in a round.")] = 2,
    alpha: Annotated[float, typer.Option(help="Dirichlet skew.")] = 0.3,
    rounds: Annotated[int, typer.Option(min=2, help="Of plain averaging.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Of a round of plain averaging.")] = 10,
    model: Model = None,
    quick: Quick = False,
    threads: Threads = 1,
    cache: Cache = None,
) -> None:
    """20 Newsgroups at ten unlike sites, two of them in a round: how plain averaging swings, and what steadies it.

    The default takes about three minutes of CPU time for each of three seeds; --quick some seconds.
    """
    import torch

    from .reports import swing_report
    from .swing import SwingSettings, run_ways

    torch.set_num_threads(threads)
    settings = SwingSettings(sites=sites, sampled=sampled, alpha=alpha, rounds=rounds, steps=steps)
    seed_list = numbers(seeds, int, "--seeds")
    if quick:
        settings = replace(settings, train_rows=200, test_rows=20, rounds=4, steps=5, batch_size=4)
        seed_list = seed_list[:1]
    source = newsgroups(model, cache)
    swing_report(out, run_ways(out, settings, source, seed_list, notice), settings, source)


@app.command()
def liars(
    *,
    out: Out = Path("runs/experiments/liars"),
    seeds: Annotated[
        str, typer.Option(help="Seeds of split, liars, batches and noise.")
    ] = "0,1,2,3,4",
    sites: Annotated[int, typer.Option(min=5, help="Sites that hold a part of the texts.")] = 10,
    count: Annotated[int, typer.Option("--liars", min=1, help="How many of them lie.")] = 2,
    alpha: Annotated[float, typer.Option(help="Dirichlet skew.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=2, help="Of training.")] = 30,
    model: Model = None,
    quick: Quick = False,
    threads: Threads = 1,
    cache: Cache = None,
) -> None:
    """20 Newsgroups at ten sites, two of which lie in seven ways: the mean and each robust rule.

    The default takes about two minutes of CPU time for each of five seeds; --quick some seconds.
    """
    import torch

    from .liars import LiarSettings, run_liars
    from .reports import liars_report

    torch.set_num_threads(threads)
    if sites < 2 * count + 3:
        raise ConfigError(f"--liars {count}: krum needs at least {2 * count + 3} sites")
    settings = LiarSettings(sites=sites, liars=count, alpha=alpha, rounds=rounds)
    seed_list = numbers(seeds, int, "--seeds")
    if quick:
        settings = replace(settings, train_rows=200, test_rows=20, rounds=3, batch_size=4)
        seed_list = seed_list[:1]
    source = newsgroups(model, cache)
    liars_report(out, run_liars(out, settings, source, seed_list, notice), settings, source)


@app.command()
def lora(
    *,
    out: Out = Path("runs/experiments/lora"),
    seeds: Annotated[
        str, typer.Option(help="Seeds of split, start and batches; 1000 is for learning rates.")
    ] = "0,1,2,3,4",
    rounds: Annotated[int, typer.Option(min=2, help="Of training.")] = 10,
    model: Model = None,
    quick: Quick = False,
    threads: Threads = 1,
    cache: Cache = None,
) -> None:
    """20 Newsgroups at eight sites of equal and of mixed ranks: ways to bring LoRA adapters together.

    The default takes about two hours of CPU time; --quick a minute.
    """
    import torch

    from .lora import LoraSettings, run_lora
    from .lora import quick as short
    from .reports import lora_report

    torch.set_num_threads(threads)
    seed_list = numbers(seeds, int, "--seeds")
    settings = LoraSettings(rounds=rounds)
    if settings.tuned_on in seed_list:
        raise ConfigError(f"--seeds: learning rates are chosen on seed {settings.tuned_on}")
    if quick:
        settings, seed_list = short(settings), seed_list[:1]
    source = newsgroups(model, cache)
    lora_report(out, run_lora(out, settings, source, seed_list, notice), settings, source)


@app.command()
def optimizers(
    *,
    out: Out = Path("runs/experiments/optimizers"),
    seeds: Annotated[str, typer.Option(help="Seeds of split, sites and batches.")] = "0,1,2,3,4",
    sites: Annotated[int, typer.Option(min=2, help="Sites that hold a part of the texts.")] = 10,
    sampled: Annotated[int, typer.Option(min=1, help="Sites that train in a round.")] = 2,
    alpha: Annotated[float, typer.Option(help="Dirichlet skew.")] = 0.3,
    rounds: Annotated[int, typer.Option(min=2, help="Of training.")] = 40,
    model: Model = None,
    quick: Quick = False,
    threads: Threads = 1,
    cache: Cache = None,
) -> None:
    """20 Newsgroups at ten unlike sites, two of them in a round: each server optimizer beside the plain mean.

    The default takes about six minutes of CPU time; --quick some seconds.
    """
    import torch

    from .optimizers import OptimizerSettings, run_optimizers
    from .reports import optimizers_report

    torch.set_num_threads(threads)
    if sampled > sites:
        raise ConfigError(f"--sampled {sampled}: there are {sites} sites")
    settings = OptimizerSettings(sites=sites, sampled=sampled, alpha=alpha, rounds=rounds)
    seed_list = numbers(seeds, int, "--seeds")
    if quick:
        settings = replace(settings, train_rows=200, test_rows=20, rounds=4, batch_size=4)
        seed_list = seed_list[:1]
    source = newsgroups(model, cache)
    tried, found = run_optimizers(out, settings, source, seed_list, notice)
    optimizers_report(out, tried, found, settings, source)


@app.command()
def sft(
    *,
    out: Out = Path("runs/experiments/sft"),
    model: Model = None,
    sites: Annotated[
        str,
        typer.Option(
            help="NAME=DATASET,...: a .jsonl file or a name at the Hub for each site.  "
            "[default: FiQA, The Devil's Dictionary and FOLDOC, from packages]"
        ),
    ] = "",
    split: Annotated[str, typer.Option(help="Which split of data sets from the Hub.")] = "train",
    columns: Annotated[
        str, typer.Option(help="Columns with prompt and response.")
    ] = "prompt,response",
    tasks: Annotated[str, typer.Option(help="What to score on; none: train only.")] = ",".join(
        _LOCAL
    ),
    limit: Annotated[int, typer.Option(min=1, help="Rows of each task, from its first.")] = 100,
    scored: Annotated[
        int, typer.Option(min=1, help="Of how many seeds, from the first, the models are scored.")
    ] = 1,
    rounds: Annotated[
        int, typer.Option(min=1, help="With more of them, a run that has ended goes on.")
    ] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Of a round at each site.")] = 8,
    seeds: Annotated[str, typer.Option(help="Seeds of rows and batches.")] = "1,2",
    quick: Quick = False,
    threads: Threads = 1,
    cache: Cache = None,
) -> None:
    """A causal model trained whole, each site with other texts, and scored zero-shot by lm-eval.

    The default takes about 17 minutes of CPU time for the training of each of two seeds (40 steps at each site and
    as many alone and on all texts) and one minute for the scores of each of six models, 100 rows a task.
    --quick: one seed, one round of one step, 2 rows.
    """
    import torch

    from fedcore.demo.assets import QUESTIONS, SMOLLM, ensure
    from fedcore.demo.causal import SOURCES, read_exchanges
    from fedcore.demo.conversion import convert

    from .dictionaries import DEVIL, FOLDOC, read_dictionary
    from .reports import SftRun, score_arms, sft_report
    from .sft import Settings, load_exchanges, share_out, train_arms

    torch.set_num_threads(threads)
    folder = cache_folder(cache)
    settings = Settings(rounds=rounds, steps=steps)
    seed_list = numbers(seeds, int, "--seeds")
    if quick:
        settings, limit = replace(settings, train_rows=8, val_rows=2, rounds=1, steps=1), 2
        seed_list = seed_list[:1]
    if sites:
        pairs = dict(part.split("=", 1) for part in sites.split(",") if "=" in part)
        if len(pairs) != len(sites.split(",")):
            raise ConfigError(f"--sites {sites}: expected NAME=DATASET with commas between them")
        if columns.count(",") != 1:
            raise ConfigError(f"--columns {columns}: expected two: prompt, response")
        sources = {
            name: load_exchanges(data, split, columns.split(",")) for name, data in pairs.items()
        }
    else:
        finance = SOURCES["finance"]
        sources = {
            "finance": list(read_exchanges(ensure(QUESTIONS, folder) / finance.file, finance.read)),
            "satire": read_dictionary(DEVIL, folder),
            "computing": read_dictionary(FOLDOC, folder),
        }
    base = model or convert(
        ensure(SMOLLM, folder) / SMOLLM.target(SMOLLM.members[0]), folder / "smollm2-135m-instruct"
    )
    runs: dict[int, SftRun] = {}
    for seed in seed_list:
        one = replace(settings, seed=seed)
        rows = share_out(sources, one)
        curves = train_arms(out / f"seed-{seed}" / "arms", base, rows, one, notice)
        runs[seed] = SftRun(curves)
    names = [] if tasks == "none" else tasks.split(",")
    for seed, run in list(runs.items())[: scored if names else 0]:
        run.scores = score_arms(
            out, seed, base, run.curves, tasks=names, limit=limit, cache=folder, notice=notice
        )
    sft_report(out, runs, str(base), limit)


def main() -> None:
    """Run the command line; an error of fedcore's is one line."""
    try:
        app(prog_name="python -m benchmarks.experiments")
    except FedcoreError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
