"""Blocks of large tensors go back to the system when they are freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

HOLES = """
import sys, torch
from pathlib import Path
from kpsvd_tune.hardware.heap import return_large_blocks

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if "told" in sys.argv:
    assert return_large_blocks()
# glibc's threshold rises to the size of a block with pages of its own that is freed.
block = torch.ones(30 << 20, dtype=torch.uint8)
del block
before = resident()
blocks = [torch.ones(8 << 20, dtype=torch.uint8) for _ in range(20)]
# The last one stays and keeps the heap from being cut off at its end.
del blocks[:-1]
print(resident() - before)
"""


def held(*words: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", HOLES, *words], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_large_blocks_leave_no_holes() -> None:
    assert held() > 100 << 20, "the heap kept nothing: this test shows nothing"
    assert held("told") < 20 << 20
