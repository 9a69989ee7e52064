"""Folders of runs, made up: what `train` leaves in one, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
EVIL = "<script>alert('x')</script></pre><img src=x onerror=alert(1)>{{data}}&amp;"


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    layers: int = 3,
    loss: float = 1.0,
    every: int = 1,
    finished: bool = True,
    answers: dict[str, list[str]] | None = None,
    recipe: dict[str, Any] | None = None,
    **record: Any,
) -> Path:
    """Write a run that ended at a validation loss; `answers` are those of each side to 4 rows."""
    names = [f"model.layers.{number}.{kind}" for number in range(layers) for kind in KINDS]
    folder.mkdir(parents=True)
    known = {
        "model": {"path": "models/tiny <model>"},
        "adapter": {"form": "both"},
        "train": {"max_steps": steps, "max_grad_norm": 1.0, "learning_rate": 1e-3},
        "compare": {"price_per_hour": 2.5, "currency": "EUR"},
    }
    content = {
        "status": "finished" if finished else "running",
        "command": "kpsvd-tune train recipe.yaml",
        "versions": {"torch": "2.8.0", "kpsvd-tune": "0.1", "python": "3.11.9"},
        "device": "cuda:0",
        "num_processes": 2,
        "seed": 0,
        "started": "2026-01-02T03:04:05+0000",
        "identity": {
            "recipe": {**known, **(recipe or {})},
            "dataset": "d" * 64,
            "base": {"config.json": "c" * 64},
        },
        **record,
    }
    _write(folder / "run.json", content)
    (folder / "recipe.yaml").write_text(f"model:\n  path: {EVIL}\n", encoding="utf-8")
    _write(folder / "init" / "rank_report.json", _ranks(names))
    lines = []
    for step in range(every, steps + 1, every):
        part = step / steps
        line = {
            "step": step,
            "epoch": 3 * part,
            "loss": loss + 2 * math.exp(-4 * part) + 0.1 * math.sin(2.3 * step),
            "learning_rate": 1e-3 * (1 - part),
            "grad_norm": 0.6 + 0.5 * abs(math.sin(1.7 * step)),
            "tokens": 512,
            "tokens_per_second": 4000 + 500 * math.sin(step),
            "seconds": 0.5 * step,
            "memory_bytes": 8_000_000_000 + 1000 * step,
        }
        if step % (steps // 10) == 0:
            line["validation_loss"] = loss + 2 * math.exp(-4 * part)
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    end = loss + 2 * math.exp(-4)
    sides = answers or {"before": ["7"] * 4, "after": ["4", "6", EVIL, "8"]}
    for side, texts in sides.items():
        place = folder / "evaluation" / side / "exact_match"
        rows = [
            {"id": row, "prompt": f"{EVIL} How many?", "completion": text, "gold": str(4 + 2 * row)}
            for row, text in enumerate(texts)
        ]
        place.mkdir(parents=True)
        text = "".join(f"{json.dumps(row)}\n" for row in reversed(rows))
        (place / "completions.jsonl").write_text(text)
        _write(place / "evaluation.json", {"task": "exact_match"})
    _write(folder / "preflight.json", _PREFLIGHT)
    if not finished:
        return folder
    _write(
        folder / "learned.json",
        {
            "step": steps,
            "layers": [
                {"name": name, "update_norm": 0.01 * (1 + place), "weight_norm": 2.0}
                for place, name in enumerate(names)
            ],
        },
    )
    shares = {side: _share(texts) for side, texts in sides.items()}
    results = {
        "train_loss": end + 0.05,
        "validation_loss": end,
        "validation_loss_before": loss + 2,
        "steps": steps,
        "trainable_parameters": 10 * len(names),
        "wall_seconds": 0.5 * steps,
        "peak_memory_bytes": 8_000_000_000,
        "adapter_validation_loss": end,
        "device_seconds": float(steps),
        "cost": 0.75,
        "currency": "EUR",
        "scores": {"exact_match": {"exact_match": shares["after"]}},
        "base_scores": {"exact_match": {"exact_match": shares.get("before", shares["after"])}},
        "score_conditions": {"exact_match": "rows.jsonl, the first 4, greedy"},
    }
    _write(folder / "results.json", results)
    return folder


def write_events(folder: Path, *events: dict[str, Any]) -> None:
    """Write events.jsonl; keys that an event lacks are filled in."""
    usual = {"time": "2026-01-02T03:05:00+00:00", "kind": "warning", "text": "t"}
    lines = [json.dumps({**usual, **event}) for event in events]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")


def _share(texts: list[str]) -> dict[str, Any]:
    right = sum(text == str(4 + 2 * row) for row, text in enumerate(texts))
    value, n = right / len(texts), len(texts)
    stderr = math.sqrt(value * (1 - value) / n)
    return {"value": value, "n": n, "stderr": stderr, "unextractable": 0}


def _ranks(names: list[str]) -> dict[str, Any]:
    layers = [
        {
            "name": name,
            "out_features": 8,
            "in_features": 8,
            "factor_shape": [4, 4, 2, 2],
            "rank": 1 + place % 5,
            "rank_energy": 2,
            "rank_elbow": 1,
            "bound_by": "energy",
            "energy_window": 0.8,
            "energy_total": 0.5,
            "parameters": 10,
            "relative_error": 0.7,
            "singular_values": [3.0, 2.0],
            "stable_rank": 1.5,
            "seconds": 0.1,
        }
        for place, name in enumerate(names)
    ]
    totals = {
        "modules": len(names),
        "trainable_parameters": 10 * len(names),
        "base_parameters": 100_000,
        "energy": 0.5,
    }
    return {"model": "models/tiny <model>", "totals": totals, "layers": layers}


_PREFLIGHT = {
    "num_rows": 100,
    "num_validation_rows": 10,
    "num_tokens": 5000,
    "num_supervised_tokens": 900,
    "num_truncated": 1,
    "num_dropped": 2,
    "max_tokens": 120,
    "format": "messages",
    "format_reason": "rows have messages",
    "warnings": ["two rows are the same"],
    "sample": [["A question? ", False], [EVIL, True]],
    "sources": [],
}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
