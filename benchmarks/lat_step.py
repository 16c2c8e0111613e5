r"""One LAT step: naive beside the engine, and the engine with each of its points off.

    python benchmarks/lat_step.py --shape cpu --json out.json
    python benchmarks/lat_step.py --shape llama3-8b --dtype bfloat16 --variants naive,engine \
        --steps 16
    python benchmarks/lat_step.py --shape llama3-8b --dtype bfloat16 --meta
        memory and FLOPs, no weights needed

1. A first step of every variant is counted: FLOPs, and peak memory beyond one copy of the weights
   and the adapter.
2. Then all take the same step, from the same adapter, in turn (A B C A B C ...), so that a slow
   minute hits all.
3. Every variant keeps freed memory mapped, which helps naive too; `--allocator default` leaves the
   C library as it is.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from measure import (
    Counts,
    MatrixRate,
    Measurement,
    count,
    environment,
    is_out_of_memory,
    seconds_of,
    write,
)
from predicted import predict
from shapes import SHAPES, of_config
from variants import ENGINE, NAIVE, Bench, Variant, choose, with_changes

from latlib.io.machine import keep_freed_memory, resolve_device
from latlib.planning.step_cost import bytes_of


@dataclass
class Entry:
    """A variant in a dtype, and what is known of it."""

    variant: Variant
    dtype: torch.dtype
    micro_batch: int
    runner: str  # naive, stock or lean
    trainer: object = None
    counts: Counts | None = None
    weights: int = 0
    total: float = 0.0
    error: str | None = None
    measured: Measurement = field(default_factory=Measurement)


def measure(
    bench: Bench, variants: Sequence[Variant], dtypes: Sequence[torch.dtype], repeats: int
) -> list[Entry]:
    """All variants in all dtypes; a variant that runs out of memory says so and leaves."""
    entries = []
    for dtype in dtypes:
        for variant in variants:
            forward = "stock" if variant.naive else variant.forward
            runner = "naive" if variant.naive else "lean" if bench.lean(forward) else "stock"
            entries.append(
                Entry(variant, dtype, variant.micro_batch or bench.shape.micro_batch, runner)
            )
    for entry in entries:
        _attempt(entry, lambda e: _prepare(bench, e))
    rates = {
        dtype: MatrixRate(bench.products(bench.shape.micro_batch), dtype, bench.device)
        for dtype in dtypes
    }
    for number in range(repeats):
        for dtype in dtypes:
            before = rates[dtype].measure()
            for entry in (e for e in entries if e.dtype == dtype and e.error is None):

                def timed(entry: Entry, before=before) -> None:
                    seconds = seconds_of(bench.step(entry.trainer), bench.device)
                    entry.measured.add(seconds, before, rates[entry.dtype].measure())

                _attempt(entry, timed)
                before = entry.measured.rates[-1][1] if entry.measured.rates else before
        _say(f"{number + 1}/{repeats} " + ", ".join(_seconds(e) for e in entries))
    return entries


def _prepare(bench: Bench, entry: Entry) -> None:
    """Make the trainer and count its first step, then warm up.

    All that it allocates counts as beyond the weights: naive's teacher, the lean forward's merged
    matrices, the optimiser's moments. Operators in compiled code cannot be counted: the same step
    uncompiled stands for it.
    """
    model = bench.language_model(entry.variant, entry.dtype).model
    entry.weights = bytes_of(model.parameters())

    def first() -> None:
        entry.trainer = bench.trainer(replace(entry.variant, compiled=False), entry.dtype)
        bench.step(entry.trainer)()

    entry.counts = count(first, bench.device)
    if entry.variant.compiled:
        entry.trainer = bench.trainer(entry.variant, entry.dtype)
    entry.total = bench.step(entry.trainer)()
    _say(f"{entry.variant.name} {_name(entry.dtype)}: {entry.counts.flop / 1e12:.3f} TFLOP counted")


def _attempt(entry: Entry, function) -> None:
    """Run `function(entry)`; out of memory ends the variant, not the benchmark."""
    try:
        if entry.error is None:
            function(entry)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        entry.error, entry.trainer = f"out of memory: {str(error).splitlines()[0]}", None
    if entry.error is not None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def results(entries: Sequence[Entry], tokens: int) -> list[dict]:
    """One record for each entry."""

    def of(variant: Variant, dtype: torch.dtype) -> float | None:
        found = [
            e
            for e in entries
            if e.variant == variant and e.dtype == dtype and e.measured.seconds and not e.error
        ]
        return found[0].measured.median if found else None

    out = []
    for e in entries:
        record = {
            "variant": e.variant.name,
            "dtype": _name(e.dtype),
            "forward": e.runner,
            "off": e.variant.off,
        }
        record |= {"micro_batch": e.micro_batch, "error": e.error}
        if e.error is None:
            m, flop = e.measured, e.counts.flop
            record |= {
                "seconds": {"median": m.median, "min": min(m.seconds), "samples": m.seconds},
                "tokens_per_second": tokens / m.median,
                "flop": flop,
                "flop_per_second": flop / m.median,
                "matrix_rate": {which: m.rate(which) for which in ("best", "square", "own")},
                "fraction_of_best": m.fraction(flop, "best"),
                "fraction_of_own": m.fraction(flop, "own"),
                # the FLOPs it needs at the rate measured around it
                "limit_seconds": flop / m.rate("best"),
                "peak_bytes": e.counts.peak,  # beyond the weights
                "held_bytes": e.counts.held,  # of these, what stays from step to step
                "largest_allocation": e.counts.largest,
                "weights_bytes": e.weights,
                "total_loss": e.total,
            }
            for name, base in (
                ("speedup_on_naive", of(NAIVE, e.dtype)),
                ("speedup_on_naive_float32", of(NAIVE, torch.float32)),
                ("seconds_on_engine", of(ENGINE, e.dtype)),
            ):
                on_engine = name == "seconds_on_engine"
                record[name] = (
                    None if base is None else (m.median / base if on_engine else base / m.median)
                )
        out.append(record)
    return out


_HEAD = (
    "variant",
    "dtype",
    "rows",
    "step s",
    "tok/s",
    "TFLOP",
    "GFLOP/s",
    "of best",
    "of own",
    "peak MB",
    "x naive",
)


def table(records: Sequence[dict]) -> str:
    """What is printed."""
    lines = [_HEAD]
    for r in records:
        name = f"{r['variant']} ({r['forward']})"
        start = (name, r["dtype"], str(r["micro_batch"]))
        if r["error"]:
            lines.append((*start, r["error"][:40], *[""] * (len(_HEAD) - 4)))
            continue
        speed = r["speedup_on_naive"]
        lines.append(
            (
                *start,
                f"{r['seconds']['median']:.3f}",
                f"{r['tokens_per_second']:.0f}",
                f"{r['flop'] / 1e12:.3f}",
                f"{r['flop_per_second'] / 1e9:.1f}",
                f"{r['fraction_of_best']:.1%}",
                f"{r['fraction_of_own']:.1%}",
                f"{r['peak_bytes'] / 1e6:.1f}",
                "" if speed is None else f"{speed:.2f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _seconds(entry: Entry) -> str:
    return f"{entry.variant.name} {'-' if entry.error else f'{entry.measured.seconds[-1]:.2f}'}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line, without what only one benchmark has."""
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--shape", choices=SHAPES, default="cpu", help="model and data")
    out.add_argument(
        "--config",
        type=Path,
        help="a Hugging Face config file: another Llama-like model on the same data",
    )
    out.add_argument("--device", default="auto")
    out.add_argument(
        "--dtype",
        help="compute dtypes, comma-separated; float32,bfloat16 on a CPU, bfloat16 on a GPU",
    )
    out.add_argument("--repeats", type=int, default=5)
    out.add_argument("--micro-batch", type=int, help="rows that the engine takes at a time")
    out.add_argument("--steps", type=int, help="PGD steps")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--json", type=Path, help="where results go")
    return out


