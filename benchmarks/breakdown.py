"""Where the engine's step spends its time, by kind of kernel, from torch's profiler.

    python benchmarks/breakdown.py --shape cpu --json out.json

Products are what the FLOP count counts; all other kinds move memory. What no kernel accounts for is
Python and dispatch. The profiler itself slows a step down: read shares, not seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from lat_step import asked, parser
from measure import environment, write
from torch.profiler import ProfilerActivity, profile
from variants import ENGINE

from latlib.io.machine import keep_freed_memory

KINDS = {  # kind -> words in the names of its operators, the first kind that fits
    "matrix products": ("mm", "linear", "scaled_dot_product", "convolution"),
    "softmax": ("softmax",),
    "activation (SiLU)": ("silu",),
    "copies and casts": (
        "copy",
        "cat",
        "index",
        "fill",
        "zero",
        "gather",
        "scatter",
        "clone",
        "contiguous",
    ),
    "sums and norms": ("sum", "norm", "mean", "vecdot", "linalg"),
    "other element by element": (
        "mul",
        "add",
        "sub",
        "div",
        "exp",
        "log",
        "sqrt",
        "where",
        "lerp",
        "clamp",
        "neg",
        "pow",
    ),
}


def kind_of(operator: str) -> str:
    """The kind of an operator's own time."""
    name = operator.removeprefix("aten::").lstrip("_")
    if not operator.startswith("aten::"):
        return "Python and dispatch"
    return next(
        (kind for kind, words in KINDS.items() if any(w in name for w in words)),
        "Python and dispatch",
    )


def main(argv: Sequence[str] | None = None) -> dict:
    """Profile three steps in each dtype, print shares, write; returns what is written."""
    own = parser()
    own.description = __doc__
    arguments = own.parse_args(argv)
    bench, dtypes = asked(arguments)
    keep_freed_memory()
    out = {"shape": arguments.shape, "environment": environment(bench.device), "shares": {}}
    for dtype in dtypes:
        trainer = bench.trainer(ENGINE, dtype)
        step = bench.step(trainer)
        for _ in range(3):
            step()
        activities = [ProfilerActivity.CPU] + (
            [ProfilerActivity.CUDA] if bench.device.type == "cuda" else []
        )
        with profile(activities=activities) as profiled:
            for _ in range(3):
                step()
        seconds: dict[str, float] = {}
        for event in profiled.key_averages():
            own_time = (
                event.self_device_time_total
                if bench.device.type == "cuda"
                else event.self_cpu_time_total
            )
            kind = kind_of(event.key)
            seconds[kind] = seconds.get(kind, 0.0) + own_time
        total = sum(seconds.values())
        shares = {
            kind: own / total for kind, own in sorted(seconds.items(), key=lambda item: -item[1])
        }
        out["shares"][str(dtype).removeprefix("torch.")] = shares
        print(dtype, ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()), flush=True)
    write(out, arguments.json)
    return out


if __name__ == "__main__":
    main()
