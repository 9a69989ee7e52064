"""Sends files to a repository of the hub, in one commit, and keeps the token out of all words.

The token is asked of huggingface_hub, which has it from the environment or its own login. Nothing
here writes it, and what the client says, as an error, a warning or a log, passes through
:meth:`_Hub.words` first.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, errors

from kpsvd_tune import __version__
from kpsvd_tune.errors import HubError, InputError, KpsvdTuneError, some_of
from kpsvd_tune.events import Events
from kpsvd_tune.offline import is_offline
from kpsvd_tune.phase import Phase
from kpsvd_tune.publish.bundle import RUN_FILES, WORDS, Bundle, without_secrets
from kpsvd_tune.report.results import PushReport
from kpsvd_tune.units import size

_LOGIN = "set HF_TOKEN, or call `hf auth login`"
_TOKENS = "https://huggingface.co/settings/tokens"
# As the hub takes names of repositories.
_REPO = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)
# What the hub puts into a new repository.
_EMPTY = {".gitattributes"}
# What loaders look for: of these no file of an earlier push must stay beside those of another.
_READ_BY_LOADERS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf"),
    *("adapter_config.json", "config.json", "manifest.json", "merge_report.json"),
    *("export_report.json", f"{RUN_FILES}/*"),
)


@dataclass(frozen=True)
class Target:
    """Where a bundle goes."""

    repo: str  # OWNER/NAME
    is_public: bool = False  # of a repository that is made
    revision: str | None = None  # a branch, made where it is missing; None: main
    message: str | None = None  # of the commit; None: a sentence that says what it is
    update: bool = False  # whether a repository that holds something may be changed

    @property
    def place(self) -> str:
        """What code loads, as Python writes it."""
        branch = "" if self.revision in (None, "main") else f', revision="{self.revision}"'
        return f'"{self.repo}"{branch}'


def check_target(target: Target) -> Target:
    """The target with the repository's plain name; InputError where it can be none."""
    repo = target.repo.removeprefix("https://huggingface.co/").strip("/")
    if not _REPO.fullmatch(repo) or len(repo) > 96 or repo.endswith(".git"):
        raise InputError(
            f"--repo {target.repo}: expected OWNER/NAME, the owner being you or an organisation, "
            "in letters, digits, single dashes, dots and underscores"
        )
    if target.message is not None and not target.message.strip():
        raise InputError("--message is empty: expected the sentence that the commit is known by")
    if target.revision is not None and not target.revision.strip():
        raise InputError("--revision is empty: expected the name of a branch")
    return replace(target, repo=repo)


def report_of(bundle: Bundle, target: Target, **more: Any) -> PushReport:
    """What is sent, for a person; `more` are the fields that only a real push knows."""
    return PushReport(
        repo=target.repo,
        content=WORDS[bundle.content],
        is_public=more.pop("is_public", target.is_public),
        revision=target.revision or "main",
        message=target.message or f"Add {WORDS[bundle.content]} by kpsvd-tune {__version__}",
        files=bundle.sizes(),
        num_bytes=sum(bundle.sizes().values()),
        shortened=bundle.shortened,
        left_out=bundle.left_out,
        notes=(*bundle.notes, *more.pop("notes", ())),
        **more,
    )


def push(bundle: Bundle, target: Target, events: Events, phase: Phase) -> PushReport:
    """Make the repository where it is missing, and send all files in one commit.

    Raises:
        InputError: There is no token or no network is allowed; the hub refuses the token, the name
            or the branch; the repository holds something and `target.update` is not set, or is
            public and `target.is_public` is not.
        HubError: The hub cannot be reached, or failed.
    """
    if is_offline():
        raise InputError(
            "HF_HUB_OFFLINE forbids the network, which a push needs; unset it, or see with "
            "--dry-run what would be sent"
        )
    hub = _Hub(_token())
    hub.check_files(bundle)
    with hub.guarded(events):
        return _push(hub, bundle, target, events, phase)


