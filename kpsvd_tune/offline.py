"""Whether the network may be used, and whether the hub answers: asked once, for seconds only."""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import urllib.error
import urllib.request
from functools import cache

# As huggingface_hub reads its own variable.
_TRUE = ("1", "ON", "YES", "TRUE")
# A hub that says nothing for so long is taken for one that cannot be reached.
_HUB_SECONDS = 4.0


def go_offline() -> None:
    """Forbid network calls to this process and those it starts, before the libraries are there."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"


def is_offline(*variables: str) -> bool:
    """Whether one of the variables, by default HF_HUB_OFFLINE, forbids the network.

    `datasets` has a variable of its own.
    """
    names = variables or ("HF_HUB_OFFLINE",)
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def hub_address() -> str:
    """Where the hub is, as its client reads it."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def hub_problem(*variables: str) -> str | None:
    """Why the hub is not to be asked, or cannot be; None where it can. Asked once in a process.

    Its client would try again and again for most of a minute where nothing answers. `variables` as
    for :func:`is_offline`.
    """
    if is_offline(*variables):
        return "--offline or HF_HUB_OFFLINE forbids it"
    address = hub_address()
    problem = _asked(address)
    return None if problem is None else f"{address} does not answer ({problem})"


@cache
def _asked(address: str) -> str | None:
    return no_answer(address)


def no_answer(address: str, *, with_certificate: bool = False) -> str | None:
    """Why a server does not answer; None where it does. Never waits for longer than its limit.

    A certificate that Python refuses is an answer, for the hub's client knows others, unless
    `with_certificate`.
    """
    said: list[str | None] = []

    def call() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            with urllib.request.urlopen(request, timeout=_HUB_SECONDS):
                said.append(None)
        except (urllib.error.HTTPError, http.client.HTTPException):
            # It answered.
            said.append(None)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            is_certificate = isinstance(reason, ssl.SSLCertVerificationError)
            said.append(None if is_certificate and not with_certificate else str(reason))

    # Looking up a name has no time limit of its own.
    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(_HUB_SECONDS + 1)
    return said[0] if said else f"no answer within {_HUB_SECONDS:.0f} s"
