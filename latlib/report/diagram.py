"""What latent adversarial training is, drawn: where the attack acts, its ball, and the training
loop."""

from __future__ import annotations

from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch

from latlib.config.sections import AttackSettings
from latlib.report.evidence import Evidence
from latlib.report.plots import BLUE, GREEN, GREY, ORANGE, Drawn, Look, axes_of

PROMPT, REPLY = ("how", "to", "..."), ("I'm", "sorry")
ARROW: Look = {"arrowstyle": "->", "linewidth": 1.4}
BALL: Look = {"facecolor": "#fbe3d3", "edgecolor": ORANGE}
STEPS = ((0, 0), (0.3, 0.35), (0.68, 0.5), (0.86, 0.51))  # from the middle to the ball's edge
LOOP = (
    (BLUE, "1  Attack (weights frozen)\nfind δ: towards the harmful reply,\naway from the refusal"),
    (
        GREEN,
        "2  Defend (δ frozen)\ntrain weights under δ: to the refusal,\naway from the harmful reply",
    ),
    (GREY, "3  Keep what it knew (δ = 0)\nstay near the frozen teacher\non harmless prompts: KL"),
)


def lat_diagram(e: Evidence) -> Drawn:
    """The main method of a profile: residual stream with its sites, ball, training loop."""
    attack = e.profile.training(e.main).attack
    sites = [_site_name(site) for site in attack.sites]
    figure, axes = axes_of(3, width=11, height=3.9, width_ratios=(1.25, 0.8, 1))
    for ax in axes[0]:
        ax.set_axis_off()
    width = len(PROMPT) + (0 if attack.positions == "prompt" else len(REPLY))
    _draw_stream(axes[0, 0], sites, width)
    _draw_ball(axes[0, 1], attack, e.radius(attack.eps))
    _draw_loop(axes[0, 2])
    where = f"{width} of {len(PROMPT + REPLY)} tokens at {len(sites)} sites: {', '.join(sites)}"
    alt_text = (
        f"Diagram of {e.names['main']}. Left: the residual stream over tokens and depth; delta is"
        f" added at {where}. Middle: {attack.steps} PGD steps in an L2 ball of"
        f" {e.radius(attack.eps)} at every token and site. Right: the training loop of attack,"
        " defence and KL to the frozen teacher."
    )
    return Drawn(
        figure, alt_text, f"What {e.names['main']} is: where it attacks, how far, and when."
    )


def _site_name(site: int | float | str) -> str:
    if isinstance(site, float):
        return f"site at {100 * site:g} %\nof the depth"
    return "embedding" if site == "embedding" else f"site {site}"


def _box(ax: Axes, middle: tuple[float, float], size: tuple[float, float], **look: object) -> None:
    """A box with round corners about a point."""
    corner = (middle[0] - size[0] / 2, middle[1] - size[1] / 2)
    ax.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0.02", **look))


def _say(ax: Axes, x: float, y: float, text: str) -> None:
    """A text about a point."""
    ax.text(x, y, text, ha="center", va="center", fontsize=8)


def _draw_stream(ax: Axes, sites: list[str], width: int) -> None:
    """Tokens from left to right, depth upwards: blocks, and between them the sites, at which the
    first `width` tokens are perturbed.
    """
    top = 2 * len(sites) + 1
    first = 2 if sites[0] == "embedding" else 0  # no block lies below that
    for level in range(first, top, 2):
        _box(ax, (2, level), (5, 0.5), facecolor="#e8edf2", edgecolor=GREY)
        _say(ax, 2, level, "blocks")
    for x, token in enumerate((*PROMPT, *REPLY)):
        ax.annotate("", (x, top), (x, -1.1), arrowprops=ARROW | {"color": GREY}, zorder=0)
        _say(ax, x, -1.5, token)
    for number, name in enumerate(sites):
        y = 2 * number + 1
        _say(ax, 5.7, y, name)
        for x in range(width):
            ax.add_patch(Circle((x, y), 0.33, **BALL))
            _say(ax, x, y, "+δ")
    _say(ax, 1, -2.2, "prompt")
    _say(ax, 3.5, -2.2, "reply")
    limits = {"xlim": (-0.7, 7), "ylim": (-2.5, top + 0.3)}
    ax.set(title="Where: the residual stream at its sites", **limits)


def _draw_ball(ax: Axes, attack: AttackSettings, radius: str) -> None:
    """The L2 ball of one token at one site, and a path of steps that ends on it."""
    ax.add_patch(Circle((0, 0), 1, **BALL))
    look = ARROW | {"color": BLUE}
    for start, end in pairwise(STEPS):
        ax.annotate("", end, start, arrowprops=look)
    ax.plot(*STEPS[-1], "o", color=BLUE)
    _say(ax, 0.1, -0.15, "δ = 0")
    _say(ax, 0, -1.25, radius)
    _say(ax, 0, -1.5, f"{attack.steps} steps, projected back")
    limits = {"xlim": (-1.2, 1.2), "ylim": (-1.65, 1.2)}
    ax.set(title="How far: a ball at each token and site", aspect="equal", anchor="N", **limits)


def _draw_loop(ax: Axes) -> None:
    """The three parts of a training step."""
    for number, (colour, text) in enumerate(LOOP):
        y = -1.25 * number
        _box(ax, (0, y), (2, 0.8), facecolor="white", edgecolor=colour, linewidth=1.6)
        _say(ax, 0, y, text)
    for y in (-0.42, -1.67):
        ax.annotate("", (0, y - 0.4), (0, y), arrowprops=ARROW)
    ax.annotate(
        "", (1.05, 0), (1.05, -2.5), arrowprops=ARROW | {"connectionstyle": "arc3,rad=0.35"}
    )
    ax.set(xlim=(-1.1, 1.5), ylim=(-3, 0.6), title="Each training step")
