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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kpsvd_tune.errors import InputError
from kpsvd_tune.storage.durable import replace_file

# Every page says so at its beginning, by templates/base.html.j2.
_GENERATOR = b'<meta name="generator" content="kpsvd-tune">'


def render(template: str, what: str, data: Any, **parts: Any) -> str:
    """Fill in the template templates/``template``.html.j2 as a whole HTML document with plotly.js.

    Nearly all of its about 2 MB is plotly.js. ``data`` is what the page's script draws, as JSON
    values, where what is not finite becomes null; texts among ``parts`` are escaped. ``what`` names
    the page in the InputError where plotly is not installed.
    """
    script = _plotly()
    if script is None:
        raise InputError(
            f"plotly is not installed, and {what} is drawn with it; "
            "install it with: pip install 'kpsvd-tune[report]'"
        )
    page = _templates().get_template(f"{template}.html.j2")
    return page.render(plotly=_packed(script), data=_finite(data), **parts)


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


def _plotly() -> Path | None:
    """The file plotly.js of the package plotly, which is not imported for it."""
    found = find_spec("plotly")
    for folder in (found and found.submodule_search_locations) or ():
        if (file := Path(folder) / "package_data" / "plotly.min.js").is_file():
            return file
    return None


@functools.lru_cache(maxsize=1)
def _packed(script: Path) -> str:
    # Without a time stamp, so that equal reports make equal pages.
    return base64.b64encode(gzip.compress(script.read_bytes(), 9, mtime=0)).decode("ascii")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_page(file: Path) -> None:
    """Refuse to write a page over what is none of ours, or where it cannot be (InputError)."""
    if file.is_dir():
        raise InputError(
            f"{file} is a folder; expected the name of a page, as {file / 'page.html'}"
        )
    if not file.parent.is_dir():
        raise InputError(f"{file.parent} is no folder, in which {file.name} could be written")
    if not file.exists():
        return
    with file.open("rb") as content:
        if _GENERATOR not in content.read(2000):
            raise InputError(
                f"{file} is there and no page of kpsvd-tune; it was left as it is: name another "
                "place with --output"
            )
