"""What each stage found, as frozen values: the same objects feed tables, JSON, CSV and pages.

Nothing is computed here and no heavy library is imported: reading a report stays instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from kpsvd_tune.errors import InputError
from kpsvd_tune.storage.json_files import check_types
from kpsvd_tune.units import duration

_REWRITE = "expected a rank_report.json of this version: write it again with `kpsvd-tune init-only`"
_TOTALS = {"modules", "trainable_parameters", "base_parameters", "energy"}
# Of a record that is read back: a key that this version does not know is a fault.
CLOSED = {"extra": "forbid"}


class Result:
    """What every result can do."""

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON has them: lists for tuples, mappings for results within."""
        plain: dict[str, Any] = _plain(self)
        return plain


@dataclass(frozen=True)
class Probe(Result):
    """A short training that tried an energy threshold."""

    energy: float  # the threshold
    steps: int  # optimiser steps
    parameters: int  # trainable parameters it leads to
    loss_before: float  # validation loss before the first step
    loss: float  # validation loss after the last
    seconds: float  # time it took


@dataclass(frozen=True)
class SourceCount(Result):
    """One of several sources of training rows."""

    source: str  # file or hub dataset
    weight: float  # times each of its rows is seen in an epoch
    num_rows: int  # rows seen in an epoch
    num_supervised_tokens: int  # tokens of them that the loss counts
    format: str  # form of its rows


@dataclass(frozen=True)
class LayerReport(Result):
    """The Kronecker rank of one target module, and why."""

    __pydantic_config__ = CLOSED
    name: str  # full module name in the base model
    out_features: int  # rows of the weight
    in_features: int  # columns of the weight
    # (m, n, p, q): left factors are m x n, right factors p x q.
    factor_shape: tuple[int, int, int, int]
    rank: int  # Kronecker rank chosen; 0 leaves the module untouched
    rank_energy: int  # rank that the energy threshold alone asks for
    rank_elbow: int  # rank that the elbow alone asks for
    # The rule that decided: energy, elbow, noise_edge, fixed, window, min, max, budget or override.
    bound_by: str
    energy_window: float  # share of the window's energy that the chosen terms hold, 0 to 1
    energy_total: float  # share of the squared Frobenius norm of the weight they hold, 0 to 1
    parameters: int  # trainable parameters, rank * (m*n + p*q)
    relative_error: float  # Frobenius norm of the residual over that of the weight
    singular_values: tuple[float, ...]  # KP singular values of the window, largest first
    stable_rank: float  # squared Frobenius norm over the largest squared KP singular value
    seconds: float  # time the decomposition of this module took
    note: str | None = None  # what was out of the ordinary, such as a prime size; None otherwise

    def in_words(self) -> dict[str, tuple[str | float, str]]:
        """What every column of the tables is sorted by, and the text of its cell."""
        m, n, p, q = self.factor_shape
        out, into = self.out_features, self.in_features
        return {
            "module": (self.name, self.name),
            "out × in": (out * into, f"{out} × {into}"),
            "A": (m * n, f"{m} × {n}"),
            "B": (p * q, f"{p} × {q}"),
            "by energy": (self.rank_energy, str(self.rank_energy)),
            "by elbow": (self.rank_elbow, str(self.rank_elbow)),
            "rank": (self.rank, str(self.rank)),
            "bound by": (self.bound_by, self.bound_by),
            "energy kept": (self.energy_total, f"{100 * self.energy_total:.1f} %"),
            "parameters": (self.parameters, f"{self.parameters:,}"),
            "relative error": (self.relative_error, f"{self.relative_error:.3f}"),
            "stable rank": (self.stable_rank, f"{self.stable_rank:.1f}"),
            "time": (self.seconds, duration(self.seconds)),
            "note": (self.note or "", self.note or ""),
        }


