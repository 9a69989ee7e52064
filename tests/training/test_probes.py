"""The energy threshold chosen by short trainings."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.report.results import Probe
from kpsvd_tune.training import initialise as module
from kpsvd_tune.training.initialise import (
    CANDIDATES,
    EnergyProbes,
    best_first,
    round_lengths,
)


def probe(energy: float, parameters: int, loss: float) -> Probe:
    return Probe(energy, 10, parameters, 2.0, loss, 1.0)


def test_fewer_parameters_win_among_those_that_keep_the_fall() -> None:
    # Falls of 1.00, 0.99 and 0.90: the second keeps 98 % of the best, the third does not.
    large, middle, small = probe(0.8, 900, 1.0), probe(0.5, 500, 1.01), probe(0.2, 100, 1.1)
    assert best_first([large, middle, small]) == [middle, large, small]


def test_where_nothing_falls_the_lowest_loss_leads() -> None:
    worse, bad = probe(0.8, 900, 2.5), probe(0.2, 100, 2.1)
    assert best_first([worse, bad]) == [bad, worse]


@pytest.mark.parametrize(
    ("num_candidates", "num_steps", "expected"),
    [(4, 160, [5, 10]), (4, 1600, [50, 100]), (2, 400, [50]), (1, 100, []), (4, 10, [5, 10])],
)
def test_rounds_double_within_a_quarter_of_the_run(
    num_candidates: int, num_steps: int, expected: list[int]
) -> None:
    assert round_lengths(num_candidates, num_steps) == expected


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(
        adapter={"rank": {"method": "energy", "energy": "auto", "window": 8, "max": 8}},
        train={"max_steps": 4, "learning_rate": 1e-2},
    )


@pytest.mark.slow
def test_a_run_chooses_its_threshold_and_reports_the_probes(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["train", str(recipe)]) == 0
    shown = capsys.readouterr().err
    assert "choosing the energy threshold among 0.2, 0.4, 0.6, 0.8: 40 steps in 2 rounds" in shown
    report = json.loads((tmp_path / "run" / "init" / "rank_report.json").read_text())
    tried = report["probes"]
    assert [each["energy"] for each in tried[:4]] == list(CANDIDATES)
    assert [each["steps"] for each in tried] == [5] * 4 + [10] * 2
    assert report["rule"]["energy"] in CANDIDATES
    last = [Probe(**each) for each in tried[4:]]
    assert report["rule"]["energy"] == best_first(last)[0].energy
    chosen = next(p for p in tried if p["energy"] == report["rule"]["energy"])
    assert report["totals"]["trainable_parameters"] == chosen["parameters"]
    # The recipe of the run keeps what the user wrote, so that the run can be continued.
    assert "energy: auto" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert cli.run(["train", str(recipe)]) == 0
    assert "is finished; nothing was done" in capsys.readouterr().err
    assert cli.run(["report", str(tmp_path / "run")]) == 0
    assert "probe of energy 0.2" in capsys.readouterr().out


@pytest.mark.slow
def test_probes_that_are_done_are_not_run_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = EnergyProbes.probe
    calls: list[float] = []

    def stop_at_the_third(*args: Any) -> Probe | None:
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(EnergyProbes, "probe", stop_at_the_third)
    assert cli.run(["train", str(recipe)]) == 130
    kept = sorted((tmp_path / "run" / "probes").glob("*.json"))
    assert [file.name for file in kept] == [
        "energy-0.2-steps-5.json",
        "energy-0.4-steps-5.json",
    ]
    before = [file.read_bytes() for file in kept]
    monkeypatch.setattr(EnergyProbes, "probe", run)
    assert cli.run(["train", str(recipe)]) == 0
    # Times are part of a probe, so equal bytes mean that it was not run again.
    assert [file.read_bytes() for file in kept] == before


def test_without_held_out_rows_nothing_can_be_chosen(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["train", str(recipe), "dataset.validation=0"]) == 2
    assert "adapter.rank.energy: auto compares thresholds on held-out rows" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_init_only_says_that_a_default_stands_in(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["init-only", str(recipe)]) == 0
    assert "energy: auto is chosen by `train`; here 0.5 stands in" in capsys.readouterr().err


@pytest.mark.slow
def test_probes_leave_neither_models_nor_traces_in_trackers(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kpsvd_tune.decompose import start
    from kpsvd_tune.training import stages, tracking

    models: list[weakref.ref[Any]] = []
    alive: list[int] = []
    started: list[str] = []
    adapt = start.adapt

    def watch(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(model() is not None for model in models))
        model = adapt(*arguments, **options)
        models.append(weakref.ref(model))
        return model

    def make_tracker(name: str, folder: Any) -> Any:
        started.append(name)
        raise OSError("not today")

    monkeypatch.setattr(module, "adapt", watch)
    monkeypatch.setattr(stages, "adapt", watch)
    monkeypatch.setattr(tracking, "make_tracker", make_tracker)
    assert cli.run(["train", str(recipe), "tracking=[tensorboard]"]) == 0
    assert len(alive) > 2
    assert set(alive) == {0}
    assert started == ["tensorboard"]
