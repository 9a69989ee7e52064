"""What a RUN, ADAPTER or MODEL on the command line is, and an adapter put on its base."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

import kpsvd_tune.adapter  # noqa: F401  registers KPSVD, which PeftModel.from_pretrained needs
from kpsvd_tune.adapter.base import noted_distances, other_base_allowed
from kpsvd_tune.adapter.model import check_streamed
from kpsvd_tune.data.read.sources import training_sources
from kpsvd_tune.errors import AdapterError, InputError, KpsvdTuneError, ModelError
from kpsvd_tune.events import Events
from kpsvd_tune.models import (
    ModelSource,
    base_fingerprint,
    find_configuration,
    load_model,
    load_plain_model,
    load_tokenizer,
    resolve_model,
)
from kpsvd_tune.models.offload import check_alone, is_offloaded, place
from kpsvd_tune.models.streamed import streamed_weights
from kpsvd_tune.recipe import DatasetRecipe, Recipe, load_recipe
from kpsvd_tune.recipe.paths import check_source
from kpsvd_tune.runs.adapter_folder import (
    WEIGHTS,
    check_adapter,
    check_own,
    check_seal,
    read_adapter_config,
)
from kpsvd_tune.runs.hub_adapter import adapter_on_hub
from kpsvd_tune.runs.merged_folder import kept_training
from kpsvd_tune.storage.json_files import read_json
from kpsvd_tune.storage.memory import is_out_of_memory
from kpsvd_tune.storage.paths import expand, kind_of

Note = Callable[[str], None]  # gets a sentence for the user

# The template of plain text, and the one that such a model is asked with.
_WITHOUT_PROMPT, _PLAIN = "{completion}", "{prompt}{completion}"
# Where run.json keeps the template that the rows were written with.
TEMPLATE_KEY = "template"
# Where it keeps the hash of the adapter's weights that the run has saved.
ADAPTER_KEY = "adapter_sha256"

COMPARED = (
    "its weights agree as far as they were compared: by random projections of each adapted weight "
    "and of all others together, or in adapters of older versions by one number a layer"
)


@dataclass(frozen=True)
class Found:
    """What a RUN, ADAPTER or MODEL on the command line turned out to be."""

    adapter: Path | None  # the PEFT adapter folder; None for a plain model
    base: str  # the base model, as the recipe or the adapter names it
    recipe: Recipe | None = None  # the run's; None for an adapter or a model alone
    revision: str | None = None  # the base's, on the hub
    # The recipe's section, with the template that the rows turned out to take; of a merged model
    # what it keeps of that, with its report as the path.
    dataset: DatasetRecipe | None = None
    # What the run's answers are asked for with: "chat", or a text template.
    template: str | None = None

    @property
    def dtype(self) -> str:
        """The dtype that the run loaded its base in; float32 where there was none."""
        return self.recipe.model.dtype if self.recipe else "float32"

    @property
    def asked_by(self) -> str | None:
        """Says where a model that is no run has its template and columns from; None: nowhere."""
        if self.dataset is None or self.recipe is not None:
            return None
        return f"asked as it was trained: template and columns are those in {self.dataset.path}"

    @property
    def quantization(self) -> str | None:
        """How the run quantised its base: nf4, int8 or None."""
        return self.recipe.model.quantization if self.recipe else None

    @property
    def device_map(self) -> str | None:
        """How the run shared its base out to the card and the host: auto or None."""
        return self.recipe.model.device_map if self.recipe else None


@dataclass(frozen=True)
class Loaded:
    """A model, ready to be used."""

    model: Any  # with its adapter, unless that was left out
    tokenizer: PreTrainedTokenizerBase  # the adapter's own where it has one
    other_base: str | None  # says so where the base is another than the adapter's
    # How far plain weights are from the quantised ones of the training: see `noted_distances`.
    distances: Mapping[str, float] = field(default_factory=dict)


def find(source: str) -> Found:
    """Tell a run from an adapter from a model; an adapter on the hub is fetched.

    InputError: something else lies there, or a run without a finished adapter; AdapterError: the
    adapter is of another method.
    """
    check_source(source)
    path = expand(source)
    if (path / "recipe.yaml").is_file():
        recipe = load_recipe(path / "recipe.yaml", of_run=True)
        if not (path / "adapter" / "adapter_config.json").is_file():
            raise InputError(
                f"{source} is a run without a finished adapter: run `kpsvd-tune train "
                f"{shlex.quote(str(path / 'recipe.yaml'))}` to its end first"
            )
        facts = read_json(path / "run.json") if (path / "run.json").is_file() else {}
        check_own(path / "adapter", facts.get(ADAPTER_KEY))
        known = facts.get(TEMPLATE_KEY)
        dataset = recipe.dataset and trained_as(recipe.dataset, known)
        template = dataset.template if dataset else None
        if known == _WITHOUT_PROMPT:
            template = _PLAIN
        base, revision = recipe.model.path, recipe.model.revision
        return Found(path / "adapter", base, recipe, revision, dataset, template)
    folder = path if (path / "adapter_config.json").is_file() else adapter_on_hub(source)
    if folder is not None:
        check_seal(folder)
        config = read_adapter_config(folder)
        return Found(folder, config.base_model_name_or_path or "", None, config.revision)
    dataset, template = kept_training(path)
    return Found(None, source, dataset=dataset, template=template)


def adapter_of(source: str, found: Found) -> Path:
    """The folder of the adapter; InputError where what was typed holds none."""
    if found.adapter is not None:
        return found.adapter
    if kind_of(source) in ("merged", "model"):
        raise InputError(
            f"{source} is a model, with plain weights: there is no adapter in it; expected a run "
            "or an adapter"
        )
    raise InputError(
        f"{source} is neither a run nor an adapter: expected a folder with recipe.yaml and "
        "adapter/, one with adapter_config.json, or the id of an adapter on the hub"
    )


def trained_as(dataset: DatasetRecipe, template: str | None) -> DatasetRecipe:
    """The dataset section with the template that `prepare` found; None where none was recorded.

    Chats take the chat template, whatever the section says of pairs, and a source may have a
    template of its own: what is asked afterwards must be asked as it was trained.
    """
    known = {"chat", *(source.template for source in training_sources(dataset))}
    if template in known - {dataset.template, _WITHOUT_PROMPT}:
        return dataset.model_copy(update={"template": template})
    return dataset


def resolve_base(
    found: Found, source: str, base: str | None, *, with_weights: bool = True
) -> ModelSource:
    """Find the base model of an adapter, where it is now; or a model itself.

    `source` is what was typed, `base` another place of the base than the adapter or the recipe
    says; without `with_weights` those that are still on the hub are not fetched. InputError: no
    base is named, or one for a plain model; ModelError: nothing is there.
    """
    if base and found.adapter is None:
        raise InputError(f"--base {base}: {source} is no adapter, so it has no base model")
    if not (base or found.base):
        raise InputError(f"{source} names no base model: give it with --base")
    try:
        look = resolve_model if with_weights else find_configuration
        return look(base or found.base, None if base else found.revision)
    except ModelError as error:
        if base:
            raise ModelError(f"--base: {error}") from error
        if found.adapter is None:
            raise
        known = read_adapter_config(found.adapter).base_model_name_or_path
        where = f" It was {known} when the adapter was saved." if known != found.base else ""
        raise ModelError(
            f"{error}\nThat is the base {found.base} which {source} names, a relative path being "
            f"looked for from {Path.cwd()}.{where} Give the place where it lies now with --base, "
            "or to `train` with model.path=..."
        ) from error


def load(
    found: Found,
    source: ModelSource,
    dtype: str,
    *,
    base_only: bool = False,  # without the adapter
    allow_other_base: bool = False,
    in_full: bool = False,  # with plain weights, even where the training had quantised ones
) -> Loaded:
    """Load a model in a dtype, with its adapter, as by :func:`load_adapter`, where it has one."""
    if found.device_map is not None and not in_full:
        check_alone()
    tokenizer = load_tokenizer(source, found.adapter)
    model: Any
    if in_full:
        model = load_plain_model(source, dtype)
    else:
        model = load_model(source, dtype, quantization=found.quantization)
    if found.adapter is None or base_only:
        return Loaded(model, tokenizer, None)
    with noted_distances() as distances:
        model, other = load_adapter(model, found.adapter, allow_other_base)
    return Loaded(model, tokenizer, other, distances)


def place_loaded(found: Found, loaded: Loaded, device: torch.device, note: Note) -> None:
    """Bring a loaded model to a device as its run had it; raises as :func:`models.offload.place`.

    `note` is told what lies where, if not everything lies on the device.
    """
    # A base without an adapter comes with weights that could be trained; here none is.
    loaded.model.requires_grad_(False)
    place(loaded.model, found.device_map, device, note)
    if not is_offloaded(loaded.model):
        loaded.model.to(device)


def load_adapter(
    model: Any, folder: Path, allow_other_base: bool = False, **options: Any
) -> tuple[PeftModel, str | None]:
    """Put an adapter that we saved on its base model; `options` are of PEFT's `from_pretrained`.

    With `allow_other_base` any base whose sizes fit will do; what is returned beside the model
    says so. AdapterError: the file of weights is damaged, or is of another base or other layers.
    A base of `load_streamed` keeps its weights on the meta device.
    """
    weights = streamed_weights(model)

    def load() -> PeftModel:
        if weights is None:
            return PeftModel.from_pretrained(model, folder, **options)
        # Tensors of the file take the places of those on the meta device.
        adapted = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True, **options)
        _cast_saved(adapted)
        check_streamed(adapted, adapted.peft_config["default"], weights.read)
        return adapted

    return _loaded(load, model, folder, allow_other_base)


def _cast_saved(model: PeftModel) -> None:
    """Give modules that are trained whole the dtype of the base's own, as copying into them does.

    Taken from a file they have the file's.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            known = dict(module.original_module.named_parameters())
            for name, parameter in module.modules_to_save["default"].named_parameters():
                parameter.data = parameter.data.to(known[name].dtype)


