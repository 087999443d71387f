"""The commands ``fedcore`` and ``fedcore-server``. Whatever is heavy is imported inside the commands."""

from __future__ import annotations

import enum
import importlib
import importlib.util
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fedcore import __version__
from fedcore.errors import ConfigError
from fedcore.rules import RULES
from fedcore.rules.deciding import Decision
from fedcore.rules.several import SEVERAL
from fedcore.words import plural

from .adapters import Lora, aggregate_adapters, weights_of
from .common import INTERRUPTED, reported, writable_output
from .evaluate import evaluate
from .inspect import inspect
from .partition import partition
from .rollback import rollback
from .security import Insecure, InsecureNetwork, register
from .status import WATCH_SECONDS, status
from .steering import register as register_steering

if TYPE_CHECKING:
    from fedcore.config import RunConfig
    from fedcore.server.host import Host
    from fedcore.server.run import Run
    from fedcore.simulation.processes import SimulationResult

__all__ = ["main", "server_main"]

_LINE: Final = "%(asctime)s %(levelname)s %(message)s"

app = typer.Typer(
    name="fedcore",
    help="Federated fine-tuning of language models with a compiled core.\n\n"
    "Exit status: 0 done, 1 failed, 2 wrong use or configuration, 130 stopped by Ctrl-C or an operator, "
    "143 or 129 for a server that SIGTERM or SIGHUP ended: its run goes on once it is started again. "
    "FEDCORE_DEBUG=1 shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFile = Annotated[Path, typer.Argument(help="The run file (TOML).", metavar="RUN.toml")]
RunFiles = Annotated[
    list[Path], typer.Argument(help="The run file (TOML), or several.", metavar="RUN.toml")
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the run file, e.g. --set run.rounds=3; may be given more than once.",
    ),
]


