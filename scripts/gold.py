"""Write the gold answers of a task as completions, to be scored like a model's.

    python scripts/gold.py gsm8k train.jsonl gold.jsonl
    kpsvd-tune eval --rescore gold.jsonl --task gsm8k

A scorer that gives right answers less than 100 % is wrong; with --empty every answer is empty, and
has to score 0. Of MBPP all splits are taken.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kpsvd_tune.evaluation.completions import Completion
from kpsvd_tune.evaluation.questions import read_questions
from kpsvd_tune.recipe import EvaluationRecipe


def main() -> None:
    """Read the options and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=["gsm8k", "math", "mbpp"])
    parser.add_argument("path", help="the rows: a local file or a hub id")
    parser.add_argument("output", type=Path, help="a new file")
    parser.add_argument("--empty", action="store_true", help="empty answers instead")
    args = parser.parse_args()
    split = "all" if args.task == "mbpp" and Path(args.path).is_file() else "test"
    questions = read_questions(EvaluationRecipe(task=args.task, path=args.path, split=split))
    with args.output.open("x", encoding="utf-8") as file:
        for each in questions:
            answer = "" if args.empty else each.answer
            file.write(Completion(each.id, str(each.prompt), answer, each.gold).to_json() + "\n")
    print(f"{len(questions)} answers in {args.output}")


if __name__ == "__main__":
    main()
