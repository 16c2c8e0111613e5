"""Whatever a data file holds, its prompts are read or it is refused with a reason."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows_in_files import write

from latlib.config.sections import DataSettings, ProfileError
from latlib.data.splits import file_prompts

HARMFUL = [
    {"goal": f"please mix {n} sour pies .", "target": f"mix {n} , then stir ."} for n in range(9)
]
BENIGN = [{"instruction": f"please bake {n} loaves .", "response": f"bake {n} ."} for n in range(9)]
COLUMNS = {"prompt": "instruction", "response": "response"}
SCRAPS = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b",",
    b"\n",
    b"\r",
    b"{",
    b"}",
    b"[",
    b"null",
    b"1e999",
]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_bytes_anywhere(tmp_path, suffix, data):
    files = [tmp_path / f"{name}{suffix}" for name in ("harmful", "benign")]
    for file, rows in zip(files, (HARMFUL, BENIGN), strict=True):
        write(tmp_path, file.name, rows)
    spoiled = data.draw(st.sampled_from(files))
    text = spoiled.read_bytes()
    begin = data.draw(st.integers(0, len(text)))
    length = data.draw(st.sampled_from([0, 0, 1, 5, 40, len(text)]))
    put = data.draw(st.one_of(st.sampled_from(SCRAPS), st.binary(max_size=8)))
    spoiled.write_bytes(text[:begin] + put + text[begin + length :])
    asked = DataSettings(
        source="files", harmful=str(files[0]), benign=str(files[1]), benign_columns=COLUMNS
    )
    try:
        prompts = file_prompts(asked)
    except ProfileError as error:
        assert "data.harmful" in str(error) or "data.benign" in str(error)
    else:
        assert prompts["harmful"] and prompts["benign"]
        assert all(prompt.prompt.strip() for own in prompts.values() for prompt in own)
