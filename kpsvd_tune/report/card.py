"""Model cards: the README.md of an adapter, a merged model and an exported LoRA.

All three have the same sections: what it is, how it is loaded, the method, the training, what
proves it, the licence, the scores. Cards are published with the weights, so they name the base as
the hub does where it is known, and never a folder of the machine that they were written on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kpsvd_tune import __version__
from kpsvd_tune.report.results import GgufReport, LoraReport, MergeReport
from kpsvd_tune.report.run import result_figures, score_table, worse_line
from kpsvd_tune.units import percent, size

CARD = "README.md"
# What a card calls the folder that it lies in, and `push` the repository.
THIS_FOLDER = "PATH_OF_THIS_FOLDER"
# It stays the last one: its table is replaced when a model is scored again.
_EVALUATION = "## Evaluation"
# What begins at the root, at home or at the current folder; addresses of the web do not.
_LOCAL = re.compile(r"""(?<![\w.:/<\\])(?:~\w*|\.{1,2})?/(?:[^\s,;'"`|/]+/)+([^\s,;'"`|/]+)""")
_DIRECTIONS = {
    False: "the leading terms of the weight's own decomposition",
    True: "random directions that a seed gives",
}


@dataclass(frozen=True)
class Base:
    """A base model as a card names it."""

    name: str  # the id on the hub; else the name of its file or folder, without the path
    is_on_hub: bool  # whether the name is an id on the hub
    # The licence that the base's own card states, as the hub writes it; None where it states none.
    licence: str | None = None
    revision: str | None = None  # the commit, of one that was fetched from the hub
    gguf_file: str | None = None  # the name of its file, where it is a GGUF file

    @property
    def place(self) -> str:
        """What code that loads it names."""
        if self.gguf_file:
            return "FOLDER_OF_THE_BASE_MODEL"
        return self.name if self.is_on_hub else "PATH_OF_THE_BASE_MODEL"

    @property
    def loading(self) -> str:
        """The line of Python that loads it."""
        options = {"gguf_file": self.gguf_file, "revision": self.revision}
        given = [f'"{self.place}"', *(f'{key}="{text}"' for key, text in options.items() if text)]
        return f"base = AutoModelForCausalLM.from_pretrained({', '.join(given)})"


@dataclass(frozen=True)
class Training:
    """What is known of the training of an adapter."""

    adapter: str  # its name
    form: str = "both"  # what of the terms is trained
    is_random: bool = False  # whether the frozen factors are drawn from a seed
    # Names and values of what it was made of and how: ranks, data, settings.
    settings: tuple[tuple[str, str], ...] = ()
    base_files: Mapping[str, str] | None = None  # sha256 of the base's weight files, by name
    results: Mapping[str, Any] = field(default_factory=dict)  # the content of results.json

    def table(self) -> list[str]:
        """Everything but the scores, as lines of a Markdown table; empty where nothing is known."""
        outcome = [
            # How many were trained is said with the ranks.
            (name, text)
            for name, text in result_figures(self.results)
            if name != "trainable parameters" or not self.settings
        ]
        rows = [*self.settings, *outcome]
        if not rows:
            return []
        return ["| what | value |", "|---|---|", *(f"| {_cell(a)} | {_cell(b)} |" for a, b in rows)]

    def warnings(self) -> list[str]:
        """What is wrong with the adapter, as its results say."""
        worse = worse_line(self.results)
        return [*filter(None, [self.results.get("other_base"), worse and f"{worse}."])]


def adapter_card(training: Training, base: Base, origin: str | None = None) -> str:
    """The README.md of a trained adapter; `origin` is the adapter that it went on from."""
    start = f" It went on from the adapter {adapter_name(origin)}." if origin else ""
    return _card(
        base,
        ("peft", "kpsvd", "kronecker"),
        f"KPSVD adapter for {base.name}",
        [f"An adapter of {base.name}, trained with kpsvd-tune {__version__}.{start}"],
        training.warnings(),
        [
            "PEFT learns this method by an import; without it loading ends in `KeyError: "
            "'KPSVD'`. Install it first: `pip install kpsvd-tune`.",
            "",
            "```python",
            "import kpsvd_tune.adapter  # registers KPSVD with PEFT",
            *_peft_snippet(base),
            "```",
            "",
            "For programs without kpsvd-tune a copy of this folder becomes plain weights, or a "
            "plain LoRA where that holds it:",
            "",
            "```bash",
            f"kpsvd-tune merge {THIS_FOLDER} --output merged",
            f"kpsvd-tune export {THIS_FOLDER} --to lora --output lora",
            "```",
        ],
        [training],
        [],
    )


def merged_card(report: MergeReport, base: Base, trainings: Sequence[Training] = ()) -> str:
    """The README.md of a merged model: what it was made of, how, and what proves it."""
    return _card(
        base,
        ("transformers", "kpsvd", "merged"),
        f"{base.name} with a KPSVD adapter merged in",
        [
            f"{_merged_adapters(report)}, trained with kpsvd-tune. Version {__version__} added "
            f"the update to {len(report.kept_share)} weight matrices and stored the weights in "
            f"{report.dtype}. The result is a plain model of the base's architecture: it needs "
            "neither kpsvd-tune nor PEFT.",
            *report.notes,
        ],
        [*report.warnings, *(line for each in trainings for line in each.warnings())],
        [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{THIS_FOLDER}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{THIS_FOLDER}")',
            "```",
            "",
            "With kpsvd-tune:",
            "",
            "```bash",
            f'kpsvd-tune generate {THIS_FOLDER} "YOUR QUESTION"',
            "```",
        ],
        trainings,
        _merge_proof(report),
        "the adapter on its base, before it was merged",
    )


def lora_card(report: LoraReport, base: Base, training: Training | None = None) -> str:
    """The README.md of an exported LoRA: what it holds of the adapter, and what proves it."""
    kept = (
        "It holds the whole update, to the rounding of float32."
        if report.exact
        else f"**It is an approximation:** it holds {percent(report.energy)} of the energy of the "
        f"update; of {report.worst_layer}, the worst layer, {percent(report.worst_energy)}."
    )
    trainings = [training] if training else []
    return _card(
        base,
        ("peft", "lora", "kpsvd"),
        f"LoRA of a KPSVD adapter for {base.name}",
        [
            f"Made of the adapter {adapter_name(report.adapter)} by kpsvd-tune {__version__}: "
            f"rank {report.rank} in all {len(report.layer_energies)} layers, alpha {report.rank}, "
            f"{report.dtype}. {kept} It needs PEFT, or a server of LoRA, and not kpsvd-tune."
        ],
        [*report.warnings, *(line for each in trainings for line in each.warnings())],
        ["```python", *_peft_snippet(base), "```"],
        trainings,
        _lora_proof(report),
        "the KPSVD adapter that this LoRA was made of",
    )


def gguf_card(report: GgufReport, base: Base, training: Training | None = None) -> str:
    """The README.md of an exported GGUF file: what it was made of, and what proves it."""
    copied = (
        f" {report.num_copied} of its {report.num_tensors} tensors, which the training did not "
        "change, are copied from the base's file in the types that they have there."
        if report.num_copied
        else ""
    )
    trainings = [training] if training else []
    return _card(
        base,
        ("gguf", "gguf", "kpsvd"),
        f"{base.name} with a KPSVD adapter merged in, as GGUF",
        [
            f"Adapter: {adapter_name(report.adapter)}. kpsvd-tune {__version__} added the update "
            f"to {len(report.kept_share)} weight matrices and wrote {report.file}, "
            f"{size(report.num_bytes)}, architecture {report.architecture}, matrices in "
            f"{report.dtype}.{copied} Tokenizer and settings are those of {report.metadata_from}.",
            *report.notes,
        ],
        [*report.warnings, *(line for each in trainings for line in each.warnings())],
        ["```bash", f"llama-cli -m {report.file}", "```"],
        trainings,
        _gguf_proof(report),
        "the KPSVD adapter on its base, before it was merged and rounded",
    )


def with_scores(card: str, results: Mapping[str, Any]) -> str:
    """An adapter's card with the scores that results.json holds by now, and else as it is."""
    text = card.partition(f"\n{_EVALUATION}\n")[0].rstrip("\n")
    return f"{text}\n" + without_folders("\n".join(_scores(results, "")))


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


def adapter_name(path: str) -> str:
    """What an adapter is called: its folder, or the run that keeps it in one called adapter."""
    folder = Path(path)
    return folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name


def local_path(text: str) -> str | None:
    """The first local path with a folder in a text; None where there is none."""
    found = _LOCAL.search(text)
    return found[0] if found else None


def without_folders(text: str) -> str:
    """Leave of every local path only its last name."""
    return _LOCAL.sub(r"\1", text)


def _card(
    base: Base,
    kind: tuple[str, ...],
    title: str,
    about: Sequence[str],
    warnings: Sequence[str],
    use: Sequence[str],
    trainings: Sequence[Training],
    proof: Sequence[str],
    scored: str = "",
) -> str:
    """The card: its sections in the order that all of them have."""
    lines = [
        *front_matter(base, *kind),
        "",
        f"# {title}",
        "",
        *about,
        *(line for warning in warnings for line in ("", f"**Warning: {warning}**")),
        "",
        "## Use",
        "",
        *use,
        *(["", "## Method", "", _method(trainings[0])] if len(trainings) == 1 else []),
        *_training(base, trainings),
        *(["", "## Proof", "", *proof] if proof else []),
        "",
        "## Licence",
        "",
        _licence(base),
        # Of a sum of several adapters the scores of one say nothing.
        *(_scores(trainings[0].results, scored) if len(trainings) == 1 else []),
    ]
    return without_folders("\n".join(lines).rstrip("\n") + "\n")


def _peft_snippet(base: Base) -> list[str]:
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        base.loading,
        f'model = PeftModel.from_pretrained(base, "{THIS_FOLDER}")',
    ]


