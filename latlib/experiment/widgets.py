"""Pick a model, a vector and what to do with it, and read what the model then says (the last cell
of notebook 04).

`reply` is the same without widgets. Nothing here measures anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from latlib.data.prompts import in_the_world
from latlib.evaluation.ask import prompt_set
from latlib.evaluation.generate import Perturb, generate
from latlib.evaluation.outcomes import OWN_RULES, Rule
from latlib.evaluation.phrases import redacted
from latlib.experiment.run import Run
from latlib.io.progress import in_batch
from latlib.refusal.directions import sources
from latlib.refusal.interventions import Direction, adding

if TYPE_CHECKING:
    from ipywidgets import Widget


@dataclass(frozen=True)
class Steering:
    """What is done with a direction: that of the model `vector`, by a rule. 'add': `strength` times
    it, at its own site, to every token of the prompt.
    """

    mode: Literal["nothing", "ablate", "add"]
    vector: str
    rule: str
    strength: float = 1.0


def reply(run: Run, target: str, seed: int, prompt: str, steering: Steering) -> str:
    """What the model `target` replies to `prompt`.

    Raises ValueError for an unknown mode, or for a subspace to be added.
    """
    options: dict[str, Any] = {"system_prompt": run.profile.data.system_prompt}
    if steering.mode != "nothing":
        direction = run.directions(steering.vector, seed)[steering.rule]
        if steering.mode == "ablate":
            options["directions"] = direction.vector
        else:
            options["perturb"] = _added(direction, steering)
    return generate(run.model(target, seed), [prompt], **options)[0]


def _added(direction: Direction, steering: Steering) -> Perturb:
    if steering.mode != "add":
        raise ValueError(
            f"mode = {steering.mode!r} is unknown: choose 'ablate', 'add' or 'nothing'"
        )
    if direction.vector.dim() > 1:
        raise ValueError(
            f"rule = {steering.rule!r} is a subspace: it can be ablated, and only one direction can"
            " be added"
        )
    return adding(direction.vector, direction.site, steering.strength)


def picker(run: Run, seed: int = 0) -> Widget | None:
    """Widgets around `reply`, whose text is redacted for real models until it is asked for; None in
    a batch run, where nobody could turn them."""
    if in_batch():
        return None
    import ipywidgets as widgets

    def tell(target: str, prompt: str, show: bool, **steering: Any) -> None:
        try:
            text = redacted(reply(run, target, seed, prompt, Steering(**steering)), show)
        except ValueError as error:  # shown where the reply would be
            text = str(error)
        print(text)

    names = sources(run.profile)
    prompts = [prompt_set(kind, run.profile)[0].text for kind in ("harmful", "harmless")]
    return widgets.interactive(
        tell,
        target=widgets.Dropdown(options=names, value=names[-1]),
        mode=["ablate", "add", "nothing"],
        vector=widgets.Dropdown(options=names, value=names[-1]),
        rule=widgets.Dropdown(options=[str(rule) for rule in OWN_RULES], value=str(Rule.BEST)),
        strength=widgets.FloatSlider(1.0, min=-2.0, max=2.0, step=0.1, continuous_update=False),
        prompt=widgets.Combobox(options=prompts, value=prompts[0], continuous_update=False),
        show=widgets.Checkbox(value=in_the_world(run.profile), description="show text"),
    )
