"""Write docs/performance.md from what was measured: every figure in it is read from
benchmarks/results/.

    python benchmarks/document.py

1. The prose is in performance.template.md; `{name}` there is a table or a line made from the
   results files.
2. The waterfall is drawn from the same files.
3. A test holds the committed page equal to what this script writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from shapes import SHAPES

RESULTS = Path(__file__).resolve().parent / "results"
TEMPLATE = Path(__file__).with_name("performance.template.md")
PAGE = RESULTS.parents[1] / "docs" / "performance.md"
WATERFALL = (
    "![Waterfall: seconds a step from the naive implementation to the"
    " engine](../benchmarks/results/waterfall.png)"
)
TINY_RUNS = ("tiny-before", "tiny-engine", "tiny-engine-slower", "tiny-main-job", "tiny-0.1.0")
PHASES = (
    "00_glance",
    "01_hooks",
    "02_pgd_attack",
    "03_lat_training",
    "04_refusal_svd",
    "05_leetspeak_audit",
    "06_robustness",
    "07_abbas_7b",
    "09_claims",
    "99_report",
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read(name: str) -> dict:
    """A results file. Raises FileNotFoundError naming the command that makes it."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no {path}: run the benchmark that writes it (see benchmarks/README.md)"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _machine(environment: Mapping) -> str:
    where = environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores"
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("python", "torch", "transformers", "peft")
    )
    return (
        f"Measured on {where}; {versions}; commit {environment['commit'][:12]},"
        f" {environment['date'][:10]}."
    )


def _shape(s: Mapping) -> str:
    prompts, completions = ("-".join(map(str, s[name])) for name in ("prompts", "completions"))
    targets, sites = (
        ", ".join(t.removesuffix("_proj") for t in s["targets"]),
        ", ".join(map(str, s["sites"])),
    )
    return (
        f"Llama with d = {s['d_model']}, {s['layers']} layers, {s['heads']} heads / {s['kv_heads']}"
        f" key heads, ffn {s['ffn']}, vocabulary {s['vocabulary']:,}; LoRA r = {s['r']} on"
        f" {targets}; batch {s['batch']}, prompts {prompts}, completions {completions} tokens;"
        f" sites {sites}; K = {s['steps']}; the engine takes {s['micro_batch']} rows at a time"
    )


def _row(r: Mapping, *columns: str) -> list[str]:
    cells = {
        "variant": r["variant"],
        "dtype": r["dtype"],
        "step": f"{r['seconds']['median']:.2f} s",
        "limit": f"{r['limit_seconds']:.2f} s",
        "tokens": f"{r['tokens_per_second']:,.0f}",
        "best": f"{r['fraction_of_best']:.0%}",
        "own": f"{r['fraction_of_own']:.0%}",
        "tflop": f"{r['flop'] / 1e12:.2f}",
        "peak": f"{r['peak_bytes'] / 1e6:,.0f} MB",
        "speedup": f"{r['speedup_on_naive']:.2f}" if r["speedup_on_naive"] else "-",
        "speedup32": (
            f"{r['speedup_on_naive_float32']:.2f}" if r["speedup_on_naive_float32"] else "-"
        ),
        "slowdown": f"{r['seconds_on_engine']:.2f}" if r["seconds_on_engine"] else "-",
    }
    return [cells[c] for c in columns]


def _steps(results: Sequence[Mapping]) -> str:
    names = ("naive", "engine", "engine at naive's micro-batch")
    head = [
        "step",
        "compute",
        "time",
        "x naive",
        "x naive float32",
        "TFLOP",
        "limit",
        "of best",
        "of own",
        "tokens/s",
    ]
    columns = (
        "variant",
        "dtype",
        "step",
        "speedup",
        "speedup32",
        "tflop",
        "limit",
        "best",
        "own",
        "tokens",
        "peak",
    )
    rows = [_row(r, *columns) for r in results if r["variant"] in names and not r["error"]]
    return table([*head, "peak beyond weights"], rows)


def _alone(results: Sequence[Mapping]) -> str:
    rows: dict[str, list[str]] = {}
    for r in results:
        if r["variant"].endswith(" off") and not r["variant"].startswith("all"):
            rows.setdefault(r["variant"], []).extend(_row(r, "slowdown", "peak"))
        elif r["variant"] in ("engine", "shared forward", "stock modules"):
            rows.setdefault(r["variant"], []).extend(_row(r, "slowdown", "peak"))
    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    head = [
        "variant",
        *(f"{kind}, {dtype}" for dtype in dtypes for kind in ("time / engine's", "peak")),
    ]
    return table(head, [[name, *cells] for name, cells in rows.items()])


