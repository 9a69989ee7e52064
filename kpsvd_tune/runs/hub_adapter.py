"""An adapter on the hub, fetched by its id as base models are."""

from __future__ import annotations

from pathlib import Path

from kpsvd_tune.errors import ModelError
from kpsvd_tune.models.source import HUB_ID, HUB_IGNORED
from kpsvd_tune.offline import hub_problem
from kpsvd_tune.runs.adapter_folder import CONFIG
from kpsvd_tune.storage.paths import exists, expand


def adapter_on_hub(source: str) -> Path | None:
    """The folder of an adapter in a hub repository, fetched; None where the id is of none.

    What hinders the look is not told here: the id is then taken for that of a base model, which
    the same hinders, and whose errors say what to do. ModelError: it is an adapter's, and the
    hub failed while it was fetched.
    """
    if exists(expand(source)) or "/" not in source or not HUB_ID.fullmatch(source):
        return None
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    offline = hub_problem() is not None
    try:
        hf_hub_download(source, CONFIG, local_files_only=offline)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError):
        return None
    try:
        folder = snapshot_download(source, ignore_patterns=HUB_IGNORED, local_files_only=offline)
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{source}: the hub failed while the adapter was fetched: {error}"
        ) from error
    return Path(folder)
