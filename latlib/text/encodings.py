"""Encodings of a prompt's text: the ways round a safety training that only ever saw plain words.

1. `REGISTRY` has every encoding by its name. To add one, add an entry there; everything else asks
   by name.
2. `resolve` reads a name into an `Encoding`: a pure function of the text, its inverse where there
   is one, and the words that ask a model to reply in it. Names:

       leet  leet:garak  rot13  base64 ...      one encoding
       caesar-1 to caesar-25                    every letter moves that many places
       leet@0.5  leet@0.5#3  homoglyph@0.2      a share of what can be replaced; which part of it,
                                                by (text, seed 3)
       rot13+leet                               one after the other, from left to right

3. At a strength, exactly that share (rounded half up) of the replaceable places is taken, and a
   larger share contains the smaller ones. 0 leaves the text alone.
4. An inverse is true on a domain that `about` states: leetspeak cannot tell a digit of the text
   from one of its own.
5. `encode` gives the text, `reply_request` asks for the answer in the encoding as well.

Leetspeak maps differ from tool to tool, so a result is comparable only per map. `leet` is ours. The
others are facts about other tools (docs/sources.md#encodings):
* garak: ieaost -> 134057 in both cases. It flips a fair coin for every letter, unseeded;
  `leet:garak` takes exactly half of the letters instead, so that runs can be repeated.
* PyRIT: eleven letters in both cases, the first choice of each, which its deterministic mode takes.
  i and l both become 1, so there is no inverse.
* EasyJailbreak: four lower-case letters. Its rules for 'are' and 'be' never apply, since a and e
  are replaced before them.
"""

from __future__ import annotations

import base64
import difflib
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

Recode = Callable[[str], str]
Table = dict[str, str]


@dataclass(frozen=True)
class Encoding:
    """One encoding.

    encode: of a text; in REGISTRY, where `strength` is not None, of (text, share of the replaceable
    places, seed), and `strength` is the share where a name gives none. decode: the inverse on the
    domain that `about` states (ValueError for broken base64 and the like); None where encoding
    loses information. reply: how an answer in it is asked for, as in 'answer in leetspeak'.
    """

    encode: Callable[..., str]
    decode: Recode | None
    about: str
    reply: str
    strength: float | None = None
    name: str = ""


# ---- the functions -------------------------------------------------------------------------------


def _morse(text: str) -> str:
    words = []
    for word in text.split(" "):
        words.append(" ".join(MORSE.get(letter.lower(), letter) for letter in word))
    return " / ".join(words)


def _unmorse(text: str) -> str:
    words = []
    for word in text.split(" / "):
        words.append("".join(_MORSE_LETTERS.get(code, code) for code in word.split(" ")))
    return " ".join(words)


def _reverse(text: str) -> str:
    return " ".join(word[::-1] for word in text.split(" "))


def _reverse_text(text: str) -> str:
    return text[::-1]


def _reverse_words(text: str) -> str:
    return " ".join(reversed(text.split(" ")))


def _unspace(text: str) -> str:
    return text[::2]


def _pig_latin(text: str) -> str:
    return _PIG_LATIN.sub(_pig_latin_word, text)


def _pig_latin_word(match: re.Match[str]) -> str:
    onset, rest = match.groups()
    turned = rest + (onset + "ay" if onset else "way")
    return turned.capitalize() if match.group().istitle() else turned


def _disemvowel(text: str) -> str:
    return re.sub("[aeiou]", "", text, flags=re.IGNORECASE)


def _replace(text: str, table: Table, share: float = 1.0, seed: int = 0) -> str:
    places = [i for i, letter in enumerate(text) if letter in table]
    return _changed(text, places, table.__getitem__, share, seed)


def _part_letters(text: str, share: float, seed: int) -> str:
    places = [i for i in range(1, len(text)) if text[i - 1 : i + 1].isalpha()]
    return _changed(text, places, lambda letter: ZERO_WIDTH + letter, share, seed)


def _changed(text: str, places: Sequence[int], change: Recode, share: float, seed: int) -> str:
    """The text with a share of the letters at some places changed."""
    if share < 1:
        # Ranks, not coins: the share is exact, and what is chosen at a small share stays chosen at
        # a larger one. Only `random()` is drawn, whose sequence Python promises to keep for a seed.
        rng = random.Random(f"{seed}/{text}")
        ranked = sorted(places, key=lambda _: rng.random())
        places = ranked[: int(share * len(places) + 0.5)]
    letters = list(text)
    for i in places:
        letters[i] = change(letters[i])
    return "".join(letters)


def _join_letters(text: str) -> str:
    return text.replace(ZERO_WIDTH, "")


# ---- tables --------------------------------------------------------------------------------------


def _table(letters: str, symbols: str) -> Table:
    return dict(zip(letters, symbols, strict=True))


