"""What runs in a worker process of `math_judge`: judge one answer a line until the input ends.

Never imported: `math_judge` hands this file's text to an interpreter of its own, so that a
judgement that never ends can be killed without losing anything else.
"""

import json
import os
import sys

from math_verify import parse, verify  # type: ignore[import-not-found,unused-ignore]


def main() -> None:
    """Answer each line {"gold", "answer"} with a line {"extracted", "correct"}."""
    # A dependency may print; answers go where only we write.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = parse(question["answer"])
            verdict = {
                "extracted": bool(answer),
                "correct": bool(answer) and bool(verify(parse(question["gold"]), answer)),
            }
        except Exception:  # whatever symbolic algebra stumbles over is no right answer
            verdict = {"extracted": False, "correct": False}
        print(json.dumps(verdict), file=answers, flush=True)


main()
