"""What a person sees when a command is done: the tables and lines of its result, on stdout."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from kpsvd_tune.errors import some_of
from kpsvd_tune.report.comparison import Claim, Comparison, Recommendation
from kpsvd_tune.report.layout import (
    Column,
    output,
    print_blocks,
    print_line,
    print_pairs,
    print_table,
)
from kpsvd_tune.report.results import (
    GgufReport,
    LoraReport,
    MergeReport,
    PreflightReport,
    PushReport,
    RankReport,
)
from kpsvd_tune.report.run import (
    ScoreLine,
    label_table,
    result_figures,
    score_lines,
    score_text,
    score_value,
)
from kpsvd_tune.units import counted, percent, size

# The summary names at most this many matrices.
_LISTED = 3
_SOURCES = 20
# Labels that a table of right and given ones has room for.
_MOST_LABELS = 10
# Columns that hold the whole table of a comparison.
_WIDE = 140
# Below this width a row of the table is written as a block, which leaves nothing out.
_NARROW = 100
# A logit tolerance above this share of what the adapter changes proves little by itself.
_COARSE = 0.25
# Below this share of an update that rounding left, the screen says how to keep all of it.
_MUCH = 0.99
# Columns by the names that `in_words` gives their cells; the titles here are short.
_METHOD_COLUMNS = {
    "method": Column("method", is_text=True),
    "budget": Column("budget"),
    "trained": Column("trained", goes=1),
    "rate": Column("rate"),
    "validation loss": Column("validation loss"),
    "test loss": Column("test loss"),
    "score": Column("score"),
    "steps to reference": Column("steps to ref.", goes=2),
    "gradient CV": Column("grad. CV", goes=5),
    "clipped": Column("clipped", goes=4),
    "forgetting": Column("forgetting"),
    "time a step": Column("step time", goes=3),
}
# Said once, above the first difference.
_DIFFERENCES = (
    "Differences are always the first method minus the other: of a loss, below zero is better for "
    "the first; of a score, above zero."
)
_COST_TEXTS = ("method", "against the best baseline")
_RANK_COLUMNS = {
    "module": Column("module", is_text=True),
    "out × in": Column("out × in", goes=1),
    "A": Column("A", goes=4),
    "B": Column("B", goes=5),
    "by energy": Column("energy", goes=2),
    "by elbow": Column("elbow", goes=3),
    "rank": Column("rank", style="bold"),
    "bound by": Column("bound by", is_text=True),
    "energy kept": Column("kept"),
    "parameters": Column("params"),
}


def show_ranks(report: RankReport) -> None:
    """The rank table and its totals."""
    out = output()
    found = [layer.in_words() for layer in report.layers]
    rows = [[cells[name][1] for name in _RANK_COLUMNS] for cells in found]
    print_table(out, list(_RANK_COLUMNS.values()), rows, where="rank_report.csv")
    for line in rank_summary(report):
        print_line(out, line)


def show_sweep(reports: Mapping[str, RankReport | Mapping[str, str]]) -> None:
    """Totals and spread of the ranks for every value tried; the reason where one is impossible."""
    columns = [Column("setting", is_text=True)]
    names = ("parameters", "energy", "adapted", "least", "median", "most")
    columns += [Column(name) for name in names]
    rows: list[list[str]] = []
    refused: list[str] = []
    for setting, report in reports.items():
        if not isinstance(report, RankReport):
            rows.append([setting, "impossible", *[""] * 5])
            refused.append(f"{setting}: {report['error']}")
            continue
        ranks = [layer.rank for layer in report.layers]
        rows.append(
            [
                setting,
                f"{report.totals['trainable_parameters']:,}",
                f"{100 * report.totals['energy']:.1f} %",
                str(sum(rank > 0 for rank in ranks)),
                str(min(ranks)),
                f"{statistics.median(ranks):g}",
                str(max(ranks)),
            ]
        )
    out = output()
    print_table(out, columns, rows)
    for line in refused:
        print_line(out, line)


def show_merge(report: MergeReport) -> None:
    """What the proof of the merge found."""
    out, style = output(), "green" if report.passed else "bold red"
    if report.max_logit_difference is not None and report.tolerance is not None:
        verdict = "equal" if report.max_logit_difference <= report.tolerance else "NOT equal"
        agreement = f"{100 * (report.top1_agreement or 0):.1f} %"
        proof = (
            f"merged and adapter-on-base are {verdict}: largest logit difference "
            f"{report.max_logit_difference:.3g} (tolerance {report.tolerance:g}), top-1 agreement "
            f"{agreement}"
        )
        print_line(out, Text(proof, style=style))
    if report.max_deviation is not None:
        far = (
            f"every stored weight is within {report.max_deviation:.3f} units in the last place of "
            f"base + update in float64 ({counted(len(report.deviation), 'layer')})"
        )
        print_line(out, Text(far, style=style))
    for line in (*_against_the_adapter(report), *_kept_of_updates(report)):
        print_line(out, line)
    for note in report.notes:
        print_line(out, note)
    for warning in report.warnings:
        print_line(out, Text(f"warning: {warning}", style="yellow"))


def _against_the_adapter(report: MergeReport) -> list[str]:
    """The logit difference beside what the adapter itself changes, and what the proof can tell."""
    change, found = report.adapter_logit_difference, report.max_logit_difference
    if change is None or found is None or report.tolerance is None:
        return []
    lines = [f"the adapter changes a logit of its base by at most {change:.3g}"]
    if change > 0:
        lines[0] += f": the difference above is {100 * found / change:.2g} % of it"
    if change > report.tolerance > _COARSE * change and report.max_deviation is not None:
        lines.append(
            f"by rounding to {report.dtype} it may be {100 * report.tolerance / change:.2g} %, so "
            "that logits alone would show coarse faults only; that every stored weight is so near "
            "to base + update is the finer proof"
        )
    return lines


def _kept_of_updates(report: MergeReport) -> list[str]:
    """The least share of an update that is left, in which layer, and how to keep all of it."""
    kept, worst = report.min_kept_share, ""
    if report.kept_share and kept < _MUCH and report.dtype != "float32":
        layer = min(report.kept_share, key=report.kept_share.__getitem__)
        worst = f" ({layer} keeps least); --dtype float32 keeps all, in twice the room"
    return [
        f"of every layer's update {_at_least(kept)} survived the rounding to {report.dtype}{worst}"
    ]


def _at_least(share: float) -> str:
    """The share of every update that is left, at least; what rounds to all of it is all of it."""
    return "at least 99.95 %" if share >= 0.9995 else f"at least {100 * share:.1f} %"


def show_lora(report: LoraReport) -> None:
    """What an exported LoRA holds, and what its proof found."""
    out = output()
    held = (
        f"exact: a LoRA of rank {report.rank} holds the whole update"
        if report.exact
        else f"NOT exact: a LoRA of rank {report.rank} holds {percent(report.energy)} of the "
        f"update's energy; of {report.worst_layer}, the worst layer, {percent(report.worst_energy)}"
    )
    print_line(out, Text(held, style="green" if report.exact else "yellow"))
    print_line(
        out,
        "loaded with plain PEFT: largest logit difference from the adapter "
        f"{report.max_logit_difference:.3g}"
        + (f" (tolerance {report.tolerance:.3g})" if report.tolerance is not None else "")
        + f", top-1 agreement {100 * report.top1_agreement:.1f} %",
    )
    change = f"{report.adapter_logit_difference:.3g}"
    print_line(out, f"the adapter changes a logit of its base by at most {change}")
    for warning in report.warnings:
        print_line(out, Text(f"warning: {warning}", style="yellow"))


def show_push(report: PushReport) -> None:
    """What was sent to the hub, file by file, or would be."""
    out = output()
    who = "public" if report.is_public else "private"
    print_line(out, Text(f"{report.content}, {who}: {report.repo}, {report.revision}"))
    print_pairs([(name, size(count)) for name, count in report.files.items()])
    print_line(
        out, f"{counted(len(report.files), 'file')}, {size(report.num_bytes)}: {report.message}"
    )
    for title, names in (
        ("without the folders of this machine", report.shortened),
        ("hidden, not sent", report.left_out),
        ("of an earlier push, removed there", report.removed),
    ):
        if names:
            print_line(out, f"{title}: {', '.join(names)}")
    for note in report.notes:
        print_line(out, Text(f"note: {note}", style="yellow"))
    print_line(out, f"sent: {report.url}" if report.url else "nothing was sent (--dry-run)")


def show_gguf(report: GgufReport) -> None:
    """What an exported GGUF file holds, and what its proof found."""
    out = output()
    passed = f" (tolerance {report.tolerance:.3g})" if report.tolerance is not None else ""
    print_line(
        out,
        Text(
            "read by transformers: the file holds what was written (largest logit difference "
            f"{report.file_logit_difference:.3g})",
            style="green",
        ),
    )
    print_line(
        out,
        f"largest logit difference from the adapter on its base, by rounding to {report.dtype}: "
        f"{report.max_logit_difference:.3g}{passed}, top-1 agreement "
        f"{100 * report.top1_agreement:.1f} %",
    )
    change = f"{report.adapter_logit_difference:.3g}"
    print_line(out, f"the adapter changes a logit of its base by at most {change}")
    kept = _at_least(report.min_kept_share)
    print_line(out, f"of every layer's update {kept} survived the rounding")
    copied = f", {report.num_copied} of them copied from the base" if report.num_copied else ""
    print_line(
        out,
        f"{counted(report.num_tensors, 'tensor')}{copied}; {size(report.num_bytes)}; tokenizer "
        "and settings "
        f"of {report.metadata_from}",
    )
    for note in report.notes:
        print_line(out, note)
    for warning in report.warnings:
        print_line(out, Text(f"warning: {warning}", style="yellow"))


def show_results(results: Mapping[str, Any]) -> None:
    """A run's figures of results.json, then a line for every score of the base and the adapter."""
    print_pairs(result_figures(results))
    _show_score_lines(list(score_lines(results)))
    for task, change in results.items():
        if not (isinstance(change, Mapping) and "before" in change):
            continue
        scorer = next(iter(results.get("scores", {}).get(task, {"": None})))
        shown = [
            results.get(place, {}).get(task, {}).get(scorer, {}).get("value")
            for place in ("base_scores", "scores")
        ]
        # A later `eval` may have replaced the scores; where it did not, they are shown above.
        if shown != [change["before"], change["after"]]:
            before, after = (score_value(scorer, change[key]) for key in ("before", "after"))
            told = f"{before} before, {after} after, of {change['n']}"
            print_pairs([(f"{task}, in this training", told)])


