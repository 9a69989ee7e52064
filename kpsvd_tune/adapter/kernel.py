"""Building blocks of the ways to compute: dense updates, blocks and chunks, contiguous rows.

Letters as in :mod:`kpsvd_tune.adapter.ways`. Everything works in the dtype of its arguments and
differentiates nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Intermediates of so many bytes stay near a core's second-level cache; those of whole batches run
# twice as long. Fewer tokens than the second number make the products too small.
CACHED_BYTES = 1_600_000
CHUNK_TOKENS = 8
# Entries of W built or differentiated at a time: 4 MiB of float32, far below the 32 MiB above which
# the C library maps fresh pages for every buffer and faults on each of them.
BLOCK_ENTRIES = 1 << 20
FRESH_BYTES = 32 << 20
# Elsewhere than on a CPU small steps starve the device; this bounds an intermediate's entries.
DEVICE_ENTRIES = 1 << 26

_scratch = threading.local()
_imagined = threading.local()


@contextlib.contextmanager
def imagined_on(kind: str) -> Iterator[None]:
    """Within it this thread computes as on that kind of device, such as "cuda", wherever it is.

    For tensors without numbers, by which is counted what a step on another device would take.
    """
    _imagined.kind = kind
    try:
        yield
    finally:
        del _imagined.kind


def device_kind(x: Tensor) -> str:
    """The kind of device that x is, or is imagined, on: it decides how things are computed."""
    return getattr(_imagined, "kind", x.device.type)


def dense_update(
    left: Tensor, right: Tensor, base: Tensor | None, rows: slice, out: Tensor | None = None
) -> Tensor:
    """Return rows of base + Delta, or of Delta without a base, without any Kronecker product.

    left is A (s, m, n) and right is B (s, p, q) of the same dtype; base is W (out, in). ``rows``
    are those of A: row i of A stands for rows i*p to (i+1)*p of W. ``out``, ((i1 - i0)*p, in), must
    be contiguous.
    """
    (terms, _, n), (_, p, q) = left.shape, right.shape
    part = left[:, rows].permute(1, 2, 0)
    height = part.shape[0]
    if out is None:
        out = left.new_empty(height * p, n * q)
    view = out.view(height, p, n, q)
    first = (rows.start or 0) * p
    if terms == 1 and base is not None:
        # One pass over W, without the product in between.
        blocks = base[first : first + height * p].view(height, p, n, q)
        torch.addcmul(blocks, part.reshape(height, 1, n, 1), right.view(1, p, 1, q), out=view)
        return out
    product = torch.mm(part.reshape(height * n, terms), right.reshape(terms, p * q))
    product = product.view(height, n, p, q).transpose(1, 2)
    if base is None:
        view.copy_(product)
    else:
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
    whole = device_kind(left) != "cpu" or torch.compiler.is_compiling()
    step = m if whole else max(1, BLOCK_ENTRIES // entries_per_row)
    return [slice(start, min(m, start + step)) for start in range(0, m, step)]


def chunk_tokens(x: Tensor, entries_per_token: int) -> int:
    """Tokens to treat at a time where products are batched over them."""
    if torch.compiler.is_compiling():
        return max(1, x.shape[0])
    is_cpu = device_kind(x) == "cpu"
    entries = CACHED_BYTES // x.element_size() if is_cpu else DEVICE_ENTRIES
    return max(CHUNK_TOKENS, entries // entries_per_token)


def rows_of(x: Tensor) -> Tensor:
    """Return x (.., width) as (t, width), contiguous; copied only where its strides need it."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def no_view(y: Tensor) -> Tensor:
    """Return y as a tensor that autograd does not take for a view, without a copy.

    Autograd refuses to change a view in place that a custom function returned, as ``y += bias``
    and ``nn.ReLU(inplace=True)`` do. The tensor behind y must have no other user.
    """
    owned: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return owned


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised matrix; one lasting buffer a thread serves all large ones on a CPU."""
    size = rows * columns
    small = size * like.element_size() <= FRESH_BYTES
    if small or device_kind(like) != "cpu" or torch.compiler.is_compiling():
        return like.new_empty(rows, columns)
    held: Tensor | None = getattr(_scratch, "held", None)
    if held is None or held.numel() < size or held.dtype != like.dtype:
        # Inference tensors may not be written to later, outside of inference mode.
        with torch.inference_mode(False):
            held = _scratch.held = torch.empty(size, dtype=like.dtype)
    return held[:size].view(rows, columns)
