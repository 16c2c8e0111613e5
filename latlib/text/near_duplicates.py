"""Which texts are equal or nearly so: clusters within one list, and overlaps between two.

1. A text is made comparable (lower case, everything but letters and digits collapsed to single
   spaces) and becomes the set of its 5-letter shingles, as 64-bit hashes; a shorter text is one
   shingle.
2. Two texts are near-duplicates when the Jaccard similarity of their sets reaches the threshold.
   They must then share one of the rarest shingles of each (prefix filtering), so that candidates
   come from a product of two very sparse matrices instead of from comparing everything with
   everything.
3. Products and counts are cut into pieces of bounded size: memory grows with the texts, not with
   their pairs.
4. Clusters are the connected components of "equal or nearly so".

The search is exact where MinHash and the like are not: a training prompt that comes back among
test prompts must not slip through by chance. A plain loop over an inverted index takes four times
as long on 30,000 prompts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

SHINGLE = 5  # letters: our choice
_PIECE = 4_000_000  # products of a sparse multiplication that are held at a time
_TEXTS = 20_000  # texts that are cut into shingles at a time
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses no bit
_SHIFT = np.uint64(29)
_ROUNDING = 1e-9

Array = np.ndarray
Candidates = Iterator[tuple[Array, Array]]
Pairs = tuple[Array, Array, Array]  # index left, index right, similarity


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
    keys = [comparable(text) for text in texts]
    first: dict[str, int] = {}  # equal texts are compared once: key -> index
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    if not first:
        return []
    names = list(first)
    lefts = [np.empty(0, int)]
    rights = [np.empty(0, int)]
    for left, right, _ in _near(names, None, threshold):
        lefts.append(left)
        rights.append(right)
    row = np.concatenate(lefts)
    column = np.concatenate(rights)
    ones = np.ones(len(row), bool)
    links = coo_matrix((ones, (row, column)), shape=(len(names), len(names)))
    _, components = connected_components(links, directed=False)
    heads: dict[int, int] = {}  # component -> index of its first text
    found = {}
    for name, component in zip(names, components.tolist(), strict=True):
        found[name] = heads.setdefault(component, first[name])
    return [found[key] for key in keys]


def overlaps(
    train: Sequence[str], test: Sequence[str], threshold: float
) -> list[tuple[int, int, float]]:
    """(index in train, index in test, similarity) of all pairs that are equal (first, 1.0) or
    nearly so, most alike first. Equal means equal once made comparable.
    """
    places: dict[str, list[int]] = {}  # test text made comparable -> where it stands
    for index, text in enumerate(test):
        places.setdefault(comparable(text), []).append(index)
    if not places:
        return []
    names = list(places)
    equal = []
    near = []
    for start in range(0, len(train), _TEXTS):
        keys = [comparable(text) for text in train[start : start + _TEXTS]]
        for i, key in enumerate(keys, start=start):
            for place in places.get(key, ()):
                equal.append((i, place, 1.0))
        for pairs in _near(keys, names, threshold):
            for i, j, similarity in zip(*(part.tolist() for part in pairs), strict=True):
                if keys[i] == names[j]:
                    continue
                for place in places[names[j]]:
                    near.append((start + i, place, similarity))
    near.sort(key=lambda pair: (-pair[2], pair[0], pair[1]))
    return equal + near


def _near(left: Sequence[str], right: Sequence[str] | None, threshold: float) -> Iterator[Pairs]:
    """All pairs of a text on the left and one on the right that are nearly equal, in pieces; right:
    None for pairs within the left ones, each once.
    """
    shingles = _incidence([*left, *(right or ())])
    a = _Texts.of(shingles[: len(left)], threshold)
    b = a
    if right is not None:
        b = _Texts.of(shingles[len(left) :], threshold)
    for i, j in _candidates(a, b, threshold):
        if right is None:
            once = i < j
            i = i[once]
            j = j[once]
        for piece in _pieces(a.sizes[i] + b.sizes[j]):
            own = i[piece]
            other = j[piece]
            similarity = _similarity(a, b, own, other)
            enough = similarity >= threshold - _ROUNDING
            yield own[enough], other[enough], similarity[enough]


def _candidates(a: _Texts, b: _Texts, threshold: float) -> Candidates:
    """Pairs that share a rare shingle and may share enough of all, in pieces."""
    by_shingle = b.rare.T.tocsr()
    share = threshold / (1 + threshold)  # of both sizes together, that near-duplicates share
    # products that a row costs, so at least as many as its candidates
    work = a.rare @ np.diff(by_shingle.indptr)
    for piece in _pieces(work):
        shared = (a.rare[piece] @ by_shingle).tocoo()
        i = shared.row + piece.start
        j = shared.col
        # of the text whose rare shingles end earlier, the others are found among the rare ones of
        # the other text or not at all
        left_ends_first = a.last[i] <= b.last[j]
        others = np.where(left_ends_first, a.rest[i], b.rest[j])
        most = shared.data + others
        total = a.sizes[i] + b.sizes[j]
        possible = most >= share * total - _ROUNDING
        yield i[possible], j[possible]


def _similarity(a: _Texts, b: _Texts, i: Array, j: Array) -> Array:
    """[pairs] Jaccard similarity of texts i and j."""
    common = a.all[i].multiply(b.all[j]).sum(axis=1)
    common = np.asarray(common).ravel()
    total = a.sizes[i] + b.sizes[j]
    return common / (total - common)


def _incidence(texts: Sequence[str]) -> csr_matrix:
    """[texts, shingles] int32 ones where a text has a shingle; from the rarest shingle to the most
    frequent one.
    """
    owners, hashes = _shingles(texts)
    known, column = np.unique(hashes, return_inverse=True)
    count = np.bincount(column)
    rank = np.empty(len(known), int)
    rank[np.argsort(count, kind="stable")] = np.arange(len(known))
    ones = np.ones(len(hashes), np.int32)
    place = (owners, rank[column])
    matrix = csr_matrix((ones, place), shape=(len(texts), len(known)))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _shingles(texts: Sequence[str]) -> tuple[Array, Array]:
    """The text and the hash of every shingle of comparable texts, repeated or not."""
    # a text shorter than a shingle is filled up with a letter that no comparable text has
    filled = [text.ljust(SHINGLE, "\0") for text in texts]
    joined = "".join(filled).encode("utf-32-le", "surrogatepass")
    letters = np.frombuffer(joined, dtype=np.uint32)
    lengths = [len(text) for text in filled]
    owners = np.repeat(np.arange(len(texts)), lengths)
    count = len(letters) - SHINGLE + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(SHINGLE):
        hashes ^= letters[offset : offset + count]
        hashes *= _MULTIPLIER
        hashes ^= hashes >> _SHIFT
    first = owners[:count]
    last = owners[SHINGLE - 1 :]
    inside = first == last  # a shingle does not run into the next text
    return first[inside], hashes[inside]


@dataclass(frozen=True)
class _Texts:
    """Texts to be compared. A near-duplicate shares at least ceil(threshold * size) of a text's
    shingles, so it cannot miss all of the first size - ceil(threshold * size) + 1 in an order that
    both use.

    all: [texts, shingles] ones; rare: those first ones; last: [texts] the place of the last of them
    in the order; rest: [texts] how many shingles come after it; sizes: [texts] how many there are.
    """

    all: csr_matrix
    rare: csr_matrix
    last: Array
    rest: Array
    sizes: Array

    @classmethod
    def of(cls, shingles: csr_matrix, threshold: float) -> _Texts:
        """The texts of [texts, shingles] ones, whose columns are in the order."""
        starts = shingles.indptr
        sizes = np.diff(starts)
        needed = np.ceil(threshold * sizes - _ROUNDING).astype(int)
        rest = np.maximum(needed, 1) - 1
        keep = sizes - rest
        number = np.arange(shingles.nnz) - np.repeat(starts[:-1], sizes)  # within its text
        kept = number < np.repeat(keep, sizes)
        ends = np.cumsum(keep)
        columns = shingles.indices[kept]
        bounds = np.concatenate(([0], ends))
        parts = (shingles.data[kept], columns, bounds)
        rare = csr_matrix(parts, shape=shingles.shape)
        return cls(shingles, rare, columns[ends - 1], rest, sizes)


def _pieces(work: Array) -> Iterator[slice]:
    """Runs of items whose work is about _PIECE, or a single item."""
    total = np.cumsum(work, dtype=np.int64)
    start = 0
    done = 0
    while start < len(work):
        stop = int(np.searchsorted(total, done + _PIECE, side="right"))
        stop = max(stop, start + 1)
        yield slice(start, stop)
        start = stop
        done = total[stop - 1]
