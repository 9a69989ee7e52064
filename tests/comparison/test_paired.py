"""scripts/benchmarks/study/paired.py: differences of two methods, seed by seed."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from shipped_scripts import SCRIPTS, script

RESULTS = SCRIPTS / "benchmarks" / "results" / "study"
BOTH = "kpsvd:form=both:factor_shape=balanced:rank.method=fixed:rank.max=1"
MLP = f"{BOTH}:on=gate_proj+up_proj+down_proj"
RANDOM = f"{MLP}:init=random@{{}}"

# Stored bits of all pairs for a nat of their mean loss: 2,048 values.
BITS = -2048 / math.log(2)


def told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> dict[str, list[str]]:
    """The cells of each measure that the script prints."""
    paired = script("benchmarks/study/paired")
    monkeypatch.setattr(sys, "argv", ["paired.py", *words])
    paired.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {name: rest for name, *rest in cells}


def row(method: str, seed: int, losses: list[float], **values: Any) -> dict[str, Any]:
    about = {"method": method, "learning_rate": 0.01, "seed": seed, "failed": None}
    measured = {"validation_loss": losses[-1], "test_loss": None, "forgetting": 0.0}
    norms = {"grad_norms": [2.0] * 10 + [0.5] * (len(losses) - 10), "trainable_parameters": 8}
    return {**about, **measured, "losses": losses, **norms, **values}


def test_differences_are_of_seeds_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    falling = [4.0] * 10 + [3.0] * 10 + [2.0] * 10
    fast = [4.0] * 10 + [1.0] * 20
    rows = [
        *(row("ours", seed, fast, forgetting=0.1 * seed) for seed in (0, 1, 2)),
        *(row("other", seed, falling) for seed in (0, 1)),
        row("other", 3, falling, failed="no memory"),
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = told(monkeypatch, capsys, "ours@0.01", "other@1e-2", str(file))
    assert found["loss"] == ["1.0000", "2.0000", "-1.0000, 95 % interval -1.0000 to -1.0000, n = 2"]
    # Of 0 and 0.1: Student's t of one degree of freedom is 12.706.
    assert found["forgetting"][2] == "+0.0500, 95 % interval -0.5853 to +0.6853, n = 2"
    # From 4 at step 10 to 1 at step 20, on a straight line, 2 is met at 16.67; the other needs 30.
    assert found["steps to the baseline's lowest training loss"][:2] == ["16.6667", "30.0000"]
    assert found["clipped steps"][:2] == ["0.3333", "0.3333"]
    assert "test loss" not in found, "no trial has one"


def test_a_method_that_is_not_there_is_told_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(row("ours", 0, [1.0] * 20)) + "\n")
    monkeypatch.setattr(sys, "argv", ["paired.py", "ours@0.01", "other@0.01", str(file)])
    with pytest.raises(SystemExit, match=r"no finished trial of other@0\.01; expected one of ours"):
        script("benchmarks/study/paired").main()


@pytest.mark.parametrize(
    ("task", "first", "baseline", "measure", "quoted"),
    [
        ("few", f"{MLP}@1e-2", "lora@1e-2", "loss", "+0.0061 (+0.0037 to +0.0084)"),
        ("code", f"{MLP}@1e-2", "lora@5e-3", "loss", "-0.0100 (-0.0276 to +0.0076)"),
        ("pairs", f"{MLP}@2e-2", "lora@1e-2", "test loss", "+3,946 bits (+360 to +7,533)"),
        ("few", f"{MLP}@1e-2", RANDOM.format("1e-2"), "loss", "+0.0040 nats\n(-0.0066 to +0.0145)"),
        ("code", f"{MLP}@1e-2", RANDOM.format("1e-2"), "loss", "-0.0037 nats (-0.0097 to +0.0023)"),
        ("pairs", f"{MLP}@2e-2", RANDOM.format("2e-2"), "test loss", "-220 bits (-775 to +334)"),
        (
            "pairs",
            f"{BOTH}:on=gate_proj@4e-2",
            "lora@1e-2",
            "test loss",
            "+2,054 bits (-2,326 to +6,434)",
        ),
        (
            "few",
            f"{BOTH}:on=gate_proj+up_proj@2e-2",
            "lora:on=gate_proj+up_proj@1e-2",
            "loss",
            "+0.0039 (-0.0041 to +0.0119)",
        ),
        (
            "few",
            "lora:on=gate_proj+up_proj@1e-2",
            "lora@1e-2",
            "loss",
            "+0.0018 (-0.0032 to +0.0068)",
        ),
    ],
)
def test_the_study_quotes_what_the_rows_say(
    task: str,
    first: str,
    baseline: str,
    measure: str,
    quoted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(RESULTS / f"{task}.jsonl")
    found = told(monkeypatch, capsys, first, baseline, file)
    numbers = [float(each) for each in re.findall(r"[+-][\d.]+", found[measure][2])]
    in_page = [float(each.replace(",", "")) for each in re.findall(r"[+-][\d.,]+", quoted)]
    if "bits" in quoted:
        # Less of a nat is more of stored bits, and the ends of the interval change places; the
        # script's four digits of a nat are 0.3 bits.
        change, low, high = (BITS * each for each in numbers)
        assert in_page == pytest.approx([change, high, low], abs=1)
    else:
        assert in_page == numbers
    assert quoted in (SCRIPTS.parent / "docs" / "study.md").read_text(encoding="utf-8")


def test_the_study_quotes_the_questions_that_were_answered() -> None:
    lines = (RESULTS / "exact.jsonl").read_text(encoding="utf-8").splitlines()
    both, lora = (json.loads(line) for line in lines)
    ours, theirs = (each["score"]["shares"] for each in (both, lora))
    better = sum(one > other for one, other in zip(ours, theirs, strict=True))
    worse = sum(one < other for one, other in zip(ours, theirs, strict=True))
    page = " ".join((SCRIPTS.parent / "docs" / "study.md").read_text(encoding="utf-8").split())
    for quoted in (
        f"one term on the MLP at 1e-2 has {100 * sum(ours) / len(ours):.1f} % right",
        f"LoRA r1 on all layers at 5e-3 {100 * sum(theirs) / len(theirs):.1f} %",
        f"{better} questions only the first has right, {worse} only LoRA",
        f"Losses of the held-out rows {both['validation_loss']:.4f} and "
        f"{lora['validation_loss']:.4f}",
    ):
        assert quoted in page


def test_the_study_quotes_the_layers_that_the_gradient_chose() -> None:
    lines = (RESULTS / "placed.jsonl").read_text(encoding="utf-8").splitlines()
    pairs, few = (json.loads(line) for line in lines)
    page = " ".join((SCRIPTS.parent / "docs" / "study.md").read_text(encoding="utf-8").split())
    bits = 2048 * 6 + BITS * pairs["test_loss"]
    assert f"{bits:,.0f} bits of the pairs where the MLP stores" in page
    of_mlp = next(
        row["validation_loss"]
        for row in map(json.loads, (RESULTS / "few.jsonl").read_text("utf-8").splitlines())
        if (row["method"], row["learning_rate"], row["seed"]) == (MLP, 0.01, 0)
    )
    assert f"{few['validation_loss']:.4f} against {of_mlp:.4f} on the GSM8K rows" in page
    assert f"({pairs['forgetting']:.2f} against 2.60 and {few['forgetting']:.3f} against" in page
