"""The bar of a notebook: seen while the work is done, and nowhere in the file that is saved."""

import nbformat
from nbclient import NotebookClient
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
