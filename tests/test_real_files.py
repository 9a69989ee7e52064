"""Twelve files as people have them: each trains from the command line, or says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kpsvd_tune.commands import main as cli

PAIRS = [{"prompt": f"{n} + {n}?", "completion": str(2 * n)} for n in range(6)]
CHATS = [
    [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": f"After {n}?"},
        {"role": "assistant", "content": f"{n + 1}"},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": f"{n + 2}"},
    ]
    for n in range(6)
]
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# Name, content, and more of the dataset section.
TRAIN: dict[str, tuple[str, str | bytes, str]] = {
    "alpaca": (
        "a.json",
        json.dumps(
            [
                {
                    "instruction": "Double it.",
                    "input": str(n) if n % 2 else "",
                    "output": str(2 * n),
                }
                for n in range(6)
            ]
        ),
        "",
    ),
    "sharegpt": (
        "s.jsonl",
        lines(
            [
                {"conversations": [{"from": NAMES[m["role"]], "value": m["content"]} for m in chat]}
                for chat in CHATS
            ]
        ),
        "learn: last",
    ),
    "chat": ("c.jsonl", lines([{"messages": chat} for chat in CHATS]), ""),
    "prompt and completion": ("p.jsonl", lines(PAIRS), ""),
    "plain text": ("t.jsonl", lines([{"text": f"A tale of {n} mice."} for n in range(6)]), ""),
    "empty rows": (
        "e.jsonl",
        "\n{}\n" + lines(PAIRS) + '\n{"prompt": "", "completion": null}\n',
        "",
    ),
    "byte order mark and crlf": (
        "b.csv",
        b"\xef\xbb\xbfprompt,completion\r\n" + b"".join(b"p%d,c%d\r\n" % (n, n) for n in range(6)),
        "",
    ),
    "unicode": (
        "u.jsonl",
        lines([{"prompt": "日本\u2028語", "completion": "naïve 👩‍🚀 Ω"}] * 4),
        "",
    ),
    "a row of 10,000 tokens": (
        "l.jsonl",
        lines([*PAIRS, {"prompt": "long", "completion": "x" * 10_000}]),
        "max_length: 64, too_long: drop",
    ),
    "nested json": (
        "n.jsonl",
        lines([{"id": n, "qa": {"q": f"{n}?", "a": f"{n}!"}} for n in range(4)]),
        "columns: {prompt: qa.q, completion: qa.a}",
    ),
    "csv with quotes": (
        "q.csv",
        'prompt,completion\n"say ""hi"", please","line one\nline ""two"""\nplain,text\n' * 1
        + '"a,b","c\n\nd"\n',
        "",
    ),
    "several files": ("p2.jsonl", lines(PAIRS), ""),
}
REFUSED: dict[str, tuple[str, str | bytes, str, str]] = {
    "wrong columns": (
        "w.jsonl",
        lines([{"frage": "1?", "Answer": "2"}, {"frage": "3?", "Answer": "4"}]),
        "",
        "w.jsonl, line 1: the column 'prompt' is missing; found the columns frage, Answer; "
        "expected prompt and completion (format prompt-completion); for example "
        "'dataset.columns={prompt: frage, completion: Answer}'",
    ),
    "duplicate keys": (
        "d.jsonl",
        lines(PAIRS) + '{"prompt": "a", "prompt": "b", "completion": "c"}\n',
        "",
        "d.jsonl, line 7: the key 'prompt' occurs twice in one object: keep one of the two, it is "
        "unclear which one is meant",
    ),
    "nothing but empty rows": (
        "x.jsonl",
        '{"prompt": "a", "completion": ""}\n' * 3,
        "",
        "nothing can be trained in any of the 3 training rows: 3 rows dropped: empty, or without a "
        "completion",
    ),
    "only rows that are too long": (
        "y.jsonl",
        lines([{"text": "x" * 500}]),
        "max_length: 64, too_long: drop",
        "1 row dropped: longer than dataset.max_length (64 tokens), as dataset.too_long says",
    ),
    "an open quote": (
        "o.csv",
        'prompt,completion\na,b\n"c,d\n',
        "",
        "o.csv, line 3: not valid csv: unexpected end of data; expected comma-separated fields, a "
        "text with commas or quotes in double quotes",
    ),
    "latin-1": (
        "i.csv",
        b"prompt,completion\na,b\ncaf\xe9,d\n",
        "",
        "i.csv, line 3: byte 0xe9 is not UTF-8; expected UTF-8 text: save the file with that "
        "encoding",
    ),
}


def command(folder: Path, model: Path, name: str, content: str | bytes, more: str) -> list[str]:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "recipe.yaml").write_text(
        f"model: {{path: {model}, dtype: float32}}\n"
        f"dataset: {{path: {file}, validation: 0, {more}}}\n"
        "adapter: {target_modules: [q_proj], rank: {window: 4, max: 2}}\n"
        'train: {max_steps: 2, batch_size: 2, precision: "no"}\n'
        f"output_dir: {folder / 'run'}\n"
    )
    return ["train", str(folder / "recipe.yaml"), "--json"]


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAIN.values(), ids=TRAIN)
def test_it_trains(
    case: Any, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(tmp_path, tiny_model_dir, *case)
    if case is TRAIN["several files"]:
        text = tmp_path / "more.jsonl"
        text.write_text(lines([{"text": "a tale"}] * 3))
        first = tmp_path / case[0]
        arguments.append(f"dataset.path=[{{path: {first}, weight: 0.5}}, {text}]")
    assert cli.run(arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 2
    assert "trained tokens marked: " in captured.err


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_it_is_refused_with_a_message_to_act_on(
    case: Any, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *what, message = case
    assert cli.run(command(tmp_path, tiny_model_dir, *what)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
