"""The run directory: where a run goes on, what it refuses, what it keeps."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kpsvd_tune.errors import CheckpointError, ResourceError
from kpsvd_tune.report.events import read_events
from kpsvd_tune.report.results import Event
from kpsvd_tune.runs.directory import RunDirectory
from kpsvd_tune.runs.identity import changes, words_of
from kpsvd_tune.runs.state import TrainingState

RECIPE: dict[str, Any] = {
    "train": {"learning_rate": 1e-3, "save_every": 50, "seed": 0},
    "adapter": {"rank": {"max": 4}, "modules_to_save": ("lm_head",)},
    "tracking": [],
    "output_dir": "run",
}


KEY = "restrain.text.sha256"


def identity(**changes: Any) -> dict[str, Any]:
    recipe = json.loads(json.dumps(RECIPE))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            recipe[section][name] = value
        else:
            recipe[section] = value
    return {"recipe": recipe, "base": {"model.safetensors": "aa"}, "num_processes": 1}


def state(step: int) -> TrainingState:
    return TrainingState(
        step=step,
        offsets={"w": torch.full((2,), float(step))},
        optimizer={"state": {}, "groups": []},
        scheduler={},
        random=[{}],
        progress={"step": step},
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of six logged steps with checkpoints at 2, 4 and 6."""
    run = RunDirectory(tmp_path / "run")
    run.begin("recipe: 1", identity(), {"seed": 0})
    for step in range(1, 7):
        run.log({"step": step})
        if step % 2 == 0:
            run.save(state(step), keep=3)
    return run


def steps_logged(run: RunDirectory) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()]


def checkpoints(run: RunDirectory) -> list[str]:
    return sorted(folder.name for folder in run.checkpoints.iterdir())


def test_a_new_run_writes_recipe_and_settings(tmp_path):
    run = RunDirectory(tmp_path / "deep" / "run")
    assert not run.path.exists(), "making the object touches nothing"
    start = run.begin("recipe: 1", identity(), {"seed": 0})
    assert (start.checkpoint, start.is_finished, start.is_same) == (None, False, False)
    assert run.recipe_file.read_text() == "recipe: 1"
    written = json.loads(run.run_file.read_text())
    assert (written["status"], written["seed"]) == ("running", 0)


def test_the_same_command_goes_on_at_the_newest_checkpoint(run):
    run.log({"step": 7})
    start = run.begin("recipe: 1", identity(), {})
    assert start.checkpoint == run.checkpoints / "step-000006"
    assert (start.is_same, start.is_finished) == (True, False)
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6]
    assert run.load(start.checkpoint).step == 6


def test_old_checkpoints_go_and_the_newest_stay(run):
    assert checkpoints(run) == ["step-000002", "step-000004", "step-000006"]
    run.save(state(8), keep=2)
    assert checkpoints(run) == ["step-000006", "step-000008"]


def test_a_pending_checkpoint_is_the_newest_until_its_step_or_a_later_one_is_saved(run):
    pending = run.save(state(7), keep=3, is_pending=True)
    assert pending.name == "step-000007-pending"
    assert run.newest_checkpoint() == pending
    assert checkpoints(run) == ["step-000004", "step-000006", "step-000007-pending"]
    assert run.begin("recipe: 1", identity(), {}).checkpoint == pending
    assert run.newest_checkpoint() == run.checkpoints / "step-000007-pending"
    run.save(state(7), keep=3)
    assert checkpoints(run) == ["step-000004", "step-000006", "step-000007"]
    run.save(state(8), keep=3, is_pending=True)
    run.save(state(9), keep=3)
    assert checkpoints(run) == ["step-000006", "step-000007", "step-000009"]


def test_a_step_saved_twice_is_settled_first_and_the_pending_one_second(run):
    # As after a kill between the commit and the deletion.
    pending = run.save(state(7), keep=9, is_pending=True)
    kept = pending.with_name("kept")
    pending.rename(kept)
    settled = run.save(state(7), keep=9)
    kept.rename(pending)
    assert run.newest_checkpoint() == settled
    (settled / "state.json").write_text("{")
    assert run.begin("recipe: 1", identity(), {}).checkpoint == pending
    # The damaged one is out of the way of the save to come.
    assert "abandoned-step-000007" in checkpoints(run)
    assert run.save(state(7), keep=9) == settled
    assert pending.name not in checkpoints(run)


