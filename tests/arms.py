"""What interleaving adds: three arms from one warm-up checkpoint, equal in supervised tokens, with the same SFT.

    python tests/arms.py 1        everything of seed 1 into results/arms-1.json: warm-up, then each arm before and after SFT
    python tests/arms.py          table and figure results/arms.png from results/arms-*.json

Each row of the table is one run; its command stands in the JSON. What is finished is not made again.
"""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARMS = {"text only": "{text: 1.0}", "ASR in place of interleaving": "{tasks: 0.7, text: 0.3}",
        "InSerter": "{interleaved: 0.4, tasks: 0.3, text: 0.3}"}
TOKENS = 350_000                                        # supervised tokens of every arm; both stages are shorter than tiny's
SFT = ["train.stages.sft.steps=350", "train.stages.sft.mix={chat: 0.8, interleaved: 0.0, tasks: 0.1, text: 0.1}"]     # no arm interleaves
FEW = ["bench.adjustment_rows=20", "bench.open_rows=20", "train.eval_samples=16"]       # of which nothing is shown
SKIP = {stage: f"train.stages.{stage}.steps=0" for stage in ("pretrain", "sft")}


def commands(seed: int) -> dict[str, list[str]]:
    """{run: arguments of inserter.py}, in the order in which they are run."""
    name, common = f"arms-{seed}", FEW + ([f"seed={seed}", f"data=data/seed-{seed}"] if seed > 1 else [])
    found = {f"{name}-warmup": [*common, *SKIP.values()]}
    for arm, mix in ARMS.items():
        run = f"{name}-{arm.split()[0].lower()}"
        found[run] = [*common, f"model.from=runs/{name}-warmup/model", f"train.stages.pretrain.mix={mix}",
                      "train.stages.pretrain.steps=null", f"train.stages.pretrain.tokens={TOKENS}", SKIP["sft"]]
        found[f"{run}-sft"] = [*common, f"model.from=runs/{run}/model", SKIP["pretrain"], *SFT]
    return found


def figures(run: str) -> dict:
    """What the table shows of a run: fractions, with their 95 % intervals."""
    results = json.loads((Path("runs") / run / "bench/results.json").read_text())
    standard, heard = results["closed"]["standard"], results["transcription"]["standard"]["spoken"]
    return {"typed": [standard["typed"]["strict-prompt"], standard["typed"]["interval"]["strict-prompt"]],
            "spoken": [standard["spoken"]["strict-prompt"], standard["spoken"]["interval"]["strict-prompt"]],
            "WER": [heard["WER"], heard["interval"]["WER"]]}


def measure(seed: int) -> None:
    rows = {}
    for run, arguments in commands(seed).items():
        for script in ("inserter.py", "bench.py"):
            subprocess.run([sys.executable, ROOT / script, f"run={run}", *arguments], check=True)
        rows[run] = {"command": f"python inserter.py run={run} " + " ".join(f"'{a}'" for a in arguments), **figures(run)}
        (ROOT / f"results/arms-{seed}.json").write_text(json.dumps({"seed": seed, "runs": rows}, indent=1) + "\n")


def show() -> None:
    """Print the table of all seeds and draw it."""
    from matplotlib.figure import Figure
    seeds = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("arms-*.json"))]
    print(f"{'arm':<42}seed   {'WER':>14}{'typed':>16}{'spoken':>16}{'gap':>7}")
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, suffix, title in zip(figure.subplots(1, 2, sharey=True), ("", "-sft"), ("before SFT", "after SFT")):
        for at, arm in enumerate(["after the warm-up", *ARMS]):
            for measured in seeds:
                run = f"arms-{measured['seed']}-" + (arm.split()[0].lower() + suffix if at else "warmup")
                row = measured["runs"].get(run)
                if row is None or (not at and suffix):
                    continue
                cells = [f"{100 * row[key][0]:5.1f} [{100 * row[key][1][0]:.0f}, {100 * row[key][1][1]:.0f}]" for key in ("WER", "typed", "spoken")]
                gap = 100 * (row["typed"][0] - row["spoken"][0])
                print(f"{arm + (', ' + title if at else ''):<42}{measured['seed']:>4}{cells[0]:>17}{cells[1]:>16}{cells[2]:>16}{gap:>7.1f}")
                for shift, key, colour in ((-0.25, "typed", "0.6"), (0, "spoken", "#c33"), (0.25, "WER", "#36a")):
                    value, (low, high) = row[key]
                    x = at + shift + 0.08 * (measured["seed"] - 1.5)
                    axis.errorbar(x, 100 * value, [[100 * max(value - low, 0)], [100 * max(high - value, 0)]], fmt="o", color=colour,
                                  ms=4, capsize=2, label=key if (at, measured) == (1, seeds[0]) else None)
        first = 1 if suffix else 0                                    # the warm-up has no SFT
        axis.set_xticks(range(first, 4), ["warm-up", "text only", "ASR in place\nof interleaving", "InSerter"][first:])
        axis.set(title=title, ylim=(0, 105))
        axis.grid(axis="y", color="0.9")
    figure.axes[0].set_ylabel("per cent")
    figure.axes[0].legend(loc="center left")
    figure.savefig(ROOT / "results/arms.png", dpi=110)


if __name__ == "__main__":
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else show()
