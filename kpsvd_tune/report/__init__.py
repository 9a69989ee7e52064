"""What a run found, as frozen dataclasses (`results`), and the ways to show it."""
