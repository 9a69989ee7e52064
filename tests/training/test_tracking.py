"""Trackers get the numbers, and their failures end nothing."""

from __future__ import annotations

import logging

import pytest

from kpsvd_tune.training.tracking import Tracking


class Recorder:
    """Stands for an accelerator with one tracker."""

    def __init__(self, fails_at: str = "") -> None:
        self.log_with = ["recorder"]
        self.trackers = [self]
        self.fails_at = fails_at
        self.calls: list[tuple[object, ...]] = []

    def _record(self, name, *values):
        self.calls.append((name, *values))
        if name == self.fails_at:
            raise ConnectionError("no route to host")

    def init_trackers(self, project, config):
        self._record("init", project, config)

    def log(self, numbers, step):
        self._record("log", numbers, step)

    def finish(self):
        self._record("finish")


def test_numbers_and_flat_settings_arrive():
    recorder = Recorder()
    tracking = Tracking(recorder, {"seed": 1, "train": {"rate": 0.1, "none": None, "list": [1]}})
    tracking.log({"loss": 2.0}, step=3)
    tracking.end()
    config = {"seed": 1, "train.rate": 0.1, "train.none": "None", "train.list": "[1]"}
    assert recorder.calls == [
        ("init", "kpsvd-tune", config),
        ("log", {"loss": 2.0}, 3),
        ("finish",),
    ]


@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_a_failing_tracker_is_reported_once_and_left_alone(caplog, fails_at):
    recorder = Recorder(fails_at)
    with caplog.at_level(logging.WARNING):
        tracking = Tracking(recorder, {})
        tracking.log({"loss": 2.0}, step=1)
        tracking.log({"loss": 2.0}, step=2)
        tracking.end()
        tracking.end()
    assert len(caplog.records) == 1
    assert "training goes on: ConnectionError: no route to host" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_writes_into_the_run(start_training, tmp_path):
    pytest.importorskip("tensorboard")
    list(start_training(tracking=("tensorboard",), max_steps=2).steps())
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))
