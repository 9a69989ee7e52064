"""Forms of an adapter: the terms of its update, what of them is trained, and what that costs.

A form says which terms make the update, what of them is trained and how a call is computed; the
layer, the differentiable operation and the update kept for inference ask it. ``both`` trains both
factors of every term. The others train one small part and freeze the rest to directions of unit
norm times a scale s, chosen so that a full Adam step at the learning rate eta, which moves every
trained value by eta, moves W by eta ||W||_F, whatever the layer, the shape and the rank:
||Delta||_F = s ||trained values||_2 for orthonormal directions, so s = ||W||_F / sqrt(their count).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kpsvd_tune.adapter.costs import CPU_FLOAT32, Costs
from kpsvd_tune.adapter.ways import BOTH, Batched, Dense, Flat, Sides
from kpsvd_tune.linalg import KroneckerShape, drawn_factor, num_trained

Way = type[Flat] | type[Batched] | type[Dense]
Tensors = Sequence[Tensor]  # a form's own, trained ones first
# x (t, in) and gy (t, out), contiguous and of one dtype, and the projection of gy on the left
# factors, if it is at hand, (t, n*s, p).
Operands = tuple[Tensor, Tensor, Tensor | None]
LEFT, RIGHT, CORE = "kpsvd_left", "kpsvd_right", "kpsvd_core"
LEFT0, RIGHT0 = "kpsvd_left0", "kpsvd_right0"
TRAINED, FROZEN = (LEFT, RIGHT, CORE), (LEFT0, RIGHT0)


@dataclass(frozen=True)
class Plan:
    """How one call of a layer is computed."""

    update: Way  # Flat and Batched apply the factors to x, Dense builds W + Delta
    gradient: Way  # how the trained factors are differentiated


@dataclass(frozen=True)
class Form(ABC):
    """What a form has to say; its tensors always come in the order trained, frozen."""

    shape: KroneckerShape
    rank: int  # r, the number of pairs of factors

    name: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]  # the layer's containers of what is trained
    frozen: ClassVar[tuple[str, ...]]  # and of what is not
    is_scaled: ClassVar[bool] = True  # the frozen factors carry the scale s
    sides: ClassVar[Sides]  # the factors whose gradients are needed

    def size(self, part: str) -> tuple[int, ...]:
        """The size of one of the form's tensors."""
        shape, r = self.shape, self.rank
        if part == CORE:
            return (r, r)
        return (r, shape.m, shape.n) if part in (LEFT, LEFT0) else (r, shape.p, shape.q)

    @property
    def num_trained(self) -> int:
        """Trained values."""
        return num_trained(self.name, self.shape, self.rank)

    @property
    def num_terms(self) -> int:
        """Terms of Delta."""
        return self.rank

    @property
    def num_features(self) -> int:
        """Entries of the features of one token; 0 for a form that is not linear."""
        return 0

    @abstractmethod
    def terms(self, tensors: Tensors, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the s terms of Delta, (s, m, n) and (s, p, q), in ``dtype``.

        The sums are taken in the tensors' own dtype, which is the default too.
        """

    @abstractmethod
    def gradients(
        self, way: Way, operands: Operands, tensors: Tensors, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Gradients of what is trained; ``tensors`` are taken in ``dtype``."""

    def freeze(self, given: Mapping[str, Tensor], norm: float) -> tuple[Tensor, ...]:
        """Return the frozen tensors of terms of any norms.

        ``given`` holds left factors (r, m, n) as LEFT0 and right ones (r, p, q) as RIGHT0, those
        that the form freezes at least; ``norm`` is ||W||_F, of no account where nothing is scaled.
        """
        found = [_unit(given[part].float()) for part in self.frozen]
        # The last carries the scale of all.
        found[-1] *= norm / math.sqrt(self.num_trained)
        return tuple(found)

    def start(self, frozen: Sequence[Tensor] | None, is_at_base: bool) -> tuple[Tensor, ...]:
        """Return what is trained as it starts: zeros, or standard normal numbers.

        The update is then zero, or about as large as the weight.
        """
        make = torch.zeros if is_at_base else torch.randn
        # Whatever torch's default is: it may be in 16 bits while a model is loaded.
        return tuple(make(self.size(part), dtype=torch.float32) for part in self.trained)

    def draw(self, seed: int, name: str, norm: float) -> tuple[Tensor, ...]:
        """Return frozen tensors of random directions, drawn for the layer of that name.

        The same numbers on every machine, so that an adapter need only store the seed.
        """
        drawn = {
            part: drawn_factor(seed, f"{name} {part}", self.size(part)) for part in self.frozen
        }
        return self.freeze(drawn, norm)

    def features(self, x: Tensor, tensors: Tensors) -> Tensor | None:
        """What the update multiplies with the trained values, of inputs x (t, in) in float32.

        Returns:
            Samples (.., k), such that the update of a token is ``as_rows`` of what is trained, a
            matrix (.., k), times those of the token; None for a form that is not linear.
        """
        return None

    def as_rows(self, trained: Tensor) -> Tensor:
        """What is trained as the matrix (.., k) that multiplies the features."""
        return trained.permute(1, 0, 2).flatten(1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Undo :meth:`as_rows`."""
        r, height, width = self.size(self.trained[0])
        return rows.view(height, r, width).permute(1, 0, 2)

    def plan(
        self,
        tokens: int,
        path: str = "auto",
        is_training: bool = True,
        can_add: bool = True,
        costs: Costs = CPU_FLOAT32,
    ) -> Plan:
        """Choose the cheapest way for one call on ``tokens`` rows of x: a pure function of sizes.

        A path of activations or weight forces the way of the update. ``can_add`` says that
        W + Delta may stand for W: not in 16 bits, which would round Delta away, nor where the base
        layer computes for itself. Delta then costs a product of its own. ``costs`` are those of
        the kind of device and dtype.
        """
        shape, rank, terms = self.shape, self.rank, self.num_terms
        flat = Flat.update_cost(tokens, terms, shape, costs)
        batched = Batched.update_cost(tokens, terms, shape, costs)
        if is_training:
            # Beside the update the gradient of x, which is the update of Delta^T.
            flat *= 2
            turned = KroneckerShape(shape.n, shape.m, shape.q, shape.p)
            batched += Batched.update_cost(tokens, terms, turned, costs)
        update = Flat if flat <= batched else Batched
        gradient: Way = Flat
        lowest = float("inf")
        # A loop because torch.compile traces no min() with a key over sizes that vary.
        for way in (Flat, Batched, Dense):
            cost = way.gradient_cost(tokens, rank, shape, len(self.sides), costs)
            if cost < lowest:
                gradient, lowest = way, cost
        if path == "auto":
            directions = 2 if is_training else 1
            activations = flat if update is Flat else batched
            if is_training and update is Flat and gradient is Flat and "right" in self.sides:
                # The projection of gy is shared between the gradients of x and of the factors.
                activations -= tokens * rank * shape.n * shape.p * shape.out_features
            weight = directions * Dense.update_cost(tokens, terms, shape, costs)
            if not can_add:
                weight += tokens * shape.out_features * shape.in_features
            path = "weight" if weight < activations else "activations"
        return Plan(Dense if path == "weight" else update, gradient)


class Both(Form):
    """Trained offsets a, b from frozen factors A0, B0; Delta is exactly zero while a = b = 0.

    Delta = sum_k (A0_k + a_k) kron (B0_k + b_k) - A0_k kron B0_k
          = sum_k (A0_k + a_k) kron b_k + a_k kron B0_k.
    """

    name, is_scaled = "both", False
    trained, frozen, sides = (LEFT, RIGHT), (LEFT0, RIGHT0), BOTH

    @property
    def num_terms(self) -> int:
        """Twice the rank."""
        return 2 * self.rank

    def freeze(self, given: Mapping[str, Tensor], norm: float) -> tuple[Tensor, ...]:
        """The terms themselves: the offsets continue them."""
        return given[LEFT0], given[RIGHT0]

    def start(self, frozen: Sequence[Tensor] | None, is_at_base: bool) -> tuple[Tensor, ...]:
        """As :meth:`Form.start`; random offsets are as large as the factors."""
        if is_at_base or frozen is None:
            return super().start(frozen, is_at_base=True)
        return tuple(torch.randn_like(f) * f.float().square().mean().sqrt() for f in frozen)

    def terms(self, tensors: Tensors, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`Form.terms`.

        The first r left factors are the trained A0 + a, so that a projection on all of them
        serves the gradients.
        """
        a, b, left0, right0 = tensors
        return _in(dtype, torch.cat([left0 + a, a]), torch.cat([b, right0]))

    def gradients(
        self, way: Way, operands: Operands, tensors: Tensors, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Those of A0 + a and B0 + b, which are those of a and b."""
        a, b, left0, right0 = tensors
        left, right = (left0 + a).to(dtype), (right0 + b).to(dtype)
        return way.gradients(*operands, left, right)


class Left(Form):
    """Trained left factors a of frozen right ones: Delta = sum_k a_k kron s V_k."""

    name = "left"
    trained, frozen, sides = (LEFT,), (RIGHT0,), ("left",)

    def terms(self, tensors: Tensors, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`Form.terms`."""
        return _in(dtype, *tensors)

    def gradients(
        self, way: Way, operands: Operands, tensors: Tensors, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """As :meth:`Form.gradients`."""
        return way.gradients(*operands, *_in(dtype, *tensors), self.sides)[:1]

    @property
    def num_features(self) -> int:
        """As :attr:`Form.num_features`."""
        return self.rank * self.shape.n * self.shape.p

    def features(self, x: Tensor, tensors: Tensors) -> Tensor:
        """As :meth:`Form.features`: the columns of X B_k^T, (t*p, r*n)."""
        found = torch.einsum("tnq,kpq->tpkn", x.view(len(x), self.shape.n, -1), tensors[1])
        return found.flatten(2).flatten(0, 1)


class Right(Form):
    """Trained right factors b of frozen left ones: Delta = sum_k s U_k kron b_k."""

    name = "right"
    trained, frozen, sides = (RIGHT,), (LEFT0,), ("right",)

    def terms(self, tensors: Tensors, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`Form.terms`."""
        return _in(dtype, tensors[1], tensors[0])

    def gradients(
        self, way: Way, operands: Operands, tensors: Tensors, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """As :meth:`Form.gradients`."""
        left, right = _in(dtype, tensors[1], tensors[0])
        return way.gradients(*operands, left, right, self.sides)[1:]

    @property
    def num_features(self) -> int:
        """As :attr:`Form.num_features`."""
        return self.rank * self.shape.m * self.shape.q

    def features(self, x: Tensor, tensors: Tensors) -> Tensor:
        """As :meth:`Form.features`: the rows of A_k X, (t*m, r*q)."""
        found = torch.einsum("tnq,kmn->tmkq", x.view(len(x), self.shape.n, -1), tensors[1])
        return found.flatten(2).flatten(0, 1)


class Core(Form):
    """A trained core c between frozen factors: Delta = sum_kl c_kl U_k kron s V_l.

    With n = p = 1 it is LoRA-XS (arXiv 2405.17604) at the scale above.
    """

    name = "core"
    trained, frozen, sides = (CORE,), (LEFT0, RIGHT0), ("right",)

    def terms(self, tensors: Tensors, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`Form.terms`: U_k and sum_l c_kl s V_l."""
        core, left0, right0 = tensors
        wide = torch.promote_types(core.dtype, right0.dtype)
        return _in(dtype, left0, (core.to(wide) @ right0.to(wide).flatten(1)).view_as(right0))

    def gradients(
        self, way: Way, operands: Operands, tensors: Tensors, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """As :meth:`Form.gradients`: those of the right factors, projected on V."""
        left, right = self.terms(tensors, dtype)
        gb = way.gradients(*operands, left, right, self.sides)[1]
        gb = gb.to(torch.promote_types(gb.dtype, torch.float32))
        return (gb.flatten(1) @ tensors[2].to(gb.dtype).flatten(1).T,)

    @property
    def num_features(self) -> int:
        """As :attr:`Form.num_features`."""
        return self.rank**2 * self.shape.out_features

    def features(self, x: Tensor, tensors: Tensors) -> Tensor:
        """As :meth:`Form.features`: entries of U_k X V_l^T, (t*m*p, r*r)."""
        inner = torch.einsum("tnq,kmn->tmkq", x.view(len(x), self.shape.n, -1), tensors[1])
        return torch.einsum("tmkq,lpq->tmpkl", inner, tensors[2]).flatten(3).flatten(0, 2)

    def as_rows(self, trained: Tensor) -> Tensor:
        """As :meth:`Form.as_rows`: one row."""
        return trained.reshape(1, -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """As :meth:`Form.from_rows`."""
        return rows.view(self.rank, self.rank)


FORMS: dict[str, type[Form]] = {form.name: form for form in (Both, Left, Right, Core)}


def _in(dtype: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    left, right = tensors
    # Trained values may have been cast without the frozen ones, as optimisers in 16 bits do.
    dtype = dtype or torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


def _unit(factors: Tensor) -> Tensor:
    """Scale each of (r, .., ..) to norm 1; zeros stay zeros."""
    # In float64, so that the order of sums, which machines choose, does not show after rounding.
    # On the CPU, since not every device knows float64.
    norms = torch.linalg.vector_norm(factors.cpu(), dim=(1, 2), keepdim=True, dtype=torch.float64)
    unit: Tensor = factors / norms.where(norms > 0, torch.ones_like(norms)).to(factors)
    return unit
