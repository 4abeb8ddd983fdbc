"""A headless Chromium that is installed already, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium() -> Iterator[object]:
    """Yield a browser with one profile; skips the test, and says why, where none can be had."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no browser tests: pip install playwright"
    )
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser tests: none of {', '.join(NAMES)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser.new_context()
        finally:
            browser.close()


class Tab:
    """The BatchNorm tab in the stock TensorBoard, as somebody sees it who opens it."""

    def __init__(self, browser, url, link="", size=(1500, 1000)):
        width, height = size
        self.page = browser.new_page()
        self.page.set_viewport_size({"width": width, "height": height})
        self.faults = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: self.faults.append(dialog.message))
        self.page.on("console", self._console)
        self.page.goto(f"{url}#bnguard{link}")
        self.frame = self.page.wait_for_selector("iframe").content_frame()
        self._wait()

    def open(self, link):
        """Open the tab anew by a link, in the light; TensorBoard around it stays."""
        self.page.evaluate("hash => history.replaceState(null, '', hash)", f"#bnguard{link}")
        self.page.evaluate("document.body.classList.remove('dark-mode')")
        self.frame.goto(self.frame.url)
        self._wait()

    def _wait(self):
        self.frame.locator("main:not([hidden]), .empty, .problem").first.wait_for()

    def _console(self, message):
        # TensorBoard's own scripts complain of themselves.
        if message.type == "error" and "plugin/bnguard" in message.location.get("url", ""):
            self.faults.append(message.text)

    def text(self, selector):
        return self.frame.locator(selector).first.inner_text()

    def wait(self, expression):
        """Wait until an expression is true in the page."""
        self.frame.wait_for_function(expression)

    def close(self):
        self.page.close()
        assert self.faults == []
