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

from dataclasses import replace
from functools import cache, partial

import pandas as pd

from latlib.config.profile import Profile
from latlib.data.prompts import Prompt, Prompts, Question, in_the_world, prompt_source
from latlib.evaluation.ask import Wording, prompt_set
from latlib.evaluation.examine import Examiner, examiner_of
from latlib.evaluation.outcomes import (
    HARMFUL,
    HARMLESS,
    NO_ATTACK,
    PLAIN,
    PREFILL,
    TWIN,
    Cell,
    Keep,
    Subject,
    anew,
    outcome_rows,
    split_encoding,
)
from latlib.io.progress import OnStep, unseen, with_progress
from latlib.models import LanguageModel
from latlib.redteam.latent import AttackCell, base_attack, measure_cells, replace_settings


def audit(
    lm: LanguageModel,
    subject: Subject,
    on_step: OnStep = unseen,
    keep: Keep = anew,
    short: bool = False,
) -> pd.DataFrame:
    """Harmful requests, their twins and prefilling in every encoding; harmless requests of other
    kinds in the profile's `encodings`, to say what a defence costs. Further encodings on the
    profile's first seed only, and never in short. keep: keeps the rows of each encoding."""
    profile = subject.profile
    examiner = examiner_of(profile, lm)
    in_full = profile.evaluation.encodings
    encodings = in_full
    if not short and subject.seed == profile.seeds[0]:
        encodings += profile.evaluation.further_encodings

    @cache
    def pairs() -> tuple[Prompts, Prompts]:
        return _answered(examiner, prompt_set(TWIN, profile)), prompt_set(HARMFUL, profile)

    def in_encoding(encoding: str) -> pd.DataFrame:
        wording = Wording.of(encoding)
        # a real model writes every prefilled reply anew: not in further encodings
        prefilling = in_the_world(profile) or encoding in in_full
        tables = [ask_pairs(examiner, subject, pairs(), wording, prefilling=prefilling)]
        harmless = [HARMLESS] if encoding in in_full else []  # what a defence costs
        if encoding == PLAIN:
            kinds = prompt_source(profile).kinds
            harmless += [kind for kind in kinds if kind not in (HARMFUL, *harmless)]
        for name in harmless:
            prompts = prompt_set(name, profile)
            cell = Cell(name, wording.encoding, wording.reply_encoding)
            found = examiner.examine(prompts, wording)
            tables.append(outcome_rows(subject, cell, prompts, found))
        return pd.concat(tables, ignore_index=True)

    tables = []
    for encoding in with_progress(encodings, on_step):
        tables.append(keep(encoding, partial(in_encoding, encoding)))
    return pd.concat(tables, ignore_index=True)


def of_another_seed(table: pd.DataFrame, profile: Profile, seed: int) -> pd.DataFrame:
    """The first seed's audit of a model that all seeds share, as the audit of another seed: no
    further encodings, and nothing else depends on the seed."""
    in_full = set(map(split_encoding, profile.evaluation.encodings))
    asked = zip(table["encoding"], table["reply_encoding"], strict=True)
    kept = [pair in in_full for pair in asked]
    return table[kept].assign(seed=seed).reset_index(drop=True)


def variant(
    lm: LanguageModel, subject: Subject, on_step: OnStep = unseen, keep: Keep = anew
) -> pd.DataFrame:
    """The short suite of a sweep: the audit without further encodings, and the attack at the main
    defence's own radius and at those where attacks are varied. keep: keeps what each measured.
    """
    attack = base_attack(subject.profile)
    radii = dict.fromkeys((attack.eps, *subject.profile.evaluation.strong_eps))
    audited = audit(lm, subject, on_step, keep, short=True)
    cells = [AttackCell(replace_settings(attack, eps=eps)) for eps in radii]
    attacked = measure_cells(cells, lm, subject, keep=keep)
    return pd.concat([audited, attacked], ignore_index=True)


def ask_pairs(
    examiner: Examiner,
    subject: Subject,
    pairs: tuple[Prompts, Prompts],
    wording: Wording,
    attack: str = NO_ATTACK,
    prefilling: bool = False,
) -> pd.DataFrame:
    """Outcome rows of (twins, harmful prompts) in a wording, which is what the attack is."""
    twins, harmful = pairs
    of_twins = examiner.examine_deeply(twins, wording)
    of_harmful = examiner.examine_deeply(harmful, wording, prefilling)
    if in_the_world(subject.profile):  # a request is understood if its twin is: the same words
        of_harmful = replace(of_harmful, understood=of_twins.understood)
    cell = Cell(HARMFUL, wording.encoding, wording.reply_encoding, attack)
    tables = [
        outcome_rows(subject, replace(cell, prompts=TWIN), twins, of_twins),
        outcome_rows(subject, cell, harmful, of_harmful),
    ]
    if of_harmful.prefilled:
        prefilled = replace(of_harmful, outcomes=of_harmful.prefilled, texts=None)
        tables.append(outcome_rows(subject, replace(cell, attack=PREFILL), harmful, prefilled))
    return pd.concat(tables, ignore_index=True)


def _answered(examiner: Examiner, prompts: Prompts) -> list[Prompt]:
    """The prompts with an answer each: where data has no responses, what the model says in plain
    words is the answer.
    """
    if all(prompt.answer for prompt in prompts):
        return list(prompts)
    replies = examiner.examine(prompts).texts or ()
    answered: list[Prompt] = []
    for prompt, reply in zip(prompts, replies, strict=True):
        assert isinstance(prompt, Question)  # of the made-up world every answer is known
        answered.append(replace(prompt, answer=prompt.answer or reply))
    return answered
