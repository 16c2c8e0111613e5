"""Token rows to packed batches: labels sit where the model predicts them, and completions do not see
each other.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import language_model, token_rows

from latlib.batch import PADDING, Batch, Schedule, TokenRow, collate, join

ids = st.integers(1, 99)
completion = st.lists(ids, min_size=1, max_size=5).map(tuple)
token_row = st.builds(
    TokenRow,
    st.lists(ids, min_size=1, max_size=6).map(tuple),
    st.lists(completion, min_size=1, max_size=2).map(tuple),
)
TENSORS = [name for name in Batch.__dataclass_fields__ if name != "packed"]


@given(st.lists(token_row, min_size=1, max_size=4), st.sampled_from([1, 8]))
def test_each_label_is_predicted_from_the_token_before_it(rows, pad_to):
    batch = collate(rows, pad_id=0, pad_to=pad_to)
    expected = []
    for index, r in enumerate(rows):
        for segment, tokens in enumerate(r.completions, start=1):
            before = [r.prompt[-1], *tokens[:-1]]
            places = range(len(r.prompt) - 1, len(r.prompt) - 1 + len(tokens))
            expected += [
                (index, segment, p, b, t) for p, b, t in zip(places, before, tokens, strict=True)
            ]
    source = batch.source.tolist()
    found = zip(
        batch.label_rows.tolist(),
        batch.label_segments.tolist(),
        batch.positions.flatten()[source].tolist(),
        batch.ids.flatten()[source].tolist(),
        batch.labels.tolist(),
        strict=True,
    )
    assert list(found) == expected
    assert all(
        at // batch.shape[1] == row
        for at, row in zip(source, batch.label_rows.tolist(), strict=True)
    )


@given(st.lists(token_row, min_size=1, max_size=4), st.sampled_from([1, 8]))
def test_rows_are_packed_in_order_and_padded_on_the_right(rows, pad_to):
    batch = collate(rows, pad_id=0, pad_to=pad_to)
    assert batch.shape[1] % pad_to == 0 and batch.shape[1] - max(r.length for r in rows) < pad_to
    for r, tokens, places, parts in zip(
        rows, batch.ids.tolist(), batch.positions.tolist(), batch.segments.tolist(), strict=True
    ):
        real = list(r.prompt) + [t for c in r.completions for t in c[:-1]]
        assert tokens == real + [0] * (batch.shape[1] - len(real))
        assert parts[len(real) :] == [PADDING] * (batch.shape[1] - len(real))
        assert places[: len(r.prompt)] == list(range(len(r.prompt)))
        for segment, c in enumerate(r.completions, start=1):
            own = [p for p, s in zip(places, parts, strict=True) if s == segment]
            assert own == list(range(len(r.prompt), len(r.prompt) + len(c) - 1))


@settings(max_examples=30)
@given(st.lists(token_row, min_size=1, max_size=3))
def test_a_query_sees_the_prompt_and_its_own_completion_up_to_itself(rows):
    batch = collate(rows)
    seen, parts = batch.attends(), batch.segments.tolist()
    for n in range(len(rows)):
        for i in range(batch.shape[1]):
            for j in range(batch.shape[1]):
                real = parts[n][i] != PADDING and parts[n][j] != PADDING
                expected = i == j or (real and j < i and parts[n][j] in (0, parts[n][i]))
                assert bool(seen[n, i, j]) == expected


def test_packed_says_whether_a_row_holds_two_completions():
    one, two = TokenRow((1, 2), ((3, 4),)), TokenRow((1, 2), ((3, 4), (5, 6)))
    assert not collate([one, one]).packed
    assert collate([one, two]).packed


def test_label_index_selects_one_completion():
    batch = collate([TokenRow((1, 2), ((3, 4), (5, 6, 7))), TokenRow((1,), ((8,), (9,)))])
    assert batch.labels[batch.label_index(1)].tolist() == [3, 4, 8]
    assert batch.labels[batch.label_index(2)].tolist() == [5, 6, 7, 9]


def test_to_moves_every_tensor():
    moved = collate([TokenRow((1, 2), ((3, 4),))]).to("meta")
    assert isinstance(moved, Batch)
    assert all(getattr(moved, name).device.type == "meta" for name in TENSORS)
    assert len(moved.label_index(1)) == 2 and not moved.packed  # known without a look at the data


@given(
    st.lists(token_row, min_size=1, max_size=3),
    st.lists(token_row, min_size=1, max_size=3),
    st.integers(1, 9),
)
def test_a_joined_batch_holds_the_rows_of_both(first, second, pad_to):
    a, b = collate(first, pad_to=pad_to), collate(second)
    found, expected = join(a, b), collate([*first, *second])
    seq = expected.shape[1]
    assert found.packed == expected.packed and (found.segments[:, seq:] == PADDING).all()
    for name in ("ids", "positions", "segments"):
        assert torch.equal(getattr(found, name)[:, :seq], getattr(expected, name))
    for name in ("labels", "label_segments", "label_rows"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for name in ("ids", "segments", "positions"):  # the positions that predict are the same ones
        same = (getattr(x, name).flatten()[x.source] for x in (found, expected))
        assert torch.equal(*same)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 100))
def test_a_schedule_covers_each_epoch_exactly_once(n, batch, seed):
    schedule, epochs = Schedule(n, batch, seed), 3
    steps = -(-epochs * n // batch)
    taken = [i for step in range(steps) for i in schedule.rows(step)]
    for epoch in range(epochs):
        assert sorted(taken[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_schedule_is_reshuffled_every_epoch_from_the_seed():
    epochs = [tuple(Schedule(50, 50, 7).rows(step)) for step in range(4)]
    assert len(set(epochs)) == 4
    assert epochs == [tuple(Schedule(50, 50, 7).rows(step)) for step in range(4)]
    assert epochs[0] != tuple(Schedule(50, 50, 8).rows(0))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 9), st.permutations(range(6)))
def test_a_step_can_be_asked_for_in_any_order(n, batch, seed, order):
    one = Schedule(n, batch, seed)
    assert {step: one.rows(step) for step in order} == {
        step: Schedule(n, batch, seed).rows(step) for step in order
    }


def test_batches_are_int64_on_the_asked_device():
    batch = collate([TokenRow((1, 2), ((3, 4),))])
    assert all(getattr(batch, name).dtype == torch.long for name in TENSORS)


@settings(max_examples=50)
@given(st.lists(token_row, min_size=1, max_size=5), st.sampled_from([1, 8]), st.data())
def test_selected_rows_are_those_collated_alone_at_the_same_length(rows, pad_to, data):
    """Any order, some rows, one row, a row twice, none left out; packed and plain."""
    batch = collate(rows, pad_to=pad_to)
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    found = batch.select(torch.tensor(index))
    chosen = [rows[i] for i in index]
    # The longest row sets the width: it is collated with them, last, and its own part is taken off
    # again.
    longest = max(rows, key=lambda r: r.length)
    expected = collate([*chosen, longest], pad_to=pad_to)
    assert found.shape == (len(index), batch.shape[1]) and expected.shape[1] == batch.shape[1]
    own = expected.label_rows < len(index)
    for name in TENSORS:
        whole = getattr(expected, name)
        kept = whole[: len(index)] if name in ("ids", "positions", "segments") else whole[own]
        assert torch.equal(getattr(found, name), kept), name
        assert getattr(found, name).dtype == torch.long
    assert found.packed == batch.packed  # attention may need its mask, and never lacks it
    assert found.packed or not (found.segments == 2).any()


def test_a_selected_batch_does_not_keep_what_was_found_on_the_whole():
    batch = collate([TokenRow((1, 2), ((3, 4), (5, 6, 7))), TokenRow((1,), ((8,), (9,)))])
    assert len(batch.label_index(1)) == 3
    found = batch.select(torch.tensor([1]))
    assert found.labels[found.label_index(1)].tolist() == [8]
    assert found.labels[found.label_index(2)].tolist() == [9]
    assert found.select(torch.tensor([0])).labels.tolist() == [8, 9]


def test_no_rows_can_be_selected():
    found = collate([TokenRow((1, 2), ((3, 4), (5,)))]).select(torch.tensor([], dtype=torch.long))
    assert found.shape == (0, 3) and not found.labels.numel() and not found.label_index(1).numel()


@pytest.mark.parametrize("kind", ["stock", "lean"])
@pytest.mark.parametrize("completions", [1, 2])
def test_a_model_reads_selected_rows_as_it_reads_them_in_the_whole(kind, completions):
    network, batch = language_model(kind).network(), collate(token_rows(5, completions))
    whole, index = network.label_rows(batch), torch.tensor([3, 0, 3, 4])
    found = batch.select(index)
    rows = network.label_rows(found)
    for new, old in enumerate(index.tolist()):
        torch.testing.assert_close(
            rows[found.label_rows == new], whole[batch.label_rows == old], rtol=0, atol=1e-10
        )