LEET_MAPS: Mapping[str, Table] = {
    "leet": _table("aeiost", "431057"),  # lower case only, like the made-up world
    "leet:garak": _table("ieaostIEAOST", "134057" * 2),
    "leet:pyrit": _table("abcegilostzABCEGILOSTZ", "48(39110572" * 2),
    "leet:easyjailbreak": _table("aeio", "@3!0"),
}
# Latin -> Cyrillic of Unicode's table of confusables (UTS #39). Escapes, because the two look the
# same in an editor too.
HOMOGLYPHS: Table = _table(
    "acdehijopqswxyABCEHIJKMOPSTXY",
    "\u0430\u0441\u0501\u0435\u04bb\u0456\u0458\u043e\u0440\u051b\u0455\u051d\u0445\u0443"
    "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u041e\u0420\u0405\u0422\u0425\u0423",
)
_SMALL = string.ascii_lowercase
_BACKWARDS = _SMALL[::-1]
ZERO_WIDTH = "\u200b"  # zero width space
# ITU-R M.1677-1 with five common additions (! & ; _ $)
_MORSE_SIGNS = string.ascii_lowercase + string.digits + ".,:?'-/()\"=+@!&;_$"
_MORSE_CODES = (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .--"
    " -..- -.-- --.. ----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----. .-.-.- --..--"
    " ---... ..--.. .----. -....- -..-. -.--. -.--.- .-..-. -...- .-.-. .--.-. -.-.-- .-... -.-.-."
    " ..--.- ...-..-"
)
MORSE = dict(zip(_MORSE_SIGNS, _MORSE_CODES.split(), strict=True))
_MORSE_LETTERS = {code: letter for letter, code in MORSE.items()}
_ASCII = "".join(map(chr, range(0x21, 0x7F)))
_FULLWIDTH = _table(" " + _ASCII, "\u3000" + "".join(chr(ord(sign) + 0xFEE0) for sign in _ASCII))
# (onset)(rest) of a word; y is a consonant only where the word begins
_PIG_LATIN = re.compile(
    r"(?=[a-z])(y?(?:qu|[b-df-hj-np-tv-xz])*)((?:[a-z]|'(?=[a-z]))*)", re.IGNORECASE | re.ASCII
)


# ---- entries -------------------------------------------------------------------------------------


def _exact(encode: Recode, decode: Recode, about: str, reply: str = "") -> Encoding:
    return Encoding(encode, decode, f"{about}; undone on any text", reply or f"with {about}")


def _of_bytes(
    to: Callable[[bytes], bytes], back: Callable[[str], bytes], about: str, reply: str
) -> Encoding:
    return _exact(
        lambda text: to(text.encode()).decode(),
        lambda text: back(text).decode(),
        f"{about} of the UTF-8 bytes",
        reply,
    )


def _mapped(table: Table, about: str, reply: str, strength: float | None = 1.0) -> Encoding:
    """Letters replaced by a table; undone, to small letters where capitals share their symbols."""
    back = {symbol: letter for letter, symbol in reversed(table.items())}
    encode = partial(_replace, table=table)
    return Encoding(encode, partial(_replace, table=back), about, reply, strength)


def _caesar(places: int, reply: str) -> Encoding:
    small = _SMALL[places:] + _SMALL[:places]
    table = _table(string.ascii_letters, small + small.upper())
    return _mapped(table, f"every letter moves {places} places; undone on any text", reply, None)


def _leet(name: str, about: str, strength: float = 1.0) -> Encoding:
    return _mapped(LEET_MAPS[name], about, "in leetspeak", strength)


_CAESARS = {
    f"caesar-{n}": _caesar(n, f"in a caesar cipher that moves every letter {n} places")
    for n in range(1, 26)
}
_DOMAIN = "undone where the text holds none of these symbols"
_base64 = partial(base64.b64decode, validate=True)
# Another order is another list in reports; `plain`, the control, comes first.
REGISTRY: Mapping[str, Encoding] = {
    "plain": _exact(str, str, "no encoding, the control", "in plain words"),
    "rot13": _caesar(13, "in rot13"),
    "atbash": _mapped(
        _table(string.ascii_letters, _BACKWARDS + _BACKWARDS.upper()),
        "a is z, b is y, and so on; undone on any text",
        "in the atbash cipher",
        None,
    ),
    "base64": _of_bytes(base64.b64encode, _base64, "RFC 4648 base64", "in base64"),
    "base32": _of_bytes(base64.b32encode, base64.b32decode, "RFC 4648 base32", "in base32"),
    "base16": _of_bytes(
        base64.b16encode, base64.b16decode, "RFC 4648 base16 (capitals)", "in base16"
    ),
    "hex": _of_bytes(
        lambda data: data.hex().encode(), bytes.fromhex, "base16 in small letters", "in hexadecimal"
    ),
    "morse": Encoding(
        _morse,
        _unmorse,
        "Morse, ' / ' between words, characters without a code kept; undone on text in lower case",
        "in morse code",
    ),
    "reverse": _exact(_reverse, _reverse, "every word spelt backwards"),
    "reverse-words": _exact(_reverse_words, _reverse_words, "the words in reverse order"),
    "reverse-text": _exact(_reverse_text, _reverse_text, "the whole text spelt backwards"),
    "spaced": _exact(" ".join, _unspace, "a space between all letters"),
    "disemvowel": Encoding(_disemvowel, None, "a e i o u left out; no inverse", "without vowels"),
    "fullwidth": _mapped(
        _FULLWIDTH,
        "ASCII as fullwidth forms; undone where the text holds none of them",
        "in fullwidth letters",
        None,
    ),
    "pig-latin": Encoding(
        _pig_latin, None, "queen is eenquay, arm is armway; no inverse", "in pig latin"
    ),
    "caesar-3": _CAESARS["caesar-3"],
    "leet": _leet("leet", f"aeiost -> 431057, small letters only; {_DOMAIN}"),
    "leet:garak": _leet(
        "leet:garak",
        f"ieaost -> 134057, capitals too; {_DOMAIN} and none of these letters as capitals",
        0.5,
    ),
    "leet:pyrit": Encoding(
        partial(_replace, table=LEET_MAPS["leet:pyrit"]),
        None,
        "abcegilostz -> 48(39110572, capitals too; no inverse, since i and l are both 1",
        "in leetspeak",
        1.0,
    ),
    "leet:easyjailbreak": _leet(
        "leet:easyjailbreak", f"aeio -> @3!0, small letters only; {_DOMAIN}"
    ),
    "homoglyph": _mapped(
        HOMOGLYPHS,
        "Cyrillic letters that look like Latin ones; undone where the text holds none of them",
        "in cyrillic letters that look like latin ones",
    ),
    "zero-width": Encoding(
        _part_letters,
        _join_letters,
        "a zero width space between neighbouring letters; undone where the text holds none",
        "with a zero-width space between all letters",
        1.0,
    ),
}
# ---- names ---------------------------------------------------------------------------------------


