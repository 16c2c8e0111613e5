"""What a notebook shows of work: a bar while it is done, which is nowhere in the file that is saved,
and a line where it was stopped."""

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

CODE = """
import pathlib, time
from latlib.io.progress import MIN_INTERVAL_S, Progress
print("before")
with Progress(pathlib.Path({file!r}), "lat <seed> 0", 3) as bar:
    for step in (1, 2):
        time.sleep(2 * MIN_INTERVAL_S)
        bar.update(step, "loss 0.7")
print("after")
"""


def test_a_bar_is_drawn_in_place_and_leaves_nothing_in_the_notebook(tmp_path, monkeypatch):
    monkeypatch.delenv("LATLIB_BATCH")
    cell = new_code_cell(CODE.format(file=str(tmp_path / "progress.json")))
    drawn = []

    class Client(NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if msg["msg_type"] == "update_display_data":
                drawn.append(msg["content"]["data"])
            return super().process_message(msg, cell, cell_index)

    Client(new_notebook(cells=[cell]), kernel_name="python3").execute()
    shown = [data["text/html"] for data in drawn if data]
    assert len(shown) >= 3 and '<progress value="2" max="3">' in shown[-1]
    assert "lat &lt;seed&gt; 0 2/3 loss 0.7" in shown[-1]
    outputs = [output for output in cell.outputs if output.output_type != "stream"]
    assert [output.data for output in outputs] == [{}], "something of the bar is left"
    assert "".join(o.text for o in cell.outputs if o.output_type == "stream") == "before\nafter\n"
    nbformat.validate(new_notebook(cells=[cell]))


def test_who_interrupts_reads_one_line():
    cell = new_code_cell(
        "import os, pathlib, signal\n"
        "from latlib.io.progress import Stopped, saving_on_signals, stop_requested\n"
        "with saving_on_signals():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop_requested(pathlib.Path('nowhere'))\n"
        "    raise Stopped('lat seed 0: stopped after step 3 with everything saved')"
    )
    with pytest.raises(CellExecutionError):
        NotebookClient(new_notebook(cells=[cell]), kernel_name="python3").execute()
    (error,) = [output for output in cell.outputs if output.output_type == "error"]
    assert error.traceback == [
        "lat seed 0: stopped after step 3 with everything saved; run again to continue"
    ]
