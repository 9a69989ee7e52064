"""The decomposition stage as a whole, and what it gives to the adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from kpsvd_tune.decompose.cache import commit_file
from kpsvd_tune.decompose.collect import collect_spectra
from kpsvd_tune.decompose.progress import Progress
from kpsvd_tune.models import ModelSource
from kpsvd_tune.recipe.adapter import AdapterRecipe
from kpsvd_tune.report.results import RankReport


@dataclass(frozen=True)
class Decomposition:
    """What the stage gives to the adapter.

    Attributes:
        report: The ranks of all target modules, rank 0 included.
        layers: ``KpsvdConfig.layers``: per module of rank 1 and more its ``shape`` [m, n, p, q],
            ``rank`` and ``fingerprint`` <W, A0_1 kron B0_1>, which is sigma_1^2.
        factors: Per module of ``layers`` A0 (rank, m, n) and B0 (rank, p, q), float32.
        notes: What the user should know, such as damaged cache entries.
    """

    report: RankReport
    layers: dict[str, dict[str, Any]]
    factors: dict[str, tuple[Tensor, Tensor]]
    notes: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """The factors as ``NAME.left`` and ``NAME.right``, the content of a safetensors file."""
        tensors = {
            f"{name}.{side}": factor.contiguous()
            for name, pair in self.factors.items()
            for side, factor in zip(("left", "right"), pair, strict=True)
        }
        return save(tensors)

    def save_factors(self, file: Path) -> None:
        """Write the factors into one safetensors file."""
        commit_file(file, self.to_bytes())

    @staticmethod
    def load_factors(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
        """Read what :meth:`save_factors` wrote."""
        tensors = load_file(file)
        names = [key.removesuffix(".left") for key in tensors if key.endswith(".left")]
        return {name: (tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in names}


def decompose(
    source: ModelSource,
    adapter: AdapterRecipe,
    *,
    seed: int = 0,
    cache_dir: Path | None = None,
    processes: int = 1,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> Decomposition:
    """Decompose the target matrices, choose their ranks, and give the initial factors.

    The arguments are those of :func:`collect_spectra`; a rank rule that cannot be met is refused
    before the work.

    Returns:
        Report, layers for ``KpsvdConfig`` and factors.

    Raises:
        ModelError: A target or a weight that cannot be used.
        AdapterError: A factor shape or rank rule that cannot be met.
        ResourceError: The cache cannot be written, or a worker was killed.
    """
    spectra = collect_spectra(
        source,
        adapter,
        seed=seed,
        check_rule=True,
        cache_dir=cache_dir,
        processes=processes,
        device=device,
        progress=progress,
    )
    report = spectra.report(adapter.rank)
    return Decomposition(report, layers_of(report), spectra.factors(report), spectra.notes)


def layers_of(report: RankReport, *, has_fingerprints: bool = True) -> dict[str, dict[str, Any]]:
    """What ``KpsvdConfig`` keeps of each adapted layer: shape, rank and fingerprint.

    Args:
        report: The ranks of all layers.
        has_fingerprints: Whether the factors are the weight's own terms. The product of others
            with the weight is near zero for any base, so it tells none from another.
    """
    return {
        layer.name: {
            "shape": list(layer.factor_shape),
            "rank": layer.rank,
            "fingerprint": layer.singular_values[0] ** 2 if has_fingerprints else None,
        }
        for layer in report.layers
        if layer.rank > 0
    }