class _Device(enum.StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class _DemoTask(enum.StrEnum):
    ENCODER = "encoder"
    CAUSAL = "causal"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fedcore {__version__}")
        raise typer.Exit


ShowVersion = Annotated[
    bool,
    typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
]


@app.callback()
def _options(_: ShowVersion = False) -> None:
    pass


@app.command()
@reported
def server(  # noqa: PLR0917 - typer calls it by name
    run_files: RunFiles,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nobody changes it
    endpoint_file: Annotated[
        Path | None, typer.Option(help="Write the address that the server listens on to this file.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log details as well.")] = False,
    discard: Annotated[
        bool,
        typer.Option(
            "--discard", help="Move models that the journal does not know to RUN/discarded-N."
        ),
    ] = False,
    insecure: Insecure = False,
    insecure_network: InsecureNetwork = False,
    _: ShowVersion = False,
) -> None:
    """Serve one run or several: run the rounds and keep the best model.

    The run file's [server] keys names the server's kit, which `fedcore provision` makes; without it, --insecure
    asks for plain text, on this machine alone.

    Started again on the same run folder, it goes on after the last committed round. Ctrl-C and `fedcore stop` end
    the run cleanly with that round on disk. SIGTERM and SIGHUP end this process only: the sites wait until it is
    started again. The same as the command fedcore-server.

    Several runs have one port: server.listen, the keys and server.memory must be the same in their run files, and
    they share the memory in equal parts. Each site says which run it takes part in (FEDCORE_RUN, its kit, or
    run=... in its script).

    \b
    Examples:
      fedcore server run.toml
      fedcore server run.toml --set server.listen=tcp://0.0.0.0:7733 --set run.rounds=20
      fedcore server first.toml second.toml
    """
    from fedcore.config import load_run_file
    from fedcore.monitor.ask import ENDPOINT_FILE
    from fedcore.replacing import partial_of, put_in_place
    from fedcore.server.host import Host

    given = [*overrides, *_plain_text(insecure, insecure_network)]
    configs = [load_run_file(run_file, given) for run_file in run_files]
    process = Host(configs, endpoint_file, discard=discard)
    several = len(process.runs) + len(process.waiting) > 1
    log = _Log(logging.DEBUG if verbose else logging.INFO, several=several)

    def show(run: Run) -> None:
        which = f"#{run.store.run_id}" if several else ""
        endpoint = run.store.folder / ENDPOINT_FILE
        with partial_of(endpoint) as partial:
            partial.write_text(f"{process.endpoint}{which}\n", encoding="utf-8")
            put_in_place(partial, endpoint)
        log.add(run.config)

    for run in process.runs:
        show(run)
    process.opened = show
    ended_by = _take_signals(process)
    try:
        results = process.serve(None)
    finally:
        for run in process.runs:
            if run.error is None:  # else another server may have its own there
                (run.store.folder / ENDPOINT_FILE).unlink(missing_ok=True)
    statuses = []
    for run, result in zip(process.runs, results, strict=True):
        if result.ok:
            continue
        stopped = result.ending == "stopped"
        text = f"run {run.config.run.name}: {result.message}" if several else result.message
        typer.echo(text if stopped else f"error: {text}", err=True)
        interrupted = result.ending == "interrupted" and ended_by
        statuses.append(128 + ended_by[-1] if interrupted else INTERRUPTED if stopped else 1)
    for name in process.unopened:
        typer.echo(f"error: run {name} was not opened: its database was locked", err=True)
        statuses.append(128 + ended_by[-1] if ended_by else 1)
    if statuses:
        raise typer.Exit(status_of_all(statuses))


def status_of_all(statuses: list[int]) -> int:
    """Return the status of several runs that are not complete: 1 where one has failed, else that of one that goes
    on once the server is started again, if any."""
    going_on = [status for status in statuses if status != INTERRUPTED]
    return 1 if 1 in statuses else (going_on or statuses)[0]


def _take_signals(process: Host) -> list[int]:
    """Have signals end the run, or this process; returns a list to which those that end the process are added."""
    ended_by: list[int] = []

    def interrupt(number: int, _: object) -> None:
        ended_by.append(number)
        process.interrupt(signal.Signals(number).name)

    signal.signal(signal.SIGINT, lambda *_: process.stop())
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else started by nohup: it goes on
        signal.signal(signal.SIGHUP, interrupt)
    return ended_by


def _plain_text(insecure: bool, network: bool) -> list[str]:
    """Return the overrides that two flags stand for."""
    given = {"server.insecure": insecure, "server.insecure_network": network}
    return [f"{key}=true" for key, value in given.items() if value]


class _Log:
    """The lines of a server: on the terminal, and in the folder of each run."""

    def __init__(self, level: int, *, several: bool) -> None:
        from fedcore.server.run_log import name_run

        self._log = logging.getLogger("fedcore.server")
        self._log.setLevel(level)
        shown = logging.StreamHandler()
        # The files alone have traces.
        shown.addFilter(lambda record: not getattr(record, "trace", ""))
        shown.setFormatter(_Traced(_LINE))
        if several:
            shown.addFilter(name_run)
            shown.setFormatter(_Stamped("%(asctime)s %(levelname)s %(run)s%(message)s"))
        self._log.addHandler(shown)

    def add(self, config: RunConfig) -> None:
        """Write the lines of a run into its folder, too."""
        from fedcore.server.run_log import OfRun

        handler = logging.FileHandler(config.run_folder / "server.log")
        handler.addFilter(OfRun(config.run.name))
        handler.setFormatter(_Traced(_LINE))
        self._log.addHandler(handler)


class _Stamped(logging.Formatter):
    """Writes times as ISO 8601 has them, with the offset to UTC: a run may last days, in several zones."""

    def formatTime(self, record: logging.LogRecord, _: str | None = None) -> str:  # noqa: N802
        return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="seconds")


class _Traced(_Stamped):
    """Writes the trace of code that is not ours below the line that says what failed."""

    def format(self, record: logging.LogRecord) -> str:
        line, trace = super().format(record), getattr(record, "trace", "")
        return f"{line}\n{trace.rstrip()}" if trace else line


@app.command()
@reported
def simulate(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006
    plain: Annotated[
        bool, typer.Option("--plain", help="Print the server's log lines even on a terminal.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain text instead of keys that are thrown away.")
    ] = False,
) -> None:
    """Run the server and all sites of a run on this machine.

    All are real processes, on the loopback interface. The run file's [simulate] section says which script each
    site runs. Logs of all processes lie in RUN_FOLDER/logs. A terminal gets a live view, a pipe the server's log
    lines.

    \b
    Examples:
      fedcore simulate run.toml
      fedcore simulate run.toml --set run.name=second --set run.rounds=3
    """
    from fedcore.config import load_run_file

    overrides = [*overrides, *_plain_text(insecure, False)]
    config = load_run_file(run_file, overrides)
    _end_as_by_ctrl_c(signal.SIGTERM, signal.SIGHUP)
    if sys.stdout.isatty() and not plain:
        result = _simulate_live(run_file, config, overrides)
    else:
        result = _simulate_plain(run_file, config, overrides)
    if result.status:
        stopped = result.status == INTERRUPTED
        typer.echo(result.message if stopped else f"error: {result.message}", err=True)
        raise typer.Exit(INTERRUPTED if stopped else 1)
    for text in result.failed.values():
        typer.echo(f"warning: the run is complete, but {text}", err=True)
    if config.run.task in ("train", "compare"):
        typer.echo(f"best model: {result.folder / 'best'}")
    if config.run.task != "train":
        typer.echo(f"results: {result.folder / 'results.json'}")


