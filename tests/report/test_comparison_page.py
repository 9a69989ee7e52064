"""The page of a comparison: what stands in it, and what a browser makes of it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from trial_rows import row

from kpsvd_tune.compare.verdict import compare_rows
from kpsvd_tune.errors import InputError
from kpsvd_tune.report.comparison import Comparison, TrialRow
from kpsvd_tune.report.comparison_page import comparison_page
from kpsvd_tune.report.trials import show_comparison

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
    assert page.count("<th scope='row'>") == len(verdict.summaries) == 6


def test_without_plotly_it_says_what_to_install(
    verdict: Comparison, rows: list[TrialRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(InputError, match=r"pip install 'kpsvd-tune\[report\]'"):
        comparison_page(verdict, rows)


def test_the_console_shows_every_method_claim_and_note(
    verdict: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    show_comparison(verdict)
    shown = capsys.readouterr().out
    assert "kpsvd minus lora at 200: -0.1000 nats" in shown
    for claim in verdict.claims:
        assert f"{claim.verdict}: {claim.text[:30]}" in shown
    assert "note: " in shown


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_draws_every_figure(
    verdict: Comparison, rows: list[TrialRow], tmp_path: Path
) -> None:
    from playwright.sync_api import sync_playwright

    file = tmp_path / "comparison.html"
    file.write_text(comparison_page(verdict, rows), encoding="utf-8")
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(file.as_uri())
        for name in ("curves", "front", "rates", "norms"):
            page.wait_for_selector(f"#{name} .main-svg")
            assert page.locator(f"#{name} .legend .traces").count() == 3
        theme = page.evaluate("document.documentElement.dataset.theme")
        page.click("#theme")
        assert page.evaluate("document.documentElement.dataset.theme") != theme
        browser.close()
    assert complaints == []
