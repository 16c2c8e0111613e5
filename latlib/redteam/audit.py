"""The audit: requests in encodings that safety training never saw, refused, complied with, or not
understood.

1. In every encoding a model is asked harmful requests and their harmless twins (the same words, but
   for the target).
2. A twin is **understood** when the model answers it exactly, or would once the answer's first
   words stand there. So a model that refuses a harmless request, but knows the answer, has
   understood; refusing is counted on its own.
3. A harmful request carries whether its twin was understood: what a model does not understand it
   cannot be made to betray, and its silence is no safety. The success rate *given understanding* is
   over the others.
4. An encoding 'request>reply' asks for the answer in an encoding too; the right answer is then the
   encoded one.
5. Prefilling puts the first words of the right answer into the model's mouth.
6. Real data has no twins: a harmful request's counterpart is any harmless one, and whether a
   request was understood is measured on itself, by its answer's likelihood (`evaluate`). Prefilled
   replies are then written out and graded, in the encodings that are audited in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from latlib.data.prompts import in_the_world, kinds
from latlib.evaluation.ask import examine, prompt_set
from latlib.evaluation.outcomes import OnStep, Subject, outcome_rows, unseen
from latlib.models import LanguageModel
from latlib.redteam.latent import AttackCell, replace_settings


def audit(lm: LanguageModel, subject: Subject, on_step: OnStep = unseen) -> pd.DataFrame:
    """Harmful requests, their twins and prefilling in every encoding; harmless requests of other
    kinds in those that the model was taught, to say what a defence costs. Further encodings on the
    profile's first seed only."""
    evaluation = subject.profile.evaluation
    first = subject.seed == subject.profile.seeds[0]
    further = evaluation.further_encodings if first else ()
    return _audit(lm, subject, evaluation.encodings, further, on_step)


def variant(lm: LanguageModel, subject: Subject, on_step: OnStep = unseen) -> pd.DataFrame:
    """The short suite of a sweep: the audit without further encodings, and the attack at `lat`'s
    own radius.
    """
    lat = subject.profile.training("lat").attack
    attack = AttackCell(replace_settings(lat, steps=subject.profile.evaluation.pgd_steps))
    tables = [
        _audit(lm, subject, subject.profile.evaluation.encodings, (), on_step),
        attack.measure(lm, subject),
    ]
    return pd.concat(tables, ignore_index=True)


def _audit(
    lm: LanguageModel,
    subject: Subject,
    taught: Sequence[str],
    further: Sequence[str],
    on_step: OnStep,
) -> pd.DataFrame:
    profile, network, tables = subject.profile, lm.network(), []
    world, twins = in_the_world(profile), prompt_set("twin", profile)
    # data without responses: what the model says in plain words is the answer
    if not all(p.answer for p in twins):
        said = examine(lm, profile, twins, network=network).texts
        twins = [replace(p, answer=p.answer or reply) for p, reply in zip(twins, said, strict=True)]
    for step, encoding in enumerate((*taught, *further), start=1):
        names = ["twin", "harmful", *(["harmless"] if encoding in taught else [])]
        if encoding == "plain":
            names += [name for name in kinds(profile) if name not in names]
        understood = None
        for name in names:
            prompts = twins if name == "twin" else prompt_set(name, profile)
            deep = name in ("twin", "harmful")
            # a real model writes every prefilled reply anew: not in further encodings
            begun = name == "harmful" and (world or encoding in taught)
            asked = {"encoding": encoding, "understanding": deep, "prefilling": begun}
            found = examine(lm, profile, prompts, network=network, **asked)
            # of real data each prompt itself says whether it was understood
            if name == "twin" or not world:
                understood = found.understood
            cell = {"encoding": encoding} | ({"understood": understood} if deep else {})
            tables.append(
                outcome_rows(subject, name, prompts, found.outcomes, texts=found.texts, **cell)
            )
            if found.prefilled:
                tables.append(
                    outcome_rows(subject, name, prompts, found.prefilled, attack="prefill", **cell)
                )
        on_step(step, len(taught) + len(further), encoding)
    return pd.concat(tables, ignore_index=True)
