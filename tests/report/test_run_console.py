"""The report of a run in the terminal and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_folder import write_events, write_run

from kpsvd_tune.commands import main as cli
from kpsvd_tune.report.run_words import sparkline

OLD = Path(__file__).parents[1] / "fixtures" / "0.1-before-house"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run")
    event = {"code": "loss_spike", "step": 7, "text": "The loss rose.", "cure": "Lower the rate."}
    write_events(folder, *[event] * 14)
    return folder


def test_the_terminal_says_it_in_short(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("run: finished after 40 steps\n")
    shown = " ".join(out.split())
    for part in (
        "validation loss 1.0366",
        "12 matrices, 12 adapted",
        "40 0.9587 1.0366 0.00e+00 1.05",
        "moved most (update / weight): model.layers.2.mlp.down_proj 6 %",
        "moved least (update / weight): model.layers.0.self_attn.q_proj 0.5 %",
        "loss_spike, step 7: The loss rose. Lower the rate.",
        "and 2 more in",
        "--html writes all of it as a page",
    ):
        assert part in shown, part
    assert shown.count("loss_spike") == 12


def test_json_keeps_its_keys_and_has_the_new_ones(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["report", str(folder), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["ranks"]["totals"]["modules"] == 12
    assert content["results"]["steps"] == 40
    assert content["state"] == "finished"
    assert len(content["metrics"]) == 40
    assert content["learned"]["layers"][-1]["share"] == pytest.approx(0.06)
    assert content["events"][0]["code"] == "loss_spike"
    assert content["preflight"]["num_rows"] == 100
    assert content["record"]["seed"] == 0


def test_the_page_is_written_where_it_is_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["report", str(folder), "--html"]) == 0
    assert capsys.readouterr().out == f"page: {folder / 'report.html'}\n"
    assert (folder / "report.html").read_bytes().startswith(b"<!DOCTYPE html>")
    place = tmp_path / "page.html"
    assert cli.run(["report", str(folder), "--html", "-o", str(place), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(place)
    assert place.read_bytes() == (folder / "report.html").read_bytes()
    place.write_text("mine")
    assert cli.run(["report", str(folder), "--html", "-o", str(place)]) == 2
    assert "no page of kpsvd-tune; it was left as it is" in capsys.readouterr().err
    assert place.read_text() == "mine"


def test_an_older_run_without_a_price_says_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["report", str(OLD / "finished")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "cost not known: give the price of an hour of a device" in shown
    assert f"kpsvd-tune report {OLD / 'finished'} --price-per-hour 0.2" in shown
    assert cli.run(["report", str(OLD / "initialised")]) == 0
    assert "initialised: decomposed, not trained" in capsys.readouterr().out


def test_a_price_that_is_typed_tells_the_cost(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "results.json"
    results = json.loads(file.read_text()) | {"device_seconds": 7200.0}
    for key in ("cost", "currency"):
        results.pop(key, None)
    file.write_text(json.dumps(results))
    before = file.read_bytes()
    assert cli.run(["report", str(folder), "--price-per-hour", "0.5"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "what it cost" in shown
    assert "cost 1.00 EUR for this device time, at 0.50 EUR an hour" in shown
    assert "device time 2 h 00 min, from the start of the command to its end" in shown
    # Each figure once.
    assert shown.count("peak memory") <= 1
    file.write_text(json.dumps(results | {"earlier_device_seconds": 60.0}))
    assert cli.run(["report", str(folder), "--price-per-hour", "0.5"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 h 00 min, of which 1 min 00 s are steps before it was stopped; what else" in shown
    # All that was counted, and what could not be.
    whole = {"started": "a", "ended": "b", "device_seconds": 60.0}
    killed = {"started": "c", "device_seconds": 60.0}
    for sessions, told in (
        ([whole, whole], "2 h 00 min, of 2 commands, each from its start to its end cost"),
        ([whole, killed, whole], "1 of them was killed, and counts until its last checkpoint cost"),
    ):
        record = json.loads((folder / "run.json").read_text()) | {"sessions": sessions}
        (folder / "run.json").write_text(json.dumps(record))
        assert cli.run(["report", str(folder), "--price-per-hour", "0.5"]) == 0
        assert told in " ".join(capsys.readouterr().out.split())
    file.write_bytes(before)
    assert cli.run(["report", str(folder), "--price-per-hour", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["cost"] == 4.0
    other = write_run(tmp_path / "other")
    assert cli.run(["report", str(folder), str(other), "--price-per-hour", "2"]) == 0
    assert "4.00 EUR" in capsys.readouterr().out
    assert file.read_bytes() == before
    assert cli.run(["report", str(folder), "--price-per-hour", "-1"]) == 2
    assert "--price-per-hour" in capsys.readouterr().err


def test_a_curve_in_a_line_shows_where_it_falls() -> None:
    assert sparkline([3.0, 2.0, 1.0, 0.0], 4) == "█▆▃▁"
    assert sparkline([1.0] * 100, 3) == "▁▁▁"
    assert sparkline([9.0, 7.0, 1.0, 3.0], 2) == "█▁"
    assert sparkline([], 5) == ""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--help", "report", "report --html", "pair", "runs"])
def test_no_report_imports_torch(folder: Path, tmp_path: Path, command: str) -> None:
    other = str(write_run(tmp_path / "other"))
    arguments = {
        "--help": ["--help"],
        "report": ["report", str(folder)],
        "report --html": ["report", str(folder), "--html"],
        "pair": ["report", str(folder), other],
        "runs": ["runs", str(tmp_path)],
    }[command]
    code = (
        "import sys; from kpsvd_tune.commands.main import run; "
        f"code = run({arguments!r}); "
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'plotly'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
