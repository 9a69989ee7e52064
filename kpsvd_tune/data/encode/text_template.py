"""Text templates: where prompt, system prompt and completion go."""

from __future__ import annotations

import re

from kpsvd_tune.data.encode.format import Pair
from kpsvd_tune.errors import DataError

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_KNOWN = ("prompt", "completion", "system")


class TextTemplate:
    r"""A template such as "Question: {prompt}\nAnswer: {completion}".

    Only the three placeholders are replaced, each once and in one pass: braces in a template
    ("\boxed{}") or in a row stay as they are. Text behind {completion} is learnt with it.

    Args:
        template: Text with {completion} once, and {prompt} and {system} before it or not at all.

    Raises:
        DataError: An unknown placeholder, or one missing, repeated or behind {completion}.
    """

    def __init__(self, template: str) -> None:
        names = _PLACEHOLDER.findall(template)
        fault = None
        if unknown := [name for name in names if name not in _KNOWN]:
            fault = (
                f"has the placeholder {{{unknown[0]}}}; to use a column of that name write "
                f"{{prompt}} and dataset.columns={{prompt: {unknown[0]}}}"
            )
        elif names.count("completion") != 1:
            fault = f"has {{completion}} {names.count('completion')} times; expected once"
        elif names[-1] != "completion":
            fault = f"has {{{names[-1]}}} behind {{completion}}; expected it before"
        if fault:
            raise DataError(
                f"dataset.template {fault}; expected text such as "
                r'"Question: {prompt}\nAnswer: {completion}", or chat'
            )
        self.has_prompt = "prompt" in names
        self.has_system = "system" in names
        self._head, _, self._tail = template.partition("{completion}")

    def render(self, pair: Pair) -> tuple[str, str]:
        """Prompt text and completion text; spaces at the end of the first move to the second."""
        values = {"prompt": pair.prompt, "system": pair.system or ""}
        text = _PLACEHOLDER.sub(lambda match: values[match[1]], self._head)
        prompt = text.rstrip(" ")
        return prompt, text[len(prompt) :] + pair.completion + self._tail
