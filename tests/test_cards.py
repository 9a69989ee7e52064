"""Model cards as the commands write them: all a reader needs is there, and their code runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm

from kpsvd_tune.commands import main as cli

SECTIONS = ["Use", "Method", "Training", "Proof", "Licence", "Evaluation"]
PLACES = r"(PATH|FOLDER)_OF_THE_BASE_MODEL"
MINE = "written by me\n"


def sections(card: str) -> dict[str, str]:
    """The text of each section, by its heading."""
    parts = re.split(r"^## (.+)$", card, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def code(card: str, language: str, folder: Path, base: Path) -> str:
    """The blocks of a card in that language, with its placeholders filled in."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    text = "\n".join(found).replace("PATH_OF_THIS_FOLDER", str(folder))
    return re.sub(PLACES, str(base), text)


@pytest.mark.slow
def test_the_three_cards(
    tmp_path: Path,
    tiny_model_dir: Path,
    rows_file: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task: dict[str, Any] = {"task": "exact_match", "path": str(rows_file), "max_new_tokens": 4}
    task["columns"] = {"prompt": "question", "completion": "answer"}
    recipe = write_recipe(adapter={"factor_shape": "thin"}, train={"max_steps": 2})
    text = recipe.read_text()
    recipe.write_text(f"{text}evaluation: [{task}]\n")
    assert cli.run(["train", str(recipe)]) == 0
    adapter = tmp_path / "run" / "adapter"
    monkeypatch.chdir(tmp_path)
    # The commands of the adapter's card make the merged model and the LoRA.
    for line in code((adapter / "README.md").read_text(), "bash", adapter, tmp_path).splitlines():
        assert cli.run(shlex.split(line)[1:]) == 0, line
    folders = {"adapter": adapter, "merged": tmp_path / "merged", "lora": tmp_path / "lora"}
    cards = {name: (folder / "README.md").read_text() for name, folder in folders.items()}
    digest = re.search(r"sha256 of its model.safetensors is (\w{64})\.", cards["adapter"])
    assert digest is not None
    for name, card in cards.items():
        found = sections(card)
        assert list(found) == [each for each in SECTIONS if each != "Proof" or name != "adapter"]
        assert str(tmp_path) not in card
        assert str(tiny_model_dir.parent) not in card
        training = found["Training"]
        assert digest[0] in training
        for row in (
            r"\| ranks \| \d+ to \d+, median [\d.]+, in 14 of 14 target matrices, factors thin \|",
            r"\| rank rule \| energy\+elbow, energy 0.5, 1 to 16 \|",
            r"\| trained \| [\d,]+ parameters \(form both\); the file holds [\d,]+ frozen ones",
            r"\| data \| rows.jsonl \|",
            r"\| rows \| 6 trained, 2 held out \|",
            r"\| hash of the rows as token ids \| sha256 \w{64} \|",
            r"\| settings \| optimiser adamw, learning rate 0.001 \(cosine\), 2 rows a step in ",
            r"\| validation loss \| \d\.\d{4} \|",
        ):
            assert re.search(row, training), row
        assert training.count("| trained ") + training.count("| trainable parameters ") == 1
        method = found["Method"].strip()
        assert "Both factors of every product are trained" in method
        assert len(re.findall(r"\.(?:\s|$)", method)) == 2
        assert re.search(r"\| adapter \| exact_match \| .* % \| .* % to .* \| 8 \|", card)
        assert "Whoever publishes these weights adds" in found["Licence"]

    names: dict[str, Any] = {}
    exec(code(cards["adapter"], "python", adapter, tiny_model_dir), names)
    assert names["model"].peft_config["default"].peft_type == "KPSVD"
    # Python of the others in a process that knows nothing of us.
    program = ""
    for name in ("merged", "lora"):
        program += code(cards[name], "python", folders[name], tiny_model_dir)
        program += "assert model.num_parameters() > 0\n"
    program += "import sys\nassert 'kpsvd_tune' not in sys.modules\n"
    environment = warm.unmeasured()
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
    capsys.readouterr()
    for line in code(cards["merged"], "bash", folders["merged"], tmp_path).splitlines():
        assert cli.run([*shlex.split(line)[1:], "--max-new-tokens", "2"]) == 0

    # What a user wrote stays when scores are added.
    file = adapter / "README.md"
    file.write_text(file.read_text().replace("## Licence\n", f"## Licence\n\n{MINE}"))
    options = ["--task", "loss", "--path", str(rows_file), "--limit", "3"]
    assert cli.run(["eval", str(tmp_path / "run"), *options]) == 0
    assert MINE in file.read_text()
    assert file.read_text().count("## Evaluation") == 1
    assert "| loss | loss |" in file.read_text()


def test_an_adapter_without_its_run_tells_what_its_configuration_knows(
    tmp_path: Path, tiny_model: Any, tiny_model_dir: Path
) -> None:
    from peft import get_peft_model

    from kpsvd_tune.adapter import KpsvdConfig
    from kpsvd_tune.runs.described import training_of

    config = KpsvdConfig(target_modules=["q_proj"], rank=2, form="left")
    peft: Any = get_peft_model(tiny_model, config)
    peft.save_pretrained(str(tmp_path / "mine"))
    training = training_of(tmp_path / "mine")
    assert (training.adapter, training.form, training.is_random) == ("mine", "left", False)
    assert training.settings == (("ranks", "2 in 2 of 2 target matrices"),)
    assert training.results == {}
