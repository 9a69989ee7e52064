"""An adapter is taken by its id on the hub wherever a run or an adapter is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kpsvd_tune.commands import main as cli
from kpsvd_tune.runs.hub_adapter import adapter_on_hub

# The real client reads its settings when it is imported, so it runs in a process of its own.
PROGRAM = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from loopback_hub import TOKEN, serving
adapter, folder, rows = map(Path, sys.argv[2:])
with serving() as hub:
    os.environ |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hub")}
    files = {file.name: file.read_bytes() for file in adapter.iterdir()}
    hub.repos["me/x"] = {"private": True, "branches": {"main": files}}
    from kpsvd_tune.commands import main as cli
    def run(*words):
        print("code", cli.run([str(word) for word in words]), file=sys.stderr)
    task = ["--task", "exact_match", "--path", rows, "--max-new-tokens", "2"]
    task += ["columns.prompt=question", "columns.completion=answer"]
    run("eval", "me/x", *task, "-o", folder / "scores")
    run("generate", "me/x", "1 + 1", "--max-new-tokens", "2")
    run("merge", "me/x", "-o", folder / "merged", "--proof", "tensors")
    run("export", "me/x", "--to", "lora", "--lossy", "-o", folder / "lora")
    # A changed file is noticed, as in a folder; an id of nothing is none.
    changed = files | {"adapter_model.safetensors": files["adapter_model.safetensors"] + b"0"}
    hub.repos["me/z"] = {"private": True, "branches": {"main": changed}}
    run("generate", "me/z", "1 + 1")
    run("generate", "me/y", "1 + 1")
"""


@pytest.mark.slow
def test_every_command_takes_an_adapter_by_its_id(
    tmp_path: Path, write_recipe: Callable[..., Path], rows_file: Path
) -> None:
    recipe = write_recipe(train={"max_steps": 1}, adapter={"rank": {"window": 4, "max": 2}})
    assert cli.run(["train", str(recipe)]) in (0, 4)
    adapter = tmp_path / "run" / "adapter"
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1]), str(adapter)]
    command += [str(tmp_path / "by-id"), str(rows_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    codes = [line for line in done.stderr.splitlines() if line.startswith("code ")]
    assert codes[:4] == ["code 0"] * 4, done.stderr
    assert codes[4] in ("code 1", "code 2")
    assert codes[5] == "code 2"
    assert "adapter_model.safetensors" in done.stderr
    assert "'me/y': there is no such folder here and no such model on the hub" in done.stderr
    assert json.loads((tmp_path / "by-id" / "scores" / "results.json").read_text())["scores"]
    # It is the adapter, and not its base alone, that was merged.
    assert cli.run(["merge", str(tmp_path / "run"), "-o", str(tmp_path / "here")]) == 0
    one, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("here", "by-id/merged")
    )
    assert all(one[key].equal(other[key]) for key in one.keys() | other.keys())


def test_what_is_no_id_or_lies_here_is_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "x").mkdir(parents=True)
    for source in ("me/x", "x", "a b/c", str(tmp_path / "gone"), "a/b/c"):
        assert adapter_on_hub(source) is None
    # Offline with nothing of it in the cache, and the tests are offline.
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert adapter_on_hub("me/nothing") is None
