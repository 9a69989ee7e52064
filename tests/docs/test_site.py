"""The site of the documentation: built without a warning, whole, and by itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from page_commands import DOCS, ROOT

import kpsvd_tune.adapter
import kpsvd_tune.linalg

# What a page would load by itself, in HTML and in style sheets.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(https?:[^"' >]+)"""
    r"""|<link[^>]*rel=["']?(?:stylesheet|preload|preconnect)[^>]*href=["']?(https?:[^"' >]+)"""
    r"""|url\(["']?(https?:[^"')]+)|@import\s+["'](https?:[^"']+)"""
)


def nav() -> list[str]:
    """The pages that mkdocs.yml lists, in its order."""

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        assert not isinstance(children, int)
        return [page for child in children for page in pages(child)]  # type: ignore[attr-defined]

    return pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as scripts/docs builds it."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "build_site.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "issue" not in done.stdout
    return folder


def test_every_page_stands_once_in_the_nav():
    pages = nav()
    assert sorted(pages) == sorted({*pages}), "a page is listed twice"
    assert set(pages) == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


@pytest.mark.slow
def test_the_site_has_every_page_and_picture(site: Path):
    for page in nav():
        assert (site / page).with_suffix(".html").is_file()
    for picture in (DOCS / "pictures").iterdir():
        assert (site / "pictures" / picture.name).is_file()


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path):
    assert LOADED.search('<link rel="stylesheet" href="https://fonts.example/a.css">')
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        found = LOADED.search(file.read_text(encoding="utf-8"))
        assert found is None, f"{file.relative_to(site)} loads from elsewhere"


@pytest.mark.slow
def test_the_python_page_has_every_public_name(site: Path):
    page = (site / "api.html").read_text(encoding="utf-8")
    for package in (kpsvd_tune.adapter, kpsvd_tune.linalg):
        for name in package.__all__:
            place = rf'id="{package.__name__}[\w.]*\.{name}"'
            assert re.search(place, page) or name == "FORMS", name


@pytest.mark.slow
def test_the_site_finds_a_message_by_its_words(site: Path):
    page = (site / "troubleshooting.html").read_text(encoding="utf-8")
    assert "there is no such folder or file, and it is no hub id either" in page
    assert "brings Python code of its own" in page
