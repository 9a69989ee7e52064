"""What looks wrong in a run while it runs: each kind with its threshold, evidence and cure.

Plain functions and small classes over numbers that the loop has anyway; no torch. docs/watching.md
lists every code. A threshold is a named constant with its reason: healthy runs of many kinds give
no warning, and a planted fault of each kind gives its own (tests/watch/test_runs.py).
"""
