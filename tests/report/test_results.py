"""Results: frozen values that go to JSON and come back equal."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kpsvd_tune.errors import InputError
from kpsvd_tune.report.results import (
    Event,
    LayerReport,
    MergeReport,
    PreflightReport,
    RankReport,
    Score,
    SourceCount,
    StepMetrics,
    TrainResult,
)
from kpsvd_tune.storage.json_files import check_types

LAYER_KEYS = [
    "name",
    "out_features",
    "in_features",
    "factor_shape",
    "rank",
    "rank_energy",
    "rank_elbow",
    "bound_by",
    "energy_window",
    "energy_total",
    "parameters",
    "relative_error",
    "singular_values",
    "stable_rank",
    "seconds",
    "note",
]


def layer(name: str = "model.layers.0.self_attn.q_proj", note: str | None = None) -> LayerReport:
    return LayerReport(
        name=name,
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
        note=note,
    )


@pytest.fixture
def report() -> RankReport:
    return RankReport(
        model="tiny",
        totals={
            "modules": 2,
            "trainable_parameters": 40,
            "base_parameters": 48,
            "energy": 0.5,
        },
        layers=(layer(), layer("model.layers.0.mlp.up_proj", "7 is prime")),
        untouched=(("lm_head", "output embedding"),),
        rule={"method": "energy", "energy": 0.5, "budget": None},
    )


def test_a_rank_report_comes_back_equal_from_json(report: RankReport):
    assert RankReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_rank_report_has_the_agreed_keys_in_order(report: RankReport):
    content = report.to_dict()
    assert list(content) == [
        *("model", "totals", "layers", "untouched", "rule", "probes", "form", "frozen_seed"),
        "trained_whole",
    ]
    assert list(content["layers"][0]) == LAYER_KEYS
    assert content["layers"][0]["factor_shape"] == [3, 2, 2, 2]
    assert content["layers"][0]["singular_values"] == [3.0, 2.0, 1.0]
    assert content["untouched"] == [{"name": "lm_head", "reason": "output embedding"}]


def test_what_may_be_left_out_has_a_default(report: RankReport):
    content = report.to_dict()
    del content["untouched"], content["rule"], content["probes"], content["layers"][0]["note"]
    read = RankReport.from_dict(content)
    assert (read.untouched, read.rule, read.layers[0].note) == ((), {}, None)


@pytest.mark.parametrize(
    ("place", "missing", "what"),
    [
        ((), "model", r"the rank report holds something unexpected \(model: field required"),
        (("totals",), "energy", "the rank report lacks the totals energy"),
        (("layers", 0), "rank", r"\(layers.0.rank: field required, got an object with 15 keys"),
    ],
)
def test_a_report_without_a_key_is_refused(report: RankReport, place, missing: str, what: str):
    content = json.loads(json.dumps(report.to_dict()))
    inner = content
    for step in place:
        inner = inner[step]
    del inner[missing]
    with pytest.raises(InputError, match=what) as refused:
        RankReport.from_dict(content)
    assert "write it again with `kpsvd-tune init-only`" in str(refused.value)


def test_a_report_with_an_unknown_key_is_refused(report: RankReport):
    content = report.to_dict()
    content["layers"][1]["rnk"] = 3
    with pytest.raises(InputError, match=r"\(layers.1.rnk: unexpected keyword argument, got 3"):
        RankReport.from_dict(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"totals": []}, r"\(totals: input should be a valid dictionary, got a list of 0"),
        ({"model": 3}, "the rank report holds something unexpected"),
    ],
)
def test_a_report_of_wrong_types_is_refused(report: RankReport, changes, message: str):
    with pytest.raises(InputError, match=message) as refused:
        RankReport.from_dict({**report.to_dict(), **changes})
    assert "write it again with `kpsvd-tune init-only`" in str(refused.value)


RESULTS = [
    layer(),
    PreflightReport(8, 2, 100, 40, 0, 0, 20, "chat", "has messages", ("short",), (("Hi", False),)),
    StepMetrics(1, 0.5, 1.2, 1e-3, 0.7, 64, 32.0, 2.0),
    TrainResult(0.9, None, None, 3, 40, 1.5, 1024),
    MergeReport(
        adapter="runs/x/adapter",
        output="merged",
        dtype="float32",
        tolerance=1e-4,
        max_logit_difference=1e-6,
        top1_agreement=1.0,
        num_positions=12,
        prompts=("Hi",),
        kept_share={"a": 1.0},
        relative_update={"a": 0.1},
        min_kept_share=1.0,
        passed=True,
    ),
    Score("exact_match", 0.5, 4, 0.25),
]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_every_result_is_plain_json_and_frozen(result):
    content = result.to_dict()
    assert json.loads(json.dumps(content)) == content
    assert list(content) == [field.name for field in dataclasses.fields(result)]
    name = next(iter(content))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, name, None)
    assert getattr(result, name) == content[name]


def test_a_preflight_report_comes_back_equal_from_json():
    found = RESULTS[1]
    assert isinstance(found, PreflightReport)
    sources = (SourceCount("a.jsonl", 2.0, 16, 80, "chat"),)
    report = dataclasses.replace(found, sources=sources)
    content = json.loads(json.dumps(report.to_dict()))
    assert check_types(content, PreflightReport) == report
    with pytest.raises(ValueError, match="num_rows: input should be a valid integer"):
        check_types({**content, "num_rows": "many"}, PreflightReport)


def test_an_event_comes_back_from_its_line_and_keys_of_later_versions_are_left_out():
    event = Event(
        time="2026-01-02T03:04:05+00:00",
        kind="warning",
        text="The loss rose.",
        code="loss_spike",
        step=7,
        evidence={"loss": 3.5, "median": 1, "rows": "1, 2"},
        cure="Lower train.learning_rate.",
    )
    assert Event.from_dict(json.loads(json.dumps(event.to_dict() | {"later": 1}))) == event
    stage = Event(time="2026-01-02T03:04:05+00:00", kind="stage", text="reading rows")
    assert Event.from_dict({"time": stage.time, "kind": "stage", "text": stage.text}) == stage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "alarm"}, r"the event holds something unexpected \(kind: .*got \"alarm\""),
        ({"step": "seven"}, r"\(step: .*got \"seven\"\); was events.jsonl edited"),
        ({"evidence": {"loss": [1]}}, r"evidence.loss"),
    ],
)
def test_an_event_with_a_value_of_another_type_is_refused(change, message):
    line = {"time": "2026-01-02T03:04:05+00:00", "kind": "note", "text": "x"} | change
    with pytest.raises(InputError, match=message):
        Event.from_dict(line)
