"""All of `compare`: adapter methods trained on the same rows at the same budgets, and the verdict.

What is compared: `methods`, the names that a user types.
What is run: `plan` (which trials, in which order), `setup` and `baselines` (what each trains),
`trial`, `kept_base`, `workers`, `trial_log`.
What is concluded: `findings` and `statistics` (figures), `claims`, `verdict`.
The entry point is `compare.compare`.

Nothing is imported here: the command line reads names before it loads any library.
"""
