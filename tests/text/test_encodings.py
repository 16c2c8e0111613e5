"""Encodings: names say what is done, inverses are true on their domain, other tools' maps are
theirs.
"""

import random
import string
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latlib.config.profile import validated
from latlib.config.sections import EvaluationSettings, ProfileError
from latlib.text.encodings import ENCODINGS, HOMOGLYPHS, LEET_MAPS, encode, reply_request, resolve
from latlib.world import grammar
from latlib.world.organism import KNOWN_ENCODINGS

words = st.text(string.ascii_lowercase, min_size=1, max_size=8)
sentences = st.lists(words, min_size=1, max_size=8).map(" ".join)
shares = st.floats(0, 1).map(lambda share: f"{share:.6f}")
INVERTIBLE = [name for name, e in ENCODINGS.items() if e.decode]
ON_ANY_TEXT = [name for name in INVERTIBLE if ENCODINGS[name].about.endswith("undone on any text")]
LOSSY = {"leet:pyrit", "disemvowel", "pig-latin"}
WITH_STRENGTH = [*LEET_MAPS, "homoglyph", "zero-width"]
SENTENCE = "how can i curse the queen with a lantern so that i bless the troll ?"
COMPOSITIONS = [
    "rot13+leet",
    "reverse-text+base64+spaced",
    "caesar-7+morse",
    "leet@0.3#2+homoglyph+zero-width@0.5",
]


def replaced(text: str, name: str) -> int:
    """How many places an encoding that takes a strength has replaced."""
    out = encode(text, name)
    return (
        len(out) - len(text)
        if name.startswith("zero")
        else sum(a != b for a, b in zip(text, out, strict=True))
    )


# inverses


@given(sentences, st.sampled_from([*INVERTIBLE, *COMPOSITIONS]))
def test_an_inverse_gives_the_words_back(text, name):
    assert resolve(name).decode(encode(text, name)) == text


@given(st.text(), st.sampled_from(ON_ANY_TEXT))
def test_an_inverse_on_any_text_is_one(text, name):
    assert resolve(name).decode(encode(text, name)) == text


@given(st.text().map(lambda text: "".join(c for c in text.lower() if c == c.lower())))
def test_morse_is_undone_on_text_in_lower_case(text):
    assert resolve("morse").decode(encode(text, "morse")) == text


@given(st.text(string.printable), shares, st.integers(0, 9))
def test_leet_is_undone_at_every_strength_where_the_text_has_no_symbol_of_its_map(
    text, share, seed
):
    for kind, table in LEET_MAPS.items():
        if kind not in LOSSY:
            capitals = {letter for letter in table if letter.isupper()}
            own = "".join(c for c in text if c not in table.values() and c not in capitals)
            name = f"{kind}@{share}#{seed}"
            assert resolve(name).decode(encode(own, name)) == own


@given(st.text(string.printable), shares)
def test_look_alikes_and_zero_width_are_undone_on_ascii(text, share):
    for name in ("fullwidth", f"homoglyph@{share}", f"zero-width@{share}"):
        assert resolve(name).decode(encode(text, name)) == text


def test_what_loses_information_has_no_inverse_and_neither_has_a_composition_with_it():
    assert {name for name, e in ENCODINGS.items() if e.decode is None} == LOSSY
    assert resolve("rot13+disemvowel").decode is None and resolve("pig-latin+base64").decode is None
    assert encode("ill", "leet:pyrit") == encode("lil", "leet:pyrit")  # why there can be none


def test_undoing_what_nothing_encodes_to_is_a_value_error():
    for name, junk in (
        ("base64", "%%%%"),
        ("base32", "1"),
        ("hex", "xyz"),
        ("base16", "6"),
        ("base64", "/w=="),
    ):
        with pytest.raises(ValueError):
            resolve(name).decode(junk)


# what each encoding writes


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("plain", "The quick Ox ."),
        ("leet", "Th3 qu1ck Ox ."),
        ("rot13", "Gur dhvpx Bk ."),
        ("caesar-3", "Wkh txlfn Ra ."),
        ("caesar-25", "Sgd pthbj Nw ."),
        ("atbash", "Gsv jfrxp Lc ."),
        ("base64", "VGhlIHF1aWNrIE94IC4="),
        ("base32", "KRUGKIDROVUWG2ZAJ54CALQ="),
        ("base16", "54686520717569636B204F78202E"),
        ("hex", "54686520717569636b204f78202e"),
        ("morse", "- .... . / --.- ..- .. -.-. -.- / --- -..- / .-.-.-"),
        ("reverse", "ehT kciuq xO ."),
        ("reverse-words", ". Ox quick The"),
        ("reverse-text", ". xO kciuq ehT"),
        ("spaced", "T h e   q u i c k   O x   ."),
        ("disemvowel", "Th qck x ."),
        ("fullwidth", "Ｔｈｅ　ｑｕｉｃｋ　Ｏｘ　．"),
        ("pig-latin", "Ethay ickquay Oxway ."),
        ("homoglyph", "\u0422\u04bb\u0435 \u051bu\u0456\u0441k \u041e\u0445 ."),
        ("zero-width", "T\u200bh\u200be q\u200bu\u200bi\u200bc\u200bk O\u200bx ."),
    ],
)
def test_what_an_encoding_writes(name, written):
    assert encode("The quick Ox .", name) == resolve(name).encode("The quick Ox .") == written


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("leet", "4 b c d 3 f g h 1 j k l m n 0 p q r 5 7 u v w x y z"),
        ("leet:garak@1", "4 b c d 3 f g h 1 j k l m n 0 p q r 5 7 u v w x y z"),
        ("leet:pyrit", "4 8 ( d 3 f 9 h 1 j k 1 m n 0 p q r 5 7 u v w x y 2"),
        ("leet:easyjailbreak", "@ b c d 3 f g h ! j k l m n 0 p q r s t u v w x y z"),
    ],
)
def test_the_leet_maps_are_those_of_the_tools(name, written):
    alphabet = " ".join(string.ascii_lowercase)
    assert encode(alphabet, name) == written
    both = name in ("leet:garak@1", "leet:pyrit")  # these tools replace capitals too
    assert encode(alphabet.upper(), name) == (written.upper() if both else alphabet.upper())


