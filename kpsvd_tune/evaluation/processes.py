"""What the processes of one evaluation do together; alone, each of these is trivial.

They meet in a group of their own, because they wait for each other as long as the slowest answer
takes, and the group of the training gives up after minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

_PATIENCE = timedelta(days=30)

Result = TypeVar("Result")


class _Meeting:
    """The group of the processes, made when they first meet."""

    world: Any = None
    group: Any = None


def rank() -> int:
    """Number of this process, from 0."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def num_processes() -> int:
    """How many processes share the work."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def wait_for_all() -> None:
    """Return once every process has come here."""
    if _is_distributed():
        torch.distributed.barrier(group=_group())


def on_first_process(work: Callable[[], Result]) -> Result:
    """The result of work done once, on every process; an error is raised on all of them."""
    if not _is_distributed():
        return work()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box, src=0, group=_group())
    if box[1] is not None:
        raise box[1]
    result: Result = box[0]
    return result


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _group() -> Any:
    world = torch.distributed.group.WORLD
    if _Meeting.world is not world:
        # gloo, whatever the devices: what is sent here are plain objects.
        _Meeting.group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        _Meeting.world = world
    return _Meeting.group
