"""A push: one commit, nothing replaced unasked, errors with cures, and the token in no word."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from loopback_hub import TOKEN
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kpsvd_tune.commands import main as cli
from kpsvd_tune.publish.bundle import collect
from kpsvd_tune.runs.find import find
from kpsvd_tune.storage.commit import check_sealed

# A token of a form that nobody knows.
ODD = "of-no-form-0123456789"


class Client:
    """Stands in for huggingface_hub's client; `faults` are what its methods raise or do."""

    def __init__(self, faults: dict[str, Any], there: tuple[str, ...] | None, private: bool):
        self.faults, self.there, self.private = faults, there, private
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.branches = {"main"}

    def __call__(self, token: str, **_: Any) -> Client:
        assert token in (TOKEN, ODD)
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            self.calls.append((name, {**more, "given": given}))
            fault = self.faults.get(name)
            if isinstance(fault, BaseException):
                raise fault
            if fault is not None:
                fault()
            return getattr(self, f"_{name}")(**more)

        return call

    def _repo_info(self, revision: str | None = None) -> Any:
        if self.there is None:
            raise http_error(404, errors.RepositoryNotFoundError)
        if revision is not None and revision not in self.branches:
            raise http_error(404, errors.RevisionNotFoundError)
        siblings = [SimpleNamespace(rfilename=name) for name in (".gitattributes", *self.there)]
        return SimpleNamespace(siblings=siblings, sha="a" * 40, private=self.private)

    def _create_repo(self, private: bool, exist_ok: bool) -> None:
        assert not exist_ok
        self.there, self.private = (), private

    def _create_branch(self, branch: str, exist_ok: bool) -> None:
        self.branches.add(branch)

    def _create_commit(self, **_: Any) -> Any:
        return SimpleNamespace(commit_url=f"https://hub/commit/1?token={TOKEN}")


def http_error(status: int, kind: type = errors.HfHubHTTPError) -> Exception:
    """As the client raises it, with the token wherever a server may repeat it."""
    request = SimpleNamespace(headers={"Authorization": f"Bearer {TOKEN}"})
    response = SimpleNamespace(status_code=status, headers={}, request=request)
    error: Exception = kind(f"{status} for https://u:{TOKEN}@hub", response=response)
    error.__cause__ = RuntimeError(f"Bearer {TOKEN}")
    return error


Pushed = tuple[int, str, Client]


