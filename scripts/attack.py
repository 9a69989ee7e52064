"""Mutated recipes, damaged files and hostile programs: each must be answered rightly, in time.

Each attack changes one thing at random, from a seed, and runs a command on it in this process. An
attack fails if the command ends in a traceback, takes longer than the limit, returns an exit code
that its kind of input cannot cause, or succeeds with other weights or answers than the undamaged
files give. Whatever fails is printed with its number; the same seed and number give the same
attack again.

Programs are drawn from tests/programs.py, cheats two at a time, and run in the sandbox: none may
escape, last, or be judged right without being it; honest ones, disguised at random, must be.

Usage: attack.py [--seed 0] [--recipes 3000] [--files 300] [--programs 80] [--limit 10]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from kpsvd_tune.commands import main as cli
from kpsvd_tune.evaluation.sandbox.capture import Limits
from kpsvd_tune.evaluation.sandbox.run import Program, run_program
from kpsvd_tune.recipe import shipped_recipes

# For tests/programs.py, which the tests of the sandbox use as well.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

LIMIT_SECONDS = 10.0
# What may come of bad input, by command: 1 where a run or a proof fails, 3 for numbers that are
# not finite, 4 for a run that ended worse than its base.
CODES = {
    "validate": {0, 2},
    "report": {0, 2},
    "init-only": {0, 1, 2},
    "generate": {0, 2, 3},
    "eval": {0, 2, 3},
    "merge": {0, 1, 2, 3},
    "train": {0, 1, 2, 3, 4},
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 10**400, 0.5, -0.0, 1e-40, 1e308),
    *(
        "",
        " ",
        "x",
        "null",
        "~nobody-here/x",
        "a[red]b",
        "a\0b",
        "\ud800",
        "(a+)+b",
        "(",
        "../..",
        "/",
    ),
    *([], [[]], {}, {"a": {}}, ["a"], [None], {"": ""}, "x" * 5000, "1e-3", "0x1F", "2026-01-01"),
)


class Hang(BaseException):
    """The command took longer than the limit."""


@dataclass(frozen=True)
class Attack:
    """One attack and how it went.

    Attributes:
        name: Its kind and number.
        command: What was run.
        change: What was changed.
        problem: What is wrong with the answer; empty where nothing is.
    """

    name: str
    command: Sequence[str]
    change: str
    problem: str


def run(command: Sequence[str], limit: float = LIMIT_SECONDS) -> tuple[str, int | None]:
    """Run a command in this process.

    Returns:
        What is wrong with how it ended, empty where nothing is, and its exit code if it has one.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    said = io.StringIO()
    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.run(list(command))
    except Hang:
        return f"took longer than {limit:g} s", None
    except BaseException as error:
        return f"raised {type(error).__name__}: {error}", None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    text = said.getvalue()
    if "Traceback (most recent call last)" in text or "This is a bug" in text:
        return "a traceback: " + " | ".join(text.strip().splitlines()[-8:]), code
    if code not in CODES[command[0]]:
        return f"exit code {code}: {text.strip()[-300:]}", code
    if code and not any(line.strip() for line in text.splitlines()):
        return f"exit code {code} without a word", code
    return "", code


# Recipes


def mutated(text: str, draw: random.Random) -> tuple[str, str]:
    """A recipe with one to three changes, and their names."""
    changes = []
    for _ in range(draw.randint(1, 3)):
        change: RecipeChange = draw.choice(RECIPE_CHANGES)
        text = change(text, draw)
        changes.append(change.__name__.strip("_"))
    return text, ", ".join(changes)


def _value(text: str, draw: random.Random) -> str:
    lines = text.split("\n")
    places = [n for n, line in enumerate(lines) if ":" in line]
    if places:
        place = draw.choice(places)
        value = draw.choice(VALUES)
        shown = json.dumps(value) if draw.random() < 0.8 else str(value)
        lines[place] = lines[place].split(":")[0] + ": " + shown
    return "\n".join(lines)


def _character(text: str, draw: random.Random) -> str:
    place = draw.randrange(len(text) + 1)
    new: str = draw.choice(
        [*"[]{}:#&*!|>'\"%@`,-?\t \n\r", "\0", "\x85", "\u2028", "\U0001f600", "é"]
    )
    return text[:place] + new + text[place + draw.randint(0, 1) :]


