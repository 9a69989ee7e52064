"""The proof that merged weights are the adapter on its base: their logits on a few prompts.

Both are computed in float32, so that what is left is the merge itself and the rounding of the
stored weights, not the noise of a 16-bit forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kpsvd_tune.errors import MergeError, RunError

# Largest logit difference that passes, as a share of the largest logit. In float32 it is the
# order of operations; in 16 bits the rounding of every merged weight, which adds up over layers.
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
PROMPTS = (
    "The capital of France is",
    "Question: A baker makes 12 loaves and sells 7. How many are left?\nAnswer:",
    "def reverse(text):\n    return",
    "Dear Ms Keller,\nthank you for your letter of",
)


class Proof:
    """What the adapter on its float32 base says to some prompts, to hold the merged model against.

    `change` is the largest logit difference between the adapter on its base and the base alone.
    Raises MergeError where logits are not finite or all equal, so that they prove nothing.
    """

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
    ) -> None:
        self._batches = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
        model.eval()
        self._expected = logits(model, self._batches, "the adapter on its base")
        with model.disable_adapter():
            of_base = logits(model, self._batches, "the base model")
        self.change, _ = difference(of_base, self._expected)
        self.num_positions = sum(len(logits) for logits in self._expected)

    def tolerance(self, dtype: str) -> float:
        """Largest logit difference that passes for weights stored in that dtype."""
        # The prompt with the smallest logits counts: large logits of another excuse nothing.
        return TOLERANCES[dtype] * min(float(logits.abs().max()) for logits in self._expected)

    def compare(self, merged: Any) -> tuple[float, float]:
        """Largest logit difference, and the share of positions with the same likeliest token."""
        merged.eval()
        return difference(self._expected, logits(merged, self._batches, "the merged model"))

    def unseen(self, tolerance: float) -> tuple[str, ...]:
        """A warning where the proof could not tell the merged model from the base."""
        if self.change == 0:
            return (
                "the adapter changes nothing: on all prompts its logits are those of its base "
                "model. Was it trained?",
            )
        if self.change <= tolerance:
            return (
                f"the adapter changes the logits of its base by at most {self.change:.3g}, which "
                f"is within the tolerance {tolerance:.3g}: the proof could not tell the merged "
                "model from the base model; use --dtype float32 or a smaller --tolerance",
            )
        return ()


@torch.no_grad()
def logits(
    model: Any, batches: Sequence[Tensor], whose: str, error: type[RunError] = MergeError
) -> list[Tensor]:
    """The logits (tokens, vocabulary), float32, of each prompt of token ids (1, tokens).

    Raises:
        RunError: Of that class, as :func:`check_logits`.
    """
    found = [model(input_ids=ids).logits[0].float() for ids in batches]
    check_logits(found, whose, error)
    return found


def check_logits(found: Sequence[Tensor], whose: str, error: type[RunError] = MergeError) -> None:
    """Refuse logits that would equal any others, or none."""
    for number, each in enumerate(found, 1):
        if not torch.isfinite(each).all():
            raise error(
                f"the logits of {whose} are not finite for prompt {number}: the weights of the "
                "base or of the adapter are damaged; nothing was written"
            )
        if each.max() == each.min():
            raise error(
                f"the logits of {whose} are all {float(each.max()):g} for prompt {number}, so that "
                "comparing them proves nothing: the weights of the base or of the adapter are "
                "damaged; nothing was written"
            )


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    """Largest absolute logit difference, and the share of positions with the same top token."""
    pairs = list(zip(expected, found, strict=True))
    # torch's max keeps a NaN, which Python's max() of floats may lose.
    difference = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    return difference, same / sum(len(a) for a in expected)
