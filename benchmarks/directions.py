"""What directions cost: activations at every site and post-instruction position, beside a plain
forward.

    python benchmarks/directions.py --shape cpu --json out.json

Both run the same prompts in the same batches; the plain forward (no logits, no graph) keeps
nothing. Timed in turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lat_step import asked, parser
from measure import environment, seconds_of, write
from shapes import rows
from variants import ENGINE, Bench

from latlib.batch import TokenRow
from latlib.evaluation.generate import batches
from latlib.io.machine import keep_freed_memory
from latlib.refusal.activations import activations, sites_of

POSITIONS = 5  # Llama-3's template puts five tokens behind the request


def measure(bench: Bench, dtype: torch.dtype, prompts: int, size: int, repeats: int) -> dict:
    """Seconds of both, each a list, over `prompts` prompts of the shape, `size` at a time."""
    network = bench.language_model(ENGINE, dtype).network()
    asked_for = [TokenRow(row.prompt, ()) for row in rows(bench.shape, prompts, 1, bench.seed)]
    sites = sites_of(network.n_layers)

    @torch.no_grad()
    def forward() -> None:
        for _, batch in batches(asked_for, size, bench.device):
            network.hidden(batch)

    def directions() -> None:
        for found in activations(network, asked_for, sites, POSITIONS, size).values():
            found.mean(0)

    forward(), directions()
    found = {"plain": [], "directions": []}
    for _ in range(repeats):
        found["plain"].append(seconds_of(forward, bench.device))
        found["directions"].append(seconds_of(directions, bench.device))
    ratios = sorted(d / p for d, p in zip(found["directions"], found["plain"], strict=True))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": found,
        "ratio": ratios[len(ratios) // 2],
    }


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print, write; returns what is written."""
    own = parser()
    own.add_argument("--prompts", type=int, default=256)
    own.add_argument("--size", type=int, default=32, help="prompts at a time")
    arguments = own.parse_args(argv)
    keep_freed_memory()
    bench, dtypes = asked(arguments)
    found = [
        measure(bench, d, arguments.prompts, arguments.size, arguments.repeats) for d in dtypes
    ]
    out = {"prompts": arguments.prompts, "positions": POSITIONS, "results": found}
    out |= {"shape": arguments.shape, "environment": environment(bench.device)}
    for record in found:
        print(
            f"{record['dtype']}: {record['ratio']:.2f} times a plain forward over"
            f" {arguments.prompts} prompts"
        )
    write(out, arguments.json)
    return out


if __name__ == "__main__":
    main()
