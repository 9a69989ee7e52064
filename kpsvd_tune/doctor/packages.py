"""Whether the installed packages are those that kpsvd-tune was tested with, and which extras are.

Nothing but the standard library and `packaging` is imported here: a package that is too old may
keep the commands themselves from being loaded, and this still says which.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

_OWN = "kpsvd-tune"
_DEVELOPMENT = "dev"


def python_fault() -> str | None:
    """What is wrong with this Python; None where it is one of the tested ones."""
    wanted = SpecifierSet(metadata(_OWN)["Requires-Python"])
    found = platform.python_version()
    if wanted.contains(found, prereleases=True):
        return None
    return f"Python {found} runs here, and {_OWN} is tested with {wanted}"


def package_faults() -> dict[str, tuple[str, bool]]:
    """What is wrong, by package, and whether the package is missing altogether."""
    found: dict[str, tuple[str, bool]] = {}
    for needed in _requirements():
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        installed = _version(needed.name)
        if installed is None:
            found[needed.name] = (
                f"{needed.name} is not installed, expected {_range(needed)}",
                True,
            )
        elif not needed.specifier.contains(installed, prereleases=True):
            said = f"{needed.name} {installed} is installed, expected {_range(needed)}"
            found[needed.name] = (said, False)
    return found


def installed_packages() -> dict[str, str]:
    """The version of every package that is needed and here."""
    names = [each.name for each in _requirements() if each.marker is None]
    return {name: number for name in names if (number := _version(name)) is not None}


def extras() -> dict[str, list[str]]:
    """For each extra what of it is missing or of another version; empty lists for whole ones."""
    found: dict[str, list[str]] = {}
    for extra in metadata(_OWN).get_all("Provides-Extra") or []:
        if extra == _DEVELOPMENT:
            continue
        own = [
            each
            for each in _requirements()
            if each.marker is not None
            and each.marker.evaluate({"extra": extra})
            and not each.marker.evaluate({"extra": ""})
        ]
        found[extra] = [str(each.name) for each in own if not _fits(each)]
    return found


def install_command(names: list[str]) -> str:
    """What to type for packages of the right versions."""
    wanted = {each.name: each for each in _requirements() if each.marker is None}
    words = [f"'{name}{wanted[name].specifier}'" for name in names if name in wanted]
    return f"pip install {' '.join(words)}"


def _requirements() -> list[Requirement]:
    return [Requirement(each) for each in requires(_OWN) or []]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fits(needed: Requirement) -> bool:
    installed = _version(needed.name)
    return installed is not None and needed.specifier.contains(installed, prereleases=True)


def _range(needed: Requirement) -> str:
    return str(needed.specifier) or "any version"
