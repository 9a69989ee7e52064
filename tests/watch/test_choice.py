"""Choices that could not be made as the recipe asks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kpsvd_tune.hardware import bf16
from kpsvd_tune.report.results import LayerReport, RankReport
from kpsvd_tune.watch.choice import bf16_fallback, rank_fallbacks


def report(budget: int | None = None, note: str | None = None) -> RankReport:
    layer = LayerReport(
        "q", 6, 4, (3, 2, 2, 2), 2, 2, 2, "max", 0.8, 0.5, 20, 0.7, (3.0, 2.0), 1.5, 0.01, note
    )
    totals = {"modules": 2, "trainable_parameters": 400, "base_parameters": 9, "energy": 0.5}
    layers = (layer, dataclasses.replace(layer, name="k", note=None))
    return RankReport("m", totals, layers, rule={"budget": budget})


def test_a_rule_that_could_not_decide_is_told_with_its_first_layer():
    (event,) = rank_fallbacks(report(note="no elbow: the spectrum is flat"))
    assert (event.kind, event.code) == ("fallback", "threshold")
    assert "could not decide for 1 of 2 layers" in event.text
    assert "(q: no elbow: the spectrum is flat; rank 2)" in event.text
    assert list(rank_fallbacks(report(note="a prime size: that side is not split"))) == []


@pytest.mark.parametrize(("budget", "is_told"), [(None, False), (700, False), (900, True)])
def test_a_budget_of_which_not_half_is_used_is_told(budget, is_told):
    found = list(rank_fallbacks(report(budget)))
    assert [event.code for event in found] == ["budget"] * is_told
    if is_told:
        assert "400 parameters are trained, of a budget of 900" in found[0].text


def test_a_device_without_units_for_bfloat16_is_told(monkeypatch):
    monkeypatch.setattr(bf16, "CPU_MULTIPLIES_BF16", True)
    assert bf16.without_bf16(torch.device("cpu")) is None
    assert bf16.without_bf16(torch.device("meta")) is None
    monkeypatch.setattr(bf16, "CPU_MULTIPLIES_BF16", False)
    slow = bf16.without_bf16(torch.device("cpu"))
    assert slow == "this CPU"
    event = bf16_fallback(slow, "train.precision: bf16")
    assert event.text.startswith("train.precision: bf16 asks for bfloat16, and this CPU has no")
