"""The page of a comparison: what stands in it, and what a browser makes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from trial_rows import row

from kpsvd_tune.comparison.verdict import compare_rows
from kpsvd_tune.errors import InputError
from kpsvd_tune.report.comparison import Claim, Comparison, TrialRow, plus_minus
from kpsvd_tune.report.comparison_page import comparison_page
from kpsvd_tune.report.console import show_comparison
from kpsvd_tune.report.figures import PALETTES

EVIL = "kpsvd:</script><img src=x>{{data}}"


@pytest.fixture
def rows() -> list[TrialRow]:
    return [
        row(method, budget, rate, seed, loss + 0.01 * seed)
        for method, loss in (("lora", 1.0), ("kpsvd", 0.9), (EVIL, 1.2))
        for budget in (100, 200)
        for rate in (1e-3, 2e-3)
        for seed in (0, 1)
    ]


@pytest.fixture
def verdict(rows: list[TrialRow]) -> Comparison:
    return compare_rows(
        rows,
        model="tiny <model>",
        steps=4,
        base={"validation_loss": 2.0},
        num_warmup=1,
        max_grad_norm=1.0,
        lines=lambda _: ("adapter:", "  form: both", "train:", "  learning_rate: 0.001"),
    )


def test_the_page_holds_the_verdict_and_runs_nothing_of_it(
    verdict: Comparison, rows: list[TrialRow]
) -> None:
    page = comparison_page(verdict, rows)
    assert "tiny &lt;model&gt;" in page
    assert EVIL not in page
    assert "<img src=x>" not in page
    for claim in verdict.claims:
        assert f"<b>{claim.verdict}</b>" in page
    assert page.count('<th scope="row">') == 3 * len(verdict.summaries) == 18
    assert str(escape(verdict.recommendation.text)) in page
    for each in (*verdict.recommendation.undecided, *verdict.recommendation.missing):
        assert f"<li>{escape(each)}</li>" in page
    for line in verdict.recommendation.lines:
        assert line in page
    assert verdict.smallest is not None
    assert verdict.smallest.in_words()[1:] in page


def test_without_plotly_it_says_what_to_install(
    verdict: Comparison, rows: list[TrialRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(InputError, match=r"pip install 'kpsvd-tune\[report\]'"):
        comparison_page(verdict, rows)


def test_the_console_shows_every_method_claim_and_note(
    verdict: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    show_comparison(verdict)
    shown = capsys.readouterr().out
    # What to do comes last, after an empty line.
    last = shown[
        shown.index("\n\nOn this data take kpsvd at 0.001 with 100 trainable parameters") :
    ]
    assert "to use it:\n    adapter:\n      form: both\n" in last
    assert "\n\nnot decided\n- whether " in last
    assert "\n\nwhat would decide it\n- rates: kpsvd was best at the last rate tried, 0.001" in last
    assert "spent: 24 trials, 4 min 48 s of device time in all" in shown
    assert "kpsvd minus lora at 200: -0.1000 nats" in shown
    for claim in verdict.claims:
        assert f"{claim.verdict}: {claim.text}\n    {claim.figure}\n" in shown
    assert "\n\nnotes\n- " in shown


def test_claims_that_such_trials_cannot_decide_are_one_line_with_the_reasons(
    verdict: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    claims = tuple(
        Claim(f"claim {n}", "undecided", f"figures {n}", ("one seed", "few steps")[:n])
        for n in (1, 2)
    )
    show_comparison(replace(verdict, claims=claims))
    shown = capsys.readouterr().out
    assert "all 2 are undecided: one seed; few steps; comparison.html has their figures" in shown
    assert "figures 1" not in shown
    # Where the trials could have decided one of them, all are shown.
    for other in (Claim("a", "undecided", "figures of a"), Claim("a", "held", "figures of a")):
        show_comparison(replace(verdict, claims=(*claims, other)))
        shown = capsys.readouterr().out
        assert "figures 1" in shown
        assert "figures of a" in shown


def test_the_sign_of_a_difference_is_said_once_and_steps_have_a_decimal(
    verdict: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    show_comparison(verdict)
    shown = capsys.readouterr().out
    assert shown.count("Differences are always the first method minus the other") == 1
    steps = verdict.summaries[0].steps_to_reference
    assert steps is not None
    assert verdict.summaries[0].in_words()["steps to reference"].startswith(f"{steps.mean:.1f}")


def test_columns_that_hold_nothing_are_left_out(
    verdict: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    summaries = tuple(replace(each, test_loss=None) for each in verdict.summaries)
    show_comparison(replace(verdict, summaries=summaries))
    shown = capsys.readouterr().out
    assert "validation loss" in shown
    assert "test loss" not in shown.partition("kpsvd minus")[0]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_figure_of_the_verdict_is_cut_at_any_width(
    verdict: Comparison,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    show_comparison(verdict)
    shown = capsys.readouterr().out
    assert "…" not in shown
    for summary in verdict.summaries:
        assert plus_minus(summary.validation_loss) in shown
        assert plus_minus(summary.test_loss) in shown
        assert summary.method in shown
    told = shown.partition("left out for want of width: ")[2]
    # A column is there or it is named among those that are not.
    assert ("grad. CV" in shown.partition("left out")[0]) != ("grad. CV" in told)
    assert bool(told) == (width == 140)


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(
    ("theme", "panel", "least"), [("light", "#ffffff", 3), ("dark", "#1a2029", 6)]
)
def test_every_line_stands_out_from_its_background(theme: str, panel: str, least: float) -> None:
    # The panel's colour is that of the page.
    style = files("kpsvd_tune.report").joinpath("templates/base.html.j2").read_text("utf-8")
    assert f"--panel: {'#fff' if panel == '#ffffff' else panel}" in style
    for colour in PALETTES[theme]:
        light, dark = sorted((_luminance(colour), _luminance(panel)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, colour
    assert len(set(PALETTES[theme])) == 8


@pytest.mark.slow
def test_a_browser_draws_every_figure(
    verdict: Comparison,
    rows: list[TrialRow],
    tmp_path: Path,
    browser: Callable[..., Any],
    fits_width: Callable[[Any, int], bool],
) -> None:
    file = tmp_path / "comparison.html"
    file.write_text(comparison_page(verdict, rows), encoding="utf-8")
    page, complaints, _ = browser(file)
    for name in ("curves", "front", "rates", "norms"):
        page.wait_for_selector(f"#{name} .main-svg")
        assert page.locator(f"#{name} .legend .traces").count() == 3
    # Step 0 is in the figure until the reader asks for the later steps alone.
    top = "document.getElementById('curves').layout.yaxis.range[1]"
    assert page.evaluate(top) > 2.0
    page.click("[data-start='0']")
    assert page.evaluate(top) < 1.3
    assert page.evaluate("document.getElementById('curves').layout.xaxis.range[0]") == 10
    page.click("[data-start='1']")
    assert page.evaluate(top) > 2.0
    colour = "document.getElementById('curves').data[1].line.color"
    shown = page.evaluate(colour)
    assert shown in PALETTES["light"]
    # Nothing but the boxes of the tables scrolls sideways, on a phone neither.
    for width in (1280, 390):
        assert fits_width(page, width)
        if width == 1280:
            inside = "(e) => e.scrollWidth <= e.parentElement.clientWidth"
            for name in ("#quality", "#cost"):
                assert page.eval_on_selector(name, inside)
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    assert page.evaluate(colour) in PALETTES["dark"]
    assert complaints == []