def show_scores(result: Mapping[str, Any]) -> None:
    """One line for every scorer of a task, and the file of the answers."""
    model, conditions = result.get("model") or "", result.get("conditions")
    _show_score_lines(
        [
            ScoreLine(model, result["task"], scorer, score, conditions)
            for scorer, score in result["scores"].items()
        ]
    )
    if file := result.get("completions"):
        print_line(output(), f"answers: {file}", 4)


def _show_score_lines(lines: Sequence[ScoreLine]) -> None:
    """Scores, with how they were asked said once above all those that were asked alike."""
    groups: dict[str | None, list[ScoreLine]] = {}
    for line in lines:
        groups.setdefault(line.conditions, []).append(line)
    out = output()
    for conditions, group in groups.items():
        is_shared = bool(conditions) and len(group) > 1
        if is_shared:
            print_line(out, f"scores on {conditions}:")
        for line in group:
            name = ", ".join(filter(None, (line.model, line.name, line.scorer)))
            asked = f"; {conditions}" if conditions and not is_shared else ""
            print_line(out, f"{name}: {score_text(line.scorer, line.score)}{asked}", 4)
            if line.score.get("confusion"):
                _show_confusion(out, line.score["confusion"])


def _show_confusion(out: Console, table: Mapping[str, Mapping[str, int]]) -> None:
    """Right labels below each other, given ones beside; of many the commonest mistakes alone."""
    given, found = label_table(table)
    if len(given) <= _MOST_LABELS:
        columns = [Column("right \\ given", is_text=True), *(Column(label) for label in given)]
        print_table(out, columns, [[right, *map(str, row)] for right, row in found])
        return
    wrong = [(n, r, g) for r, row in table.items() for g, n in row.items() if r != g]
    for number, right, label in sorted(wrong, reverse=True)[:_MOST_LABELS]:
        print_line(out, f"  {right} answered as {label}: {counted(number, 'time')}", 4)


