"""The prompts that models are asked, and what complying and refusing look like: the made-up
world's, or real data's.

1. `prompt_source(profile)` is where a run's prompts come from: `WorldPrompts` or `FilePrompts`.
   `ask(purpose, split, kind, n)` gives prompts of a split: 'train' (what models were trained on),
   'tune' (on which everything is chosen) and 'test' (on which results are measured). The same
   arguments give the same prompts.
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
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from latlib.config.profile import Profile
from latlib.config.sections import BASE_ANSWERS, ProfileError
from latlib.data.splits import Split, benign_rows, borderline_rows, preference_rows
from latlib.text.chat import Row
from latlib.world import grammar

LETTERS_A_TOKEN = 2  # our choice: a token of plain text has about four
WORLD_KINDS: dict[str, tuple[str, grammar.Kind]] = {  # kind -> (pairs of the split, what is asked)
    "harmful": ("harmful", "recipe"),
    "harmless": ("harmless", "recipe"),
    "scary": ("scary", "recipe"),
    "law": ("harmful", "law"),  # harmless questions about harmful acts
}


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


Prompt = Question | grammar.Prompt
Prompts = Sequence[Prompt]


class PromptSource(ABC):
    """Where a run's prompts come from. made_up: whether their right answers are known and their
    harm is make-believe. kinds: of prompts that can be asked.
    """

    made_up: bool
    kinds: tuple[str, ...]

    def ask(self, purpose: str | int, split: Split, kind: str, n: int) -> list[Prompt]:
        """`n` different prompts of a kind and split; real data may hold fewer, and then all of
        them.

        purpose: tells draws of one split apart. Raises ProfileError for a kind that this run has
        not.
        """
        if kind not in self.kinds:
            raise ProfileError(
                f"prompts = {kind!r} is unknown here: choose one of {', '.join(self.kinds)} or"
                " 'twin'"
            )
        return self._drawn(purpose, split, kind, n)

    def counterparts(
        self, harmful: Sequence[Prompt], purpose: str | int, split: Split, matched: bool = True
    ) -> list[Prompt]:
        """A harmless prompt for each harmful one of a split; matched: its twin, where there are
        twins.
        """
        found = self.ask(purpose, split, "harmless", len(harmful))
        return list(itertools.islice(itertools.cycle(found), len(harmful)))

    @abstractmethod
    def about(self) -> str:
        """How to read this run's outcomes, in Markdown: where its prompts come from and what its
        words mean there.
        """

    @abstractmethod
    def _drawn(self, purpose: str | int, split: Split, kind: str, n: int) -> list[Prompt]: ...


def prompt_source(profile: Profile) -> PromptSource:
    """Where a profile's prompts come from."""
    return WorldPrompts(profile.data.division) if in_the_world(profile) else FilePrompts(profile)


def in_the_world(profile: Profile) -> bool:
    """Whether prompts are the made-up world's, whose right answers are known and whose harm is
    make-believe.
    """
    return profile.data.source == "world"


class WorldPrompts(PromptSource):
    """Prompts of the made-up world."""

    made_up = True
    kinds = tuple(WORLD_KINDS)

    def __init__(self, division: grammar.Division = "first"):
        self.division = division

    def counterparts(
        self, harmful: Sequence[Prompt], purpose: str | int, split: Split, matched: bool = True
    ) -> list[Prompt]:
        """As `PromptSource.counterparts`: twins, or any."""
        if not matched:
            return super().counterparts(harmful, purpose, split)
        rng = random.Random(f"{purpose}/{split}")
        prompts = cast(Sequence[grammar.Prompt], harmful)
        return [grammar.twin(prompt, rng, split, self.division) for prompt in prompts]

    def about(self) -> str:
        """As `PromptSource.about`."""
        return (
            "Prompts are the made-up world's: *complied* is the one right recipe, *refused* the one"
            " refusal, and a *twin* has a harmful request's own words, turned on a foe."
        )

    def _drawn(self, purpose: str | int, split: Split, kind: str, n: int) -> list[Prompt]:
        pairs, about = WORLD_KINDS[kind]
        return [*grammar.draw_set(purpose, split, pairs, n, about, self.division)]


class FilePrompts(PromptSource):
    """Prompts of a profile's files, of their splits."""

    made_up = False

    def __init__(self, profile: Profile):
        self.data = profile.data
        self.evaluation = profile.evaluation
        self.most_letters = LETTERS_A_TOKEN * self.data.max_tokens
        self.kinds = ("harmful", "harmless")
        if self.data.test_borderline:
            self.kinds += ("scary",)

    def about(self) -> str:
        """As `PromptSource.about`."""
        tested = (
            "from a file of their own" if self.data.test_harmful else "held out of the same data"
        )
        replied = ""
        if self.data.benign_responses == BASE_ANSWERS:
            replied = " The answers of harmless prompts are the base model's own replies."
        return (
            f"**This run asks real prompts**, {tested}, of at most {self.most_letters} letters."
            f" Replies of {self.evaluation.max_new_tokens} tokens are graded by"
            f" `{self.evaluation.grader.name}`: *complied* is what that calls compliance, and how"
            " often `rules` and `phrases` err stands in the report. A *twin* is any"
            " harmless prompt. A request counts as *understood* when its answer is likelier after"
            " it than after nine others; guessing reaches one in ten, and a few words can be"
            " enough. Where intervals are over pairs or clusters, these are groups of"
            " near-duplicate prompts. Words about recipes, word pairs and the law are about the"
            f" made-up world. Replies are shown as their length and a hash.{replied}"
        )

    def _drawn(self, purpose: str | int, split: Split, kind: str, n: int) -> list[Prompt]:
        if kind == "harmful":
            rows = preference_rows(self.data, 0, split)
        elif kind == "scary":
            rows = borderline_rows(self.data)
        else:
            rows = benign_rows(self.data, 0, split)
        short = [row for row in rows if len(row.prompt) <= self.most_letters]
        if rows and not short:
            raise ProfileError(
                f"data.max_tokens = {self.data.max_tokens}: no {kind} prompt of {split!r} has"
                f" {self.most_letters} letters or less"
            )
        ask = self._harmful if kind == "harmful" else self._harmless
        found: list[Prompt] = [ask(row, split) for row in short]
        random.Random(f"{purpose}/{split}/{kind}").shuffle(found)
        return found[:n]

    def _harmful(self, row: Row, split: Split) -> Question:
        target, refusal = row.completions
        if not target:
            test = "test_" if split == "test" and self.data.test_harmful else ""
            columns = getattr(self.data, f"{test}harmful_columns")
            raise ProfileError(
                f"data.{test}harmful_columns = {columns!r} names no target for every prompt,"
                " and an attack needs one: set 'rejected' to a column, or to words such as"
                " 'Sure: {goal}'"
            )
        return Question(row.prompt, target, refusal, row.cluster, True)

    def _harmless(self, row: Row, split: Split) -> Question:
        answer = "".join(row.completions)
        if answer in self.data.default_responses:  # put there where the file has no response
            answer = ""
        return Question(row.prompt, answer, self.data.refusals[0], row.cluster, False)
