"""Encodings of a prompt's text: the ways round a safety training that only ever saw plain words.

1. `resolve` reads a name into an `Encoding`: a pure function of the text, its inverse where there
   is one, and the words that ask a model to reply in it. The names:

       leet  leet:garak  rot13  caesar-3  base64 ...   one encoding (`ENCODINGS` lists them;
       caesar-1 to caesar-25) leet@0.5  leet@0.5#3  homoglyph@0.2             a share of what can be
       replaced; which part, by (text, seed 3) rot13+leet                                      one
       after the other, from left to right

2. At a strength, exactly that share (rounded half up) of the replaceable places is taken, and a
   larger share contains the smaller ones. 0 leaves the text alone.
3. An inverse is true on a domain that `about` states: leetspeak cannot tell a digit of the text
   from one of its own.
4. `encode` gives the text, `reply_request` asks for the answer in the encoding as well.

Leetspeak maps differ from tool to tool, so a result is comparable only per map. `leet` is ours. The
others are facts about other tools, read in their source (a stored copy; later releases may differ):
* garak, `resources/encodings.py`: ieaost -> 134057 in both cases. It flips a fair coin for every
  letter, unseeded; `leet:garak` takes exactly half of the letters instead (its default strength is
  0.5), so that runs can be repeated.
* PyRIT, `prompt_converter/leetspeak_converter.py`: eleven letters in both cases, the first choice
  of each, which its deterministic mode takes. i and l both become 1, so there is no inverse.
* EasyJailbreak, `mutation/rule/Leetspeak.py`: four lower-case letters. Its rules for 'are' and 'be'
  never apply, since a and e are replaced before them.
The homoglyphs are pairs of Unicode's table of confusables (UTS #39); Morse is ITU-R M.1677-1 with
five common additions (! & ; _ $).
"""

from __future__ import annotations

import base64
import binascii
import difflib
import random
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial, reduce

Recode = Callable[[str], str]


@dataclass(frozen=True)
class Encoding:
    """One encoding.

    decode: the inverse on the domain that `about` states (ValueError for broken base64 and the
    like); None where encoding loses information. reply: how an answer in it is asked for, as in
    'answer in leetspeak'.
    """

    name: str
    encode: Recode
    decode: Recode | None
    about: str
    reply: str


def _both_cases(letters: str, symbols: str) -> dict[str, str]:
    return dict(zip(letters + letters.upper(), symbols * 2, strict=True))


LEET_MAPS: Mapping[str, Mapping[str, str]] = {
    "leet": dict(zip("aeiost", "431057", strict=True)),  # lower case only, like the made-up world
    "leet:garak": _both_cases("ieaost", "134057"),
    "leet:pyrit": _both_cases("abcegilostz", "48(39110572"),
    "leet:easyjailbreak": dict(zip("aeio", "@3!0", strict=True)),
}
# Latin -> Cyrillic: escapes, because the two look the same in an editor too.
HOMOGLYPHS: Mapping[str, str] = {
    **dict(zip("acdehi", "\u0430\u0441\u0501\u0435\u04bb\u0456", strict=True)),
    **dict(zip("jopqswxy", "\u0458\u043e\u0440\u051b\u0455\u051d\u0445\u0443", strict=True)),
    **dict(zip("ABCEHIJK", "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a", strict=True)),
    **dict(zip("MOPSTXY", "\u041c\u041e\u0420\u0405\u0422\u0425\u0423", strict=True)),
}
ZERO_WIDTH = "\u200b"  # zero width space
_MORSE_CODES = (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .--"
    " -..- -.-- --.. ----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----. .-.-.- --..--"
    " ---... ..--.. .----. -....- -..-. -.--. -.--.- .-..-. -...- .-.-. .--.-. -.-.-- .-... -.-.-."
    " ..--.- ...-..-"
).split()
MORSE = dict(
    zip(string.ascii_lowercase + string.digits + ".,:?'-/()\"=+@!&;_$", _MORSE_CODES, strict=True)
)
_MORSE_LETTERS = {code: letter for letter, code in MORSE.items()}
_FULLWIDTH = {" ": "\u3000", **{chr(c): chr(c + 0xFEE0) for c in range(0x21, 0x7F)}}
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
# y is a consonant only where the word begins
_ONSET = re.compile(r"y?(?:qu|[b-df-hj-np-tv-xz])*", re.IGNORECASE)


def _chosen(places: list[int], text: str, share: float, seed: int) -> set[int]:
    # Ranks, not coins: the share is exact, and what is chosen at a small share stays chosen at a
    # larger one. Only
    # `random()` is drawn, whose sequence Python promises to keep for a seed.
    rng = random.Random(f"{seed}/{text}")
    return set(sorted(places, key=lambda _: rng.random())[: int(share * len(places) + 0.5)])


def _swap(text: str, table: Mapping[str, str], share: float, seed: int) -> str:
    if share == 1:
        return text.translate(str.maketrans(dict(table)))
    chosen = _chosen([i for i, c in enumerate(text) if c in table], text, share, seed)
    return "".join(table[c] if i in chosen else c for i, c in enumerate(text))


