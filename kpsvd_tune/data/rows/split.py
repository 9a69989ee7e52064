"""Which rows are held out: a pure function of their number and the seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kpsvd_tune.data.rows.sampler import permutation
from kpsvd_tune.errors import DataError


def split_rows(
    groups: NDArray[np.int64],
    validation: int | float,
    seed: int,
    twins: NDArray[np.int64] | None = None,
    usable: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places to train on and to validate on: disjoint, both ascending.

    Together they are all places, but for the twins of held-out rows: rows that must stay on one
    side are held out together, so that only the last set of twins can be cut by the number wanted.

    Args:
        groups: (places,) ascending from 0 without a gap, at least one: the row that each place
            belongs to. A row is held out with all of its places, as the turns of one chat are.
        validation: A share below 1 (float) or a number of rows (int). A share above 0 holds out
            at least one row as long as one is left to train on; 0 holds out none.
        seed: Seed of the choice.
        twins: (places,) equal numbers for what must not be on both sides; None: all rows differ.
        usable: (places,) what can be learnt, at least one; None: all. Other rows are never held
            out, and do not count, since they would make the validation smaller than asked for.

    Raises:
        DataError: A number of rows that leaves nothing to train on.
    """
    num_places = int(groups[-1]) + 1
    candidates = np.ones(num_places, dtype=bool)
    if usable is not None:
        candidates = np.bincount(groups, weights=usable) > 0
    num_rows = int(candidates.sum())
    if isinstance(validation, int):
        if validation >= num_rows:
            raise DataError(
                f"dataset.validation holds out {validation} rows and the dataset has {num_rows} "
                "that can be learnt; expected fewer, so that rows are left to train on: lower it, "
                "or give a share such as 0.1"
            )
        num_held_out = validation
    elif validation > 0:
        num_held_out = min(max(1, round(validation * num_rows)), num_rows - 1)
    else:
        num_held_out = 0
    if num_held_out == 0:
        return np.arange(len(groups)), np.arange(0)
    order = np.asarray(permutation(num_places, f"validation {seed}"))
    order = order[candidates[order]]
    places = np.arange(len(groups))
    if twins is None:
        twins = groups
    else:
        # By the first row of each set in this order, which changes nothing where all differ.
        _, starts = np.unique(groups, return_index=True)
        of_rows = twins[starts][order]
        _, first, inverse = np.unique(of_rows, return_index=True, return_inverse=True)
        order = order[np.argsort(first[inverse], kind="stable")]
    is_held = np.zeros(num_places, dtype=bool)
    is_held[order[:num_held_out]] = True
    held, rest = places[is_held[groups]], places[~is_held[groups]]
    return rest[~np.isin(twins[rest], twins[held])], held