@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(run, caplog, damage):
    newest = run.checkpoints / "step-000006"
    names = sorted(path.name for path in newest.iterdir())
    assert len(names) == 5
    for name in names:
        path = newest / name
        data = path.read_bytes()
        if damage == "cut":
            path.write_bytes(data[: len(data) // 2])
        elif damage == "flip":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        else:
            path.unlink()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert run.newest_checkpoint() == run.checkpoints / "step-000004"
        assert str(path) in caplog.text
        assert "using step-000004 instead" in caplog.text
        path.write_bytes(data)
    assert run.newest_checkpoint() == newest


def test_a_run_goes_on_over_a_damaged_checkpoint(run):
    (run.checkpoints / "step-000006" / "state.json").write_text("{")
    assert run.begin("recipe: 1", identity(), {}).checkpoint == run.checkpoints / "step-000004"
    assert steps_logged(run) == [1, 2, 3, 4]
    run.save(state(6), keep=3)
    assert run.newest_checkpoint() == run.checkpoints / "step-000006"
    assert "abandoned-step-000006" in checkpoints(run)


def test_nothing_is_started_over_when_every_checkpoint_is_damaged(run):
    for folder in run.checkpoints.iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of the run can be used") as caught:
        run.begin("recipe: 1", identity(), {})
    assert str(caught.value).count("state.json is missing") == 3
    assert "--resume never" in str(caught.value)
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6]


def test_other_settings_are_refused_with_key_old_and_new_value(run):
    changed = identity(train__learning_rate=2e-3, adapter__modules_to_save=[])
    changed["base"]["model.safetensors"] = "bb"
    with pytest.raises(CheckpointError) as caught:
        run.begin("recipe: 2", changed, {})
    message = str(caught.value)
    assert "  train.learning_rate: 0.001 in the run, 0.002 now\n" in message
    assert "  adapter.modules_to_save: ['lm_head'] in the run, [] now\n" in message
    assert "  base.model.safetensors: 'aa' in the run, 'bb' now\n" in message
    assert "--allow-change train.learning_rate" in message
    # The hash of a file can be typed by nobody.
    assert "To continue that run, undo the change, or" in message
    assert run.recipe_file.read_text() == "recipe: 1"


def test_the_words_that_go_on_are_told(run):
    with pytest.raises(CheckpointError) as caught:
        run.begin("recipe: 2", identity(train__learning_rate=2e-3), {})
    words = "write train.learning_rate=0.001 again, or accept it with --allow-change"
    assert f"To continue that run, {words} train.learning_rate." in str(caught.value)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("no", "train.precision='no'"),
        ("bf16", "train.precision=bf16"),
        ("two words: of it", "train.precision='two words: of it'"),
        (None, "train.precision=null"),
        ([1, "a"], "train.precision=[1, a]"),
        ("Q: {a}\nA:", 'train.precision="Q: {a}\\nA:"'),
    ],
)
def test_words_to_type_are_read_back_as_they_were(value, word):
    (typed,) = words_of({"train.precision": value})
    assert shlex.split(typed) == [word]
    assert yaml.safe_load(word.partition("=")[2]) == value


@pytest.mark.parametrize(
    "changes",
    [{"tracking": ["tensorboard"]}, {"train__save_every": 10}, {"output_dir": "moved"}],
    ids=["tracking", "save_every", "output_dir"],
)
def test_harmless_changes_pass(run, changes):
    start = run.begin("recipe: 2", identity(**changes), {})
    assert start.checkpoint == run.checkpoints / "step-000006"
    assert start.is_same
    assert run.recipe_file.read_text() == "recipe: 2"


@pytest.mark.parametrize("allowed", ["train.learning_rate", "train"])
def test_an_allowed_change_passes_is_recorded_and_is_refused_no_more(run, allowed):
    changed = identity(train__learning_rate=2e-3)
    assert not run.begin("recipe: 2", changed, {}, allow_change=[allowed]).is_same
    recorded = json.loads(run.run_file.read_text())["changes"]
    assert recorded == [{"step": 6, "key": "train.learning_rate", "old": 1e-3, "new": 2e-3}]
    assert run.begin("recipe: 2", changed, {}).is_same