def show_run(run: Mapping[str, Any], *, layers: bool = False) -> None:
    """What `read_run` gave: results, totals of the ranks and, where asked for, every layer."""
    results = dict(run["results"] or {"results": "the run is not finished"})
    report: RankReport | None = run["ranks"]
    if report and results.get("trainable_parameters") == report.trained_parameters:
        # The totals of the ranks say it too.
        del results["trainable_parameters"]
    show_results(results)
    if report is None:
        return
    if layers:
        show_ranks(report)
        return
    for line in rank_summary(report):
        print_line(output(), line)
    print_line(output(), Text("--layers shows the rank of every layer", style="dim"))


def rank_summary(report: RankReport) -> list[str]:
    """The totals below the table, one line each."""
    totals = report.totals
    ranks = [layer.rank for layer in report.layers]
    adapted = sum(rank > 0 for rank in ranks)
    lines = [
        f"{counted(len(report.layers), 'matrix', 'matrices')}, {adapted} adapted; ranks "
        f"{min(ranks, default=0)} to "
        f"{max(ranks, default=0)}, mean {sum(ranks) / max(1, len(ranks)):.2f}",
        f"{totals['trainable_parameters']:,} trainable parameters (form {report.form}), "
        f"{report.stored_parameters:,} stored with the frozen factors; LoRA of rank 1 on the same "
        f"layers: {report.lora_parameters:,}",
        f"the chosen terms hold {100 * totals['energy']:.1f} % of the pooled window's energy",
    ]
    if whole := report.trained_whole:
        lines.append(
            f"{sum(whole.values()):,} more parameters are trained whole and stored, "
            f"{report.trained_parameters:,} trained in all: {some_of([*whole])}"
        )
    lines += [
        f"probe of energy {probe.energy:g}: {probe.parameters:,} parameters, validation loss "
        f"{probe.loss_before:.4f} to {probe.loss:.4f} in {counted(probe.steps, 'step')}"
        for probe in report.probes
    ]
    if report.untouched:
        names = [f"{name} ({reason})" for name, reason in report.untouched[:_LISTED]]
        more = "; all of them: rank_report.json" if len(report.untouched) > _LISTED else ""
        lines.append(
            f"{counted(len(report.untouched), 'weight matrix', 'weight matrices')} left alone: "
            f"{', '.join(names)}{more}"
        )
    notes = sum(bool(layer.note) for layer in report.layers)
    if notes:
        lines.append(
            f"{counted(notes, 'layer')} with a note (a rule fell back): see rank_report.json"
        )
    return lines


