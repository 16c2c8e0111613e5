"""Texts that would act if they were taken for markup, and secrets that may stand nowhere.

Whatever acts opens a dialog, asks evil.invalid, or leaves an element or an attribute that names
`pwned`.
"""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from bs4 import BeautifulSoup

ACT = "alert(self.pwned)"  # Markdown, too, takes it for an attribute's value
TEXTS = (
    f"<script>{ACT}</script>",
    f"<img src=x onerror={ACT}>",
    f"[x](javascript:{ACT})",
    f'![x](x" onerror="{ACT})',
    "![x](https://evil.invalid/pwned.png)",
    f"</pre></code></script><svg onload={ACT}>",
    "\x1b[31mpwned\x1b]0;pwned\x07\x1b[2J",
    f"$$\\href{{javascript:{ACT}}}{{x}}$$",
    "\u202epwned\u202c \u2066x\u2069",
    f"<!-- pwned --><iframe srcdoc='<script>parent.{ACT}</script>'>",
    f"| a | <b onclick={ACT}>b</b> |\n|---|---|\n> # `x` **pwned** alert(1)",
    f"<style>@import 'https://evil.invalid/pwned';</style><a href=javascript:{ACT}>x</a>",
)
NAME = f"it's ` <img src=x onerror={ACT}> & [x](javascript:{ACT})"  # of a file or folder: no slash

SECRETS = {
    name: f"canary-{name.lower().replace('_', '-')}-7f3a9c"
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "OPENAI_API_KEY",
        "ANTHROPIC_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "HOME",
        "USER",
        "LOGNAME",
    )
}


def made_hostile(texts: Iterable[str]) -> list[str]:
    """Every text with an image that acts behind it, and another of TEXTS."""
    return [f"{text} {TEXTS[1]} {TEXTS[i % len(TEXTS)]}" for i, text in enumerate(texts)]


def acting(html: str) -> list[str]:
    """The elements of a page that one of TEXTS, or a NAME, has become or is a part of."""
    found = []
    for tag in BeautifulSoup(html, "html.parser").find_all(True):
        attributes = [f"{name}={value}" for name, value in tag.attrs.items() if name != "alt"]
        inside = tag.get_text() if tag.name in ("script", "style") else ""
        if "pwned" in inside + " ".join(attributes):
            found.append(str(tag)[:200])
    return found


def readable(file: Path) -> bytes:
    """All bytes of a file, and what is in it where it is packed; where a link leads; of a folder
    nothing."""
    if file.is_symlink():
        return bytes(file.readlink())
    if file.is_dir():
        return b""
    content = file.read_bytes()
    if file.suffix == ".parquet":
        content += pd.read_parquet(file).astype(str).to_csv().encode()
    if zipfile.is_zipfile(file):  # as torch's own files are
        with zipfile.ZipFile(file) as packed:
            content += b"".join(map(packed.read, packed.namelist()))
    if content[:2] == b"\x1f\x8b":
        content += gzip.decompress(content)
    return content
