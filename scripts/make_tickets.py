"""Writes made-up messages to a shop and the team that answers each, as rows to try things with.

    python scripts/make_tickets.py tickets.jsonl              # 200 rows
    python scripts/make_tickets.py tickets.jsonl --rows 40 --seed 1

Every row is {"prompt": MESSAGE, "completion": TEAM}. Equal arguments write equal bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

# What a message of each team may say; {} is what was bought.
SAYINGS = {
    "delivery": [
        "The parcel with my {} has not moved for a week.",
        "Tracking says my {} was handed over, but nobody rang.",
        "Can you send the {} to my office instead?",
        "The box arrived open and the {} was not in it.",
        "When will my {} be here? I waited all day.",
        "The driver left the {} in the rain.",
    ],
    "billing": [
        "I was charged twice for the {}.",
        "The invoice for my {} shows the wrong company name.",
        "My voucher was not taken off the price of the {}.",
        "I sent the {} back and still see no refund.",
        "Why does the {} cost more on the bill than in the shop?",
        "Please split the payment for the {} into two months.",
    ],
    "repair": [
        "The {} does not switch on any more.",
        "After an hour of use the {} gets very hot.",
        "A part of the {} broke off on the second day.",
        "There is a loud noise whenever the {} runs.",
        "The {} stops by itself and blinks red.",
        "My {} leaks at the bottom.",
    ],
    "account": [
        "I cannot log in to see my order of the {}.",
        "Please change the address of my account; I also ordered a {}.",
        "The code to confirm my {} never reaches my phone.",
        "Delete my data, all of it, once the {} is paid.",
        "My password is refused since I bought the {}.",
        "Somebody else ordered a {} under my name.",
    ],
}
GOODS = ["kettle", "lamp", "blender", "heater", "drill", "radio", "toaster", "fan", "scale", "iron"]
OPENINGS = ["", "Hello, ", "Good morning. ", "Second message: ", "Please help. "]
CLOSINGS = ["", " Thanks.", " What can I do?", " This is urgent.", " Order {}."]


def tickets(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` different rows, of each team about as many."""
    draw = random.Random(seed)
    rows: dict[str, str] = {}
    teams = list(SAYINGS)
    while len(rows) < count:
        team = teams[len(rows) % len(teams)]
        saying = draw.choice(SAYINGS[team]).format(draw.choice(GOODS))
        closing = draw.choice(CLOSINGS).format(draw.randrange(1000, 10000))
        rows[f"{draw.choice(OPENINGS)}{saying}{closing}"] = team
    pairs = list(rows.items())
    draw.shuffle(pairs)
    return [{"prompt": message, "completion": team} for message, team in pairs]


def main() -> None:
    """Write the rows as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if not 1 <= asked.rows <= 2000:
        parser.error(f"--rows is {asked.rows}; 1 to 2000 different messages can be made")
    lines = [json.dumps(row) + "\n" for row in tickets(asked.rows, asked.seed)]
    asked.file.write_text("".join(lines), encoding="utf-8")
    print(f"{asked.file}: {len(lines)} rows")


if __name__ == "__main__":
    main()
