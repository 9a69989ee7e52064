"""All of `compare`: adapter methods trained on the same rows at the same budgets, and the verdict.

What is compared: `methods` (the names a user types) and `baselines` (PEFT's methods at a budget).
What is run: `plan` (which trials, in which order), `setups`, `trial`, `workers`, `trial_log`.
What is concluded: `statistics`, `claims`, `recommend`, `verdict`. `compare` is the entry point.

Nothing is imported here: the command line reads names before it loads any library.
"""
