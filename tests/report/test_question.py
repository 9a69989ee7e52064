"""A question in the terminal's report is what was asked, not what a template puts around it."""

from __future__ import annotations

import pytest

from kpsvd_tune.report.question import question_in

SYSTEM = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"


def chat(text: str) -> str:
    return f"{SYSTEM}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [
        # Words that all questions share stay: only whole lines and marks go.
        (
            [chat("Second message: It broke."), chat("Second message: Where is it?")],
            ["Second message: It broke.", "Second message: Where is it?"],
        ),
        # Several turns of a conversation.
        (
            [chat("Hi<|im_end|>\n<|im_start|>user\nBye"), chat("No")],
            ["Hi user Bye", "No"],
        ),
        (
            ["<s>[INST] One? [/INST]", "<s>[INST] Two? [/INST]"],
            ["One?", "Two?"],
        ),
        (
            ["<｜User｜>One<｜Assistant｜>", "<｜User｜>Two<｜Assistant｜>"],
            ["One", "Two"],
        ),
        # Worked examples go with what is common.
        (
            ["Q: a\nA: b\n\nQ: c < d\nA:", "Q: a\nA: b\n\nQ: e\nA:"],
            ["Q: c < d", "Q: e"],
        ),
        # Nothing tells what is the question.
        (["same\ntext", "same\ntext"], ["same text", "same text"]),
        ([chat("Alone")], ["system You are a helpful assistant user Alone assistant"]),
        # One question is the beginning of the other.
        (["a\nb\n", "a\nb\nc\nb\n"], ["a b", "c"]),
        (["<|a|>", "<|a|>"], ["<|a|>", "<|a|>"]),
        ([], []),
    ],
)
def test_the_question_itself_is_shown(prompts: list[str], shown: list[str]) -> None:
    show = question_in(prompts)
    assert [show(each) for each in prompts] == shown