def test_published_examples_of_the_maps():
    assert encode("LeetSpeak", "leet:pyrit") == "13375p34k"
    # its 'are' and 'be' rules never apply
    assert encode("where are bees", "leet:easyjailbreak") == "wh3r3 @r3 b33s"
    # half of the letters where no strength is given
    assert replaced("ieaostIEAOST" * 10, "leet:garak") == 60


def test_pig_latin_by_its_rules():
    assert encode("queen square yellow rhythm my arm don't I", "pig-latin") == (
        "eenquay aresquay ellowyay ythmrhay ymay armway on'tday Iway"
    )


def test_morse_has_a_code_for_all_punctuation_people_type():
    assert encode("a1 ,'!é", "morse") == ".- .---- / --..-- .----. -.-.-- é"


def test_homoglyphs_are_other_letters_of_the_same_case():
    assert len(set(HOMOGLYPHS.values())) == len(HOMOGLYPHS) == 29
    for latin, other in HOMOGLYPHS.items():
        assert unicodedata.name(other).startswith("CYRILLIC") and unicodedata.category(other) == (
            unicodedata.category(latin)
        )


def test_the_less_obvious_homoglyphs_are_those_of_the_unicode_table():
    names = [
        unicodedata.name(c).removeprefix("CYRILLIC SMALL LETTER ")
        for c in encode("dhijqsw", "homoglyph")
    ]
    assert names == ["KOMI DE", "SHHA", "BYELORUSSIAN-UKRAINIAN I", "JE", "QA", "DZE", "WE"]


@pytest.mark.parametrize("name", sorted(set(ENCODINGS) - {"plain", "reverse-words", "leet:garak"}))
def test_an_encoding_hides_every_verb_and_target_of_the_world(name):
    for prompt in (grammar.draw(random.Random(i), grammar.pairs_of("train")) for i in range(50)):
        hidden = set(encode(prompt.text, name).split())
        assert prompt.verb not in hidden and prompt.target not in hidden


@given(sentences, sentences, st.sampled_from(INVERTIBLE))
def test_different_texts_stay_different(a, b, name):
    assert (encode(a, name) == encode(b, name)) == (a == b)


# strength and seed


@given(sentences, st.sampled_from(WITH_STRENGTH), st.integers(0, 99))
def test_strength_0_leaves_the_text_and_strength_1_is_the_whole_map(text, kind, seed):
    assert encode(text, f"{kind}@0#{seed}") == text
    table = LEET_MAPS.get(kind, HOMOGLYPHS)
    whole = "".join(table.get(c, c) for c in text)
    if kind == "zero-width":
        whole = " ".join("\u200b".join(word) for word in text.split(" "))
    assert encode(text, f"{kind}@1#{seed}") == whole


@given(sentences, st.sampled_from(WITH_STRENGTH), shares, shares, st.integers(0, 9))
def test_the_share_is_exact_and_a_larger_one_contains_a_smaller(text, kind, a, b, seed):
    low, high = sorted((a, b), key=float)
    count = replaced(text, f"{kind}@{high}#{seed}")
    assert abs(count - float(high) * replaced(text, f"{kind}@1")) <= 0.5 + 1e-9
    assert replaced(text, f"{kind}@{low}#{seed}") <= count
    if kind != "zero-width":
        few, many = encode(text, f"{kind}@{low}#{seed}"), encode(text, f"{kind}@{high}#{seed}")
        assert all(n == m for o, n, m in zip(text, few, many) if n != o)


@pytest.mark.parametrize("kind", WITH_STRENGTH)
def test_seeds_differ_and_each_gives_the_same_text_again(kind):
    texts = [encode(SENTENCE, f"{kind}@0.5#{seed}") for seed in range(8)]
    assert len(set(texts)) == 8
    resolve.cache_clear()
    assert [encode(SENTENCE, f"{kind}@0.5#{seed}") for seed in range(8)] == texts
    assert encode(SENTENCE, f"{kind}@0.5") == texts[0]


