"""The training loop over Accelerate.

`loop` holds the order of events around a step, `step` the step itself, `saving` the way to and from
checkpoints; `loss`, `optim`, `stream`, `validation`, `nonfinite`, `signals`, `tracking`,
`processes`, `sharding` and `progress` hold what their names say; `zero` drives DeepSpeed's engine.
"""

from __future__ import annotations

from kpsvd_tune.training.loop import Training
from kpsvd_tune.training.processes import (
    end_processes,
    make_accelerator,
    name_lost_process,
    on_main_process,
)

__all__ = [
    "Training",
    "end_processes",
    "make_accelerator",
    "name_lost_process",
    "on_main_process",
]