def test_a_key_that_joined_or_left_is_a_change(run):
    with pytest.raises(CheckpointError, match=r"train\.extra: '\(not set\)' in the run, 1 now"):
        run.begin("recipe: 2", identity(train__extra=1), {})


def test_a_key_of_a_later_version_counts_as_its_default(run):
    later = identity(train__packing=False, train__early_stopping=None)
    assert run.begin("recipe: 2", later, {}).is_same
    with pytest.raises(CheckpointError, match=r"train\.weight_decay: 0\.0 in the run, 0\.1 now"):
        run.begin("recipe: 2", identity(train__weight_decay=0.1), {})


def test_a_run_without_a_checkpoint_starts_anew_whatever_its_settings(tmp_path):
    run = RunDirectory(tmp_path)
    run.begin("recipe: 1", identity(), {})
    run.log({"step": 1})
    assert run.begin("recipe: 1", identity(), {}).is_same
    assert run.metrics_file.read_text() == ""
    start = run.begin("recipe: 2", identity(train__seed=1), {})
    assert (start.checkpoint, start.is_same) == (None, False)
    assert run.recipe_file.read_text() == "recipe: 2"


def test_a_finished_run_is_recognised(run):
    run.finish({"train_loss": 0.5})
    assert json.loads(run.results_file.read_text()) == {"train_loss": 0.5}
    assert run.begin("recipe: 1", identity(), {}).is_finished
    with pytest.raises(CheckpointError, match=r"train\.seed: 0 in the run, 1 now"):
        run.begin("recipe: 1", identity(train__seed=1), {})
    start = run.begin("recipe: 1", identity(train__seed=1), {}, allow_change=["train.seed"])
    assert (start.is_finished, start.checkpoint) == (False, run.checkpoints / "step-000006")
    # It is unfinished from then on, until it finishes again.
    assert not run.begin("recipe: 1", identity(train__seed=1), {}).is_finished


def test_a_run_killed_between_results_and_the_mark_is_not_finished(run):
    run.results_file.write_text("{}")
    assert not run.begin("recipe: 1", identity(), {}).is_finished


def test_keys_that_are_gone_count_only_where_they_had_an_effect(tmp_path):
    earlier = {"gradient_batches": 4, "rate_ratio": 1.0, "init": "weight"}
    run = RunDirectory(tmp_path / "run")
    run.begin("recipe: 1", identity(adapter__gradient_batches=4, adapter__rate_ratio=1.0), {})
    run.save(state(2), keep=2)
    assert run.begin("recipe: 1", identity(), {}).is_same
    assert (
        changes({"recipe": {"adapter": earlier}}, {"recipe": {"adapter": {"init": "weight"}}}) == {}
    )
    # As the folder of a comparison has the adapter section of each method.
    assert changes(earlier, {"init": "weight"}) == {}
    found = changes(
        {"recipe": {"adapter": {**earlier, "rate_ratio": 2.0}}},
        {"recipe": {"adapter": {"init": "weight"}}},
    )
    assert found == {"adapter.rate_ratio": (2.0, "(not set)")}


def test_resume_never_sets_the_earlier_run_aside(run):
    (run.path / "notes.txt").write_text("mine")
    start = run.begin("recipe: 2", identity(train__seed=1), {}, resume="never")
    assert start.checkpoint is None
    assert not run.checkpoints.exists()
    kept = RunDirectory(run.path / "previous" / "001")
    assert kept.newest_checkpoint() == kept.checkpoints / "step-000006"
    assert steps_logged(kept) == [1, 2, 3, 4, 5, 6]
    assert (run.path / "notes.txt").read_text() == "mine"
    run.save(state(2), keep=1)
    run.begin("recipe: 3", identity(), {}, resume="never")
    assert (run.path / "previous" / "002" / "checkpoints" / "step-000002").is_dir()