def asked(arguments: argparse.Namespace) -> tuple[Bench, list[torch.dtype]]:
    """What the command line asks for."""
    shape = SHAPES[arguments.shape]
    shape = shape if arguments.config is None else of_config(shape, arguments.config)
    device = resolve_device(arguments.device)
    names = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32,bfloat16")
    dtypes = [getattr(torch, name) for name in names.split(",")]
    return (
        Bench(with_changes(shape, arguments.micro_batch, arguments.steps), device, arguments.seed),
        dtypes,
    )


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print, write; returns what is written."""
    own = parser()
    own.add_argument(
        "--variants",
        default="all",
        help="names or groups (all, equal, alone, path), comma-separated",
    )
    own.add_argument(
        "--allocator",
        choices=("keep", "default"),
        default="keep",
        help="keep freed memory, or glibc's way",
    )
    own.add_argument(
        "--meta", action="store_true", help="predict memory and FLOPs on the meta device, and stop"
    )
    arguments = own.parse_args(argv)
    bench, dtypes = asked(arguments)
    out = {
        "shape": {"name": arguments.shape, **asdict(bench.shape)},
        "environment": environment(bench.device),
    }
    if arguments.meta:
        out["predicted"] = [
            {
                "variant": name,
                "dtype": _name(dtype),
                **predict(bench.shape, dtype, naive=name == "naive"),
            }
            for dtype in dtypes
            for name in ("naive", "engine")
        ]
        for record in out["predicted"]:
            parts = [
                f"{k.removesuffix('_bytes')} {v / 1e9:.2f} GB"
                for k, v in record.items()
                if k.endswith("bytes")
            ]
            print(
                f"{record['variant']} {record['dtype']}: {', '.join(parts)};"
                f" {record['flop'] / 1e12:.1f} TFLOP a step"
            )
    else:
        out["freed_memory_kept"] = arguments.allocator == "keep" and keep_freed_memory()
        variants = choose(arguments.variants, bench.lean())
        out["results"] = results(measure(bench, variants, dtypes, arguments.repeats), bench.tokens)
        print(table(out["results"]), flush=True)
    write(out, arguments.json)
    return out


if __name__ == "__main__":
    main()