def _end_as_by_ctrl_c(*numbers: signal.Signals) -> None:
    """Let signals end this process as Ctrl-C does, but for those that are ignored, as SIGHUP under nohup."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def _simulate_live(run_file: Path, config: RunConfig, overrides: list[str]) -> SimulationResult:
    from fedcore.monitor.ask import following, read_summary
    from fedcore.monitor.view import LiveView
    from fedcore.simulation.processes import simulate as run

    with LiveView() as view, following(view.show, config.run_folder, WATCH_SECONDS) as tick:
        result = run(run_file, config, overrides=overrides, tick=tick)
        if result.status == 0:
            view.show(read_summary(result.folder))
        return result


def _simulate_plain(run_file: Path, config: RunConfig, overrides: list[str]) -> SimulationResult:
    from fedcore.simulation.processes import simulate as run

    log = config.run_folder / "logs" / "server.log"
    position = 0

    def tick() -> None:
        nonlocal position
        with log.open("rb") as file:
            file.seek(position)
            text = file.read()
        position += len(text)
        typer.echo(text.decode(errors="replace"), nl=False)

    result = run(run_file, config, overrides=overrides, tick=tick)
    if (
        result.status == 0
    ):  # else the result says what failed; that the server was ended then is no news
        tick()
    return result


@app.command()
@reported
def aggregate(  # noqa: PLR0917 - typer calls it by name
    files: Annotated[
        list[Path],
        typer.Argument(help="safetensors files, or folders with a model.", metavar="MODEL..."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="Numbers of training examples, one integer per file, e.g. 3,5; equal if left out."
        ),
    ] = None,
    max_share: Annotated[
        float | None,
        typer.Option(
            help="The greatest part of all weights that one file has, e.g. 0.4; others have what it leaves."
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="The model that the files were trained from, for rules that shorten the way from it."
        ),
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            metavar=f"[{'|'.join([*RULES, *SEVERAL])}|MODULE:CLASS]",
            help="How to combine the files: "
            + "; ".join(
                f"{rule.name}, {rule.summary}" for rule in (*RULES.values(), *SEVERAL.values())
            )
            + "; or a class of your own, looked for in this folder, too.",
        ),
    ] = "mean",
    options: Annotated[
        list[str],
        typer.Option(
            "--option",
            metavar="NAME=NUMBER",
            help="Give an option of the rule a value; may be given more than once.",
        ),
    ] = [],  # noqa: B006 - typer reads the default, nobody changes it
    threads: Annotated[int, typer.Option(min=1, max=64, help="Worker threads.")] = 1,
    device: Annotated[
        _Device | None,
        typer.Option(help="Where to compute; auto is the CPU.  [default: FEDCORE_DEVICE, or auto]"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output if it exists.")
    ] = False,
    lora: Annotated[
        Lora | None,
        typer.Option(help="Combine folders with adapters of LoRA by this method into a folder."),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(
            help="With --lora exact: the greatest rank of what comes out.  [default: the sum of ranks]"
        ),
    ] = None,
    allow: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="With --lora: take what the method refuses and averages if you allow it, such as dora.",
        ),
    ] = [],  # noqa: B006 - typer reads the default, nobody changes it
    json_: Annotated[
        bool, typer.Option("--json", help="With --lora: print the figures as JSON.")
    ] = False,
) -> None:
    """Combine safetensors files: by their weighted mean, or by --rule. Combine adapters by --lora.

    The output does not depend on the order of the files, the number of threads or the device. The files hold
    the same tensors; integers and booleans must be equal in all of them. An input is never overwritten, and the
    output appears only when it is complete.

    \b
    Examples:
      fedcore aggregate a.safetensors b.safetensors --weights 3,5 -o mean.safetensors
      fedcore aggregate runs/north/best runs/south/best -o mean.safetensors
      fedcore aggregate a.safetensors b.safetensors c.safetensors --rule median -o median.safetensors
      fedcore aggregate --lora exact north/ south/ --weights 3,5 --max-rank 16 -o both/
    """
    import contextlib

    from fedcore._device import device_failure
    from fedcore.files.average import aggregate_files
    from fedcore.rules.python import load_rule

    if lora is not None or max_rank is not None or allow or json_:
        given = {
            "--rule": rule != "mean", "--option": bool(options), "--max-share": max_share is not None,
            "--device": device is not None, "--force": force,
        }  # fmt: skip
        aggregate_adapters(
            files, out, lora=lora, weights=weights_of(weights), max_rank=max_rank, base=base, allow=allow,
            threads=threads, as_json=json_, given=[name for name, is_given in given.items() if is_given],
        )  # fmt: skip
        return
    if ":" in rule:
        sys.path.insert(0, "")
    settings = _numbers(options)
    several = SEVERAL.get(rule)
    weighs = load_rule(rule, settings).weighted if several is None else several.weighted
    counts = weights_of(weights)
    with contextlib.ExitStack() as stack:
        progress: Callable[[int, int], None] | None = None
        if sys.stderr.isatty():
            progress = _progress_bar(stack.enter_context, rule)
        result = aggregate_files(
            files,
            counts,
            out,
            rule=rule,
            settings=settings,
            max_share=max_share,
            base=base,
            threads=threads,
            device=device,
            force=force,
            progress=progress,
            choice=_say_choice,
        )
    if counts is not None and not weighs:
        typer.echo(f"the rule '{rule}' does not weigh: --weights changed nothing", err=True)
    if failure := device_failure():
        typer.echo(f"the GPU failed and the CPU went on, with the same result: {failure}", err=True)
    typer.echo(
        f"{out}: {plural(len(result.layout.tensors), 'tensor')}, {result.layout.total_bytes:,} bytes, "
        f"sha256 {result.sha256()}"
    )


def _say_choice(files: Sequence[Path], decision: Decision) -> None:
    """Print what the rule measured of each file, the least first, and its share of the result."""
    whole = sum(decision.weights) + decision.base
    for score, path, weight in sorted(zip(decision.scores, files, decision.weights, strict=True)):
        share = f"share {100 * weight / whole:.4g} %" if weight else "left out"
        typer.echo(f"{path}: {decision.measure} {score:.6g}, {share}", err=True)
    if decision.base:
        typer.echo(f"base: share {100 * decision.base / whole:.4g} %", err=True)


def _numbers(options: list[str]) -> dict[str, float]:
    """Return the numbers in texts such as ``"trim=2"``."""
    found = {}
    for text in options:
        name, _, number = text.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise ConfigError(f"--option {text}: expected NAME=NUMBER, such as trim=2") from None
    return found


def _progress_bar(enter: Callable[..., object], rule: str) -> Callable[[int, int], None]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    bar = Progress(
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    enter(bar)
    task = bar.add_task(rule, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
@reported
def demo(
    task: Annotated[
        _DemoTask,
        typer.Option(help="Sort messages into topics, or answer questions with a causal model."),
    ] = _DemoTask.ENCODER,
    out: Annotated[Path, typer.Option(help="Folder for everything that comes out.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[
        int, typer.Option(min=0, help="Decides the split, the start and the batches.")
    ] = 0,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds, if not the task's own.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for downloads.")] = None,
) -> None:
    """Fine-tune a real language model at three sites.

    The federated model is compared with what each site reaches alone. Needs the package's demo extra. The exit
    status is 0 only if the federated model beats every local one.

    \b
    Examples:
      fedcore demo
      fedcore demo --task causal --seed 1 --out runs/demo-1
    """
    for name in ("torch", "transformers", "peft", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"the demo needs {name}; install it with: pip install 'fedcore-fl[demo]'"
            )
    from fedcore.demo import main as run_demo

    raise typer.Exit(run_demo(task.value, seed, out, cache, rounds))


app.command(
    context_settings={
        "allow_interspersed_args": False,
        "allow_extra_args": True,
        "ignore_unknown_options": False,
    }
)(inspect)
app.command()(partition)
app.command()(rollback)
app.command()(status)
register(app)
register_steering(app)
app.command()(evaluate)


def main(arguments: list[str] | None = None) -> None:
    """Run the ``fedcore`` command."""
    with writable_output():
        app(arguments, prog_name="fedcore")


def server_main() -> None:
    """Run the ``fedcore-server`` command."""
    main(["server", *sys.argv[1:]])
