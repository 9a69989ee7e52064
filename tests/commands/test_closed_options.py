"""Options with a closed set of words are refused before anything is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("merge x -o y --dtype int8", "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        ("export x --to onnx -o y", "'onnx' is not one of 'lora', 'gguf'"),
        ("eval x --dtype=int8", "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        ("train x --sandbox docker", "'docker' is not one of 'bwrap', 'none'"),
        ("compare x --plan half", "'half' is not one of 'full', 'staged', 'done'"),
    ],
)
def test_another_word_is_refused_before_torch_is_imported(words: str, expected: str) -> None:
    program = (
        "import sys; from kpsvd_tune.commands.main import run\n"
        f"code = run({words.split()!r}); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    option = next(each for each in words.split() if each.startswith("--")).partition("=")[0]
    assert f"error: Invalid value for '{option}': {expected}" in done.stderr