def preflight_lines(report: PreflightReport) -> list[str]:
    """What will be trained on, before it is."""
    lines = [
        f"{counted(report.num_rows, 'training row')}, "
        f"{counted(report.num_validation_rows, 'validation row')} "
        f"({report.format}: {report.format_reason})",
        f"{counted(report.num_tokens, 'token')}, {report.num_supervised_tokens:,} supervised; "
        f"{counted(report.num_truncated, 'row')} cut, {report.num_dropped:,} dropped; longest "
        f"{counted(report.max_tokens, 'token')}",
    ]
    for each in report.sources[:_SOURCES]:
        lines.append(
            f"{each.source} ({each.format}, weight {each.weight:g}): "
            f"{counted(each.num_rows, 'row')}, "
            f"{each.num_supervised_tokens:,} supervised tokens an epoch"
        )
    if len(report.sources) > _SOURCES:
        lines.append(f"and {counted(len(report.sources) - _SOURCES, 'more source')}")
    return lines + [f"note: {warning}" for warning in report.warnings]


def show_grid(grid: Mapping[str, Any]) -> None:
    """What a comparison would run."""
    for key, value in grid.items():
        if key == "plan_of_the_money":
            for line in value:
                print_line(output(), line)
            continue
        parts = value if isinstance(value, Mapping) else {"": value}
        for name, part in parts.items():
            shown = ", ".join(map(str, part)) if isinstance(part, list) else str(part)
            print_pairs([(f"{key.replace('_', ' ')} {name}".rstrip(), shown)])


