"""What a run would take: its memory, its time and its price, before anything is spent."""

from kpsvd_tune.estimate.plan import make_plan

__all__ = ["make_plan"]
