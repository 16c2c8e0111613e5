"""Which texts are equal or nearly so: clusters within one list, and overlaps between two.

1. A text is made comparable (lower case, everything but letters and digits collapsed to single
   spaces) and becomes the set of its 5-letter shingles; a shorter text is one shingle.
2. Two texts are near-duplicates when the Jaccard similarity of their sets reaches the threshold.
   They must then share one of the rarest shingles of each (prefix filtering), so that few pairs
   are compared: 10,000 prompts take two seconds, 30,000 take ten.
3. Clusters are the connected components of "equal or nearly so".

The search is exact where MinHash and the like are not: a training prompt that comes back among
test prompts must not slip through by chance.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

SHINGLE = 5  # letters: our choice
_ROUNDING = 1e-9

Pair = tuple[int, int, float]  # index left, index right, similarity


def comparable(text: str) -> str:
    """Lower case, with everything but letters and digits collapsed to single spaces; a text of
    nothing else stays.
    """
    lower = unicodedata.normalize("NFKC", text).lower()
    return re.sub(r"[\W_]+", " ", lower).strip() or lower.strip()


def clusters(texts: Sequence[str], threshold: float) -> list[int]:
    """The cluster of every text: the index of the cluster's first text. Near-duplicates of
    near-duplicates belong.

    threshold: Jaccard similarity in [0, 1]; whatever it is, texts without a common shingle are not
    near-duplicates.
    """
    if not texts:
        return []
    keys = [comparable(text) for text in texts]
    names, name = np.unique(np.array(keys, object), return_inverse=True)
    shingles = _shingles(names.tolist())  # equal texts are compared once
    left, right, similarity = zip(*_near(shingles, shingles, threshold), strict=True)
    links = csr_array((similarity, (left, right)))
    _, component = connected_components(links, directed=False)
    _, first, cluster = np.unique(component[name], return_index=True, return_inverse=True)
    return first[cluster].tolist()


def overlaps(train: Sequence[str], test: Sequence[str], threshold: float) -> list[Pair]:
    """(index in train, index in test, similarity) of all pairs that are equal (first, 1.0) or
    nearly so, most alike first. Equal means equal once made comparable.
    """
    keys = [comparable(text) for text in train]
    others = [comparable(text) for text in test]
    shingles = _shingles([*keys, *others])
    left = shingles[: len(keys)]
    right = shingles[len(keys) :]

    def order(pair: Pair) -> tuple[bool, float, int, int]:
        i, j, similarity = pair
        differ = keys[i] != others[j]
        return differ, -similarity, i, j

    return sorted(_near(left, right, threshold), key=order)


def _shingles(texts: Sequence[str]) -> list[list[int]]:
    """The shingles of every text as numbers, the rarest of all texts first."""
    found = []
    for text in texts:
        starts = range(max(1, len(text) - SHINGLE + 1))
        found.append({text[start : start + SHINGLE] for start in starts})
    counts = Counter(chain.from_iterable(found))
    number: dict[str, int] = {}
    for shingle, _ in reversed(counts.most_common()):
        number[shingle] = len(number)
    return [sorted(number[shingle] for shingle in own) for own in found]


def _near(
    left: Sequence[list[int]], right: Sequence[list[int]], threshold: float
) -> Iterator[Pair]:
    """All pairs of texts, as shingles, that are equal or nearly so; within one list each once."""
    having = defaultdict(list)  # rare shingle -> texts on the right
    for j, shingles in enumerate(right):
        for shingle in _rarest(shingles, threshold):
            having[shingle].append(j)
    others = [set(shingles) for shingles in right]
    for i, shingles in enumerate(left):
        own = set(shingles)
        rare = _rarest(shingles, threshold)
        for j in set(chain.from_iterable(having.get(shingle, ()) for shingle in rare)):
            if left is right and j < i:
                continue
            common = len(own & others[j])
            similarity = common / (len(own) + len(others[j]) - common)
            if similarity >= threshold - _ROUNDING:
                yield i, j, similarity


def _rarest(shingles: list[int], threshold: float) -> list[int]:
    """A near-duplicate shares at least ceil(threshold * size) of a text's shingles, so it cannot
    miss all of the first size - ceil(threshold * size) + 1 in an order that both use.
    """
    needed = math.ceil(threshold * len(shingles) - _ROUNDING)
    return shingles[: len(shingles) - max(needed, 1) + 1]
