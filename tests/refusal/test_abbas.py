"""The published activations of Llama-2-7B: both forms in which they come, a stand-in with a known
truth, and the figures that were computed from them elsewhere (LATLIB_ABBAS=PATH)."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latlib.refusal import abbas
from latlib.refusal.massive import DIMENSIONS, NOTHING, PAIRS
from latlib.report import abbas_tables

HERE = os.environ.get("LATLIB_ABBAS", "")
# docs/sources.md, Abbas 2025: block -> share in per cent of the first two components, uncentred
SHARES = {
    12: {("baseline", NOTHING): 43.6, ("at", NOTHING): 42.5, ("lat", NOTHING): 74.6,
         ("lat", DIMENSIONS): 46.2, ("lat", PAIRS): 44.1},
    16: {("baseline", NOTHING): 59.3, ("at", NOTHING): 59.1, ("lat", NOTHING): 67.7,
         ("lat", DIMENSIONS): 56.7, ("lat", PAIRS): 56.9},
    20: {("baseline", NOTHING): 53.5, ("at", NOTHING): 53.7, ("lat", NOTHING): 60.8,
         ("lat", DIMENSIONS): 54.7, ("lat", PAIRS): 52.0},
}  # fmt: skip
LEFT_OUT = {12: 41, 16: 24, 20: 18}  # pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("abbas")
    abbas.write_stand_in(place)
    return place


@pytest.fixture(scope="module")
def activations(folder):
    return abbas.load_activations(folder)


def only(activations, *blocks):
    return {block: activations[block] for block in blocks}


@pytest.fixture(scope="module")
def found(activations):
    return abbas.examine(only(activations, 12, 16))


def share(found, block, model, removed, centred=False):
    table = found.shares.set_index(["block", "model", "removed", "centred"])
    return table.loc[(block, model, removed, centred)]


def test_the_stand_in_has_the_published_shapes(folder, activations):
    assert sorted(file.name for file in folder.iterdir()) == [
        "at.safetensors", "baseline.safetensors", "lat.safetensors",
    ]  # fmt: skip
    tensors = load_file(folder / "lat.safetensors")
    assert len(tensors) == 16 and tensors["harmful.12"].dtype == torch.float16
    assert tuple(activations) == abbas.BLOCKS
    assert activations[20]["at"][1].shape == (100, 4096)


@pytest.mark.parametrize("centred", [False, True])
def test_the_planted_dimensions_are_all_of_the_stand_ins_concentration(found, centred):
    published = share(found, 12, "lat", NOTHING, centred)
    assert published["more_low"] > 0.3
    assert share(found, 12, "lat", PAIRS)["pairs"] == 67
    for removed in (DIMENSIONS, PAIRS):
        row = share(found, 12, "lat", removed, centred)
        assert row["more_low"] < 0 < row["more_high"] and abs(row["more"]) < 0.01
    assert abs(share(found, 12, "at", NOTHING, centred)["more"]) < 0.01


def test_only_lat_has_massive_dimensions_in_the_stand_in(found):
    kang = found.massive[found.massive["rule"] == "Kang"]
    assert set(kang["model"]) == {"lat"} and set(kang["massive_in"]) == {33}
    assert set(kang["dimension"]) == set(abbas.MASSIVE_DIMENSIONS)
    angles = found.angles.set_index(["block", "a", "b", "removed"])["angle"]
    assert angles[12, "lat", "baseline", NOTHING] > 40
    assert angles[12, "lat", "baseline", DIMENSIONS] < 10


def with_excess(found, *more):
    """The same findings with one excess, low and high, for LAT under every removal."""
    shares = found.shares.copy()
    shares.loc[shares["model"] == "lat", ["more", "more_low", "more_high"]] = more
    return replace(found, shares=shares)


def test_the_paragraph_follows_from_the_numbers(found):
    text = abbas_tables.paragraph(found)
    assert "at blocks 12, 16" in text and "can be told from 0 once either is removed" in text
    assert "Without dimensions 1415 and 2533, they do at no block" in text
    assert "by Kang et al.'s rule SSFT none, AT none, LAT 1415 + 2533" in text
    unseen = abbas_tables.paragraph(with_excess(found, 0.1, -0.1, 0.3))
    assert "at blocks" not in unseen and "there is no excess to explain" in unseen
    text = abbas_tables.paragraph(with_excess(found, 0.1, 0.05, 0.15))
    assert "+10.0 [+5.0, +15.0] points at block 12" in text
    assert "stays without dimensions 1415 and 2533 and without the pairs that" in text


def test_tables_and_figure_hold_the_same_numbers_and_a_stand_in_says_so(found):
    row = share(found, 12, "lat", PAIRS)
    cell = f"{100 * row['share']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}], 67 pairs"
    text = abbas_tables.shares_markdown(found)
    assert cell in text and "| 14, the paper | 54.2 | 48.5 | 74.0 |" in text
    assert "the paper" not in abbas_tables.shares_markdown(found, centred=True)
    figure, alt, caption = abbas_tables.concentration_figure(found, abbas_tables.STAND_IN)
    assert alt.startswith(abbas_tables.STAND_IN) and "uncentred" in alt
    assert figure.get_suptitle() == abbas_tables.STAND_IN
    figure, alt, caption = abbas_tables.concentration_figure(found)
    assert "STAND-IN" not in alt and not figure.get_suptitle()
    table = abbas_tables.massive_by_block(found)
    assert table.loc[(12, "lat"), "Kang et al."] == "1415 (33), 2533 (33)"
    assert table.loc[(12, "at"), "Sun et al."] == "none"
    assert abbas_tables.angles_table(found).shape == (6, 4)


def test_a_checkout_is_read_as_well(tmp_path, activations):
    for model in abbas.MODELS:
        for block in abbas.BLOCKS:
            for side, stream in zip(abbas.SIDES, activations[block][model]):
                file = tmp_path / abbas.CHECKOUT.format(model=model, side=side, block=block)
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(stream.half(), file)
    read = abbas.load_activations(tmp_path)
    for block, models in activations.items():
        for model, sides in models.items():
            assert all(map(torch.equal, sides, read[block][model]))
    file.unlink()
    with pytest.raises(FileNotFoundError, match="lat.safetensors nor data_store/.*layer20.pt"):
        abbas.load_activations(tmp_path)


def test_other_files_are_refused_by_name(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="a checkout of nlpet/apart-lab-refusal-lat"):
        abbas.load_activations(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    tensors = load_file(folder / "at.safetensors")
    tensors["harmful.3"] = tensors["harmful.3"][:99].clone()
    (tmp_path / "at.safetensors").unlink()
    save_file(tensors, tmp_path / "at.safetensors")
    with pytest.raises(ValueError, match=r"harmful.3 of at is \[99, 4096\], not \[100, 4096\]"):
        abbas.load_activations(tmp_path)


@pytest.fixture(scope="module")
def published():
    if not HERE:
        pytest.skip(f"set LATLIB_ABBAS to a checkout of {abbas.SOURCE}")
    return abbas.load_activations(Path(HERE))


def test_the_published_table_to_a_tenth_of_a_point(published):
    found = abbas.examine(only(published, *SHARES))
    for block, cells in SHARES.items():
        for (model, removed), expected in cells.items():
            row = share(found, block, model, removed)
            assert 100 * row["share"] == pytest.approx(expected, abs=0.0501), (
                block,
                model,
                removed,
            )
        assert 100 - share(found, block, "lat", PAIRS)["pairs"] == LEFT_OUT[block]


@pytest.mark.slow
def test_the_committed_results_are_what_the_command_writes(published, root):
    kept = json.loads((root / "results/abbas2025/concentration.json").read_text())
    again = abbas.to_record(abbas.examine(published))
    for name, rows in again.items():
        if name == "source":
            assert rows == kept[name]
            continue
        assert len(rows) == len(kept[name])
        for row, before in zip(rows, kept[name]):
            assert row == pytest.approx(before, abs=1e-5), name
