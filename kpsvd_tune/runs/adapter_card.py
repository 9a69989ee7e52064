"""The model card of an adapter: what it is, how to use it, and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from kpsvd_tune import __version__
from kpsvd_tune.data import source_names
from kpsvd_tune.models import describe_base
from kpsvd_tune.recipe import Recipe
from kpsvd_tune.report.card import adapter_name, front_matter, without_folders
from kpsvd_tune.report.results import RankReport
from kpsvd_tune.report.run import result_figures, score_table, worse_line
from kpsvd_tune.storage import durable

_EVALUATION = "## Evaluation"


def _frozen(report: RankReport) -> str:
    """What the file holds beside what was trained."""
    frozen = report.stored_parameters - int(report.totals["trainable_parameters"])
    if frozen == 0:
        return "a seed in adapter_config.json gives the frozen Kronecker factors."
    return f"the file holds {frozen:,} frozen ones beside them, Kronecker factors."


def adapter_card(
    model: PeftModel, recipe: Recipe, report: RankReport, results: Mapping[str, Any]
) -> str:
    """The card of a trained adapter; `results` is the content of results.json."""
    # The path stays in adapter_config.json, by which PEFT finds the base; a card is published.
    source = Path(getattr(model.config, "_name_or_path", "") or ".nowhere")
    base = describe_base(recipe.model.path, source if source.is_dir() else None)
    totals = report.totals
    adapted = sum(layer.rank > 0 for layer in report.layers)
    dataset = source_names(recipe.dataset) if recipe.dataset else "none"
    origin = recipe.adapter.from_
    start = f" It went on from the adapter {adapter_name(origin)}." if origin else ""
    lines = [
        *front_matter(base, "peft", "kpsvd", "kronecker"),
        "",
        f"# KPSVD adapter for {base.name}",
        "",
        f"Trained with kpsvd-tune {__version__} on {dataset}.{start} "
        f"{adapted} of {totals['modules']} target matrices are adapted with "
        f"{totals['trainable_parameters']:,} trainable "
        f"parameters (form {report.form}); {_frozen(report)}",
        "",
        *([f"**Warning: {other}**", ""] if (other := results.get("other_base")) else []),
        *([f"**Warning: {worse}.**", ""] if (worse := worse_line(results)) else []),
        "## Use",
        "",
        "PEFT learns this method by an import; without it loading ends in `KeyError: 'KPSVD'`.",
        "",
        "```python",
        "import kpsvd_tune.adapter  # registers KPSVD with PEFT",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base.place}")',
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")',
        "```",
        "",
        "Or bake it into plain weights: `kpsvd-tune merge PATH_OF_THIS_FOLDER --output DIR`.",
        "",
        "## Results",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in result_figures(results)),
    ]
    return without_folders("\n".join(lines) + "\n" + _evaluation_section(results))


def update_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Bring a card's evaluation section up to date from results.json; without a card do nothing."""
    card = folder / "README.md"
    if not card.is_file():
        return
    # A card is the user's to edit; bytes of another encoding stay as they are.
    text = (
        card.read_text(encoding="utf-8", errors="surrogateescape")
        .partition(f"\n{_EVALUATION}\n")[0]
        .rstrip("\n")
    )
    section = without_folders(_evaluation_section(results))
    durable.replace_file(card, f"{text}\n{section}".encode(errors="surrogateescape"))


def _evaluation_section(results: Mapping[str, Any]) -> str:
    """The scores and how they were made; nothing where nothing was scored."""
    table = score_table(results)
    return "\n".join(["", _EVALUATION, "", *table]) + "\n" if table else ""
