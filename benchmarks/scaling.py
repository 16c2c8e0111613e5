r"""How one engine step grows with prompt length, completion length, batch, K, depth and vocabulary.

    python benchmarks/scaling.py --shape cpu --dtype float32 --json scaling.json \
        --figure scaling.png

1. One quantity varies at a time around a base: the shape with all prompts and all completions of
   its mean length.
2. Each value's step is counted (peak memory beyond the weights), then all values are timed in turn.
3. Straight lines are fitted to the time over K, batch and completion length.
4. The slope over K is the cost of an added PGD step. It is set against one full forward and
   backward of the attacked network over the same micro-batches, from the embedding up and down
   again, timed in the same turns: a step from the lowest site should cost the share of blocks that
   it runs, and 10 % for what does not shrink with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from lat_step import asked, parser
from measure import count, environment, seconds_of, write
from scipy.stats import linregress
from shapes import Shape
from variants import ENGINE, Bench

from latlib.attack import attack_losses
from latlib.hooks import EMBEDDING, resolve_sites
from latlib.io.machine import keep_freed_memory
from latlib.threat import depth

AXES = {
    "prompt": "prompt length (tokens)",
    "completion": "completion length (tokens)",
    "batch": "batch (rows)",
    "steps": "PGD steps K",
    "depth": "depth (blocks)",
    "vocabulary": "vocabulary (tokens)",
}
FITTED = ("completion", "batch", "steps")


@dataclass
class Point:
    """One step with one quantity changed."""

    variable: str
    value: int
    bench: Bench
    trainer: object = None
    peak_bytes: int = 0
    samples: list[float] = field(default_factory=list)


def base_of(shape: Shape) -> Shape:
    """The shape with every length at its mean, and sites that follow the depth."""
    prompt, completion = (sum(lengths) // 2 for lengths in (shape.prompts, shape.completions))
    sites = tuple(site / shape.layers if isinstance(site, int) else site for site in shape.sites)
    return replace(
        shape, prompts=(prompt, prompt), completions=(completion, completion), sites=sites
    )


def changed(base: Shape, variable: str, value: int) -> Shape:
    """The base with one quantity at another value."""
    name = {"prompt": "prompts", "completion": "completions", "depth": "layers"}.get(
        variable, variable
    )
    return replace(
        base, **{name: (value, value) if variable in ("prompt", "completion") else value}
    )


def values_of(base: Shape, quick: bool) -> dict[str, list[int]]:
    """variable -> values around the base's."""
    here = {
        "prompt": base.prompts[0],
        "completion": base.completions[0],
        "batch": base.batch,
        "steps": base.steps,
        "depth": base.layers,
        "vocabulary": base.vocabulary,
    }
    factors = {name: (0.5, 1, 2, 3) for name in here} | {
        "vocabulary": (0.25, 1, 4, 8),
        "steps": (0.4, 1, 2, 3),
    }
    if quick:
        factors = dict.fromkeys(here, (1, 2, 3))
    return {
        name: sorted({max(1, round(value * f)) for f in factors[name]})
        for name, value in here.items()
    }


def full_pass(bench: Bench, trainer) -> Callable[[], None]:
    """Forward and backward through all blocks, as an attack on the embedding would: the frozen
    network over the step's micro-batches, the attack's loss, the gradient of a perturbation of the
    embedding."""
    generator, settings = torch.Generator().manual_seed(0), trainer.settings.attack
    batches = [part.attacked for part in trainer._micro_batches(True, generator)]
    network = trainer.lm.network(train=True).frozen()

    def run() -> None:
        for batch in batches:
            shape = (*batch.shape, network.d_model)
            delta = torch.zeros(
                shape, dtype=network.dtype, device=network.device, requires_grad=True
            )
            with network.frozen_mode():
                loss = attack_losses(
                    network, batch, settings, network.label_rows(batch, {EMBEDDING: delta})
                )
                torch.autograd.grad(loss.sum(), delta)

    return run


def measure(
    base: Shape, device: torch.device, dtype: torch.dtype, repeats: int, quick: bool, seed: int = 0
):
    """(points, seconds of each full pass)."""
    points = [
        Point(variable, value, Bench(changed(base, variable, value), device, seed))
        for variable, values in values_of(base, quick).items()
        for value in values
    ]
    for point in points:
        point.trainer = point.bench.trainer(ENGINE, dtype)
        point.peak_bytes = count(point.bench.step(point.trainer), device).peak
    bench = Bench(base, device, seed)
    full, passes = full_pass(bench, bench.trainer(ENGINE, dtype)), []
    full()
    for _ in range(repeats):
        for point in points:
            point.samples.append(seconds_of(point.bench.step(point.trainer), device))
            if point.variable == "steps":
                passes.append(seconds_of(full, device))
    return points, passes


