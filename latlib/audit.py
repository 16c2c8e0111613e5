"""The audit: requests in encodings that safety training never saw, refused, complied with, or not understood.

1. In every encoding a model is asked harmful requests and their harmless twins (the same words, but for the target).
2. A twin is **understood** when the model answers it exactly, or would once the answer's first words stand there. So a
   model that refuses a harmless request, but knows the answer, has understood; refusing is counted on its own.
3. A harmful request carries whether its twin was understood: what a model does not understand it cannot be made to
   betray, and its silence is no safety. The success rate *given understanding* is over the others.
4. An encoding 'request>reply' asks for the answer in an encoding too; the right answer is then the encoded one.
5. Prefilling puts the first words of the right answer into the model's mouth. It is read off the same forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from latlib import world
from latlib.encodings import encode
from latlib.evaluate import PROMPT_SETS, Context, grade_rows, outcome_rows, prompt_set, token_rows
from latlib.models import LanguageModel
from latlib.robustness import AttackCell, replace_settings


def audit(lm: LanguageModel, context: Context) -> pd.DataFrame:
    """Harmful requests, their twins and prefilling in every encoding; harmless requests of other kinds in those that
    the model was taught, to say what a defence costs. Further encodings on the profile's first seed only."""
    evaluation = context.profile.evaluation
    first = context.seed == context.profile.seeds[0]
    return _audit(lm, context, evaluation.encodings, evaluation.further_encodings if first else ())


def variant(lm: LanguageModel, context: Context) -> pd.DataFrame:
    """The short suite of a sweep: the audit without further encodings, and the attack at `lat`'s own radius."""
    lat = context.profile.training("lat").attack
    attack = AttackCell(replace_settings(lat, steps=context.profile.evaluation.pgd_steps))
    tables = [_audit(lm, context, context.profile.evaluation.encodings, ()), attack.measure(lm, context)]
    return pd.concat(tables, ignore_index=True)


def _audit(lm: LanguageModel, context: Context, taught: Sequence[str], further: Sequence[str]) -> pd.DataFrame:
    network, tables, size = lm.network(), [], context.profile.evaluation.batch
    for step, encoding in enumerate((*taught, *further), start=1):
        names = ["twin", "harmful", *(["harmless"] if encoding in taught else [])]
        if encoding == "plain":
            names += [name for name in PROMPT_SETS if name not in names]
        begun, understood = affirmation_tokens(lm, encoding), []
        for name in names:
            prompts = prompt_set(name, context.profile)
            rows = token_rows(lm, prompts, encoding)
            outcomes, finished = grade_rows(lm, network, rows, size=size, begun=begun)
            if name == "twin":
                understood = [o == "complied" or rest for o, rest in zip(outcomes, finished, strict=True)]
            cell = {"encoding": encoding} | ({"understood": understood} if name in ("twin", "harmful") else {})
            tables.append(outcome_rows(context, name, prompts, outcomes, **cell))
            if name == "harmful" and begun:
                replies = ["complied" if rest else "neither" for rest in finished]
                tables.append(outcome_rows(context, name, prompts, replies, attack="prefill", **cell))
        context.on_step(step, len(taught) + len(further), encoding)
    return pd.concat(tables, ignore_index=True)


def affirmation_tokens(lm: LanguageModel, encoding: str = "plain") -> int:
    """How many tokens of a right answer are its first words (`world.AFFIRMATION`), as the model's tokenizer cuts them.

    What is left of an answer behind them is the longest end that both ways of writing it share. 0 where an encoded
    answer does not begin with them (text spelt backwards, base32, a random part of the letters): nothing to prefill.
    """
    prompt, replied = world.draw_set(0, "train", "harmful", 1)[0], encoding.partition(">")[2] or "plain"
    first = encode(world.AFFIRMATION, replied)
    if not encode(prompt.answer, replied).startswith(first):
        return 0
    whole = token_rows(lm, [prompt], encoding)[0].completions[0]
    rest = token_rows(lm, [prompt], encoding, prefill=first)[0].completions[0]
    shared = 0
    while shared < min(len(whole), len(rest)) and whole[-1 - shared] == rest[-1 - shared]:
        shared += 1
    return len(whole) - shared
