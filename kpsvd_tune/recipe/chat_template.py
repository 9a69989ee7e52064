"""The chat templates that come with kpsvd-tune, by name, and what is wrong with a value."""

from __future__ import annotations

import difflib

from kpsvd_tune.storage.paths import exists, siblings

CHAT_TEMPLATES = (
    "chatml",
    "command-r",
    "deepseek",
    "deepseek-r1",
    "gemma",
    "llama2",
    "llama3",
    "mistral",
    "phi3",
    "phi4",
    "phi4-mini",
    "qwen3",
    "zephyr",
)


def chat_template_problem(value: str) -> str | None:
    """What is wrong with a value that is neither one of the names nor a file."""
    if value in CHAT_TEMPLATES or exists(value):
        return None
    close = difflib.get_close_matches(value.lower(), CHAT_TEMPLATES, 1, 0.6)
    hint = f"; did you mean {close[0]}?" if close else siblings(value)
    return (
        f"got {value!r}, and there is no such file and no chat template of that name{hint}; "
        f"expected a jinja file, or one of {', '.join(CHAT_TEMPLATES)}"
    )
