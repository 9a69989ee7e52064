"""Which rows are held out: a pure function of their number and the seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kpsvd_tune.data.sampler import permutation
from kpsvd_tune.errors import DataError


def split_rows(
    num_rows: int,
    validation: int | float,
    seed: int,
    groups: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row indices to train on and to validate on: disjoint, both ascending.

    Together they are all rows, but for those of a group whose others are held out: rows are held
    out group by group, so that only the last one can be cut by the number wanted.

    Args:
        num_rows: Rows to split, at least 1.
        validation: A share below 1 (float) or a number of rows (int). A share above 0 holds out
            at least one row as long as one is left to train on; 0 holds out none.
        seed: Seed of the choice.
        groups: (rows,) equal numbers for rows that must not be on both sides; None: all differ.

    Raises:
        DataError: A number of rows that leaves nothing to train on.
    """
    if isinstance(validation, int):
        if validation >= num_rows:
            raise DataError(
                f"dataset.validation holds out {validation} rows and the dataset has {num_rows}; "
                "expected fewer, so that rows are left to train on: lower it, or give a share "
                "such as 0.1"
            )
        num_held_out = validation
    elif validation > 0:
        num_held_out = min(max(1, round(validation * num_rows)), num_rows - 1)
    else:
        num_held_out = 0
    if num_held_out == 0:
        return np.arange(num_rows), np.arange(0)
    order = np.asarray(permutation(num_rows, f"validation {seed}"))
    if groups is not None:
        # By the first row of each group in this order, which changes nothing where all differ.
        _, first, inverse = np.unique(groups[order], return_index=True, return_inverse=True)
        order = order[np.argsort(first[inverse], kind="stable")]
    held, rest = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    if groups is not None:
        rest = rest[~np.isin(groups[rest], groups[held])]
    return rest, held