@pytest.fixture
def push(
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Pushed]:
    """Pushes an adapter to a replaced client, and looks for the token in all that it leaves."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: os.environ.get("HF_TOKEN"))

    def run(
        *options: str,
        faults: dict[str, Any] | None = None,
        there: tuple[str, ...] | None = None,
        private: bool = True,
    ) -> Pushed:
        client = Client(faults or {}, there, private)
        monkeypatch.setattr(huggingface_hub, "HfApi", client)
        code = cli.run(["push", str(adapter), "--repo", "me/x", *options])
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert TOKEN not in said
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or TOKEN.encode() not in file.read_bytes()
        return code, " ".join(said.split()), client

    return run


def commit_of(client: Client) -> tuple[list[str], list[str], dict[str, Any]]:
    """What the one commit adds and deletes, and its options."""
    ((_, options),) = [each for each in client.calls if each[0] == "create_commit"]
    operations = options["given"][1]
    added = [
        e.path_in_repo for e in operations if isinstance(e, huggingface_hub.CommitOperationAdd)
    ]
    return added, [e.path_in_repo for e in operations if e.path_in_repo not in added], options


def test_a_new_repository_is_private_and_has_all_in_one_commit(push: Any) -> None:
    code, said, client = push()
    assert code == 0
    names = [name for name, _ in client.calls]
    assert names == ["repo_info", "create_repo", "repo_info", "create_commit"]
    assert client.calls[1][1]["private"] is True
    added, deleted, options = commit_of(client)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(added)
    assert deleted == []
    assert options["commit_message"].startswith("Add a KPSVD adapter by kpsvd-tune ")
    assert (options["revision"], options["parent_commit"]) == (None, "a" * 40)
    assert "sent: https://hub/commit/1?token=<token>" in said


def test_public_branch_and_message_are_as_asked(push: Any) -> None:
    code, said, client = push("--public", "--revision", "second", "-m", "Mine", "--json")
    assert code == 0
    assert [name for name, _ in client.calls][1:4] == ["create_repo", "repo_info", "repo_info"]
    assert client.calls[1][1]["private"] is False
    assert client.branches == {"main", "second"}
    _, _, options = commit_of(client)
    # The tip of a branch that was just made is not known here.
    assert (options["revision"], options["parent_commit"]) == ("second", None)
    assert options["commit_message"] == "Mine"


def test_what_a_repository_holds_is_replaced_only_when_asked(push: Any) -> None:
    code, said, client = push(there=("README.md", "model.safetensors"))
    assert code == 2
    assert "me/x holds README.md, model.safetensors already; pass --update to replace" in said
    assert [name for name, _ in client.calls] == ["repo_info"]
    held = ("README.md", "LICENSE", "model.safetensors", "training/recipe.yaml")
    code, said, client = push("--update", there=held)
    assert code == 0
    # What loaders would take for a part of the new model goes; what the user put there stays.
    assert commit_of(client)[1] == ["model.safetensors", "training/recipe.yaml"]
    assert "of an earlier push, removed there: model.safetensors, training/recipe.yaml" in said
    # One that was made by hand, or in a push that was stopped, holds nothing to lose.
    assert push(there=())[0] == 0
    # A new branch changes none of what is there.
    assert push("--revision", "b", there=("README.md",))[0] == 0


def test_a_public_repository_takes_nothing_that_was_meant_to_be_private(push: Any) -> None:
    code, said, client = push("--update", there=("README.md",), private=False)
    assert code == 2
    assert "me/x is public: what is sent there everyone can read. Pass --public" in said
    assert push("--update", "--public", there=("README.md",), private=False)[0] == 0
    code, said, _ = push("--update", "--public", there=("README.md",))
    assert code == 0
    assert "note: me/x stays private" in said


@pytest.mark.parametrize("debug", [(), ("--debug",)])
@pytest.mark.parametrize(
    ("method", "fault", "code", "words"),
    [
        ("repo_info", http_error(401), 2, "does not know the token, .* or call `hf auth login`"),
        ("create_repo", http_error(402), 2, "wants a paid plan"),
        ("create_repo", http_error(403), 2, "may not write to me/x: make one .* owner than me"),
        ("create_repo", http_error(404), 2, "finds no me/x, .* check the owner me and"),
        ("create_repo", http_error(409), 2, "made or changed by someone else .* --update"),
        ("create_commit", http_error(412), 2, "changed by someone else meanwhile"),
        ("create_commit", http_error(413), 2, "takes no files of that size"),
        ("create_commit", http_error(429), 1, "no more requests for now: wait"),
        ("create_commit", http_error(503), 1, "hub or its client failed: try again later"),
        ("create_commit", http_error(404, errors.RepositoryNotFoundError), 2, "finds no me/x"),
        ("repo_info", http_error(403, errors.GatedRepoError), 2, "may not write to me/x"),
        ("create_commit", ConnectionError(f"proxy {TOKEN}"), 1, "cannot be reached: check the net"),
        ("repo_info", TimeoutError(f"{TOKEN} took"), 1, "cannot be reached"),
        (
            "create_commit",
            ValueError(f"Invalid metadata in README.md {TOKEN}"),
            2,
            "not take the h",
        ),
        ("create_commit", KeyError(TOKEN), 1, r"client failed: .* \(KeyError: '<token>'\)"),
        ("create_commit", RuntimeError(f"Bearer {TOKEN}"), 1, "RuntimeError: Bearer <token>"),
    ],
)
def test_errors_of_the_client_have_cures_and_no_token(
    method: str, fault: Exception, code: int, words: str, debug: tuple[str, ...], push: Any
) -> None:
    found, said, _ = push(*debug, faults={method: fault})
    assert found == code
    assert re.search(words, said)
    assert ("Traceback" in said) is bool(debug)
    assert "This is a bug" not in said


def test_what_the_client_says_in_passing_has_no_token(push: Any) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(handler)

    def talk() -> None:
        warnings.warn(f"a warning of {TOKEN}", UserWarning, stacklevel=1)
        logging.getLogger("huggingface_hub.hf_api").warning("a log of %s", TOKEN)
        try:
            raise RuntimeError(TOKEN)
        except RuntimeError:
            logging.getLogger("huggingface_hub").exception("failed")

    try:
        code, said, _ = push("--debug", faults={"create_commit": talk})
    finally:
        logger.removeHandler(handler)
    assert code == 0
    assert "the hub's client: a warning of <token>" in said
    assert "a log of <token>" in stream.getvalue()
    assert TOKEN not in stream.getvalue()


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (
            None,
            "no token for the hub: set HF_TOKEN, or call `hf auth login`, with a token that",
        ),
        (f"{TOKEN}\nx", "holds blanks or other signs that no token has"),
    ],
)
def test_without_a_token_nothing_is_asked(
    token: str | None, words: str, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    code, said, client = push("--debug")
    assert (code, client.calls) == (2, [])
    assert words in said


def test_a_login_that_cannot_be_read(push: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(f"refresh of {TOKEN} failed")

    monkeypatch.setattr(huggingface_hub, "get_token", fail)
    code, said, _ = push("--debug")
    assert code == 2
    assert "login cannot be read: refresh of <token> failed" in said


def test_offline_nothing_is_asked(push: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, said, client = push()
    assert (code, client.calls) == (2, [])
    assert "HF_HUB_OFFLINE forbids the network, which a push needs; unset it, or see" in said


def test_the_own_token_is_found_in_files_of_any_form(
    adapter: Path, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: ODD)
    (adapter / "notes.bin").write_bytes(b"x" * (1 << 22) + ODD.encode())
    code, said, client = push()
    assert (code, client.calls) == (2, [])
    assert "notes.bin of" in said
    assert "holds your token for the hub; remove it, and make the token void" in said
    assert ODD not in said


def test_ctrl_c_in_the_middle_says_what_is_there(push: Any) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    code, said, client = push(faults={"create_commit": interrupt})
    assert code == 130
    assert "stopped by SIGINT while sending " in said
    assert "to me/x; me/x shows none of them, or all if the hub had them by then" in said
    code, said, _ = push(faults={"repo_info": interrupt})
    assert code == 130
    assert "nothing was sent" in said


# The real client reads its settings when it is imported, so it runs in a process of its own.
PROGRAM = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from loopback_hub import TOKEN, serving
with serving() as hub:
    os.environ |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    os.environ["HF_HUB_OFFLINE"] = "0"
    from kpsvd_tune.commands import main as cli
    assert cli.run(["push", sys.argv[2], "--repo", "me/x"]) == 0
    held = hub.repos["me/x"]
    assert held["private"] and "Add a KPSVD adapter" in held["message"]
    for name, content in held["branches"]["main"].items():
        target = Path(sys.argv[3], name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    hub.refuses["POST /api/repos/create"] = 403
    assert cli.run(["push", sys.argv[2], "--repo", "you/x", "--debug"]) == 2
    hub.refuses["GET /api/models"] = 401
    assert cli.run(["push", sys.argv[2], "--repo", "me/x", "--update"]) == 2
assert cli.run(["push", sys.argv[2], "--repo", "me/y"]) == 1
"""


