"""Scores that can be trusted: tasks, generation, scorers and the sandbox for generated code.

`evaluate.evaluate` runs one task on a model and `scoring.rescore` scores stored completions
again; the other modules hold one part each and can be used alone. Importing this package imports
neither torch nor transformers.
"""
