"""How long `python bench.py score=… suite=closed` takes from start to end, on one thread: 541 rows.

    python experiments/score_speed.py
"""
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bench                                 # noqa: E402
import synth                                 # noqa: E402

ROWS = 541
WORDS = 300                                  # of an answer
ARGUMENTS = {                                # of the checks that take some
    "change_case:capital_word_frequency": {"capital_frequency": 3, "capital_relation": "at least"},
    "combination:repeat_prompt": {"prompt_to_repeat": "Name a fruit."},
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "keywords:existence": {"keywords": ["apple", "river"]},
    "keywords:forbidden_words": {"forbidden_words": ["rain", "stone"]},
    "keywords:frequency": {"keyword": "river", "frequency": 2, "relation": "at least"},
    "keywords:letter_frequency": {"letter": "e", "let_frequency": 9, "let_relation": "at least"},
    "language:response_language": {"language": "en"},
    "length_constraints:nth_paragraph_first_word":
        {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "Tom"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 3},
    "length_constraints:number_sentences": {"relation": "less than", "num_sentences": 60},
    "length_constraints:number_words": {"relation": "at least", "num_words": 300},
    "startend:end_checker": {"end_phrase": "That is all."}}


def draw_rows() -> Iterator[dict]:
    """Answers of the tiny world's stories, a line each; one to three instructions, all types in turn."""
    rng = random.Random(0)
    names = cycle(bench.CHECKS)
    texts = [text.capitalize() for document in synth.tiny_world(1, "train", 4000, {"stated": 1})
             for text in synth.texts_of(document)]
    for key in range(ROWS):
        answer = []
        while sum(len(text.split()) for text in answer) < WORDS:
            answer.append(rng.choice(texts))
        instructions = [next(names) for _ in range(rng.randint(1, 3))]
        yield {
            "key": key,
            "prompt": "",
            "instruction_id_list": instructions,
            "kwargs": [ARGUMENTS.get(name, {}) for name in instructions],
            "response": "\n".join(answer)}


def main(arguments: list[str]) -> None:
    rows = list(draw_rows())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        path.write_bytes(bench.jsonl(rows))
        command = [sys.executable, ROOT / "bench.py", f"score={path}", "suite=closed"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        seconds = time.perf_counter() - begun
    instructions = sum(len(row["kwargs"]) for row in rows)
    print(f"{ROWS} rows, {instructions} instructions, strict and the eight loose variants: {seconds:.1f} s")


if __name__ == "__main__":
    synth.run(main)
