"""The process that workers are forked from: it imports latlib once and uses no thread. Imports
nothing heavy itself.

Its imports take as long as a notebook's own, so the pipeline starts it with the kernel: the two run
side by side.
"""

from __future__ import annotations

from multiprocessing import forkserver, get_all_start_methods, get_context
from multiprocessing.context import BaseContext

PRELOADED = ["latlib.experiment.run"]


def available() -> bool:
    """Whether this platform has fork servers."""
    return "forkserver" in get_all_start_methods()


def context() -> BaseContext:
    """How workers are started here: forked from the server, or anew where there is none."""
    if not available():
        return get_context("spawn")
    found = get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def start() -> None:
    """Start the server without waiting for it."""
    if available():
        context()
        forkserver.ensure_running()
