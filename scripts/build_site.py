"""Builds the site of the documentation, as scripts/docs asks for.

    python scripts/build_site.py build/site

The pages are copied to a folder beside it, where docs/troubleshooting.md gets the messages of the
code (`error_messages`), and Zensical makes the site of them. A warning ends it with exit code 1.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from error_messages import PAGE, ROOT, filled


def main(site: Path) -> int:
    """Copy, fill in, build, and put the site in place."""
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent) as place:
        folder = Path(place)
        shutil.copytree(PAGE.parent, folder / "docs")
        text = PAGE.read_text(encoding="utf-8")
        (folder / "docs" / PAGE.name).write_text(filled(text), encoding="utf-8")
        shutil.copy(ROOT / "mkdocs.yml", folder)
        (folder / "kpsvd_tune").symlink_to(ROOT / "kpsvd_tune")
        program = Path(sys.executable).with_name("zensical")
        # Its traceback after a warning says nothing that the warning has not said.
        done = subprocess.run(
            [str(program), "build", "--strict"],
            cwd=folder,
            text=True,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode:
            print(done.stderr.splitlines()[-1], file=sys.stderr)
            return 1
        for page in (folder / "site").glob("*.html"):
            # What docstrings name by roles of Sphinx stands in code already.
            words = page.read_text(encoding="utf-8")
            page.write_text(re.sub(r":[a-z]+:(?=<code)", "", words), encoding="utf-8")
        shutil.rmtree(site, ignore_errors=True)
        shutil.move(folder / "site", site)
    print(site)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    sys.exit(main(Path(sys.argv[1])))
