"""The `adapter` section of the recipe: target modules, factor shapes and the rank rule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

# pydantic asks for typing_extensions' TypedDict below Python 3.12, and depends on that package.
from typing_extensions import TypedDict

from kpsvd_tune.recipe.values import (
    CLOSED,
    Budget,
    Energy,
    Number,
    PathText,
    Pattern,
    PatternOrList,
    Section,
    Targets,
    Text,
    conflict,
    mapping_or_scalar,
    read_factor_shape,
)


class FactorSides(TypedDict):
    """Columns of the left factor and rows of the right one."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    n: Annotated[int, Field(ge=1, description="columns of the left factor; divides `in`")]
    p: Annotated[int, Field(ge=1, description="rows of the right factor; divides `out`")]


FactorShape = Annotated[
    Annotated[Literal["balanced", "thin", "pissa"], Tag("scalar")]
    | Annotated[FactorSides, Tag("mapping")],
    Discriminator(mapping_or_scalar),
    BeforeValidator(read_factor_shape),
]


# One number stands for rows and columns.
_Side = Annotated[int, Field(ge=1, le=2**20)]
FactorSize = Annotated[
    Annotated[_Side, Tag("scalar")]
    | Annotated[list[_Side], Field(min_length=2, max_length=2), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "scalar"),
]


Method = Literal["energy", "elbow", "energy+elbow", "noise_edge", "fixed"]


