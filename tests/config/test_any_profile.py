"""Whatever a profile holds, it is read or refused with a reason: never a traceback, never for long."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strange_values import JUNK, places, with_value

from latlib.config.profile import ProfileError, load_profile

SHIPPED = {
    file.stem: file.read_text(encoding="utf-8")
    for file in sorted((Path(__file__).parents[2] / "profiles").glob("*.yaml"))
}
EVERY = settings(
    max_examples=1000, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LONGEST = 20_000  # letters of a reason


def read(folder, text) -> str:
    """'' for a profile that is read, or why it is not."""
    file = folder / "p.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        load_profile(file)
    except ProfileError as error:
        assert str(error).strip()
        return str(error)
    return ""


@EVERY
@given(data=st.data())
def test_a_value_of_any_kind_anywhere(tmp_path, data):
    tree = yaml.safe_load(SHIPPED[data.draw(st.sampled_from(list(SHIPPED)))])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places(tree))[1:]))
        try:
            tree = with_value(tree, place, data.draw(JUNK))
        except (TypeError, KeyError, IndexError):  # an earlier change took the place away
            continue
    assert len(read(tmp_path, yaml.dump(tree, allow_unicode=True))) < LONGEST


@EVERY
@given(data=st.data())
def test_any_bytes_anywhere(tmp_path, data):
    text = SHIPPED[data.draw(st.sampled_from(list(SHIPPED)))].encode()
    begin = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 40))
    scraps = [
        b"\t",
        b"\x00",
        b"\xff",
        b": ",
        b"- ",
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/x ",
        b"{",
        b"]",
    ]
    put = data.draw(st.one_of(st.sampled_from(scraps), st.binary(max_size=12)))
    assert len(read(tmp_path, text[:begin] + put + text[begin + length :])) < LONGEST


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text, why",
    [
        (
            "model: {date: 2026-02-31}\nmethods: {a: {}}\ndescription: x\n",
            "model.date = '2026-02-31'",
        ),
        ("seeds: [" + "9" * 5000 + "]\n", "not readable YAML"),
        ("x: !!python/object:os.system {}\n", "could not determine a constructor"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: &a [*a]\n", "nested too deeply"),
        (BOMB, "more than 10000 values, aliases counted"),
        (b"name: \xff\n", "not UTF-8"),
    ],
    ids=["date", "digits", "tag", "deep", "itself", "aliases", "bytes"],
)
def test_what_is_no_profile_is_refused_at_once(tmp_path, text, why):
    assert why in read(tmp_path, text)


@pytest.mark.parametrize(
    "place, value, why",
    [
        ("model.dim", 33, "model.dim = 33 is no even multiple of heads = 2"),
        ("model.kv_heads", 3, "model.heads = 2 is no multiple of kv_heads = 3"),
        ("model.vocabulary", 10**12, "model.vocabulary = 1000000000000: "),
        ("model.device", "tpu9", "model.device = 'tpu9': "),
        ("train.batch", 10**12, "train.batch = 1000000000000: "),
        ("train.lr", 1e300, "train.lr = 1e+300: "),
        ("seeds", [10**9], "seeds.0 = 1000000000: "),
        ("data.harmful_columns", {"promt": "x"}, "'promt': Input should be 'prompt', 'rejected'"),
        ("train.defence", {"toward": 0.0, "away": 0.0, "kl": 0.0}, "all are 0: nothing would be"),
        ("train.attack.sites", [99], "attack.site = 99 is outside this model of 4 blocks"),
        ("lora.targets", ["nothing"], "lora.targets = ['nothing'] are no layers of the organism"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path, place, value, why):
    tree = yaml.safe_load(SHIPPED["smoke"])
    assert why in read(tmp_path, yaml.dump(with_value(tree, place.split("."), value)))


def test_an_attack_that_seeks_nothing_is_refused(tmp_path):
    tree = yaml.safe_load(SHIPPED["smoke"])
    tree["train"]["attack"] |= {"toward": 0.0, "away": 0.0}
    assert "the attack would seek nothing" in read(tmp_path, yaml.dump(tree))
