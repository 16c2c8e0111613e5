"""Outages of the hub: what is asked of it is asked again, a few times and ever more rarely.

1. An outage is a connection that fails or breaks, too many requests (429), or an error of the
   server (5xx). A refusal (401, 403, 404), and a hub that is switched off, are none: nobody waits.
2. Each further try is said in a line; those of the hub's own client are not. After WAITS, or
   LONGEST_S, the outage is raised; the caller says what to do (`FIX`).
What is in the hub's cache is read from there without a wait, as the hub's own client does.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from latlib.io.messages import in_a_line

# our choice: the hub's client itself tries for up to 23 s before it gives up on a file
WAITS = (2.0, 6.0, 18.0)
LONGEST_S = 90.0  # after which no further try begins
FIX = (
    "check the network and https://status.huggingface.co, then give the same command again, which"
    " continues; or download it elsewhere and give the path"
)
# by name: the hub's client has been requests, httpx and httpx2, and `datasets` has its own
_BROKEN = {"ConnectionError", "TimeoutError", "TransportError", "gaierror"}
_SWITCHED_OFF = "OfflineModeIsEnabled"
Found = TypeVar("Found")


def through_outages(call: Callable[[], Found], what: str) -> Found:
    """What `call` gives. what: is asked for, for the lines. Raises what `call` raises, of an outage
    after the last try."""
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    started = time.monotonic()
    for number, wait in enumerate(WAITS, start=1):
        try:
            return call()
        except Exception as error:
            late = time.monotonic() + wait - started > LONGEST_S
            if late or not is_outage(error):
                raise
            said = f"{what}: the hub does not answer ({in_a_line(error)})"
            line = f"{said}; try {number + 1} of {len(WAITS) + 1} in {wait:.0f} s"
            print(line, file=sys.stderr, flush=True)
        time.sleep(wait)
    return call()


def is_outage(error: BaseException) -> bool:
    """Whether it, or what led to it, is an outage."""
    chain = list(causes(error))
    # `datasets` keeps it in its text alone
    if any(_SWITCHED_OFF in f"{type(cause).__name__} {cause}" for cause in chain):
        return False
    for cause in chain:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status == 429 or status >= 500
        if _BROKEN & {kind.__name__ for kind in type(cause).__mro__}:
            return True
    return False


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
