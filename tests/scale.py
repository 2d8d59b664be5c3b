"""What does a reading process need before its first pack, and does it grow with the corpus?

    python tests/scale.py [folder of another checkout, to compare with]

Shards are faked: real indexes, beside them files of the right size that hold nothing. Measured in a fresh process
after its imports: seconds and megabytes until every lane knows the shards of its mix and has opened its first ones.
Writes results/scale.json.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = {                                               # {recipe: (shards, samples in each)}
    "a tenth of profile=qwen": {"interleaved": (100, 2000), "tasks": (70, 8000), "text": (100, 2000)},
    "profile=qwen": {"interleaved": (1000, 2000), "tasks": (700, 8000), "text": (1000, 2000)},
    "270,000 shards": {"text": (270_000, 20)}}
LANES = 8                                               # of one reading process: 64 packs, 8 ranks or 2 and 4 readers

MEASURE = """
import json, resource, sys, time
root, data, shards = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, root)
import inserter, synth
mix = {name: 1.0 for name in shards}
c = synth.load_config([f"data={data}", "train.stages={one: {steps: 1, mix: %s}}" % json.dumps(mix),
                       "synth.shards=%s" % json.dumps({name: many for name, (many, _) in shards.items()})])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
recipes = {name: inserter.Recipe(c, name, "one") for name in mix}
for lane in range(LANES):
    for recipe in recipes.values():
        path, number = recipe.locate(0, lane * recipe.total // LANES)
        if hasattr(synth, "open_shard"):
            synth.open_shard(path)
        else:
            synth.read_index(path)
seconds = time.perf_counter() - begun
print(json.dumps([seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def fake(folder: Path, shards: dict[str, tuple[int, int]]) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    for recipe, (many, samples) in shards.items():
        (folder / recipe).mkdir(parents=True)
        rows = [[f"{recipe}-train-{i:06d}", 2048 * i, 2048, digest] for i in range(samples)]
        index = json.dumps({"count": samples, "counts": {"samples": samples}, "samples": rows})
        for number in range(many):
            path = folder / recipe / f"train-{number:06d}.tar"
            path.with_suffix(".json").write_text(index)
            path.touch()
            os.truncate(path, 2048 * samples + 1024)


def measured(root: Path, data: Path, shards: dict) -> tuple[float, float] | None:
    command = [sys.executable, "-c", MEASURE.replace("LANES", str(LANES)), str(root), str(data), json.dumps(shards)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
        return None
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main(others: list[str]) -> None:
    checkouts = {"this": ROOT} | {f"other {i}": Path(other) for i, other in enumerate(others, 1)}
    rows = []
    print(f"{'':26}{'checkout':>10}{'seconds':>10}{'MB':>8}")
    for case, shards in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            fake(Path(folder) / "data", shards)
            for name, root in checkouts.items():
                seen = measured(root, Path(folder) / "data", shards)
                if seen:
                    rows.append({"case": case, "checkout": name, "seconds": seen[0], "MB": seen[1]})
                    print(f"{case:26}{name:>10}{seen[0]:>10.2f}{seen[1]:>8.0f}", flush=True)
    result = {"command": "python tests/scale.py", "rows": rows}
    (ROOT / "results" / "scale.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