def test_a_run_resumes_from_a_named_checkpoint(run):
    start = run.begin("recipe: 1", identity(), {}, resume=str(run.checkpoints / "step-000002"))
    assert start.checkpoint is not None
    assert start.checkpoint.name == "step-000002"
    assert steps_logged(run) == [1, 2]
    # Those after it are of a path not taken, and never chosen again.
    assert run.newest_checkpoint() == run.checkpoints / "step-000002"


@pytest.mark.parametrize("resume", ["old/checkpoints/step-000002", "run/checkpoints/step-000001"])
def test_a_new_run_never_ignores_the_checkpoint_that_it_was_given(tmp_path, resume):
    run = RunDirectory(tmp_path / "new")
    message = r"is no checkpoint of this run; .* or nothing else: .*new holds no.*adapter\.from"
    with pytest.raises(CheckpointError, match=message):
        run.check_ours(resume)
    with pytest.raises(CheckpointError, match=message):
        run.begin("recipe: 1", identity(), {}, resume=resume)
    assert not run.path.exists()


@pytest.mark.parametrize(
    "path", ["elsewhere/step-000002", "run/checkpoints/newest", "run/checkpoints/step-000005"]
)
def test_a_path_that_is_no_checkpoint_of_the_run_is_refused(run, tmp_path, path):
    with pytest.raises(
        CheckpointError,
        match=r"is no checkpoint of this run; expected auto, never, or one of .*step-000006.*,",
    ):
        run.begin("recipe: 1", identity(), {}, resume=str(tmp_path / path))


def test_a_named_checkpoint_that_is_damaged_is_refused(run):
    newest = run.checkpoints / "step-000006"
    (newest / "offsets.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"offsets\.safetensors is missing"):
        run.begin("recipe: 1", identity(), {}, resume=str(newest))


def test_lost_lines_of_metrics_are_reported(run, caplog):
    run.metrics_file.write_text('{"step": 1}\n')
    with caplog.at_level(logging.WARNING):
        run.begin("recipe: 1", identity(), {})
    assert "lost lines that step-000006 counts on" in caplog.text


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with (
        run.lock(),
        pytest.raises(CheckpointError, match=rf"in use by another run \(process {os.getpid()} on"),
        RunDirectory(tmp_path / "run").lock(),
    ):
        pass
    with run.lock():
        pass


def test_the_lock_ends_with_its_process_however_that_ends(tmp_path):
    run = RunDirectory(tmp_path)
    # Takes the lock as `lock` does; importing the package would take seconds.
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(CheckpointError, match=r"in use by another run \(unknown\)"), run.lock():
            pass
        other.kill()
        other.wait()
        with run.lock():
            pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    run = RunDirectory(tmp_path / "file" / "run")
    with pytest.raises(ResourceError, match=f"could not make the folder {run.path}"):
        run.begin("recipe: 1", identity(), {})


def test_a_vanished_folder_is_named_with_path_and_bytes(run, tmp_path):
    run.path.rename(tmp_path / "gone")
    with pytest.raises(ResourceError, match=rf"append \d+ bytes to {run.metrics_file}: No such"):
        run.log({"step": 7})


def test_what_made_the_factors_cannot_be_accepted(run):
    changed = identity(adapter__rank={"max": 2}, train__learning_rate=2e-3)
    with pytest.raises(CheckpointError) as caught:
        run.begin("recipe: 2", changed, {}, allow_change=["adapter", "train"])
    message = str(caught.value)
    assert "adapter.rank.max: 4 in the run, 2 now" in message
    assert "adapter.rank.max made the factors" in message
    assert "train.learning_rate" not in message
    assert "--allow-change" not in message
    with pytest.raises(CheckpointError, match=r"adapter: '\(not set\)' in the run, 'aa' now"):
        run.begin("recipe", {**identity(), "adapter": "aa"}, {}, allow_change=["adapter"])


def event(text: str) -> Event:
    return Event(time="2026-01-02T03:04:05+00:00", kind="note", text=text)


def test_events_outlive_a_return_to_a_checkpoint_and_half_a_line_is_cut_off(run):
    run.tell(event("one"))
    run.log({"step": 7})
    with run.events_file.open("a") as file:
        file.write('{"time": "20')
    assert run.begin("recipe: 1", identity(), {}).checkpoint is not None
    run.tell(event("two"))
    assert [each.text for each in read_events(run.path)] == ["one", "two"]
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6]
    run.rewind()
    assert len(read_events(run.path)) == 2