def _cut(text: str, draw: random.Random) -> str:
    return text[: draw.randrange(len(text) + 1)]


def _line(text: str, draw: random.Random) -> str:
    lines = text.split("\n")
    place = draw.randrange(len(lines))
    action = draw.randrange(4)
    if action == 0:
        del lines[place]
    elif action == 1:
        lines.insert(place, draw.choice(lines))
    elif action == 2:
        lines[place] = " " * draw.randint(1, 5) + lines[place]
    else:
        lines[place] = lines[place].strip()
    return "\n".join(lines)


def _key(text: str, draw: random.Random) -> str:
    lines = text.split("\n")
    places = [n for n, line in enumerate(lines) if ":" in line and not line.startswith("#")]
    if places:
        place = draw.choice(places)
        key, _, rest = lines[place].partition(":")
        spot = draw.randrange(len(key) + 1)
        key = key[:spot] + draw.choice("abcxyz_-. ") + key[spot + draw.randint(0, 1) :]
        lines[place] = f"{key}:{rest}"
    return "\n".join(lines)


def _nested(text: str, draw: random.Random) -> str:
    depth = draw.choice([3, 30, 3000])
    return text + f"\nextra: {draw.choice(['[', '{a: ']) * depth}\n"


RecipeChange = Callable[[str, random.Random], str]
RECIPE_CHANGES: tuple[RecipeChange, ...] = (
    _value,
    _value,
    _value,
    _character,
    _cut,
    _line,
    _key,
    _nested,
)


def recipe_attack(number: int, seed: int, folder: Path, limit: float) -> Attack:
    """One mutated recipe, validated, sometimes with an override of the same kind."""
    draw = random.Random(f"recipe {seed} {number}")
    name, source = draw.choice(sorted(shipped_recipes().items()))
    text, change = mutated(source.read_text(encoding="utf-8"), draw)
    file = folder / "recipe.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    command = ["validate", str(file)]
    if draw.random() < 0.3:
        key = draw.choice(
            ["train.seed", "adapter.rank", "dataset.path", "evaluation.0.task", "x.y"]
        )
        value = json.dumps(draw.choice(VALUES))
        command.append(f"{key}={value}")
        change += f", {command[-1][:60]}"
    return Attack(f"recipe:{number}", command, f"{name}: {change}", run(command, limit)[0])


# Files


def prepare(folder: Path) -> None:
    """A tiny model, rows, a finished run with scores, and a warm cache, all below a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model", max_shard_size="20KB")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{n} and {n} are", "completion": f" {2 * n}"} for n in range(12)]
    for name in ("rows.jsonl", "test.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"path": "model", "dtype": "float32"},
        "dataset": {"path": "rows.jsonl", "validation": 2, "template": "{prompt}{completion}"},
        "adapter": {"rank": {"method": "fixed", "max": 1, "window": 2}},
        "train": {"max_steps": 2, "batch_size": 2, "precision": "no", "save_every": 1},
        "output_dir": "run",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    for command in (
        ["train", "recipe.yaml", "--offline"],
        [*EVAL, "--limit", "2"],
    ):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.run(command)
        if code not in (0, 4):
            raise SystemExit(f"{command} ended with {code}:\n{said.getvalue()}")


EVAL = [
    *("eval", "run", "--task", "exact_match", "--path", "test.jsonl", "--offline"),
    *("--max-new-tokens", "2", 'template="{prompt}{completion}"'),
    "columns={prompt: prompt, completion: completion}",
]
TRAIN = ["train", "recipe.yaml", "--offline"]
CONTINUE = [*TRAIN, "train.max_steps=3", "--allow-change", "train.max_steps"]
COMMANDS: tuple[tuple[str, tuple[list[str], ...]], ...] = (
    ("model/", (["init-only", "recipe.yaml", "--offline", "output_dir=other"], TRAIN)),
    ("run/adapter/", (["merge", "run", "-o", "out", "--offline"], ["generate", "run", "a"], EVAL)),
    ("run/evaluation/", (EVAL,)),
    ("run/", (["report", "run"], CONTINUE, TRAIN, EVAL)),
    ("cache/", ([*TRAIN, "output_dir=other"],)),
    ("rows.jsonl", ([*TRAIN, "output_dir=other"],)),
    ("test.jsonl", (EVAL,)),
    ("recipe.yaml", (["validate", "recipe.yaml"], TRAIN)),
)


def file_attack(number: int, seed: int, clean: Path, folder: Path, limit: float) -> Attack:
    """One damaged file, and a command that reads it."""
    draw = random.Random(f"file {seed} {number}")
    place = _fresh_copy(clean, folder / "copy")
    area, commands = draw.choice(COMMANDS)
    files = sorted(
        file
        for file in place.rglob("*")
        if file.is_file()
        and file.relative_to(place).as_posix().startswith(area)
        and not file.name.endswith(".lock")  # which hold nothing
    )
    file = draw.choice(files)
    damage = draw.choice(JSON_DAMAGES if file.suffix == ".json" else DAMAGES)
    damage(file, draw)
    command = draw.choice(commands)
    damaged = file.relative_to(place).as_posix()
    problem, code = run(command, limit)
    if code == 0 and damaged.startswith(SEALED):
        made = _made(place, command)
        if made != _made_of_undamaged(clean, folder, command):
            problem = "succeeded with other weights or answers than the undamaged files give"
    return Attack(f"file:{number}", command, f"{damage.__name__.strip('_')} {damaged}", problem)


def _fresh_copy(clean: Path, place: Path) -> Path:
    """A copy of the prepared files, which becomes the current folder."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(clean, place)
    os.chdir(place)
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    return place


