"""How near an answer's text is to the right one: chrF by sacrebleu, ROUGE-L by rouge-score.

Both compare characters or words, and neither knows whether an answer is true.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from typing import Any
from unicodedata import normalize

INSTALL = (
    "the task text needs the packages sacrebleu and rouge-score; install them with: "
    "pip install 'kpsvd-tune[text]'"
)
# Scripts without spaces between words: each character counts as one.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_])+")


def missing() -> str | None:
    """What to install, where a package is not there."""
    names = ("sacrebleu", "rouge_score")
    return INSTALL if any(find_spec(name) is None for name in names) else None


def chrf(answer: str, right: str) -> float:
    """Character n-gram F-score, 0 to 1, with sacrebleu's settings (chrF2)."""
    return float(_chrf().sentence_score(_composed(answer), [_composed(right)]).score) / 100


def rouge_l(answer: str, right: str) -> float:
    """F-score of the longest common subsequence of words, 0 to 1.

    Words are runs of letters and digits of any script, in small letters; of texts in ASCII that is
    what rouge-score does by itself.
    """
    return float(_rouge().score(_composed(right), _composed(answer))["rougeL"].fmeasure)


def _composed(text: str) -> str:
    """Letters with marks as one character: some tokenizers write them so whatever was learnt."""
    return normalize("NFC", text)


class Words:
    """The tokenizer of rouge-score for texts of any script; its own one knows ASCII alone."""

    def tokenize(self, text: str) -> list[str]:
        """Give the words of a text."""
        return _WORD.findall(text.lower())


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=Words())
