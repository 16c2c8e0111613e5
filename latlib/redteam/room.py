"""Room: whether every prompt fits into the model's context with all that stands round it.

1. Prompts grow: an encoding may spell every letter, many-shot puts answered requests before them, a
   suffix stands behind them, and a reply follows.
2. `check_room` puts the profile's prompts as they are and in its encodings, and counts tokens.
   `--check` asks it, and so does a training on real prompts before its first step, for `--check`
   cannot read what is still to be downloaded. A jailbreak that lacks room is left out
   (`latlib.redteam.jailbreaks.without_room`).
3. Where data has no answer the model's own reply will be it: the prompt's words stand in for that,
   TARGET_WORDS of them, and evaluation.max_new_tokens tokens at most. Of the made-up world's
   prompts, which one grammar builds, a few are counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from latlib.config.profile import Profile
from latlib.config.sections import ProfileError
from latlib.data.prompts import (
    LETTERS_A_TOKEN,
    Prompt,
    Prompts,
    Question,
    in_the_world,
    prompt_source,
)
from latlib.evaluation.ask import PLAINLY, TARGET_WORDS, Wording, asked_rows, prompt_set
from latlib.evaluation.outcomes import HARMFUL, HARMLESS, PLAIN, TWIN
from latlib.text.chat import token_ids, tokenise

OF_WORLD = 32  # prompts of a kind that are counted: our choice


@dataclass(frozen=True)
class Asked:
    """Prompts and how they are put. setting: what asks them so. suffix: tokens that a search adds
    behind them."""

    setting: str
    prompts: Prompts
    wording: Wording = PLAINLY
    suffix: int = 0


def check_room(profile: Profile, tokenizer: Any, context: int) -> int:
    """Tokens of the longest prompt of `profile`. tokenizer: as a run has it, with its chat
    template. Raises ProfileError where a prompt and its known reply have more than `context`
    tokens."""
    longest = 0
    for asked in everything_asked(profile):
        prompt, reply = lengths(profile, tokenizer, asked)
        if prompt + reply > context:
            raise ProfileError(
                f"{asked.setting}: {too_long(prompt, reply, context)}: shorten it or leave it out,"
                f" lower data.max_tokens (prompts of more than {LETTERS_A_TOKEN} letters for each"
                " of these are not asked), or use a model with a longer context"
            )
        longest = max(longest, prompt)
    return longest


def too_long(prompt: int, reply: int, context: int) -> str:
    """That tokens of a prompt and of a reply do not fit, in words."""
    return (
        f"a prompt has {prompt} tokens and a reply {reply}, together more than the model's context"
        f" of {context}"
    )


def everything_asked(profile: Profile) -> Iterator[Asked]:
    """What a run asks its models, beside jailbreaks."""
    evaluation, source = profile.evaluation, prompt_source(profile)
    if not source.made_up:  # directions and suffixes are sought on them
        for split in ("train", "tune"):
            for kind, setting in ((HARMFUL, "harmful"), (HARMLESS, "benign")):
                prompts = source.ask("room", split, kind, sys.maxsize)
                yield Asked(f"the {split} prompts of data.{setting}", prompts)
    pair = harmful_and_twins(profile)
    for encoding in (*evaluation.encodings, *evaluation.further_encodings):
        kinds = source.kinds if encoding == PLAIN else (HARMLESS,)
        others = [prompt for kind in kinds for prompt in _counted(kind, profile)]
        setting = f"evaluation.encodings, {encoding!r}"
        yield Asked(setting, [*pair, *others], Wording.of(encoding))


def harmful_and_twins(profile: Profile) -> list[Prompt]:
    """What every attack is put round."""
    return [prompt for kind in (HARMFUL, TWIN) for prompt in _counted(kind, profile)]


def _counted(kind: str, profile: Profile) -> list[Prompt]:
    return prompt_set(kind, profile, OF_WORLD if in_the_world(profile) else None)


def lengths(profile: Profile, tokenizer: Any, asked: Asked) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest known reply. Any reply may stand behind any
    prompt (`understood_by_likelihood`)."""
    wording = asked.wording
    system = wording.system_prompt
    if system is None:
        system = profile.data.system_prompt
    most = profile.evaluation.max_new_tokens
    answered = list(_answered(asked.prompts, tokenizer, most))
    rows = asked_rows(answered, wording)
    found = tokenise(rows, tokenizer, sys.maxsize, system, shots=wording.shots)
    prompts = [len(row.prompt) for row in found]
    replies = [row.longest - len(row.prompt) for row in found]
    return max(prompts) + asked.suffix, max(replies)


def _answered(prompts: Prompts, tokenizer: Any, max_new_tokens: int) -> Iterator[Prompt]:
    """The prompts, each with an answer."""
    for prompt in prompts:
        if prompt.answer or not isinstance(prompt, Question):
            yield prompt
            continue
        words = islice(cycle(prompt.text.split()), TARGET_WORDS)
        (ids,) = token_ids(tokenizer, [" ".join(words)])
        yield replace(prompt, answer=tokenizer.decode(ids[:max_new_tokens]))
