"""``python -m benchmarks``: what fedcore costs, beside what the same machine can do at best.

Each benchmark proves its result before it reports a time, prints a table, and writes JSON with ``--json``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcore.errors import FedcoreError
from fedcore.quantities import parse_size

from .experiments.__main__ import app as experiments
from .kernel_commands import app as kernels
from .options import Budget, Json, Plot, Repeats, Rounds, Sites, Size
from .report import MIB, show, size_text, write

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
app.add_typer(kernels)
app.add_typer(experiments, name="experiments")


@app.command()
def round_trip(
    *,
    size: Size = "512MiB",
    sites: Sites = 3,
    rounds: Rounds = 3,
    memory: Budget = "256MiB",
    client: Annotated[
        str, typer.Option(help="reader: tensor by tensor, as the trainers do; plain: dicts.")
    ] = "reader",
    peers: Annotated[
        str, typer.Option(help="Other frameworks to measure in this run: nvflare,flower.")
    ] = "",
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Time rounds without training (each site adds a constant and sends the full model back).

    Beside it: the same bytes over raw loopback TCP and over bare ZeroMQ, measured before and after, and other
    frameworks, each installed on first use into a virtual environment of its own in FEDCORE_CACHE.
    """
    from .peers import parse_peers
    from .round_trip import CLIENTS, measure
    from .workload import Work

    if client not in CLIENTS:
        raise typer.BadParameter(f"expected one of {', '.join(CLIENTS)}", param_hint="--client")
    names = parse_peers(peers)
    result = measure(Work(parse_size(size), sites, rounds), parse_size(memory), client, names)
    _show_rounds(result)
    write(json_file, result)
    if plot is not None:
        from .plots import plot_rounds

        plot_rounds(result, plot)


def _show_rounds(result: dict[str, Any]) -> None:
    limit, ours = result["limit_s"], result["round_s"]
    rows: list[list[object]] = [
        ["raw TCP, the same bytes", limit, 1.0, None, None],
        ["bare ZeroMQ, the same bytes", result["zeromq_s"], result["zeromq_s"] / limit, None, None],
        [
            f"fedcore, client {result['client']}",
            ours,
            ours / limit,
            1.0,
            size_text(result["server_peak_rss_bytes"]),
        ],
    ]
    for name, peer in result["peers"].items():
        if "error" in peer:
            rows.append([f"{name} {peer['version']}: not measured", None, None, None, None])
        else:
            rows.append(
                [
                    f"{name} {peer['version']}",
                    peer["round_s"],
                    peer["round_s"] / limit,
                    peer["ratio"],
                    f"{size_text(peer['peak_rss_bytes'])}: {peer['peak_rss_process']}",
                ]
            )
    show(
        f"{size_text(result['bytes'])} fp32 in {result['tensors']} tensors, {result['sites']} sites, "
        f"median of {result['rounds']} rounds",
        ("", "s per round", "/ limit", "/ fedcore", "server peak RSS"),
        rows,
    )


@app.command()
def floor(
    *,
    rounds: Rounds = 20,
    sites: Sites = 2,
    size: Size = "1MiB",
    json_file: Json = None,
) -> None:
    """Time rounds of a small model: what a round costs when there is nothing to move."""
    from .round_trip import fedcore_rounds
    from .workload import Work

    work = Work(parse_size(size), sites, rounds)
    result = {"bytes": work.model_bytes, "sites": sites, "rounds": rounds, **fedcore_rounds(work)}
    samples = result["round_samples_s"]
    show(
        f"{size_text(work.model_bytes)}, {sites} sites, {rounds} rounds",
        ("", "median ms", "least ms", "most ms"),
        [["round", *(1000 * x for x in (result["round_s"], min(samples), max(samples)))]],
    )
    write(json_file, result)


