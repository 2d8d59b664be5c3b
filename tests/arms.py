"""What interleaving adds: three arms from one warm-up, equal in supervised tokens, with the same fine-tuning.

    python tests/arms.py 1    all of seed 1 into results/arms-1.json: warm-up, each arm before and after SFT
    python tests/arms.py      table and figure results/arms.png from results/arms-*.json

Each row of the table is one run; its command stands in the JSON. What is finished is not made again.
"""
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
ARMS = {
    "text only": "{text: 1.0}",
    "ASR in place of interleaving": "{tasks: 0.7, text: 0.3}",
    "InSerter": "{interleaved: 0.4, tasks: 0.3, text: 0.3}"}
TICKS = ["warm-up", "text only", "ASR in place\nof interleaving", "InSerter"]
TOKENS = 350_000                             # supervised tokens of every arm, fewer than tiny's
SFT = [
    "train.stages.sft.steps=350",
    "train.stages.sft.mix={chat: 0.8, interleaved: 0.0, tasks: 0.1, text: 0.1}"]         # no arm interleaves
FEW = ["bench.adjustment_rows=20", "bench.open_rows=20", "train.eval_samples=16"]     # not shown
NO_PRETRAIN = "train.stages.pretrain.steps=0"
NO_SFT = "train.stages.sft.steps=0"


def run_name(seed: int, arm: str, suffix: str = "") -> str:
    return f"arms-{seed}-{arm.split()[0].lower()}{suffix}"


def commands(seed: int) -> dict[str, list[str]]:
    """{run: arguments of inserter.py}, in the order in which they are run."""
    common = list(FEW)
    if seed > 1:
        common += [f"seed={seed}", f"data=data/seed-{seed}"]
    warmup = run_name(seed, "warmup")
    found = {warmup: [*common, NO_PRETRAIN, NO_SFT]}
    for arm, mix in ARMS.items():
        run = run_name(seed, arm)
        found[run] = [
            *common,
            f"model.from=runs/{warmup}/model",
            f"train.stages.pretrain.mix={mix}",
            "train.stages.pretrain.steps=null",
            f"train.stages.pretrain.tokens={TOKENS}",
            NO_SFT]
        found[f"{run}-sft"] = [*common, f"model.from=runs/{run}/model", NO_PRETRAIN, *SFT]
    return found


def figures(run: str) -> dict[str, list]:
    """What the table shows of a run: fractions, each with its 95 % interval."""
    results = json.loads((Path("runs") / run / "bench/results.json").read_text())
    standard = results["closed"]["standard"]
    found = {}
    for way in ("typed", "spoken"):
        found[way] = [standard[way]["strict-prompt"], standard[way]["interval"]["strict-prompt"]]
    heard = results["transcription"]["standard"]["spoken"]
    return found | {"WER": [heard["WER"], heard["interval"]["WER"]]}


def measure(seed: int) -> None:
    rows = {}
    for run, arguments in commands(seed).items():
        for script in ("inserter.py", "bench.py"):
            subprocess.run([sys.executable, ROOT / script, f"run={run}", *arguments], check=True)
        quoted = " ".join(f"'{argument}'" for argument in arguments)
        rows[run] = {"command": f"python inserter.py run={run} {quoted}", **figures(run)}
        results = json.dumps({"seed": seed, "runs": rows}, indent=1)
        (ROOT / f"results/arms-{seed}.json").write_text(results + "\n")


def print_row(title: str, seed: int, row: dict[str, list]) -> None:
    cells = []
    for key in ("WER", "typed", "spoken"):
        value, (low, high) = row[key]
        cells.append(f"{100 * value:5.1f} [{100 * low:.0f}, {100 * high:.0f}]")
    gap = 100 * (row["typed"][0] - row["spoken"][0])
    print(f"{title:<42}{seed:>4}{cells[0]:>17}{cells[1]:>16}{cells[2]:>16}{gap:>7.1f}")


def draw_row(axis: Any, x: float, row: dict[str, list], labelled: bool) -> None:
    """Three figures of a run with their intervals, side by side around x."""
    for shift, key, colour in ((-0.25, "typed", "0.6"), (0, "spoken", "#c33"), (0.25, "WER", "#36a")):
        value, (low, high) = row[key]
        below = 100 * max(value - low, 0)
        above = 100 * max(high - value, 0)
        axis.errorbar(x + shift, 100 * value, [[below], [above]], fmt="o", color=colour, ms=4, capsize=2,
                      label=key if labelled else None)


def show_panel(axis: Any, suffix: str, title: str, seeds: list[dict]) -> None:
    """The runs before or after SFT, of all seeds: their rows of the table, and their panel of the figure."""
    for i, arm in enumerate(["after the warm-up", *ARMS]):
        for measured in seeds:
            seed = measured["seed"]
            run = run_name(seed, arm, suffix) if i else run_name(seed, "warmup", suffix)
            row = measured["runs"].get(run)
            if row is None:                  # not yet measured; the warm-up has no SFT
                continue
            print_row(f"{arm}, {title}" if i else arm, seed, row)
            draw_row(axis, i + 0.08 * (seed - 1.5), row, labelled=i == 1 and measured is seeds[0])
    first = 1 if suffix else 0
    axis.set_xticks(range(first, 4), TICKS[first:])
    axis.set(title=title, ylim=(0, 105))
    axis.grid(axis="y", color="0.9")


def show() -> None:
    """Print the table of all seeds and draw it."""
    seeds = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("arms-*.json"))]
    print(f"{'arm':<42}seed   {'WER':>14}{'typed':>16}{'spoken':>16}{'gap':>7}")
    figure = Figure(figsize=(10, 4), layout="constrained")
    before, after = figure.subplots(1, 2, sharey=True)
    show_panel(before, "", "before SFT", seeds)
    show_panel(after, "-sft", "after SFT", seeds)
    before.set_ylabel("per cent")
    before.legend(loc="center left")
    figure.savefig(ROOT / "results/arms.png", dpi=110)


def main() -> None:
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]))
    else:
        show()


if __name__ == "__main__":
    main()