# Folders whose files are ours from the first byte to the last, so that no change of them may pass.
SEALED = ("run/adapter/", "run/init/", "run/checkpoints/", "cache/")


def _made(place: Path, command: Sequence[str]) -> dict[str, str]:
    """Digests of the weights and answers that a successful command left."""
    patterns = ["out/*.safetensors"]
    if command[0] != "merge":
        patterns = ["*/adapter/*.safetensors", "run/evaluation/*/completions.jsonl"]
    if command == TRAIN or command[0] == "report":
        patterns = []  # the run is finished, and its weights are not read
    return {
        str(file.relative_to(place)): hashlib.sha256(file.read_bytes()).hexdigest()
        for pattern in patterns
        for file in place.glob(pattern)
    }


_REFERENCES: dict[tuple[Path, str], dict[str, str]] = {}


def _made_of_undamaged(clean: Path, folder: Path, command: Sequence[str]) -> dict[str, str]:
    """What the same command makes of the undamaged files."""
    key = (clean, json.dumps(command))
    if key not in _REFERENCES:
        place = _fresh_copy(clean, folder / "reference")
        problem, _ = run(command, limit=600)
        if problem:
            raise SystemExit(f"{command} of undamaged files {problem}")
        _REFERENCES[key] = _made(place, command)
    return _REFERENCES[key]


def _cut_file(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content) + 1)])


def _flip_bytes(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 8])):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(content))


def _flip_head(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[draw.randrange(min(len(content), 200))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(content))


def _random_bytes(file: Path, draw: random.Random) -> None:
    file.write_bytes(draw.randbytes(draw.choice([0, 1, 100, 10_000])))


def _pipe(file: Path, draw: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path, draw: random.Random) -> None:
    file.unlink()
    file.mkdir()


def _absent(file: Path, draw: random.Random) -> None:
    file.unlink()


def _deep(file: Path, draw: random.Random) -> None:
    depth = draw.choice([50, 500, 10_000])
    opening, closing = draw.choice([("[", "]"), ('{"a":', "}")])
    file.write_text(opening * depth + "1" + closing * depth)


def _other_json(file: Path, draw: random.Random) -> None:
    value = draw.choice(VALUES)
    file.write_text(json.dumps(value), encoding="utf-8")


def _key_of_json(file: Path, draw: random.Random) -> None:
    """Give one place, anywhere in the tree, another value; or take it out."""
    content = json.loads(file.read_text(encoding="utf-8"))
    places = list(_places(content))
    if not places:
        _other_json(file, draw)
        return
    parent, key = draw.choice(places)
    if draw.random() < 0.25:
        del parent[key]
    else:
        parent[key] = draw.choice(VALUES)
    file.write_text(json.dumps(content), encoding="utf-8")


def _places(tree: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs)[:50]:
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value, depth + 1)


