"""The pipeline on throw-away notebooks: what it leaves behind when all goes well, fails, or is
killed.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from latlib.experiment.run import Run
from latlib.io import progress
from latlib.runner import pipeline

PARAMETERS = "profile = 'smoke'\nout = None"


def write_notebook(folder, name, *sources, parameters=PARAMETERS):
    cells = [new_markdown_cell("# Is it so?")]
    cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells += [new_code_cell(source) for source in sources]
    folder.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")


@pytest.fixture
def place(tmp_path):
    """A folder with a profile; notebooks go to `place / 'notebooks'`, the run to `place / 'run
    dir'`.
    """
    (tmp_path / "mine.yaml").write_text("description: a test\nmethods: {lat: {}}\n")
    return tmp_path


def command(place, *options):
    fixed = ["--profile", str(place / "mine.yaml"), "--out", str(place / "run dir")]
    return [
        sys.executable,
        "-m",
        "latlib.runner.pipeline",
        *fixed,
        "--notebooks",
        str(place / "notebooks"),
        *options,
    ]


def run(place, *options):
    return subprocess.run(
        command(place, *options), capture_output=True, text=True, timeout=280, cwd="/"
    )


def listing(place):
    return sorted(
        p.name for p in (place / "run dir" / "notebooks").iterdir() if not p.name.startswith(".")
    )


def test_whole_run_in_order_with_the_parameters_in_this_python(place):
    # a user's own kernelspec of that name, pointing elsewhere
    kernels = place / "home" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(
        '{"argv": ["/bin/false"], "display_name": "x", "language": "python"}'
    )
    os.environ["JUPYTER_PATH"] = str(place / "home")
    try:
        report = (
            "import sys, os, pathlib\nprint(profile, out, sys.executable,"
            " os.environ['LATLIB_BATCH'])"
        )
        write_notebook(
            place / "notebooks",
            "01_first",
            "from pathlib import Path\n(Path(out) / 'results' / 'own').mkdir()",
        )
        write_notebook(
            place / "notebooks",
            "99_report",
            report,
            "pathlib.Path(out, 'results', 'a').touch(exist_ok=False)",
        )
        done = run(place)
    finally:
        del os.environ["JUPYTER_PATH"]
    assert done.returncode == 0, done.stdout + done.stderr
    folder = place / "run dir"
    assert listing(place) == ["01_first.ipynb", "99_report.ipynb"]
    assert (folder / "report.html").is_file() and done.stdout.endswith(
        f"report: {folder / 'report.html'}\n"
    )
    executed = nbformat.read(folder / "notebooks" / "99_report.ipynb", as_version=4)
    (output,) = executed.cells[3].outputs
    # what a reader is given names no place on this machine, not even in the injected parameters
    assert output.text.split(" ")[:3] == ["mine.yaml", "runs/run", "dir"]
    shown = ("notebooks/99_report.ipynb", "notebooks/01_first.ipynb", "report.html")
    for place_of_ours in (place, Path(sys.prefix), Path.home()):
        for name in (*shown, "logs/99_report.log"):
            assert f"{place_of_ours}/" not in (folder / name).read_text(), (place_of_ours, name)
    assert executed.metadata.papermill.input_path == "99_report.ipynb", (
        "someone's path is in the executed notebook"
    )
    assert f"mine.yaml runs/{folder.name} " in (folder / "logs" / "99_report.log").read_text()
    assert done.stderr == "" and not (folder / "notebooks" / ".unfinished").exists()


def test_the_first_look_becomes_a_page_before_later_notebooks_run(place):
    write_notebook(place / "notebooks", "00_glance", "print('seen')")
    write_notebook(
        place / "notebooks",
        "01_later",
        "import pathlib\nprint((pathlib.Path(out) / 'glance.html').is_file())",
    )
    done = run(place)
    folder = place / "run dir"
    assert done.stdout.endswith(f"report: {folder / 'glance.html'}\n"), done.stdout + done.stderr
    assert "seen" in (folder / "glance.html").read_text()
    executed = nbformat.read(folder / "notebooks" / "01_later.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "True\n"
    assert not (folder / "report.html").exists()


def test_failing_cell_is_named_and_nothing_looks_finished(place):
    write_notebook(place / "notebooks", "01_first", "x = 1")
    write_notebook(
        place / "notebooks", "02_bad", "y = 2", "\n# why\nprint('before'); 1 / 0", "print('never')"
    )
    write_notebook(place / "notebooks", "03_later", "z = 3")
    done = run(place)
    folder = place / "run dir"
    assert done.returncode == 1
    assert listing(place) == ["01_first.ipynb", "02_bad.failed.ipynb"]
    log = folder / "logs" / "02_bad.log"
    closing = done.stdout.splitlines()[-3:]
    assert closing == [
        "failed: 02_bad, cell 4: # why",
        "  ZeroDivisionError: division by zero",
        f"  log: {log}",
    ]
    assert (
        "before\n" in log.read_text()
        and "Traceback" in log.read_text()
        and "\x1b" not in log.read_text()
    )
    write_notebook(place / "notebooks", "02_bad", "y = 2")
    assert run(place, "--only", "2").returncode == 0
    assert listing(place) == [
        "01_first.ipynb",
        "02_bad.ipynb",
    ], "the failed one is still beside the good one"


def test_a_parameter_the_notebook_does_not_have_is_an_error_before_anything_runs(place):
    write_notebook(place / "notebooks", "01_first", "x = 1")
    write_notebook(
        place / "notebooks", "02_old", "x = 1", parameters="profil = 'smoke'\nout = None"
    )
    done = run(place)
    assert done.returncode == 2
    assert (
        "02_old.ipynb" in done.stderr
        and "'profile'" in done.stderr
        and "profil, out" in done.stderr
    )
    assert not (place / "run dir" / "notebooks").exists()


LOOP = """
import os, pathlib, time
from latlib.io.progress import Progress, Stopped, stop_requested
pathlib.Path(out, 'pid').write_text(str(os.getpid()))
with Progress(pathlib.Path(out), 'lat seed 0', 1000) as bar:
    for step in range(1000):
        bar.update(step, 'loss 0.5')
        time.sleep(0.05)
        if OBEYS and stop_requested(pathlib.Path(out)):
            pathlib.Path(out, 'saved').touch()
            raise Stopped('asked to stop')
