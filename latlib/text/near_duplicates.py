"""Which texts are equal or nearly so: clusters within one list, and overlaps between two.

1. A text is made comparable (lower case, everything but letters and digits collapsed to single
   spaces) and becomes the set of its 5-letter shingles; a shorter text is one shingle.
2. Two texts are near-duplicates when the Jaccard similarity of their sets reaches the threshold.
   They must then share one of the rarest shingles of each (prefix filtering), so that candidates
   come from a product of two very sparse matrices instead of from comparing everything with
   everything.
3. Candidates are made and compared in pieces of bounded size: memory grows with the texts and with
   the near-duplicates among them, not with all pairs.
4. Clusters are the connected components of "equal or nearly so".

The search is exact where MinHash and the like are not: a training prompt that comes back among
test prompts must not slip through by chance. A plain loop over an inverted index takes four times
as long on 30,000 prompts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.sparse import csr_array, triu
from scipy.sparse.csgraph import connected_components

SHINGLE = 5  # letters: our choice
_PIECE = 100_000  # candidates that are compared at a time, about
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
    shingles = _incidence(names)  # equal texts are compared once
    left, right, similarity = zip(*_near(shingles, shingles, threshold), strict=True)
    links = csr_array((similarity, (left, right)))
    _, component = connected_components(links, directed=False)
    _, first, cluster = np.unique(component[name], return_index=True, return_inverse=True)
    return first[cluster].tolist()


def overlaps(train: Sequence[str], test: Sequence[str], threshold: float) -> list[Pair]:
    """(index in train, index in test, similarity) of all pairs that are equal (first, 1.0) or
    nearly so, most alike first. Equal means equal once made comparable.
    """
    if not train or not test:
        return []
    keys = [comparable(text) for text in train]
    others = [comparable(text) for text in test]
    shingles = _incidence([*keys, *others])
    own = shingles[: len(keys)]
    rest = shingles[len(keys) :]

    def order(pair: Pair) -> tuple[bool, float, int, int]:
        i, j, similarity = pair
        return keys[i] != others[j], -similarity, i, j

    return sorted(_near(own, rest, threshold), key=order)


def _near(left: csr_array, right: csr_array, threshold: float) -> Iterator[Pair]:
    """All pairs of rows of [texts, shingles] ones that are equal or nearly so; within one matrix
    each once.
    """
    rare = _rarest(left, threshold)
    others = _rarest(right, threshold)
    by_shingle = others.T.tocsr()
    sizes = left.sum(axis=1)
    other_sizes = right.sum(axis=1)
    rest = sizes - rare.sum(axis=1)
    other_rest = other_sizes - others.sum(axis=1)
    # products that a row costs, so at least as many as its candidates
    work = np.cumsum(rare @ by_shingle.sum(axis=1), dtype=np.int64)
    cuts = np.flatnonzero(np.diff(work // _PIECE)) + 1
    for rows in np.split(np.arange(len(work)), cuts):
        candidates = (rare[rows] @ by_shingle).tocoo()
        if left is right:
            candidates = triu(candidates, rows[0])
        i = rows[candidates.row]
        j = candidates.col
        total = sizes[i] + other_sizes[j]
        # of the text whose rare shingles end earlier, the others are found among the rare ones of
        # the other text or not at all
        most = candidates.data + np.maximum(rest[i], other_rest[j])
        possible = most >= threshold / (1 + threshold) * total - _ROUNDING
        i = i[possible]
        j = j[possible]
        common = left[i].multiply(right[j]).sum(axis=1)
        similarity = common / (total[possible] - common)
        for pair in np.flatnonzero(similarity >= threshold - _ROUNDING):
            yield int(i[pair]), int(j[pair]), float(similarity[pair])


def _incidence(texts: Iterable[str]) -> csr_array:
    """[texts, shingles] int32 ones where a text has a shingle; from the rarest shingle to the most
    frequent one.
    """
    numbers: dict[str, int] = {}
    columns = []
    bounds = [0]
    for text in texts:
        starts = range(max(1, len(text) - SHINGLE + 1))
        for shingle in {text[start : start + SHINGLE] for start in starts}:
            columns.append(numbers.setdefault(shingle, len(numbers)))
        bounds.append(len(columns))
    order = np.argsort(np.bincount(columns), kind="stable")
    rank = np.argsort(order)
    matrix = csr_array((np.ones(len(columns), np.int32), rank[columns], bounds))
    matrix.sort_indices()
    return matrix


def _rarest(shingles: csr_array, threshold: float) -> csr_array:
    """The rarest shingles of each text. A near-duplicate shares at least ceil(threshold * size) of
    a text's shingles, so it cannot miss all of the first size - ceil(threshold * size) + 1 in an
    order that both use.
    """
    sizes = shingles.sum(axis=1)
    needed = np.maximum(np.ceil(threshold * sizes - _ROUNDING), 1)
    number = np.arange(shingles.nnz) - np.repeat(shingles.indptr[:-1], sizes)  # within its text
    rare = shingles.copy()
    rare.data[number > np.repeat(sizes - needed, sizes)] = 0
    rare.eliminate_zeros()
    return rare