def test_events_go_with_a_run_that_is_set_aside_or_begun_again(run, tmp_path):
    run.tell(event("one"))
    run.begin("recipe: 1", identity(), {}, resume="never")
    assert not run.events_file.exists()
    assert [each.text for each in read_events(run.path / "previous" / "001")] == ["one"]
    run.tell(event("two"))
    run.begin("recipe: 1", identity(), {})
    assert read_events(run.path) == ()


def test_how_a_session_ended_is_recorded_until_the_run_goes_on(run):
    assert run.interrupted("stopped", "by SIGINT")
    record = json.loads(run.run_file.read_text())
    assert (record["status"], record["reason"]) == ("stopped", "by SIGINT")
    assert record["ended"][:2] == "20"
    # Said once, and not by a session that began nothing.
    assert not run.interrupted("failed", "x")
    again = RunDirectory(run.path)
    assert not again.interrupted("failed", "x")
    assert again.begin("recipe: 1", identity(), {"seed": 0}).checkpoint is not None
    record = json.loads(run.run_file.read_text())
    assert record["status"] == "running"
    assert not {"reason", "ended"} & record.keys()
    again.finish({"steps": 6})
    assert not again.interrupted("failed", "x")
    assert json.loads(run.run_file.read_text())["status"] == "finished"


def test_the_time_of_every_command_is_kept(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.device_seconds = lambda: 7.0
    run.begin("recipe: 1", identity(), {"started": "first"})
    assert run.interrupted("stopped", "by SIGINT")
    # Nothing was saved, so it begins again; what it took is not forgotten for that.
    killed = RunDirectory(run.path)
    killed.device_seconds = iter([1.0, 20.0]).__next__
    killed.begin("recipe: 1", identity(), {"started": "second"})
    killed.save(state(2), keep=3)
    last = RunDirectory(run.path)
    last.device_seconds = lambda: 30.0
    last.begin("recipe: 1", identity(), {"started": "third"})
    last.finish({"loss": 1.0})
    record = json.loads(run.run_file.read_text())
    told = [(each["started"], each["device_seconds"]) for each in record["sessions"]]
    assert told == [("first", 7.0), ("second", 20.0), ("third", 30.0)]
    assert ["ended" in each for each in record["sessions"]] == [True, False, True]
    assert record["started"] == "third"
    # Other settings before the first checkpoint are another run.
    other = RunDirectory(tmp_path / "other")
    other.begin("recipe: 1", identity(), {"started": "first"})
    other.begin("recipe: 2", identity(train__seed=1), {"started": "second"})
    record = json.loads(other.run_file.read_text())
    assert record["sessions"] == [{"started": "second"}]


def test_a_run_of_a_version_that_counted_no_time_goes_on(run):
    record = json.loads(run.run_file.read_text())
    del record["sessions"]
    record |= {"started": "first", "status": "stopped", "ended": "later"}
    run.run_file.write_text(json.dumps(record))
    again = RunDirectory(run.path)
    again.device_seconds = lambda: 3.0
    again.begin("recipe: 1", identity(), {"started": "second"})
    assert json.loads(run.run_file.read_text())["sessions"] == [
        {"started": "first", "ended": "later"},
        {"started": "second", "device_seconds": 3.0},
    ]


def test_the_text_of_restrain_is_compared_where_both_know_its_hash():
    kept = {"text": "kept.txt", "limit": 0.01}
    none = identity(restrain=None)
    old, one, two = (identity(restrain=kept) | each for each in ({}, {KEY: "aa"}, {KEY: "bb"}))
    assert changes(old, one) == changes(one, old) == {}
    assert changes(one, two) == {KEY: ("aa", "bb")}
    assert KEY not in changes(none, one)
    assert KEY not in changes(one, none)
    # It is below a key of the recipe, and none that can be typed.
    assert words_of({KEY: "aa"}) == []
