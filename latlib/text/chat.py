"""Rows of text -> token ids: the only place where prompts go through a chat template.

1. A `Row` is a prompt with one or two completions: (rejected, chosen) for preference rows,
   (response,) for benign rows.
2. `chat_text` puts a prompt through the tokenizer's own chat template, once; `tokenise` adds no
   second BOS.
3. What the template writes between the prompt and a reply, and behind a reply, is found by giving
   it a word that stands for the reply. What stands before every reply belongs to the prompt (an
   empty thought, the name of a channel), unless a tokenizer joins it with the reply's first word.
4. Prompt and reply are tokenised as one text, as the model meets them: the reply's tokens are what
   follows the prompt's. A reply that would change the prompt's tokens is an error.
"""

from __future__ import annotations

import datetime
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from latlib.batch import TokenRow

Turn = tuple[str, str]  # what the user said and what the assistant replied
Ids = tuple[int, ...]
THOUGHT, THOUGHT_END = "<think>", "</think>"  # as Qwen3, DeepSeek-R1 and SmolLM3 write them
UNBOUNDED = 1 << 60  # tokens in a row: no limit
# stand for the request and the reply while the chat template is looked at; no template holds them
_ASKED, _REPLY = "Plugh", "Xyzzy"
_WORDS = (_REPLY, "Sure", "I", "No", "The", "a", "1")  # how replies begin


@dataclass(frozen=True)
class Row:
    """A prompt and its completions as text; `row_id` names it in results, `cluster` groups
    dependent rows. ended: whether a token ends each completion.
    """

    row_id: str
    prompt: str
    completions: tuple[str, ...]
    cluster: str = ""
    ended: bool = True


def chat_text(
    tokenizer: Any, prompt: str, system_prompt: str | None = None, shots: Sequence[Turn] = ()
) -> str:
    """The templated prompt as text, with all that stands before every reply; `shots` are earlier
    turns of the chat.

    Raises ValueError when the tokenizer has no chat template, or one that refuses a message.
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
    return _rendered(tokenizer, messages, open_turn=True) + _around_reply(tokenizer).before


def templated(tokenizer: Any, arguments: Mapping[str, Any], day: datetime.date | None) -> Any:
    """The tokenizer, its chat template given `arguments` beside the messages, and `day` written
    where it writes today: what a template writes must not change from one day of a run to the
    next."""
    own = tokenizer.chat_template
    if day is not None and isinstance(own, str):
        tokenizer.chat_template = _dated(own, day)
    elif day is not None and own:  # several, by name
        tokenizer.chat_template = {name: _dated(text, day) for name, text in own.items()}
    if arguments:
        own = tokenizer.apply_chat_template
        tokenizer.apply_chat_template = partial(own, **arguments)
    return tokenizer


_TODAY = "strftime_now"  # by which templates ask for the date, as Llama 3.2 and SmolLM3 do


def _dated(template: str, day: datetime.date) -> str:
    """The template with a function of that name in front, which writes `day`."""
    if _TODAY not in template:
        return template
    noon = datetime.datetime.combine(day, datetime.time(12))
    written = "format"
    for code in sorted(set(re.findall("%-?[A-Za-z]", template))):
        written += f" | replace({code!r}, {noon.strftime(code)!r})"
    # the newline behind a block is not written
    return f"{{% macro {_TODAY}(format) %}}{{{{ {written} }}}}{{% endmacro %}}\n{template}"


def accepts(tokenizer: Any, system_prompt: str | None = None, shots: Sequence[Turn] = ()) -> bool:
    """Whether the tokenizer's template can write such messages around a request."""
    try:
        chat_text(tokenizer, "A", system_prompt, shots)
    except ValueError:
        return False
    return True


