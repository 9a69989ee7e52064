"""`train` as typed: what it tells lies in events.jsonl once, over all sessions, with its cure."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.launch import launch
from kpsvd_tune.report.events import read_events
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.report.results import Event

SMALL = {"adapter": {"rank": {"window": 8, "max": 2}}}


def warnings_of(run: Path) -> list[Event]:
    return [event for event in read_events(run) if event.kind == "warning"]


def rows_of(path: Path, *rows: tuple[str, str]) -> str:
    path.write_text(
        "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows), encoding="utf-8"
    )
    return str(path)


ORDINARY = [(f"Lea has {n} figs.", f"{n} figs") for n in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("code", ["", "truncated_rows", "dropped_rows", "shared_rows", "few_steps"])
def test_rows_and_length_that_look_wrong_are_told_before_the_first_step(
    code: str, write_recipe: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    rows = list(ORDINARY)
    dataset: dict[str, Any] = {"validation": 3, "max_length": 48}
    train = {"max_steps": 2, "eval_every": 0, "warmup_ratio": 0.0}
    if code == "truncated_rows":
        rows += [(f"Bo has {n} nuts.", "so he counts " * 6) for n in range(8)]
    elif code == "dropped_rows":
        rows += [(f"Jo has {n} nuts.", "") for n in range(8)]
    elif code == "shared_rows":
        dataset["validation"] = rows_of(
            tmp_path / "held.jsonl", *rows[:3], ("Lu has 3 nuts.", "so she counts 3")
        )
    elif code == "few_steps":
        train["max_steps"] = 1
    dataset["path"] = rows_of(tmp_path / "own.jsonl", *rows)
    recipe = write_recipe(dataset=dataset, train=train, **SMALL)
    assert cli.run(["train", str(recipe)]) in (0, 4)
    found = warnings_of(tmp_path / "run")
    assert [event.code for event in found] == ([code] if code else [])
    err = capsys.readouterr().err
    for event in found:
        assert err.count(event.text) == 1
        assert event.cure in err
        # The preflight's own note is part of the warning, and stands there once.
        if "found" in event.evidence:
            assert err.count(str(event.evidence["found"])) == 1
    (end,) = [event for event in read_events(tmp_path / "run") if event.kind == "end"]
    assert end.evidence["steps"] == train["max_steps"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_without_telling_anything_twice(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(
        dataset={"path": rows_of(tmp_path / "own.jsonl", *ORDINARY), "validation": 3},
        train={"max_steps": 12, "eval_every": 4, "warmup_ratio": 1.0},
        tracking=["tensorboard"],
        **SMALL,
    )
    original = ConsoleEvents.step

    def step(self: ConsoleEvents, metrics: Any, total: int) -> None:
        original(self, metrics, total)
        if metrics.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ConsoleEvents, "step", step)
        assert cli.run(["train", str(recipe)]) == 130
    first = read_events(tmp_path / "run")
    assert [event.code for event in first if event.kind == "warning"] == ["warmup_too_long"]
    assert first[-1].kind == "end"
    assert first[-1].text.startswith("Stopped by a signal while training, step ")
    assert "The rate rises in 11 of the 12 steps." in capsys.readouterr().err
    assert cli.run(["train", str(recipe)]) in (0, 4)
    found = read_events(tmp_path / "run")
    assert found[: len(first)] == first
    assert [event.code for event in found if event.kind == "warning"] == ["warmup_too_long"]
    told = [(event.kind, event.code, event.step, event.text) for event in found]
    assert len(set(told)) == len(told)
    assert "The rate rises" not in capsys.readouterr().err
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    # A finished run does nothing, and tells nothing.
    assert cli.run(["train", str(recipe)]) in (0, 4)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before


@pytest.mark.slow
def test_watching_changes_no_bit_of_a_run(
    start_training: Callable[..., Any], tmp_path: Path, rows: Any
) -> None:
    changes = {"eval_every": 2, "save_every": 2, "validation": rows[:3]}
    list(start_training("alone", **changes).steps())
    list(start_training("watched", tell=lambda event: None, **changes).steps())
    for name in ("offsets", "optimizer", "random"):
        files = [
            tmp_path / folder / "checkpoints" / "step-000006" / f"{name}.safetensors"
            for folder in ("alone", "watched")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("code", "num_steps"), [("few_steps", 1), ("warmup_too_long", 4)])
def test_two_processes_tell_what_looks_wrong_before_the_first_step_once(
    code: str,
    num_steps: int,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = [*ORDINARY]
    rows += [(f"Bo has {n} nuts.", "so he counts " * 6) for n in range(8)]
    rows += [(f"Jo has {n} nuts.", "") for n in range(8)]
    held = rows_of(tmp_path / "held.jsonl", *rows[:3], ("Lu has 3 nuts.", "so she counts 3"))
    recipe = write_recipe(
        dataset={
            "path": rows_of(tmp_path / "own.jsonl", *rows),
            "validation": held,
            "max_length": 48,
        },
        train={"max_steps": num_steps, "eval_every": 0, "warmup_ratio": 0.9, "batch_size": 1},
        **SMALL,
    )
    assert launch(["train", str(recipe), "--processes", "2"], 2, use_cpu=True) in (0, 4)
    found = warnings_of(tmp_path / "run")
    assert [event.code for event in found] == [
        "truncated_rows",
        "dropped_rows",
        "shared_rows",
        code,
    ]
    err = capfd.readouterr().err
    assert all(err.count(event.text) == 1 for event in found)
