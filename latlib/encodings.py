"""Encodings of a prompt's text: the ways round a safety training that only ever saw plain words.

Leetspeak maps differ from tool to tool, so a result is comparable only per map; ours is `aeiost -> 431057`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

LEET = str.maketrans("aeiost", "431057")


def leet(text: str) -> str:
    """Leetspeak: six letters become digits (a4 e3 i1 o0 s5 t7); lower case only."""
    return text.translate(LEET)


def rot13(text: str) -> str:
    """ROT13: every letter moves 13 places; its own inverse."""
    return codecs.encode(text, "rot13")


def reverse(text: str) -> str:
    """Every word spelt backwards, the words in their order; its own inverse."""
    return " ".join(word[::-1] for word in text.split(" "))


def plain(text: str) -> str:
    """No encoding: the control."""
    return text


ENCODINGS: dict[str, Callable[[str], str]] = {"plain": plain, "leet": leet, "rot13": rot13, "reverse": reverse}


def encode(text: str, encoding: str) -> str:
    """`text` in the named encoding. Raises ValueError for an unknown name."""
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding = {encoding!r} is unknown: choose one of {', '.join(ENCODINGS)}")
    return ENCODINGS[encoding](text)
