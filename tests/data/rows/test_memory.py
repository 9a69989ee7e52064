"""Memory does not grow with the data: rows are read, stored and hashed a few at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import make_tokenizer
from kpsvd_tune.data import prepare
from kpsvd_tune.recipe import DatasetRecipe

def anonymous():
    # Not the pages of mapped files: those go whenever another program needs the room.
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) // 1024

peak, tokenizer = 0, make_tokenizer()

def watch(*_):
    global peak
    peak = max(peak, anonymous())

def read(path):
    data = prepare(DatasetRecipe(path=path), tokenizer, seed=0, progress=watch)
    watch()
    return sum(len(data.train[index].input_ids) for index in range(0, len(data.train), 100))

read(sys.argv[2])  # whatever the libraries take, they have taken
before, peak = anonymous(), 0
num_tokens = read(sys.argv[3])
watch()
print(num_tokens, peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded_by_no_size_of_the_data(tmp_path: Path) -> None:
    line = '{"prompt": "%06d", "completion": "' + "word " * 60 + '"}\n'
    sizes = {"small.jsonl": 600, "large.jsonl": 10_000}
    for name, num_rows in sizes.items():
        with (tmp_path / name).open("w") as stream:
            stream.writelines(line % number for number in range(num_rows))
    run = subprocess.run(
        [
            *(sys.executable, "-c", PROGRAM, str(Path(__file__).parents[2])),
            *(str(tmp_path / name) for name in sizes),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    num_tokens, grown_mebibytes = map(int, run.stdout.split())
    assert num_tokens > 30_000  # one in a hundred of more than three million
    # As tuples, at 8 bytes an id and a label, they would take 50 MiB.
    assert grown_mebibytes < 25
