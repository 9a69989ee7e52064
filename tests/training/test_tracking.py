"""Trackers get the numbers, and their failures end nothing."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import pytest

from kpsvd_tune.training import tracking as module
from kpsvd_tune.training.tracking import Tracking


class Recorder:
    """A tracker that remembers what it was told, and fails when asked to."""

    calls: list[tuple[object, ...]]
    fails_at = ""

    def __init__(self, project: str) -> None:
        self.calls.append(("init", project))
        self._fail("init")

    def _fail(self, method: str) -> None:
        if method == self.fails_at:
            raise ConnectionError("no route to host")

    def start(self):
        sys.stdout.write("hello from the tracker\n")
        self._fail("start")

    def store_init_configuration(self, settings):
        self.calls.append(("settings", settings))
        self._fail("settings")

    def log(self, numbers, step):
        self.calls.append(("log", numbers, step))
        self._fail("log")

    def finish(self):
        self.calls.append(("finish",))
        self._fail("finish")


class Processes:
    """Stands for an accelerator."""

    def __init__(self, *log_with: str, is_main_process: bool = True) -> None:
        self.log_with, self.is_main_process = list(log_with), is_main_process
        self.logging_dir = "runs/mine/logs"


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Recorder]]:
    """Two kinds of tracker, in place of those that a recipe can name."""
    kinds = {name: type(name, (Recorder,), {"name": name, "calls": []}) for name in ("one", "two")}
    monkeypatch.setattr(module, "make_tracker", lambda name, _: kinds[name]("kpsvd-tune"))
    return kinds


def test_numbers_and_flat_settings_arrive(recorders, capsys):
    settings = {
        "seed": 1,
        "train": {"rate": 0.1, "none": None, "list": [1], "args": {}},
        # A user's own words, which a tracker may refuse as a name.
        "overrides": {r".*(q|k)_proj": 3},
    }
    tracking = Tracking(Processes("one"), settings)
    tracking.log({"loss": 2.0, "skipped": "the loss is nan"}, step=3)
    tracking.end()
    tracking.end()
    flat = {
        "seed": 1,
        "train.rate": 0.1,
        "train.none": "None",
        "train.list": "[1]",
        "overrides": "{'.*(q|k)_proj': 3}",
    }
    assert recorders["one"].calls == [
        ("init", "kpsvd-tune"),
        ("settings", flat),
        ("log", {"loss": 2.0}, 3),
        ("finish",),
    ]
    # Standard output is the command's result and nothing else.
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello from the tracker\n")


@pytest.mark.parametrize("fails_at", ["init", "start", "settings", "log", "finish"])
def test_a_failing_tracker_is_reported_once_and_the_other_goes_on(recorders, caplog, fails_at):
    recorders["one"].fails_at = fails_at
    with caplog.at_level(logging.WARNING):
        tracking = Tracking(Processes("one", "two"), {})
        tracking.log({"loss": 2.0}, step=1)
        tracking.log({"loss": 2.0}, step=2)
        tracking.end()
        tracking.end()
    assert len(caplog.records) == 1
    assert "tracking by one stopped, training goes on: ConnectionError: no route" in caplog.text
    assert [call[0] for call in recorders["two"].calls] == [
        *("init", "settings", "log", "log", "finish")
    ]


def test_only_the_main_process_tracks(recorders):
    tracking = Tracking(Processes("one", is_main_process=False), {})
    tracking.log({"loss": 2.0}, step=1)
    tracking.end()
    assert recorders["one"].calls == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_writes_into_the_run(start_training, tmp_path):
    pytest.importorskip("tensorboard")
    list(start_training(tracking=("tensorboard",), max_steps=2).steps())
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_outlives_its_tracker(start_training, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker  # type: ignore[import-untyped]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    steps = list(start_training(tracking=("tensorboard",), max_steps=3).steps())
    assert len(steps) == 3
    assert caplog.text.count("tracking by tensorboard stopped, training goes on") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a library that is not ours
@pytest.mark.parametrize("how", ["ends", "stops"])
def test_wandb_writes_into_the_run_without_a_network(start_training, tmp_path, monkeypatch, how):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    steps = start_training(tracking=("wandb",), max_steps=3).steps()
    next(steps)
    if how == "ends":
        list(steps)
    else:
        # As a signal or a failure leaves the loop.
        steps.close()
    (file,) = (tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    # A process of wandb's own writes the file.
    waited_until = time.monotonic() + 30
    while b"grad_norm" not in file.read_bytes():
        assert time.monotonic() < waited_until, "wandb has not written the numbers"
        time.sleep(0.1)


def test_a_training_without_settings_is_no_run_to_track(recorders):
    tracking = Tracking(Processes("one"), None)
    tracking.log({"loss": 1.0}, step=1)
    tracking.end()
    assert recorders["one"].calls == []
