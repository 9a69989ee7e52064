"""What is published of a folder: all that is whole, without places and secrets of this machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from kpsvd_tune.commands import main as cli
from kpsvd_tune.errors import AdapterError, InputError
from kpsvd_tune.publish.bundle import Bundle, collect, find_token
from kpsvd_tune.storage.commit import check_sealed

TOKEN = "hf_" + "Canary0" * 5
Change = Callable[[Path], Any]


def write(bundle: Bundle, folder: Path) -> Path:
    """A copy of what is published, as who fetches it has it."""
    for name, file in bundle.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    return folder


def test_an_adapter_is_published_without_its_folders_and_sealed_anew(
    adapter: Path, tmp_path: Path
) -> None:
    (adapter / ".cache").write_text("hidden")
    bundle = collect(str(adapter), '"me/x", revision="b"')
    assert (bundle.content, bundle.left_out, bundle.notes) == ("adapter", (".cache",), ())
    assert bundle.shortened == ("adapter_config.json",)
    copy = write(bundle, tmp_path / "copy")
    check_sealed(copy, "adapter")
    assert "/home" not in "".join(file.read_text() for file in copy.glob("*.json"))
    config = json.loads((copy / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    own = json.loads((adapter / "adapter_config.json").read_text())
    assert {**own, "base_model_name_or_path": "tiny"} == config
    card = (copy / "README.md").read_text()
    assert 'from_pretrained(base, "me/x", revision="b")' in card
    assert "`kpsvd-tune merge PATH_OF_THIS_FOLDER`" in card
    # What lies here is as it was.
    check_sealed(adapter, "adapter")
    assert "PATH_OF_THIS_FOLDER" in (adapter / "README.md").read_text()


def test_a_merged_model_a_lora_and_a_gguf_file(
    merged: Path, lora: Path, gguf: Path, tmp_path: Path
) -> None:
    bundle = collect(str(merged), '"me/x"', "merged")
    assert (bundle.content, bundle.shortened) == ("merged", ("merge_report.json",))
    copy = write(bundle, tmp_path / "copy")
    report = json.loads((copy / "merge_report.json").read_text())
    digest = hashlib.sha256((merged / "model.safetensors").read_bytes()).hexdigest()
    assert report == {
        "passed": True,
        "output": "merged",
        "warnings": ["see y"],
        "weight_files": {"model.safetensors": digest},
    }
    assert bundle.files["model.safetensors"] == merged / "model.safetensors"
    bundle = collect(str(lora), '"me/x"', "lora")
    assert bundle.content == "lora"
    check_sealed(write(bundle, tmp_path / "other"), "lora")
    bundle = collect(str(gguf), '"me/x"')
    assert (bundle.content, bundle.notes) == ("gguf", ())
    assert set(bundle.files) == {"README.md", "export_report.json", "model.gguf"}
    assert bundle.shortened == ("export_report.json",)


def test_a_name_of_the_hub_stays_the_base(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    cached = "/home/ann/hub/models--owner--tiny/snapshots/abc"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": cached}))
    (adapter / "manifest.json").unlink()
    bundle = collect(str(adapter), '"me/x"')
    config = bundle.files["adapter_config.json"]
    assert isinstance(config, bytes)
    assert json.loads(config)["base_model_name_or_path"] == "owner/tiny"
    assert "there is no manifest.json" in bundle.notes[0]


def edit_a_number(file: Path) -> None:
    """Change a byte in the middle, which neither the size nor the header of a file tells."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["merged", "gguf"])
