"""Texts of others in Markdown of ours."""

from __future__ import annotations

import html
import re


def verbatim(text: str) -> str:
    """A text that Markdown shows as it is: no tag, link, formula or emphasis in it acts."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+.!|~$^:-])", r"\\\1", html.escape(text, quote=False))
    return " ".join(escaped.split())
