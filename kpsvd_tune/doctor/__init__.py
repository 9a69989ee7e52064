"""Looks at the machine: what kpsvd-tune needs, what is there, and what to do about the rest."""
