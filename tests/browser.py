"""What a page does when it is opened in a headless Chromium: nothing, if what it shows is text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

# what nbconvert's own template loads beside the page; it is not let through
LIBRARIES = ("https://cdnjs.cloudflare.com/ajax/libs/",)
ACTS = "a[href^='javascript' i], [onerror*=pwned], [onload*=pwned], [onclick*=pwned]"


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
