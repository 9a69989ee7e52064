"""Three ways to compute with Kronecker terms: each knows its products, its gradients, its cost.

Letters: x (t, in) activations, gy (t, out) output gradients, t tokens; in = n*q, out = m*p;
A (s, m, n) and B (s, p, q) are s stacked terms. The update is Delta = sum_s A_s kron B_s. A token
of x is read as X (n, q), one of gy as Y (m, p), so the update of a token is sum_s A_s X B_s^T.
Gradients are those of trained factors A and B in a sum over r terms:
ga[s, i, j] = sum over t, k, l of gy[t, i, k] B[s, k, l] x[t, j, l] and
gb[s, k, l] = sum over t, i, j of gy[t, i, k] A[s, i, j] x[t, j, l].

Everything works in the dtype of its arguments and differentiates nothing. Costs are counted in
multiply-adds at the speed of a large matrix product; the constants of :mod:`.costs` are what
products of other forms cost beyond that. They are pure functions of sizes and constants: no clock
is asked, so a run computes in the same way every time.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from kpsvd_tune.adapter.costs import CPU_FLOAT32, Costs
from kpsvd_tune.adapter.kernel import chunk_tokens, dense_update, row_blocks
from kpsvd_tune.linalg import KroneckerShape

Side = Literal["left", "right"]
Sides = tuple[Side, ...]
BOTH: Sides = ("left", "right")
# Those of A (r, m, n) and of B (r, p, q); what was not asked for has no meaning.
Gradients = tuple[Tensor, Tensor]


@final
class Flat:
    """Two flat products, the left factors spread over I_p: for small n*p."""

    @staticmethod
    def arrange(left: Tensor, p: int) -> Tensor:
        """Arrange left factors (s, m, n) for the products below: (n*s*p, m*p)."""
        terms, m, n = left.shape
        if p == 1:
            return left.permute(2, 0, 1).reshape(n * terms, m)
        wide = left.new_zeros(n, terms, p, m, p)
        diagonal = wide.diagonal(dim1=2, dim2=4)
        diagonal.copy_(left.permute(2, 0, 1).unsqueeze(-1).expand_as(diagonal))
        return wide.view(n * terms * p, m * p)

    @staticmethod
    def add_update(y: Tensor, x: Tensor, left: Tensor, right: Tensor) -> None:
        """Add x Delta^T to y in place.

        y (t, out) and x (t, in) are contiguous, left is A as arranged, right is B (s, p, q).
        """
        terms, p, q = right.shape
        inner = torch.mm(x.view(-1, q), right.reshape(terms * p, q).T)
        y.addmm_(inner.view(-1, x.shape[1] // q * terms * p), left)

    @staticmethod
    def project(gy: Tensor, left: Tensor, p: int) -> Tensor:
        """Return sum_i A[s, i, j] gy[t, i, k] as (t, n*s, p), the transpose of the left product."""
        return torch.mm(gy, left.T).view(len(gy), left.shape[0] // p, p)

    @classmethod
    def add_transposed(cls, gx: Tensor, gy: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
        """Add gy Delta to gx (t, in) in place; left is A (s, m, n), right is B (s, p, q).

        Returns the projection of gy on the left factors (t, n*s, p), if it was made.
        """
        terms, p, q = right.shape
        inner = cls.project(gy, cls.arrange(left, p), p)
        gx.view(-1, q).addmm_(inner.view(-1, terms * p), right.reshape(terms * p, q))
        return inner

    @classmethod
    def gradients(
        cls,
        x: Tensor,
        gy: Tensor,
        projected: Tensor | None,
        left: Tensor,
        right: Tensor,
        sides: Sides = BOTH,
    ) -> Gradients:
        """Gradients of the factors A (r, m, n) and B (r, p, q) of those sides, of the same sizes.

        x (t, in) and gy (t, out) are contiguous and of one dtype. ``projected``, if it is at hand,
        is gy projected on left factors of which A are the first, (t, n*s, p).
        """
        (r, m, n), (_, p, q) = left.shape, right.shape
        ga, gb = left, right
        if "left" in sides:
            inner = torch.mm(x.view(-1, q), right.reshape(r * p, q).T)
            wide = torch.mm(inner.view(-1, n * r * p).T, gy).view(n, r, p, m, p)
            ga = wide.diagonal(dim1=2, dim2=4).sum(-1, dtype=_wide(x)).permute(1, 2, 0)
        if "right" in sides:
            if projected is None:
                projected = cls.project(gy, cls.arrange(left, p), p)
            terms = projected.shape[1] // n
            gb = torch.mm(projected.view(-1, terms * p)[:, : r * p].T, x.view(-1, q)).view(r, p, q)
        return ga, gb

    @staticmethod
    def update_cost(
        tokens: int, terms: int, shape: KroneckerShape, costs: Costs = CPU_FLOAT32
    ) -> float:
        """Cost of adding x Delta^T to y."""
        out, size = shape.out_features, shape.in_features
        width = terms * shape.n * shape.p
        passes = costs.pass_per_entry * (size + 2 * out)
        products = terms * shape.p * size + width * out
        return tokens * (products + passes) + width * out * costs.pass_per_entry + 2 * costs.call

    @staticmethod
    def gradient_cost(
        tokens: int,
        rank: int,
        shape: KroneckerShape,
        num_sides: int = 2,
        costs: Costs = CPU_FLOAT32,
    ) -> float:
        """Cost of the gradients of the factors of one side or both."""
        out, size = shape.out_features, shape.in_features
        products = rank * shape.p * size + rank * shape.n * shape.p * out
        return tokens * num_sides * (products + costs.pass_per_entry * (size + out))


@final
class Batched:
    """Products batched over tokens, the left factors folded; a chunk of tokens at a time.

    So that intermediates stay in cache.
    """

    @staticmethod
    def arrange(left: Tensor, p: int) -> Tensor:
        """Arrange left factors (s, m, n) for the products below: (m, n*s)."""
        terms, m, n = left.shape
        return left.permute(1, 2, 0).reshape(m, n * terms)

    @staticmethod
    def add_update(y: Tensor, x: Tensor, left: Tensor, right: Tensor) -> None:
        """As :meth:`Flat.add_update`."""
        terms, p, q = right.shape
        n, m = x.shape[1] // q, y.shape[1] // p
        right_t = right.reshape(terms * p, q).T
        step = chunk_tokens(x, n * terms * p)
        for xs, ys in zip(torch.split(x, step), torch.split(y, step), strict=True):
            inner = torch.mm(xs.reshape(-1, q), right_t).view(-1, n * terms, p)
            ys.view(-1, m, p).baddbmm_(left.expand(len(inner), m, n * terms), inner)

    @classmethod
    def add_transposed(cls, gx: Tensor, gy: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
        """As :meth:`Flat.add_transposed`: the update of Delta^T = sum_s A_s^T kron B_s^T."""
        arranged = cls.arrange(left.transpose(1, 2), right.shape[2])
        cls.add_update(gx, gy, arranged, right.transpose(1, 2))
        return None

    @classmethod
    def gradients(
        cls,
        x: Tensor,
        gy: Tensor,
        projected: Tensor | None,
        left: Tensor,
        right: Tensor,
        sides: Sides = BOTH,
    ) -> Gradients:
        """As :meth:`Flat.gradients`; ``projected`` is not used.

        Each side ends in one product over the tokens of a chunk; chunks are added up in float32.
        """
        (r, m, n), (_, p, q) = left.shape, right.shape
        wide = _wide(x)
        ga, gb = (x.new_zeros(size, dtype=wide) for size in ((n * r, m), (r * p, q)))
        # Contiguous, since a batched product takes twice as long with a turned matrix.
        folded, right_t = cls.arrange(left, p).T.contiguous(), right.reshape(r * p, q).T
        step = chunk_tokens(x, n * r * p + m * p)
        for xs, gys in zip(torch.split(x, step), torch.split(gy, step), strict=True):
            rows, outputs = xs.reshape(-1, q), gys.view(-1, m, p)
            if "left" in sides:
                inner = torch.mm(rows, right_t).view(-1, n * r, p)
                # Tokens beside columns, so that the sum over both is a product's own.
                ga = _plus_product(ga, _turned(inner), _turned(outputs).T)
            if "right" in sides:
                projected = torch.bmm(folded.expand(len(outputs), n * r, m), outputs)
                gb = _plus_product(gb, projected.view(-1, r * p).T, rows)
        return ga.view(n, r, m).permute(1, 2, 0), gb.view(r, p, q)

    @staticmethod
    def update_cost(
        tokens: int, terms: int, shape: KroneckerShape, costs: Costs = CPU_FLOAT32
    ) -> float:
        """As :meth:`Flat.update_cost`."""
        out, size = shape.out_features, shape.in_features
        products = terms * shape.p * size + terms * shape.n * out
        passes = costs.pass_per_entry * (size + 2 * out)
        return tokens * (costs.batched_slowness * products + passes) + 3 * costs.call

    @staticmethod
    def gradient_cost(
        tokens: int,
        rank: int,
        shape: KroneckerShape,
        num_sides: int = 2,
        costs: Costs = CPU_FLOAT32,
    ) -> float:
        """As :meth:`Flat.gradient_cost`."""
        out, size = shape.out_features, shape.in_features
        products = rank * shape.p * size + rank * shape.n * out
        slowness = costs.chunked_slowness * (1 + costs.narrow / shape.p)
        return tokens * num_sides * (slowness * products + costs.pass_per_entry * (size + out))


@final
class Dense:
    """W + Delta as a matrix, and gradients by way of the weight gradient gy^T x."""

    @staticmethod
    def add_transposed(
        gx: Tensor | None, gy: Tensor, weight: Tensor | None, left: Tensor, right: Tensor
    ) -> Tensor:
        """Return gx + gy (W + Delta), or gx + gy Delta without a weight; no gx stands for zero."""
        if torch.finfo(gy.dtype).bits < 32:
            # Sums over blocks would round each time.
            blocks = [slice(0, left.shape[1])]
        else:
            blocks = row_blocks(left, right[0].numel() * left.shape[2])
        p = right.shape[1]
        for rows in blocks:
            block = dense_update(left, right, weight, rows).to(gy.dtype)
            part = gy[:, rows.start * p : rows.stop * p]
            gx = torch.mm(part, block) if gx is None else gx.addmm_(part, block)
        assert gx is not None
        return gx

    @staticmethod
    def gradients(
        x: Tensor,
        gy: Tensor,
        projected: Tensor | None,
        left: Tensor,
        right: Tensor,
        sides: Sides = BOTH,
    ) -> Gradients:
        """As :meth:`Flat.gradients`; ``projected`` is not used.

        A block of rows at a time is rearranged and contracted, so the whole weight gradient never
        exists. x and gy may be in 16 bits beside wider factors: the block is then rounded once,
        the rest is not.
        """
        (r, m, n), (_, p, q) = left.shape, right.shape
        ga, gb = left.new_empty(r, m, n), left.new_zeros(r, p * q)
        flat = right.reshape(r, p * q)
        for rows in row_blocks(left, n * p * q):
            height = rows.stop - rows.start
            gradient = torch.mm(gy[:, rows.start * p : rows.stop * p].T, x)
            blocks = gradient.view(height, p, n, q).transpose(1, 2)
            rearranged = left.new_empty(height, n, p, q).copy_(blocks).view(height * n, p * q)
            if "left" in sides:
                ga[:, rows] = torch.mm(flat, rearranged.T).view(r, height, n)
            if "right" in sides:
                gb.addmm_(left[:, rows].reshape(r, height * n), rearranged)
        return ga, gb.view(r, p, q)

    @staticmethod
    def update_cost(
        tokens: int, terms: int, shape: KroneckerShape, costs: Costs = CPU_FLOAT32
    ) -> float:
        """Cost of W + Delta, whatever the tokens: its product is the base layer's own."""
        entries = shape.out_features * shape.in_features
        return entries * (costs.build_per_entry + costs.build_per_term * terms) + costs.call

    @staticmethod
    def gradient_cost(
        tokens: int,
        rank: int,
        shape: KroneckerShape,
        num_sides: int = 2,
        costs: Costs = CPU_FLOAT32,
    ) -> float:
        """As :meth:`Flat.gradient_cost`."""
        entries = shape.out_features * shape.in_features
        return entries * (tokens + costs.rearrange_per_entry + num_sides * rank)


def _turned(blocks: Tensor) -> Tensor:
    """Blocks (t, rows, columns) as a matrix (rows, t*columns)."""
    return blocks.transpose(0, 1).flatten(1)


def _plus_product(total: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return total + first @ second in total's dtype, which may be wider than theirs."""
    if total.dtype == first.dtype:
        return total.addmm_(first, second)
    return total + first @ second


def _wide(x: Tensor) -> torch.dtype:
    """In which gradients are added up."""
    return torch.promote_types(x.dtype, torch.float32)
