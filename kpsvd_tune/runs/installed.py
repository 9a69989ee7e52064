"""What this package was installed from, as the installer wrote it down beside the package."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any
from urllib.parse import urlsplit


def installed_from(package: str = "kpsvd-tune") -> dict[str, str]:
    """Where an installed package came from: an index, a folder, an archive or a repository.

    Gives `{"kind": "index" | "url", "url", "commit"}`, the last two where they are known; of a URL
    the user and the password are left out. Empty where nothing can be told. Source: PEP 610.
    """
    try:
        text = distribution(package).read_text("direct_url.json")
        # The file is written for everything that did not come from an index.
        found: Any = json.loads(text) if text is not None else None
    except (PackageNotFoundError, OSError, ValueError):
        return {}
    if found is None:
        return {"kind": "index"}
    if not isinstance(found, dict) or not isinstance(found.get("url"), str):
        return {}
    about = {"kind": "url", "url": _without_user(found["url"])}
    commit = (found.get("vcs_info") or {}).get("commit_id")
    return about | ({"commit": str(commit)} if commit else {})


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