@dataclass(frozen=True)
class RankReport(Result):
    """The ranks of all layers: the content of rank_report.json."""

    __pydantic_config__ = CLOSED
    model: str  # the base model, as the recipe names it
    # modules, trainable_parameters and base_parameters (counts), energy (share of the pooled
    # window's energy that the chosen terms hold, 0 to 1), and stored_parameters, what the
    # adapter's file holds (not in reports of older versions). All of the factors alone.
    totals: Mapping[str, int | float]
    layers: tuple[LayerReport, ...]  # one report for each target module, in the model's order
    # (name, reason) of every weight matrix that gets no adapter.
    untouched: tuple[tuple[str, str], ...] = ()
    rule: Mapping[str, Any] = field(default_factory=dict)  # the rank rule, with the recipe's keys
    probes: tuple[Probe, ...] = ()  # trainings that chose the energy threshold, where it is auto
    form: str = "both"  # what of the terms is trained
    frozen_seed: int | None = None  # draws the frozen factors, where no file holds them
    # Parameters of each module that is trained whole beside the adapter, which the totals leave
    # out (not in reports of older versions).
    trained_whole: Mapping[str, int] = field(default_factory=dict)

    @property
    def trained_parameters(self) -> int:
        """All that is trained: in the adapter, and of modules that are trained whole."""
        return int(self.totals["trainable_parameters"]) + sum(self.trained_whole.values())

    @property
    def stored_parameters(self) -> int:
        """Numbers of the factors in the adapter's file: trained ones, and those frozen beside."""
        return int(self.totals.get("stored_parameters", 2 * self.totals["trainable_parameters"]))

    @property
    def lora_parameters(self) -> int:
        """What LoRA or PiSSA of rank 1 trains on the layers that have an adapter."""
        adapted = (layer for layer in self.layers if layer.rank > 0)
        return sum(layer.out_features + layer.in_features for layer in adapted)

    def to_dict(self) -> dict[str, Any]:
        """Give the content of rank_report.json."""
        untouched = [{"name": name, "reason": reason} for name, reason in self.untouched]
        return super().to_dict() | {"untouched": untouched}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RankReport:
        """Read the content of rank_report.json.

        Raises:
            InputError: A key is missing or unknown, or a value is of another type.
        """
        try:
            untouched = check_types(data.get("untouched", []), list[dict[str, str]])
            pairs = [(each.get("name"), each.get("reason")) for each in untouched]
            report: RankReport = check_types({**data, "untouched": pairs}, cls)
            # Totals may grow; those that every table prints must be there.
            if missing := _TOTALS - report.totals.keys():
                raise ValueError(f"lacks the totals {', '.join(sorted(missing))}")
        except ValueError as error:
            raise InputError(f"the rank report {error}; {_REWRITE}") from error
        return report


@dataclass(frozen=True)
class PreflightReport(Result):
    """What the dataset looks like to the model, before training."""

    num_rows: int  # rows to train on in an epoch
    num_validation_rows: int  # rows held out
    num_tokens: int  # tokens of the training rows
    num_supervised_tokens: int  # those of them that the loss counts
    num_truncated: int  # rows cut to the maximum length
    num_dropped: int  # rows left out, because nothing of them could be trained
    max_tokens: int  # tokens of the longest row
    format: str  # form of the rows that was used
    format_reason: str  # why that form
    warnings: tuple[str, ...] = ()  # what looks wrong without being an error
    sample: tuple[tuple[str, bool], ...] = ()  # one row as (text, is_trained) pieces, in order
    sources: tuple[SourceCount, ...] = ()  # each source where there are several


@dataclass(frozen=True)
class StepMetrics(Result):
    """One optimiser step: a line of metrics.jsonl."""

    step: int  # steps done, from 1
    epoch: float  # passes over the rows so far
    loss: float  # mean loss over the supervised tokens of the step, over all processes
    learning_rate: float  # the rate that this step used
    grad_norm: float  # norm of the gradient before clipping
    tokens: int  # tokens of the step, over all processes
    tokens_per_second: float  # the same, per second of the step
    seconds: float  # time since the run began
    validation_loss: float | None = None  # loss on the held-out rows, where this step measured it
    skipped: str | None = None  # why the step moved no weight; None for a step that was taken
    # Rows of a forward pass where `train.on_oom: halve` made them fewer than `train.batch_size`;
    # None otherwise.
    micro_batch_size: int | None = None
    # Most memory that the main process has held so far, of its device or resident on a CPU; None
    # in runs of older versions.
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Event(Result):
    """Something that happened in a run and is worth knowing: a line of events.jsonl."""

    time: str  # ISO 8601, with the zone
    kind: Literal["stage", "note", "warning", "fallback", "end"]
    text: str  # what happened, one sentence
    code: str = ""  # short name of a warning or a fallback; empty for other kinds
    step: int | None = None  # optimiser steps done; None outside of training
    evidence: Mapping[str, int | float | str] = field(default_factory=dict)  # what it rests on
    cure: str = ""  # what to do, one sentence; empty for stages and notes

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Event:
        """Read a line of events.jsonl; keys of later versions are left out.

        Raises:
            InputError: A key is missing, or a value is of another type.
        """
        known = {each.name: data[each.name] for each in fields(cls) if each.name in data}
        try:
            event: Event = check_types(known, cls)
        except ValueError as error:
            raise InputError(f"the event {error}; was events.jsonl edited?") from error
        return event


