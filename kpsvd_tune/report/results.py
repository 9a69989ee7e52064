"""What each stage found, as frozen values: the same objects feed tables, JSON, CSV and pages.

Nothing is computed here and no library is imported, so that reading a report stays instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from kpsvd_tune.errors import InputError
from kpsvd_tune.storage.json_files import check_types


class Result:
    """What every result can do."""

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON has them: lists for tuples, mappings for results within."""
        plain: dict[str, Any] = _plain(self)
        return plain


@dataclass(frozen=True)
class Probe(Result):
    """A short training that tried an energy threshold.

    Attributes:
        energy: The threshold.
        steps: Optimiser steps.
        parameters: Trainable parameters it leads to.
        loss_before: Validation loss before the first step.
        loss: Validation loss after the last.
        seconds: Time it took.
    """

    energy: float
    steps: int
    parameters: int
    loss_before: float
    loss: float
    seconds: float


@dataclass(frozen=True)
class SourceCount(Result):
    """One of several sources of training rows.

    Attributes:
        source: File or hub dataset.
        weight: Times each of its rows is seen in an epoch.
        num_rows: Rows seen in an epoch.
        num_supervised_tokens: Tokens of them that the loss counts.
        format: Form of its rows.
    """

    source: str
    weight: float
    num_rows: int
    num_supervised_tokens: int
    format: str


@dataclass(frozen=True)
class LayerReport(Result):
    """The Kronecker rank of one target module, and why.

    Attributes:
        name: Full module name in the base model.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        factor_shape: (m, n, p, q): left factors are m x n, right factors p x q.
        rank: Kronecker rank chosen; 0 leaves the module untouched.
        rank_energy: Rank that the energy threshold alone asks for.
        rank_elbow: Rank that the elbow alone asks for.
        bound_by: The rule that decided: energy, elbow, noise_edge, fixed, window, min, max,
            budget or override.
        energy_window: Share of the window's energy that the chosen terms hold, 0 to 1.
        energy_total: Share of the squared Frobenius norm of the weight they hold, 0 to 1.
        parameters: Trainable parameters, rank * (m*n + p*q).
        relative_error: Frobenius norm of the residual over that of the weight.
        singular_values: KP singular values of the window, largest first.
        stable_rank: Squared Frobenius norm over the largest squared KP singular value.
        seconds: Time the decomposition of this module took.
        note: What was out of the ordinary, such as a prime size; None otherwise.
    """

    name: str
    out_features: int
    in_features: int
    factor_shape: tuple[int, int, int, int]
    rank: int
    rank_energy: int
    rank_elbow: int
    bound_by: str
    energy_window: float
    energy_total: float
    parameters: int
    relative_error: float
    singular_values: tuple[float, ...]
    stable_rank: float
    seconds: float
    note: str | None = None


@dataclass(frozen=True)
class RankReport(Result):
    """The ranks of all layers: the content of rank_report.json.

    Attributes:
        model: The base model, as the recipe names it.
        totals: modules, trainable_parameters, base_parameters (counts), energy (share of the
            pooled window's energy that the chosen terms hold, 0 to 1), and stored_parameters, what
            the adapter's file holds (not in files of older versions).
        layers: One report for each target module, in the model's order.
        untouched: (name, reason) of every weight matrix that gets no adapter.
        rule: The rank rule, with the recipe's keys.
        probes: Trainings that chose the energy threshold, where it is auto.
        form: What of the terms is trained: both, left, right or core.
    """

    model: str
    totals: Mapping[str, int | float]
    layers: tuple[LayerReport, ...]
    untouched: tuple[tuple[str, str], ...] = ()
    rule: Mapping[str, Any] = field(default_factory=dict)
    probes: tuple[Probe, ...] = ()
    form: str = "both"

    @property
    def stored_parameters(self) -> int:
        """Numbers in the adapter's file: what is trained, and what is frozen beside it."""
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
        _check_keys(data, _names(cls), {"untouched", "rule", "probes", "form"}, "rank report")
        totals, layers = data["totals"], data["layers"]
        # Totals may grow; those that every table prints must be there.
        known = _TOTALS | set(totals if isinstance(totals, Mapping) else ())
        _check_keys(totals, known, set(), "totals of the rank report")
        for layer in layers if isinstance(layers, list | tuple) else ():
            _check_keys(layer, _names(LayerReport), {"note"}, "layer of the rank report")
        try:
            untouched = check_types(data.get("untouched", []), list[dict[str, str]])
            pairs = [(each.get("name"), each.get("reason")) for each in untouched]
            report: RankReport = check_types({**data, "untouched": pairs}, cls)
        except ValueError as error:
            raise InputError(f"the rank report {error}; {_REWRITE}") from error
        return report


@dataclass(frozen=True)
class PreflightReport(Result):
    """What the dataset looks like to the model, before training.

    Attributes:
        num_rows: Rows to train on in an epoch.
        num_validation_rows: Rows held out.
        num_tokens: Tokens of the training rows.
        num_supervised_tokens: Those of them that the loss counts.
        num_truncated: Rows cut to the maximum length.
        num_dropped: Rows left out, because nothing of them could be trained.
        max_tokens: Tokens of the longest row.
        format: Form of the rows that was used.
        format_reason: Why that form.
        warnings: What looks wrong without being an error.
        sample: One row as (text, is_trained) pieces, in order.
        sources: Each source where there are several.
    """

    num_rows: int
    num_validation_rows: int
    num_tokens: int
    num_supervised_tokens: int
    num_truncated: int
    num_dropped: int
    max_tokens: int
    format: str
    format_reason: str
    warnings: tuple[str, ...] = ()
    sample: tuple[tuple[str, bool], ...] = ()
    sources: tuple[SourceCount, ...] = ()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PreflightReport:
        """Read back what `to_dict` gave.

        Raises:
            ValueError: It holds something else.
        """
        report: PreflightReport = check_types(dict(content), cls)
        return report