def show_comparison(verdict: Comparison) -> None:
    """The table of the methods, differences, claims, costs and notes; what to do comes last."""
    out = output(pipe_width=_WIDE)
    found = [summary.in_words() for summary in verdict.summaries]
    names = [name for name in _METHOD_COLUMNS if {row[name] for row in found} != {"–"}]
    columns = [_METHOD_COLUMNS[name] for name in names]
    rows = [[cells[name] for name in names] for cells in found]
    if out.width < _NARROW:
        print_blocks(out, columns, rows)
    else:
        print_table(out, columns, rows, where="comparison.html")
    trained = {(each.method, each.budget): each.trainable_parameters for each in verdict.summaries}
    if verdict.differences:
        print_line(out, _DIFFERENCES)
    for pair in verdict.differences:
        if pair.budget == pair.other_budget:
            own, other = (trained[name, pair.budget] for name in (pair.method, pair.other))
            sizes = "" if own == other else f"; {own:,} against {other:,} parameters"
            print_line(
                out,
                f"{pair.method} minus {pair.other} at {pair.budget:,}: {pair.loss.mean:+.4f} nats "
                f"({pair.loss.interval()}{sizes})",
            )
    for change in verdict.score_differences:
        if change.budget == change.other_budget and change.change >= 0:
            print_line(
                out,
                f"score of {change.method} minus {change.other} at {change.budget:,}: "
                f"{change.in_words()}",
            )
    _show_claims(out, verdict.claims)
    _show_costs(out, verdict)
    if verdict.notes:
        _print_title(out, "notes")
        _print_list(out, verdict.notes)
    _show_recommendation(out, verdict.recommendation)


def _show_claims(out: Console, claims: Sequence[Claim]) -> None:
    """Each claim with its figures; one line where such trials can decide none of them."""
    if not claims:
        return
    _print_title(out, "the claims about KPSVD, by these trials")
    if all(claim.verdict == "undecided" and claim.undecidable for claim in claims):
        reasons = dict.fromkeys(why for claim in claims for why in claim.undecidable)
        told = "; ".join(reasons)
        print_line(
            out, f"all {len(claims)} are undecided: {told}; comparison.html has their figures"
        )
        return
    for claim in claims:
        print_line(out, f"{claim.verdict}: {claim.text}")
        print_line(out, Text(f"    {claim.figure}", style="dim"), 4)


def _show_costs(out: Console, verdict: Comparison) -> None:
    """What was paid and what it bought."""
    found = [each.in_words(verdict.currency) for each in verdict.returns]
    names = [name for name in (found[0] if found else ()) if {row[name] for row in found} != {"–"}]
    if found:
        out.print()
        columns = [Column(name, is_text=name in _COST_TEXTS) for name in names]
        rows = [[cells[name] for name in names] for cells in found]
        if out.width < _WIDE:
            print_blocks(out, columns, rows)
        else:
            print_table(out, columns, rows, where="comparison.html")
    if verdict.smallest is not None:
        print_line(out, verdict.smallest.in_words())
    if verdict.spent is not None:
        print_line(out, f"spent: {verdict.spent.in_words(verdict.currency)}")


def _show_recommendation(out: Console, advice: Recommendation) -> None:
    """The last lines: what to take, how to write it down, and what would decide the rest."""
    out.print()
    print_line(out, Text(advice.text, style="bold"))
    if advice.lines:
        print_line(out, "to use it:")
        for line in advice.lines:
            print_line(out, f"    {line}", 6)
    if advice.undecided:
        _print_title(out, "not decided")
        _print_list(out, advice.undecided)
    if advice.missing:
        _print_title(out, "what would decide it")
        _print_list(out, advice.missing)


def _print_title(out: Console, text: str) -> None:
    out.print()
    print_line(out, Text(text, style="bold"))


def _print_list(out: Console, lines: Sequence[str]) -> None:
    for line in lines:
        print_line(out, f"- {line}")
