"""How long `python bench.py score=… suite=closed` takes from start to end, on one thread: 541 rows.

    python tests/score_speed.py
"""
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import synth                                            # noqa: E402
from test_scoring import CASES                          # noqa: E402

ROWS, WORDS = 541, 300


def rows():
    """Answers of the tiny world's sentences, a line each; one to three instructions, all types in turn."""
    rng, cases = random.Random(0), itertools.cycle(CASES)
    words = [text.capitalize() for document in synth.tiny_world(1, "train", 4000, {"stated": 1})
             for text in synth.texts_of(document)]
    for key in range(ROWS):
        answer = []
        while sum(len(text.split()) for text in answer) < WORDS:
            answer.append(rng.choice(words))
        names, kwargs = zip(*(next(cases)[:2] for _ in range(rng.randint(1, 3))))
        yield {"key": key, "prompt": "", "instruction_id_list": names, "kwargs": kwargs,
               "response": "\n".join(answer)}


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows()), "utf-8")
        start = time.perf_counter()
        subprocess.run([sys.executable, "bench.py", f"score={path}", "suite=closed"], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - start
        results = json.loads(path.with_name(path.name + ".results.json").read_text("utf-8"))
    instructions = results["count"]["strict-instruction"]
    print(f"{ROWS} rows, {instructions} instructions, strict and the eight loose variants, "
          f"sentences by {results['tokenizer']}: {seconds:.1f} s from start to end")


if __name__ == "__main__":
    main()
