"""Writes arithmetic word problems for the quickstart: train, validation and test as JSON lines.

A problem is a story of one or two steps, made of an opening, perhaps a turn, and a question:

    Ana picks 17 plums in the morning and 25 more in the afternoon. Then Ana eats 8 of them.
    How many plums does Ana have now?
    17 + 25 = 42. 42 - 8 = 34. The answer is 34.

No pair of numbers that meets in a step of one split meets in a step of another, in either order
and whatever the sign, and no question is in two splits: a model that recites what it was trained
on gains nothing on the test. The bytes depend on the options alone. Needs Python and nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The share of all number pairs that belongs to each split.
PAIR_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}

TWO_STEP_SHARE = 0.4
SIGN_WEIGHTS = {"+": 35, "-": 30, "*": 20, "/": 15}

# A try fails where the numbers belong to another split or the question exists already; after so
# many the split has no more questions to give.
MAX_TRIES = 20_000

NAMES = (
    "Ana Ben Chloe Dario Elif Femi Greta Hugo Ines Jonas Kira Leo Mira Nils Olga Pablo Quinn Rosa "
    "Sami Tara Umar Vera Wanda Yusuf Zoe"
).split()

THINGS = (
    "apples beads buttons cards coins cookies crayons eggs feathers keys lemons marbles nuts "
    "pears pencils plums ribbons rocks seeds shells spoons stamps stickers tickets toys"
).split()

# A text that ends with a question closes the story; after the others a turn or QUESTIONS follow.
OPENINGS = {
    "+": [
        "{name} has {a} {things} and finds {b} more.",
        "{name} picks {a} {things} in the morning and {b} more in the afternoon.",
        "{name} buys {a} {things} on Monday and {b} {things} on Tuesday.",
        "{name} gets {a} {things} from {other} and {b} {things} from a neighbour.",
        "In a drawer {name} has {a} {things}, and in a box {b} more.",
        "{name} has {a} {things} and {other} has {b} {things}. "
        "How many {things} do they have together?",
        "A shelf holds {a} {things} and a basket holds {b} {things}. "
        "How many {things} are there in all?",
    ],
    "-": [
        "{name} has {a} {things} and gives {b} of them to {other}.",
        "{name} brings {a} {things} to the market and sells {b} of them.",
        "{name} packs {a} {things}, but {b} of them get lost on the way.",
        "Out of {a} {things}, {name} puts {b} aside for {other} and keeps the rest.",
        "{name} has {a} {things} and {other} has {b} {things}. "
        "How many more {things} does {name} have than {other}?",
        "{name} needs {a} {things} and has {b} {things} so far. "
        "How many {things} are still missing?",
    ],
    "*": [
        "{name} fills {a} boxes with {b} {things} each.",
        "{name} buys {a} bags, and every bag holds {b} {things}.",
        "On each of {a} days {name} collects {b} {things}.",
        "{name} lays out {a} rows of {b} {things}.",
        "There are {a} children, and each of them brings {b} {things}. "
        "How many {things} do they bring in all?",
    ],
    "/": [
        "{name} shares {a} {things} equally among {b} friends. "
        "How many {things} does each friend get?",
        "{name} packs {a} {things} into bags of {b}. How many bags does {name} fill?",
        "{name} puts {a} {things} on {b} plates, the same number on every plate. "
        "How many {things} are on one plate?",
        "A row has room for {b} {things}. How many rows does {name} need for {a} {things}?",
    ],
}

TURNS = {
    "+": [
        "Then {name} finds {b} more.",
        "After that {other} gives {name} {b} more.",
        "The next day {name} buys another {b} {things}.",
    ],
    "-": [
        "Then {name} gives {b} of them to {other}.",
        "After that {name} loses {b} of them.",
        "The next day {name} sells {b} of them.",
    ],
    "*": [
        "Then {name} makes it {b} times as many.",
        "{other} has {b} times as many {things} as that. How many {things} does {other} have?",
    ],
    "/": [
        "Then {name} shares them all equally among {b} friends. "
        "How many {things} does each friend get?",
        "Then {name} packs them all into bags of {b}. How many bags does {name} fill?",
    ],
}

QUESTIONS = [
    "How many {things} does {name} have now?",
    "How many {things} does {name} have in the end?",
    "How many {things} is that in the end?",
]


@dataclass(frozen=True)
class Step:
    """One calculation of a story: `left sign right = result`."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        """What the step comes to; division is used where it leaves nothing over."""
        match self.sign:
            case "+":
                return self.left + self.right
            case "-":
                return self.left - self.right
            case "*":
                return self.left * self.right
            case "/":
                return self.left // self.right
        raise ValueError(f"sign is {self.sign!r}; it must be one of + - * /")

    @property
    def pair(self) -> tuple[int, int]:
        """The two numbers without their order."""
        return min(self.left, self.right), max(self.left, self.right)

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


def split_of(pair: tuple[int, int], seed: int) -> str:
    """Name the one split in which two numbers may meet.

    Args:
        pair: The numbers, the smaller one first.
        seed: Another seed deals the pairs out differently.

    Returns:
        A key of `PAIR_SHARES`.
    """
    # Seeding with a text is the same on every machine and Python version; hash() is not.
    rng = random.Random(f"{seed} {pair[0]} {pair[1]}")
    return rng.choices(list(PAIR_SHARES), list(PAIR_SHARES.values()))[0]


def first_step(sign: str, rng: random.Random) -> Step:
    """Draw the numbers of an opening; every number and result is 2 or more."""
    if sign == "+":
        return Step(rng.randint(2, 40), sign, rng.randint(2, 40))
    if sign == "-":
        left = rng.randint(5, 50)
        return Step(left, sign, rng.randint(2, left - 2))
    left, right = rng.randint(2, 10), rng.randint(2, 10)
    return Step(left, sign, right) if sign == "*" else Step(left * right, sign, right)


def second_step(left: int, rng: random.Random) -> Step | None:
    """Draw a step that goes on from a result, or None if the drawn sign does not suit it."""
    sign = draw_sign(rng)
    if sign == "+":
        choices = range(2, 21)
    elif sign == "-":
        choices = range(2, min(20, left - 2) + 1)
    elif sign == "*":
        choices = range(2, 6 if left <= 12 else 0)
    else:
        choices = range(2, 11)
    fitting = [b for b in choices if sign != "/" or (left % b == 0 and 2 <= left // b <= 10)]
    return Step(left, sign, rng.choice(fitting)) if fitting else None


def draw_sign(rng: random.Random) -> str:
    """Draw + - * or /, the easier ones more often."""
    return rng.choices(list(SIGN_WEIGHTS), list(SIGN_WEIGHTS.values()))[0]


def draw_problem(num_steps: int, rng: random.Random) -> tuple[str, list[Step]] | None:
    """Draw one story.

    Args:
        num_steps: 1 or 2.
        rng: Where the choices come from.

    Returns:
        The question with its steps, or None if the parts that were drawn do not fit together.
    """
    steps = [first_step(draw_sign(rng), rng)]
    texts = [rng.choice(OPENINGS[steps[0].sign])]
    if num_steps == 2:
        step = second_step(steps[0].result, rng)
        if step is None or texts[0].endswith("?"):
            return None
        steps.append(step)
        texts.append(rng.choice(TURNS[step.sign]))
    if not texts[-1].endswith("?"):
        texts.append(rng.choice(QUESTIONS))

    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)}
    numbers = [{"a": steps[0].left, "b": steps[0].right}, {"b": steps[-1].right}, {}]
    story = [text.format(**words, **n) for text, n in zip(texts, numbers, strict=False)]
    return " ".join(story), steps


def make_split(split: str, num_rows: int, seed: int, taken: set[str]) -> list[dict[str, str]]:
    """Make the rows of one split.

    Args:
        split: A key of `PAIR_SHARES`.
        num_rows: How many rows to make.
        seed: Equal seeds give equal rows.
        taken: Questions of the splits made before; the new ones are added.

    Returns:
        Rows with the columns id, question and answer.

    Raises:
        ValueError: `num_rows` is more than the split has different questions.
    """
    rng = random.Random(f"{seed} {split}")
    rows: list[dict[str, str]] = []
    for index in range(num_rows):
        # Drawn once a row: two steps fit more rarely than one, and would miss their share.
        num_steps = 2 if rng.random() < TWO_STEP_SHARE else 1
        for _ in range(MAX_TRIES):
            problem = draw_problem(num_steps, rng)
            if problem is None or problem[0] in taken:
                continue
            if all(split_of(step.pair, seed) == split for step in problem[1]):
                break
        else:
            raise ValueError(
                f"{split}: got {index} different questions, expected {num_rows}; "
                f"ask for fewer with --num-{split}"
            )
        question, steps = problem
        taken.add(question)
        answer = " ".join(f"{step}." for step in steps) + f" The answer is {steps[-1].result}."
        rows.append({"id": f"{split}-{index:05d}", "question": question, "answer": answer})
    return rows


def count(text: str) -> int:
    """Read a number of rows; argparse turns the error into a message."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl into a folder.

    Args:
        arguments: The command line without the program's name; the real one by default.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train", type=count, default=2000)
    parser.add_argument("--num-validation", type=count, default=100)
    parser.add_argument("--num-test", type=count, default=300)
    options = parser.parse_args(arguments)

    taken: set[str] = set()
    try:
        files = {
            split: make_split(split, getattr(options, f"num_{split}"), options.seed, taken)
            for split in PAIR_SHARES
        }
    except ValueError as error:
        parser.error(str(error))

    options.output.mkdir(parents=True, exist_ok=True)
    for split, rows in files.items():
        path = options.output / f"{split}.jsonl"
        # Renamed when whole: an interrupted run leaves no half file that looks like a whole one.
        unfinished = path.with_suffix(".unfinished")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        unfinished.replace(path)
        print(f"{path}: {len(rows)} questions")


if __name__ == "__main__":
    main()
