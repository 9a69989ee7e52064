"""The order of the stages, and nothing else: each function is one command."""

from kpsvd_tune.pipeline.apply import generate, merge
from kpsvd_tune.pipeline.ending import worse_message
from kpsvd_tune.pipeline.inspect import init_only, plan, sweep_ranks
from kpsvd_tune.pipeline.run import train
from kpsvd_tune.pipeline.score import evaluate

__all__ = [
    "evaluate",
    "generate",
    "init_only",
    "merge",
    "plan",
    "sweep_ranks",
    "train",
    "worse_message",
]
