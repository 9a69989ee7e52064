"""A budget of trainable parameters shared out over the terms of all layers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def share_out(
    shares: Sequence[Sequence[float]],
    costs: Sequence[int],
    minima: Sequence[int],
    maxima: Sequence[int],
    budget: int,
) -> list[int]:
    """Choose ranks between minima and maxima that cost at most a budget.

    From the minima on, the next whole term with the most energy share per parameter is taken, in
    order within a layer, ties to the earlier layer, until no further term fits.

    Args:
        shares: For each layer sigma_k^2 / ||W||_F^2 of its terms, descending.
        costs: Parameters of one term of each layer.
        minima: Fewest terms of each layer.
        maxima: Most terms of each layer, at most the number of its shares.
        budget: Most parameters in all.

    Returns:
        The rank of each layer.

    Raises:
        ValueError: The minima alone cost more than the budget.
    """
    ranks = list(minima)
    spent = sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
    if spent > budget:
        raise ValueError(
            f"a budget of {budget:,} parameters is below the {spent:,} that the minimum ranks and "
            "fixed overrides need: raise the budget or lower the minimum"
        )
    queue: list[tuple[float, int]] = []

    def offer(layer: int) -> None:
        if ranks[layer] < maxima[layer]:
            heapq.heappush(queue, (-shares[layer][ranks[layer]] / costs[layer], layer))

    for layer in range(len(ranks)):
        offer(layer)
    while queue:
        _, layer = heapq.heappop(queue)
        # A layer whose term does not fit now never fits again: what is left only shrinks.
        if spent + costs[layer] <= budget:
            spent += costs[layer]
            ranks[layer] += 1
            offer(layer)
    return ranks
