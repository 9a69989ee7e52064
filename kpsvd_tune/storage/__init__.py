"""What touches a disk, for every other room: written so that a crash at any moment loses nothing.

`durable` holds the disk operations; `commit` makes a folder whole or absent, and seals it; `locks`
keeps a second process out; `json_files` reads JSON back with the types that are expected; `paths`
says what lies at a path; `disk` and `memory` put refusals into words; `patterns` matches regular
expressions within a time limit. No pickle is written or read, and nothing here imports torch.
"""
