"""Near-duplicates by definition and by search."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latlib.text.near_duplicates import SHINGLE, clusters, comparable, overlaps

# few letters and words, so that near-duplicates are common
words = st.lists(st.sampled_from(["ab", "ba", "aab", "B", "a-b", "Café"]), max_size=9).map(" ".join)
texts = st.lists(words, max_size=12)
thresholds = st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0])


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the 5-letter shingles, by its definition; 0 where nothing is shared."""

    def shingles(text):
        return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}

    a, b = shingles(comparable(a)), shingles(comparable(b))
    return len(a & b) / len(a | b)


def alike(a: str, b: str, threshold: float) -> bool:
    return 0 < similarity(a, b) >= threshold - 1e-9


@pytest.mark.parametrize(
    "text, want",
    [
        ("How do I...  BAKE\ta_cake?", "how do i bake a cake"),
        ("", ""),
        ("?!", "?!"),
        ("\uff21\u00c9 \u4f60", "aé 你"),
    ],
)
def test_case_spaces_and_punctuation_do_not_count(text, want):
    assert comparable(text) == want


@given(texts, texts, thresholds)
def test_overlaps_are_those_of_the_definition(train, test, threshold):
    found = overlaps(train, test, threshold)
    assert {(i, j): pytest.approx(s) for i, j, s in found} == {
        (i, j): similarity(a, b)
        for i, a in enumerate(train)
        for j, b in enumerate(test)
        if alike(a, b, threshold)
    }
    equal = [comparable(train[i]) == comparable(test[j]) for i, j, _ in found]
    assert equal == sorted(equal, reverse=True)  # exact ones first, then the most alike
    near = [s for (_, _, s), same in zip(found, equal) if not same]
    assert near == sorted(near, reverse=True)


@given(texts, thresholds)
def test_clusters_are_connected_components_of_the_definition(texts, threshold):
    found = clusters(texts, threshold)
    want = list(range(len(texts)))
    for i, a in enumerate(texts):
        for j in range(i):
            if alike(a, texts[j], threshold):
                joined = {want[i], want[j]}
                want = [min(joined) if label in joined else label for label in want]
    assert found == want


@given(texts, thresholds, st.randoms(use_true_random=False))
def test_clusters_do_not_depend_on_the_order(texts, threshold, rng):
    order = list(range(len(texts)))
    rng.shuffle(order)
    straight, shuffled = clusters(texts, threshold), clusters([texts[i] for i in order], threshold)
    for a, i in enumerate(order):
        for b, j in enumerate(order):
            assert (straight[i] == straight[j]) == (shuffled[a] == shuffled[b])


@given(texts, thresholds)
def test_equal_texts_are_always_together(texts, threshold):
    found = clusters([*texts, *texts], threshold)
    assert found[: len(texts)] == found[len(texts) :]
