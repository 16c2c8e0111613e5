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
   request was understood is measured on itself, by its answer's likelihood
   (`latlib.evaluation.examine`). Prefilled replies are then written out and graded, in the
   encodings that are audited in full.

To add an encoding: `latlib.text.encodings`, and a profile that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from latlib.config.profile import Profile
from latlib.data.prompts import Prompt, Question, prompt_source
from latlib.evaluation.ask import Wording, prompt_set
from latlib.evaluation.examine import Examiner, examiner_of
from latlib.evaluation.outcomes import (
    HARMFUL,
    HARMLESS,
    PLAIN,
    PREFILL,
    TWIN,
    Cell,
    OnStep,
    Subject,
    outcome_rows,
    unseen,
)
from latlib.models import LanguageModel
from latlib.redteam.latent import AttackCell, main_attack, replace_settings


def audit(lm: LanguageModel, subject: Subject, on_step: OnStep = unseen) -> pd.DataFrame:
    """Harmful requests, their twins and prefilling in every encoding; harmless requests of other
    kinds in the profile's `encodings`, to say what a defence costs. Further encodings on the
    profile's first seed only."""
    profile = subject.profile
    first = subject.seed == profile.seeds[0]
    further = profile.evaluation.further_encodings if first else ()
    return _audit(lm, subject, further, on_step)


def variant(lm: LanguageModel, subject: Subject, on_step: OnStep = unseen) -> pd.DataFrame:
    """The short suite of a sweep: the audit without further encodings, and the attack at the main
    defence's own radius.
    """
    profile = subject.profile
    steps = profile.evaluation.pgd_steps
    attack = AttackCell(replace_settings(main_attack(profile), steps=steps))
    asked = _audit(lm, subject, (), on_step)
    return pd.concat([asked, attack.measure(lm, subject)], ignore_index=True)


def _audit(
    lm: LanguageModel, subject: Subject, further: Sequence[str], on_step: OnStep
) -> pd.DataFrame:
    profile = subject.profile
    examiner = examiner_of(profile)
    network = lm.network()
    in_full = profile.evaluation.encodings
    twins = _answered(examiner, lm, prompt_set(TWIN, profile))
    harmful = prompt_set(HARMFUL, profile)
    tables = []
    for step, encoding in enumerate((*in_full, *further), start=1):
        wording = Wording.of(encoding)
        # a real model writes every prefilled reply anew: not in further encodings
        prefilling = not examiner.writes or encoding in in_full
        of_twins, of_harmful = examiner.examine_pairs(
            lm, twins, harmful, wording, network, prefilling
        )
        cell = Cell(encoding=wording.encoding, reply_encoding=wording.reply_encoding)
        tables.append(outcome_rows(subject, replace(cell, prompts=TWIN), twins, of_twins))
        tables.append(outcome_rows(subject, cell, harmful, of_harmful))
        if of_harmful.prefilled:
            prefilled = replace(of_harmful, outcomes=of_harmful.prefilled, texts=None)
            tables.append(outcome_rows(subject, replace(cell, attack=PREFILL), harmful, prefilled))
        for name in _further_sets(profile, encoding):
            prompts = prompt_set(name, profile)
            found = examiner.examine(lm, prompts, wording, network)
            tables.append(outcome_rows(subject, replace(cell, prompts=name), prompts, found))
        on_step(step, len(in_full) + len(further), encoding)
    return pd.concat(tables, ignore_index=True)


def _further_sets(profile: Profile, encoding: str) -> list[str]:
    """The sets of harmless prompts that are asked in an encoding beside the twins: what a defence
    costs."""
    names = [HARMLESS] if encoding in profile.evaluation.encodings else []
    if encoding == PLAIN:
        names += [name for name in prompt_source(profile).kinds if name not in (HARMFUL, *names)]
    return names


def _answered(examiner: Examiner, lm: LanguageModel, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with an answer each: where data has no responses, what the model says in plain
    words is the answer.
    """
    if all(prompt.answer for prompt in prompts):
        return list(prompts)
    replies = examiner.examine(lm, prompts).texts or ()
    answered: list[Prompt] = []
    for prompt, reply in zip(prompts, replies, strict=True):
        assert isinstance(prompt, Question)  # of the made-up world every answer is known
        answered.append(replace(prompt, answer=prompt.answer or reply))
    return answered
