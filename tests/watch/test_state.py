"""Rows, schedules, offsets and the machine: what is looked at in one moment."""

from __future__ import annotations

import pytest
import torch

from kpsvd_tune.report.results import PreflightReport
from kpsvd_tune.watch.before import (
    module_warnings,
    row_warnings,
    schedule_warnings,
    unrestrained_warnings,
    without,
)
from kpsvd_tune.watch.machine import disk_low, memory_low
from kpsvd_tune.watch.offsets import dead_layers, exploding_offsets

CUT = "20 rows cut to dataset.max_length (64 tokens), which takes the end token away (first: x)"
DROPPED = "30 rows dropped: empty, or without a completion (first: rows.jsonl, line 3)"
SHARED = "LEFT OUT OF TRAINING: 2 rows that are held out too, since training on them would"


def report(cut: int = 0, dropped: int = 0, warnings: tuple[str, ...] = ()) -> PreflightReport:
    return PreflightReport(100, 10, 1000, 500, cut, dropped, 64, "text", "", warnings)


def codes(*arguments, **values) -> list[str]:
    return [event.code for event in row_warnings(report(*arguments, **values))]


def test_rows_cut_dropped_or_shared_are_told_with_where_they_are():
    found = list(row_warnings(report(20, 30, (CUT, DROPPED, SHARED, f"validation: {CUT}"))))
    assert [event.code for event in found] == ["truncated_rows", "dropped_rows", "shared_rows"]
    assert found[0].text == "20 of 100 training rows are cut, and learn no end."
    assert found[1].text == "30 of 130 training rows are left out."
    assert [event.evidence["found"] for event in found] == [CUT, DROPPED, SHARED]


def test_modules_trained_in_16_bits_are_told():
    (found,) = module_warnings(["lm_head"], "bfloat16")
    assert found.code == "rounded_modules"
    assert "trained in the base's bfloat16: of a step, what is below 2^-9 of" in found.text
    assert found.evidence["modules"] == "lm_head"
    # What is said of the digits: half of that step changes nothing, twice of it does.
    one = torch.ones((), dtype=torch.bfloat16)
    assert one - 2.0**-10 == one
    assert one - 2.0**-8 != one
    assert not list(module_warnings([], "bfloat16"))
    assert not list(module_warnings(["lm_head"], "float32"))


def test_a_few_rows_cut_or_dropped_are_usual():
    assert codes(10, 11, (CUT, DROPPED)) == []


def test_the_preflight_keeps_the_notes_that_no_warning_stands_for():
    notes = (CUT, DROPPED, "pad and end token are the same", f"validation: {DROPPED}")
    found = list(row_warnings(report(1, 30, notes)))
    assert [event.code for event in found] == ["dropped_rows"]
    assert without(report(1, 30, notes), found) == (notes[0], notes[2], notes[3])


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ((1, 0, 1, 1.0), "few_steps"),
        ((50, 0, 0, 0.0), "few_steps"),
        ((50, 10, 50, 0.5), "warmup_too_long"),
        ((50, 26, 50, 1.0), "warmup_too_long"),
        ((50, 25, 50, 1.0), None),
        ((2, 1, 2, 1.0), None),
    ],
)
def test_runs_too_short_for_their_schedule(values, code):
    found = list(schedule_warnings(*values))
    assert [event.code for event in found] == ([] if code is None else [code])


def test_layers_that_never_moved_are_named():
    start = {f"layer.{number}": 0.0 for number in range(6)} | {"other": 3.0}
    now = start | {"other": 3.0000001}
    found = dead_layers(start, now, 10, 12, lambda dead: f"set {len(dead)}")
    assert found is not None
    assert found.text == (
        "6 of 7 adapted layers have not moved in 10 steps: layer.0, layer.1, layer.2, layer.3 and "
        "2 more."
    )
    assert found.cure.endswith("; set 6.")
    assert dead_layers(start, now, 9, 12, str) is None
    assert dead_layers(start, {name: 1.0 for name in start}, 10, 12, str) is None


def test_updates_far_larger_than_their_weights_are_named_largest_first():
    found = exploding_offsets({"a": 20.0, "b": 0.1, "c": 30.0, "d": float("nan")}, 5)
    assert found is not None
    assert "The update of 3 of 4 layers" in found.text
    assert exploding_offsets({"a": 9.0, "b": 0.1}, 5) is None


def test_a_disk_without_room_for_the_next_checkpoints_is_told():
    found = disk_low(2 * 10**9, 10**9, "runs/x", 7)
    assert found is not None
    assert (found.code, found.step) == ("disk_low", 7)
    assert "are free on the disk of runs/x" in found.text
    assert disk_low(4 * 10**9, 10**9, "runs/x", 7) is None
    assert disk_low(10**8, 10, "runs/x", 7) is not None


def test_a_memory_nearly_full_is_told():
    found = memory_low(2, 100, "the container's", 7)
    assert found is not None
    assert found.code == "memory_low"
    assert memory_low(3, 100, "the container's", 7) is None
    assert memory_low(0, 0, "the machine's", 7) is None


def test_what_a_restraint_cannot_cut_is_told():
    (found,) = unrestrained_warnings(["lm_head", "norm"], "leave them out")
    assert (found.code, found.evidence) == ("unrestrained_modules", {"modules": "lm_head, norm"})
    assert "what is learnt by lm_head, norm stays as it is trained" in found.text
    assert "leave them out; or lower train.learning_rate" in found.cure
    assert not list(unrestrained_warnings([], "leave them out"))
