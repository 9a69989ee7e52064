"""Model cards: what a README.md says of the base, and the whole card of a merged model.

Cards are published with the weights, so they name the base as the hub does where it is known, and
never a folder of the machine that they were written on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kpsvd_tune import __version__
from kpsvd_tune.report.results import GgufReport, LoraReport, MergeReport
from kpsvd_tune.units import percent, size

# What begins at the root, at home or at the current folder; addresses of the web do not.
_LOCAL = re.compile(r"""(?<![\w.:/<\\])(?:~\w*|\.{1,2})?/(?:[^\s,;'"`|/]+/)+([^\s,;'"`|/]+)""")


@dataclass(frozen=True)
class Base:
    """A base model as a card names it."""

    name: str  # the id on the hub; else the name of its file or folder, without the path
    is_on_hub: bool  # whether the name is an id on the hub
    # The licence that the base's own card states, as the hub writes it; None where it states none.
    licence: str | None = None

    @property
    def place(self) -> str:
        """What code that loads it names."""
        return self.name if self.is_on_hub else "PATH_OF_THE_BASE_MODEL"


def front_matter(base: Base, library: str, *tags: str) -> list[str]:
    """The lines that the hub reads; only an id on the hub is given as the base."""
    return [
        "---",
        *([f"base_model: {base.name}"] if base.is_on_hub else []),
        *([f"license: {base.licence}"] if base.licence else []),
        f"library_name: {library}",
        f"tags: [{', '.join(tags)}]",
        "---",
    ]


def merged_card(report: MergeReport, base: Base) -> str:
    """The README.md of a merged model: what it was made of, how, and what proves it."""
    lines = [
        *front_matter(base, "transformers", "kpsvd", "merged"),
        "",
        f"# {base.name} with a KPSVD adapter merged in",
        "",
        f"Base model: {base.name}. {_merged_adapters(report)}, trained with "
        f"kpsvd-tune. Version {__version__} added the update to {len(report.kept_share)} weight "
        f"matrices and stored the weights in {report.dtype}. The result is a plain model of the "
        "base's architecture: it needs neither kpsvd-tune nor PEFT.",
        *report.notes,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
        "```",
        "",
        "## Proof",
        "",
        *_proof_lines(report),
        *([""] if report.warnings else []),
        *(f"Warning: {warning}" for warning in report.warnings),
        "",
        "## Licence",
        "",
        _licence(base),
    ]
    return without_folders("\n".join(lines) + "\n")


def _merged_adapters(report: MergeReport) -> str:
    if len(report.adapters) < 2:
        return f"Adapter: {adapter_name(report.adapter)}"
    pairs = zip(report.adapters, report.weights, strict=True)
    return "Adapters: " + ", ".join(f"{weight:g} x {adapter_name(path)}" for path, weight in pairs)


def _proof_lines(report: MergeReport) -> list[str]:
    """What was compared, and a table of what was found."""
    verdict = "passed" if report.passed else "**did not pass**"
    compared, figures = [], []
    if report.max_deviation is not None:
        compared.append(
            f"Each of the {len(report.deviation)} updated matrices was compared, number by number, "
            "with base + update in float64."
        )
        figures.append(
            f"| largest deviation of a stored weight, units in the last place | "
            f"{report.max_deviation:.4f} |"
        )
    if report.max_logit_difference is not None:
        compared.append(
            "This folder was loaded afresh and compared in float32 with the adapter on its base, "
            f"on {report.num_positions} token positions of {len(report.prompts)} prompts."
        )
        figures += [
            f"| largest logit difference | {report.max_logit_difference:.3g} |",
            f"| tolerance | {report.tolerance:.3g} |",
            f"| same most likely token | {100 * (report.top1_agreement or 0):.1f} % |",
        ]
    kept = f"| least share of an update that rounding kept | {100 * report.min_kept_share:.1f} % |"
    return [
        " ".join([*compared, f"The comparison {verdict}; all figures are in merge_report.json."]),
        "",
        "| figure | value |",
        "|---|---|",
        *figures,
        kept,
    ]


def lora_card(report: LoraReport, base: Base) -> str:
    """The README.md of an exported LoRA: what it holds of the adapter, and what proves it."""
    kept = (
        "It holds the whole update, to the rounding of float32."
        if report.exact
        else f"**It is an approximation:** it holds {percent(report.energy)} of the energy of the "
        f"update; of {report.worst_layer}, the worst layer, {percent(report.worst_energy)}."
    )
    lines = [
        *front_matter(base, "peft", "lora", "kpsvd"),
        "",
        f"# LoRA of a KPSVD adapter for {base.name}",
        "",
        f"Made of the adapter {adapter_name(report.adapter)} by kpsvd-tune {__version__}: rank "
        f"{report.rank} in all {len(report.layer_energies)} layers, alpha {report.rank}, "
        f"{report.dtype}. {kept} It needs PEFT, or a server of LoRA, and not kpsvd-tune.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base.place}")',
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")',
        "```",
        "",
        "## Proof",
        "",
        "This folder was loaded by transformers and PEFT in a process without kpsvd-tune, and "
        f"compared in float32 with the adapter on its base, on {report.num_positions} token "
        f"positions of {len(report.prompts)} prompts; all figures are in export_report.json.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| largest logit difference | {report.max_logit_difference:.3g} |",
        f"| what the adapter changes a logit by, at most | {report.adapter_logit_difference:.3g} |",
        f"| same most likely token | {100 * report.top1_agreement:.1f} % |",
        f"| share of the update held | {percent(report.energy)} |",
        *([""] if report.warnings else []),
        *(f"Warning: {warning}" for warning in report.warnings),
        "",
        "## Licence",
        "",
        _licence(base),
    ]
    return without_folders("\n".join(lines) + "\n")


