"""What interleaving adds: arms from one warm-up, equal in supervised tokens, with the same fine-tuning.

    python experiments/arms.py 1    all of seed 1 into results/arms-1.json: warm-up, arms before and after SFT
    python experiments/arms.py      table and figure results/arms.png from results/arms-*.json

Each row of the table is one run in runs/arms-*; the JSON has its commands. What is finished there is not made
again. The warm-up trains on all cores; then as many arms as there are cores are trained at once, on a core
each, and write to runs/arms-*.log. All runs of a seed are asked the same clips, by bench.py, which finds the
prompts in its folder already: those of the standard condition alone, for nothing else is shown.
"""
import functools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from matplotlib.figure import Figure         # noqa: E402

import bench                                 # noqa: E402
import synth                                 # noqa: E402
from synth import UserError                  # noqa: E402

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
# No noise, which is learned faster, and half of the questions spoken. The gap curve is not shown. Arms are
# asked before SFT too, so their rate ends low.
COMMON = ["synth.noise.share=0.0", "synth.spoken_questions=0.5", "train.eval_samples=16", "train.stretch=0.0",
          "train.stages.pretrain.floor=0.02"]
WARMUP = ["train.stages.warmup_hear.steps=1530", "train.stages.pretrain.steps=0", "train.stages.sft.steps=0"]
SFT = [
    "train.stages.pretrain.steps=0",
    "train.stages.sft.steps=350",
    "train.stages.sft.mix={chat: 0.8, interleaved: 0.0, tasks: 0.1, text: 0.1}"]         # no arm interleaves
WRITING = ["given=tiny", "documents=12000", "temperature=0", "question_tokens=40", "reply_tokens=40",
           "batch=256"]
# As many shards as the arms read; for the warm-up and SFT all that config.yaml has.
DATA = {
    "word": ["synth.shards={interleaved: 4, tasks: 8, text: 12, chat: 9}"],
    "sentence": ["synth.level=sentence", "synth.share=0.4",
                 "synth.shards={interleaved: 4, tasks: 2, text: 4}"],
    "own": ["synth.shards={continuation: 12}"]}
Lines = list[list[str]]                      # commands, each a script and its arguments


# --------------------------------------------------------------------------------------------------
# 1. The runs and their commands
# --------------------------------------------------------------------------------------------------

def run_name(seed: int, arm: str, suffix: str = "") -> str:
    short = arm.lower().replace(" + ", "-").replace(", ", "-").split()[0]
    return f"arms-{seed}-{short}{suffix}"


def settings_of(seed: int, data: str) -> list[str]:
    """The settings of all commands on data of the tiny world, word or sentence, or of the warm-up's own."""
    folder = f"data/seed-{seed}" + ("" if data == "word" else f"-{data}")
    corpus = [f"synth.corpus={folder}.jsonl"] if data == "own" else []
    return [f"seed={seed}", *COMMON, f"data={folder}", *DATA[data], *corpus]


def model_of(run: str) -> str:
    return f"model.from=runs/{run}/model"


def training_of(seed: int, run: str, data: str, *arguments: str) -> list[str]:
    return ["inserter.py", f"run={run}", *settings_of(seed, data), *arguments]


def asking(seed: int, run: str) -> list[str]:
    return ["bench.py", f"run={run}", f"seed={seed}"]


def shared_commands(seed: int) -> dict[str, Lines]:
    """{run: commands} of what all arms need: the warm-up, what it writes, and the other data."""
    warmup = run_name(seed, "warmup")
    own = f"to=data/seed-{seed}-own.jsonl"
    return {
        warmup: [training_of(seed, warmup, "word", *WARMUP), asking(seed, warmup)],
        f"{warmup}-writes": [
            ["extras/align.py", own, f"seed={seed}", model_of(warmup), *WRITING],
            ["synth.py", *settings_of(seed, "own")],
            ["synth.py", *settings_of(seed, "sentence")]]}


def arm_commands(seed: int, arm: str) -> dict[str, Lines]:
    """{run: commands} of an arm, before SFT and after; the last command of both asks the run."""
    lines = []
    below = run_name(seed, "warmup")
    for suffix, stage, mix, tokens, data in ARMS[arm]:
        run = run_name(seed, arm, suffix)
        lines.append(training_of(
            seed, run, data, model_of(below), "train.stages.pretrain.steps=0", "train.stages.sft.steps=0",
            f"train.stages.{stage}.mix={mix}", f"train.stages.{stage}.tokens={tokens}"))
        below = run
    tuned = f"{run}-sft"
    return {
        run: [*lines, asking(seed, run)],
        tuned: [training_of(seed, tuned, "word", model_of(run), *SFT), asking(seed, tuned)]}


# --------------------------------------------------------------------------------------------------
# 2. Making them
# --------------------------------------------------------------------------------------------------

