"""Values that a profile may hold, put anywhere into it."""

import copy
import datetime

from hypothesis import strategies as st

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 33, 10**12, 10**30, -(10**30), 2**63]),
    st.sampled_from([0.0, -1.0, 1e-320, 1e308, float("nan"), float("inf"), 0.5]),
    st.sampled_from(["", "auto", "world", "tpu9", "../../x", "a/b", "\x1b[31m", "1e12", "nan"]),
    st.sampled_from(
        [datetime.date(2026, 2, 28), b"\x00", {"a": 1}, [], {}, [[]], {"attack.eps": 1}]
    ),
    st.text(max_size=20),
    st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=8),
)


def places(tree, at=()):
    """Where a value stands: every path into a profile."""
    yield at
    if isinstance(tree, dict | list):
        children = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in children:
            yield from places(value, (*at, key))


def with_value(tree, place, value):
    if not place:
        return value
    tree = copy.deepcopy(tree)
    node = tree
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return tree
