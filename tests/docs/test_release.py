"""What a release needs: one version, a citation, a Dockerfile, extras that are there."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from page_commands import ROOT

from kpsvd_tune import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_the_newest_of_the_changelog_and_of_the_citation():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(r"^## (\d[\w.]*) - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    assert found is not None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found[1] == __version__ == citation["version"]
    assert found[2] == str(citation["date-released"])
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_all_names_every_extra_for_users_but_two():
    (everything,) = PROJECT["optional-dependencies"]["all"]
    named = set(re.split(r"[\[\],]", everything)[1:-1])
    # deepspeed is compiled where it is installed, for several GPUs alone; ray is for clusters.
    others = {"all", "deepspeed", "dev", "docs", "ray"}
    assert named == PROJECT["optional-dependencies"].keys() - others


def test_what_builds_the_docs_is_among_the_tools_of_development():
    extras = PROJECT["optional-dependencies"]
    assert set(extras["docs"]) <= set(extras["dev"])


def test_the_dockerfile_has_no_faults():
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [str(program), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stages = re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert stages == ["base", "cpu", "cuda"]


@pytest.mark.parametrize("name", ["fault", "idea"])
def test_issues_ask_for_what_doctor_prints(name: str):
    file = ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml"
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    asked = [field["attributes"]["label"] for field in form["body"]]
    assert any("kpsvd-tune doctor --json" in label for label in asked)


def test_the_readme_is_at_most_two_screens():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80
