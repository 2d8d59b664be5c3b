"""What interleaving adds: arms from one warm-up, equal in supervised tokens, with the same fine-tuning.

    python tests/arms.py 1    all of seed 1 into results/arms-1.json: warm-up, each arm before and after SFT
    python tests/arms.py      table and figure results/arms.png from results/arms-*.json

Each row of the table is one run in runs/arms-*; its commands stand in the JSON. What is finished there is not made
again.
"""
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
TOKENS = 350_000                             # supervised tokens of every arm, fewer than tiny's
ALIGN = 100_000                              # of them, where continuation is stacked on top
PAPER = "{interleaved: 0.4, tasks: 0.3, text: 0.3}"
# An arm is a few runs, one on top of the other: (suffix, stage, mix, tokens, which data).
ARMS = {
    "text only": [("", "pretrain", "{text: 1.0}", TOKENS, "word")],
    "ASR in place of interleaving": [("", "pretrain", "{tasks: 0.7, text: 0.3}", TOKENS, "word")],
    "InSerter": [("", "pretrain", PAPER, TOKENS, "word")],
    "InSerter, sentence level": [("", "pretrain", PAPER, TOKENS, "sentence")],
    "continuation alone": [("", "align", "{continuation: 1.0}", TOKENS, "own")],
    "InSerter + continuation": [
        ("-below", "pretrain", PAPER, TOKENS - ALIGN, "word"),
        ("", "align", "{continuation: 1.0}", ALIGN, "own")]}
TICKS = ["warm-up", "text only", "ASR in place\nof interleaving", "InSerter", "InSerter,\nsentence level",
         "continuation\nalone", "InSerter +\ncontinuation"]
SFT = [
    "train.stages.sft.steps=350",
    "train.stages.sft.mix={chat: 0.8, interleaved: 0.0, tasks: 0.1, text: 0.1}"]         # no arm interleaves
# No noise, which is learned faster, and half of the questions spoken
CLEAN = ["synth.noise.share=0.0", "synth.spoken_questions=0.5",
         "train.stages.warmup_hear.steps=1530", "train.stages.warmup_hear.packs=1"]
FEW = ["bench.adjustment_rows=20", "bench.open_rows=20", "train.eval_samples=16"]     # not shown
NOTHING = {stage: f"train.stages.{stage}.steps=0" for stage in ("pretrain", "align", "sft")}
WRITING = ["writing.to=tiny", "writing.documents=12000", "writing.temperature=0", "writing.tokens=[40, 40]",
           "bench.batch=256"]


def run_name(seed: int, arm: str, suffix: str = "") -> str:
    short = arm.lower().replace(" + ", "-").replace(", ", "-").split()[0]
    return f"arms-{seed}-{short}{suffix}"


def data_of(seed: int, kind: str) -> list[str]:
    """Where an arm's data stands, and what it is made of: of the tiny world, or of what the warm-up wrote."""
    folder = f"data/seed-{seed}"
    if kind == "word":
        return [f"data={folder}"]
    if kind == "sentence":
        return [f"data={folder}-sentence", "synth.level=sentence", "synth.share=0.4"]
    return [f"data={folder}-own", f"synth.corpus={folder}-own.jsonl", "synth.shards={continuation: 12}"]


def commands(seed: int) -> dict[str, list[list[str]]]:
    """{run: command lines that make it}, in the order in which they are run."""
    common = [*FEW, *CLEAN, f"seed={seed}"]
    warmup = run_name(seed, "warmup")
    from_warmup = f"model.from=runs/{warmup}/model"
    made = {kind: ["synth.py", *common, *data_of(seed, kind)] for kind in ("word", "sentence", "own")}
    found = {warmup: [
        made["word"],
        ["inserter.py", f"run={warmup}", *common, *data_of(seed, "word"), *NOTHING.values()]]}
    own = data_of(seed, "own")[1].partition("=")[2]
    written = ["inserter.py", f"write={own}", *common, *data_of(seed, "word"), from_warmup, *WRITING]
    for arm, below in ARMS.items():
        lines = [written] if below[-1][-1] == "own" else []
        lines += [made[kind] for kind in sorted({kind for *_, kind in below})]
        start = from_warmup
        for suffix, stage, mix, tokens, kind in below:
            run = run_name(seed, arm, suffix)
            others = [argument for name, argument in NOTHING.items() if name != stage]
            lines.append(["inserter.py", f"run={run}", *common, *data_of(seed, kind), start, *others,
                          f"train.stages.{stage}.mix={mix}", f"train.stages.{stage}.steps=null",
                          f"train.stages.{stage}.tokens={tokens}"])
            start = f"model.from=runs/{run}/model"
        found[run] = lines
        found[f"{run}-sft"] = [["inserter.py", f"run={run}-sft", *common, *data_of(seed, "word"), start,
                                NOTHING["pretrain"], NOTHING["align"], *SFT]]
    for run, lines in found.items():
        lines.append(["bench.py", f"run={run}", *common, *data_of(seed, "word")])
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
    path = ROOT / f"results/arms-{seed}.json"
    rows = json.loads(path.read_text())["runs"] if path.is_file() else {}
    for run, lines in commands(seed).items():
        spoken = ["python " + " ".join(f"'{part}'" if "{" in part or "[" in part else part for part in line)
                  for line in lines]
        done = (Path("runs") / run / "bench/results.json").is_file()
        if done and rows.get(run, {}).get("commands") == spoken:
            continue
        for line in lines:
            subprocess.run([sys.executable, ROOT / line[0], *line[1:]], check=True)
        rows[run] = {"commands": spoken, **figures(run)}
        path.write_text(json.dumps({"seed": seed, "runs": rows}, indent=1) + "\n")


def print_row(title: str, seed: int, row: dict[str, list]) -> None:
    cells = []
    for key in ("WER", "typed", "spoken"):
        value, (low, high) = row[key]
        cells.append(f"{100 * value:5.1f} [{100 * low:.0f}, {100 * high:.0f}]")
    gap = 100 * (row["typed"][0] - row["spoken"][0])
    print(f"{title:<44}{seed:>4}{cells[0]:>17}{cells[1]:>16}{cells[2]:>16}{gap:>7.1f}")


def draw_row(axis: Any, x: float, row: dict[str, list], labelled: bool) -> None:
    """Three figures of a run with their intervals, side by side around x."""
    for shift, key, colour in ((-0.25, "typed", "0.6"), (0, "spoken", "#c33"), (0.25, "WER", "#36a")):
        value, (low, high) = row[key]
        below = 100 * max(value - low, 0)
        above = 100 * max(high - value, 0)
        if value > 1:                        # as many words made up as were said
            height = 98 if x > round(x) else 102            # those of two seeds one above the other
            axis.text(x + shift, height, f"{100 * value:.0f}", color=colour, fontsize=7, ha="center", va="center")
            continue
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
    axis.set_xticks(range(first, len(TICKS)), TICKS[first:], fontsize=7)
    axis.set(title=title, xlim=(first - 0.5, len(TICKS) - 0.5), ylim=(0, 107))
    axis.grid(axis="y", color="0.9")


def show() -> None:
    """Print the table of all seeds and draw it."""
    seeds = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("arms-*.json"))]
    print(f"{'arm':<44}seed   {'WER':>14}{'typed':>16}{'spoken':>16}{'gap':>7}")
    figure = Figure(figsize=(13, 4), layout="constrained")
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