def _method(training: Training) -> str:
    directions = _DIRECTIONS[training.is_random]
    trained = {
        "both": f"Both factors of every product are trained, beginning with {directions}",
        "left": f"The left factors are trained; the right ones are {directions}",
        "right": f"The right factors are trained; the left ones are {directions}",
        "core": f"A small matrix that mixes the products is trained; their factors are "
        f"{directions}",
    }
    return (
        "KPSVD (Kronecker-product singular value decomposition) adds to each target weight an "
        "update that is a sum of a few Kronecker products of small matrices. "
        f"{trained.get(training.form, trained['both'])}, and the base's weights stay as they are."
    )


def _training(base: Base, trainings: Sequence[Training]) -> list[str]:
    if not trainings:
        return []
    lines: list[str] = []
    for each in trainings:
        named = ["", f"### {each.adapter}"] if len(trainings) > 1 else []
        lines += [*named, "", *(each.table() or ["Nothing of it was kept beside the adapter."])]
    commit = f", commit {base.revision}" if base.revision else ""
    known = _fingerprint(trainings[0].base_files or {})
    return ["", "## Training", "", f"Base model: {base.name}{commit}.{known}", *lines]


def _fingerprint(base_files: Mapping[str, str]) -> str:
    """The hash of the base's weights, in a way that anyone can compute it."""
    if not base_files:
        return ""
    if len(base_files) == 1:
        ((name, digest),) = base_files.items()
        return f" The sha256 of its {name} is {digest}."
    listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(base_files.items()))
    digest = hashlib.sha256(listed.encode()).hexdigest()
    files = f"*{Path(min(base_files)).suffix}"
    return f" Of its weights `sha256sum {files} | sha256sum` gives {digest}."


def _cell(text: str) -> str:
    # A bar would begin another cell.
    return " ".join(text.replace("|", "&#124;").split())


def _scores(results: Mapping[str, Any], whose: str) -> list[str]:
    """The section of scores and how they were made; nothing where nothing was scored."""
    table = score_table(results)
    said = [f"Measured with {whose}.", ""] if whose else []
    return ["", _EVALUATION, "", *said, *table, ""] if table else []


def _licence(base: Base) -> str:
    stated = (
        f"The base model's card states the licence `{base.licence}`."
        if base.licence
        else "The licence of the base model holds for these weights too; look it up there."
    )
    return f"{stated} Whoever publishes these weights adds what holds for their part."


def _merged_adapters(report: MergeReport) -> str:
    if len(report.adapters) < 2:
        return f"Adapter: {adapter_name(report.adapter)}"
    pairs = zip(report.adapters, report.weights, strict=True)
    return "Adapters: " + ", ".join(f"{weight:g} x {adapter_name(path)}" for path, weight in pairs)


def _merge_proof(report: MergeReport) -> list[str]:
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


def _lora_proof(report: LoraReport) -> list[str]:
    return [
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
    ]


def _gguf_proof(report: GgufReport) -> list[str]:
    return [
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
    ]