@app.command()
def adapter(
    *,
    size: Annotated[str, typer.Option(help="Bytes of the LoRA adapter (fp32).")] = "50MB",
    rounds: Rounds = 6,
    json_file: Json = None,
) -> None:
    """Time what a round costs a site beside its training, and measure its memory above the loaded model."""
    from .adapter import measure

    result = measure(parse_size(size), rounds)
    names = ("round_samples_s", "receive_s", "submit_s", "wait_s", "site_cpu_samples_s")
    show(
        f"LoRA adapter of {size_text(result['bytes'])}, one site, {rounds} rounds without training",
        ("round", "s", "receive s", "submit s", "wait s", "site's CPU s"),
        [
            [str(number), *values]
            for number, values in enumerate(zip(*(result[n] for n in names), strict=True), 1)
        ],
    )
    above = size_text(result["peak_bytes_above_held"])
    typer.echo(
        f"the same bytes over raw TCP: {result['limit_s']:.3f} s; peak memory above the model: {above}"
    )
    write(json_file, result)


@app.command()
def encodings(
    *,
    size: Annotated[str, typer.Option(help="Bytes of each kind of tensors.")] = "64MiB",
    repeats: Annotated[int, typer.Option(min=1, help="Of which the fastest counts.")] = 3,
    threads: Annotated[
        int,
        typer.Option(min=1, max=64, help="Of the reduction; more than one are timed by the clock."),
    ] = 1,
    json_file: Json = None,
) -> None:
    """Measure what each encoding of updates saves, loses and costs, on weights, adapters and their changes."""
    from .encodings import sweep

    rows = sweep(parse_size(size), repeats, threads)
    show(
        f"Encodings of {size_text(rows[0]['bytes'])} of each kind of tensors, CPU time of one core",
        (
            "tensors",
            "update",
            "lossless",
            "ratio",
            "error",
            "encode GB/s",
            "update GB/s",
            "of memcpy",
            "decode GB/s",
            "reduce GB/s",
        ),
        [
            [
                row["tensors"],
                row["update"],
                "yes" if row["lossless"] else "no",
                row["ratio"],
                row["relative_rms_error"] or None,
                row["encode_gb_s"],
                row["update_gb_s"],
                row["memcpy_share"],
                row["decode_gb_s"],
                row["reduce_gb_s"],
            ]
            for row in rows
        ],
    )
    write(json_file, {"rows": rows})


