"""One layer from its factor shape to its rank, and the decomposition in between."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from kpsvd_tune.linalg.kpsvd import KPSVD, kpsvd
from kpsvd_tune.linalg.kronecker import KroneckerShape, num_trained
from kpsvd_tune.linalg.shape import choose_shape, nearest_shape


@dataclass(frozen=True)
class LayerPlan:
    """What is known of one layer: its shape first, then its spectrum, then its rank."""

    name: str  # of the module
    shape: KroneckerShape
    note: str | None = None  # what a rule fell back on
    values: tuple[float, ...] = ()  # KP singular values over the window, descending
    squared_norm: float = 0.0  # ||W||_F^2
    seconds: float = 0.0  # that the decomposition took
    rank: int = 0  # the number of terms chosen
    rank_energy: int = 0  # what the energy threshold alone would choose
    rank_elbow: int = 0  # what the elbow alone would choose
    # What decided: energy, elbow, noise_edge, fixed, override, min, max, budget, or window where
    # all computed or usable terms ended first.
    bound_by: str = ""
    form: str = "both"  # what of the terms is trained; one of FORMS

    @classmethod
    def of_weight(
        cls,
        name: str,
        size: tuple[int, int],
        rule: str | Mapping[str, int],
        form: str = "both",
        factor_size: int | Sequence[int] | None = None,
    ) -> Self:
        """Plan a weight of that size (out, in), not decomposed yet.

        Args:
            name: The module's name.
            size: (out, in).
            rule: The shape, as for :func:`choose_shape`.
            form: What of the terms is trained; one of FORMS.
            factor_size: The wanted size of the trained factor instead, as for
                :func:`nearest_shape`; left and right forms only.

        Raises:
            ValueError: As :func:`choose_shape`.
        """
        if factor_size is None:
            choice = choose_shape(*size, rule)
        else:
            choice = nearest_shape(*size, form, factor_size)
        return cls(name, choice.shape, choice.note, form=form)

    def with_terms(self, terms: KPSVD, seconds: float = 0.0) -> Self:
        """The plan with the spectrum of these terms."""
        values = tuple(terms.values.tolist())
        return replace(self, values=values, squared_norm=terms.squared_norm, seconds=seconds)

    def with_random_terms(self, squared_norm: float, num_terms: int) -> Self:
        """The plan with the spectrum that random directions have, for which nothing is decomposed.

        Each holds the same share of ||W||_F^2 on average: one part in p*q of random right
        directions (form left), in m*n of left ones (right), in m*n*p*q of pairs (core).

        Raises:
            ValueError: The norm is not finite.
        """
        if not math.isfinite(squared_norm):
            raise ValueError("its norm is not finite, so it holds NaN or infinite entries")
        rows, columns = self.shape.m * self.shape.n, self.shape.p * self.shape.q
        parts = {"left": columns, "right": rows}.get(self.form, rows * columns)
        values = (math.sqrt(squared_norm / parts),) * min(num_terms, self.shape.max_rank)
        return replace(self, values=values, squared_norm=squared_norm)

    def within(self, window: int) -> Self:
        """The plan as if no more leading terms had been computed."""
        return replace(self, values=self.values[:window])

    def shares(self) -> list[float]:
        """Each term's share of ||W||_F^2; zeros for a zero matrix."""
        whole = self.squared_norm or 1.0
        return [value * value / whole for value in self.values]

    def energy(self, num_terms: int) -> float:
        """Share of ||W||_F^2 that the leading terms hold; 0 for a zero matrix.

        Exact without further terms, since ||W||_F is known; rounding never takes it above 1. Of
        terms that were not computed nothing is counted.
        """
        if self.squared_norm == 0:
            return 0.0
        held = math.fsum(value * value for value in self.values[:num_terms])
        return min(1.0, held / self.squared_norm)

    def relative_error(self, num_terms: int) -> float:
        """||W - sum of the leading terms||_F / ||W||_F; 0 for a zero matrix."""
        return math.sqrt(1.0 - self.energy(num_terms)) if self.squared_norm > 0 else 0.0

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the chosen terms."""
        return self.cost(self.rank)

    def cost(self, num_terms: int) -> int:
        """Trainable parameters of that many terms."""
        return num_trained(self.form, self.shape, num_terms)

    def stored(self, is_drawn: bool = False) -> int:
        """Numbers that an adapter's file holds of the layer.

        Args:
            is_drawn: Whether a seed gives the frozen factors, so that none is stored.
        """
        if is_drawn:
            return self.num_parameters
        frozen = self.rank * self.shape.num_parameters
        if self.form in ("left", "right"):
            frozen -= self.num_parameters
        return self.num_parameters + frozen

    def settings(self, *, is_of_weight: bool = True) -> dict[str, Any]:
        """What an adapter's configuration keeps of the layer.

        Args:
            is_of_weight: Whether the factors are the weight's own terms. The product of others
                with the weight is near zero for any base, so it tells none from another.

        Returns:
            ``shape`` [m, n, p, q], ``rank`` and ``fingerprint`` <W, A0_1 kron B0_1>, which is
            sigma_1^2; for random factors None, and ``norm`` ||W||_F, which scales them.
        """
        found: dict[str, Any] = {"shape": list(self.shape.as_tuple()), "rank": self.rank}
        if is_of_weight:
            return found | {"fingerprint": self.values[0] ** 2}
        return found | {"fingerprint": None, "norm": math.sqrt(self.squared_norm)}


def decompose_layer(
    plan: LayerPlan, weight: Tensor, num_terms: int, *, tolerance: float, seed: int
) -> tuple[LayerPlan, KPSVD]:
    """Decompose the weight of one layer; weights in memory and streamed ones both pass here.

    Args:
        plan: The layer with its shape.
        weight: W (out, in), floating, any device.
        num_terms: Leading terms wanted; a matrix that has fewer gives all it has.
        tolerance: As for :func:`kpsvd`.
        seed: As for :func:`kpsvd`.

    Returns:
        The plan with its spectrum, and the terms on the weight's device.

    Raises:
        ValueError: As :func:`kpsvd`.
    """
    began = time.perf_counter()
    terms = kpsvd(weight, plan.shape, num_terms, tolerance=tolerance, seed=seed)
    return plan.with_terms(terms, time.perf_counter() - began), terms
