"""The training loop over Accelerate.

`loop` holds the order of events around a step, `step` the step itself; `loss`, `optim`, `stream`,
`validation`, `nonfinite`, `signals`, `tracking`, `processes` and `progress` hold what their names
say.
"""

from __future__ import annotations

from kpsvd_tune.training.loop import Training
from kpsvd_tune.training.processes import make_accelerator, on_main_process

__all__ = ["Training", "make_accelerator", "on_main_process"]
