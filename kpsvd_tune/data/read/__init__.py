"""Rows as they stand in files, folders and hub datasets, and their columns by name."""
