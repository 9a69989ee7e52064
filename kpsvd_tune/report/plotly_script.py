"""plotly.js inside a page, compressed: a page stays one file, of 2 MB instead of 5.

The Python package plotly brings only the whole of plotly.js along. A page holds it gzipped, in
base64, and `plotly_loader.js` unpacks it in the browser before the figures are drawn.
"""

from __future__ import annotations

import base64
import functools
import gzip
from importlib.resources import files

from kpsvd_tune.errors import InputError


def plotly_script(what: str) -> str:
    """Give the elements of a page that load plotly.js; a script after them awaits `plotlyLoaded`.

    Args:
        what: What is drawn with it, for the message.

    Raises:
        InputError: If plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(
            f"plotly is not installed, and {what} is drawn with it; "
            "install it with: pip install 'kpsvd-tune[report]'"
        ) from error
    loader = files("kpsvd_tune.report").joinpath("plotly_loader.js").read_text(encoding="utf-8")
    return (
        f'<script type="text/plain" id="plotly">{_packed(get_plotlyjs())}</script>\n'
        f"<script>\n{loader}</script>"
    )


@functools.lru_cache(maxsize=1)
def _packed(script: str) -> str:
    # Without a time stamp, so that equal reports make equal pages.
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode("ascii")