@dataclass(frozen=True)
class LearnedLayer(Result):
    """How far training has moved one adapted layer."""

    name: str  # full module name in the base model
    update_norm: float  # Frobenius norm of the update Delta that the adapter adds to the weight
    weight_norm: float  # Frobenius norm of the base model's weight

    @property
    def share(self) -> float | None:
        """The update's norm over the weight's; None where the weight is zero."""
        return self.update_norm / self.weight_norm if self.weight_norm else None


@dataclass(frozen=True)
class LearnedReport(Result):
    """How far training has moved each layer: the content of learned.json."""

    step: int  # optimiser steps done of the adapter that was saved
    layers: tuple[LearnedLayer, ...]  # every adapted layer, in the model's order

    def most(self) -> list[LearnedLayer]:
        """The layers with a share, first the one that moved furthest."""
        known = [layer for layer in self.layers if layer.share is not None]
        return sorted(known, key=lambda layer: -(layer.share or 0.0))


@dataclass(frozen=True)
class TrainResult(Result):
    """How a training run ended: the core of results.json."""

    train_loss: float  # mean loss over the supervised tokens of the last steps
    # Loss on the held-out rows after the last step; None without such rows.
    validation_loss: float | None
    # The same before the first step: the base model's, or with `adapter.from` that adapter's.
    validation_loss_before: float | None
    steps: int  # optimiser steps done
    trainable_parameters: int  # parameters that were trained
    wall_seconds: float  # time the run took
    peak_memory_bytes: int  # most memory of one process: of the device, or resident on a CPU
    # The step with the lowest validation loss, whose checkpoint is kept; None without validations
    # during the run.
    best_step: int | None = None
    best_validation_loss: float | None = None  # that loss
    train_loss_steps: int | None = None  # how many steps `train_loss` is the mean of
    adapter_step: int | None = None  # the step that the saved adapter is of, by `train.keep`
    adapter_validation_loss: float | None = None  # loss of that adapter on the held-out rows


@dataclass(frozen=True)
class RestraintReport(Result):
    """How the trained update was cut back so that a text is known as before: `restrain`."""

    text: str  # the file
    limit: float  # largest rise of its loss that was asked for, in nats a token
    is_met: bool  # whether any strength that was tried keeps to it
    strength: float  # what the update was cut back with; 0: as it was trained
    num_tokens: int  # tokens of the half of the text that judges
    base_loss: float  # the base model's loss on them
    change_before: float  # what the update as trained adds to that
    change: float  # what the saved update adds
    stderr: float  # standard error of that change, token by token


@dataclass(frozen=True)
class MergeReport(Result):
    """The proof that merged weights are base plus adapter: the content of merge_report.json."""

    adapter: str  # where the adapter came from; the first of several
    output: str  # folder of the merged model
    dtype: str  # type that most of the merged weights are stored in
    tolerance: float | None  # largest logit difference that passes; None: no logits were compared
    max_logit_difference: float | None  # largest absolute difference of a logit over all prompts
    # Share of positions where both models prefer the same token, 0 to 1.
    top1_agreement: float | None
    num_positions: int  # token positions compared
    prompts: tuple[str, ...]  # the texts both models were run on
    # For each layer the share of the update that survived rounding, <W' - W, Delta> / ||Delta||^2;
    # about 1 where nothing is lost.
    kept_share: Mapping[str, float]
    # For each layer the Frobenius norm of the update over the weight's.
    relative_update: Mapping[str, float]
    min_kept_share: float  # the smallest kept share; 1 without layers
    passed: bool  # whether the proof that was asked for succeeded
    warnings: tuple[str, ...] = ()  # what passed and should be looked at nevertheless
    # Largest absolute difference that the adapter makes to a logit of its base model; 0: it changes
    # nothing. None in reports of older versions, and where no logits were compared.
    adapter_logit_difference: float | None = None
    # For each layer the largest |W' - (W + Delta)|, with W + Delta in float64, in units in the last
    # place of the stored number: rounding to nearest gives at most a half. Empty in reports of
    # older versions.
    deviation: Mapping[str, float] = field(default_factory=dict)
    max_deviation: float | None = None  # the largest of them
    proof: str = "logits"  # what was judged: tensors, logits or both
    adapters: tuple[str, ...] = ()  # all that were merged, and the weight of each one's update
    weights: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()  # sentences on how it was merged
    # The sha256 of every weight file that was written, by name; empty in reports of older versions.
    weight_files: Mapping[str, str] = field(default_factory=dict)
    # Keys of the dataset section by which the model was trained, so that it is asked in the same
    # way: template, columns, ignore_columns and learn; and asked_with, the template of an answer
    # alone. Empty where no run is known or several differ.
    trained_as: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraReport(Result):
    """What an exported LoRA holds of the adapter, and its proof: export_report.json."""

    adapter: str  # where the adapter came from
    output: str  # folder of the LoRA
    dtype: str  # type its matrices are stored in
    rank: int  # of every layer, zeros beyond what the layer needs; alpha is the same
    exact: bool  # whether it holds every update to the rounding of float32
    energy: float  # share of the energy of all updates together that it holds, 0 to 1
    worst_layer: str  # of whose update it holds the least
    worst_energy: float  # that share
    layer_energies: Mapping[str, float]  # the share for each layer
    # For each layer the numerical rank of its update; None where that is above the LoRA's.
    layer_ranks: Mapping[str, int | None]
    # Largest absolute difference of a logit between the adapter on its base and the LoRA, loaded by
    # transformers and PEFT in a process without this package.
    max_logit_difference: float
    # The same between that process and the LoRA as it was computed here.
    file_logit_difference: float
    adapter_logit_difference: float  # between the adapter on its base and the base alone
    tolerance: float | None  # largest logit difference that passes; None for one that is not exact
    top1_agreement: float  # share of positions where both prefer the same token, 0 to 1
    num_positions: int  # token positions compared
    prompts: tuple[str, ...]  # the texts both were run on
    warnings: tuple[str, ...] = ()  # what passed and should be looked at nevertheless


