"""A disk or a memory that is nearly full."""

from __future__ import annotations

from kpsvd_tune.report.results import Event
from kpsvd_tune.units import size
from kpsvd_tune.watch.telling import warning

# A checkpoint is written beside those that are there before old ones go, and the adapter follows.
DISK_CHECKPOINTS = 3
# Less than this fills up by logs and caches of others before anyone looks.
DISK_BYTES = 256 * 1024**2
# Of the memory that this process may use. Less is taken by the next longer batch.
MEMORY_SHARE = 0.03


def disk_low(free: int, checkpoint_bytes: int, folder: str, step: int | None) -> Event | None:
    """The warning of a disk with less free than the next checkpoints need; sizes in bytes."""
    needed = max(DISK_BYTES, DISK_CHECKPOINTS * checkpoint_bytes)
    if free >= needed:
        return None
    return warning(
        "disk_low",
        f"{size(free)} are free on the disk of {folder}, and a checkpoint takes about "
        f"{size(checkpoint_bytes)}.",
        "Free some space now, or lower train.keep_checkpoints; a run that finds the disk full "
        "ends, and goes on with the same command.",
        step,
        free_bytes=free,
        checkpoint_bytes=checkpoint_bytes,
        limit_bytes=needed,
    )


def memory_low(
    free: int, total: int, whose: str, step: int, process: int | None = None
) -> Event | None:
    """The warning of a memory that is nearly full; sizes in bytes, `whose` names it.

    `process` is the number of the process that found it; None where there is one alone.
    """
    if total <= 0 or free >= MEMORY_SHARE * total:
        return None
    where = "" if process is None else f"On process {process}, "
    return warning(
        "memory_low",
        f"{where}{size(max(0, free))} of {whose} {size(total)} are free.",
        "Halve train.batch_size and double train.gradient_accumulation, set "
        "train.gradient_checkpointing: true, or lower dataset.max_length; train.on_oom: halve does "
        "the first by itself.",
        step,
        free_bytes=max(0, free),
        total_bytes=total,
        limit_share=MEMORY_SHARE,
        **({} if process is None else {"process": process}),
    )
