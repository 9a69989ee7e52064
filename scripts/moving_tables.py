"""Write the tables of docs/moving.md from the rules that `recipes convert` goes by.

python scripts/moving_tables.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kpsvd_tune.recipe.convert.converting import RULES
from kpsvd_tune.recipe.convert.keys import Rules
from kpsvd_tune.recipe.convert.trainer import TRAINER

PAGE = Path(__file__).parents[1] / "docs" / "moving.md"
MARK = "<!-- From here on made by scripts/moving_tables.py -->\n"


def tables() -> str:
    """The tables, one for each tool and one for what they share."""
    lines: list[str] = []
    for tool, rules in RULES.items():
        own = {key: rule for key, rule in rules.items() if TRAINER.get(key) is not rule}
        lines += [f"## {tool}", ""]
        if len(own) < len(rules) and tool != "axolotl":
            lines += ["Besides the keys of transformers' trainer, below.", ""]
        lines += [*_table(rules if tool == "axolotl" else own), ""]
    lines += ["## Keys of transformers' trainer", "", *_table(TRAINER)]
    return "\n".join(lines) + "\n"


def _table(rules: Rules) -> Iterator[str]:
    yield "| key | becomes |"
    yield "|---|---|"
    for key, rule in rules.items():
        yield f"| `{key}` | {rule.says} |"


if __name__ == "__main__":
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark, f"{PAGE} lacks the line {MARK!r}"
    PAGE.write_text(f"{head}{MARK}\n{tables()}", encoding="utf-8")
