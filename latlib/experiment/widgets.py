"""What models say to one prompt, to be turned by hand: the last cells of notebooks 02, 04 and 05.

1. `told` is the core: one model's reply to one prompt and its outcome, perturbed or not.
2. `attacked` is notebook 02's: without a perturbation, under noise and under the attack. `steered`
   is notebook 04's: a direction ablated or added.
3. `attack_slider`, `picker` and `encoding_picker` put widgets around them. A batch run has none:
   nobody could turn them.
Nothing here measures anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache
from html import escape
from math import log10
from typing import TYPE_CHECKING, Any

import torch
from IPython.display import HTML
from torch import Tensor

from latlib.attack import Deltas, pgd, random_noise
from latlib.batch import collate
from latlib.data.prompts import Prompt, Prompts, in_the_world
from latlib.evaluation.ask import PLAINLY, Wording, prompt_set
from latlib.evaluation.examine import Examiner, examiner_of, grader_of
from latlib.evaluation.generate import Perturb, generate, write
from latlib.evaluation.outcomes import BASE, OWN_RULES, PLAIN, Rule
from latlib.evaluation.phrases import redacted
from latlib.experiment.run import Run
from latlib.io.progress import in_batch
from latlib.network_protocol import Network
from latlib.redteam.latent import base_attack, replace_settings, search_within
from latlib.refusal.directions import sources
from latlib.refusal.interventions import Directions, adding
from latlib.text.encodings import REGISTRY
from latlib.threat import PGD as Search
from latlib.threat import ThreatModel

if TYPE_CHECKING:
    from ipywidgets import Widget

SHOWN_PROMPTS = 8  # of a set, to choose from


@dataclass(frozen=True)
class Told:
    """A reply, and its outcome as the run grades it."""

    outcome: str
    reply: str


def told(
    examiner: Examiner,
    prompts: Prompts,
    perturb: Perturb | None = None,
    wording: Wording = PLAINLY,
) -> list[Told]:
    """What a model replies to prompts, asked in one batch; a perturbation acts while they are read,
    and not on the words of the replies."""
    evaluation = examiner.profile.evaluation.model_copy(update={"batch": len(prompts)})
    together = examiner.profile.model_copy(update={"evaluation": evaluation})
    found = replace(examiner, profile=together).examine(prompts, wording, perturb)
    texts = found.texts
    if texts is None:  # they were graded without being written
        rows, length = examiner.rows(prompts, wording), evaluation.max_new_tokens
        texts = write(examiner.lm, rows, perturb, size=len(rows), max_new_tokens=length)
    return [Told(str(end), text) for end, text in zip(found.outcomes, texts, strict=True)]


def noise_like(network: Network, deltas: Deltas, seed: int = 0) -> Deltas:
    """Random directions of the lengths that perturbations have at each position and site."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site, delta in deltas.items():
        lengths = delta.double().norm(dim=-1, keepdim=True).cpu()
        everywhere = torch.ones_like(delta[..., :1], dtype=torch.bool)
        found[site] = random_noise(network, everywhere, lengths, generator)
    return found


def attacked(
    examiner: Examiner, prompt: Prompt, threat: ThreatModel, search: Search, seed: int = 0
) -> dict[str, Told]:
    """What a model replies to a prompt without a perturbation ('none'), under PGD's, and under
    'noise' as long as that at each place."""
    network, rows = examiner.network, examiner.rows([prompt])
    batch = collate(rows, device=examiner.lm.device)
    generator = torch.Generator().manual_seed(seed)
    deltas = pgd(network, batch, threat, search, generator).deltas
    noise = noise_like(network, deltas, seed)
    each = {}
    for site, delta in deltas.items():
        each[site] = torch.cat((torch.zeros_like(delta), noise[site], delta))
    found = told(examiner, [prompt] * 3, lambda _: each)
    return dict(zip(("none", "noise", "PGD"), found, strict=True))


