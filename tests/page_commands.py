"""The commands of the documentation: where they stand, and how tests run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted(DOCS.rglob("*.md")),
]


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page that are marked with one of the languages."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in fenced if language in languages]


def commands(page: Path) -> list[str]:
    """The command lines of a page's shell blocks, continued lines joined, comments left in."""
    text = "\n".join(blocks(page, "bash", "sh", "console")).replace("\\\n", " ")
    lines = [re.sub(r"\s+", " ", line.strip()) for line in text.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line and not line.startswith("#")]
