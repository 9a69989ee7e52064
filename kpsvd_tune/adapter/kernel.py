"""The products of a KPSVD layer on plain tensors: activations, dense update, factor gradients.

Letters: x (t, in) activations, gy (t, out) output gradients, t tokens; in = n*q, out = m*p;
A (s, m, n) and B (s, p, q) are s stacked terms. The update is Delta = sum_s A_s kron B_s. A token
of x is read as X (n, q), one of gy as Y (m, p), so the update of a token is sum_s A_s X B_s^T.

The left factors come in one of two forms (:func:`left_form`): spread over I_p, a plain matrix with
n*s*p rows for flat products, which wins while n*p is small; or folded (m, n*s) for products batched
over tokens. Everything works in the dtype of its arguments and differentiates nothing.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Tokens whose intermediates stay in a core's second-level cache; whole batches run twice as long.
CHUNK_TOKENS = 64
# Entries of W built or differentiated at a time: 4 MiB of float32, far below the 32 MiB above which
# the C library maps fresh pages for every buffer and faults on each of them.
BLOCK_ENTRIES = 1 << 20
FRESH_BYTES = 32 << 20
# Elsewhere than on a CPU small steps starve the device; this bounds an intermediate's entries.
DEVICE_ENTRIES = 1 << 26

_scratch = threading.local()


def stack_terms(
    a: Tensor, b: Tensor, left0: Tensor, right0: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the 2r terms of Delta, (2r, m, n) and (2r, p, q), in ``dtype``.

    The sums A0 + a are taken in the factors' own dtype. The first r left factors are A0 + a, the
    last r right factors are B0.
    """
    left, right = torch.cat([left0 + a, a]), torch.cat([b, right0])
    return left.to(dtype), right.to(dtype)


def left_form(left: Tensor, p: int, spread: bool) -> Tensor:
    """Arrange left factors (s, m, n) for :func:`add_update`: (n*s*p, m*p) or (m, n*s)."""
    terms, m, n = left.shape
    if not spread:
        return left.permute(1, 2, 0).reshape(m, n * terms)
    if p == 1:
        return left.permute(2, 0, 1).reshape(n * terms, m)
    wide = left.new_zeros(n, terms, p, m, p)
    diagonal = wide.diagonal(dim1=2, dim2=4)
    diagonal.copy_(left.permute(2, 0, 1).unsqueeze(-1).expand_as(diagonal))
    return wide.view(n * terms * p, m * p)


def add_update(y: Tensor, x: Tensor, left: Tensor, right: Tensor, spread: bool) -> None:
    """Add x Delta^T to y in place.

    Args:
        y: (t, out), contiguous.
        x: (t, in), contiguous.
        left: A in its form.
        right: B, (s, p, q).
        spread: Which form.
    """
    terms, p, q = right.shape
    n = x.shape[1] // q
    right_t = right.reshape(terms * p, q).T
    if spread:
        inner = torch.mm(x.view(-1, q), right_t)
        y.addmm_(inner.view(-1, n * terms * p), left)
        return
    m = y.shape[1] // p
    step = chunk_tokens(x, n * terms * p)
    for xs, ys in zip(torch.split(x, step), torch.split(y, step), strict=True):
        inner = torch.mm(xs.reshape(-1, q), right_t).view(-1, n * terms, p)
        ys.view(-1, m, p).baddbmm_(left.expand(len(inner), m, n * terms), inner)


