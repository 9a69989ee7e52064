"""The folder of a run: its checkpoints, its adapter, and what makes it that run.

`directory` owns the layout and the checkpoints; `state` turns a training's state into safetensors
and JSON and back; `identity` tells two runs apart; `ownership` says whose a folder is; `find` finds
model and adapter in what a command is given; `adapter_folder` writes an adapter and checks it.
"""