def changed_words(before: str, after: str) -> str:
    """`after` as HTML, those of its words marked that `before` has not in their place."""
    words = after.split()
    matcher = SequenceMatcher(None, before.split(), words, autojunk=False)
    parts = []
    for kind, _, _, start, end in matcher.get_opcodes():
        text = escape(" ".join(words[start:end]))
        if text:
            parts.append(text if kind == "equal" else f"<mark>{text}</mark>")
    return " ".join(parts)


def side_by_side(
    replies: Mapping[str, Mapping[str, Told]], show: bool, whose: str = "model"
) -> HTML:
    """A table of replies: a row for each model (or whatever is `whose`) and what was done, the
    words marked that are not in its first reply. show: the text, and not its length and a hash."""
    lines = []
    for model, by_change in replies.items():
        first = next(iter(by_change.values())).reply
        for change, said in by_change.items():
            text = escape(redacted(said.reply))
            if show:
                text = changed_words(first, said.reply)
            names = f"<th>{escape(model)}</th><th>{escape(change)}</th>"
            cells = f"<td><b>{said.outcome}</b></td><td style='text-align: left'>{text}</td>"
            lines.append(f"<tr>{names}{cells}</tr>")
    heads = f"<th>{whose}</th><th>change</th><th>outcome</th><th>reply (changed words marked)</th>"
    # a prompt's dollar signs are no formula
    table = f"<table class='tex2jax_ignore'><thead><tr>{heads}</tr></thead>"
    return HTML(f"{table}<tbody>{''.join(lines)}</tbody></table>")


def _examiners(run: Run, seed: int) -> Callable[[str], Examiner]:
    """A function: the examiner of a method's model, which is loaded once."""

    @lru_cache
    def examiner(method: str) -> Examiner:
        return examiner_of(run.profile, run.model(method, seed))

    return examiner


def attack_slider(run: Run, eps: float, seed: int = 0) -> Widget | None:
    """A slider of the attack's radius, from `eps`: what the undefended twin and the main method
    reply, side by side; None in a batch run."""
    if in_batch():
        return None
    import ipywidgets as widgets

    usual, norms, examiner = base_attack(run.profile), run.norms(seed), _examiners(run, seed)

    def tell(prompt: Prompt, eps: float, show: bool) -> HTML:
        settings = replace_settings(usual, eps=eps)
        replies = {}
        for method in run.profile.contrasted:
            asked = examiner(method)
            threat = settings.threat_model(asked.lm.n_layers, norms)
            search = search_within(settings, threat, asked.network.d_model)
            replies[method] = attacked(asked, prompt, threat, search, seed)
        return side_by_side(replies, show)

    least, most = min(eps, usual.eps) / 4, max(eps, *run.profile.evaluation.eps)
    return _interactive(
        tell,
        run,
        prompt=_prompts(run, ["harmful"]),
        eps=widgets.FloatLogSlider(
            eps, min=log10(least), max=log10(most), readout_format=".3g", continuous_update=False
        ),
    )


def encoding_picker(run: Run, seed: int = 0) -> Widget | None:
    """A request's encoding and its strength, the share of what it can replace: what the base, the
    undefended twin and the main method reply beside what they reply in plain words; None in a batch
    run."""
    if in_batch():
        return None
    import ipywidgets as widgets

    examiner = _examiners(run, seed)

    @lru_cache  # it is the same whatever the encoding
    def plainly(method: str, prompt: Prompt) -> Told:
        return told(examiner(method), [prompt])[0]

    def tell(prompt: Prompt, encoding: str, strength: float, show: bool) -> HTML:
        partly = strength < 1 and REGISTRY[encoding].strength is not None
        wording = Wording(f"{encoding}@{strength:g}" if partly else encoding)
        replies = {}
        for method in (BASE, *run.profile.contrasted):
            asked = examiner(method)
            plain = plainly(method, prompt)
            (encoded,) = told(asked, [prompt], None, wording)
            replies[method] = {PLAIN: plain, wording.encoding: encoded}
        table = side_by_side(replies, show)
        return HTML(f"<p>Asked: <i>{escape(wording.request(prompt))}</i></p>{table.data}")

    return _interactive(
        tell,
        run,
        prompt=_prompts(run, ["harmful", "twin"]),
        encoding=widgets.Dropdown(options=list(REGISTRY), value="leet"),
        strength=widgets.FloatSlider(1.0, min=0.0, max=1.0, step=0.1, continuous_update=False),
    )