def project(gy: Tensor, left: Tensor, p: int, spread: bool) -> Tensor:
    """Return sum_i A[s, i, j] gy[t, i, k] as (t, n*s, p): what :func:`add_update` transposes to."""
    if spread:
        return torch.mm(gy, left.T).view(len(gy), left.shape[0] // p, p)
    m = left.shape[0]
    folded = left.T.expand(len(gy), left.shape[1], m)
    return torch.bmm(folded, gy.view(-1, m, p))


def add_transposed(
    gx: Tensor, gy: Tensor, left: Tensor, right: Tensor, spread: bool
) -> Tensor | None:
    """Add gy Delta to gx (t, in) in place.

    Returns:
        The projection of gy on the left factors, (t, n*s, p), when it was made in one piece.
    """
    terms, p, q = right.shape
    flat = right.reshape(terms * p, q)
    step = len(gy) if spread else chunk_tokens(gy, left.shape[1] * p)
    inner = None
    for gxs, gys in zip(torch.split(gx, step), torch.split(gy, step), strict=True):
        inner = project(gys, left, p, spread)
        gxs.view(-1, q).addmm_(inner.view(-1, terms * p), flat)
    return inner if step >= len(gy) else None


def dense_update(
    left: Tensor, right: Tensor, base: Tensor | None, rows: slice, out: Tensor | None = None
) -> Tensor:
    """Return rows of base + Delta, or of Delta, without any Kronecker product.

    Args:
        left: A, (s, m, n).
        right: B, (s, p, q), same dtype.
        base: W (out, in), or None for Delta alone.
        rows: Rows of the left factors; rows i of A are rows i*p to (i+1)*p of W.
        out: Where to put the result, ((i1 - i0)*p, in), contiguous.
    """
    (terms, _, n), (_, p, q) = left.shape, right.shape
    part = left[:, rows].permute(1, 2, 0)
    height = part.shape[0]
    product = torch.mm(part.reshape(height * n, terms), right.reshape(terms, p * q))
    product = product.view(height, n, p, q).transpose(1, 2)
    if out is None:
        out = left.new_empty(height * p, n * q)
    view = out.view(height, p, n, q)
    if base is None:
        view.copy_(product)
    else:
        first = (rows.start or 0) * p
        torch.add(base[first : first + height * p].view(height, p, n, q), product, out=view)
    return out


def dense_weight(left: Tensor, right: Tensor, base: Tensor | None) -> Tensor:
    """Return all of base + Delta, (out, in); overwritten by the next call when it is large."""
    (_, m, n), (_, p, q) = left.shape, right.shape
    out = _buffer(left, m * p, n * q)
    for rows in row_blocks(left, n * p * q):
        dense_update(left, right, base, rows, out[rows.start * p : rows.stop * p])
    return out


def row_blocks(left: Tensor, entries_per_row: int) -> list[slice]:
    """Split the m rows of left factors into blocks of about :data:`BLOCK_ENTRIES` entries of W."""
    m = left.shape[1]
    whole = left.device.type != "cpu" or torch.compiler.is_compiling()
    step = m if whole else max(1, BLOCK_ENTRIES // entries_per_row)
    return [slice(start, min(m, start + step)) for start in range(0, m, step)]


def chunk_tokens(x: Tensor, entries_per_token: int) -> int:
    """Tokens to treat at a time where products are batched over them."""
    if torch.compiler.is_compiling():
        return max(1, x.shape[0])
    if x.device.type == "cpu":
        return CHUNK_TOKENS
    return max(CHUNK_TOKENS, DEVICE_ENTRIES // entries_per_token)


def rows_of(x: Tensor) -> Tensor:
    """Return x (.., width) as (t, width), contiguous; copied only where its strides need it."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def no_view(y: Tensor) -> Tensor:
    """Return y, no longer a view in autograd's eyes, without a copy.

    What it is a view of must belong to nobody else. Autograd lets nobody change a view in place
    that left a function of ours, as ``y += bias`` and ``nn.ReLU(inplace=True)`` do.
    """
    owned: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return owned


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised matrix; one lasting buffer a thread serves all large ones on a CPU."""
    size = rows * columns
    small = size * like.element_size() <= FRESH_BYTES
    if small or like.device.type != "cpu" or torch.compiler.is_compiling():
        return like.new_empty(rows, columns)
    held: Tensor | None = getattr(_scratch, "held", None)
    if held is None or held.numel() < size or held.dtype != like.dtype:
        # Inference tensors may not be written to later, outside of inference mode.
        with torch.inference_mode(False):
            held = _scratch.held = torch.empty(size, dtype=like.dtype)
    return held[:size].view(rows, columns)
