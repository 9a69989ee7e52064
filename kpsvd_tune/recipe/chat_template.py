"""The chat templates that come with kpsvd-tune, by name, and what is wrong with a value."""

from __future__ import annotations

from kpsvd_tune.errors import did_you_mean
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
    hint = did_you_mean(value, CHAT_TEMPLATES) or siblings(value)
    return (
        f"got {value!r}, and there is no such file and no chat template of that name{hint}; "
        f"expected a jinja file, or one of {', '.join(CHAT_TEMPLATES)}"
    )
