"""Take the figures of a comparison's page as PNG files, for documents.

    python scripts/comparison_pictures.py runs/study/comparison.html docs/pictures

Writes curves.png, front.png, rates.png and norms.png. Needs Chromium and the package playwright;
the page is drawn by the browser, so the pictures show what a reader of the page sees.
"""

from __future__ import annotations

import base64
import shutil
import sys
from pathlib import Path

FIGURES = ("curves", "front", "rates", "norms")
WIDTH, HEIGHT = 760, 460  # pixels


def main() -> None:
    """Open the page, ask plotly.js for each figure."""
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} PAGE FOLDER")
    page_file, folder = map(Path, sys.argv[1:])
    browser_file = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_file is None:
        sys.exit(
            "comparison_pictures: found no chromium; install it (Debian: apt install chromium)"
        )
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        page = browser.new_page(color_scheme="light", viewport={"width": 1400, "height": 1200})
        page.goto(page_file.absolute().as_uri())
        for name in FIGURES:
            page.wait_for_selector(f"#{name} .main-svg")
            address = page.evaluate(
                """([name, width, height]) => {
                    const figure = document.getElementById(name);
                    return Plotly.toImage({data: figure.data, layout: {...figure.layout,
                        paper_bgcolor: "#fff", plot_bgcolor: "#fff"}},
                        {format: "png", width, height, scale: 2});
                }""",
                [name, WIDTH, HEIGHT],
            )
            content = base64.b64decode(address.partition(",")[2])
            (folder / f"{name}.png").write_bytes(content)
            print(folder / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