def fits(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """variable -> the straight line through its medians."""
    out = {}
    for variable in FITTED:
        own = [point for point in points if point.variable == variable]
        seconds = [median(point.samples) for point in own]
        line = linregress([point.value for point in own], seconds)
        out[variable] = {
            "slope": float(line.slope),
            "intercept": float(line.intercept),
            "r_squared": float(line.rvalue**2),
        }
    return out


def added_step(base: Shape, slope: float, passes: Sequence[float]) -> dict[str, float]:
    """The cost of an added PGD step beside its bound."""
    first = depth(resolve_sites(base.sites, base.layers)[0])
    bound = 1.1 * (1 - first / base.layers)
    share = slope / median(passes)
    return {
        "seconds": slope,
        "full_forward_backward_seconds": median(passes),
        "share": share,
        "blocks_below_first_site": first,
        "bound": bound,  # (1 - first site / depth) and 10 % of it
        "within": bool(share <= bound),
    }


def caption(records: Sequence[dict], lines: dict) -> str:
    """What the figure shows, in words."""
    parts = []
    for variable, label in AXES.items():
        line = [r for r in records if r["variable"] == variable]
        ends = " to ".join(
            f"{r['seconds']:.3g} s and {r['peak_bytes'] / 1e6:.3g} MB at {r['value']}"
            for r in (line[0], line[-1])
        )
        fit = (
            f" (straight line: R squared {lines[variable]['r_squared']:.3f})"
            if variable in lines
            else ""
        )
        parts.append(f"{label}: {ends}{fit}")
    return (
        "Time and peak memory of one engine step as one quantity varies. " + "; ".join(parts) + "."
    )


def draw(records: Sequence[dict], lines: dict, path: Path) -> None:
    """A panel for each variable: time (left axis, circles), peak memory (right axis, squares),
    fitted lines dotted.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for panel, (variable, label) in zip(panels.flat, AXES.items(), strict=True):
        line = [r for r in records if r["variable"] == variable]
        x, seconds = [r["value"] for r in line], [r["seconds"] for r in line]
        (time,) = panel.plot(x, seconds, "o-", color="#0072B2", label="time")
        handles = [time]
        if variable in lines:
            fit = [lines[variable]["intercept"] + lines[variable]["slope"] * value for value in x]
            handles += panel.plot(
                x, fit, ":", color="black", label=f"line, R² = {lines[variable]['r_squared']:.3f}"
            )
        other = panel.twinx()
        handles += other.plot(
            x, [r["peak_bytes"] / 1e6 for r in line], "s--", color="#D55E00", label="peak memory"
        )
        panel.set(xlabel=label, ylabel="time of a step (s)", xlim=(0, None), ylim=(0, None))
        other.set(ylabel="peak memory (MB)", ylim=(0, None))
        panel.legend(handles=handles, fontsize="small", loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, fit, print, write; returns what is written."""
    own = parser()
    own.description = __doc__
    own.add_argument("--figure", type=Path, help="where the PNG goes")
    own.add_argument("--quick", action="store_true", help="three values of each quantity")
    arguments = own.parse_args(argv)
    keep_freed_memory()
    bench, dtypes = asked(arguments)
    base = base_of(bench.shape)
    points, passes = measure(
        base, bench.device, dtypes[0], arguments.repeats, arguments.quick, arguments.seed
    )
    records = [
        {
            "variable": p.variable,
            "value": p.value,
            "seconds": median(p.samples),
            "samples": p.samples,
        }
        | {"peak_bytes": p.peak_bytes}
        for p in points
    ]
    lines = fits(points)
    out = {
        "base": {"name": arguments.shape, **asdict(base)},
        "dtype": str(dtypes[0]).removeprefix("torch."),
        "environment": environment(bench.device),
        "points": records,
        "fits": lines,
        "added_pgd_step": added_step(base, lines["steps"]["slope"], passes),
        "caption": caption(records, lines),
    }
    for r in records:
        print(
            f"{AXES[r['variable']]:28} {r['value']:>7}: {r['seconds']:8.3f} s"
            f" {r['peak_bytes'] / 1e6:9.1f} MB"
        )
    for variable, line in lines.items():
        print(f"{AXES[variable]:28} {line['slope']:.4g} s each, R squared {line['r_squared']:.4f}")
    print(
        "an added PGD step: {share:.3f} of a full forward and backward; bound {bound:.3f}".format(
            **out["added_pgd_step"]
        )
    )
    write(out, arguments.json)
    if arguments.figure:
        draw(records, lines, arguments.figure)
    return out


if __name__ == "__main__":
    main()