def test_weights_that_were_edited_are_refused_by_name(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    (file,) = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    assert not any("hashes" in note for note in collect(str(folder), '"me/x"').notes)
    edit_a_number(file)
    report = "merge_report.json" if kind == "merged" else "export_report.json"
    with pytest.raises(
        InputError, match=rf"{file} changed since {report} was written, so what it proves"
    ):
        collect(str(folder), '"me/x"')
    # Reports of older versions hold no hash, and tell so.
    held = json.loads((folder / report).read_text())
    kept = {key: each for key, each in held.items() if key not in ("weight_files", "sha256")}
    (folder / report).write_text(json.dumps(kept))
    (note,) = [each for each in collect(str(folder), '"me/x"').notes if "hashes" in each]
    assert note.startswith(f"{report} is of an older version and holds no hashes")


def test_weights_that_the_report_does_not_know_are_refused(merged: Path) -> None:
    file = merged / "merge_report.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps(report | {"weight_files": {"other.safetensors": "0" * 64}}))
    with pytest.raises(InputError, match=r"model.safetensors, .*other.safetensors changed since"):
        collect(str(merged), '"me/x"')
    file.write_text(json.dumps(report | {"weight_files": ["model.safetensors"]}))
    with pytest.raises(InputError, match="merge_report.json is damaged: weight_files is no table"):
        collect(str(merged), '"me/x"')


def test_a_card_without_a_licence_is_told(merged: Path) -> None:
    card = merged / "README.md"
    card.write_text(card.read_text().replace("license: mit\n", ""))
    assert "README.md states no licence" in collect(str(merged), '"me/x"').notes[0]


def append(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


def cut(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def make_index(folder: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (
            "adapter",
            append("adapter_config.json", " "),
            "config.json is damaged: .*restore",
        ),
        ("adapter", cut("adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
        ("adapter", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        ("adapter", lambda f: (f / "README.md").unlink(), "lacks README.md: it is not a whole fol"),
        ("lora", append("export_report.json", " "), "is damaged: .* put back the file as it was"),
        ("lora", lambda f: (f / "adapter_model.safetensors").unlink(), "lacks adapter_model.safet"),
        ("merged", lambda f: (f / "config.json").unlink(), "is not there|expected a finished run"),
        ("merged", cut("model.safetensors"), "model.safetensors is damaged: .*; merge again"),
        ("merged", lambda f: (f / "model.safetensors").unlink(), "lacks tensors of the model's"),
        ("merged", make_index, "lacks model-00001-of-00002.safetensors, model-00002"),
        ("gguf", cut("model.gguf"), "model.gguf has 5 bytes, and export_report.json tells of 14"),
        ("gguf", lambda f: (f / "model.gguf").unlink(), "model.gguf is not there, and export_rep"),
        (
            "merged",
            lambda f: (f / "merge_report.json").write_text('{"passed": false}'),
            "the merge was not proved; it is not published: merge again",
        ),
        ("merged", append("README.md", "\nfrom /home/ann/x\n"), r"README.md:\d+ names /home/ann/x"),
        ("merged", append("README.md", "\n" + TOKEN), r"README.md of .* token or key \(hf_Can"),
        ("adapter", append("README.md", "\nsk-" + "a1" * 20), r"token or key \(sk-a1a\.\.\.\)"),
        (
            "merged",
            lambda f: (f / "notes.json").write_text(f'["{TOKEN}"]'),
            "notes.json of .* holds what looks like a token",
        ),
        ("merged", lambda f: (f / "x").symlink_to("/etc/hosts"), "x is a link, and only what lies"),
        ("merged", lambda f: os.mkfifo(f / "pipe"), "pipe is a named pipe, socket or device"),
    ],
)
def test_what_is_not_whole_or_says_too_much_is_refused(
    kind: str, change: Change, said: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    change(folder)
    with pytest.raises((InputError, AdapterError), match=said) as raised:
        collect(str(folder), '"me/x"')
    assert TOKEN not in str(raised.value)


def test_other_things_are_refused_with_what_they_are(
    tmp_path: Path, tiny_model_dir: Path, adapter: Path, lora: Path
) -> None:
    def said(source: Path | str) -> str:
        with pytest.raises(InputError) as raised:
            collect(str(source), '"me/x"')
        return str(raised.value)

    assert "is a model without merge_report.json" in said(tiny_model_dir)
    assert "is not there; expected a finished run, an adapter" in said(tmp_path / "none")
    assert "did you mean" in said(tmp_path / "mina")
    (tmp_path / "my.yaml").write_text("a: 1")
    assert "is a recipe; name the folder of its run" in said(tmp_path / "my.yaml")
    left = adapter.rename(tmp_path / ".mine.0123abcd.tmp")
    assert "is what a killed command left of a folder" in said(left)
    (lora / "export_report.json").unlink()
    assert "is an adapter of LORA that `kpsvd-tune export` did not write" in said(lora)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (TOKEN, "hf_Can..."),
        ("ghp_" + "a" * 36, "ghp_aa..."),
        ("AKIA" + "A" * 16, "AKIAAA..."),
        ("-----BEGIN RSA PRIVATE KEY-----", "-----B..."),
        ("hf_short and the sk-learn of old", None),
        ("a sentence", None),
    ],
)
def test_tokens_are_known_by_their_form(text: str, found: str | None) -> None:
    assert find_token(text) == found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--merged"], "is a KPSVD adapter; --merged expects a merged model: make it with `kpsvd-"),
        (["--lora"], "--lora expects an exported LoRA: make it with `kpsvd-tune export "),
        (["--lora", "--merged"], "--merged and --lora exclude each other"),
        (["--repo", "x"], "--repo x: expected OWNER/NAME, the owner being you"),
        (["--repo", "me/a--b"], "--repo me/a--b: expected OWNER/NAME"),
        (["--repo", "datasets/me/x"], "expected OWNER/NAME"),
        (["--message", " "], "--message is empty"),
        (["--revision", ""], "--revision is empty"),
    ],
)
def test_options_that_cannot_be_meant(
    options: list[str], said: str, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["push", str(adapter), "--repo", "me/x", "--dry-run", *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_shows_files_and_sizes_and_asks_nobody(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run asked")

    monkeypatch.setattr(huggingface_hub, "HfApi", refuse)
    monkeypatch.setattr(huggingface_hub, "get_token", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    command = ["push", str(adapter), "--repo", "https://huggingface.co/me/x", "--dry-run"]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    assert "a KPSVD adapter, private: me/x, main\n" in out
    number = (adapter / "adapter_model.safetensors").stat().st_size
    assert f"adapter_model.safetensors  {number / 1000:.1f} kB\n" in out
    assert out.endswith("nothing was sent (--dry-run)\n")
    assert cli.run([*command, "--json", "--public", "-m", "mine"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["files"]["adapter_model.safetensors"] == number
    assert (shown["is_public"], shown["message"], shown["url"]) == (True, "mine", None)
    assert shown["num_bytes"] == sum(shown["files"].values())
