"""The text of `restrain`: read in windows, of which every other one judges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpsvd_tune.data import TokenizedRow
from kpsvd_tune.errors import DataError
from kpsvd_tune.evaluation.loss import text_windows
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.hashes import file_hash

WINDOW_TOKENS = 256
# Windows of either half of the text that are looked at.
MOST_WINDOWS = 32


@dataclass(frozen=True)
class KeptText:
    """The user's text, read and divided."""

    shown: list[TokenizedRow]  # tells where the update must not act
    judged: list[TokenizedRow]  # tells what was forgotten
    sha256: str  # of the file


def read_kept_text(model: Any, tokenizer: Any, path: str) -> KeptText:
    """Read the text of `restrain`, at most twice MOST_WINDOWS windows spread evenly over it.

    Of the model the configuration alone is looked at.

    Raises:
        DataError: It is no readable UTF-8 text, or too short to be divided.
        ResourceError: The disk refused the file.
    """
    windows = text_windows(model, tokenizer, Path(path), WINDOW_TOKENS)
    if len(windows) < 4:
        raise DataError(
            f"restrain.text: {path} has {sum(len(row.input_ids) for row in windows):,} tokens; "
            f"expected more than {3 * WINDOW_TOKENS:,}, for one half of it says what to keep and "
            "the other half measures that"
        )
    wanted = min(len(windows), 2 * MOST_WINDOWS)
    chosen = [windows[place * len(windows) // wanted] for place in range(wanted)]
    with explained(f"read {path}", "restrain.text"):
        sha256 = file_hash(path)
    return KeptText(chosen[::2], chosen[1::2], sha256)