@dataclass(frozen=True)
class PushReport(Result):
    """What was sent to a repository of the hub, or would be."""

    repo: str  # OWNER/NAME
    content: str  # what it is, in words
    is_public: bool  # whether everyone can read it
    revision: str  # the branch
    message: str  # of the commit
    files: Mapping[str, int]  # size of each file in bytes, by its name in the repository
    num_bytes: int  # of all files
    shortened: tuple[str, ...] = ()  # files that are sent without the folders they named
    left_out: tuple[str, ...] = ()  # hidden files, which are not sent
    removed: tuple[str, ...] = ()  # files of an earlier push that are removed in the same commit
    notes: tuple[str, ...] = ()  # what the user may want to know
    url: str | None = None  # of the commit; None: nothing was sent


@dataclass(frozen=True)
class GgufReport(Result):
    """What an exported GGUF file holds, and its proof: export_report.json."""

    adapter: str  # where the adapter came from
    output: str  # folder of the file
    file: str  # its name there
    dtype: str  # type of its matrices: float32, float16, bfloat16 or q8_0
    architecture: str  # llama.cpp's name of the kind of model
    metadata_from: str  # name of the GGUF file whose tokenizer and settings it has
    num_tensors: int
    num_copied: int  # of them, copied as the base's file has them, in its own types
    num_bytes: int  # of the file
    # For each layer the share of the update that survived rounding, <W' - W, Delta> / ||Delta||^2.
    kept_share: Mapping[str, float]
    min_kept_share: float  # the smallest of them; 1 without layers
    # Largest absolute difference of a logit between the adapter on its base and the file, as
    # transformers reads it, in float32.
    max_logit_difference: float
    top1_agreement: float  # share of positions where both prefer the same token, 0 to 1
    # The same between the file and the rounded weights that it was written from.
    file_logit_difference: float
    adapter_logit_difference: float  # between the adapter on its base and the base alone
    tolerance: float | None  # largest logit difference that passes; None for q8_0
    num_positions: int  # token positions compared
    prompts: tuple[str, ...]  # the texts both were run on
    notes: tuple[str, ...] = ()  # sentences on what was written
    warnings: tuple[str, ...] = ()  # what passed and should be looked at nevertheless
    sha256: str | None = None  # of the file; None in reports of older versions


@dataclass(frozen=True)
class Score(Result):
    """A share of right answers, or a loss."""

    scorer: str  # name of the rule that judged
    value: float  # share of right answers, 0 to 1; for a loss the mean in nats, or its perplexity
    n: int  # questions judged; for a loss the tokens
    stderr: float  # standard error of the value; of a share sqrt(value * (1 - value) / n)
    unextractable: int = 0  # answers in which the rule found nothing to judge; they count as wrong
    # For each right label how often which one was answered; None where no labels are judged.
    confusion: Mapping[str, Mapping[str, int]] | None = None
    # Mean points of each question by its id, 0 to 1; None where they are not judged one by one.
    points: Mapping[str, float] | None = None
    # Labels that the value is the mean over; None where it is over the questions.
    num_labels: int | None = None


@dataclass(frozen=True)
class PairedScore(Result):
    """How two models' answers to the same questions differ, question by question."""

    difference: float  # mean points of the second's answers, 0 to 1, minus those of the first's
    stderr: float | None  # standard error of that mean over the questions; None for one question
    n: int  # questions that both answered
    first_better: int  # questions where the first has more points
    second_better: int


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
