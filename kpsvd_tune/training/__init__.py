"""The training loop over Accelerate.

`loop` holds the order of events around a step, `step` the step itself, `saving` the way to and from
checkpoints; `accelerator`, `loss`, `optim`, `stream`, `validation`, `nonfinite`, `tracking`,
`sharding` and `progress` hold what their names say; `zero` drives DeepSpeed's engine.
"""

from __future__ import annotations

from kpsvd_tune.training.accelerator import make_accelerator
from kpsvd_tune.training.loop import Training

__all__ = ["Training", "make_accelerator"]
