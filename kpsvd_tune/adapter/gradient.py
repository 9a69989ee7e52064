"""Gradients of the trainable offsets, in one of three ways with the same result.

ga[s, i, j] = sum over t, k, l of gy[t, i, k] B[s, k, l] x[t, j, l] and
gb[s, k, l] = sum over t, i, j of gy[t, i, k] A[s, i, j] x[t, j, l], with A = A0 + a and B = B0 + b:
only r terms, not the 2r of Delta. Letters as in :mod:`kpsvd_tune.adapter.kernel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kpsvd_tune.adapter.kernel import chunk_tokens, left_form, project, row_blocks


def spread_gradients(
    x: Tensor, gy: Tensor, left: Tensor, right: Tensor, projected: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients by flat products of width r*n*p: for small n*p.

    Args:
        x: (t, in), contiguous.
        gy: (t, out), same dtype, contiguous.
        left: A0 + a, (r, m, n).
        right: B0 + b, (r, p, q).
        projected: gy projected on at least the r left factors, (t, n*s, p), if already at hand.

    Returns:
        ga (r, m, n) and gb (r, p, q).
    """
    (r, m, n), (_, p, q) = left.shape, right.shape
    if projected is None:
        projected = project(gy, left_form(left, p, True), p, True)
    inner = torch.mm(x.view(-1, q), right.reshape(r * p, q).T)
    wide = torch.mm(inner.view(-1, n * r * p).T, gy).view(n, r, p, m, p)
    ga = wide.diagonal(dim1=2, dim2=4).sum(-1).permute(1, 2, 0)
    terms = projected.shape[1] // n
    gb = torch.mm(projected.view(-1, terms * p)[:, : r * p].T, x.view(-1, q))
    return ga, gb.view(r, p, q)


def chunked_gradients(x: Tensor, gy: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by products batched over tokens; see :func:`spread_gradients`.

    A chunk of tokens at a time, so that intermediates stay in cache.
    """
    (r, m, n), (_, p, q) = left.shape, right.shape
    ga, gb = x.new_zeros(m, n * r), x.new_zeros(r * p, q)
    folded, right_t = left_form(left, p, False), right.reshape(r * p, q).T
    step = chunk_tokens(x, n * r * p)
    for xs, gys in zip(torch.split(x, step), torch.split(gy, step), strict=True):
        inner = torch.mm(xs.reshape(-1, q), right_t).view(-1, n * r, p)
        ga += torch.bmm(gys.view(-1, m, p), inner.transpose(1, 2)).sum(0)
        gb.addmm_(project(gys, folded, p, False).view(-1, r * p).T, xs.reshape(-1, q))
    return ga.view(m, n, r).permute(2, 0, 1), gb.view(r, p, q)


def full_gradients(x: Tensor, gy: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by way of the weight gradient gy^T x; see :func:`spread_gradients`.

    A block of rows at a time is rearranged and contracted, so the whole of it never exists. x and
    gy may be in 16 bits beside wider factors: the block is then rounded once, the rest is not.
    """
    (r, m, n), (_, p, q) = left.shape, right.shape
    ga, gb = left.new_empty(r, m, n), left.new_zeros(r, p * q)
    flat = right.reshape(r, p * q)
    for rows in row_blocks(left, n * p * q):
        height = rows.stop - rows.start
        gradient = torch.mm(gy[:, rows.start * p : rows.stop * p].T, x)
        blocks = gradient.view(height, p, n, q).transpose(1, 2)
        rearranged = left.new_empty(height, n, p, q).copy_(blocks).view(height * n, p * q)
        ga[:, rows] = torch.mm(flat, rearranged.T).view(r, height, n)
        gb.addmm_(left[:, rows].reshape(r, height * n), rearranged)
    return ga, gb.view(r, p, q)
