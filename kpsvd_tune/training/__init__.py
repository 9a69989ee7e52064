"""The training loop over Accelerate.

`stages` is the command and `loop` the order of events around a step; `step` is the step itself and
`engines` what takes it: on plain processes, with sharded weights, or by DeepSpeed.
"""

from __future__ import annotations

from kpsvd_tune.training.accelerator import make_accelerator
from kpsvd_tune.training.loop import Training

__all__ = ["Training", "make_accelerator"]