@app.command()
def updates(
    *,
    size: Annotated[str, typer.Option(help="Bytes of the update (fp32).")] = "256MiB",
    repeats: Annotated[int, typer.Option(min=1, help="Of which the fastest counts.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="An empty folder for the files; without it they are memory.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Time the encoding of a site's whole update, with and without error feedback, in turns with memcpy."""
    from .updates import measure

    rows = measure(parse_size(size), repeats, folder=folder)
    show(
        f"Encoding of an update of {size_text(rows[0]['bytes'])}",
        ("update", "feedback", "threads", "GB/s", "GB/s of CPU", "of memcpy", "peak memory"),
        [
            [
                row["update"],
                "yes" if row["feedback"] else "no",
                row["threads"],
                row["gb_s"],
                row["cpu_gb_s"],
                row["memcpy_share"],
                size_text(row["peak_bytes"]),
            ]
            for row in rows
        ],
    )
    write(json_file, {"rows": rows})


@app.command()
def device(
    *,
    device: Annotated[
        str, typer.Option(help="cuda, or cpu: the CPU beside itself, as a check.")
    ] = "cuda",
    size: Annotated[str, typer.Option(help="Bytes of each update (flat).")] = "64MiB",
    inputs: Annotated[int, typer.Option(min=1, max=16, help="Updates that are averaged.")] = 4,
    repeats: Repeats = 7,
    json_file: Json = None,
) -> None:
    """Time means of raw and of encoded updates on a GPU beside the CPU, once both gave the same bits.

    Ends with status 1 and what is missing where there is no GPU.
    """
    from .device import sweep

    result = sweep(parse_size(size), inputs, device, repeats)
    rows = result["rows"]
    show(
        f"Mean of {inputs} updates of {size_text(rows[0]['bytes_each'])} on {result['device']}, one thread",
        (
            "tensors",
            "update",
            "CPU GB/s",
            "device GB/s",
            "device / CPU",
            "processor s/GB",
            "with it",
        ),
        [
            [
                row["tensors"],
                row["update"],
                row["cpu_gb_s"],
                row["device_gb_s"],
                row["device_over_cpu"],
                row["cpu_processor_s_per_gb"],
                row["device_processor_s_per_gb"],
            ]
            for row in rows
        ],
    )
    write(json_file, result)


@app.command()
def memory(
    *,
    budget: Budget = "64MiB",
    size: Annotated[str, typer.Option(help="Model size of the sweep over sites.")] = "256MiB",
    sites: Annotated[int, typer.Option(help="Number of sites of the sweep over sizes.")] = 8,
    max_sites: Annotated[int, typer.Option(min=2)] = 256,
    max_size: Annotated[str, typer.Option(help="Largest model.")] = "1GiB",
    spill: Annotated[
        bool, typer.Option(help="Let chunks of sites that are ahead go to a file.")
    ] = False,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Measure the server's peak RSS against the number of sites and the size of the model, under a hard limit.

    One round each, with sites that only speak the protocol, all in one process. One of them keeps a chunk back
    until the server has filled its budget.
    """
    from .memory import SITES, SIZES, sweep

    result = sweep(
        parse_size(budget),
        parse_size(size),
        sites,
        all_sites=tuple(n for n in SITES if n <= max_sites),
        sizes=tuple(n for n in SIZES if n <= parse_size(max_size)),
        spill=spill,
    )
    show(
        f"Server memory, budget {size_text(result['memory_bytes'])}, "
        f"{size_text(result['idle_rss_bytes'])} when idle",
        ("model", "sites", "s", "peak RSS", "of it anonymous"),
        [
            [
                size_text(row["bytes"]),
                row["sites"],
                row["seconds"],
                f"{row['peak_rss_bytes'] / MIB:.1f} MiB",
                f"{row['peak_anonymous_bytes'] / MIB:.1f} MiB",
            ]
            for row in result["rows"]
        ],
    )
    write(json_file, result)
    if plot is not None:
        from .plots import plot_memory

        plot_memory(result, plot)


@app.command()
def encryption(
    *,
    size: Size = "128MiB",
    sites: Sites = 2,
    rounds: Rounds = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kind, in turn.")] = 3,
    json_file: Json = None,
) -> None:
    """Time the same rounds over plain and over encrypted connections, and count the processors' seconds."""
    from .encryption import measure
    from .workload import Work

    result = measure(Work(parse_size(size), sites, rounds), repeats)
    show(
        f"{size_text(result['bytes'])}, {sites} sites, {rounds} rounds, {repeats} runs of each kind",
        ("", "s per round", "/ plain", "CPU s of a run"),
        [
            ["plain", result["plain_s"], 1.0, result["plain_cpu_s"]],
            [
                "encrypted",
                result["encrypted_s"],
                result["encrypted_over_plain"],
                result["encrypted_cpu_s"],
            ],
        ],
    )
    typer.echo(f"added at both ends together: {result['added_cpu_s_per_gib']:.2f} CPU s per GiB")
    write(json_file, result)


@app.command()
def fleet(
    *,
    size: Size = "1MiB",
    sites: Annotated[int, typer.Option(min=1, help="Virtual sites, in one thread.")] = 1000,
    json_file: Json = None,
) -> None:
    """Time one round of many virtual sites in one process, and measure what memory each takes."""
    from .fleet import measure

    row = measure(sites, parse_size(size))
    show(
        f"One round of {sites} virtual sites in one thread, a model of {size_text(row['bytes'])}",
        ("round s", "in all s", "CPU s of the sites", "memory of a site"),
        [[row["round_s"], row["total_s"], row["cpu_s"], f"{row['bytes_per_site'] / 1024:.0f} KiB"]],
    )
    write(json_file, row)


def main() -> None:
    """Run the command line; an error of fedcore's is one line."""
    try:
        app(prog_name="python -m benchmarks")
    except FedcoreError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
