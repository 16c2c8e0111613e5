"""Where the lean forward pays: a LAT step by it and by the stock modules, in turn, for models of
several sizes.

    python benchmarks/lean.py --json benchmarks/results/lean-cpu.json
    python benchmarks/lean.py --sizes SmolLM2-135M --rows 16 --prompts 30,60 --completions 12,24

1. Every size is a Llama with random weights; what is learned and attacked is alike (rows, tokens,
   sites as shares of the depth, K = 5), and few rows, so that a step of the largest ends.
2. `latlib.fused.llama.LEAN_LIMIT` is read off the result: the largest model at which the lean
   forward was measured to be faster.
3. `onednn` says whether the lean forward multiplied by oneDNN's own operator
   (`latlib.fused.products`); the stock modules multiply as torch does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lat_step import measure, results
from measure import environment, write
from shapes import SHAPES, Shape, build
from variants import Bench, Variant

from latlib.config.sections import AttackSettings
from latlib.fused.products import by_onednn
from latlib.io.machine import keep_freed_memory, resolve_device
from latlib.planning.step_cost import bytes_of

STOCK, LEAN = Variant("stock", forward="stock"), Variant("lean", forward="lean")
ROWS, RANK = 4, 16
# d_model, layers, heads, key heads, ffn, vocabulary
SIZES = {
    "tiny": (128, 8, 4, 4, 384, 1024),
    "cpu": (256, 16, 8, 4, 704, 8000),
    "64M": (512, 16, 8, 4, 1408, 16000),
    # config.json of HuggingFaceTB/SmolLM2-135M-Instruct and of the 360M one; their embeddings are
    # tied, these are not
    "SmolLM2-135M": (576, 30, 9, 3, 1536, 49152),
    "SmolLM2-360M": (960, 32, 15, 5, 2560, 49152),
}


def shape_of(size: str, rows: int, **lengths: tuple[int, int]) -> Shape:
    """The data of the CPU shape, or with other lengths of `prompts` and `completions`, a few rows
    of it, with the model of a size."""
    names = ("d_model", "layers", "heads", "kv_heads", "ffn", "vocabulary")
    changes = dict(zip(names, SIZES[size], strict=True))
    few = {"batch": rows, "micro_batch": rows, "sites": AttackSettings().sites}
    few |= lengths
    return replace(SHAPES["cpu"], r=RANK, alpha=2.0 * RANK, **few, **changes)


def _lengths(text: str) -> tuple[int, int]:
    least, most = (int(part) for part in text.split(","))
    return least, most


def compared(size: str, shape: Shape, device: torch.device, dtype: torch.dtype, n: int) -> dict:
    """Medians of `n` steps of both in seconds, their ratio, peaks beyond the weights in bytes."""
    bench = Bench(shape, device)
    # an adapter does not count for a model's size
    plain = build(replace(bench.shape, r=1), torch.float32, "meta").model
    weights = [p for name, p in plain.named_parameters() if "lora_" not in name]
    found = results(measure(bench, [STOCK, LEAN], [dtype], n), bench.tokens)
    stock, lean = (record["seconds"]["median"] for record in found)
    return {
        "size": size,
        "parameters": bytes_of(weights) // 4,
        "seconds": {"stock": stock, "lean": lean},
        "stock_on_lean": stock / lean,
        "peak_bytes": {record["variant"]: record["peak_bytes"] for record in found},
        "samples": {record["variant"]: record["seconds"]["samples"] for record in found},
        "total_loss": {record["variant"]: record["total_loss"] for record in found},
    }


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print, write; returns what is written."""
    own = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own.add_argument("--sizes", default=",".join(SIZES), help="comma-separated")
    own.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    own.add_argument("--device", default="auto")
    own.add_argument("--repeats", type=int, default=3)
    own.add_argument("--rows", type=int, default=ROWS, help="harmful ones, and as many benign")
    cpu = SHAPES["cpu"]
    for name in ("prompts", "completions"):
        least, most = getattr(cpu, name)
        help = f"their tokens, LEAST,MOST; {least},{most} unless told"
        own.add_argument(f"--{name}", type=_lengths, default=(least, most), help=help)
    own.add_argument("--json", type=Path, help="where results go")
    arguments = own.parse_args(argv)
    sizes = arguments.sizes.split(",")
    for size in sizes:
        if size not in SIZES:
            own.error(f"--sizes: no size {size!r}, choose from {', '.join(SIZES)}")
    keep_freed_memory()
    device, dtype = resolve_device(arguments.device), getattr(torch, arguments.dtype)
    lengths = {"prompts": arguments.prompts, "completions": arguments.completions}
    found = []
    for size in sizes:
        shape = shape_of(size, arguments.rows, **lengths)
        found.append(compared(size, shape, device, dtype, arguments.repeats))
        one = found[-1]
        print(
            f"{size}: {one['parameters'] / 1e6:.0f}M parameters, stock"
            f" {one['seconds']['stock']:.2f} s, lean {one['seconds']['lean']:.2f} s,"
            f" {one['stock_on_lean']:.2f} times as fast",
            flush=True,
        )
    out = {"rows": arguments.rows, "r": RANK, "dtype": arguments.dtype, **lengths}
    like = torch.empty(0, dtype=dtype, device=device)
    out |= {"onednn": by_onednn(like), "results": found}
    out["environment"] = environment(device)
    write(out, arguments.json)
    return out


if __name__ == "__main__":
    main()
