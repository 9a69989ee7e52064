"""The configuration and the tokenizer of a GGUF file, kept as ordinary files once they were read.

The gguf package reads the head of a file value by value, which takes seconds for a vocabulary of
usual size, and every command of a user needs it. They are kept in the cache folder under the hash
of the head itself. Where nothing can be kept, the file is read each time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kpsvd_tune.errors import CheckpointError, InputError, ResourceError
from kpsvd_tune.models.gguf_rotations import with_rotations
from kpsvd_tune.models.source import ModelSource
from kpsvd_tune.storage.commit import commit, read_committed
from kpsvd_tune.storage.paths import cache_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

T = TypeVar("T")
# A head with a vocabulary of 256,000 tokens and its merges takes about 12 MB.
_HEAD = 1 << 26
# Tensors that a model may lack: tables of rotations, which are computed; experts, which
# transformers finds under names of its own; and layers that predict further tokens.
_NO_PLACE = re.compile(
    r"^rope_|rot_embd|\.rope\.freqs|_exps?\.|_shexp\.|\.nextn\.|^output\.weight$"
)
# Raise it when other files are kept.
_FORMAT = 2


def gguf_config(source: ModelSource) -> PretrainedConfig:
    """The configuration that transformers reads from a GGUF file; errors are transformers'."""
    from transformers import AutoConfig

    def read() -> PretrainedConfig:
        with readers_kept() as readers:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                source.folder, local_files_only=True, gguf_file=source.gguf_file
            )
        return with_rotations(config, _plain_values(readers[-1]), source.path)

    def load(folder: Path) -> PretrainedConfig:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.name_or_path = str(source.folder)
        return config

    return _kept(source, "config", read, load, lambda one, two: one.to_dict() == two.to_dict())


def gguf_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers makes from a GGUF file; errors are transformers'."""
    from transformers import AutoTokenizer

    def read() -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, gguf_file=source.gguf_file
        )
        return tokenizer

    def load(folder: Path) -> PreTrainedTokenizerBase:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True
        )
        loaded.name_or_path = str(source.folder)
        return loaded

    return _kept(source, "tokenizer", read, load, _is_same_tokenizer)


@contextmanager
def readers_kept() -> Iterator[list[Any]]:
    """Keep each reader with which transformers opens a file; a second one would take seconds."""
    import gguf

    made: list[Any] = []
    found = gguf.GGUFReader

    def read(*arguments: Any, **options: Any) -> Any:
        made.append(found(*arguments, **options))
        return made[-1]

    gguf.GGUFReader = read  # type: ignore[misc, assignment]
    try:
        yield made
    finally:
        gguf.GGUFReader = found  # type: ignore[misc]


def _plain_values(reader: Any) -> dict[str, Any]:
    """The metadata of a reader without its arrays."""
    from gguf import GGUFValueType

    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if field.types and field.types[0] != GGUFValueType.ARRAY
    }


@contextmanager
def tensors_watched() -> Iterator[list[str]]:
    """While transformers loads a file, note its tensors for which the model has no place.

    gguf's table of names is kept meanwhile: transformers asks for the whole of it once a module,
    which takes seconds for a small model.

    Yields:
        A list that gets their names, sorted, when the file has been loaded.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as of_transformers

    table, mapped = gguf.get_tensor_name_map, of_transformers.get_gguf_hf_weights_map
    taken: set[str] = set()

    def noted(*arguments: Any, **options: Any) -> Any:
        found = mapped(*arguments, **options)
        taken.update(found)
        return found

    gguf.get_tensor_name_map = functools.cache(table)
    of_transformers.get_gguf_hf_weights_map = noted
    left: list[str] = []
    try:
        with readers_kept() as readers:
            yield left
    finally:
        gguf.get_tensor_name_map = table
        of_transformers.get_gguf_hf_weights_map = mapped
    held = {each.name for reader in readers for each in reader.tensors} if taken else set()
    left.extend(sorted(name for name in held - taken if not _NO_PLACE.search(name)))


def _is_same_tokenizer(one: PreTrainedTokenizerBase, two: PreTrainedTokenizerBase) -> bool:
    backends = [getattr(each, "backend_tokenizer", None) for each in (one, two)]
    if None in backends:
        return False
    first, second = (each.to_str() for each in backends if each is not None)
    return (
        type(one) is type(two)
        and first == second
        and one.special_tokens_map == two.special_tokens_map
        and one.chat_template == two.chat_template
        and one.padding_side == two.padding_side
        and one.model_max_length == two.model_max_length
    )


def _kept(
    source: ModelSource,
    kind: str,
    read: Callable[[], T],
    load: Callable[[Path], T],
    is_same: Callable[[T, T], bool],
) -> T:
    """What was kept of a file, else what is read from it, which is kept where that is the same."""
    try:
        folder = cache_folder() / "gguf" / f"{_key(source)}-{kind}"
        if (held := _load(folder, load)) is not None:
            return held
    except (InputError, ResourceError, OSError):
        return read()
    found = kept = read()
    try:
        with tempfile.TemporaryDirectory() as place:
            saving: Any = found
            saving.save_pretrained(place)
            back = load(Path(place))
            if not is_same(found, back):
                return found
            # Also where it cannot be kept, so that a fingerprint of it is the same one.
            kept = back
            shutil.rmtree(folder, ignore_errors=True)
            commit(folder, [(each.name, each.read_bytes()) for each in Path(place).iterdir()])
    except (CheckpointError, ResourceError, OSError):
        pass  # another process was faster, or a disk refused
    return kept


def _load(folder: Path, load: Callable[[Path], T]) -> T | None:
    """What a folder of the cache holds; None where there is none, or it is damaged."""
    if not os.path.isdir(folder):
        return None
    try:
        read_committed(folder)
    except CheckpointError:
        return None
    return load(folder)


def _key(source: ModelSource) -> str:
    """A name for what a file's head is read as; OSError where it cannot be read."""
    (file,) = source.weight_files
    with file.open("rb") as stream:
        head = hashlib.sha256(stream.read(_HEAD)).hexdigest()
    libraries = [version(name) for name in ("gguf", "tokenizers", "transformers")]
    return hashlib.sha256(json.dumps([_FORMAT, head, *libraries]).encode()).hexdigest()
