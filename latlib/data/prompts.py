"""The prompts that models are asked, and what complying and refusing look like: the made-up
world's, or real data's.

1. `ask(profile, purpose, split, kind, n)` gives prompts of a split: 'train' (what models were
   trained on), 'tune' (on which everything is chosen) and 'test' (on which results are measured).
   The same arguments give the same prompts.
2. Kinds are 'harmful', 'harmless', 'scary' (merely sounds harmful) and, in the world, 'law'. Real
   data holds the second and third where a profile names files of them.
3. Every harmful prompt has a harmless counterpart: in the world its twin (the same words, the verb
   turned on a foe), or any harmless prompt; with real data always any.
4. The world knows the one right answer of every prompt. Of a real prompt the answer is its row's:
   what an attack is aimed at and what understanding is measured by, never what a reply must be word
   for word. Harmful prompts need one.
5. Real prompts of more than LETTERS_A_TOKEN * data.max_tokens letters are not asked: in an encoding
   that spells every letter they would outgrow the model.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from latlib.config.profile import Profile, ProfileError
from latlib.config.sections import DataSettings
from latlib.data.splits import benign_rows, borderline_rows, preference_rows
from latlib.text.chat import Row
from latlib.world import grammar

LETTERS_A_TOKEN = 2  # a token of plain text has about four
WORLD_KINDS = {  # kind -> (pairs of the split, what is asked about them)
    "harmful": ("harmful", "recipe"),
    "harmless": ("harmless", "recipe"),
    "scary": ("scary", "recipe"),
    "law": ("harmful", "law"),  # harmless questions about harmful acts
}


class Prompt(Protocol):
    """What every prompt says of itself; `world.Prompt` and `Question` do."""

    text: str
    answer: str
    refusal: str
    cluster: str
    harmful: bool


@dataclass(frozen=True)
class Question:
    """A prompt of real data. answer: its row's completion, '' where the data has none. cluster: its
    near-duplicates.
    """

    text: str
    answer: str
    refusal: str
    cluster: str
    harmful: bool


def in_the_world(profile: Profile) -> bool:
    """Whether prompts are the made-up world's, whose right answers are known and whose harm is
    make-believe.
    """
    return profile.data.source == "world"


def kinds(profile: Profile) -> tuple[str, ...]:
    """The kinds of prompt that this run can ask."""
    if in_the_world(profile):
        return tuple(WORLD_KINDS)
    return ("harmful", "harmless", *(["scary"] if profile.data.test_borderline else []))


def ask(profile: Profile, purpose: str | int, split: str, kind: str, n: int) -> list[Prompt]:
    """`n` different prompts of a kind and split; real data may hold fewer, and then all of them.

    purpose: tells draws of one split apart. Raises ProfileError for a kind that this run has not.
    """
    if kind not in kinds(profile):
        raise ProfileError(
            f"prompts = {kind!r} is unknown here: choose one of {', '.join(kinds(profile))} or"
            " 'twin'"
        )
    if in_the_world(profile):
        pairs, about = WORLD_KINDS[kind]
        return grammar.draw_set(purpose, split, pairs, n, about)
    found = _questions(profile, split, kind)
    random.Random(f"{purpose}/{split}/{kind}").shuffle(found)
    return found[:n]


def _questions(profile: Profile, split: str, kind: str) -> list[Prompt]:
    data = profile.data
    if kind == "harmful":
        rows = _short(preference_rows(data, 0, split), data, kind, split)
        if any(not row.completions[0] for row in rows):
            test = "test_" if split == "test" and data.test_harmful else ""
            raise ProfileError(
                f"data.{test}harmful_columns = {getattr(data, f'{test}harmful_columns')!r} names no"
                " target for every prompt, and an attack needs one: set 'rejected' to a column, or"
                " to words such as 'Sure: {goal}'"
            )
        return [
            Question(r.prompt, r.completions[0], r.completions[1], r.cluster, True) for r in rows
        ]
    rows = _short(
        borderline_rows(data) if kind == "scary" else benign_rows(data, 0, split), data, kind, split
    )
    made_up = {"", *data.benign_responses}  # put there where the file has no response
    answers = ["" if set(r.completions) <= made_up else r.completions[0] for r in rows]
    pairs = zip(rows, answers, strict=True)
    return [Question(r.prompt, answer, data.refusals[0], r.cluster, False) for r, answer in pairs]


def _short(rows: list[Row], data: DataSettings, kind: str, split: str) -> list[Row]:
    most = LETTERS_A_TOKEN * data.max_tokens
    found = [row for row in rows if len(row.prompt) <= most]
    if rows and not found:
        raise ProfileError(
            f"data.max_tokens = {data.max_tokens}: no {kind} prompt of {split!r} has {most} letters"
            " or less"
        )
    return found


def counterparts(
    profile: Profile,
    harmful: Sequence[Prompt],
    purpose: str | int,
    split: str,
    matched: bool = True,
) -> list[Prompt]:
    """A harmless prompt for each harmful one of a split; matched: its twin, where there are
    twins.
    """
    if in_the_world(profile) and matched:
        rng = random.Random(f"{purpose}/{split}")
        return [grammar.twin(prompt, rng, split) for prompt in harmful]
    found = ask(profile, purpose, split, "harmless", len(harmful))
    return list(itertools.islice(itertools.cycle(found), len(harmful)))


def about(profile: Profile) -> str:
    """How to read this run's outcomes, in Markdown: where its prompts come from and what its words
    mean there.
    """
    if in_the_world(profile):
        return (
            "Prompts are the made-up world's: *complied* is the one right recipe, *refused* the one"
            " refusal, and a *twin* has a harmful request's own words, turned on a foe."
        )
    data, evaluation = profile.data, profile.evaluation
    tested = (
        "held out of the same data" if data.test_harmful is None else "from a file of their own"
    )
    return (
        f"**This run asks real prompts**, {tested}, of at most {LETTERS_A_TOKEN * data.max_tokens}"
        f" letters. Replies of {evaluation.max_new_tokens} tokens are graded by"
        f" `{evaluation.grader.name}`: *complied* is what that calls compliance, and phrases call"
        " everything compliance that is no refusal, junk too. A *twin* is any harmless prompt. A"
        " request counts as *understood* when its answer is likelier after it than after nine"
        " others; guessing reaches one in ten, and a few words can be enough. Where intervals are"
        " over pairs or clusters, these are groups of near-duplicate prompts. Words about recipes,"
        " word pairs and the law are about the made-up world. Replies are shown as their length"
        " and a hash."
    )