def _rendered(tokenizer: Any, messages: list[dict[str, str]], open_turn: bool = False) -> str:
    """Messages as text; open_turn: up to where the assistant's reply begins. Raises ValueError
    saying which message a template refuses."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_turn
        )
    except Exception as error:  # templates are code, and raise what they like
        roles = [message["role"] for message in messages]
        what, fix = "a plain request", "use another model or tokenizer"
        if "system" in roles:
            what, fix = (
                "a system message",
                "leave out data.system_prompt and the jailbreak 'system'",
            )
        elif len(roles) > 2:
            what, fix = "earlier turns", "leave out the jailbreak 'many-shot'"
        name = getattr(tokenizer, "name_or_path", "")
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"the chat template of {name!r} cannot write {what} ({said}): {fix}"
        ) from error


@dataclass(frozen=True)
class _Around:
    """What a template writes around a reply. before: between the prompt and every reply; joined:
    the same, where the tokenizer joins it with the reply's first word; after: what ends a reply."""

    before: str
    joined: str
    after: str


def _around_reply(tokenizer: Any) -> _Around:
    return _looked_at(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=16)
def _looked_at(tokenizer: Any, template: str) -> _Around:
    user = {"role": "user", "content": _ASKED}
    reply = {"role": "assistant", "content": _REPLY}
    head = _rendered(tokenizer, [user], open_turn=True)
    chat = _rendered(tokenizer, [user, reply])
    if _ASKED not in head or _REPLY not in chat:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} leaves out what is asked or replied:"
            " use another model or tokenizer"
        )
    between = _between(head, chat)
    after = chat.rpartition(_REPLY)[2].rstrip("\n") or tokenizer.eos_token or ""
    alone, *together = token_ids(tokenizer, [head + between + word for word in ("", *_WORDS)])
    if all(ids[: len(alone)] == alone for ids in together):
        return _Around(between, "", after)
    return _Around("", between, after)


def _between(head: str, chat: str) -> str:
    """What stands between the prompt and a reply: in the chat, or, where the prompt opens a thought
    which the chat leaves out, the end of that thought."""
    stem = head.rstrip()  # some templates trim the space or newlines before a reply
    if chat.startswith(stem) and _REPLY in chat[len(stem) :]:
        trimmed = len(head) - len(stem)
        return chat[len(stem) :].split(_REPLY, 1)[0][trimmed:]
    opened = head.rpartition(THOUGHT)[2] if THOUGHT in head else THOUGHT_END
    return "" if THOUGHT_END in opened else f"\n{THOUGHT_END}\n\n"


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

    Raises ValueError naming the row that is too long, that has an empty completion or one that
    changes the prompt's tokens, or if no row is left.
    """
    around = _around_reply(tokenizer)
    # it stands before a reply's first word, wherever that is
    joined, first = ("", around.joined + prefill) if prefill else (around.joined, "")
    prompts, replies, chats = [], [], []
    for row in rows:
        asked = chat_text(tokenizer, row.prompt, system_prompt, shots) + first
        after = around.after if row.ended else ""
        own = [joined + _without_prefill(row, c, prefill) + after for c in row.completions]
        prompts.append(asked)
        replies += own
        chats += [asked + reply for reply in own]
    prompt_ids = token_ids(tokenizer, prompts)
    chat_ids = iter(token_ids(tokenizer, chats))
    reply_ids = iter(token_ids(tokenizer, replies) if prefill else [()] * len(replies))
    found = []
    for row, prompt in zip(rows, prompt_ids, strict=True):
        completions = []
        for _ in row.completions:
            whole, alone = next(chat_ids), next(reply_ids)
            completions.append(_behind(row, prompt, whole, alone))
        found.append(TokenRow(prompt, tuple(completions)))
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


def _behind(row: Row, prompt: Ids, whole: Ids, alone: Ids) -> Ids:
    """The tokens of a completion behind the prompt's. alone: for a prefill that ends inside a
    token, the rest as the model goes on from there."""
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    if alone:
        return alone
    raise ValueError(
        f"row {row.row_id!r}: the completion's beginning changes the tokens of the prompt: remove"
        " white space where it begins"
    )


def behind_thoughts(reply: str) -> str | None:
    """What a reply says once its thought has ended; None where the thought has not."""
    said = reply.rpartition(THOUGHT_END)[2]
    return None if THOUGHT in said else said.strip()


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Ids of texts that went through a chat template: nothing is put before or behind them."""
    if not texts:
        return []
    # rows that are too long are our own error: no warning beside it
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [tuple(ids) for ids in found]


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
