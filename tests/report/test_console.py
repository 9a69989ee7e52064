"""What a person sees of a run: progress in terminals and in logs, and its results."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from kpsvd_tune.report import console as view
from kpsvd_tune.report import live
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.report.results import LayerReport, MergeReport, RankReport, StepMetrics

RESULTS: dict[str, Any] = {
    "train_loss": 5.16248,
    "validation_loss": 5.15043,
    "validation_loss_before": 5.59083,
    "steps": 4000,
    "trainable_parameters": 3152,
    "wall_seconds": 250.4,
    "peak_memory_bytes": 1_234_567_890,
    "best_step": None,
    "scores": {"gsm8k": {"strict": {"value": 0.47, "n": 200, "stderr": 0.035, "unextractable": 3}}},
    "base_scores": {
        "gsm8k": {"strict": {"value": 0.09, "n": 200, "stderr": 0.02, "unextractable": 9}}
    },
    "score_conditions": {"gsm8k": "own.jsonl, the first 200, greedy"},
    "gsm8k": {"before": 0.09, "after": 0.47, "n": 200},
}


def ranks() -> RankReport:
    layer = LayerReport(
        name="model.layers.0.self_attn.q_proj",
        out_features=6,
        in_features=4,
        factor_shape=(3, 2, 2, 2),
        rank=2,
        rank_energy=2,
        rank_elbow=3,
        bound_by="energy",
        energy_window=0.8,
        energy_total=0.5,
        parameters=20,
        relative_error=0.7,
        singular_values=(3.0, 2.0, 1.0),
        stable_rank=1.5,
        seconds=0.01,
    )
    totals = {"modules": 1, "trainable_parameters": 20, "base_parameters": 48, "energy": 0.5}
    return RankReport("tiny", totals, (layer,))


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(live, "time", found)
    return found


def step(number: int, validation_loss: float | None = None) -> StepMetrics:
    return StepMetrics(
        step=number,
        epoch=0.1,
        loss=2.5,
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens=64,
        tokens_per_second=6400.0,
        seconds=number / 100,
        validation_loss=validation_loss,
    )


@pytest.mark.slow
def test_a_fast_training_fills_no_log(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with ConsoleEvents() as events:
        for number in range(1, 10_001):
            clock.now += 0.01
            events.step(step(number, validation_loss=2.25), 10_000)
    lines = capsys.readouterr().err.splitlines()
    progress = [line for line in lines if "training" in line]
    assert 5 <= len(progress) <= 11
    assert progress[-1].startswith("  training 10,000 of 10,000, loss 2.5000, rate 1.00e-03")
    assert "s left" in progress[0]
    assert len(lines) - len(progress) <= 11
    assert lines[-1] == "  step 10000: validation loss 2.2500"


def test_a_slow_training_gives_a_sign_of_life_every_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
):
    with ConsoleEvents() as events:
        for number in range(1, 41):
            clock.now += 30
            events.step(step(number), 1000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 19


def test_work_that_is_done_at_once_says_so_in_one_line(capsys: pytest.CaptureFixture[str]):
    with ConsoleEvents() as events:
        for done in range(25):
            events.advance("tokenising", done, 24)
            events.advance("tokenising", done, 24)
    assert capsys.readouterr().err.splitlines() == ["  tokenising 24 of 24"]


def test_what_came_before_the_first_step_does_not_count_for_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
):
    with ConsoleEvents() as events:
        for number in (501, 502, 503):
            clock.now += 60
            # An hour of earlier steps and of a validation, then two seconds a step.
            events.step(replace(step(number), seconds=3600.0 + 2 * number), 1000)
    lines = [line for line in capsys.readouterr().err.splitlines() if "training" in line]
    assert lines[-1].endswith("16 min 34 s left")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_bar_of_a_training_is_never_cut(width: int):
    out = io.StringIO()
    events = ConsoleEvents()
    events._console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with events:
        events.step(step(1233), 123_456)
        events.step(step(1234), 123_456)
    shown = out.getvalue()
    assert "…" not in shown
    assert "20 min 22 s left" in shown
    assert ("loss 2.5000" in shown) == (width >= 80)


def test_what_does_not_fit_is_left_out_whole():
    detail = "loss 2.5000, rate 1.00e-03, 6,400 tokens/s, 12 s left"
    assert live.fitting(detail, 60) == detail
    assert live.fitting(detail, 40) == "loss 2.5000, rate 1.00e-03, 12 s left"
    assert live.fitting(detail, 12) == "12 s left"
    assert live.fitting(detail, 3) == ""


def test_results_come_first_in_units_and_layers_only_when_asked(
    capsys: pytest.CaptureFixture[str],
):
    run = {"results": RESULTS, "ranks": ranks()}
    view.show_run(run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "validation loss"
    shown = "\n".join(lines)
    for text in ("4 min 10 s", "1.2 GB", "4,000", "5.1504"):
        assert text in shown
    assert "None" not in shown
    assert "self_attn.q_proj" not in shown
    assert shown.index("4 min 10 s") < shown.index("1 matrix, 1 adapted")
    assert lines[-1] == "--layers shows the rank of every layer"

    view.show_run(run, layers=True)
    shown = capsys.readouterr().out
    assert shown.index("4 min 10 s") < shown.index("model.layers.0.self_attn.q_proj")
    assert "--layers" not in shown


def test_every_score_says_whose_it_is_and_how_it_was_asked(capsys: pytest.CaptureFixture[str]):
    view.show_results(RESULTS)
    lines = capsys.readouterr().out.splitlines()
    # Asked alike, so that it is said once.
    (above,) = (place for place, line in enumerate(lines) if "own.jsonl" in line)
    assert lines[above] == "scores on own.jsonl, the first 200, greedy:"
    for place, whose in enumerate(
        ("base model, gsm8k, strict: 9.0 %", "adapter, gsm8k, strict: 47.0 %")
    ):
        line = lines[above + 1 + place]
        assert line.startswith(f"{whose} of 200 (95 % interval ")
        assert line.endswith(" without an answer")
    assert not any("in this training" in line for line in lines)


def test_scores_of_the_training_are_shown_where_a_later_eval_replaced_them(
    capsys: pytest.CaptureFixture[str],
):
    view.show_results(RESULTS | {"gsm8k": {"before": 0.1, "after": 0.47, "n": 200}})
    lines = capsys.readouterr().out.splitlines()
    assert "gsm8k, in this training    10.0 % before, 47.0 % after, of 200" in lines


def test_the_report_of_a_run_says_the_trained_parameters_once(
    capsys: pytest.CaptureFixture[str],
):
    run = {"results": RESULTS | {"trainable_parameters": 20}, "ranks": ranks()}
    view.show_run(run)
    shown = capsys.readouterr().out
    assert shown.count("trainable parameters") == 1
    assert "20 trainable parameters (form both)" in shown


def test_losses_are_not_repeated_and_only_a_bad_end_is_told(capsys: pytest.CaptureFixture[str]):
    more = {
        "best_validation_loss": RESULTS["validation_loss"],
        "base_validation_loss": RESULTS["validation_loss_before"],
        "adapter_validation_loss": 4.9,
        "adapter_step": 4000,
        "worse_than_base": False,
        "worse_than_start": True,
    }
    view.show_results(RESULTS | more)
    names = [line[:26].rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "adapter validation loss" in names
    assert "worse than start" in names
    for name in ("best validation loss", "base validation loss", "adapter step", "worse than base"):
        assert name not in names


def test_a_score_of_the_base_alone_has_its_own_conditions(capsys: pytest.CaptureFixture[str]):
    conditions = {"gsm8k": "own.jsonl, greedy", "gsm8k, base model": "other.jsonl, greedy"}
    view.show_results({**RESULTS, "score_conditions": conditions})
    base, adapter = (line for line in capsys.readouterr().out.splitlines() if "strict" in line)
    assert base.endswith("; other.jsonl, greedy")
    assert adapter.endswith("; own.jsonl, greedy")


def test_a_run_that_is_not_finished_says_so(capsys: pytest.CaptureFixture[str]):
    view.show_run({"results": None, "ranks": None})
    assert capsys.readouterr().out.splitlines() == [f"{'results':<26} the run is not finished"]


def merged(**changes: Any) -> MergeReport:
    report = MergeReport(
        adapter="run",
        output="merged",
        dtype="bfloat16",
        tolerance=1.1,
        max_logit_difference=0.075,
        top1_agreement=1.0,
        num_positions=40,
        prompts=("a",),
        kept_share={"layers.0.q_proj": 0.998, "layers.7.up_proj": 0.9304},
        relative_update={"layers.0.q_proj": 0.01, "layers.7.up_proj": 0.001},
        min_kept_share=0.9304,
        passed=True,
        adapter_logit_difference=1.5,
        deviation={"layers.0.q_proj": 0.5, "layers.7.up_proj": 0.5},
        max_deviation=0.5,
    )
    return replace(report, **changes)


def test_a_merge_says_what_its_logits_can_prove_and_how_to_keep_what_rounding_took(
    capsys: pytest.CaptureFixture[str],
):
    view.show_merge(merged())
    words = " ".join(capsys.readouterr().out.split())
    assert "by at most 1.5: the difference above is 5 % of it" in words
    assert "rounding to bfloat16 it may be 73 %, so that logits alone would show coarse" in words
    assert (
        "at least 93.0 % survived the rounding to bfloat16 (layers.7.up_proj keeps least); "
        "--dtype float32 keeps all, in twice the room"
    ) in words


def test_a_merge_that_keeps_and_proves_enough_says_no_more(capsys: pytest.CaptureFixture[str]):
    view.show_merge(merged(dtype="float32", tolerance=1e-4, max_logit_difference=3e-5))
    words = capsys.readouterr().out
    assert "the difference above is 0.002 % of it" in words
    assert "coarse" not in words
    assert "--dtype" not in words
    # One that cannot be told from the base has its warning already.
    view.show_merge(merged(adapter_logit_difference=0.9, kept_share={}, min_kept_share=1.0))
    words = capsys.readouterr().out
    assert "coarse" not in words
    assert "--dtype" not in words


def test_scores_that_were_asked_otherwise_are_grouped_by_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    score = {"value": 0.5, "n": 8, "stderr": 0.1, "unextractable": 0}
    scores = {name: {"accuracy": score, "macro_f1": score} for name in ("label", "label, b.jsonl")}
    conditions = {"label": "a.jsonl, greedy", "label, b.jsonl": "b.jsonl, greedy"}
    results = {"scores": scores, "base_scores": scores, "score_conditions": conditions}
    view.show_results(results)
    starts = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert starts == [
        *("scores on a.jsonl, greedy:", "base model, label, accuracy"),
        *("base model, label, macro_f1", "adapter, label, accuracy", "adapter, label, macro_f1"),
        *("scores on b.jsonl, greedy:", "base model, label, b.jsonl, accuracy"),
        *("base model, label, b.jsonl, macro_f1", "adapter, label, b.jsonl, accuracy"),
        "adapter, label, b.jsonl, macro_f1",
    ]


def test_the_training_loss_says_what_it_is_the_mean_of(capsys: pytest.CaptureFixture[str]) -> None:
    for steps, told in (
        ({}, "4.9000, mean of the last steps"),
        ({"train_loss_steps": 10}, "4.9000, mean of the last 10 steps"),
        ({"train_loss_steps": 1}, "4.9000, of the last step"),
    ):
        view.show_results({"train_loss": 4.9, "steps": 12, **steps})
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(maxsplit=2)[2] for line in lines if "loss" in line] == [told]
        assert len(lines) == 2