def add_adapter(
    model: PeftModel, folder: Path, name: str, allow_other_base: bool = False
) -> str | None:
    """Put another adapter beside those of a model; otherwise as :func:`load_adapter`."""

    def load() -> Any:
        return model.load_adapter(str(folder), name)

    return _loaded(load, model, folder, allow_other_base)[1]


def _loaded(
    load: Callable[[], Any], model: Any, folder: Path, allow_other_base: bool
) -> tuple[Any, str | None]:
    """What PEFT loads, its errors in words, and the note on another base."""
    check_adapter(folder, [name for name, _ in model.named_modules()])
    file = folder / WEIGHTS
    differences: list[str] = []
    try:
        with ExitStack() as stack:
            if allow_other_base:
                differences = stack.enter_context(other_base_allowed())
            adapted = load()
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged: {error}") from error
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from error
    except Exception as error:
        if isinstance(error, KpsvdTuneError) or is_out_of_memory(error):
            raise
        # PEFT's and torch's ways to say that names or sizes are others are of every kind.
        reason = f"{type(error).__name__}: {error}"
        raise AdapterError(
            f"{folder} does not fit the base model: {reason[:300]}\nExpected the base that it was "
            "trained on, and adapter_config.json and the weights as they were saved"
        ) from error
    return adapted, other_base_note(differences)


