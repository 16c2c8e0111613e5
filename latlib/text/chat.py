"""Rows of text -> token ids: the only place where prompts go through a chat template.

1. A `Row` is a prompt with one or two completions: (rejected, chosen) for preference rows,
   (response,) for benign rows.
2. `chat_text` puts a prompt through the tokenizer's own chat template, once; `tokenise` adds no
   second BOS.
3. What the template writes between the prompt and a reply, and behind a reply, is found by giving
   it a word that stands for the reply.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latlib.batch import TokenRow

Turn = tuple[str, str]  # what the user said and what the assistant replied
_REPLY = "Xyzzy"  # stands for the reply while the chat template is looked at; no template holds it


@dataclass(frozen=True)
class Row:
    """A prompt and its completions as text; `row_id` names it in results, `cluster` groups
    dependent rows.
    """

    row_id: str
    prompt: str
    completions: tuple[str, ...]
    cluster: str = ""


def chat_text(
    tokenizer: Any, prompt: str, system_prompt: str | None = None, shots: Sequence[Turn] = ()
) -> str:
    """The templated prompt as text, ready for the assistant's reply; `shots` are earlier turns of
    the chat.

    Raises ValueError when the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: use the model's chat or"
            " instruct version, or set tokenizer.chat_template"
        )
    messages = []
    if system_prompt:
        messages.append({"role": "system", "content": system_prompt})
    for asked, replied in shots:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": replied})
    messages.append({"role": "user", "content": prompt})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _around_reply(tokenizer: Any) -> tuple[str, str]:
    """(text between prompt and reply, text that ends the reply) as the template writes them."""
    user = {"role": "user", "content": "A"}
    reply = {"role": "assistant", "content": _REPLY}
    head = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    chat = tokenizer.apply_chat_template([user, reply], tokenize=False)
    end_of_text = tokenizer.eos_token or ""
    stem = head.rstrip()  # some templates trim the space or newlines before a reply
    if not chat.startswith(stem) or _REPLY not in chat[len(stem) :]:
        return "", end_of_text
    before, after = chat[len(stem) :].split(_REPLY, 1)
    trimmed = len(head) - len(stem)
    return before[trimmed:], after.rstrip("\n") or end_of_text


def tokenise(
    rows: Sequence[Row],
    tokenizer: Any,
    max_tokens: int,
    system_prompt: str | None = None,
    prefill: str = "",
    shots: Sequence[Turn] = (),
    too_long: str = "error",
) -> list[TokenRow]:
    """Token ids of rows. `prefill` moves the first words of every completion into the prompt (a
    prefilling attack). `shots` are turns that come before every prompt. too_long: what to do with a
    row whose prompt and either completion have more than `max_tokens` tokens, 'error', or 'drop' or
    'truncate' (see `fitted`) with one warning that counts.

    Raises ValueError naming the row that is too long or that has an empty completion, or if no row
    is left.
    """
    before, after = _around_reply(tokenizer)
    prefilled = before + prefill if prefill else ""
    ahead = "" if prefill else before
    prompts = []
    completions = []
    for row in rows:
        prompts.append(chat_text(tokenizer, row.prompt, system_prompt, shots) + prefilled)
        for text in row.completions:
            completions.append(ahead + _without_prefill(row, text, prefill) + after)
    prompt_ids = token_ids(tokenizer, prompts)
    completion_ids = iter(token_ids(tokenizer, completions))
    found = []
    for row, prompt in zip(rows, prompt_ids, strict=True):
        own = tuple(next(completion_ids) for _ in row.completions)
        found.append(TokenRow(prompt, own))
    if too_long != "error":
        return _all_fitted(found, max_tokens, too_long)
    for row, tokens in zip(rows, found, strict=True):
        if tokens.longest > max_tokens:
            raise ValueError(
                f"row {row.row_id!r} has {tokens.longest} tokens, more than max_tokens ="
                f" {max_tokens}: shorten it, raise data.max_tokens (not beyond the model's"
                " context), or set data.too_long"
            )
    return found


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Ids of texts that went through a chat template: nothing is put before or behind them."""
    if not texts:
        return []
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def shared_start(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return len(list(pairs))


def shared_end(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts end in alike."""
    return shared_start(a[::-1], b[::-1])


def _without_prefill(row: Row, completion: str, prefill: str) -> str:
    if not completion.startswith(prefill):
        raise ValueError(
            f"row {row.row_id!r}: completion does not begin with the prefill {prefill!r}"
        )
    rest = completion[len(prefill) :]
    if not rest.strip():
        raise ValueError(f"row {row.row_id!r} has an empty completion: remove the row or fill it")
    return rest


def _all_fitted(rows: Sequence[TokenRow], max_tokens: int, too_long: str) -> list[TokenRow]:
    """The rows that fit, with one warning that counts the others."""
    kept = [short for row in rows if (short := fitted(row, max_tokens, too_long))]
    dropped = len(rows) - len(kept)
    cut = sum(row.longest > max_tokens for row in rows) - dropped
    if rows and not kept:
        raise ValueError(
            f"all {dropped} rows have more than max_tokens = {max_tokens} tokens: raise"
            " data.max_tokens"
        )
    if dropped or cut:
        warnings.warn(
            f"data.too_long = {too_long!r}: of {len(rows)} rows, {dropped} are left out and {cut}"
            f" are cut, because they have more than {max_tokens} tokens",
            stacklevel=3,
        )
    return kept


def fitted(row: TokenRow, max_tokens: int, too_long: str) -> TokenRow | None:
    """The row if it has at most `max_tokens` tokens with either completion; else None for 'drop',
    and for 'truncate' the row with its completions cut, without an end-of-turn token where one is
    cut, or None if its prompt leaves no room for one.
    """
    if row.longest <= max_tokens:
        return row
    room = max_tokens - len(row.prompt)
    if too_long == "drop" or room < 1:
        return None
    return TokenRow(row.prompt, tuple(completion[:room] for completion in row.completions))
