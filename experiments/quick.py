"""profile=quick from nothing to figures, five minutes a run; its rows stand in results/quick.json.

    python experiments/quick.py                          with interleaving and without, three seeds of each
    python experiments/quick.py NAME [key=value …]       one run with other settings: the exercises

All three scripts get the settings; those of synth.* get data of their own.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import arms                                  # noqa: E402
import synth                                 # noqa: E402

RESULTS = ROOT / "results" / "quick.json"
WITHOUT = "train.stages.pretrain.mix={tasks: 0.7, text: 0.3}"


def measure(name, seed, settings):
    """Run the three scripts, time each, add a row to the results and print it."""
    run = f"quick-{name}-{seed}"
    shapes_data = any(setting.startswith("synth.") for setting in settings)
    data = f"data-quick/{name if shapes_data else 'default'}-{seed}"
    settings = [f"run={run}", f"seed={seed}", f"data={data}", *settings]
    seconds = {}
    for script in ("synth.py", "inserter.py", "bench.py"):
        begin = time.monotonic()
        done = subprocess.run([sys.executable, ROOT / script, "profile=quick", *settings])
        if done.returncode:
            raise synth.UserError(f"{script} failed; what it printed says why.")
        seconds[script] = round(time.monotonic() - begin, 1)
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows[run] = {"settings": settings, "seconds": seconds, **arms.figures(run)}
    synth.write_whole(RESULTS, json.dumps(rows, indent=1).encode() + b"\n")
    arms.print_row(name, seed, rows[run])


def main(arguments):
    if arguments:
        name, *settings = arguments
        seed = next((int(setting[5:]) for setting in settings if setting.startswith("seed=")), 1)
        measure(name, seed, [setting for setting in settings if not setting.startswith("seed=")])
        return
    for seed in (1, 2, 3):
        measure("interleaving", seed, [])
        measure("transcription", seed, [WITHOUT])


if __name__ == "__main__":
    synth.run(main)
