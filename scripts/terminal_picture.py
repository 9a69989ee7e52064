"""Runs commands and draws what a terminal shows of them, as an SVG that fetches nothing.

    python scripts/terminal_picture.py docs/pictures/terminal.svg "kpsvd-tune report runs/tickets"

The words are what the commands print, errors included; a command that fails ends it. The picture
in the README is of the run of docs/afternoon.md.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 110  # columns
MOST = 24  # lines of a command; of a longer one the middle is left out


def shown(line: str) -> list[str]:
    """What a command prints."""
    words = shlex.split(line)
    words[0] = str(Path(sys.executable).with_name(words[0]))
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": str(WIDTH)},
        check=False,
    )
    if done.returncode:
        sys.exit(f"{line} ended with {done.returncode}:\n{done.stdout}")
    lines = done.stdout.rstrip().splitlines()
    if len(lines) > MOST:
        lines[MOST // 2 : -MOST // 2] = ["…"]
    return lines


def main() -> None:
    """Run, record, write."""
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} FILE COMMAND...")
    file, commands = Path(sys.argv[1]), sys.argv[2:]
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        for line in commands:
            console.print(Text.assemble(("$ ", "green"), (line, "bold")))
            for each in shown(line):
                console.print(Text.from_ansi(each), overflow="ellipsis", no_wrap=True)
    svg = console.export_svg(title=commands[0].split()[0], unique_id="terminal")
    # rich's own form asks a server for the font, and names its home in a comment.
    svg = re.sub(r"@font-face \{.*?\}\n|<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code, monospace", "DejaVu Sans Mono, Menlo, Consolas, monospace")
    file.write_text(svg, encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