"""


def started(place, *options):
    """The pipeline, running, and its kernel's process id."""
    process = subprocess.Popen(command(place, *options), stdout=subprocess.PIPE, text=True)
    pid_file = place / "run dir" / "pid"
    for _ in range(1800):
        if pid_file.exists() and pid_file.read_text() and progress.read(place / "run dir"):
            return process, int(pid_file.read_text())
        assert process.poll() is None, "the pipeline ended early"
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the kernel did not start within 90 s")


def test_a_folder_made_with_other_settings_is_refused_before_anything_runs(place):
    write_notebook(place / "notebooks", "01_first", "x = 1")
    assert run(place).returncode == 0
    (place / "mine.yaml").write_text("description: a test\nmethods: {lat: {}}\ntrain: {steps: 7}\n")
    done = run(place)
    assert (
        done.returncode == 2 and "train.steps: 130 -> 7" in done.stderr and "--fresh" in done.stderr
    )
    assert run(place, "--fresh").returncode == 0


def gone(pid, seconds):
    for _ in range(int(seconds / 0.05)):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("kernel_does", "number", "options"),
    [
        ("OBEYS = True", signal.SIGTERM, []),
        ("OBEYS = False  # so SIGINT interrupts it", signal.SIGINT, []),
        (
            (
                "OBEYS = False\nimport signal; signal.signal(signal.SIGINT, signal.SIG_IGN)  # so"
                " it is killed"
            ),
            signal.SIGHUP,
            ["--grace", "4"],
        ),
    ],
)
def test_a_signal_lets_the_kernel_save_and_the_status_is_75(place, kernel_does, number, options):
    write_notebook(place / "notebooks", "01_loop", f"{kernel_does}\n{LOOP}")
    write_notebook(place / "notebooks", "02_next", "x = 1")
    process, pid = started(place, *options)
    assert progress.read(place / "run dir")["label"] == "lat seed 0"
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "same command" in output.splitlines()[-1]
    assert (place / "run dir" / "saved").exists() is ("True" in kernel_does)
    assert gone(pid, 2), "a kernel is left"
    assert listing(place) == [] and not (place / "run dir" / "STOP").exists()


