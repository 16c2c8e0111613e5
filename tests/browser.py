"""What a page does when it is opened in a headless Chromium: nothing, if what it shows is text. And
what keeps somebody from reading it, as axe-core finds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

# what nbconvert's own template loads beside the page; it is not let through
LIBRARIES = ("https://cdnjs.cloudflare.com/ajax/libs/",)
ACTS = "a[href^='javascript' i], [onerror*=pwned], [onload*=pwned], [onclick*=pwned]"


VIEWS = (("light", 1400), ("dark", 400))  # colour scheme, width of the window
GRAVE = ("serious", "critical")
# what nbconvert's own template draws so, whatever the notebook: prompts and code in colours too pale,
# links without a line below
NBCONVERT = [
    [".jp-InputPrompt"],
    [".jp-OutputPrompt"],
    [".highlight"],
    [".jp-RenderedHTMLCommon a"],
]


@dataclass
class Seen:
    """requests: of all but the page itself and nbconvert's LIBRARIES."""

    acting: int = 0
    dialogs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)
    text: str = ""

    @property
    def acts(self) -> bool:
        """Whether something happened that text does not do."""
        return bool(self.acting or self.dialogs or self.requests)


def opened(browser, file: Path) -> Seen:
    """What is seen of a page that is opened; nothing it asks for is let through."""
    seen = Seen()
    page = browser.new_page()

    def route(found):
        url = found.request.url
        if url == file.as_uri():
            found.continue_()
            return
        known = url.startswith(LIBRARIES)
        (seen.libraries if known else seen.requests).append(url)
        found.abort()

    def dialog(found):
        seen.dialogs.append(found.message)
        found.dismiss()

    page.route("**/*", route)
    page.on("dialog", dialog)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", lambda m: m.type == "error" and seen.errors.append(m.text))
    page.goto(file.as_uri(), wait_until="load")
    page.wait_for_timeout(200)
    seen.acting = page.locator(ACTS).count()
    seen.text = page.evaluate("document.body.textContent")
    seen.requests = [url for url in seen.requests if not url.startswith(("data:", "blob:"))]
    page.close()
    return seen


def barriers(browser, file: Path) -> dict[str, list[str]]:
    """Rule of axe-core -> elements of a page that break it, of serious and critical ones, with
    everything unfolded; NBCONVERT is left out.
    """
    tools = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
    )
    found: dict[str, list[str]] = {}
    for scheme, width in VIEWS:
        view = {"width": width, "height": 900}
        page = browser.new_page(viewport=view, color_scheme=scheme)
        page.route("**/*", lambda r: r.continue_() if r.request.url == file.as_uri() else r.abort())
        page.goto(file.as_uri(), wait_until="load")
        page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
        for one in tools.Axe().run(page, {"exclude": NBCONVERT}).response["violations"]:
            if one["impact"] in GRAVE:
                elements = [f"{scheme}, {width}: {node['html'][:200]}" for node in one["nodes"]]
                found[one["id"]] = found.get(one["id"], []) + elements
        page.close()
    return found
