"""The command compare, end to end on the tiny model: run, killed, continued, judged."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from safetensors.torch import load_file

from kpsvd_tune.commands import main as cli
from kpsvd_tune.comparison.kept_base import KeptBase
from kpsvd_tune.comparison.workers import Workers, _answer
from kpsvd_tune.estimate.time import Speed
from kpsvd_tune.report import live
from kpsvd_tune.report.comparison import TrialRow
from kpsvd_tune.report.live import TrialTable


@pytest.fixture
def recipe(tmp_path: Path, rows_file: Path, write_recipe: Callable[..., Path]) -> Path:
    text = tmp_path / "other.txt"
    text.write_text("A text of another kind, about boats and the sea.", encoding="utf-8")
    return write_recipe(
        adapter={"rank": {"window": 4, "max": 4}},
        train={"max_steps": 4, "eval_every": 2},
        compare={"test": str(rows_file), "forgetting": str(text), "price_per_hour": 2},
        output_dir=str(tmp_path / "comparison"),
    )


ARGUMENTS = (
    *("--methods", "kpsvd,lora", "--budgets", "3k", "--learning-rates", "1e-3,1e-2"),
    *("--seeds", "2", "--offline"),
)


def rows_of(folder: Path) -> list[TrialRow]:
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [TrialRow.from_dict(json.loads(line)) for line in lines]


def without_times(row: TrialRow) -> dict[str, Any]:
    measured = ("seconds", "memory")
    return {k: v for k, v in row.to_dict().items() if not any(word in k for word in measured)}


def run_here(monkeypatch: pytest.MonkeyPatch, *, keeps: bool) -> list[int]:
    """Let trials run one after the other here, with one base model or with one for each.

    Returns:
        Filled as trials end: how many tensors are alive then.
    """
    alive: list[int] = []

    def run(workers: Any, tasks: Any) -> Iterator[Any]:
        material, recipe = workers._material, workers._recipe
        base = KeptBase(material.source, recipe)
        for task in tasks:
            if not keeps:
                base = KeptBase(material.source, recipe)
            answer = _answer(task, material, recipe, base, lambda step: workers._stepped(*step))
            if isinstance(answer, BaseException):
                raise answer
            # Asked for its type by its class, for some objects of others answer with a warning.
            alive.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
            yield task, answer

    monkeypatch.setattr(Workers, "_run", run)
    return alive


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a look at what trials do rather than at processes."""
    run_here(monkeypatch, keeps=True)