def gguf_card(report: GgufReport, base: Base) -> str:
    """The README.md of an exported GGUF file: what it was made of, and what proves it."""
    copied = (
        f" {report.num_copied} of its {report.num_tensors} tensors, which the training did not "
        "change, are copied from the base's file in the types that they have there."
        if report.num_copied
        else ""
    )
    lines = [
        *front_matter(base, "gguf", "gguf", "kpsvd"),
        "",
        f"# {base.name} with a KPSVD adapter merged in, as GGUF",
        "",
        f"Base model: {base.name}. Adapter: {adapter_name(report.adapter)}. kpsvd-tune "
        f"{__version__} added the update to {len(report.kept_share)} weight matrices and wrote "
        f"{report.file}, {size(report.num_bytes)}, architecture {report.architecture}, matrices in "
        f"{report.dtype}.{copied} Tokenizer and settings are those of {report.metadata_from}.",
        *report.notes,
        "",
        "```bash",
        f"llama-cli -m {report.file}",
        "```",
        "",
        "## Proof",
        "",
        "The file was read by transformers and compared in float32 with the adapter on its base, "
        f"on {report.num_positions} token positions of {len(report.prompts)} prompts; all figures "
        "are in export_report.json.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| largest logit difference from the adapter on its base | "
        f"{report.max_logit_difference:.3g} |",
        f"| what the adapter changes a logit by, at most | {report.adapter_logit_difference:.3g} |",
        f"| largest logit difference from the rounded weights | "
        f"{report.file_logit_difference:.3g} |",
        f"| same most likely token | {100 * report.top1_agreement:.1f} % |",
        f"| least share of an update that rounding kept | {100 * report.min_kept_share:.1f} % |",
        *([""] if report.warnings else []),
        *(f"Warning: {warning}" for warning in report.warnings),
        "",
        "## Licence",
        "",
        _licence(base),
    ]
    return without_folders("\n".join(lines) + "\n")


def _licence(base: Base) -> str:
    if base.licence:
        return f"The base model's card states the licence `{base.licence}`."
    return "The licence of the base model holds for these weights too; look it up there."


def adapter_name(path: str) -> str:
    """What an adapter is called: its folder, or the run that keeps it in one called adapter."""
    folder = Path(path)
    return folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name


def without_folders(text: str) -> str:
    """Leave of every local path only its last name."""
    return _LOCAL.sub(r"\1", text)
