"""What the processes of a command say of themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kpsvd_tune.processes import peak_memory_bytes, reset_peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the mark when it is told")
def test_the_peak_of_memory_starts_again():
    cpu = torch.device("cpu")
    held = bytearray(200_000_000)
    held[::4096] = b"x" * len(held[::4096])  # pages that are written to are resident
    before = peak_memory_bytes(cpu)
    del held
    reset_peak_memory(cpu)
    assert peak_memory_bytes(cpu) < before - 150_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_the_peak_of_a_large_parent_is_not_that_of_its_child() -> None:
    held = bytearray(b"x") * 1_500_000_000
    code = "import torch; from kpsvd_tune.processes import peak_memory_bytes as peak; "
    code += "print(peak(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < len(held) - 200_000_000
