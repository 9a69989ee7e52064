"""What the HTML pages share: templates that escape what is filled in, and plotly.js in the page.

A page is one file that opens from disk and asks the network for nothing. plotly.js is in it gzipped
and in base64, 2 MB instead of 5; `templates/plotly_loader.js` unpacks it in the browser.
"""

from __future__ import annotations

import base64
import functools
import gzip
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kpsvd_tune.errors import InputError
from kpsvd_tune.storage.durable import replace_file


def render(template: str, what: str, data: Any, **parts: Any) -> str:
    """Fill in the template templates/``template``.html.j2 as a whole HTML document with plotly.js.

    Nearly all of its about 2 MB is plotly.js. ``data`` is what the page's script draws, as JSON
    values, where what is not finite becomes null; texts among ``parts`` are escaped. ``what`` names
    the page in the InputError where plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(
            f"plotly is not installed, and {what} is drawn with it; "
            "install it with: pip install 'kpsvd-tune[report]'"
        ) from error
    page = _templates().get_template(f"{template}.html.j2")
    return page.render(plotly=_packed(get_plotlyjs()), data=_finite(data), **parts)


def write_page(file: Path, make: Callable[[], str]) -> str | None:
    """Write a page, or remove it where plotly is missing: figures of earlier results would mislead.

    Returns:
        Why there is no page; None where it was written.

    Raises:
        ResourceError: The disk refused.
    """
    try:
        page = make()
    except InputError as error:
        file.unlink(missing_ok=True)
        return f"{file.name} was not written: {error}"
    replace_file(file, page.encode())
    return None


@functools.cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("kpsvd_tune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The filter `tojson` gives JSON that cannot end the script element it is in.
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return templates


@functools.lru_cache(maxsize=1)
def _packed(script: str) -> str:
    # Without a time stamp, so that equal reports make equal pages.
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode("ascii")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
