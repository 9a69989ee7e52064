"""The page of a run: what stands in it, what a browser makes of it, how it is kept up to date."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folder import EVIL, write_events, write_run

from kpsvd_tune.errors import InputError
from kpsvd_tune.report import run_page as run_page_module
from kpsvd_tune.report.figures import MOST_POINTS, smooth, thinned
from kpsvd_tune.report.live_page import LEAST_SECONDS, LivePage
from kpsvd_tune.report.pages import check_page
from kpsvd_tune.report.pair import set_side_by_side
from kpsvd_tune.report.pair_page import write_pair_page
from kpsvd_tune.report.run_files import read_answers, read_run_files
from kpsvd_tune.report.run_list import list_runs
from kpsvd_tune.report.run_page import LONGEST_TEXT, run_page, write_run_page

OLD = Path(__file__).parents[1] / "fixtures" / "0.1-before-house"


class _Page(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._skips = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skips = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._skips = False

    def handle_data(self, data: str) -> None:
        if not self._skips:
            self.text += f"{data} "


def page_of(folder: Path) -> str:
    return run_page(read_run_files(folder))


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found
    return json.loads(found[1])


def words(page: str) -> str:
    return " ".join(_Page(page).text.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "my run")
    write_events(
        folder,
        {
            "code": "loss_spike",
            "step": 20,
            "text": f"The loss rose {EVIL}.",
            "evidence": {"loss": 3.5},
            "cure": "Lower the rate.",
        },
        {"kind": "stage", "text": "training for 40 steps"},
        {"kind": "fallback", "code": "lower_rate", "step": 21, "text": "The rate was halved."},
    )
    return folder


def test_the_page_shows_all_that_a_run_has_written(folder: Path) -> None:
    page = page_of(folder)
    text = words(page)
    for part in (
        "Run my run",
        "models/tiny <model>",
        "finished after 40 steps",
        "1.0366 from 3.0000 validation loss",
        "50.0 % from 0.0 % exact_match",
        "0.75 EUR cost",
        "loss_spike, step 20",
        "What to do: Lower the rate.",
        "loss 3.5",
        "lower_rate, step 21 : The rate was halved.",
        "training for 40 steps",
        "100 training rows, 10 validation rows",
        "model.layers.2.mlp.down_proj 6 % 0.12 2",
        "base model exact_match 0.0 % – 0.0 % of 4 (95 % interval 0.0 % to 49.0 %)",
        "adapter exact_match 50.0 % 25.0 % 50.0 % of 4 (95 % interval 15.0 % to 85.0 %)",
        "device time 40 s, from the start of the command to its end",
        "0.75 EUR for this device time, at 2.50 EUR an hour of a device",
        "kpsvd-tune train recipe.yaml",
        "pip install torch==2.8.0",
        "with kpsvd-tune version 0.1; what it was installed from is not known",
        f"kpsvd-tune train '{folder}/recipe.yaml' 'output_dir={folder}-again' --gpus 2",
        "hash of the rows " + "d" * 64,
        "python 3.11.9",
    ):
        assert part in text, part
    data = data_of(page)
    assert list(data["figures"]) == ["losses", "rate", "norms", "speed", "memory"]
    assert list(data["maps"]) == ["ranks", "learned"]
    assert data["maps"]["learned"]["values"][-1] == pytest.approx(0.06)
    marks = next(t for t in data["figures"]["losses"]["traces"] if t.get("name") == "warnings")
    assert marks["x"] == [20, 21]
    # The first point is the loss before the first step.
    checks = next(t for t in data["figures"]["losses"]["traces"] if "validation" in t["name"])
    assert (checks["x"][0], checks["y"][0]) == (0, 3.0)


def test_what_rows_and_answers_hold_stays_text_and_nothing_is_fetched(folder: Path) -> None:
    page = page_of(folder)
    parsed = _Page(page)
    assert EVIL not in page
    assert EVIL in parsed.text
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "img", "iframe"), tag
        assert not {"src", "href", "onerror"} & attributes.keys(), (tag, attributes)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 4


def test_answers_are_the_first_rows_and_none_is_chosen(folder: Path) -> None:
    (task,) = read_answers(folder, 2)
    assert (task.task, task.num_questions) == ("exact_match", 4)
    # The file has them in another order.
    assert [one["row"] for one in task.shown] == ["0", "1"]
    assert [(one["before"], one["after"]) for one in task.shown] == [("7", "4"), ("7", "6")]
    assert "The first 4 of 4 questions by row" in words(page_of(folder))
    # Those of a later `eval` have replaced the scores, and are shown beside them.
    old = folder / "evaluation" / "after" / "exact_match" / "completions.jsonl"
    new = folder / "evaluation" / "exact_match" / "completions.jsonl"
    new.parent.mkdir()
    new.write_text(
        old.read_text().splitlines()[0].replace('"completion": "', '"completion": "new ')
    )
    (task,) = read_answers(folder, 2)
    assert task.num_questions == 1
    assert str(task.shown[0]["after"]).startswith("new ")


def test_wrong_answers_and_the_table_of_labels_are_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "evaluation" / "after" / "exact_match" / "points.json"
    file.write_text('{"scorer": "exact_match", "points": {"0": 1.0, "1": 0, "2": 0.0, "3": 1}}')
    results = json.loads((folder / "results.json").read_text())
    table = {"red <b>": {"blue": 3, "red <b>": 1}, "blue": {"blue": 5}}
    results["scores"]["exact_match"]["exact_match"]["confusion"] = table
    (folder / "results.json").write_text(json.dumps(results))
    (task,) = read_answers(folder, 1)
    assert (task.scorer, task.num_wrong) == ("exact_match", 2)
    assert [one["row"] for one in task.wrong] == ["1"]
    assert [one["row"] for one in task.shown] == ["0"]
    text = words(page_of(folder))
    assert "Wrong after training by exact_match: 2 of 4; here all of them, by row." in text
    assert "adapter, exact_match: right labels in rows, given ones in columns" in text
    assert "right \\ given blue red <b> red <b> 3 1 blue 5 0" in text
    with monkeypatch.context() as patch:
        patch.setattr(run_page_module, "MOST_ANSWERS", 1)
        told = (
            "Wrong after training by exact_match: 2 of 4; here the first question of them, by row."
        )
        assert told in words(page_of(folder))
    file.write_text('{"scorer": "exact_match", "points": {"0": 1, "1": 1, "2": 1, "3": 1}}')
    assert "Wrong after training by exact_match: none of 4." in words(page_of(folder))


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"scorer": "chrf", "points": {"0": 0.2}}', '{"points": 3}']
)
def test_without_points_of_right_and_wrong_none_are_called_wrong(
    folder: Path, content: str
) -> None:
    file = folder / "evaluation" / "after" / "exact_match" / "points.json"
    file.write_text(content)
    (task,) = read_answers(folder, 2)
    assert (task.num_wrong, list(task.wrong)) == (None, [])
    assert "Wrong after training" not in words(page_of(folder))


def test_long_answers_are_cut_and_say_so(tmp_path: Path) -> None:
    long = "a" * 5000
    folder = write_run(tmp_path / "run", answers={"before": [long], "after": [long]})
    text = words(page_of(folder))
    assert "a" * LONGEST_TEXT + " … 3,500 more characters" in text
    assert "a" * (LONGEST_TEXT + 1) not in text
    assert "Row 0 · the same answer before and after" in text


def test_a_run_that_has_just_begun_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"status": "running"}')
    text = words(page_of(folder))
    assert "stopped at step 0: its process ended without a word, or was killed" in text
    assert "No step is logged yet." in text
    assert "Nothing was scored" in text
    assert "cost not known: give the price of an hour of a device, as in" in text
    assert "--price-per-hour 0.2" in text


def test_how_a_run_ended_is_told(tmp_path: Path) -> None:
    failed = write_run(tmp_path / "a", finished=False, status="failed", reason="the disk is full")
    assert "failed at step 40 of 40: the disk is full" in words(page_of(failed))
    stopped = write_run(tmp_path / "b", finished=False, status="stopped", reason="by SIGINT")
    text = words(page_of(stopped))
    assert "stopped at step 40 of 40: by SIGINT" in text
    # 20 seconds of two devices.
    assert "0.028 EUR cost so far" in text


@pytest.mark.parametrize("name", ["finished", "unfinished", "initialised"])
def test_runs_of_an_older_version_are_shown(name: str) -> None:
    text = words(page_of(OLD / name))
    assert "What the rows looked like was not kept" in text
    assert "Not measured: it is when the adapter is saved." in text
    assert "None are recorded; runs of older versions record none." in text
    assert "Ranks" in text


def test_what_cannot_be_read_is_told_and_hides_nothing_else(folder: Path) -> None:
    (folder / "learned.json").write_text('{"step": 1')
    (folder / "preflight.json").write_text("[]")
    (folder / "init" / "rank_report.json").write_text('{"model": "m"}')
    (folder / "events.jsonl").write_text("x\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('no json\n{"step": "x"}\n{"step": 9')
    found = read_run_files(folder)
    told = " | ".join(found.faults)
    assert len(found.faults) == 5
    for name in (
        "learned.json is not JSON",
        "preflight.json holds",
        "rank_report.json: ",
        "events",
    ):
        assert name in told
    assert "metrics.jsonl: 2 lines are no steps and were left out" in told
    assert len(found.metrics) == 40
    text = words(run_page(found))
    assert "Not read" in text
    assert "1.0366" in text


def test_results_of_an_earlier_end_are_not_those_of_a_run_that_went_on(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": 0.5, "seconds": 30.0}\n')
    found = read_run_files(folder)
    assert (dict(found.results), found.learned, found.last_step) == ({}, None, 41)
    assert found.faults == ["results.json and learned.json are of an earlier end: the run went on"]
    assert "stopped at step 41 of 40" in words(run_page(found))
    (line,) = list_runs(folder).runs
    assert (line.steps, line.time, line.score) == (41, 30.0, None)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds neither init/rank_report\.json nor results\.json"):
        read_run_files(tmp_path)


def test_steps_that_were_done_again_count_once(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "loss": 9.0}\n')
    metrics = read_run_files(folder).metrics
    assert [each["step"] for each in metrics] == list(range(1, 41))
    assert metrics[38]["loss"] == 9.0


def test_thinning_keeps_every_stretch_s_extremes_and_measured_points_only() -> None:
    ys = [float(i % 7) for i in range(100_000)]
    ys[55_555], ys[12_345] = 99.0, -99.0
    xs = [float(i) for i in range(1, 100_001)]
    kept, values = thinned(xs, ys)
    assert len(kept) <= MOST_POINTS + 2
    assert (kept[0], kept[-1]) == (1.0, 100_000.0)
    assert kept == sorted(set(kept))
    assert values == [ys[int(x) - 1] for x in kept]
    assert (max(values), min(values)) == (99.0, -99.0)
    assert thinned(xs[:9], ys[:9]) == (xs[:9], ys[:9])


def test_the_smooth_line_is_the_centred_mean() -> None:
    ys = [float(i * i) for i in range(200)]
    means, window = smooth(ys)
    assert window == 5
    assert means[100] == pytest.approx(sum(ys[98:103]) / 5)
    assert means[0] == pytest.approx(sum(ys[:3]) / 3)
    assert smooth([1.0, 5.0]) == ([1.0, 5.0], 1)


@pytest.mark.slow
def test_the_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", steps=100_000))
    assert len(page) < 2_800_000
    assert "of 100,000 points of the faint line are drawn" in words(page)
    for each in data_of(page)["figures"].values():
        assert all(len(trace["x"]) <= MOST_POINTS + 2 for trace in each["traces"])


def test_a_foreign_file_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    check_page(page)
    write_run_page(read_run_files(folder), page)
    check_page(page)
    page.write_text("<p>mine</p>")
    with pytest.raises(InputError, match="is there and no page of kpsvd-tune; it was left as it"):
        check_page(page)
    with pytest.raises(InputError, match="is a folder; expected the name of a page"):
        check_page(tmp_path)
    with pytest.raises(InputError, match="nowhere is no folder, in which page.html could be"):
        check_page(tmp_path / "nowhere" / "page.html")


def test_the_live_page_is_written_now_and_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("kpsvd_tune.report.live_page.time.monotonic", lambda: now[0])
    page, live = folder / "report.html", LivePage(folder)

    def is_written() -> bool:
        page.unlink(missing_ok=True)
        live.refresh()
        return page.exists()

    assert is_written()
    now[0] += LEAST_SECONDS - 1
    assert not is_written()
    now[0] += 2
    assert is_written()
    assert not is_written()
    live.refresh(is_last=True)
    assert page.exists()
    page.unlink()
    LivePage(folder, is_writer=False).refresh(is_last=True)
    assert not page.exists()


def test_a_page_that_cannot_be_written_is_told_once_and_stops_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    live = LivePage(folder)
    with caplog.at_level(logging.WARNING):
        live.refresh()
        live.refresh(is_last=True)
    (record,) = caplog.records
    assert "the run goes on: plotly is not installed" in record.getMessage()
    monkeypatch.undo()
    caplog.clear()
    (folder / "report.html").mkdir()
    with caplog.at_level(logging.WARNING):
        LivePage(folder).refresh()
    assert "report.html is not written, the run goes on: " in caplog.text


@pytest.mark.slow
def test_a_browser_draws_the_page_from_disk_at_every_width(
    folder: Path, browser: Any, fits_width: Callable[[Any, int], bool]
) -> None:
    file = folder / "report.html"
    write_run_page(read_run_files(folder), file)
    page, complaints, requests = browser(file, scheme="dark")
    for name in ("losses", "rate", "norms", "speed", "memory", "ranks", "learned"):
        page.wait_for_selector(f"#{name} .main-svg")
        assert page.get_attribute(f"#{name}", "role") == "img"
        assert page.get_attribute(f"#{name}", "aria-label")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "light"
    for width in (1200, 400, 360):
        assert fits_width(page, width)
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map((e) => +e.tagName[1])")
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:], strict=False))
    assert page.locator("img").count() == 0
    assert complaints == []
    assert requests == [file.as_uri()]


@pytest.mark.slow
def test_a_browser_draws_the_page_of_two_runs(
    folder: Path, tmp_path: Path, browser: Any, fits_width: Any
) -> None:
    runs = read_run_files(folder), read_run_files(write_run(tmp_path / EVIL.replace("/", "_")))
    file = tmp_path / "pair.html"
    write_pair_page(set_side_by_side(*runs, {}), runs, file)
    page, complaints, requests = browser(file, width=360)
    for name in ("checks", "trained"):
        page.wait_for_selector(f"#{name} .legend .traces >> nth=1")
    assert fits_width(page, 360)
    assert page.locator("img").count() == 0
    assert complaints == []
    assert requests == [file.as_uri()]


def changed(folder: Path, **record: Any) -> str:
    """The words of the page of a run whose run.json says something else."""
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**content, **record}))
    return words(page_of(folder))


def test_what_to_install_is_what_an_index_has(folder: Path) -> None:
    versions = {"torch": "2.13.0+cpu", "kpsvd-tune": "0.2.0", "python": "3.11.7"}
    text = changed(folder, versions=versions, installed_from={"kind": "index"})
    assert "pip install torch==2.13.0 kpsvd-tune==0.2.0 again," in text
    # The build is among what the run was made of.
    assert "torch 2.13.0+cpu" in text
    found = {"kind": "url", "url": "https://a.example/b.git", "commit": "0123abc"}
    text = changed(folder, versions=versions, installed_from=found)
    assert "pip install torch==2.13.0 with kpsvd-tune version 0.2.0, installed from" in text
    assert "https://a.example/b.git, commit 0123abc again," in text


def test_a_run_began_with_its_first_command(folder: Path) -> None:
    assert "taken up" not in words(page_of(folder))
    sessions = [{"started": "2026-01-01T00:00:00+0000"}, {"started": "2026-01-02T03:04:05+0000"}]
    text = changed(folder, sessions=sessions)
    told = "started 2026-01-01T00:00:00+0000 last taken up 2026-01-02T03:04:05+0000"
    assert f"{told} seed" in text
    text = changed(folder, sessions=[sessions[0], *sessions])
    assert f"{told}, 2 times in all seed" in text


def test_the_most_memory_so_far_never_falls(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # As older versions wrote it of a run that was taken up at step 21.
    for line in lines:
        line["memory_bytes"] = 9_000_000_000 if line["step"] <= 20 else 8_500_000_000
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page = page_of(folder)
    (trace,) = data_of(page)["figures"]["memory"]["traces"]
    assert set(trace["y"]) == {9_000_000_000}
    assert "9.0 GB peak memory of a process" in words(page)