def _push(hub: _Hub, bundle: Bundle, target: Target, events: Events, phase: Phase) -> PushReport:
    repo, branch = target.repo, target.revision
    phase.enter(f"asking the hub about {repo}", kept="nothing was sent")
    events.stage(f"asking the hub about {repo}")
    found = hub.info(repo)
    is_new = found is None
    notes = []
    if found is None:
        events.stage(f"making the {'public' if target.is_public else 'private'} repository {repo}")
        hub.call("create_repo", repo, private=not target.is_public, exist_ok=False)
        found = hub.info(repo)
    elif not found.private and not target.is_public:
        raise InputError(
            f"{repo} is public: what is sent there everyone can read. Pass --public if that is "
            "meant, or name another --repo"
        )
    elif found.private and target.is_public:
        notes.append(f"{repo} stays private; its settings on the hub change that")
    tip, is_new_branch = found, False
    if branch not in (None, "main"):
        tip = hub.info(repo, branch)
        is_new_branch = tip is None
    # A new branch begins with main's files, and leaves main as it is.
    there = _files(tip if tip is not None else found)
    if not is_new and there and not is_new_branch and not target.update:
        raise InputError(
            f"{repo} holds {some_of(there, 5)} already; pass --update to replace those that are "
            "sent now (earlier commits stay on the hub), or name another --repo or a new "
            "--revision"
        )
    if is_new_branch:
        hub.call("create_branch", repo, branch=branch, exist_ok=True)
    removed = [
        name
        for name in there
        if name not in bundle.files and any(fnmatch(name, each) for each in _READ_BY_LOADERS)
    ]
    report = report_of(
        bundle,
        target,
        is_public=target.is_public if is_new else not getattr(found, "private", True),
        notes=notes,
        removed=tuple(removed),
    )
    what = f"{len(report.files)} files, {size(report.num_bytes)}, to {repo}"
    phase.enter(
        f"sending {what}",
        kept=f"{repo} shows none of them, or all if the hub had them by then; what was sent is not "
        "sent again",
    )
    events.stage(f"sending {what}")
    operations: list[Any] = [
        CommitOperationAdd(name, file if isinstance(file, bytes) else str(file))
        for name, file in bundle.files.items()
    ]
    commit = hub.call(
        "create_commit",
        repo,
        [*operations, *(CommitOperationDelete(name) for name in removed)],
        commit_message=report.message,
        revision=branch,
        # Of a new branch the hub alone knows the tip.
        parent_commit=getattr(tip, "sha", None),
    )
    url = hub.words(str(commit.commit_url))
    return report_of(
        bundle, target, is_public=report.is_public, notes=notes, removed=tuple(removed), url=url
    )


def _token() -> str:
    try:
        token = huggingface_hub.get_token()
    except Exception as error:
        refused = InputError(
            f"huggingface_hub's login cannot be read: {without_secrets(str(error))[:300]}; {_LOGIN}"
        )
    else:
        if token is None:
            refused = InputError(
                f"no token for the hub: {_LOGIN}, with a token that may write, from {_TOKENS}"
            )
        elif not token.isascii() or not token.isprintable() or " " in token:
            refused = InputError(
                f"the token for the hub holds blanks or other signs that no token has; {_LOGIN}"
            )
        else:
            return token
    # Outside the handler, so that no traceback shows what the library said.
    raise refused


def _files(info: Any) -> list[str]:
    found = [] if info is None else (getattr(info, "siblings", None) or [])
    return [each.rfilename for each in found if each.rfilename not in _EMPTY]