def _part_letters(text: str, share: float, seed: int) -> str:
    gaps = [i for i in range(len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    chosen = _chosen(gaps, text, share, seed)
    return "".join(c + ZERO_WIDTH if i in chosen else c for i, c in enumerate(text))


def _unswap(table: Mapping[str, str]) -> Recode | None:
    """The inverse of a table, to small letters where capitals share their symbols; None if two
    letters share one.
    """
    back: dict[str, str] = {}
    for letter, symbol in table.items():
        if back.setdefault(symbol, letter) not in (letter, letter.lower()):
            return None
    return lambda text: text.translate(str.maketrans(back))


def _shift(places: int) -> Recode:
    small = string.ascii_lowercase[places:] + string.ascii_lowercase[:places]
    table = str.maketrans(string.ascii_letters, small + small.upper())
    return lambda text: text.translate(table)


def _atbash(text: str) -> str:
    mirrored = string.ascii_lowercase[::-1] + string.ascii_uppercase[::-1]
    return text.translate(str.maketrans(string.ascii_letters, mirrored))


def _morse(text: str) -> str:
    return " / ".join(" ".join(MORSE.get(c.lower(), c) for c in word) for word in text.split(" "))


def _unmorse(text: str) -> str:
    return " ".join(
        "".join(_MORSE_LETTERS.get(c, c) for c in word.split(" ")) for word in text.split(" / ")
    )


def _reverse(text: str) -> str:
    return " ".join(word[::-1] for word in text.split(" "))


def _reverse_text(text: str) -> str:
    return text[::-1]


def _reverse_words(text: str) -> str:
    return " ".join(reversed(text.split(" ")))


def _pig_latin(text: str) -> str:
    def word(match: re.Match[str]) -> str:
        whole = match.group()
        onset = _ONSET.match(whole).group()
        turned = whole[len(onset) :] + (onset + "ay" if onset else "way")
        return turned.capitalize() if whole.istitle() else turned

    return _WORD.sub(word, text)


def _disemvowel(text: str) -> str:
    return re.sub("[aeiou]", "", text, flags=re.IGNORECASE)


def _exact(name: str, encode: Recode, decode: Recode, about: str, reply: str = "") -> Encoding:
    return Encoding(name, encode, decode, f"{about}; undone on any text", reply or f"with {about}")


def _bytes(
    name: str, to: Callable[[bytes], bytes], back: Callable[[str], bytes], about: str, reply: str
) -> Encoding:
    about = f"{about} of the UTF-8 bytes"
    return _exact(
        name,
        lambda text: to(text.encode()).decode(),
        lambda text: back(text).decode(),
        about,
        reply,
    )


def _caesar(name: str, places: int) -> Encoding:
    ask = f"in a caesar cipher that moves every letter {places} places"
    return _exact(name, _shift(places), _shift(-places), f"every letter moves {places} places", ask)


_MORSE_ABOUT = (
    "Morse, ' / ' between words, characters without a code kept; undone on text in lower case"
)
_WIDE_ABOUT = "ASCII as fullwidth forms; undone where the text holds none of them"
_widen = partial(_swap, table=_FULLWIDTH, share=1, seed=0)
_FIXED = {
    encoding.name: encoding
    for encoding in (
        _exact("plain", str, str, "no encoding, the control", "in plain words"),
        _exact("rot13", _shift(13), _shift(-13), "every letter moves 13 places", "in rot13"),
        _exact("atbash", _atbash, _atbash, "a is z, b is y, and so on", "in the atbash cipher"),
        _bytes(
            "base64",
            base64.b64encode,
            partial(base64.b64decode, validate=True),
            "RFC 4648 base64",
            "in base64",
        ),
        _bytes("base32", base64.b32encode, base64.b32decode, "RFC 4648 base32", "in base32"),
        _bytes(
            "base16", base64.b16encode, base64.b16decode, "RFC 4648 base16 (capitals)", "in base16"
        ),
        _bytes("hex", binascii.hexlify, bytes.fromhex, "base16 in small letters", "in hexadecimal"),
        Encoding("morse", _morse, _unmorse, _MORSE_ABOUT, "in morse code"),
        _exact("reverse", _reverse, _reverse, "every word spelt backwards"),
        _exact("reverse-words", _reverse_words, _reverse_words, "the words in reverse order"),
        _exact("reverse-text", _reverse_text, _reverse_text, "the whole text spelt backwards"),
        _exact("spaced", " ".join, lambda text: text[::2], "a space between all letters"),
        Encoding(
            "disemvowel", _disemvowel, None, "a e i o u left out; no inverse", "without vowels"
        ),
        Encoding("fullwidth", _widen, _unswap(_FULLWIDTH), _WIDE_ABOUT, "in fullwidth letters"),
        Encoding(
            "pig-latin",
            _pig_latin,
            None,
            "queen is eenquay, arm is armway; no inverse",
            "in pig latin",
        ),
    )
}
_DOMAIN = "undone where the text holds none of these symbols"
_SCATTERED = {  # name -> (strength where none is given, about): the encodings that take a strength
    "leet": (1.0, f"aeiost -> 431057, small letters only; {_DOMAIN}"),
    "leet:garak": (
        0.5,
        f"ieaost -> 134057, capitals too; {_DOMAIN} and none of these letters as capitals",
    ),
    "leet:pyrit": (
        1.0,
        "abcegilostz -> 48(39110572, capitals too; no inverse, since i and l are both 1",
    ),
    "leet:easyjailbreak": (1.0, f"aeio -> @3!0, small letters only; {_DOMAIN}"),
    "homoglyph": (
        1.0,
        "Cyrillic letters that look like Latin ones; undone where the text holds none of them",
    ),
    "zero-width": (
        1.0,
        "a zero width space between neighbouring letters; undone where the text holds none",
    ),
}
_NAMES = (*_FIXED, "caesar-3", *_SCATTERED)


def _scattered(name: str, kind: str, share: float, seed: int) -> Encoding:
    about = (
        _SCATTERED[kind][1]
        if share == 1
        else f"at strength {share:g}, seed {seed}: {_SCATTERED[kind][1]}"
    )
    if kind == "zero-width":
        encode, decode = (
            partial(_part_letters, share=share, seed=seed),
            lambda text: text.replace(ZERO_WIDTH, ""),
        )
        return Encoding(name, encode, decode, about, "with a zero-width space between all letters")
    table = LEET_MAPS.get(kind, HOMOGLYPHS)
    reply = "in leetspeak" if kind in LEET_MAPS else "in cyrillic letters that look like latin ones"
    return Encoding(
        name, partial(_swap, table=table, share=share, seed=seed), _unswap(table), about, reply
    )


def _resolve_part(part: str, whole: str) -> Encoding:
    where = f"encoding = {whole!r}" + (f": part {part!r}" if part != whole else "")
    kind, at, rest = part.partition("@")
    caesar = re.fullmatch("caesar(?:-(.*))?", kind)
    if "#" in kind:
        raise ValueError(f"{where} has a seed but no strength: write leet@0.5#3")
    if caesar and not re.fullmatch("[1-9]|1[0-9]|2[0-5]", caesar[1] or ""):
        raise ValueError(f"{where} needs a whole number of places from 1 to 25: write caesar-3")
    if kind in _SCATTERED:
        strength, hashed, seed = rest.partition("#")
        if at and not (re.fullmatch(r"\d*\.?\d+", strength, re.ASCII) and float(strength) <= 1):
            raise ValueError(
                f"{where} has strength {strength!r}, which is not a number from 0 to 1: write"
                f" {kind}@0.5"
            )
        if hashed and not re.fullmatch(r"\d+", seed, re.ASCII):
            raise ValueError(
                f"{where} has seed {seed!r}, which is not a whole number: write {kind}@{strength}#3"
            )
        return _scattered(
            part, kind, float(strength) if at else _SCATTERED[kind][0], int(seed or 0)
        )
    if at and (caesar or kind in _FIXED):
        raise ValueError(
            f"{where} takes no strength: write {kind} (only {', '.join(_SCATTERED)} take one)"
        )
    if caesar:
        return _caesar(part, int(caesar[1]))
    if kind not in _FIXED:
        near = difflib.get_close_matches(kind.lower(), _NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(_NAMES)}"
        raise ValueError(f"{where} is unknown: {hint}")
    return _FIXED[kind]


@cache
def resolve(name: str) -> Encoding:
    """The encoding of a name, such as 'leet', 'leet:garak', 'leet@0.5#3', 'caesar-3' or
    'rot13+leet'.

    A composition's inverse runs the inverses backwards and is None where a part has none; each
    part's domain must hold what the part before it writes. Raises ValueError for an unknown name or
    a bad number, with the mend.
    """
    parts = [_resolve_part(part, name) for part in name.split("+")]
    if len(parts) == 1:
        return parts[0]
    undo = [part.decode for part in reversed(parts)]
    return Encoding(
        name,
        lambda text: reduce(lambda so_far, part: part.encode(so_far), parts, text),
        (
            None
            if None in undo
            else lambda text: reduce(lambda so_far, decode: decode(so_far), undo, text)
        ),
        "; then ".join(part.about for part in parts),
        " , then ".join(part.reply for part in parts),
    )


ENCODINGS: Mapping[str, Encoding] = {name: resolve(name) for name in _NAMES}


def encode(text: str, encoding: str) -> str:
    """`text` in the named encoding (see `resolve`). Raises ValueError for an unknown name, with the
    mend.
    """
    return resolve(encoding).encode(text)


def reply_request(text: str, encoding: str) -> str:
    """`text` followed by one plain sentence that asks for the answer in the named encoding.

    The sentence is written like the made-up world's text (small letters, spaces between all words),
    which real models read as well. To hide the request too, encode what this returns. Raises
    ValueError for an unknown name.
    """
    return f"{text} answer {resolve(encoding).reply} ."
