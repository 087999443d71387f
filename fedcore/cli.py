"""The commands ``fedcore`` and ``fedcore-server``."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import ConfigError, FedcoreError, TransferTimeout

__all__ = ["main", "server_main"]

app = typer.Typer(
    name="fedcore",
    help="Federated fine-tuning of language models with a compiled core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunFile = Annotated[Path, typer.Argument(help="The run file (TOML).", metavar="RUN.toml")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the run file, e.g. --set run.rounds=3.",
    ),
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fedcore {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def server(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nobody changes it
    endpoint_file: Annotated[
        Path | None, typer.Option(help="Write the address that the server listens on to this file.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log details as well.")] = False,
) -> None:
    """Serve one run: wait for the sites, run the rounds, keep the best model.

    Started again on the same run folder, it goes on after the last committed round. Ctrl-C ends the run cleanly
    with that round on disk.
    """
    from .config import load_run_file
    from .server.service import Server

    config = load_run_file(run_file, overrides)
    process = Server(config, endpoint_file)
    _log_to(config.run_folder / "server.log", logging.DEBUG if verbose else logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: process.stop())
    signal.signal(signal.SIGINT, lambda *_: process.stop())
    result = process.run()
    if not result.ok:
        typer.echo(f"error: {result.message}", err=True)
        raise typer.Exit(130 if result.message.startswith("stopped") else 1)


def _log_to(path: Path, level: int) -> None:
    log = logging.getLogger("fedcore.server")
    log.setLevel(level)
    for handler in (logging.StreamHandler(), logging.FileHandler(path)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)


@app.command()
def simulate(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Start the server and all sites of a run on this machine, as real processes on loopback.

    The run file's [simulate] section says which script each site runs; logs lie in the run folder.
    """
    from .config import load_run_file
    from .simulate import simulate as run

    config = load_run_file(run_file, overrides)
    last = ""

    def tick(_: str) -> None:
        nonlocal last
        log = config.run_folder / "server.log"
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        typer.echo(text.removeprefix(last), nl=False)
        last = text

    result = run(run_file, config, overrides=overrides, tick=tick)
    tick("")
    if result.status:
        typer.echo(f"error: {result.message}", err=True)
        raise typer.Exit(1)
    typer.echo(f"best model: {result.folder / 'best'}")


@app.command()
def status(
    address: Annotated[
        str, typer.Argument(help="Address of a running server.", metavar="tcp://HOST:PORT")
    ] = "tcp://127.0.0.1:7733",
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole reply as JSON.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 5.0,
) -> None:
    """Show how a running server's run stands: rounds, sites, bytes, metrics."""
    reply = ask_status(address, timeout)
    if as_json:
        typer.echo(reply.model_dump_json(indent=2))
        return
    left = "" if reply.eta is None else f", about {reply.eta:.0f} s left"
    typer.echo(f"run {reply.run}: {reply.phase}, round {reply.round} of {reply.rounds}{left}")
    typer.echo(f"received {reply.bytes_in:,} bytes, sent {reply.bytes_out:,}")
    for site in reply.sites:
        typer.echo(f"  {site.site:<20} {site.state:<10} {site.message}")
    for version in reply.versions:
        mark = "*" if version.version == reply.best_version else " "
        shown = "  ".join(f"{name} {value:.4f}" for name, value in version.metrics.items())
        typer.echo(f" {mark}round {version.version:<4} {shown}")


def ask_status(address: str, timeout: float) -> Any:
    """Ask a server for its status; TransferTimeout if it does not answer."""
    from . import protocol
    from .transport import Control, SiteLink

    link = SiteLink(address, uuid.uuid4().bytes)
    try:
        link.send(protocol.StatusRequest())
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            arrived = link.recv(left)
            if isinstance(arrived, Control):
                reply = protocol.decode_from_server(arrived.body)
                if isinstance(reply, protocol.StatusReply):
                    return reply
        raise TransferTimeout(
            f"no answer from {address} within {timeout:g} s; is fedcore-server running there?"
        )
    finally:
        link.close()


@app.command()
def aggregate(
    files: Annotated[
        list[Path], typer.Argument(help="safetensors files to average.", metavar="FILE...")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    weights: Annotated[
        str | None, typer.Option(help="One integer per file, e.g. 3,5; equal if left out.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Worker threads.")] = 1,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output if it exists.")
    ] = False,
) -> None:
    """Average safetensors files with the reducer of the server.

    The result does not depend on the order of the files or on the number of threads.

    Example: fedcore aggregate a.safetensors b.safetensors --weights 3,5 -o mean.safetensors
    """
    from .aggregate import aggregate_files

    try:
        counts = None if weights is None else [int(text) for text in weights.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights {weights}: expected integers with commas between them"
        ) from None
    result = aggregate_files(files, counts, out, threads=threads, force=force)
    typer.echo(
        f"{out}: {len(result.layout.tensors)} tensors, {result.layout.total_bytes:,} bytes, "
        f"sha256 {result.sha256()}"
    )


@app.command()
def demo(
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
    """Fine-tune a real language model at three sites of this machine, and compare with training alone.

    Needs the package's demo extra. The exit status is 0 only if the federated model beats every local one.
    """
    for name in ("torch", "transformers", "peft", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"the demo needs {name}; install it with: pip install 'fedcore-fl[demo]'"
            )
    # By name: the demo stands above this package.
    raise typer.Exit(importlib.import_module("fedcore.demo").main(seed, out, cache, rounds))


def main(arguments: list[str] | None = None) -> None:
    """Run the ``fedcore`` command; errors of the package end it with one clear line."""
    try:
        app(arguments, standalone_mode=True)
    except FedcoreError as error:
        if os.environ.get("FEDCORE_DEBUG") == "1":
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)


def server_main() -> None:
    """Run the ``fedcore-server`` command."""
    main(["server", *sys.argv[1:]])
