"""Comparison of adapter methods: which trials to run, PEFT's own baselines, and the verdict.

`methods` reads the names that a user types, `baselines` meets a budget with PEFT's methods, `plan`
says which trials come next, `statistics`, `verdict` and `claims` turn their rows into figures.
Nothing is imported here, for the command line reads names before it loads any library.
"""
