"""The decomposition stage: what it gives to the adapter, and the folder that keeps it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from kpsvd_tune.decompose.collect import Show, Spectra, collect_spectra
from kpsvd_tune.decompose.ranks import layers_of
from kpsvd_tune.errors import CheckpointError
from kpsvd_tune.models import ModelSource
from kpsvd_tune.recipe.adapter import AdapterRecipe
from kpsvd_tune.report.rank_page import write_rank_report
from kpsvd_tune.report.results import RankReport
from kpsvd_tune.storage.commit import MANIFEST, check_sealed, manifest
from kpsvd_tune.storage.disk import explained
from kpsvd_tune.storage.durable import replace_file
from kpsvd_tune.storage.json_files import read_json

_FACTORS, _REPORT = "factors.safetensors", "rank_report.json"
# What the manifest calls the folder.
_KIND = "init"


@dataclass(frozen=True)
class Decomposition:
    """What the stage gives to the adapter."""

    report: RankReport  # the ranks of all target modules, rank 0 included
    # Per module of rank 1 and more A0 (rank, m, n) and B0 (rank, p, q), float32.
    factors: dict[str, tuple[Tensor, Tensor]]
    is_of_weight: bool = True  # the factors are the weight's own terms
    notes: tuple[str, ...] = ()  # what the user should know, such as damaged cache entries

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        """``KpsvdConfig.layers`` for the modules of ``factors``."""
        return layers_of(self.report, is_of_weight=self.is_of_weight)

    def save(self, folder: Path) -> str | None:
        """Write the factors and the rank report.

        Returns:
            Why there is no page, where plotly is not installed; None otherwise.

        Raises:
            ResourceError: The disk refused.
        """
        with explained(f"write {folder}"):
            missing_page = write_rank_report(self.report, folder)
            # Factors last: with them the stage counts as done. Those of other settings go first,
            # for the seal is not theirs.
            (folder / _FACTORS).unlink(missing_ok=True)
            factors = save(
                {
                    f"{name}.{side}": factor.contiguous()
                    for name, pair in self.factors.items()
                    for side, factor in zip(("left", "right"), pair, strict=True)
                }
            )
            contents = {_FACTORS: factors, _REPORT: (folder / _REPORT).read_bytes()}
            replace_file(folder / MANIFEST, manifest(_KIND, contents))
            replace_file(folder / _FACTORS, factors)
        return missing_page

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a folder holds all that :meth:`save` writes."""
        return (folder / _FACTORS).is_file() and (folder / _REPORT).is_file()

    @classmethod
    def load(cls, folder: Path, *, is_of_weight: bool = True) -> Decomposition:
        """Read what :meth:`save` wrote; older versions did not seal it.

        Raises:
            CheckpointError: A file is another than the one that was written.
        """
        try:
            check_sealed(folder, _KIND)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. All checkpoints of the run belong to these factors: restore the file "
                "from a copy, or pass --resume never to begin anew; this run is then kept in "
                "previous/"
            ) from error
        report = RankReport.from_dict(read_json(folder / _REPORT))
        tensors = load_file(folder / _FACTORS)
        names = [key.removesuffix(".left") for key in tensors if key.endswith(".left")]
        factors = {name: (tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in names}
        return cls(report, factors, is_of_weight)

    def energy(self, folder: Path) -> float:
        """The threshold that its ranks were chosen by; ``folder`` is where it was read from.

        Raises:
            CheckpointError: The report holds no such number.
        """
        energy = self.report.rule.get("energy")
        if not isinstance(energy, int | float) or not 0 < energy <= 1:
            raise CheckpointError(
                f"{folder / _REPORT}: the energy of its rule is {energy!r}; expected a share above "
                "0, up to 1. Pass --resume never to choose it again"
            )
        return float(energy)


def decompose(
    source: ModelSource,
    adapter: AdapterRecipe,
    *,
    seed: int = 0,
    start_seed: int = 0,
    processes: int = 1,
    device: str = "cpu",
    in_launch: bool = False,
    progress: Show | None = None,
) -> Decomposition:
    """Decompose the target matrices, choose their ranks, and give the factors of `adapter.init`.

    A rank rule that cannot be met is refused before the work. The arguments are those of
    :func:`collect_spectra`, and ``start_seed``, which draws random factors.

    Raises:
        ModelError: A target or a weight that cannot be used.
        AdapterError: A factor shape or rank rule that cannot be met.
        ResourceError: The cache cannot be written, or a worker was killed.
    """
    spectra = collect_spectra(
        source,
        adapter,
        seed=seed,
        is_rule_final=True,
        processes=processes,
        device=device,
        in_launch=in_launch,
        progress=progress,
    )
    return start_from(spectra, adapter, start_seed)


def start_from(spectra: Spectra, adapter: AdapterRecipe, seed: int = 0) -> Decomposition:
    """Choose the ranks by a rule and give the factors of `adapter.init`.

    Whatever the start, the k-th term of a layer has the norms sqrt(sigma_k) of the weight's own
    k-th term in both factors, so that starts differ in directions and in nothing else.

    Args:
        spectra: The spectra of all target modules.
        adapter: The rank rule, and where the factors point.
        seed: Draws random factors.

    Raises:
        AdapterError: A rank rule that cannot be met.
    """
    report = spectra.report(adapter.rank)
    found = Decomposition(report, spectra.factors(report), notes=spectra.notes)
    if adapter.is_drawn:
        # The adapter draws them, from a seed that it keeps. So does the report: a run that goes on
        # with another train.seed keeps the factors that its checkpoints were trained with.
        return replace(found, report=replace(report, frozen_seed=seed), is_of_weight=False)
    return found if adapter.init == "weight" else _random(found, seed)


def _random(found: Decomposition, seed: int) -> Decomposition:
    """Gaussian directions, of the norms that the weight's terms have."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (left, right) in found.factors.items():
        digest = hashlib.sha256(f"start {seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        factors[name] = (_drawn_like(left, generator), _drawn_like(right, generator))
    return replace(found, factors=factors, is_of_weight=False)


def _drawn_like(factor: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(factor.shape, generator=generator, dtype=torch.float32)
    wanted, given = (torch.linalg.vector_norm(each, dim=(1, 2)) for each in (factor, drawn))
    scale: Tensor = (wanted / given)[:, None, None]
    return drawn * scale