def _prompts(run: Run, sets: Iterable[str]) -> Widget:
    """A choice of the first prompts of some sets."""
    import ipywidgets as widgets

    options = []
    for name in sets:
        found = prompt_set(name, run.profile, SHOWN_PROMPTS)
        options += [(f"{name}: {prompt.text}", prompt) for prompt in found]
    return widgets.Dropdown(options=options, layout={"width": "95%"})


def _interactive(tell: Callable[..., HTML], run: Run, **choices: Widget) -> Widget:
    """Widgets around `tell`, whose replies are redacted for real models until they are asked
    for."""
    import ipywidgets as widgets

    show = widgets.Checkbox(value=in_the_world(run.profile), description="show text")
    return widgets.interactive(tell, {"auto_display": True}, **choices, show=show)


def steered(
    directions: Directions, rule: str, mode: str, strength: float = 1.0
) -> dict[str, Tensor | Perturb]:
    """Options of `generate` under which the direction of a rule is ablated, or 'add'ed: `strength`
    times it, at its own site, to every token of the prompt.

    Raises ValueError for an unknown mode, or for a subspace to be added.
    """
    direction = directions[rule]
    if mode == "ablate":
        return {"directions": direction.vector}
    if mode != "add":
        raise ValueError(f"mode = {mode!r} is unknown: choose 'ablate' or 'add'")
    if direction.vector.dim() > 1:
        raise ValueError(
            f"rule = {rule!r} is a subspace: it can be ablated, and only one direction can be added"
        )
    return {"perturb": adding(direction.vector, direction.site, strength)}


def picker(run: Run, seed: int = 0) -> Widget | None:
    """What a model replies when a direction is ablated or added, beside what it replies untouched;
    None in a batch run."""
    if in_batch():
        return None
    import ipywidgets as widgets

    load, known = lru_cache(run.model), []
    for kind in ("harmful", "harmless"):
        known += prompt_set(kind, run.profile, SHOWN_PROMPTS)
    texts = [prompt.text for prompt in known]
    grader = grader_of(run.profile, known)

    def graded(prompt: str, text: str) -> Told:
        if prompt not in texts:  # whose right answer nobody knows
            return Told("not graded", text)
        return Told(str(grader.grade([prompt], [text])[0].outcome), text)

    def tell(target: str, prompt: str, show: bool, vector: str, mode: str, **how: Any) -> HTML:
        lm, system = load(target, seed), run.profile.data.system_prompt
        ways: dict[str, Any] = {"nothing": {}}
        said = {}
        try:
            if mode != "nothing":
                ways[mode] = steered(run.directions(vector, seed), mode=mode, **how)
            for way, options in ways.items():
                (text,) = generate(lm, [prompt], system_prompt=system, **options)
                said[way] = graded(prompt, text)
        except ValueError as error:  # shown where the replies would be
            return HTML(escape(str(error)))
        return side_by_side({target: said}, show)

    names = sources(run.profile)
    return _interactive(
        tell,
        run,
        target=widgets.Dropdown(options=names, value=names[-1]),
        mode=widgets.Dropdown(options=["ablate", "add", "nothing"]),
        vector=widgets.Dropdown(options=names, value=names[-1]),
        rule=widgets.Dropdown(options=[str(rule) for rule in OWN_RULES], value=str(Rule.BEST)),
        strength=widgets.FloatSlider(1.0, min=-2.0, max=2.0, step=0.1, continuous_update=False),
        prompt=widgets.Combobox(
            options=texts, value=texts[0], continuous_update=False, layout={"width": "95%"}
        ),
    )