class Measured:
    """results/arms-<seed>.json: what is finished."""

    def __init__(self, seed: int):
        self.seed = seed
        self.path = ROOT / "results" / f"arms-{seed}.json"
        self.lock = threading.Lock()
        rows = json.loads(self.path.read_text())["runs"] if self.path.is_file() else {}
        runs = shared_commands(seed)
        for arm in ARMS:
            runs |= arm_commands(seed, arm)
        # those that other commands made are forgotten
        self.rows = {run: row for run, row in rows.items() if row["commands"] == printed(runs.get(run, []))}

    def has(self, run: str) -> bool:
        return run in self.rows and results_of(run).is_file()

    def add(self, run: str, lines: Lines) -> None:
        with self.lock:
            self.rows[run] = {"commands": printed(lines), **figures(run)}
            text = json.dumps({"seed": self.seed, "runs": self.rows}, indent=1)
            synth.write_whole(self.path, text.encode() + b"\n")
            print_row(run, self.seed, self.rows[run])


def printed(lines: Lines) -> list[str]:
    return ["python " + " ".join(f"'{part}'" if "{" in part else part for part in line) for line in lines]


def results_of(run: str) -> Path:
    return Path("runs") / run / "bench" / "results.json"


def figures(run: str) -> dict[str, list]:
    """What the table shows of a run: fractions, each with its 95 % interval."""
    lines = json.loads(results_of(run).read_text())["figures"]
    by_name = {(line["suite"], line["figure"]): line for line in lines if line["condition"] == "standard"}
    followed = by_name["closed", "strict-prompt"]
    found = {"typed": followed["typed"], "spoken": followed["spoken"]}
    found["WER"] = by_name["transcription", "WER"]["spoken"]
    return {name: [value, interval] for name, (value, *interval) in found.items()}


def speak_prompts(seed: int) -> None:
    """Speak the tiny suite once; keep the closed-ended prompts, typed and spoken, and clips to write down."""
    folder = Path("runs") / f"arms-{seed}-prompts"
    if (folder / "prompts.jsonl").is_file():
        return
    _, *settings = asking(seed, run_name(seed, "warmup"))       # whose voices the test must not have
    rows = bench.spoken_suite(synth.load_config(settings), folder)
    kept = [row for row in rows if row["condition"] == "standard" and row["suite"] != "adjustment"]
    for row in kept:
        if row["audio_path"]:                # as seen from another run's folder
            row["audio_path"] = f"../../{folder.name}/{row['audio_path']}"
    synth.write_whole(folder / "prompts.jsonl", bench.jsonl(kept))


def execute(seed: int, run: str, lines: Lines, threads: int) -> None:
    """Run the commands in turn; each goes on with what an interrupted one has left."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    log = Path("runs") / f"{run}.log"
    log.parent.mkdir(exist_ok=True)
    for script, *arguments in lines:
        if script == "bench.py":
            speak_prompts(seed)
            prompts = Path("runs") / f"arms-{seed}-prompts" / "prompts.jsonl"
            synth.write_whole(results_of(run).with_name("prompts.jsonl"), prompts.read_bytes())
        print(f"{run}: {script}", flush=True)
        with open(log, "a") as file:
            command = [sys.executable, ROOT / script, *arguments]
            done = subprocess.run(command, stdout=file, stderr=file, env=environment)
        if done.returncode:
            raise UserError(f"{script} failed; {log} says why. Start again when it is mended: what is "
                            "finished is kept.")


def make_arm(measured: Measured, threads: int, arm: str) -> None:
    for run, lines in arm_commands(measured.seed, arm).items():
        if not measured.has(run):
            execute(measured.seed, run, lines, threads)
            measured.add(run, lines)


def measure(seed: int) -> None:
    measured = Measured(seed)
    cores = os.cpu_count()
    for run, lines in shared_commands(seed).items():
        if not measured.has(run):
            execute(seed, run, lines, cores)
            if lines[-1][0] == "bench.py":
                measured.add(run, lines)
    workers = min(cores, len(ARMS))
    make = functools.partial(make_arm, measured, cores // workers)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(make, reversed(ARMS)))           # the longest first


# --------------------------------------------------------------------------------------------------
# 3. Table and figure
# --------------------------------------------------------------------------------------------------

def print_row(title: str, seed: int, row: dict[str, list]) -> None:
    cells = []
    for key in ("WER", "typed", "spoken"):
        value, (low, high) = row[key]
        cells.append(f"{100 * value:5.1f} [{100 * low:.0f}, {100 * high:.0f}]")
    gap = 100 * (row["typed"][0] - row["spoken"][0])
    print(f"{title:<44}{seed:>4}{cells[0]:>17}{cells[1]:>16}{cells[2]:>16}{gap:>7.1f}", flush=True)


def draw_row(axis: Any, x: float, row: dict[str, list], labelled: bool) -> None:
    """Three figures of a run with their intervals, side by side around x."""
    for shift, key, colour in ((-0.25, "typed", "0.6"), (0, "spoken", "#c33"), (0.25, "WER", "#36a")):
        value, (low, high) = row[key]
        below = 100 * max(value - low, 0)
        above = 100 * max(high - value, 0)
        if value > 1:                        # as many words made up as were said
            height = 98 if x > round(x) else 102            # those of two seeds one above the other
            axis.text(x + shift, height, f"{100 * value:.0f}", color=colour, fontsize=7, ha="center",
                      va="center")
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
    figure.savefig(ROOT / "results" / "arms.png", dpi=110)


def main(arguments: list[str]) -> None:
    if arguments:
        measure(int(arguments[0]))
    else:
        show()


if __name__ == "__main__":
    synth.run(main)
