"""Choose the layers of a recipe by what the gradient promises, and write the recipe with them.

Purpose: the placement of docs/study.md that is compared with one term on the MLP.
Needs: a recipe of the study and its data.
Command: .venv/bin/python scripts/benchmarks/study/place.py RECIPE.yaml PARAMETERS OUT.yaml
    One balanced term of form `both` in as many linear layers as PARAMETERS hold; the others get
    none (adapter.rank.overrides). Compare it with
    --methods kpsvd:form=both:factor_shape=balanced:rank.method=fixed:rank.max=1

The gain of a layer is how far the loss of 32 rows falls, to first order, by one full step of Adam
from the gradient of 32 others: sum_i sign(g_i) h_i over the numbers i of both factors, with g and h
the gradients on either rows. Noise in one says nothing about the other and cancels. Layers are
taken by gain a trained number, the highest first, while they fit.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from kpsvd_tune.data import TokenizedRow, collate, prepare
from kpsvd_tune.linalg import KroneckerShape, choose_shape, rearrange
from kpsvd_tune.linalg.kpsvd import kpsvd
from kpsvd_tune.models import load_model, load_tokenizer, resolve_model
from kpsvd_tune.recipe import load_recipe

ROWS, BATCH = 32, 8


def weight_gradients(
    model: Any, layers: dict[str, nn.Linear], rows: Sequence[TokenizedRow]
) -> dict[str, Tensor]:
    """The gradient of the mean loss of a learnt token by each layer's weight, float32 (out, in)."""
    model.zero_grad()
    learnt = sum(label >= 0 for row in rows for label in row.labels)
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH], pad_token_id=0)
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        (nn.functional.cross_entropy(logits, labels, reduction="sum") / learnt).backward()
    return {name: layer.weight.grad.clone() for name, layer in layers.items()}


def gain(weight: Tensor, shape: KroneckerShape, first: Tensor, second: Tensor) -> float:
    """The fall of the loss, a trained number and unit of rate, of one term of both factors."""
    left, right = (each.flatten() for each in kpsvd(weight, shape, 1).factors(1))

    def of_factors(gradient: Tensor) -> Tensor:
        rows = rearrange(gradient, shape)
        return torch.cat([rows @ right, rows.T @ left])

    g, h = of_factors(first), of_factors(second)
    return float(g.sign() @ h) / len(g)


def main() -> None:
    """Measure every layer, choose, and write the recipe."""
    file, most, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    recipe = load_recipe(file)
    assert recipe.dataset is not None
    source = resolve_model(recipe.model.path)
    tokenizer = load_tokenizer(source)
    rows = prepare(recipe.dataset, tokenizer, seed=recipe.train.seed).train
    model = load_model(source, "float32").requires_grad_(False)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not name.endswith("lm_head")
    }
    for layer in layers.values():
        layer.weight.requires_grad_()
    halves = [[rows[number + start] for number in range(ROWS)] for start in (0, ROWS)]
    first, second = (weight_gradients(model, layers, half) for half in halves)
    gains, costs = {}, {}
    for name, layer in layers.items():
        shape = choose_shape(layer.out_features, layer.in_features, "balanced").shape
        gains[name] = gain(layer.weight.detach(), shape, first[name], second[name])
        m, n, p, q = shape.as_tuple()
        costs[name] = m * n + p * q
    chosen, spent = set(), 0
    for name in sorted(gains, key=gains.__getitem__, reverse=True):
        if spent + costs[name] <= most:
            chosen.add(name)
            spent += costs[name]
    kinds = Counter(name.rpartition(".")[2] for name in chosen)
    told = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    print(f"{spent:,} parameters in {len(chosen)} of {len(layers)} layers: {told}")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    left_out = {name: 0 for name in layers if name not in chosen}
    content["adapter"]["rank"] |= {"min": 0, "overrides": left_out}
    out.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
