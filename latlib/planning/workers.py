"""How many jobs of a run are done side by side, and on how many threads each. Loads no torch.

On a CPU there is one worker per core, on a GPU there is one. Where several processes train one
model together (`latlib.experiment.launch`), a worker has as many cores, or all the GPUs. The
organism's kernels are so small that a second thread costs more than it brings (measured:
docs/lab-log.md), so it runs on one thread a process; that also makes its results independent of who
works beside whom.
"""

from __future__ import annotations

from latlib.config.profile import Profile
from latlib.io.machine import available_cores, resolve_device

MOST_WORKERS = 8  # each holds its own copy of torch, about 0.5 GiB


def worker_count(profile: Profile, jobs: int) -> int:
    """How many jobs are done side by side."""
    together = profile.parallel.processes
    if resolve_device(profile.model.device).type != "cpu":
        return min(jobs, profile.workers or 1) if together == 1 else 1
    workers = profile.workers or min(available_cores(), MOST_WORKERS)
    return min(jobs, max(1, workers // together))


def threads_for(profile: Profile, processes: int = 1) -> int:
    """Threads of each of so many processes: one for the organism, an equal share of the cores for
    other models.
    """
    return 1 if profile.model.source == "world" else max(1, available_cores() // processes)
