"""End to end on the tiny model: train, resume, report, merge, generate, as a user types it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kpsvd_tune.adapter  # noqa: F401  registers KPSVD with PEFT
from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import NonFiniteError
from kpsvd_tune.report.live import ConsoleEvents
from kpsvd_tune.units import money

Run = Callable[..., int]


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(
        adapter={"rank": {"window": 8, "max": 4}},
        train={"max_steps": 6, "eval_every": 3, "save_every": 2, "learning_rate": 1e-2},
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = ("seconds", "tokens_per_second", "memory_bytes")
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


@pytest.mark.slow
def test_train_report_merge_generate(
    recipe: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.run(["train", str(recipe), "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert "trained tokens marked" in captured.err
    assert results == json.loads((run / "results.json").read_text())
    assert {
        "train_loss",
        "validation_loss",
        "steps",
        "trainable_parameters",
        "wall_seconds",
        "peak_memory_bytes",
        "device_seconds",
    } <= set(results)
    # The loop, and what came before and after it.
    assert results["device_seconds"] > results["wall_seconds"]
    # No price was given.
    assert "cost" not in results
    assert results["validation_loss"] < results["validation_loss_before"]
    assert results["steps"] == 6

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted: Any = PeftModel.from_pretrained(base, run / "adapter").eval()
    trainable = sum(
        layer["rank"] * (m * n + p * q)
        for layer in adapted.peft_config["default"].layers.values()
        for m, n, p, q in [layer["shape"]]
    )
    assert results["trainable_parameters"] == trainable
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected = adapted(ids).logits

    assert cli.run(["report", str(run)]) == 0
    assert "14 matrices" in capsys.readouterr().out

    merged = tmp_path / "merged"
    assert cli.run(["merge", str(run), "--output", str(merged)]) == 0
    assert "are equal" in capsys.readouterr().out
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)

    questions = tmp_path / "rows.jsonl"
    scoring = ["eval", str(run), "--task", "exact_match", "--path", str(questions)]
    assert cli.run([*scoring, "--limit", "3", "--max-new-tokens", "3", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["scores"]["exact_match"]["n"] == 3
    assert len(Path(scored["completions"]).read_text().splitlines()) == 3

    answers = []
    for source in (run, merged):
        assert cli.run(["generate", str(source), "Tom has", "--raw", "--max-new-tokens", "4"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]

    assert cli.run(["train", str(recipe)]) == 0
    assert "is finished; nothing was done" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Stopped by Ctrl-C in the middle; the same command again ends where the whole run ends."""
    import os
    import signal

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli.run(["train", str(recipe), f"output_dir={whole}"]) == 0

    original = ConsoleEvents.step

    def interrupt(self: ConsoleEvents, step: Any, total: int) -> None:
        original(self, step, total)
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ConsoleEvents, "step", interrupt)
    assert cli.run(["train", str(recipe), f"output_dir={stopped}"]) == 130
    assert "stopped by SIGINT; what was done is saved" in capsys.readouterr().err
    assert not (stopped / "results.json").exists()
    monkeypatch.setattr(ConsoleEvents, "step", original)
    # Going on must not need the decomposition again, whatever became of the cache.
    monkeypatch.setattr("kpsvd_tune.training.initialise.decompose", None)
    assert cli.run(["train", str(recipe), f"output_dir={stopped}"]) == 0
    assert "continuing from" in capsys.readouterr().err
    first, second = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, stopped)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert metrics(whole) == metrics(stopped)
    # What both commands took is the run's device time, in results.json and in its report.
    results, record = (
        json.loads((stopped / name).read_text()) for name in ("results.json", "run.json")
    )
    times = [each["device_seconds"] for each in record["sessions"]]
    assert results["earlier_device_seconds"] == times[0] > 0
    assert results["wall_seconds"] < results["device_seconds"] <= sum(times)
    capsys.readouterr()
    assert cli.run(["report", str(stopped), "--price-per-hour", "3600"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of 2 commands, each from its start to its end" in shown
    assert f"{money(results['device_seconds'])} USD for this device time" in shown


@pytest.mark.slow
def test_a_run_that_makes_the_model_worse_says_so_and_has_a_code_of_its_own(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ruin = ["train", str(recipe), "train.learning_rate=1", "train.max_grad_norm=1000"]
    ruin += ["adapter.modules_to_save=[lm_head]"]
    assert cli.run([*ruin, "train.eval_every=1", "--json"]) == 4
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert results["worse_than_base"] is True
    assert results["base_validation_loss"] == results["validation_loss_before"]
    assert results["adapter_validation_loss"] > results["base_validation_loss"]
    assert results["adapter_step"] == results["steps"] == 6
    message = "error: the adapter is worse than the base model on the held-out rows"
    assert message in captured.err
    run = tmp_path / "run"
    assert json.loads((run / "results.json").read_text()) == results
    card = (run / "adapter" / "README.md").read_text()
    assert "**Warning: the adapter is worse than the base model" in card
    # Typed again the run is not made again, and is not good either.
    assert cli.run([*ruin, "train.eval_every=1"]) == 4
    err = capsys.readouterr().err
    assert "is finished; nothing was done" in err
    assert message in err
    # The step with the lowest loss is there without training again.
    wish = ["train.eval_every=1", "train.keep=best", "--allow-change", "train.keep", "--json"]
    cli.run([*ruin, *wish])
    kept = json.loads(capsys.readouterr().out)
    assert kept["adapter_step"] == results["best_step"]
    assert kept["adapter_validation_loss"] == results["best_validation_loss"]
    assert kept["adapter_step"] < kept["steps"]


@pytest.mark.slow
def test_what_cannot_work_is_refused_before_the_first_step(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "one.jsonl"
    rows.write_text('{"question": "How many?", "answer": "One"}\n', encoding="utf-8")
    command = ["train", str(recipe), f"dataset.path={rows}", "dataset.validation=0.5"]
    command += ["train.early_stopping.patience=1"]
    for dry in ([], ["--dry-run"]):
        assert cli.run([*command, *dry]) == 2
        assert "train.early_stopping: no row is held out" in capsys.readouterr().err
    assert cli.run(["train", str(recipe), "train.warmup_steps=6"]) == 2
    assert "the warm-up would take all of it" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
    assert cli.run(["train", str(recipe), "train.epochs=3"]) == 2
    assert "override train.epochs=3: train.epochs: is 3 and train.max_steps is 6" in (
        capsys.readouterr().err
    )
    # One step trains, and what it amounts to is told.
    assert cli.run(["train", str(recipe), "train.max_steps=1", "dataset.validation=0"]) == 0
    assert "1 step of 2 rows: 0.25 passes over 8 rows" in capsys.readouterr().err
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(bool(value.any()) for key, value in saved.items() if key.endswith("_right"))


@pytest.mark.slow
def test_scores_before_and_after(
    recipe: Path, tmp_path: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = (
        f"evaluation=[{{task: exact_match, path: {rows_file}, before: true, max_new_tokens: 4, "
        "columns: {prompt: question, completion: answer}}]"
    )
    assert cli.run(["train", str(recipe), task, "train.max_steps=1"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["exact_match"].keys() == {"before", "after", "n"}
    assert results["exact_match"]["n"] == 8
    assert "before training" in capsys.readouterr().out
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "exact_match" in card
    assert "import kpsvd_tune.adapter" in card
    # It is published: no folder of this machine, and no base that the hub does not know.
    assert str(tmp_path.parent.parent) not in card
    assert "base_model:" not in card
    assert 'from_pretrained("PATH_OF_THE_BASE_MODEL")' in card
    assert "| peak memory | " in card
    merged = tmp_path / "merged"
    assert cli.run(["merge", str(tmp_path / "run"), "-o", str(merged), "--dtype", "float32"]) == 0
    card = (merged / "README.md").read_text()
    assert "Adapter: run, trained with kpsvd-tune" in card
    assert str(tmp_path.parent.parent) not in card


def test_init_only_needs_no_data_and_writes_the_reports(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["init-only", str(recipe), "dataset=null"]) == 0
    out = capsys.readouterr().out
    assert "14 matrices" in out
    assert max(len(line) for line in out.splitlines() if "_proj" in line) <= 100
    report = json.loads((tmp_path / "run" / "init" / "rank_report.json").read_text())
    assert len(report["layers"]) == 14
    header, *rows = (tmp_path / "run" / "init" / "rank_report.csv").read_text().splitlines()
    assert len(rows) == 14
    assert header.startswith("name,out_features,in_features,factor_shape,rank,")


def test_sweep_shows_totals_without_training(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["init-only", str(recipe), "--sweep", "adapter.rank.energy=0.2,0.9", "--json"]
    assert cli.run(sweep) == 0
    low, high = json.loads(capsys.readouterr().out).values()
    assert low["totals"]["trainable_parameters"] < high["totals"]["trainable_parameters"]


@pytest.mark.slow
def test_dry_run_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["train", str(recipe), "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    assert "target matrices" in out
    assert " 14" in out


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["train", "RECIPE", "dataset=null"], 2, "the recipe has no dataset section"),
        (["train", "RECIPE", "dataset.path=none.jsonl"], 2, "none.jsonl"),
        (["train", "RECIPE", "train.lerning_rate=1"], 2, "did you mean learning_rate?"),
        (["train", "RECIPE", "model.path=/nowhere/model"], 2, "/nowhere/model"),
        (["train", "missing.yaml"], 2, "missing.yaml"),
        (["train", "RECIPE", "--gpus", "2", "--processes", "2"], 2, "exclude each other"),
        (["train", "RECIPE", "--no-such-option"], 2, "No such option"),
        (["init-only", "RECIPE", "adapter.rank.budget=10"], 2, "budget of 10"),
        (["init-only", "RECIPE", "--sweep", "train.seed=1,2"], 2, "only keys of adapter.rank"),
        (["init-only", "RECIPE", "--sweep", "energy"], 2, "expected KEY=A,B,C"),
        (["init-only", "RECIPE", "adapter.target_modules=[q_prok]"], 2, "q_proj"),
        (
            ["merge", "MODEL", "--output", "OUT"],
            2,
            "is a model, with plain weights",
        ),
        (["report", "MODEL"], 2, "holds neither init/rank_report.json nor results.json"),
        (["recipes", "show", "nothing"], 2, "no shipped recipe 'nothing'; there are: "),
    ],
)
def test_mistakes_end_in_one_message(
    recipe: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    code: int,
    message: str,
) -> None:
    names = {"RECIPE": str(recipe), "MODEL": str(tiny_model_dir), "OUT": str(tmp_path / "out")}
    assert cli.run([names.get(word, word) for word in command]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_merge_refuses_an_unfinished_run_and_its_own_input(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.run(["train", str(recipe), "train.max_steps=1"]) == 0
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    assert cli.run(["merge", str(run), "--output", str(run / "merged")]) == 2
    assert "would write over or into the input" in capsys.readouterr().err
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
    shutil.rmtree(run / "adapter")
    assert cli.run(["merge", str(run), "--output", str(tmp_path / "m")]) == 2
    assert "a run without a finished adapter" in capsys.readouterr().err


@pytest.mark.slow
def test_a_merge_above_the_tolerance_fails(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["train", str(recipe), "train.max_steps=2"]) == 0
    target = str(tmp_path / "m")
    command = ["merge", str(tmp_path / "run"), "-o", target, "--dtype", "bfloat16"]
    assert cli.run([*command, "--tolerance", "1e-9"]) == 1
    assert "are NOT equal" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_train_as_one(recipe: Path, tmp_path: Path, warm_ranks: None) -> None:
    """Two ranks of batch 1 against one of batch 2: the same rows, the same factors."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.run(["train", str(recipe), f"output_dir={one}"]) == 0
    from kpsvd_tune.launch import launch

    arguments = ["train", str(recipe), f"output_dir={two}", "train.batch_size=1"]
    assert launch([*arguments, "--processes", "2"], 2, use_cpu=True) == 0
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-5)
    losses = [[line["loss"] for line in metrics(run)] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed")
def test_a_configuration_of_accelerate_trains_under_deepspeed(
    recipe: Path, tmp_path: Path, warm_ranks: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """ZeRO 3 with every weight shared out, among them those that our layers read themselves."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.run(["train", str(recipe), f"output_dir={one}"]) == 0
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"gradient_clipping": "auto", "zero_optimization": zero}))
    file = tmp_path / "ds.yml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\n"
        f"num_processes: 2\ndeepspeed_config: {{deepspeed_config_file: {settings}}}\n"
    )
    from kpsvd_tune.launch import launch
    from kpsvd_tune.training.engines.deepspeed_config import launch_environment

    arguments = ["train", str(recipe), f"output_dir={two}", "train.batch_size=1", "--json"]
    arguments += ["--processes", "2", "--accelerate-config", str(file)]
    capfd.readouterr()
    assert launch(arguments, 2, True, launch_environment(str(file), 2)) == 0
    # Standard output holds the results and nothing of DeepSpeed's.
    assert json.loads(capfd.readouterr().out)["steps"] == len(metrics(two))
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-5)
    # Another stage sums in another order: the run does not go on under it unnoticed.
    settings.write_text(settings.read_text().replace('"stage": 3', '"stage": 2'))
    assert launch(arguments, 2, True, launch_environment(str(file), 2)) == 1
    assert "deepspeed_zero_stage: 3 in the run, 2 now" in capfd.readouterr().err
    # Allowed, the same checkpoint serves the other stage.
    allowed = [*arguments, "--allow-change", "deepspeed_zero_stage"]
    allowed += ["train.max_steps=9", "--allow-change", "train.max_steps"]
    assert launch(allowed, 2, True, launch_environment(str(file), 2)) == 0
    assert json.loads(capfd.readouterr().out)["steps"] == 9


@pytest.mark.slow
def test_evaluating_a_finished_run_keeps_the_scores_with_it(
    recipe: Path, tmp_path: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words nobody trains on. " * 9, encoding="utf-8")
    tasks = (
        f"evaluation=[{{task: exact_match, path: {rows_file}, max_new_tokens: 4, limit: 3}}, "
        f"{{task: exact_match, path: {rows_file}, max_new_tokens: 4, limit: 2}}, "
        f"{{task: loss, path: {rows_file}, before: true}}, {{task: forgetting, path: {text}}}]"
    )
    run = tmp_path / "run"
    assert cli.run(["train", str(recipe), tasks, "train.max_steps=2", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [each["exact_match"]["n"] for each in list(results["scores"].values())[:2]] == [3, 2]
    assert list(results["scores"]) == ["exact_match", "exact_match-2", "loss", "forgetting"]
    assert results["loss"]["before"] == results["base_scores"]["loss"]["loss"]["value"]
    change = results["scores"]["forgetting"]
    assert change["loss_change"]["value"] == pytest.approx(
        change["loss"]["value"] - change["base_loss"]["value"]
    )
    assert "the first 3" in results["score_conditions"]["exact_match"]

    # The run's own section holds where nothing else is typed, and its columns are those trained on.
    sampled = ["--task", "exact_match", "--temperature", "0.9", "samples=2"]
    again = ["eval", str(run), *sampled, "-o", str(tmp_path / "sampled")]
    assert cli.run([*again, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["scores"]["exact_match"]["n"] == 3
    rows = (tmp_path / "sampled" / "completions.jsonl").read_text().splitlines()
    assert len(rows) == 6
    stored = json.loads((tmp_path / "sampled" / "results.json").read_text())
    assert stored == answer
    results = json.loads((run / "results.json").read_text())
    assert results["scores"]["exact_match"] == answer["scores"]
    assert cli.run(["eval", str(run), "--task", "loss", "--base-only"]) == 0
    card = (run / "adapter" / "README.md").read_text()
    assert card.count("## Evaluation") == 1
    assert "| forgetting | loss_change |" in card
    assert "| base model | loss | perplexity |" in card
    assert "2 samples at temperature 0.9" in card
    # Scores that were added do not make the run another one.
    assert cli.run(["train", str(recipe), tasks, "train.max_steps=2"]) == 0
    assert "is finished; nothing was done" in capsys.readouterr().err
    assert cli.run(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    # The same figures as in the training, so they are shown once.
    assert "base model, loss, loss" in shown
    assert "loss, in this training" not in shown
    # Another file's scores stand beside, under a name of their own.
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"question": "How many?", "answer": "One"}) + "\n")
    before = json.loads((run / "results.json").read_text())
    asked = ["--task", "exact_match", "--path", str(other), "--max-new-tokens", "2"]
    asked += ["columns={prompt: question, completion: answer}"]
    for more in ([], ["--base-only"]):
        assert cli.run(["eval", str(run), *asked, *more]) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        assert said.startswith(f"answers: {run}/evaluation/"), said
        assert len(Path(said.removeprefix("answers: ")).read_text().splitlines()) == 1
    after = json.loads((run / "results.json").read_text())
    name = "exact_match, other.jsonl"
    assert after["scores"] == before["scores"] | {name: after["scores"][name]}
    assert after["score_files"][name] == str(other)
    assert after["base_scores"][name]["exact_match"]["n"] == 1
    folders = [each.name for each in (run / "evaluation").iterdir()]
    assert {"exact_match-other.jsonl", "base-exact_match-other.jsonl"} <= set(folders)
    assert cli.run(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    for whose in ("adapter", "base model"):
        assert f"{whose}, exact_match, other.jsonl, exact_match: " in shown
    assert f"scores on {other}, template" in " ".join(shown.split())
    assert cli.run(["eval", str(run)]) == 2
    assert "the run's own are exact_match, exact_match, loss, forgetting" in capsys.readouterr().err
    assert cli.run(["eval", str(run), "--task", "forgetting", "--base-only"]) == 2


def test_what_would_stop_the_scoring_is_refused_before_the_training(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = f"evaluation=[{{task: gsm8k, path: {tmp_path / 'missing.jsonl'}}}]"
    assert cli.run(["train", str(recipe), missing]) == 2
    assert "missing.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_two_processes_answer_as_one(
    tiny_model_dir: Path, tmp_path: Path, rows_file: Path, warm_below: None
) -> None:
    command = [sys.executable, "-m", "kpsvd_tune", "eval", str(tiny_model_dir), "--json"]
    command += ["--task", "gsm8k", "--path", str(rows_file), "--max-new-tokens", "5"]
    scores = []
    for number in (1, 2):
        folder = tmp_path / f"by-{number}"
        more = ["--processes", str(number), "-o", str(folder)]
        done = warm.run([*command, *more], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout)["scores"])
        assert len((folder / "completions.jsonl").read_text().splitlines()) == 8
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_another_start_trains_saves_and_merges(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["adapter.init=random", "adapter.rate=relative"]
    assert cli.run(["train", str(recipe), *changes, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["validation_loss"] < results["validation_loss_before"]
    merged = tmp_path / "merged"
    assert cli.run(["merge", str(tmp_path / "run"), "--output", str(merged), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]


@pytest.mark.slow
def test_a_run_leaves_its_report_however_it_ends(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(run: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((run / "run.json").read_text())
        return found

    run = tmp_path / "run"
    assert cli.run(["train", str(recipe)]) == 0
    assert (record(run)["status"], "ended" in record(run)) == ("finished", True)
    assert json.loads((run / "preflight.json").read_text())["num_rows"] == 6
    learned = json.loads((run / "learned.json").read_text())
    assert learned["step"] == 6
    assert len(learned["layers"]) == 14
    assert all(each["update_norm"] > 0 < each["weight_norm"] for each in learned["layers"])
    assert "finished after 6 steps" in (run / "report.html").read_text()

    def fail(*_: Any) -> None:
        raise NonFiniteError("step 1: the loss is nan")

    failed = tmp_path / "failed"
    monkeypatch.setattr("kpsvd_tune.training.loop.Training._take_step", fail)
    assert cli.run(["train", str(recipe), f"output_dir={failed}"]) == 3
    assert record(failed)["status"] == "failed"
    assert record(failed)["reason"] == "step 1: the loss is nan"
    assert "failed at step 0 of 6: step 1: the loss is nan" in (failed / "report.html").read_text()
    # What is refused before the run has begun leaves nothing.
    with_fault = [f"dataset.path={tmp_path / 'none.jsonl'}", f"output_dir={tmp_path / 'no'}"]
    assert cli.run(["train", str(recipe), *with_fault]) == 2
    assert not (tmp_path / "no" / "report.html").exists()