@cache
def resolve(name: str) -> Encoding:
    """The encoding of a name, such as 'leet', 'leet:garak', 'leet@0.5#3', 'caesar-3' or
    'rot13+leet'.

    A composition's inverse runs the inverses backwards and is None where a part has none; each
    part's domain must hold what the part before it writes. Raises ValueError for an unknown name or
    a bad number, with the fix.
    """
    parts = [_resolve_part(part, name) for part in name.split("+")]
    if len(parts) == 1:
        return parts[0]
    undo = [part.decode for part in reversed(parts) if part.decode]
    return Encoding(
        partial(_in_turn, steps=[part.encode for part in parts]),
        partial(_in_turn, steps=undo) if len(undo) == len(parts) else None,
        "; then ".join(part.about for part in parts),
        " , then ".join(part.reply for part in parts),
        name=name,
    )


def _in_turn(text: str, steps: Sequence[Recode]) -> str:
    for step in steps:
        text = step(text)
    return text


def _resolve_part(part: str, name: str) -> Encoding:
    where = f"encoding = {name!r}" + (f": part {part!r}" if part != name else "")
    kind, at, strength = part.partition("@")
    entry = REGISTRY.get(kind) or _CAESARS.get(kind)
    if entry is None:
        raise ValueError(f"{where} {_unknown(kind)}")
    if entry.strength is None:
        if at:
            able = ", ".join(known for known, e in REGISTRY.items() if e.strength is not None)
            raise ValueError(f"{where} takes no strength: write {kind} (only {able} take one)")
        return replace(entry, name=part)
    share, seed = _strength(where, kind, strength) if at else (entry.strength, 0)
    about = entry.about
    if share != 1:
        about = f"at strength {share:g}, seed {seed}: {about}"
    encode = partial(entry.encode, share=share, seed=seed)
    return replace(entry, name=part, encode=encode, about=about)


def _strength(where: str, kind: str, text: str) -> tuple[float, int]:
    """(share, seed) of '0.5' or '0.5#3'."""
    share, hashed, seed = text.partition("#")
    if not re.fullmatch(r"\d*\.?\d+", share, re.ASCII) or float(share) > 1:
        raise ValueError(
            f"{where} has strength {share!r}, which is not a number from 0 to 1: write {kind}@0.5"
        )
    if hashed and not re.fullmatch(r"\d+", seed, re.ASCII):
        raise ValueError(
            f"{where} has seed {seed!r}, which is not a whole number: write {kind}@{share}#3"
        )
    return float(share), int(seed or 0)


def _unknown(kind: str) -> str:
    """What is wrong with a name, and the fix."""
    if "#" in kind:
        return "has a seed but no strength: write leet@0.5#3"
    if re.fullmatch("caesar(-.*)?", kind):
        return "needs a whole number of places from 1 to 25: write caesar-3"
    near = difflib.get_close_matches(kind.lower(), REGISTRY, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(REGISTRY)}"
    return f"is unknown: {hint}"


ENCODINGS: Mapping[str, Encoding] = {name: resolve(name) for name in REGISTRY}


def encode(text: str, encoding: str) -> str:
    """`text` in the named encoding (see `resolve`). Raises ValueError for an unknown name, with the
    fix.
    """
    return resolve(encoding).encode(text)


def reply_request(text: str, encoding: str) -> str:
    """`text` followed by one plain sentence that asks for the answer in the named encoding.

    The sentence is written like the made-up world's text (small letters, spaces between all words),
    which real models read as well. To hide the request too, encode what this returns. Raises
    ValueError for an unknown name.
    """
    return f"{text} answer {resolve(encoding).reply} ."
