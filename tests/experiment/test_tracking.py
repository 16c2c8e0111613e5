"""Metrics reach the JSONL whatever wandb does, and the offline wandb run says the same."""

import json
import os
import subprocess
import sys
import time

import pytest

from latlib.config.sections import TrackingSettings
from latlib.experiment import tracking
from latlib.experiment.tracking import (
    Tracker,
    choose_mode,
    find_offline_run,
    read_metrics,
    read_offline_run,
)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_is_valid_json_line_by_line_and_flushed(tmp_path):
    path = tmp_path / "metrics" / "lat.jsonl"
    with Tracker(path, TrackingSettings(wandb="disabled"), "lat") as tracker:
        tracker.log(0, total=1.5, kl=float("nan"), grad=float("inf"))
        assert lines(path) == [{"step": 0, "total": 1.5, "kl": None, "grad": None}], (
            "not flushed or not JSON"
        )
        tracker.log(1, total=0.5)
    assert read_metrics(path)["total"].tolist() == [1.5, 0.5]
    assert "wandb" not in json.dumps(os.listdir(tmp_path))


def test_resume_drops_what_will_be_logged_again(tmp_path):
    path = tmp_path / "lat.jsonl"
    off = TrackingSettings(wandb="disabled")
    with Tracker(path, off, "lat") as tracker:
        for step in range(5):
            tracker.log(step, total=step)
    with path.open("a") as file:
        file.write('{"step": 5, "tot')  # the process was killed in the middle of a line
    with Tracker(path, off, "lat", resume_from=3) as tracker:
        tracker.log(3, total=30)
    assert [(r["step"], r["total"]) for r in lines(path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    with Tracker(path, off, "lat"):
        pass
    assert lines(path) == [], "a run from the start keeps lines of an older one"


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "lat.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_offline_run_holds_the_same_numbers_also_after_a_resume(tmp_path):
    path = tmp_path / "metrics" / "lat.jsonl"
    for start, stop in ((0, 4), (2, 6)):
        with Tracker(path, TrackingSettings(), "lat", {"seed": 0}, start) as tracker:
            for step in range(start, stop):
                tracker.log(
                    step, total=1 / (step + 1 + start), kl=float("nan") if step == 1 else 0.1
                )
    folder = tmp_path / "wandb"
    newest = max(folder.glob("wandb/offline-run-*"), key=lambda run: run.stat().st_mtime_ns)
    assert find_offline_run(folder, "lat") == newest and find_offline_run(folder, "at") is None
    ours, theirs = read_metrics(path), read_offline_run(newest)
    assert len(ours) == 6 and theirs["step"].tolist() == ours["step"].tolist()
    assert theirs["total"].tolist() == ours["total"].tolist()
    assert theirs["kl"].isna().tolist() == ours["kl"].isna().tolist()
    entries = list(folder.rglob("*"))
    assert not [f for f in entries if f.is_symlink() and f.readlink().is_absolute()]
    files = [f for f in entries if f.is_file()]
    assert not [f for f in files if str(tmp_path).encode() in f.read_bytes()], "a path of ours"


def test_online_only_with_a_key(monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    url = "http://127.0.0.1:8080"
    assert choose_mode("online", url)[0] == "offline" and "key" in choose_mode("online", url)[1]
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert choose_mode("online", url) == ("online", "")
    assert choose_mode("offline", url) == ("offline", ""), "offline was asked for"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode("online", url)[0] == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("online", url)[0] == "disabled"


SILENT_SERVER = """
import http.server, os, socket, sys, threading, time
from pathlib import Path
from latlib.config.sections import TrackingSettings
from latlib.experiment.tracking import Tracker
server = socket.create_server(("127.0.0.1", 0))  # accepts connections, never answers one
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}"
os.environ["WANDB_API_KEY"] = "k" * 40
if sys.argv[1] == "closed":
    server.close()
if sys.argv[1] == "broken":
    class Broken(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_error(500)
        do_GET = do_POST
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
print(time.monotonic())
for name in ("lat", "at", "ssft"):  # as a run that trains three models in a process
    with Tracker(Path(f"metrics/{name}.jsonl"), TrackingSettings(wandb="online"), name) as tracker:
        before = time.monotonic()
        tracker.log(0, total=1.0)
        assert time.monotonic() - before < 0.1, "training waits for W&B"
"""


@pytest.mark.parametrize("server", ["silent", "closed", "broken"])
def test_a_server_that_does_not_answer_costs_a_run_less_than_15_seconds(tmp_path, server):
    env = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", SILENT_SERVER, server],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - float(done.stdout) < 15, (
        "from opening the tracker to the end of the process"
    )
    assert "offline" in done.stderr
    for name in ("lat", "at", "ssft"):
        assert lines(tmp_path / "metrics" / f"{name}.jsonl") == [{"step": 0, "total": 1.0}]
        run_dir = find_offline_run(tmp_path / "wandb", name)
        assert read_offline_run(run_dir)["total"].tolist() == [1.0], "not recorded offline instead"


def test_wandb_failing_or_hanging_stops_nothing(tmp_path, monkeypatch, capsys):
    def fails(self, wandb):
        raise OSError("no space left on device")

    monkeypatch.setattr(Tracker, "_start_run", fails)
    with Tracker(tmp_path / "metrics" / "a.jsonl", TrackingSettings(), "a") as tracker:
        tracker.log(0, total=1.0)
    assert "no space left" in capsys.readouterr().err

    monkeypatch.setattr(Tracker, "_hangs", False)  # put back afterwards
    monkeypatch.setattr(Tracker, "_start_run", lambda self, wandb: time.sleep(3))
    monkeypatch.setattr(tracking, "FINISH_WAIT_S", 0.3)
    started = time.monotonic()
    with Tracker(tmp_path / "metrics" / "b.jsonl", TrackingSettings(), "b") as tracker:
        tracker.log(0, total=2.0)
    for value in range(3, 9):  # further models of the process
        with Tracker(tmp_path / "metrics" / f"b{value}.jsonl", TrackingSettings(), "b") as tracker:
            tracker.log(0, total=value)
    assert time.monotonic() - started < 1.5, "a W&B that hangs was waited for again"
    assert "left alone" in capsys.readouterr().err
    found = [lines(tmp_path / "metrics" / f"{name}.jsonl") for name in ("a", "b", "b8")]
    assert found == [[{"step": 0, "total": v}] for v in (1.0, 2.0, 8.0)]