def full_precision_note(distances: Mapping[str, float], done: str) -> str | None:
    """What an adapter meets that was trained on quantised weights and is used on plain ones.

    Args:
        distances: Of :func:`kpsvd_tune.adapter.base.noted_distances`.
        done: What is done with it: "merged into".

    Returns:
        The sentence; None where there is no distance.
    """
    if not distances:
        return None
    mean = (sum(each**2 for each in distances.values()) / len(distances)) ** 0.5
    worst = max(distances, key=distances.__getitem__)
    return (
        f"The adapter was trained on a quantised base and {done} full precision: the weights "
        f"of its {len(distances)} layers are {100 * mean:.2g} % of their norm from the quantised "
        f"ones in the root mean square, {100 * distances[worst]:.2g} % in {worst}, estimated from "
        "random projections."
    )


def other_base_note(differences: Sequence[str]) -> str | None:
    """What is said of a base that was accepted in spite of these differences; None without any."""
    if not differences:
        return None
    more = f" {len(differences)} such differences were found." if len(differences) > 1 else ""
    return f"on another base model (--allow-other-base): {differences[0]}{more}"


def compare_files(model: PeftModel, source: ModelSource, events: Events) -> None:
    """Loading has compared the weights; other files with the same weights are worth a note."""
    recorded = getattr(model.peft_config["default"], "base_files", None)
    if recorded is not None and recorded != base_fingerprint(source):
        events.note(f"the base model's files differ from those of the training; {COMPARED}")
