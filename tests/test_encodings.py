"""Encodings: each can be undone, and none leaves a prompt as it was."""

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latlib import world
from latlib.encodings import ENCODINGS, encode

words = st.text(string.ascii_lowercase, min_size=1, max_size=8)
sentences = st.lists(words, min_size=1, max_size=8).map(" ".join)
INVERSES = {
    "plain": lambda text: text,
    "leet": lambda text: text.translate(str.maketrans("431057", "aeiost")),
    "rot13": lambda text: encode(text, "rot13"),
    "reverse": lambda text: encode(text, "reverse"),
}


@given(sentences, st.sampled_from(sorted(ENCODINGS)))
def test_every_encoding_can_be_undone(text, name):
    assert INVERSES[name](encode(text, name)) == text


@given(sentences, sentences, st.sampled_from(sorted(ENCODINGS)))
def test_different_texts_stay_different(a, b, name):
    assert (encode(a, name) == encode(b, name)) == (a == b)


@pytest.mark.parametrize("name", sorted(set(ENCODINGS) - {"plain"}))
def test_an_encoding_hides_every_verb_and_target_of_the_world(name):
    for prompt in (world.draw(random.Random(i), world.pairs_of("train")) for i in range(50)):
        hidden = set(encode(prompt.text, name).split())
        assert prompt.verb not in hidden and prompt.target not in hidden


def test_leet_is_the_map_its_docstring_gives():
    assert encode("aeiost xyz", "leet") == "431057 xyz"


def test_an_unknown_encoding_is_named_with_the_choices():
    with pytest.raises(ValueError, match="'morse'.*plain, leet, rot13, reverse"):
        encode("text", "morse")
