"""Tables and lines for people, rendered with rich from the result dataclasses."""

from __future__ import annotations

from rich.text import Text

from kpsvd_tune.report.layout import Column
from kpsvd_tune.report.results import LayerReport, MergeReport, PreflightReport, RankReport

# The summary names at most this many matrices.
LISTED = 3
_SOURCES = 20
RANK_COLUMNS = (
    Column("module", is_text=True),
    Column("out x in", goes=1),
    Column("A", goes=4),
    Column("B", goes=5),
    Column("energy", goes=2),
    Column("elbow", goes=3),
    Column("rank", style="bold"),
    Column("bound by", is_text=True),
    Column("kept"),
    Column("params"),
)


def rank_rows(report: RankReport) -> list[tuple[str, ...]]:
    """The rank of every layer, a cell for each of RANK_COLUMNS."""
    return [_cells(layer) for layer in report.layers]


def _cells(layer: LayerReport) -> tuple[str, ...]:
    m, n, p, q = layer.factor_shape
    return (
        layer.name,
        f"{layer.out_features}x{layer.in_features}",
        f"{m},{n}",
        f"{p},{q}",
        str(layer.rank_energy),
        str(layer.rank_elbow),
        str(layer.rank),
        layer.bound_by,
        f"{100 * layer.energy_total:.1f} %",
        f"{layer.parameters:,}",
    )


def shorten(name: str, width: int) -> str:
    """Cut the start of a module's name: its end says which layer it is."""
    return name if len(name) <= width else "…" + name[1 - width :]


def rank_summary(report: RankReport) -> list[str]:
    """The totals below the table, one line each."""
    totals = report.totals
    ranks = [layer.rank for layer in report.layers]
    adapted = sum(rank > 0 for rank in ranks)
    lora = sum(layer.out_features + layer.in_features for layer in report.layers if layer.rank > 0)
    lines = [
        f"{len(report.layers)} matrices, {adapted} adapted; ranks {min(ranks, default=0)} to "
        f"{max(ranks, default=0)}, mean {sum(ranks) / max(1, len(ranks)):.2f}",
        f"{totals['trainable_parameters']:,} trainable parameters; offsets and frozen factors are "
        f"stored, twice as many; LoRA of rank 1 on the same layers: {lora:,}",
        f"the chosen terms hold {100 * totals['energy']:.1f} % of the pooled window's energy",
    ]
    lines += [
        f"probe of energy {probe.energy:g}: {probe.parameters:,} parameters, validation loss "
        f"{probe.loss_before:.4f} to {probe.loss:.4f} in {probe.steps} steps"
        for probe in report.probes
    ]
    if report.untouched:
        names = [f"{name} ({reason})" for name, reason in report.untouched[:LISTED]]
        more = "; all of them: rank_report.json" if len(report.untouched) > LISTED else ""
        lines.append(
            f"{len(report.untouched)} weight matrices left alone: {', '.join(names)}{more}"
        )
    notes = sum(bool(layer.note) for layer in report.layers)
    if notes:
        lines.append(f"{notes} layers with a note (a rule fell back): see rank_report.json")
    return lines


def preflight_lines(report: PreflightReport) -> list[str]:
    """What will be trained on, before it is."""
    lines = [
        f"{report.num_rows:,} training rows, {report.num_validation_rows:,} validation rows "
        f"({report.format}: {report.format_reason})",
        f"{report.num_tokens:,} tokens, {report.num_supervised_tokens:,} supervised; "
        f"{report.num_truncated:,} rows cut, {report.num_dropped:,} dropped; longest "
        f"{report.max_tokens} tokens",
    ]
    for each in report.sources[:_SOURCES]:
        lines.append(
            f"{each.source} ({each.format}, weight {each.weight:g}): {each.num_rows:,} rows, "
            f"{each.num_supervised_tokens:,} supervised tokens an epoch"
        )
    if len(report.sources) > _SOURCES:
        lines.append(f"and {len(report.sources) - _SOURCES} more sources")
    return lines + [f"note: {warning}" for warning in report.warnings]


def merge_lines(report: MergeReport) -> list[Text]:
    """What the proof of a merge found."""
    verdict = "equal" if report.passed else "NOT equal"
    lines = [
        Text(
            f"merged and adapter-on-base are {verdict}: largest logit difference "
            f"{report.max_logit_difference:.3g} (tolerance {report.tolerance:g}), top-1 agreement "
            f"{100 * report.top1_agreement:.1f} %",
            style="green" if report.passed else "bold red",
        )
    ]
    if report.adapter_logit_difference is not None:
        lines.append(
            Text(
                "the adapter changes a logit of its base by at most "
                f"{report.adapter_logit_difference:.3g}"
            )
        )
    lines.append(
        Text(
            f"of every layer's update at least {100 * report.min_kept_share:.1f} % survived the "
            f"rounding to {report.dtype}"
        )
    )
    return lines + [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