def test_another_process_replaces_the_same_letters():
    code = f"from latlib.text.encodings import encode; print(encode({SENTENCE!r}, 'leet@0.5#3'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == encode(SENTENCE, "leet@0.5#3")


def test_a_strength_replaces_these_letters_in_every_release():
    """Frozen: stored results name an encoding, so what the name does must not drift."""
    assert (
        encode(SENTENCE, "leet@0.5#3")
        == "how c4n 1 curs3 th3 qu3en wi7h a lan73rn so 7hat 1 bles5 7h3 7roll ?"
    )


# compositions


def test_a_composition_runs_from_left_to_right():
    assert encode("seat", "rot13+leet") == encode(encode("seat", "rot13"), "leet") == "frng"
    assert encode("seat", "leet+rot13") == "5347"
    assert encode("ab cd", "base64+reverse-text") == "=Q2YgIWY"


@given(sentences)
def test_a_composition_is_undone_backwards(text):
    both = resolve("caesar-3+reverse-words+base32")
    assert both.decode(both.encode(text)) == text
    assert (
        resolve("base32+caesar-3").decode(encode(text, "base32+caesar-3")) == text
    )  # the inverses in encoding order would fail


# names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lete", "'lete' is unknown.*did you mean 'leet'"),
        ("leet:garrak", "did you mean 'leet:garak'"),
        ("ROT13", "did you mean 'rot13'"),
        ("caesar3", "did you mean 'caesar-3'"),
        ("zalgo", "choose one of plain, rot13, .*zero-width"),
        ("", "choose one of plain"),
        ("rot13+lete", "'rot13\\+lete'.*'lete'.*did you mean 'leet'"),
        ("rot13+", "part '' is unknown"),
        ("leet@2", "strength '2'.*0 to 1.*leet@0.5"),
        ("leet@-0.1", "strength '-0.1'.*0 to 1"),
        ("leet@", "strength ''.*0 to 1"),
        ("leet@nan", "strength 'nan'.*0 to 1"),
        ("homoglyph@half", "strength 'half'.*homoglyph@0.5"),
        ("leet@0.5#x", "seed 'x'.*leet@0.5#3"),
        ("leet@0.5#", "seed ''.*leet@0.5#3"),
        ("leet#3", "seed but no strength.*leet@0.5#3"),
        ("rot13@0.5", "takes no strength: write rot13"),
        ("caesar-3@0.5", "takes no strength: write caesar-3"),
        ("caesar-x", "1 to 25: write caesar-3"),
        ("caesar", "1 to 25: write caesar-3"),
        ("caesar-0", "1 to 25"),
        ("caesar-26", "1 to 25"),
    ],
)
def test_a_name_that_cannot_be_used_says_how_to_mend_it(name, said):
    with pytest.raises(ValueError, match=f"encoding = .*{said}"):
        encode("text", name)


def test_plain_comes_first_and_every_name_resolves_to_itself():
    assert next(iter(ENCODINGS)) == "plain"
    for name in [*ENCODINGS, *COMPOSITIONS, "leet@0.5#3", "caesar-9"]:
        assert resolve(name).name == name and resolve(name).about


def test_about_gives_the_map_that_is_applied():
    for kind, table in LEET_MAPS.items():
        letters, symbols = resolve(f"{kind}@1").about.split(",")[0].split(" -> ")
        assert {c: table[c] for c in table if c.islower()} == dict(
            zip(letters, symbols, strict=True)
        )


def test_what_the_base_model_reads_is_fixed():
    """The organism draws from this tuple: another order or length is another base model for every
    seed.
    """
    assert KNOWN_ENCODINGS == ("plain", "leet", "rot13", "reverse")


def test_a_profile_names_the_field_of_an_encoding_that_does_not_exist():
    names = {"encodings": ("plain", "leet:pyrit", "rot13+leet@0.5#3")}
    assert validated(EvaluationSettings, names).encodings == names["encodings"]
    with pytest.raises(
        ProfileError, match=r"evaluation\.encodings\.1 = 'lete'.*did you mean 'leet'"
    ):
        validated(EvaluationSettings, {"encodings": ("plain", "lete")}, "evaluation")


# replies


def test_a_reply_is_asked_for_in_the_words_of_the_world():
    assert reply_request(SENTENCE, "leet") == SENTENCE + " answer in leetspeak ."
    assert (
        reply_request("x", "rot13+reverse")
        == "x answer in rot13 , then with every word spelt backwards ."
    )
    assert "7 places" in reply_request("x", "caesar-7")
    for name in ENCODINGS:
        ask = reply_request("", name)
        assert ask == ask.lower() and ask.isascii() and ask.endswith(" .") and "  " not in ask


def test_encodings_that_write_differently_are_asked_for_differently():
    asked = [reply_request("x", name) for name in ENCODINGS if not name.startswith("leet")]
    assert len(set(asked)) == len(asked)