@dataclass(frozen=True)
class StepMetrics(Result):
    """One optimiser step: a line of metrics.jsonl.

    Attributes:
        step: Steps done, from 1.
        epoch: Passes over the rows so far.
        loss: Mean loss over the supervised tokens of the step, over all processes.
        learning_rate: The rate that this step used.
        grad_norm: Norm of the gradient before clipping.
        tokens: Tokens of the step, over all processes.
        tokens_per_second: The same, per second of the step.
        seconds: Time since the run began.
        validation_loss: Loss on the held-out rows, where this step measured it.
        skipped: Why the step moved no weight; None for a step that was taken.
        micro_batch_size: Rows of a forward pass where `train.on_oom: halve` made them fewer than
            `train.batch_size`; None otherwise.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    validation_loss: float | None = None
    skipped: str | None = None
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class TrainResult(Result):
    """How a training run ended: the core of results.json.

    Attributes:
        train_loss: Mean loss of the last logged steps.
        validation_loss: Loss on the held-out rows after the last step; None without such rows.
        validation_loss_before: The same before the first step: the base model's, or with
            `adapter.from` that adapter's.
        steps: Optimiser steps done.
        trainable_parameters: Parameters that were trained.
        wall_seconds: Time the run took.
        peak_memory_bytes: Most memory of one process: of the device, or resident on a CPU.
        best_step: The step with the lowest validation loss, whose checkpoint is kept; None without
            validations during the run.
        best_validation_loss: That loss.
        adapter_step: The step that the saved adapter is of, by `train.keep`.
        adapter_validation_loss: Loss of that adapter on the held-out rows.
    """

    train_loss: float
    validation_loss: float | None
    validation_loss_before: float | None
    steps: int
    trainable_parameters: int
    wall_seconds: float
    peak_memory_bytes: int
    best_step: int | None = None
    best_validation_loss: float | None = None
    adapter_step: int | None = None
    adapter_validation_loss: float | None = None


@dataclass(frozen=True)
class MergeReport(Result):
    """The proof that merged weights are base plus adapter: the content of merge_report.json.

    Attributes:
        adapter: Where the adapter came from.
        output: Folder of the merged model.
        dtype: Type the merged weights are stored in.
        tolerance: Largest logit difference that passes.
        max_logit_difference: Largest absolute difference of a logit over all prompts.
        top1_agreement: Share of positions where both models prefer the same token, 0 to 1.
        num_positions: Token positions compared.
        prompts: The texts both models were run on.
        kept_share: For each layer the share of the update that survived rounding,
            <W' - W, Delta> / ||Delta||^2; about 1 where nothing is lost.
        relative_update: For each layer the Frobenius norm of the update over the weight's.
        min_kept_share: The smallest kept share; 1 without layers.
        passed: Whether the difference is within the tolerance.
        warnings: What passed and should be looked at nevertheless.
        adapter_logit_difference: Largest absolute difference that the adapter makes to a logit of
            its base model; 0: it changes nothing. None in reports of older versions.
    """

    adapter: str
    output: str
    dtype: str
    tolerance: float
    max_logit_difference: float
    top1_agreement: float
    num_positions: int
    prompts: tuple[str, ...]
    kept_share: Mapping[str, float]
    relative_update: Mapping[str, float]
    min_kept_share: float
    passed: bool
    warnings: tuple[str, ...] = ()
    adapter_logit_difference: float | None = None


@dataclass(frozen=True)
class Score(Result):
    """A share of right answers, or a loss.

    Attributes:
        scorer: Name of the rule that judged.
        value: Share of right answers, 0 to 1; for a loss the mean in nats, or its perplexity.
        n: Questions judged; for a loss the tokens.
        stderr: Standard error of the value; of a share sqrt(value * (1 - value) / n).
        unextractable: Answers in which the rule found nothing to judge; they count as wrong.
    """

    scorer: str
    value: float
    n: int
    stderr: float
    unextractable: int = 0


_REWRITE = "expected a rank_report.json of this version: write it again with `kpsvd-tune init-only`"
_TOTALS = {"modules", "trainable_parameters", "base_parameters", "energy"}


def _names(of: type[Any]) -> set[str]:
    return {each.name for each in fields(of)}


def _check_keys(data: object, known: set[str], optional: set[str], what: str) -> None:
    """Refuse what is no mapping, lacks a key, or has one that this version does not know."""
    if not isinstance(data, Mapping):
        raise InputError(f"the {what} is no mapping; {_REWRITE}")
    problems = {
        "lacks": sorted(known - optional - data.keys()),
        "has the unknown": sorted(data.keys() - known),
    }
    for problem, keys in problems.items():
        if keys:
            raise InputError(f"the {what} {problem} {', '.join(keys)}; {_REWRITE}")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
