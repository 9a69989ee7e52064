"""A run, an adapter, a merged model or an exported LoRA becomes a repository on the hub.

`bundle` finds the files and makes them fit to be seen by others; `hub` sends them.
"""
