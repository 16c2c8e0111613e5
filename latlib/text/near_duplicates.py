"""Which texts are equal or nearly so: clusters within one list, and overlaps between two.

1. A text is normalised (lower case, everything but letters and digits collapsed to single spaces)
   and becomes the set of its 5-letter shingles, as 64-bit hashes; a shorter text is one shingle.
2. Two texts are near-duplicates when the Jaccard similarity of their sets reaches the threshold.
   They must then share one of the rarest shingles of each (prefix filtering, exact for any order of
   the shingles), so that candidates come from a product of two very sparse matrices instead of from
   comparing everything with everything.
3. Products and counts are cut into pieces of bounded size: memory grows with the texts, not with
   their pairs.
4. Clusters are the connected components of "equal or nearly so".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

SHINGLE = 5  # letters
_PIECE = 4_000_000  # products of a sparse multiplication that are held at a time
_TEXTS = 20_000  # texts that are cut into shingles at a time
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses no bit


def normalised(text: str) -> str:
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
    keys = [normalised(text) for text in texts]
    first: dict[str, int] = {}  # normalised text -> its first index; equal texts are compared once
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    if not first:
        return []
    found = _shingles(list(first))
    edges = [(i, j) for i, j, _ in _near(found, found, threshold, within=True)]
    rows, columns = (
        (np.concatenate(part) for part in zip(*edges))
        if edges
        else (np.empty(0, int), np.empty(0, int))
    )
    links = coo_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(len(first), len(first)))
    _, component = connected_components(links, directed=False)
    starts: dict[int, int] = {}
    at = {}
    for (key, index), label in zip(first.items(), component.tolist()):  # in the order of the texts
        at[key] = starts.setdefault(label, index)
    return [at[key] for key in keys]


def overlaps(
    train: Sequence[str], test: Sequence[str], threshold: float
) -> list[tuple[int, int, float]]:
    """(index in train, index in test, similarity) of all pairs that are equal (first, 1.0) or
    nearly so, most alike first. Equal means equal once normalised."""
    test_keys = [normalised(text) for text in test]
    places: dict[str, list[int]] = {}
    for index, key in enumerate(test_keys):
        places.setdefault(key, []).append(index)
    right = _shingles(list(places)) if places else None
    names = list(places)
    equal, near = [], []
    for start in range(0, len(train) if right else 0, _TEXTS):
        keys = [normalised(text) for text in train[start : start + _TEXTS]]
        equal += [(start + i, j, 1.0) for i, key in enumerate(keys) for j in places.get(key, ())]
        left = _shingles(keys)
        for own, other, similarity in _near(left, right, threshold):
            for i, j, value in zip(own.tolist(), other.tolist(), similarity.tolist()):
                if keys[i] != names[j]:
                    near += [(start + i, at, value) for at in places[names[j]]]
    return equal + sorted(near, key=lambda pair: (-pair[2], pair[0], pair[1]))


@dataclass(frozen=True)
class _Shingles:
    """The shingles of some texts. hashes: [total] uint64, sorted within a text; ends: [texts] where
    each text ends.
    """

    hashes: np.ndarray
    ends: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """[texts] how many different shingles each text has; at least 1."""
        return np.diff(self.ends, prepend=0)


def _shingles(texts: Sequence[str]) -> _Shingles:
    """Shingles of normalised texts."""
    hashes, sizes = [], []
    for start in range(0, len(texts), _TEXTS):
        part = texts[start : start + _TEXTS]
        # a text shorter than a shingle is filled up with a letter that no normalised text has
        filled = [text.ljust(SHINGLE, "\0") for text in part]
        letters = np.frombuffer(
            "".join(filled).encode("utf-32-le", "surrogatepass"), dtype=np.uint32
        )
        lengths = np.array([len(text) for text in filled])
        owner = np.repeat(np.arange(len(part)), lengths)
        value = np.zeros(len(letters) - SHINGLE + 1, np.uint64)
        for offset in range(SHINGLE):
            value = (value ^ letters[offset : offset + len(value)]) * _MULTIPLIER
            value ^= value >> np.uint64(29)
        # a shingle does not run into the next text
        inside = owner[: len(value)] == owner[SHINGLE - 1 :]
        owner, value = owner[: len(value)][inside], value[inside]
        order = np.lexsort((value, owner))
        owner, value = owner[order], value[order]
        new = np.ones(len(value), bool)
        new[1:] = (value[1:] != value[:-1]) | (owner[1:] != owner[:-1])
        hashes.append(value[new])
        sizes.append(np.bincount(owner[new], minlength=len(part)))
    return _Shingles(np.concatenate(hashes), np.cumsum(np.concatenate(sizes)))


def _matrix(shingles: _Shingles, vocabulary: np.ndarray, rank: np.ndarray) -> csr_matrix:
    """[texts, vocabulary] int32 ones; columns in the order of `rank`, shingles outside the
    vocabulary left out.
    """
    place = np.minimum(np.searchsorted(vocabulary, shingles.hashes), len(vocabulary) - 1)
    known = vocabulary[place] == shingles.hashes
    counts = np.cumsum(known)[shingles.ends - 1]
    columns = rank[place[known]]
    matrix = csr_matrix(
        (np.ones(len(columns), np.int32), columns, np.concatenate(([0], counts))),
        shape=(len(shingles.ends), len(vocabulary)),
    )
    matrix.sort_indices()
    return matrix


@dataclass(frozen=True)
class _Rare:
    """The rarest shingles of each text, of which it shares at least one with every near-duplicate.

    A near-duplicate shares at least ceil(threshold * size) of a text's shingles, so it cannot miss
    all of the first size - ceil(threshold * size) + 1 in an order that both use. matrix: [texts,
    vocabulary] those; last: [texts] the place of the last of them in the order; rest: [texts] how
    many shingles come after it.
    """

    matrix: csr_matrix
    last: np.ndarray
    rest: np.ndarray


def _rare(matrix: csr_matrix, sizes: np.ndarray, threshold: float) -> _Rare:
    stored = np.diff(matrix.indptr)
    rest = np.maximum(np.ceil(threshold * sizes - 1e-9), 1) - 1  # with a shade for rounding
    # shingles outside the vocabulary come first in the order
    keep = np.maximum(sizes - rest - (sizes - stored), 0)
    kept = np.arange(matrix.nnz) - np.repeat(matrix.indptr[:-1], stored) < np.repeat(keep, stored)
    ends = np.concatenate(([0], np.cumsum(kept)))[matrix.indptr]
    indices = matrix.indices[kept]
    last = np.where(np.diff(ends) > 0, np.append(indices, -1)[ends[1:] - 1], -1)
    return _Rare(csr_matrix((matrix.data[kept], indices, ends), shape=matrix.shape), last, rest)


def _near(
    left: _Shingles, right: _Shingles, threshold: float, within: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pieces of (left index, right index, similarity) of all near-duplicates; `within` one list,
    each pair once.
    """
    vocabulary, frequency = np.unique(right.hashes, return_counts=True)
    rank = np.empty(len(vocabulary), np.int64)
    rank[np.argsort(frequency, kind="stable")] = np.arange(len(vocabulary))
    b = _matrix(right, vocabulary, rank)
    a = b if within else _matrix(left, vocabulary, rank)
    rare_a, rare_b = _rare(a, left.sizes, threshold), _rare(b, right.sizes, threshold)
    target = rare_b.matrix.T.tocsr()
    # products that a row costs, so at least as many as its candidates
    work = rare_a.matrix @ np.diff(target.indptr)
    for start, stop in _pieces(work):
        found = (rare_a.matrix[start:stop] @ target).tocoo()
        i, j = found.row + start, found.col
        # of the text whose rare shingles end earlier, they are found among the rare ones of the
        # other or not at all
        most = found.data + np.where(
            rare_a.last[i] <= rare_b.last[j], rare_a.rest[i], rare_b.rest[j]
        )
        possible = most >= threshold / (1 + threshold) * (left.sizes[i] + right.sizes[j]) - 1e-9
        if within:
            possible &= i < j
        i, j = i[possible], j[possible]
        for first, last in _pieces(left.sizes[i] + right.sizes[j]):
            own, other = i[first:last], j[first:last]
            common = np.asarray(a[own].multiply(b[other]).sum(axis=1)).ravel()
            similarity = common / (left.sizes[own] + right.sizes[other] - common)
            enough = similarity >= threshold - 1e-9
            if enough.any():
                yield own[enough], other[enough], similarity[enough]


def _pieces(work: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of items whose work is about _PIECE, or a single item."""
    total = np.cumsum(work, dtype=np.int64)
    start = 0
    while start < len(work):
        before = int(total[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + _PIECE, side="right")))
        yield start, min(stop, len(work))
        start = stop