class RankOverride(TypedDict, total=False):
    """The rank, or another rule and limits, for the modules that one pattern matches."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    rank: Annotated[int, Field(ge=0, description="this Kronecker rank exactly")]
    method: Annotated[Method, Field(description="rank rule")]
    min: Annotated[int, Field(ge=0, description="smallest Kronecker rank")]
    max: Annotated[int, Field(ge=0, description="largest Kronecker rank")]
    energy: Annotated[Number, Field(gt=0, le=1, description="energy threshold")]


Override = Annotated[
    Annotated[int, Field(ge=0), Tag("scalar")] | Annotated[RankOverride, Tag("mapping")],
    Discriminator(mapping_or_scalar),
]


class RankRecipe(Section):
    """How many Kronecker terms each layer gets."""

    method: Method = Field(
        default="energy+elbow", description="rank rule; energy+elbow takes the smaller of the two"
    )
    energy: Energy = Field(
        default=0.5,
        description="energy threshold; auto: `train` chooses it by short trainings (0.5 elsewhere)",
    )
    energy_of: Literal["pooled", "window", "total"] = Field(
        default="pooled",
        description="energy the threshold is a share of: all layers' windows, a layer's window, "
        "or a layer's whole weight",
    )
    window: int = Field(
        default=32, ge=1, le=65_536, description="leading terms computed for each layer"
    )
    min: int = Field(
        default=1, ge=0, description="smallest Kronecker rank; 0 lets a layer go untouched"
    )
    max: int = Field(
        default=16,
        ge=1,
        validate_default=True,
        description="largest Kronecker rank; the rank of fixed",
    )
    budget: Budget = Field(
        default=None,
        description="most trainable parameters in all layers, such as 0.99M; null: no budget",
    )
    tolerance: Number = Field(
        default=5e-3,
        ge=0,
        lt=1,
        description="share of the window's energy that the decomposition may miss; 0 decomposes "
        "exactly and slowly",
    )
    overrides: dict[Pattern, Override] = Field(
        default_factory=dict,
        description="for modules whose name matches a pattern: a rank, or a mapping of rank, or "
        "of min, max and energy",
    )

    @field_validator("max")
    @classmethod
    def _check_limits(cls, value: int, info: ValidationInfo) -> int:
        if value < (smallest := info.data.get("min", 0)):
            raise conflict(f"{value} is below min, {smallest}; lower min or raise max", "min")
        if value > (window := info.data.get("window", value)):
            raise conflict(
                f"{value} is above window, {window}: only the window's terms are computed; "
                "lower max or raise window",
                "window",
            )
        return value

    @field_validator("overrides")
    @classmethod
    def _check_overrides(
        cls, value: dict[str, int | RankOverride], info: ValidationInfo
    ) -> dict[str, int | RankOverride]:
        read: dict[str, int | RankOverride] = {}
        for pattern, override in value.items():
            if isinstance(override, int):
                override = {"rank": override}
            if not override or ("rank" in override and len(override) > 1):
                raise ValueError(
                    f"{pattern!r}: got {', '.join(override) or 'an empty mapping'}; expected "
                    "rank alone, or some of method, min, max and energy"
                )
            smallest = override.get("min", info.data.get("min"))
            largest = override.get("rank", override.get("max", info.data.get("max")))
            window = info.data.get("window")
            # A rank given outright is not clipped by the section's min.
            if "rank" not in override and _is_above(smallest, largest):
                raise conflict(
                    f"{pattern!r}: max, {largest}, is below min, {smallest}; lower min or raise max"
                )
            if _is_above(largest, window):
                raise conflict(
                    f"{pattern!r}: {largest} is above window, {window}: only the window's terms "
                    "are computed; lower it or raise window",
                    "window",
                )
            # {rank: 4} and 4 are one thing; downstream sees the number.
            read[pattern] = override.get("rank", override)
        return read


def _is_above(low: object, high: object) -> bool:
    return isinstance(low, int) and isinstance(high, int) and low > high


# What an adapter that `from` names has decided already.
_DECIDED = (
    "target_modules",
    "exclude_modules",
    "form",
    "factor_shape",
    "factor_size",
    "init",
    "rank",
    "modules_to_save",
)


class AdapterRecipe(Section):
    """The Kronecker adapter.

    What is not the default was measured (docs/study.md, one seed, validation loss against 0.8041):
    ``init: random`` 0.8076, so the start from the weight's terms is worth 0.0035; ``rate:
    relative`` 0.8013, which over three seeds is a tie, and carries a rate to other models and
    ranks.
    """

    target_modules: Targets = Field(
        default="all-linear", description="all-linear, a list of names, or a regular expression"
    )
    exclude_modules: PatternOrList | None = Field(
        default=None, description="modules to leave alone: a list of names, or a regular expression"
    )
    form: Literal["both", "left", "right", "core"] = Field(
        default="both",
        description="what is trained of each term: both factors, the left or the right one, or an "
        "r x r core between them; the rest is frozen",
    )
    factor_shape: FactorShape = Field(
        default="balanced", description="balanced, thin, pissa, or {n, p} for every layer"
    )
    factor_size: FactorSize | None = Field(
        default=None,
        description="rows and columns of the trained factor of the forms left and right, in place "
        "of factor_shape: a number, or two in a list; the nearest divisors are taken",
    )
    init: Literal["weight", "random"] = Field(
        default="weight",
        description="directions of the frozen factors: the weight's own terms, or random ones "
        "(form both: of the same norms; other forms: kept as a seed)",
    )
    rate: Literal["factors", "relative"] = Field(
        default="factors",
        description="what the learning rate means with form both: how far an optimiser's step "
        "moves entries of the factors, or that step's relative change of each weight; other forms "
        "are always relative",
    )
    path: Literal["auto", "activations", "weight"] = Field(
        default="auto", description="how the update is applied; auto decides by cost for each layer"
    )
    rank: RankRecipe = Field(default_factory=RankRecipe, description="rank rule of the layers")
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    modules_to_save: list[Text] = Field(
        default_factory=list, description="modules trained and saved whole"
    )
    # `from` is a word of Python. Last, so that its validator sees all other keys.
    from_: PathText | None = Field(
        default=None,
        alias="from",
        description="a run or a KPSVD adapter folder to go on training; its ranks, shapes and "
        "factors are taken as they are",
    )

    @property
    def is_drawn(self) -> bool:
        """Whether a seed gives the frozen factors, so that no file holds them."""
        return self.init == "random" and self.form != "both"

    @field_validator("factor_size")
    @classmethod
    def _check_size(
        cls, value: int | list[int] | None, info: ValidationInfo
    ) -> int | list[int] | None:
        form, shape = info.data.get("form"), info.data.get("factor_shape")
        if value is not None and form not in ("left", "right", None):
            raise conflict(
                f"it is the size of the one factor that the forms left and right train, and form "
                f"is {form}; set factor_shape instead, or form: left",
                "form",
            )
        if value is not None and shape not in ("balanced", None):
            raise conflict(
                f"factor_shape is {shape!r}, and each decides the sizes; keep one of the two",
                "factor_shape",
            )
        return value

    @field_validator("from_")
    @classmethod
    def _check_from(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is None:
            return None
        defaults = {
            key: cls.model_fields[key].get_default(call_default_factory=True) for key in _DECIDED
        }
        changed = [key for key in _DECIDED if info.data.get(key, defaults[key]) != defaults[key]]
        if changed:
            raise conflict(
                f"the adapter there has its {', '.join(changed)}; take "
                f"{'that key' if len(changed) == 1 else 'those keys'} out of this section",
                *changed,
            )
        return path
