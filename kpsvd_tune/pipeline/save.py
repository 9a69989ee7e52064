"""The adapter folder: a PEFT adapter with a model card that says how to use it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from kpsvd_tune import __version__
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.results import RankReport
from kpsvd_tune.report.score import score_table

_EVALUATION = "## Evaluation"


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    recipe: Recipe,
    report: RankReport,
    results: Mapping[str, Any],
) -> None:
    """Write the adapter folder; it appears whole under its name.

    Args:
        model: The trained model.
        tokenizer: Kept beside the adapter, as PEFT's users expect.
        folder: Replaced if it exists.
        recipe: For the model card.
        report: For the model card.
        results: For the model card.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".adapter.", dir=folder.parent))
    try:
        # No embedding is ever adapted; "auto" would ask the hub about the base model.
        model.save_pretrained(str(partial), save_embedding_layers=False)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(_card(model, recipe, report, results), encoding="utf-8")
        partial.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _card(model: PeftModel, recipe: Recipe, report: RankReport, results: Mapping[str, Any]) -> str:
    base = model.peft_config["default"].base_model_name_or_path
    totals = report.totals
    adapted = sum(layer.rank > 0 for layer in report.layers)
    dataset = recipe.dataset.path if recipe.dataset else "none"
    lines = [
        "---",
        f"base_model: {base}",
        "library_name: peft",
        "tags: [kpsvd, kronecker]",
        "---",
        "",
        f"# KPSVD adapter for {base}",
        "",
        f"Trained with kpsvd-tune {__version__} on {dataset}. {adapted} of {totals['modules']} "
        f"target matrices are adapted with {totals['trainable_parameters']:,} trainable "
        "parameters; the file holds as many frozen ones, the Kronecker factors that training "
        "started from.",
        "",
        "## Use",
        "",
        "PEFT learns this method by an import; without it loading ends in `KeyError: 'KPSVD'`.",
        "",
        "```python",
        "import kpsvd_tune.adapter  # registers KPSVD with PEFT",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")',
        "```",
        "",
        "Or bake it into plain weights: `kpsvd-tune merge PATH_OF_THIS_FOLDER --output DIR`.",
        "",
        "## Results",
        "",
        "| figure | value |",
        "|---|---|",
        *(
            f"| {key} | {value:.6g} |"
            for key, value in results.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ),
    ]
    return "\n".join(lines) + "\n" + _evaluation_section(results)


def update_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Bring the evaluation section of a model card up to date; the rest stays as it is.

    Args:
        folder: An adapter folder; nothing happens where it has no card.
        results: The content of results.json.
    """
    card = folder / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8").partition(f"\n{_EVALUATION}\n")[0].rstrip("\n")
    partial = card.with_name(".README.md.partial")
    partial.write_text(f"{text}\n{_evaluation_section(results)}", encoding="utf-8")
    partial.replace(card)


def _evaluation_section(results: Mapping[str, Any]) -> str:
    """The scores and how they were made; nothing where nothing was scored."""
    scores = dict(results.get("scores", {}))
    scores |= {f"{task}, base model": each for task, each in results.get("base_scores", {}).items()}
    if not scores:
        return ""
    lines = ["", _EVALUATION, "", *score_table(scores), ""]
    lines += [f"- {task}: {text}" for task, text in results.get("score_conditions", {}).items()]
    return "\n".join(lines) + "\n"