@pytest.mark.slow
def test_what_ran_before_in_a_process_changes_no_trial_and_leaves_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PiSSA overwrites weights, IA3 and VeRA replace layers in other ways; LoRA comes twice.
    methods = "lora,pissa,ia3,vera,kpsvd,lora:alpha=4,kpsvd:init=random"
    command = ["compare", str(recipe), "--offline", "--methods", methods, "--budgets", "3k"]
    command += ["--learning-rates", "1e-2", "--seeds", "1", "train.max_steps=2"]
    command += ["adapter.dropout=0", "train.eval_every=0"]
    with monkeypatch.context() as patch:
        alive = run_here(patch, keeps=True)
        assert cli.run(command) == 0
    with monkeypatch.context() as patch:
        run_here(patch, keeps=False)
        assert cli.run([*reversed_methods(command), f"output_dir={tmp_path / 'alone'}"]) == 0
    together, alone = (
        {row.method: without_times(row) for row in rows_of(tmp_path / name)}
        for name in ("comparison", "alone")
    )
    assert together == alone
    for name in ("lora-3000", "kpsvd_init=random-3000", "vera-3000"):
        files = [
            next((tmp_path / folder / "trials").glob(f"{name}-*/adapter/*.safetensors"))
            for folder in ("comparison", "alone")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
    # Of the base and of what is loaded once for all; trials differ by none.
    assert max(alive[2:]) <= alive[1] + 5


def reversed_methods(command: list[str]) -> list[str]:
    """The same command with its methods in the other order."""
    place = command.index("--methods") + 1
    order = ",".join(reversed(command[place].split(",")))
    return [*command[:place], order, *command[place + 1 :]]


@pytest.mark.slow
def test_every_kind_of_method_trains_through_the_same_loop(
    recipe: Path, tmp_path: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = (
        "kpsvd,kpsvd:init=random:rate=relative,kpsvd:rank.max=2,kpsvd:on=gate_proj,lora,lora+,"
        "lora-fa,lora-xs,kpsvd:form=left:factor_size=4,lora:on=q_proj+v_proj,pissa,hira,lokr,"
        "randlora,vera,ia3"
    )
    command = ["compare", str(recipe), "--offline", "--methods", methods, "--budgets", "3k"]
    command += ["--learning-rates", "1e-2", "--seeds", "1"]
    assert cli.run(command) == 0
    captured = capsys.readouterr()
    assert "lora at 3,000, rate 0.01, seed 0: validation loss" in captured.err
    assert "kpsvd:rank.max=2 minus lora at 3,000" in captured.out
    rows = {row.method: row for row in rows_of(tmp_path / "comparison")}
    assert list(rows) == methods.split(",")
    assert all(row.trainable_parameters <= 3060 for row in rows.values())
    # The same rows in the same order: the first loss is the base model's, whatever the method.
    first = [row.losses[0] for row in rows.values()]
    assert first == pytest.approx([first[0]] * len(first), rel=1e-3)
    assert len({row.validation_loss for row in rows.values()}) == len(rows)
    # Offsets come with their frozen factors, and PiSSA for the unmodified base with its start.
    # What VeRA and RandLoRA draw is stored as its seed, LoRA-FA's frozen side as it is.
    for name, times in {"kpsvd": 2, "lora": 1, "pissa": 2, "vera": 1, "randlora": 1}.items():
        assert rows[name].stored_parameters == times * rows[name].trainable_parameters
    assert rows["lora-fa"].stored_parameters > rows["lora-fa"].trainable_parameters
    assert rows["ia3"].rank == "–"
    # A core of 4 x 4, the whole window, in each of 14 layers.
    assert (rows["lora-xs"].rank, rows["lora-xs"].trainable_parameters) == ("4", 14 * 16)
    assert "lora-xs (ours)" in captured.out
    assert "lora-fa (ours)" in captured.out
    assert "lora-fa is this project's own code: PEFT has no such method" in captured.out
    assert "ia3 at 3,000 trains 480 parameters, the nearest below of the sizes" in captured.out
    # An adapter on some modules has no tensors of others.
    for name, modules in {
        "kpsvd_on=gate_proj": ["gate_proj"],
        "lora_on=q_proj+v_proj": ["q_proj", "v_proj"],
    }.items():
        (file,) = (tmp_path / "comparison" / "trials").glob(f"{name}-*/adapter/*.safetensors")
        found = {re.search(r"[a-z]+_proj", key)[0] for key in load_file(file)}  # type: ignore[index]
        assert sorted(found) == modules
    for row in rows.values():
        assert list((tmp_path / "comparison" / "trials").glob("*/adapter/adapter_config.json"))
        assert row.validation_loss is not None
        assert row.validation_loss < row.validation_losses[0][1]

    # A trial that ended and lost its row gives the row again; other settings of one do not.
    results = tmp_path / "comparison" / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:3]) + b'{"half')
    assert cli.run(command) == 0
    assert {row.method: row for row in rows_of(tmp_path / "comparison")} == rows
    assert cli.run([*command, "adapter.rate=relative"]) == 1
    assert "kpsvd: adapter.rate: 'factors' in the run, 'relative' now" in capsys.readouterr().err
    # Trials of a version with another warm-up are judged, and get no new ones beside them.
    known = json.loads((tmp_path / "comparison" / "compare.json").read_text())
    del known["schedule"]
    (tmp_path / "comparison" / "compare.json").write_text(json.dumps(known))
    assert cli.run(command) == 0
    capsys.readouterr()
    assert cli.run([*command[:-1], "2"]) == 1
    assert "trials of an earlier version, whose warm-up gave" in capsys.readouterr().err
    results.write_bytes(b"")
    assert cli.run([*command[:4], "lora", *command[5:], "train.max_steps=3"]) == 0
    assert [len(row.losses) for row in rows_of(tmp_path / "comparison")] == [3]


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_ends_the_same(
    recipe: Path, tmp_path: Path, warm_below: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two methods, two rates, two seeds; kill -9 after the third trial."""
    folder = tmp_path / "comparison"
    command = [sys.executable, "-m", "kpsvd_tune", "compare", str(recipe), *ARGUMENTS]
    process = warm.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    results = folder / "results.jsonl"
    deadline = time.monotonic() + 180
    while not results.exists() or results.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "the comparison ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    early = rows_of(folder)
    assert 3 <= len(early) < 8
    # The moment between a trial's end and its row: finished, and no row is there.
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:-1]))
    early = early[:-1]
    # What a crash in the middle of a line would leave.
    with results.open("ab") as file:
        file.write(b'{"method": "kpsvd", "bud')

    done = warm.run([*command, "--json"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    rows = rows_of(folder)
    assert rows[: len(early)] == early
    assert len({(r.method, r.learning_rate, r.seed) for r in rows}) == len(rows) == 8
    assert {r.trainable_parameters <= 3060 for r in rows} == {True}
    assert all(r.validation_losses[0][1] == rows[0].validation_losses[0][1] for r in rows)
    assert all(r.test_loss is not None and r.forgetting is not None for r in rows)
    assert {s["method"] for s in verdict["summaries"]} == {"kpsvd", "lora"}
    assert all(s["num_trials"] == 4 and s["cost"] > 0 for s in verdict["summaries"])
    assert len(verdict["claims"]) == 4
    assert verdict == json.loads((folder / "comparison.json").read_text())
    assert "Plotly" in (folder / "comparison.html").read_text(encoding="utf-8")

    # The same trials without any kill give the same rows, times and memory aside.
    again = tmp_path / "again"
    done = warm.run(
        [*command, "--jobs", "2", f"output_dir={again}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    key = lambda row: (row["method"], row["learning_rate"], row["seed"])  # noqa: E731
    fresh = sorted(map(without_times, rows_of(again)), key=key)
    assert fresh == sorted(map(without_times, rows), key=key)

    # A third call has nothing to do, and other data are refused by name.
    arguments = command[3:]
    assert cli.run(arguments) == 0
    assert "8 trials are done already" in capsys.readouterr().err
    assert cli.run([*arguments, "train.max_steps=5"]) == 1
    told = capsys.readouterr().err
    assert "train.max_steps: 4 in the run, 5 now" in told
    assert "write train.max_steps=4 again, or choose another" in " ".join(told.split())
    # So are other settings of a method that has trials, and a test file of other rows.
    assert cli.run([*arguments, "adapter.init=random"]) == 1
    assert "kpsvd: adapter.init: 'weight' in the run, 'random' now" in capsys.readouterr().err
    # Judging alone runs nothing; a line that is no row is named.
    judged = [*arguments, "--plan", "done", "--json"]
    assert cli.run(judged) == 0
    assert json.loads(capsys.readouterr().out)["summaries"] == verdict["summaries"]
    with results.open("ab") as file:
        file.write(b"[]\n")
    assert cli.run(judged) == 2
    assert "results.jsonl:9 is no row of a trial" in capsys.readouterr().err


@pytest.mark.slow
def test_no_stage_that_has_ended_gives_signs_of_life_while_trials_run(
    recipe: Path,
    tmp_path: Path,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["compare", str(recipe), "--offline", "--methods", "kpsvd", "--budgets", "3k"]
    command += ["--learning-rates", "1e-2", "--seeds", "2"]

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("the probe found no room")

    # An estimate that fails ends no comparison.
    with monkeypatch.context() as patch:
        patch.setattr("kpsvd_tune.comparison.compare.comparison_work", out_of_memory)
        assert cli.run(command) == 0
    said = capsys.readouterr().err
    assert "· estimating how long 2 trials will take" in said
    assert "a trial:" not in said
    results = tmp_path / "comparison" / "results.jsonl"
    results.write_bytes(results.read_bytes().splitlines(keepends=True)[0])

    stepped = TrialTable.stepped

    def slowly(*arguments: Any) -> None:
        stepped(*arguments)
        time.sleep(0.1)

    # Spectra and the base's losses are there, so that the trials follow the decomposition.
    monkeypatch.setattr(live, "ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(TrialTable, "stepped", slowly)
    assert cli.run(command) == 0
    said = capsys.readouterr().err
    trials = said[said.index("· running trials") :]
    assert "1 trial is done already" in trials
    assert "2 done, 0 to come" in trials
    assert "still" not in trials
    assert cli.run(command) == 0
    assert "· no trial is left to run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trial_that_diverges_is_a_row_and_a_corrected_typo_is_no_other_comparison(
    recipe: Path, tmp_path: Path, warm_below: None
) -> None:
    command = [sys.executable, "-m", "kpsvd_tune", "compare", str(recipe), "--offline", "--json"]
    command += ["--budgets", "3k", "--seeds", "1", "--learning-rates", "1"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return warm.run([*command, *more], capture_output=True, text=True, timeout=180, check=False)

    # No trial ran under these settings, so the corrected command may use the folder.
    assert run("--methods", "lora", "adapter.target_modules=nosuch").returncode == 2
    # Every step logs a line and no worker process is started, whatever the recipe says.
    odd = ("train.eval_every=1", "train.warmup_ratio=0", "train.log_every=3", "train.num_workers=1")
    done = run("--methods", "lora:alpha=100000000000000000000,lora", *odd)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    diverged, sound = sorted(rows_of(tmp_path / "comparison"), key=lambda row: row.failed is None)
    assert diverged.validation_loss is None
    assert diverged.failed is not None
    assert sound.failed is None
    assert len(sound.losses) == 4
    assert any(diverged.failed in note for note in json.loads(done.stdout)["notes"])


@pytest.mark.slow
def test_a_signal_saves_and_says_how_to_go_on(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kpsvd_tune", "compare", str(recipe), *ARGUMENTS]
    process = warm.Popen(
        [*command, "train.max_steps=400", "train.save_every=0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "comparison" / "trials"
    deadline = time.monotonic() + 120
    while not any(file.stat().st_size for file in metrics.glob("*/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    assert "leaked" not in errors
    assert "Traceback" not in errors
    assert list(metrics.glob("*/checkpoints/step-*"))


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["adapter.modules_to_save=[lm_head]"], "modules trained whole would count against no"),
        (["model.quantization=nf4"], "model.quantization: nf4: PEFT cannot train pissa on such"),
    ],
)
def test_a_dry_run_refuses_what_the_comparison_refuses(
    keys: list[str], message: str, dry: list[str], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--methods", "kpsvd,pissa", "--budgets", "2k"]
    assert cli.run(["compare", str(recipe), *keys, *options, *dry]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("kind", "left", "kept"),
    [
        ("nf4", "pissa, lokr", "kpsvd, kpsvd-thin, lora, rslora"),
        ("int8", "pissa", "kpsvd, kpsvd-thin, lora, rslora, lokr"),
    ],
)
def test_the_default_methods_leave_out_what_a_quantised_base_cannot_train(
    kind: str, left: str, kept: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(recipe), "--budgets", "2k", f"model.quantization={kind}", "--dry-run"]
    assert cli.run([*command, "--json"]) == 0
    said = capsys.readouterr()
    assert f"note: compared are {kept}: of the default methods {left} cannot be trained on" in (
        said.err
    )
    methods = set(json.loads(said.out)["methods"])
    assert methods == set(kept.split(", "))
    for each in left.split(", "):
        assert cli.run([*command, "--methods", f"kpsvd,{each}"]) == 2
        assert f"{kind}: PEFT cannot train {each} on such" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_says_what_all_trials_would_take(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpsvd_tune.estimate.plan.measure_speed", lambda *_: Speed(1e9, 1e9))
    arguments = ["compare", str(recipe), *ARGUMENTS, "--dry-run", "--json", "--plan", "staged"]
    assert cli.run(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trials_per_method"] == {"kpsvd": 4, "lora": 4}
    assert plan["learning_rates"] == {"kpsvd": [1e-3, 1e-2], "lora": [1e-3, 1e-2]}
    assert plan["budgets"] == [3000]
    assert not (recipe.parent / "comparison").exists()
    work = plan["work"]
    assert work["fits"] is True
    low, high = work["seconds"]
    assert 0 < low < high
    names = dict(work["steps"])
    assert names["trials"] == "8, 1 at a time"
    assert names["cost"].endswith(" USD")
    assert cli.run([*arguments, "--jobs", "2"]) == 0
    both = json.loads(capsys.readouterr().out)["work"]
    assert both["host"]["peak_bytes"] > 1.5 * work["host"]["peak_bytes"]
    assert both["seconds"][1] < 0.7 * high
    assert cli.run([each for each in arguments if each != "--json"]) == 0
    shown = capsys.readouterr().out
    assert "trials per method kpsvd" in shown
    assert "it fits by what is free now; nothing was done" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "half"], "'--plan': 'half' is not one of 'full', 'staged', 'done'"),
        (["--budgets", "x"], "--budgets: got 'x'; expected a whole number"),
        (["--budgets", ","], "--budgets is empty"),
        (["--learning-rates", "0"], "--learning-rates: got '0'; expected a number above 0"),
        (["--methods", "kpsvd:innit=random"], "adapter.innit: unknown key; did you mean init?"),
        (["compare.forgetting=nowhere.txt"], "compare.forgetting: there is no file nowhere.txt"),
        (["adapter.modules_to_save=[lm_head]"], "would count against no budget"),
        (["--methods", "lokr", "adapter.dropout=0.1"], "PEFT's LoKr cannot drop inputs"),
        (["--methods", "kpsvd,lora", "--budgets", "100"], "below the 928 that lora needs"),
    ],
)
def test_mistakes_are_told_before_any_trial(
    arguments: list[str], message: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["compare", str(recipe), "--offline", *arguments]) == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
