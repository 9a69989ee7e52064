"""Forms of an adapter: the terms of its update, what of them is trained, and what that costs.

A form says which terms make the update, what of them is trained and how a call is computed; the
layer, the differentiable operation and the update kept for inference ask it. All forms so far have
the four tensors a, b, A0 and B0 of a layer; one with others needs a place for them in the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kpsvd_tune.adapter.ways import Batched, Dense, Flat
from kpsvd_tune.linalg import KroneckerShape

Way = type[Flat] | type[Batched] | type[Dense]
Factors = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """How one call of a layer is computed."""

    update: Way  # Flat and Batched apply the factors to x, Dense builds W + Delta
    gradient: Way  # how the trained factors are differentiated


@dataclass(frozen=True)
class Offsets:
    """Trained offsets a, b from frozen factors A0, B0; Delta is exactly zero while a = b = 0.

    Delta = sum_k (A0_k + a_k) kron (B0_k + b_k) - A0_k kron B0_k
          = sum_k (A0_k + a_k) kron b_k + a_k kron B0_k.
    """

    shape: KroneckerShape
    rank: int  # r, the number of pairs of factors

    @staticmethod
    def terms(factors: Factors, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the 2r terms of Delta, (2r, m, n) and (2r, p, q), in ``dtype``.

        The sums are taken in the factors' own dtype, which is the default too. The first r left
        factors are the trained A0 + a, so that a projection on all of them serves the gradients.
        """
        a, b, left0, right0 = factors
        left, right = torch.cat([left0 + a, a]), torch.cat([b, right0])
        return left.to(dtype or left.dtype), right.to(dtype or right.dtype)

    @staticmethod
    def trained(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A0 + a (r, m, n) and B0 + b (r, p, q), whose gradients are those of a and b."""
        a, b, left0, right0 = factors
        return (left0 + a).to(dtype), (right0 + b).to(dtype)

    def plan(
        self, tokens: int, path: str = "auto", is_training: bool = True, can_add: bool = True
    ) -> Plan:
        """Choose the cheapest way for one call on ``tokens`` rows of x: a pure function of sizes.

        A path of activations or weight forces the way of the update. ``can_add`` says that
        W + Delta may stand for W: not in 16 bits, which would round Delta away, nor where the base
        layer computes for itself. Delta then costs a product of its own.
        """
        shape, rank, terms = self.shape, self.rank, 2 * self.rank
        flat = Flat.update_cost(tokens, terms, shape)
        batched = Batched.update_cost(tokens, terms, shape)
        update = Flat if flat <= batched else Batched
        gradient: Way = Flat
        lowest = float("inf")
        # A loop because torch.compile traces no min() with a key over sizes that vary.
        for way in (Flat, Batched, Dense):
            cost = way.gradient_cost(tokens, rank, shape)
            if cost < lowest:
                gradient, lowest = way, cost
        if path == "auto":
            directions = 2 if is_training else 1
            activations = directions * (flat if update is Flat else batched)
            if is_training and update is Flat and gradient is Flat:
                # The projection of gy is shared between the gradients of x and of the factors.
                activations -= tokens * rank * shape.n * shape.p * shape.out_features
            weight = directions * Dense.update_cost(tokens, terms, shape)
            if not can_add:
                weight += tokens * shape.out_features * shape.in_features
            path = "weight" if weight < activations else "activations"
        return Plan(Dense if path == "weight" else update, gradient)