def waterfall(results: Sequence[Mapping], dtype: str) -> list[tuple[str, float]]:
    """(variant, seconds) from naive to the engine, in the order the points are added."""
    chosen = [r for r in results if r["dtype"] == dtype and not r["error"]]
    names = [
        "naive",
        "all points off",
        *(r["variant"] for r in chosen if r["variant"].startswith("+")),
        "engine",
    ]
    seconds = {r["variant"]: r["seconds"]["median"] for r in chosen}
    return [(name, seconds[name]) for name in names if name in seconds]


def _path(results: Sequence[Mapping]) -> str:
    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    falls = {dtype: dict(waterfall(results, dtype)) for dtype in dtypes}
    names = list(falls[dtypes[0]])
    labels = {"engine": "engine (+ merged weights, written-out backward passes)"}
    rows = [[labels.get(n, n), *(f"{falls[d][n]:.2f} s" for d in dtypes)] for n in names]
    return table(["implementation", *dtypes], rows)


def draw(results: Sequence[Mapping], path: Path) -> None:
    """The waterfall as bars with their values, one panel for each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(5.5 * len(dtypes), 3.6), squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        names, seconds = zip(*waterfall(results, dtype), strict=True)
        limit = next(
            r["limit_seconds"] for r in results if r["variant"] == "engine" and r["dtype"] == dtype
        )
        bars = axis.barh(names, seconds, color="#4c72b0", edgecolor="black")
        axis.bar_label(bars, [f"{s:.2f} s" for s in seconds], padding=3)
        axis.axvline(
            limit,
            color="black",
            linestyle="--",
            label=f"the engine's FLOPs at the matrix rate: {limit:.2f} s",
        )
        axis.set(xlabel="seconds a step", title=dtype, xlim=(0, 1.2 * max(seconds)))
        axis.invert_yaxis()
        axis.legend(loc="upper center", bbox_to_anchor=(0.4, -0.16), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shares(breakdown: Mapping) -> str:
    dtypes = list(breakdown["shares"])
    kinds = list(breakdown["shares"][dtypes[0]])
    return table(
        ["kind of kernel", *dtypes],
        [[k, *(f"{breakdown['shares'][d].get(k, 0):.0%}" for d in dtypes)] for k in kinds],
    )


def _allocator(kept: Mapping, returned: Mapping) -> str:
    ours = {(r["variant"], r["dtype"]): r for r in kept["results"] if not r["error"]}
    rows = []
    for r in returned["results"]:
        both = (r, ours[r["variant"], r["dtype"]])
        rows.append(
            [r["variant"], r["dtype"], *(", ".join(_row(step, "step", "best")) for step in both)]
        )
    return table(
        [
            "step",
            "compute",
            "memory returned (glibc's default): time, of best",
            "kept: time, of best",
        ],
        rows,
    )


def _growth(scaling: Mapping) -> str:
    added, fits = scaling["added_pgd_step"], scaling["fits"]
    names = {"steps": "PGD steps", "batch": "batch", "completion": "completion length"}
    lines = [f"R² = {fits[key]['r_squared']:.4f} over {name}" for key, name in names.items()]
    verdict = "within" if added["within"] else "beyond"
    return (
        "![Time and memory of one engine step against each"
        f" quantity](../benchmarks/results/scaling.png)\n\n{scaling['caption']}\n\nStraight lines"
        f" fit: {', '.join(lines)} ({scaling['dtype']}). An added PGD step costs"
        f" {added['share']:.2f} of the same network's full forward and backward over the same rows,"
        f" {verdict} the bound of {added['bound']:.2f}: the share of blocks above the first site"
        f" ({added['blocks_below_first_site']} of {scaling['base']['layers']} are below it), and"
        " 10 %."
    )


def _by_size(found: Mapping) -> str:
    rows = []
    for record in found["results"]:
        seconds, peaks = record["seconds"], record["peak_bytes"]
        cells = [f"{record['parameters'] / 1e6:.1f} million"]
        cells += [f"{seconds[name]:.2f} s" for name in ("stock", "lean")]
        cells.append(f"{record['stock_on_lean']:.2f}")
        cells += [f"{peaks[name] / 1e9:.2f} GB" for name in ("stock", "lean")]
        rows.append([record["size"], *cells])
    head = ["model", "parameters", "stock", "lean", "times as fast", "peak, stock", "peak, lean"]
    about = f"{found['rows']} rows of each kind, LoRA r = {found['r']}, {found['dtype']}."
    if "prompts" in found:
        lengths = ("{}-{} tokens".format(*found[name]) for name in ("prompts", "completions"))
        about += " Prompts of {}, completions of {}.".format(*lengths)
    losses = [record["total_loss"] for record in found["results"]]
    apart = max(abs(one["lean"] / one["stock"] - 1) for one in losses)
    about += f" Total losses of both differ by at most {apart:.0e} of them."
    return f"{_machine(found['environment'])} {about}\n\n{table(head, rows)}"


def _predicted(meta: Mapping) -> str:
    head = ["step", "weights", "adapter", "optimiser", "peak beyond them", "total", "TFLOP"]
    names = ("weights_bytes", "adapter_bytes", "optimiser_bytes", "peak_bytes", "total_bytes")
    rows = [
        [p["variant"], *(f"{p[n] / 1e9:.1f} GB" for n in names), f"{p['flop'] / 1e12:,.0f}"]
        for p in meta["predicted"]
    ]
    return f"{_shape(meta['shape'])}; {meta['predicted'][0]['dtype']}.\n\n" + table(head, rows)


def _directions(found: Mapping) -> str:
    ratios = ", ".join(f"{r['ratio']:.2f} ({r['dtype']})" for r in found["results"])
    return (
        f"Activations at every site and {found['positions']} positions of {found['prompts']}"
        " prompts of this shape, and their means, take so many times a plain forward over the same"
        f" batches: {ratios}; medians of runs in turn."
    )


def _widgets(found: Mapping) -> str:
    rows = []
    for name, record in found["results"].items():
        seconds = record["seconds"]
        cells = (median(seconds), max(seconds), record["first"])
        rows.append([name, str(len(seconds)), *(f"{cell:.2f} s" for cell in cells)])
    head = ["widget (notebooks)", "moves", "median", "longest", "first, with its models to load"]
    machine = _machine(found["environment"])
    return f"Models of profile {found['profile']}. {machine}\n\n{table(head, rows)}"


def _run(run: Mapping) -> str:
    rate = (
        f", {run['bfloat16_flop_per_second'] / 1e9:.0f} GFLOP/s in bf16"
        if "bfloat16_flop_per_second" in run
        else ""
    )
    return f"{run['about']} ({run['commit']}{rate})"


def _tiny(*runs: Mapping) -> str:
    rows = [[name, *(f"{run[name]:.0f}" if name in run else "" for run in runs)] for name in PHASES]
    total = [sum(run.get(name, 0.0) for name in PHASES) for run in runs]
    minutes = (f"**{int(t) // 60}:{int(t) % 60:02d}**" for t in total)
    return table(["seconds of", *map(_run, runs)], [*rows, ["**all, min:s**", *minutes]])


def part(make: Callable[..., str], *names: str) -> str:
    """`make` of results files, or a line that says which are still missing."""
    missing = [name for name in names if not (RESULTS / f"{name}.json").exists()]
    if missing:
        return (
            f"*Not measured yet: no {' and no '.join(f'{name}.json' for name in missing)} in"
            " `benchmarks/results/`.*"
        )
    return make(*map(read, names))


def page() -> str:
    """The text of docs/performance.md."""
    timing = RESULTS.parents[1] / "results" / "tiny" / "timing.json"
    took = json.loads(timing.read_text(encoding="utf-8"))
    run = {"about": "committed", "commit": "results/tiny", **took["notebooks"]}
    committed = [] if took["resumed"] else [run]  # a last sitting's times are no run's
    return TEMPLATE.read_text(encoding="utf-8").format(
        machine=part(lambda found: _machine(found["environment"]), "lat_step-cpu"),
        shape=_shape(asdict(SHAPES["cpu"])),
        steps=part(lambda found: _steps(found["results"]), "lat_step-cpu"),
        shares=part(_shares, "breakdown-cpu"),
        alone=part(lambda found: _alone(found["results"]), "lat_step-cpu-points"),
        path=part(lambda found: _path(found["results"]), "lat_step-cpu-points"),
        waterfall=part(lambda _: WATERFALL, "lat_step-cpu-points"),
        allocator=part(_allocator, "lat_step-cpu", "lat_step-cpu-returned"),
        growth=part(_growth, "scaling-cpu"),
        by_size=part(_by_size, "lean-cpu"),
        by_onednn=part(_by_size, "lean-smollm2-avx512"),
        predicted=part(_predicted, "lat_step-llama3-8b-meta"),
        directions=part(_directions, "directions-cpu"),
        widgets=part(_widgets, "widgets-tiny"),
        tiny=_tiny(*map(read, TINY_RUNS), *committed),
        committed=f"It began on {took['began']} and made {took['models']} models.",
    )


if __name__ == "__main__":
    if (RESULTS / "lat_step-cpu-points.json").exists():
        draw(read("lat_step-cpu-points")["results"], RESULTS / "waterfall.png")
    PAGE.write_text(page(), encoding="utf-8")
