"""A browser for the pages of reports."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Opened(NamedTuple):
    """A page in a browser, what it complained of, and every address that it asked for."""

    page: Any  # playwright's
    complaints: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Callable[..., Opened]]:
    """Opens a file in headless Chromium; its page is closed with the test."""
    pages: list[Any] = []

    def open_page(path: Path, *, scheme: str = "light", width: int = 1200) -> Opened:
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.set_default_timeout(60_000)
        opened = Opened(page, [], [])
        page.on("console", lambda message: opened.complaints.append(message.text))
        page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto(path.as_uri())
        return opened

    yield open_page
    for page in pages:
        page.close()


@pytest.fixture
def fits_width() -> Callable[[Any, int], bool]:
    """Whether a page made so wide has nothing beside it to scroll to."""

    def fits(page: Any, width: int) -> bool:
        page.set_viewport_size({"width": width, "height": 844})
        for _ in range(50):  # the figures follow the width a moment later
            if page.evaluate("document.documentElement.scrollWidth") == width:
                return True
            page.wait_for_timeout(100)
        return False

    return fits
