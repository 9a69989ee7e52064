"""Scores that can be trusted: tasks, generation, scorers and the sandbox for generated code.

`tasks` is the table of tasks and scorers. `evaluate.Scorer` runs tasks on a model, and
`scoring.score_completions` scores stored completions again. Importing this package imports neither
torch nor transformers.
"""
