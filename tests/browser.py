"""Headless Chromium for the tests of HTML pages: what a page logged, asked the network for, and looks like.

It starts once a module, and every page has a context of its own: cookies, cache and preferences.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason="needs chromium and playwright"
)
"""Marks tests that open a page."""


@dataclass
class Page:
    """An open page.

    Args:
        handle: playwright's page, for clicks and keys.
        errors: console errors and uncaught exceptions so far.
        requests: every URL asked for, the page itself included.
        load_seconds: until the load event, scripts run.
    """

    handle: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    load_seconds: float = 0.0

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript expression or function."""
        return self.handle.evaluate(script, argument)

    def screenshot(self, path: Path, *, full: bool = False) -> Path:
        """Save what is visible, or the whole page."""
        self.handle.screenshot(path=str(path), full_page=full)
        return path

    def outside(self) -> list[str]:
        """Requests that leave the file."""
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:", "about:"))]


OpenPage = Callable[..., AbstractContextManager[Page]]
"""What the fixture `open_page` gives: `opened` in the module's browser."""


@pytest.fixture(scope="module")
def open_page() -> Iterator[OpenPage]:
    """A function that opens files in the module's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield partial(opened, browser)
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Any, path: Path, width: int = 1440, height: int = 900, *, dark: bool = False, still: bool = True
) -> Iterator[Page]:
    """Open a file where nothing was opened before.

    Args:
        browser: playwright's browser.
        path: the HTML file.
        width: of the window, in CSS pixels.
        height: the same.
        dark: prefer dark colours.
        still: prefer reduced motion.
    """
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce" if still else "no-preference",
    )
    try:
        tab = context.new_page()
        page = Page(tab)
        tab.on("console", lambda line: page.errors.append(line.text) if line.type == "error" else None)
        tab.on("pageerror", lambda error: page.errors.append(str(error)))
        tab.on("request", lambda request: page.requests.append(request.url))
        tab.goto(path.resolve().as_uri(), wait_until="load")
        page.load_seconds = (
            tab.evaluate(
                "(() => { const t = performance.getEntriesByType('navigation')[0]; return t.loadEventStart; })()"
            )
            / 1000
        )
        yield page
    finally:
        context.close()