Damage = Callable[[Path, random.Random], None]
DAMAGES: tuple[Damage, ...] = (
    *(_cut_file, _flip_bytes, _flip_bytes, _flip_head, _random_bytes, _pipe, _folder, _absent),
)
JSON_DAMAGES: tuple[Damage, ...] = (
    *DAMAGES,
    *(_deep, _other_json, _key_of_json, _key_of_json, _key_of_json, _key_of_json, _key_of_json),
)


# Programs

# What honest programs have around them.
_DISGUISES = (
    *("import os, sys, json\n", "print('noise' * 99)\n", "# -*- coding: utf-8 -*-\n"),
    *("import gc\ngc.disable()\n", "import threading\nthreading.Thread(target=print).start()\n"),
    *("import random\nrandom.seed(0)\n", "__name__ = '__main__'\n", "\n\n"),
)


def program_attack(number: int, seed: int, limit: float) -> Attack:
    """One program in the sandbox, of a kind that goes by its number."""
    import programs

    draw = random.Random(f"program {seed} {number}")
    kind = ("cheat", "helper", "escape", "bomb", "honest")[number % 5]
    cheats: dict[str, str] = programs.CHEATS
    helpers: dict[str, tuple[str, str]] = programs.CHEATS_OF_HELPERS
    honest: dict[str, tuple[str, ...]] = programs.HONEST
    tests: tuple[str, ...]
    if kind == "cheat":
        names = draw.sample(sorted(cheats), 2)
        source, tests = "\n".join(cheats[name] for name in names), programs.TESTS
    elif kind == "helper":
        names = [draw.choice(sorted(helpers))]
        source, tests = helpers[names[0]][0], (helpers[names[0]][1],)
    elif kind == "honest":
        names = [draw.choice(sorted(honest))]
        source, tests = textwrap.dedent(honest[names[0]][0]), honest[names[0]][1:]
        source = draw.choice(_DISGUISES) + source
    else:
        table: dict[str, str] = programs.ESCAPES if kind == "escape" else programs.BOMBS
        names = [draw.choice(sorted(table))]
        source = table[names[0]]
        tests = ("assert escaped()",) if kind == "escape" else ("assert False",)
    began = time.monotonic()
    result = run_program(
        Program(source, tests), "bwrap", Limits(cpu_seconds=3, wall_seconds=0.8 * limit)
    )
    problem = ""
    if time.monotonic() - began > limit:
        problem = f"took longer than {limit:g} s"
    elif result.passed != (kind == "honest"):
        problem = f"{result.status} {result.detail}"
    return Attack(f"program:{number}", [kind], ", ".join(names), problem)


def attacks(
    seed: int, recipes: int, files: int, limit: float, programs: int = 0
) -> Iterator[Attack]:
    """Carry out the attacks, one after the other."""
    for number in range(programs):
        yield program_attack(number, seed, limit)
    here, cache = Path.cwd(), os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        folder = Path(name)
        try:
            for number in range(recipes):
                yield recipe_attack(number, seed, folder, limit)
            if files:
                clean = folder / "clean"
                clean.mkdir()
                os.chdir(clean)
                os.environ["XDG_CACHE_HOME"] = str(clean / "cache")
                prepare(clean)
            for number in range(files):
                yield file_attack(number, seed, clean, folder, limit)
        finally:
            os.chdir(here)
            os.environ.pop("XDG_CACHE_HOME", None)
            if cache is not None:
                os.environ["XDG_CACHE_HOME"] = cache


def main() -> int:
    """Parse, attack, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", type=int, default=3000)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--programs", type=int, default=80)
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS)
    options = parser.parse_args()
    began, done, failed = time.monotonic(), 0, 0
    counts = (options.recipes, options.files, options.limit, options.programs)
    for attack in attacks(options.seed, *counts):
        done += 1
        if attack.problem:
            failed += 1
            print(f"{attack.name} ({attack.change}): {' '.join(attack.command)}: {attack.problem}")
    print(f"{done} attacks, {failed} answered wrongly, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
