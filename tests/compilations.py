"""How often does `train.compile` compile, while packs, clips and documents change their lengths?

    python tests/compilations.py [key=value …]      200 steps of the tiny model, from the data of the folder here

Points of the gap curve and states fall in between. Writes results/compilations.json.
"""
import json
import shutil
import sys
from pathlib import Path

from torch._dynamo.utils import counters

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import inserter                                         # noqa: E402
import synth                                            # noqa: E402

STEPS = 200
SETTINGS = ["run=compilations", "train.compile=true", "train.eval_every=50", "train.save_every=100",
            f"train.stages={{pretrain: {{steps: {STEPS}}}}}"]


def main(arguments: list[str]) -> None:
    shutil.rmtree(Path("runs/compilations"), ignore_errors=True)
    inserter.main([*SETTINGS, *arguments])
    lines = [json.loads(line) for line in Path("runs/compilations/metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(Path("runs/compilations"))
    result = {"command": "python tests/compilations.py", "steps": STEPS,
              "points": sum("eval" in line for line in lines), "graphs compiled": counters["stats"]["unique_graphs"],
              "calls of compiled blocks": counters["stats"]["calls_captured"],
              "graph breaks": sum(counters["graph_break"].values())}
    print(result)
    synth.write_whole(ROOT / "results" / "compilations.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    synth.run(main)
