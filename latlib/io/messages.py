"""What an error says, as one line: what matters may stand in its first line or in its last."""

from __future__ import annotations

LONGEST, HEAD = 1000, 400  # letters: of a line, and of its beginning where its middle is left out


def in_a_line(error: BaseException | str) -> str:
    """All lines of an error's message as one; the error's kind where it says nothing. Of a long one
    the beginning and the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    joined = ""
    for line in lines:
        if joined:
            joined += " " if joined.endswith((":", ";", ",", ".", "(", "^")) else "; "
        joined += line
    if len(joined) > LONGEST:
        joined = f"{joined[:HEAD]} ... {joined[HEAD - LONGEST :]}"
    return joined or type(error).__name__
