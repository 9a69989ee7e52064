"""A first recipe, drafted from a model, rows and this machine: what the command `init` writes.

`rows` looks at the data and holds some of it out, `budget` reads what may be spent, `settings`
chooses the values, and `text` writes them down with a comment each.
"""