@pytest.mark.slow
def test_a_run_is_sent_by_the_real_client_and_loads_elsewhere(
    tmp_path: Path, tiny_model_dir: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe(train={"max_steps": 1})
    assert cli.run(["train", str(recipe)]) == 0
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert collect(str(run / "adapter"), "").files.keys() == collect(str(run), "").files.keys()
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1]), str(run), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert TOKEN not in said
    assert "Traceback" in said
    assert "you sent Bearer <token>" in said
    assert "error: the token may not write to you/x" in said
    assert "error: the hub does not know the token" in said
    assert "error: the hub cannot be reached: check the network and try again" in said
    for file in copy.rglob("*"):
        held = file.read_bytes() if file.is_file() else b""
        assert str(tmp_path).encode() not in held, file
        assert str(tiny_model_dir).encode() not in held, file
    assert {"recipe.yaml", "rank_report.json"} == {e.name for e in (copy / "training").iterdir()}
    report = json.loads((copy / "training" / "rank_report.json").read_text())
    assert report["model"] == tiny_model_dir.name
    # Who fetches it has a whole adapter, which is no run.
    check_sealed(copy, "adapter")
    assert find(str(copy)).recipe is None
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    loaded: Any = PeftModel.from_pretrained(base, str(copy))
    assert loaded.peft_config["default"].layers
    card = (copy / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "me/x")' in card
