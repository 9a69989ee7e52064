"""Print the tables of docs/performance.md from the figures in results/performance/, or put them in.

python scripts/benchmarks/tables.py            print
python scripts/benchmarks/tables.py --write    replace what stands between the page's markers
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from paths import summary

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
FIGURES = Path(__file__).parent / "results" / "performance"
# What PEFT does to the dtype of its factors, beside every figure that depends on it.
FACTORS = {
    "none": "-",
    "lora-r4-16bit": "16 bits (autocast_adapter_dtype=False)",
    "lora": "float32 (PEFT's default)",
    "pissa": "float32 (PEFT's default)",
    "lokr": "float32 (PEFT's default)",
}


def step_table(figures: dict[str, Any]) -> str:
    """One run of step.py."""
    rows = {row["method"]: row for row in figures["rows"]}
    has_peak = all(row.get("peak_memory_bytes") for row in rows.values())
    lokr = rows.get("lokr-r4")
    # LoRA without its float32 copies is what saved bytes are held against.
    lora = rows.get("lora-r4-16bit", rows["lora-r4"])
    lines = [
        "| method | parameters | factors | seconds (least to most) | x LoRA r4 | x floor | x LoKr "
        "| saved MiB | x LoRA |" + " peak MiB |" * has_peak,
        "|---|---:|---|---:|---:|---:|---:|---:|---:|" + "---:|" * has_peak,
    ]
    for method, row in rows.items():
        factors = FACTORS.get(method) or FACTORS.get(method.split("-")[0], "float32")
        saved = row["saved_bytes"] / 2**20
        cells = [
            method,
            f"{row['parameters']:,}",
            factors,
            f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})",
            f"{row['to_lora']:.3f}",
            f"{row['seconds'] / rows['none']['seconds']:.3f}" if "none" in rows else "",
            f"{row['seconds'] / lokr['seconds']:.2f}" if lokr else "",
            f"{saved:.1f}",
            f"{row['saved_bytes'] / lora['saved_bytes']:.3f}",
        ]
        if has_peak:
            cells.append(f"{row['peak_memory_bytes'] / 2**20:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    settings, machine = figures["settings"], figures.get("machine", "")
    versions = ", ".join(f"{name} {value}" for name, value in figures["versions"].items())
    lines += ["", f"{settings['repetitions']} repetitions; {machine}; {versions}."]
    return "\n".join(lines)


def generation_table(rows: list[dict[str, Any]]) -> str:
    """A run of generation.py."""
    lines = ["| method | ms a token | tokens/s | time x base |", "|---|---:|---:|---:|"]
    for row in rows:
        seconds = row["seconds"]
        lines.append(
            f"| {row['method']} | {1e3 * seconds:.2f} | {1 / seconds:.1f} | {row['to_base']:.3f} |"
        )
    return "\n".join(lines)


def table(path: Path) -> str:
    """The table of a file of figures, chosen by its name."""
    figures = json.loads(path.read_text(encoding="utf-8"))
    if path.stem.startswith("generation"):
        return generation_table(figures)
    if path.stem.startswith("paths"):
        return summary(figures).replace("; ", ";\n")
    return step_table(figures)


def main() -> None:
    """Print every table, or write each between its markers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/performance.md")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8") if args.write else ""
    for path in sorted(FIGURES.glob("*.json")):
        if not args.write:
            print(f"### {path.stem}\n\n{table(path)}\n")
            continue
        start, end = f"<!-- {path.stem} -->", f"<!-- end {path.stem} -->"
        block = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        if not block.search(text):
            parser.error(f"{PAGE}: no {start} ... {end} for {path}: add both lines to the page")
        replacement = f"{start}\n{table(path)}\n{end}"
        text = block.sub(lambda _, new=replacement: new, text)
    if args.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
