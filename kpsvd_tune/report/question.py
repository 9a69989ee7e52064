"""The question itself in a prompt, without what a template and worked examples put around it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from os.path import commonprefix

# Tokens by which chat templates mark turns and texts.
_MARK = (
    r"<[|｜][^<>\s]{1,40}[|｜]>|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>|</?s>|"
    r"\[/?(?:INST|SYSTEM_PROMPT)\]"
)
_MARKS = re.compile(_MARK)
# Where a part of a prompt can end, and so what is common to all can be cut off.
_ENDS = re.compile(rf"\n|{_MARK}")


def question_in(prompts: Sequence[str]) -> Callable[[str], str]:
    """How to show one of the prompts to a task, on one line.

    Left out is what all of them begin with and end with, up to a whole line or a mark of the chat
    template, and such marks elsewhere. Where nothing would be left the prompt stays whole.
    """
    start = commonprefix(list(prompts))
    end = commonprefix([prompt[::-1] for prompt in prompts])[::-1]
    first = max((found.end() for found in _ENDS.finditer(start)), default=0)
    last = len(end) - min((found.start() for found in _ENDS.finditer(end)), default=len(end))

    def shown(prompt: str) -> str:
        for text in (prompt[first : max(first, len(prompt) - last)], prompt):
            if words := _MARKS.sub(" ", text).split():
                return " ".join(words)
        return " ".join(prompt.split())

    return shown
