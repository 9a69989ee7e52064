"""The memory table of docs/scale.md is that of its script."""

from __future__ import annotations

import pytest
import scale_table

from kpsvd_tune.estimate.memory import part_of_process


@pytest.mark.slow
def test_the_table_is_that_of_the_script():
    page = scale_table.PAGE.read_text(encoding="utf-8")
    assert page.endswith(scale_table.table()), "stale: python scripts/scale_table.py"


def test_a_shard_is_a_part_of_all_but_the_activations():
    parts = {"weights": 800, "activations": 70}
    sharded, copied = scale_table.recipe(None, "fsdp"), scale_table.recipe("nf4", "ddp")
    assert part_of_process(parts, sharded, 8) == {"weights": 100, "activations": 70}
    assert part_of_process(parts, sharded, 1) == part_of_process(parts, copied, 8) == parts