class _Hub:
    """The client, whose errors, warnings and logs become words without the token."""

    def __init__(self, token: str) -> None:
        self._forms = {token, quote(token, safe=""), repr(token)[1:-1]}
        self._api = huggingface_hub.HfApi(
            token=token, library_name="kpsvd-tune", library_version=__version__
        )

    def words(self, text: str) -> str:
        """A text in which neither the token nor another one is."""
        for form in self._forms:
            text = text.replace(form, "<token>")
        return without_secrets(text)

    def check_files(self, bundle: Bundle) -> None:
        """Refuse a file that holds the token (InputError)."""
        for name, file in bundle.files.items():
            if any(_holds(file, form.encode()) for form in self._forms):
                raise InputError(
                    f"{name} of {bundle.folder} holds your token for the hub; remove it, and make "
                    f"the token void at {_TOKENS}"
                )

    def info(self, repo: str, revision: str | None = None) -> Any:
        """What the hub knows of a repository, or of a branch; None where there is none."""
        return self.call("repo_info", repo, revision=revision, missing_ok=True)

    def call(self, name: str, repo: str, *given: Any, missing_ok: bool = False, **more: Any) -> Any:
        """Call a method of the client.

        Its errors are raised anew outside their handler: a traceback of ours shows none of them.
        """
        try:
            return getattr(self._api, name)(repo, *given, **more)
        except KpsvdTuneError:
            raise
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            if missing_ok and not isinstance(error, errors.GatedRepoError):
                return None
            refused = self._explained(repo, error)
        except Exception as error:
            refused = self._explained(repo, error)
        raise refused

    @contextmanager
    def guarded(self, events: Events) -> Iterator[None]:
        """Pass the client's warnings and logs on without the token."""

        def clean(record: logging.LogRecord) -> bool:
            record.msg, record.args = self.words(record.getMessage()), None
            if record.exc_info:
                record.exc_info = record.exc_text = None
            return True

        loggers = (logging.getLogger(), logging.getLogger("huggingface_hub"))
        handlers = [handler for each in loggers for handler in each.handlers]
        if logging.lastResort is not None:
            handlers.append(logging.lastResort)
        for handler in handlers:
            handler.addFilter(clean)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                yield
        finally:
            for handler in handlers:
                handler.removeFilter(clean)
        for text in dict.fromkeys(str(each.message) for each in caught):
            events.note(f"the hub's client: {self.words(text)}")

    def _explained(self, repo: str, error: Exception) -> KpsvdTuneError:
        """The client's error as one of ours: what is wrong, and what to do."""
        said = self.words(" ".join(str(error).split()))[:400]
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(error, errors.RepositoryNotFoundError) and status == 401:
            status = 404
        cause = _BY_STATUS.get(status) if isinstance(status, int) else None
        if cause is not None:
            return InputError(f"{cause.format(repo=repo, owner=repo.partition('/')[0])} ({said})")
        if status == 429:
            return HubError(f"the hub takes no more requests for now: wait and try again ({said})")
        if isinstance(error, ValueError) and "metadata" in said:
            return InputError(f"the hub does not take the head of README.md: mend it ({said})")
        if status is None and _is_connection(error):
            return HubError(
                f"the hub cannot be reached: check the network and try again ({said}); nothing is "
                "half there, and what was sent is not sent again"
            )
        kind = type(error).__name__
        return HubError(f"the hub or its client failed: try again later ({kind}: {said})")


_BY_STATUS = {
    400: "the hub does not take this: mend what it names",
    401: f"the hub does not know the token, which may be void by now: {_LOGIN}, with one from "
    f"{_TOKENS}",
    402: "the hub wants a paid plan for this: name another --repo or owner",
    403: "the token may not write to {repo}: make one that may write at "
    f"{_TOKENS}" + ", or name another owner than {owner} in --repo",
    404: "the hub finds no {repo}, or does not show it to this token: check the owner {owner} and "
    "the --revision",
    409: "{repo} was made or changed by someone else meanwhile: look at it, and pass --update to "
    "replace what it holds",
    412: "{repo} was changed by someone else meanwhile: look at it, and call the command again",
    413: "the hub takes no files of that size in {repo}: see its limits on storage",
}


def _is_connection(error: Exception) -> bool:
    """Whether an error is one of the network, in whichever library it was raised."""
    modules = {each.__module__.partition(".")[0] for each in type(error).__mro__}
    return isinstance(error, OSError) or bool(modules & {"httpx", "httpx2", "httpcore", "requests"})


def _holds(file: Path | bytes, wanted: bytes) -> bool:
    """Whether a file holds some bytes; it is read in pieces, for it may be of any size."""
    if isinstance(file, bytes):
        return wanted in file
    if file.suffix in (".safetensors", ".gguf"):
        return False  # numbers; the names among them are the model's
    with file.open("rb") as stream:
        before = b""
        while piece := stream.read(1 << 22):
            if wanted in before + piece:
                return True
            before = piece[-len(wanted) :]
    return False
