"""What is to be said of the base that an adapter is exported on."""

from __future__ import annotations

from kpsvd_tune.runs.find import Loaded, full_precision_note


def about_base(loaded: Loaded) -> list[str]:
    """A sentence each where it is another base, or plain where the training had it quantised."""
    found = [f"exported {loaded.other_base}"] if loaded.other_base else []
    if note := full_precision_note(loaded.distances, "exported for"):
        found.append(note)
    return found
