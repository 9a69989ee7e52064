"""The recipe: a closed YAML schema, read safely, with every fault reported at once.

`schema`, `dataset`, `adapter` and `evaluation` hold the keys; `values` the kinds of value;
`reading` turns YAML and key=value into plain values with lines; `checking` and `faults` turn what
is wrong into messages; `files` and `extending` find a recipe and the parts it is made of; `loading`
is the way in. Imports neither torch nor transformers.
"""

from __future__ import annotations

from kpsvd_tune.recipe.adapter import AdapterRecipe, RankRecipe
from kpsvd_tune.recipe.dataset import Columns, DatasetRecipe, SourceRecipe
from kpsvd_tune.recipe.evaluation import LOSS_TASKS, OWN_ROWS_TASKS, EvaluationRecipe
from kpsvd_tune.recipe.files import shipped_recipes
from kpsvd_tune.recipe.loading import (
    evaluation_section,
    load_recipe,
    recipe_to_yaml,
    value_to_yaml,
)
from kpsvd_tune.recipe.schema import EarlyStopping, Recipe, RestrainRecipe, TrainRecipe
from kpsvd_tune.recipe.values import read_number_of_parameters

__all__ = [
    "LOSS_TASKS",
    "OWN_ROWS_TASKS",
    "AdapterRecipe",
    "Columns",
    "DatasetRecipe",
    "EarlyStopping",
    "EvaluationRecipe",
    "RankRecipe",
    "Recipe",
    "RestrainRecipe",
    "SourceRecipe",
    "TrainRecipe",
    "evaluation_section",
    "load_recipe",
    "read_number_of_parameters",
    "recipe_to_yaml",
    "shipped_recipes",
    "value_to_yaml",
]