LONG_STEP = """
import os, pathlib, time
from latlib.io.progress import Progress, Stopped, saving_on_signals, stop_requested
pathlib.Path(out, 'pid').write_text(str(os.getpid()))
with Progress(pathlib.Path(out), 'lat seed 0', 1000), saving_on_signals():
    begun = time.monotonic()
    while time.monotonic() < begun + 12:
        sum(range(100_000))
    assert stop_requested(pathlib.Path(out))
    pathlib.Path(out, 'saved').touch()
    raise Stopped('asked to stop')
"""


@pytest.mark.parametrize("to_all", [False, True], ids=["the driver", "every process"])
def test_a_long_step_is_waited_for_and_saved(place, to_all):
    """Also where a scheduler sends the signal to every process."""
    write_notebook(place / "notebooks", "01_loop", LONG_STEP)
    process, pid = started(place)
    if to_all:
        os.kill(pid, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and (place / "run dir" / "saved").exists()
    assert gone(pid, 2), "a kernel is left"


def test_a_second_signal_does_what_it_did_before():
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), progress.saving_on_signals():
            os.kill(os.getpid(), signal.SIGINT)
            assert progress.stop_requested(Path("nowhere"))
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert not progress.stop_requested(Path("nowhere"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_a_killed_pipeline_leaves_nothing_that_looks_finished_and_locks_while_it_runs(place):
    write_notebook(place / "notebooks", "01_loop", "OBEYS = False", LOOP)
    process, pid = started(place)
    try:
        second = run(place)
        assert second.returncode == 2 and "another run is using" in second.stderr
    finally:
        process.kill()
        process.wait()
    assert listing(place) == []
    try:
        assert gone(pid, 60), "the kernel outlives its pipeline"
    finally:
        if not gone(pid, 0.05):
            os.kill(pid, signal.SIGKILL)


def test_a_disk_that_fails_the_driver_itself_is_said_in_a_line(place):
    """As a full one did, with a traceback."""
    write_notebook(place / "notebooks", "01_first", "x = 1")
    (place / "run dir" / "logs" / "01_first.log").mkdir(parents=True)
    (place / "run dir" / "latlib.sha256").touch()
    done = run(place)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "failed: [Errno" in done.stdout and "what was finished is kept" in done.stdout


def test_select_by_number_and_name(place):
    for name in ("01_hooks", "03_lat_training", "99_report"):
        write_notebook(place, name)
    notebooks = pipeline.find_notebooks(place)
    assert [n.stem for n in notebooks] == ["01_hooks", "03_lat_training", "99_report"]
    for only in (["3", "01"], ["lat_training,01_hooks"], ["03_lat_training.ipynb", "1"]):
        assert [n.stem for n in pipeline.choose(notebooks, only)] == ["01_hooks", "03_lat_training"]
    assert pipeline.choose(notebooks, []) == notebooks
    with pytest.raises(pipeline.UsageError, match="--only 04.*01_hooks"):
        pipeline.choose(notebooks, ["04"])
    write_notebook(place, "08_your_model")
    more = pipeline.find_notebooks(place)
    assert pipeline.choose(more, []) == notebooks, "it is of no run of the suite"
    assert [n.stem for n in pipeline.choose(more, ["08"])] == ["08_your_model"]


PROJECT = (".git/HEAD", "thesis.tex", "data/mine.csv", "results/notes.md", "models/mine/a.bin")


def project(folder):
    """Somebody's files, as `left` lists them."""
    for name in PROJECT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"of the user: {name}")


def left(folder):
    """Contents of the user's files, wherever below `folder` they are now."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sorted(t for t in (f.read_text(errors="replace") for f in files) if "of the user" in t)


WORDS = sorted(f"of the user: {name}" for name in PROJECT)


def test_fresh_refuses_a_folder_that_is_no_run_also_with_a_profile_in_it(place):
    """A project with .git, a thesis and its data was deleted, for it had a profile.yaml."""
    write_notebook(place / "notebooks", "01_first", "x = 1")
    folder = place / "run dir"
    project(folder)
    (folder / "profile.yaml").write_text((place / "mine.yaml").read_text())
    done = run(place, "--fresh")
    assert done.returncode == 2 and "is no run folder" in done.stderr
    assert left(folder) == WORDS and not (folder / "models" / "lat-seed0").exists()


def test_fresh_deletes_what_the_run_made_and_sets_the_rest_aside(smoke_models, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(smoke_models, folder)
    project(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "weights").write_text("of the user")
    (folder / "models" / "linked").symlink_to(outside)
    edited = folder / "results" / "residual_norms-seed0.json"
    edited.write_text(f"{edited.read_text()} of the user: noted here")
    for name in (
        "models/.at-seed0.checkpoints/step-00000004.pt",
        "results/.unfinished/claimed-at-seed0/1f/2e.parquet",
        "wandb/run-1/x",
        "logs/01_a.log",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    pipeline.empty_run_folder(folder)
    assert {entry.name for entry in folder.iterdir()} == {"set-aside", ".lock"}
    assert len(left(folder)) == len(WORDS) + 1 and set(WORDS) < set(left(folder))
    assert (outside / "weights").exists()
    kept = [f for f in (folder / "set-aside").rglob("*") if f.is_file() and not f.is_symlink()]
    assert len(kept) == len(WORDS) + 1, "something of the run's was kept"
    Run("smoke", folder)  # and a run begins there
    pipeline.empty_run_folder(folder)
    assert len(left(folder)) == len(WORDS) + 1


def test_fresh_asks_at_a_terminal_before_work_is_lost(smoke_models, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    assert pipeline._agreed(smoke_models) and not asked, "nobody is there to answer"
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    assert pipeline._agreed(tmp_path) and not asked, "there is nothing to lose"
    assert not pipeline._agreed(smoke_models) and "files of models and results" in asked[0]
    monkeypatch.setattr("builtins.input", lambda text: "Y")
    assert pipeline._agreed(smoke_models)


def test_bad_profile_and_bad_option_end_with_status_2(place):
    write_notebook(place / "notebooks", "01_first", "x = 1")
    (place / "mine.yaml").write_text("description: a test\nmethods: {lat: {lr: 8e-5}}\n")
    done = run(place)
    assert done.returncode == 2 and "8.0e-5" in done.stderr and "Traceback" not in done.stderr
    assert run(place, "--frsh").returncode == 2
    (place / "mine.yaml").write_text("description: a test\nmethods: {lat: {}}\n")
    for grace in ("0", "-5", "nan", "1e9"):
        done = run(place, "--grace", grace)
        assert done.returncode == 2 and "--grace" in done.stderr and "Traceback" not in done.stderr
    write_notebook(place / "thesis", "01_mine")
    done = run(place, "--fresh", "--out", str(place / "thesis"))
    assert done.returncode == 2 and "01_mine.ipynb" in done.stderr
    assert [p.name for p in (place / "thesis").iterdir()] == ["01_mine.ipynb"]
    assert not (place / "run dir").exists()


def test_progress_line_shows_label_steps_and_detail(tmp_path):
    progress.Progress(tmp_path, "lat seed 0", 120).update(30, "loss 0.71")
    kernel = pipeline.Kernel(tmp_path, cell=3, cells=9)
    text = pipeline._line("03_lat_training", time.monotonic() - 65, kernel, progress.read(tmp_path))
    assert text.split() == ["03_lat_training", "1:05", "cell", "3/9", "lat", "seed", "0"] + [
        "[###---------]",
        "30/120",
        "loss",
        "0.71",
    ]
    (tmp_path / "progress.json").write_text('{"label": "half a rec')
    assert progress.read(tmp_path) is None


def test_the_line_says_what_is_left_at_the_pace_of_the_last_minutes(tmp_path, monkeypatch):
    """Not before ten seconds, not over a start from a checkpoint, and slower when steps become so."""
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])

    def left():
        return progress.read(tmp_path)["left"]

    with progress.Progress(tmp_path, "lat seed 0", 1) as bar:
        for step in range(50, 101):  # goes on after step 50, two seconds a step
            clock[0] += 2
            bar.on_step(step, 1000, "")
            assert (left() is None) == (step < 55)
        assert left() == pytest.approx(900 * 2)
        kernel = pipeline.Kernel(tmp_path, cell=3, cells=9)
        assert "100/1000, 30 min left" in pipeline._line(
            "03", 1000.0, kernel, progress.read(tmp_path)
        )
        for step in range(101, 201):  # attacked: ten seconds
            bar.on_step(step, 1000, "")
            clock[0] += 10
        assert left() == pytest.approx(800 * 10, rel=0.05)
        bar.on_step(1, 8, "")  # other work
        assert left() is None
        clock[0] += 20
        bar.update(1, started=0.5)  # of jobs that are not done
        assert left() == pytest.approx(6.5 * 20 / 0.5)


def test_the_line_drops_a_bar_whose_work_is_over(tmp_path):
    kernel = pipeline.Kernel(tmp_path, cell=3, cells=9)
    with progress.Progress(tmp_path, "lat seed 0", 2) as bar:
        bar.update(2)
        text = pipeline._line("03_lat_training", time.monotonic(), kernel, progress.read(tmp_path))
        assert text.endswith("cell 3/9  lat seed 0 [############] 2/2")
    text = pipeline._line("03_lat_training", time.monotonic(), kernel, progress.read(tmp_path))
    assert text.endswith("cell 3/9")


def test_progress_is_throttled_but_ends_with_the_last_step(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        progress.Progress, "_write", lambda self, record: written.append(record["step"])
    )
    with progress.Progress(tmp_path, "work", 1000) as bar:
        for step in range(1000):
            bar.update(step + 1)
    assert written[0] == 0 and written[-1] == 1000 and len(written) < 20


def test_the_process_that_workers_are_forked_from_starts_with_the_kernel(place):
    """Before the first cell; and what starts it imports nothing heavy, or the two could not run
    side by side.
    """
    first = "import sys\nlight = 'torch' not in sys.modules"
    second = (
        "from multiprocessing import forkserver\nprint(light,"
        " forkserver._forkserver._forkserver_pid is not None)"
    )
    write_notebook(place / "notebooks", "01_first", first, second)
    done = run(place)
    assert done.returncode == 0, done.stdout + done.stderr
    executed = nbformat.read(place / "run dir" / "notebooks" / "01_first.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "True True\n"


# ---- the report so far

# of a report: what is there, and what was given
REPORT = """
from pathlib import Path
from IPython.display import HTML, display
print(f'of {Path(profile).name}:', *sorted(p.stem for p in Path(out, 'notebooks').glob('0*')))
display(HTML('<p>a figure</p>'))
"""
WAITS = """
import time
from pathlib import Path
started = time.monotonic()
while not ({condition}) and time.monotonic() < started + 200:
    time.sleep(0.05)
assert {condition}
"""
WRITTEN = "Path(out, 'report.html').exists()"


def test_the_report_so_far_is_written_beside_the_next_notebook(place):
    notebooks = place / "notebooks"
    write_notebook(notebooks, "00_glance", "x = 0")
    write_notebook(notebooks, "01_first", "x = 1")
    keep = "Path(out, 'results', 'so_far.html').write_text(Path(out, 'report.html').read_text())"
    of_both = f"{WRITTEN} and '00_glance 01_first' in Path(out, 'report.html').read_text()"
    write_notebook(notebooks, "02_second", WAITS.format(condition=of_both), keep)
    write_notebook(notebooks, "03_third", "x = 3")
    write_notebook(notebooks, "99_report", REPORT, "'the last expression'")
    done = run(place)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    folder = place / "run dir"
    so_far = (folder / "results" / "so_far.html").read_text()
    assert "of mine.yaml: 00_glance 01_first\n" in so_far, (
        "the state then, with the run's parameters"
    )
    assert "<p>a figure</p>" in so_far and "the last expression" in so_far
    top = so_far.index("Not run yet")
    assert so_far.index("Is it so?</h1>") < top < so_far.index("of mine.yaml")
    assert "<code>02_second</code>, <code>03_third</code>." in so_far[top : top + 100]
    assert f"{place}/" not in so_far and 'href="glance.html"' in so_far
    last = (folder / "report.html").read_text()
    assert (
        "of mine.yaml: 00_glance 01_first 02_second 03_third\n" in last
        and "Not run yet" not in last
    )
    assert done.stdout.count(f"report so far: {folder / 'report.html'}\n") == 1
    assert not list(folder.glob(".report.html*"))
    again = run(place)
    assert again.returncode == 0 and "so far" not in again.stdout, "nothing is lacking now"


def test_a_report_so_far_that_fails_is_in_the_log_and_fails_nothing(place):
    notebooks = place / "notebooks"
    write_notebook(notebooks, "01_first", "x = 1")
    failed = "'ZeroDivisionError' in Path(out, 'logs', 'report_so_far.log').read_text()"
    write_notebook(notebooks, "02_second", WAITS.format(condition=failed), f"assert not {WRITTEN}")
    write_notebook(
        notebooks, "99_report", REPORT, "1 / Path(out, 'notebooks/02_second.ipynb').exists()"
    )
    done = run(place)
    assert done.returncode == 0 and "so far" not in done.stdout, done.stdout + done.stderr
    assert "01_first 02_second\n" in (place / "run dir" / "report.html").read_text()


def test_there_is_none_without_a_report(place):
    for name in ("01_first", "02_second", "99_report"):
        write_notebook(place / "notebooks", name, "x = 1")
    done = run(place, "--only", "01,02")
    assert done.returncode == 0 and "report" not in done.stdout
    assert not (place / "run dir" / "logs" / "report_so_far.log").exists()


SLOW_REPORT = """
import os, time
from pathlib import Path
if not Path(out, 'notebooks', '02_second.ipynb').exists():
    Path(out, 'reporter').write_text(f'{os.getpid()} {os.nice(0)}')
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_reporter_is_left_after_a_stop_or_a_kill(place, number):
    notebooks = place / "notebooks"
    write_notebook(notebooks, "01_first", "x = 1")
    write_notebook(notebooks, "02_second", "OBEYS = True", LOOP)
    write_notebook(notebooks, "99_report", SLOW_REPORT)
    process, kernel = started(place)
    pid, niceness = reporter(place)
    assert niceness > os.nice(0), "it would take time from the notebook"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert gone(pid, 60), "a reporter is left"  # it would sleep for 600 s
    assert not list((place / "run dir").glob("*report.html*"))
    assert gone(kernel, 60)


def reporter(place):
    """Process id and niceness of what writes the report so far, once it does."""
    file = place / "run dir" / "reporter"
    for _ in range(4000):
        if file.exists() and (text := file.read_text()):
            return [int(word) for word in text.split()]
        time.sleep(0.05)
    raise AssertionError("no report was begun within 200 s")


LAST_REPORT = """
reporter = int(Path(out, 'reporter').read_text().split()[0])
try:
    os.kill(reporter, 0)
except ProcessLookupError:
    print('alone')
"""


def test_the_last_report_waits_for_no_other_and_is_alone(place):
    """One that hangs while the run's own report is due is taken away first."""
    notebooks = place / "notebooks"
    write_notebook(notebooks, "01_first", "x = 1")
    begun = "Path(out, 'reporter').exists()"
    write_notebook(notebooks, "02_second", WAITS.format(condition=begun))
    write_notebook(notebooks, "99_report", SLOW_REPORT, LAST_REPORT)
    done = run(place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "alone" in (place / "run dir" / "report.html").read_text()


# ---- on a terminal

BAR = """
import time
from pathlib import Path
from latlib.io.progress import Progress
with Progress(Path(out), 'lat seed 0', 2) as bar:
    time.sleep(1)
    bar.update(1)
    time.sleep(1)
    bar.update(2)
    time.sleep(1)
"""


def test_on_a_terminal_one_line_is_drawn_anew_and_drops_a_finished_bar(place):
    import pty

    write_notebook(place / "notebooks", "01_first", BAR, "time.sleep(1)")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(place), stdout=theirs, cwd="/")
    os.close(theirs)
    seen = b""
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # its end on Linux
            break
        if not more:
            break
        seen += more
    os.close(ours)
    assert process.wait(60) == 0
    first, *drawn = seen.decode().replace("\r\n", "\n").split("\r\x1b[2K")
    assert first.startswith("profile mine: 1 notebook(s)")
    half, full = (f"lat seed 0 [{bar}] {n}/2" for n, bar in ((1, "######------"), (2, "#" * 12)))
    bars = [text for text in drawn if "lat seed 0" in text]
    assert any(half in text for text in bars) and full in bars[-1]
    after = drawn[max(i for i, text in enumerate(drawn) if text in bars) + 1 :]
    assert "cell 4/4" in after[-2] and all("[" not in text for text in after)
    summary, total = after[-1].splitlines()
    assert summary.startswith("01_first") and summary.endswith("ok")
    assert total.startswith("all ") and total.endswith("ok")
    assert all(len(text) < 80 and "\n" not in text for text in drawn[:-1])
