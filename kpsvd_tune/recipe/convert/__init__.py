"""Configurations of other tools, as recipes: what each key becomes, and what has no counterpart.

`keys` holds what a key can become, `trainer` the keys of transformers' trainer that several tools
share, `axolotl`, `llama_factory`, `trl` and `peft` those of each tool; `converting` is the way in.
"""

from __future__ import annotations

from kpsvd_tune.recipe.convert.converting import Converted, convert

__all__ = ["Converted", "convert"]
