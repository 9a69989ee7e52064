"""What a run or a comparison found, as frozen dataclasses, and the ways to show it.

The records: `results` (runs) and `comparison`. In words: `run` (results.json), `console` (what a
command found), `live` (its progress), `card` (model cards). Pages: `rank_page` and
`comparison_page`, templates filled in by `pages`.
"""
