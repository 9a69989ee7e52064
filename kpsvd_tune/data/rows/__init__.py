"""Tokenised rows: stored and found again, split, checked, ordered and put into batches."""
