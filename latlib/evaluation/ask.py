"""What models are asked: the prompts of a set, and how they are put.

1. The prompts of a set are the same for every model, so that methods are compared prompt by prompt.
2. A `Wording` is all that stands round a prompt: its encoding, the encoding that the reply is asked
   for in, a suffix, a system prompt, turns that come before. Every attack by typing is one.
3. `token_rows` makes [prompt | right answer | refusal] of them.

What models then do is graded in `latlib.evaluation.examine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latlib.batch import TokenRow
from latlib.config.profile import Profile
from latlib.config.sections import ProfileError
from latlib.data.prompts import Prompt, Prompts, prompt_source
from latlib.evaluation.outcomes import HARMFUL, PLAIN, TWIN, split_encoding
from latlib.models import LanguageModel
from latlib.text.chat import Row, Turn, tokenise
from latlib.text.encodings import encode, reply_request
from latlib.world import grammar

TARGET_WORDS = 40  # of a real answer that an attack aims at: what comes later follows from them


@dataclass(frozen=True)
class Wording:
    """How prompts are put to a model.

    encoding: of the request. reply_encoding: the one that the reply is asked for in. suffix: text
    behind the (encoded) request. system_prompt: None for the profile's. shots: turns that come
    before it in the chat.
    """

    encoding: str = PLAIN
    reply_encoding: str = PLAIN
    suffix: str = ""
    system_prompt: str | None = None
    shots: Sequence[Turn] = ()

    @classmethod
    def of(cls, encoding: str) -> Wording:
        """The wording of a profile's 'request' or 'request>reply' encoding."""
        return cls(*split_encoding(encoding))

    def request(self, prompt: Prompt) -> str:
        """The user's message."""
        text = encode(prompt.text, self.encoding)
        if self.reply_encoding != PLAIN:
            text = reply_request(text, self.reply_encoding)
        return f"{text} {self.suffix}" if self.suffix else text

    def answer(self, prompt: Prompt) -> str:
        """The reply that an attack aims at; '' where none is known."""
        return encode(target(prompt), self.reply_encoding)


PLAINLY = Wording()


def prompt_set(name: str, profile: Profile, n: int | None = None) -> list[Prompt]:
    """The evaluation prompts of a set: one of the source's kinds, or 'twin', one harmless for each
    harmful one.

    The same prompts for every seed and method. Raises ProfileError for an unknown name, and for n
    = 0.
    """
    if n is not None and n < 1:
        raise ProfileError(f"{n} prompts ask nothing: give 1 or more")
    split, count = profile.evaluation.split, profile.evaluation.prompts
    if name == TWIN:
        harmful = prompt_set(HARMFUL, profile, n)
        return prompt_source(profile).counterparts(harmful, "twins", split)
    return prompt_source(profile).ask(0, split, name, count)[: n or count]


def target(prompt: Prompt) -> str:
    """What an attack makes a model write: the right answer, or the first TARGET_WORDS of a real
    one.
    """
    if isinstance(prompt, grammar.Prompt):
        return prompt.answer
    return " ".join(prompt.answer.split()[:TARGET_WORDS])


def token_rows(
    lm: LanguageModel,
    prompts: Prompts,
    wording: Wording = PLAINLY,
    prefill: str = "",
) -> list[TokenRow]:
    """[prompt | right answer | refusal] for each prompt; with `prefill`, [prompt + prefill | rest
    of the answer].

    A prompt of which no answer is known has its refusal only.
    """
    rows = asked_rows(prompts, wording, prefill)
    system, shots = wording.system_prompt, wording.shots
    return tokenise(rows, lm.tokenizer, lm.context, system, prefill, shots)


def asked_rows(prompts: Prompts, wording: Wording, prefill: str = "") -> list[Row]:
    """The texts of `token_rows`."""
    rows = []
    for i, prompt in enumerate(prompts):
        answer = wording.answer(prompt)
        completions = (answer, prompt.refusal) if answer else (prompt.refusal,)
        if prefill:
            completions = (answer,)
        rows.append(Row(str(i), wording.request(prompt), completions))
    return rows


def answers_only(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """`token_rows` without their refusals. Where a prompt has no answer its refusal stands in."""
    return [TokenRow(row.prompt, row.completions[:1]) for row in rows]
