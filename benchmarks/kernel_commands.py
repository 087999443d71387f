"""Commands of ``python -m benchmarks`` that time the core's arithmetic in memory."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from fedcore.quantities import parse_size

from .options import Inputs, Json, Plot, Repeats
from .report import show, size_text, write

app = typer.Typer()

_KERNEL_COLUMNS = ("dtype", "SIMD", "updates", "read GB/s", "memcpy GB/s", "moved / memcpy moved")


def _kernel_row(row: dict[str, Any]) -> list[object]:
    return [
        row["dtype"],
        row["simd"],
        row["inputs"],
        row["mean_read_gb_s"],
        row["memcpy_read_gb_s"],
        row["mean_moved_over_memcpy_moved"],
    ]


@app.command()
def reduce(
    *,
    size: Annotated[str, typer.Option(help="Bytes of each input.")] = "64MiB",
    inputs: Inputs = 4,
    dtype: Annotated[str, typer.Option(help="F64, F32, F16 or BF16.")] = "F32",
    repeats: Repeats = 7,
    json_file: Json = None,
) -> None:
    """Time the mean of one dtype on one core against a copy of the same bytes in the same run."""
    from .kernels import measure

    result = measure(parse_size(size), inputs, dtype, repeats)
    show(
        f"Mean of {inputs} updates of {size_text(result['bytes_each'])}, one core",
        _KERNEL_COLUMNS,
        [_kernel_row(result)],
    )
    write(json_file, result)


@app.command()
def kernels(
    *,
    size: Annotated[str, typer.Option(help="Bytes of each input.")] = "64MiB",
    inputs: Inputs = 4,
    repeats: Repeats = 7,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Time the mean of every dtype on every instruction set of this processor against memcpy."""
    from .kernels import sweep

    rows = sweep(parse_size(size), inputs, repeats)
    show(
        f"Mean of {inputs} updates of {size_text(rows[0]['bytes_each'])}, one core",
        _KERNEL_COLUMNS,
        [_kernel_row(row) for row in rows],
    )
    write(json_file, {"rows": rows})
    if plot is not None:
        from .plots import plot_kernels

        plot_kernels(rows, plot)


@app.command()
def optimizers(
    *,
    size: Annotated[str, typer.Option(help="Bytes of the model.")] = "64MiB",
    repeats: Repeats = 7,
    json_file: Json = None,
) -> None:
    """Time each server optimizer on every instruction set of this processor in turns with memcpy."""
    from .optimizers import sweep

    rows = sweep(parse_size(size), repeats)
    show(
        f"A round of a model of {size_text(rows[0]['bytes'])} with one update, one core",
        ("optimizer", "dtype", "SIMD", "moved GB/s", "memcpy moved GB/s", "moved / memcpy moved"),
        [
            [row["optimizer"], row["dtype"], row["simd"], row["moved_gb_s"], row["memcpy_moved_gb_s"],
             row["moved_over_memcpy_moved"]]
            for row in rows
        ],
    )  # fmt: skip
    write(json_file, {"rows": rows})


@app.command()
def rules(
    *,
    size: Annotated[str, typer.Option(help="Bytes of each update.")] = "32MiB",
    updates: Annotated[str, typer.Option(help="Numbers of updates, with commas.")] = "8,16",
    threads: Annotated[str, typer.Option(help="Numbers of threads, with commas.")] = "1,2",
    repeats: Repeats = 7,
    json_file: Json = None,
) -> None:
    """Time median, trimmed mean and the pass over all pairs in turns with memcpy."""
    from .rules import sweep

    counts, numbers = (tuple(map(int, text.split(","))) for text in (updates, threads))
    rows = sweep(parse_size(size), counts, numbers, repeats)
    show(
        f"Rules on updates of {size_text(rows[0]['bytes_each'])}",
        ("rule", "dtype", "SIMD", "updates", "threads", "read GB/s", "memcpy moved GB/s",
         "moved / memcpy moved"),
        [
            [row["rule"], row["dtype"], row["simd"], row["updates"], row["threads"],
             row["read_gb_s"], row["memcpy_moved_gb_s"], row["moved_over_memcpy_moved"]]
            for row in rows
        ],
    )  # fmt: skip
    write(json_file, {"rows": rows})


@app.command()
def rule_peers(
    *,
    size: Annotated[str, typer.Option(help="Bytes of each update (fp32).")] = "64MiB",
    sites: Annotated[int, typer.Option(min=10, help="Updates.")] = 16,
    peers: Annotated[str, typer.Option(help="Other frameworks to measure.")] = "flower,nvflare",
    json_file: Json = None,
) -> None:
    """Time rules and server optimizers beside those of other frameworks on the same updates, and check each.

    Frameworks are installed on first use into a virtual environment of their own in FEDCORE_CACHE.
    """
    from .peers import parse_peers
    from .rule_peers import compare, faults

    names = parse_peers(peers)
    rows = compare(parse_size(size), sites, peers=names)
    show(
        f"{sites} updates of {size_text(parse_size(size))}",
        ("rule", "framework", "s", "/ fedcore", "peak RSS", "/ fedcore", "result"),
        [
            [row["called"], row["framework"], row.get("seconds"), row.get("times_as_long"),
             size_text(row["peak_rss_bytes"]) if "peak_rss_bytes" in row else None,
             row.get("times_the_memory"), row.get("verdict", row.get("error"))]
            for row in rows
        ],
    )  # fmt: skip
    wrong = faults(names)
    show(
        "Inputs that show what is wrong",
        ("input", "framework", "result"),
        [[row["input"], row["framework"], row["gives"]] for row in wrong],
    )
    write(json_file, {"rows": rows, "faults": wrong})


@app.command()
def lora(
    *,
    sites: Annotated[int, typer.Option(min=2, help="Adapters.")] = 16,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the result.")] = 64,
    json_file: Json = None,
) -> None:
    """Time sums of the products of LoRA factors on the shapes of Llama-3-8B, beside NumPy's ways, on one core.

    One layer of each shape is measured. The dense way is measured for the smallest shape alone.
    """
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "1"  # before NumPy is loaded
    from .lora import LLAMA_3_8B, RANKS, measure, scratch

    rows = measure(sites, rank)
    whole = {
        way: sum(row["count"] * row[way] for row in rows)
        for way in ("own_s", "figure_s", "stacked_s", "dense_s")
    }
    show(
        f"{sites} sites of ranks {', '.join(map(str, RANKS))} to rank {rank}, CPU s of one core; "
        f"* from the smallest shape",
        ("layers", "shape", "fedcore", "figure", "stacked", "dense", "memory", "of stacked"),
        [
            [f"{row['count']} x {row['kind']}", f"{row['rows']} x {row['columns']}", row["own_s"], row["figure_s"],
             row["stacked_s"], row["dense_s"] if row["dense_measured"] else f"{row['dense_s']:.0f} *",
             size_text(row["own_bytes"]), size_text(row["stacked_bytes"])]
            for row in rows
        ] + [["all 224", None, *whole.values(), None, None]],
    )  # fmt: skip
    bound = scratch(sites, rank, RANKS, LLAMA_3_8B)
    typer.echo(f"a server's rule takes {size_text(bound)} beside the factors of one layer")
    write(json_file, {"rows": rows, "all": whole, "scratch_bytes": bound})
