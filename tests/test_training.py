"""Training runs, whole: the same for any number of ranks and readers, the same after any interruption."""
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import inserter
import synth

ROOT = Path(__file__).parents[1]
TINY = [
    "model.encoder_layers=1",
    "model.encoder_width=32",
    "model.encoder_heads=2",
    "model.llm_layers=1",
    "model.llm_width=32",
    "model.llm_heads=2",
    "model.llm_kv_heads=1",
    "model.llm_ffn=48",
    "model.vocab=600",
    "train.pack_length=192",
    "train.packs_at_once=1",
    "train.log_every=1",
    "train.eval_every=1000",
    "train.eval_samples=4",
    "train.workers=0",
    "train.save_every=2",
    "train.stage.optimizer=adamw",
    "bench.max_tokens=4",
    "run=t"]
MIX = "{interleaved: 0.4, tasks: 0.3, text: 0.3}"
COMMON = ("packs: 4, lr: 1.0e-2, muon_lr: 0.02, lr_scale: {encoder: 1.0, adapter: 1.0, llm: 1.0}, ramp: 2, "
          "floor: 0.1")


def stages(*steps: int, common: str = COMMON) -> str:
    """Stages of so many steps each: `pretrain` on the mix of recipes, then perhaps `sft` on dialogues."""
    both = [f"pretrain: {{steps: {steps[0]}, mix: {MIX}, {common}}}"]
    both += [f"sft: {{steps: {n}, mix: {{chat: 1.0}}, {common}}}" for n in steps[1:]]
    return f"train.stages={{{', '.join(both)}}}"


class Runner:
    """Speaks to runner.py."""

    def __init__(self, data: list[str]):
        self.data = data
        command = [sys.executable, ROOT / "tests" / "runner.py"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def settings(self, *arguments: str) -> list[str]:
        """The command line of a tiny run; a later argument replaces an earlier one of the same key."""
        given = {argument.partition("=")[0]: argument for argument in (*self.data, *TINY, *arguments)}
        return list(given.values())

    def __call__(self, folder: Path, *arguments: str, **options: object) -> dict:
        """Run inserter.py in `folder` and wait for it; the options are those of runner.py."""
        folder.mkdir(exist_ok=True)
        job = {"folder": str(folder), "arguments": self.settings(*arguments), **options}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def runner(small_data, tmp_path_factory):
    """A copy of the data: the small vocabulary of these models has its own tokenizer."""
    *settings, data = small_data
    copy = tmp_path_factory.mktemp("training") / "data"
    shutil.copytree(data.removeprefix("data="), copy, ignore=shutil.ignore_patterns("tokenizer"))
    runner = Runner([*settings, f"data={copy}"])
    yield runner
    runner.process.stdin.close()
    runner.process.wait()


def metrics(folder: Path, *keys: str) -> list[tuple]:
    """(step, stage, *keys) of every logged step."""
    lines = (folder / "runs/t/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    return [tuple(row[key] for key in ("step", "stage", *keys)) for row in rows]


def states(folder: Path) -> list[Path]:
    return sorted((folder / "runs/t/state").glob("[0-9]*"))


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def weights(folder: Path) -> list[str]:
    """SHA-256 of the last state's tensors and of the exported weights."""
    newest = states(folder)[-1]
    return [digest(newest / "state.safetensors"), digest(folder / "runs/t/model/model.safetensors")]


def same_end(folder: Path, reference: Path) -> None:
    keys = ("loss", "batch", "grad norm")
    assert metrics(folder, *keys) == metrics(reference, *keys)
    assert weights(folder) == weights(reference)
    assert not list((folder / "runs/t").rglob(".*")), "nothing of an interrupted save is left"


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --------------------------------------------------------------------------------------------------
# 1. The same for any number of ranks and readers
# --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def many(runner, tmp_path_factory):
    """20 steps, every state kept, from the model of another run: a fresh one has gradients of zero."""
    folder = tmp_path_factory.mktemp("first")
    assert runner(folder, stages(4))["codes"] == [0]
    return [
        stages(20),
        "train.save_every=1",
        "train.keep_states=100",
        "train.clip=1e9",
        "train.weight_decay=0.0",
        f"model.from={folder / 'runs/t/model'}"]


@pytest.fixture(scope="module")
def twenty(runner, many, tmp_path_factory):
    """One process that reads for itself."""
    folder = tmp_path_factory.mktemp("twenty")
    done = runner(folder, *many, draw=True)
    assert done["codes"] == [0], done
    assert "next: python bench.py" in done["out"]
    assert (folder / "runs/t/curves.png").read_bytes().startswith(b"\x89PNG")
    return folder


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_processes_change_nothing(runner, many, twenty, tmp_path, workers):
    assert runner(tmp_path, *many, f"train.workers={workers}")["codes"] == [0]
    same_end(tmp_path, twenty)
    assert len(metrics(tmp_path)) == 20
    assert len(set(metrics(tmp_path, "batch"))) == 20


def tensors(folder: Path, step: int, prefix: str) -> dict[str, Tensor]:
    """{name without its prefix: tensor} of the state of a step."""
    found = load_file(folder / f"runs/t/state/{step:08d}/state.safetensors")
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def all_weights(folder: Path, step: int) -> Tensor:
    """Every trained weight of the state of a step, as one vector."""
    named = tensors(folder, step, "weight.")
    return torch.cat([tensor.flatten() for name, tensor in named.items() if "embed_positions" not in name])


def test_two_ranks_train_the_same_model_with_adamw(runner, many, twenty, tmp_path):
    assert runner(tmp_path, *many, world=2)["codes"] == [0, 0]
    keys = ("batch", "targets", "waste")
    assert metrics(tmp_path, *keys) == metrics(twenty, *keys)
    one, two = (tensors(folder, 1, "optim.exp_avg.") for folder in (twenty, tmp_path))
    assert len(one) > 30
    gradients = max(distance(two[name], one[name]) for name in one)      # times 1 - beta1
    assert gradients < 1e-6
    after = distance(all_weights(tmp_path, 5), all_weights(twenty, 5))
    assert after < 1e-5
    print(f"\n1 and 2 ranks, AdamW: gradients of step 1 within {gradients:.1e}, "
          f"weights after 5 steps {after:.1e}")


def test_a_ctc_stage_on_two_ranks(runner, many, tmp_path):
    """It does not run the LLM's blocks: their weights stay, and no rank waits for their gradients."""
    ctc = f"train.stages={{pretrain: {{ctc: true, steps: 3, mix: {{tasks: 1.0}}, {COMMON}}}}}"
    one, two = tmp_path / "1", tmp_path / "2"
    assert runner(one, *many, ctc, world=1)["codes"] == [0]
    assert runner(two, *many, ctc, world=2)["codes"] == [0, 0]
    first, last, other = all_weights(one, 1), all_weights(one, 3), all_weights(two, 3)
    assert distance(other, last) < 1e-5 < distance(first, last)
    before, after = (tensors(one, step, "weight.") for step in (1, 3))
    blocks = [name for name in before if name.startswith("language_model.model.layers")]
    assert blocks
    assert all(torch.equal(before[name], after[name]) for name in blocks)


def test_two_ranks_with_muon(runner, many, twenty, tmp_path):
    """Muon rounds to bfloat16: ids and first gradients agree, then the weights drift."""
    folders = [tmp_path / "1", tmp_path / "2"]
    for world, folder in enumerate(folders, 1):
        done = runner(folder, *many, stages(5), "train.stage.optimizer=muon", world=world)
        assert done["codes"] == [0] * world
        assert metrics(folder, "batch") == metrics(twenty, "batch")[:5]
    one, two = (tensors(folder, 1, "optim.momentum_buffer.") for folder in folders)
    assert len(one) >= 14
    assert max(distance(two[name], one[name]) for name in one) < 1e-6
    one, two = (all_weights(folder, 5) for folder in folders)
    print(f"\n1 and 2 ranks, Muon: weights after 5 steps differ by {distance(two, one):.1e}")


def test_a_hearing_stage_leaves_the_llm_as_it_was(runner, many, tmp_path):
    """CTC over sampled classes, two ranks: the LLM's weights stay to the bit, encoder and adapter move, and what is
    heard ends up as long as the LLM's embeddings."""
    hear = ("{hear: {ctc: true, ctc_classes: 40, steps: 6, mix: {tasks: 1.0}, packs: 2, lr: 1.0e-2, muon_lr: 0.05, "
            "lr_scale: {encoder: 1.0, adapter: 1.0, llm: 0.0}}}")
    given = next(argument for argument in many if argument.startswith("model.from="))
    done = runner(tmp_path, given, f"train.stages={hear}", "train.stage.optimizer=muon", world=2)
    assert done["codes"] == [0, 0], done
    lines = (tmp_path / "runs/t/metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "eval" in row] == [0, 6]     # before and after
    before = load_file(Path(given.removeprefix("model.from=")) / "model.safetensors")
    after = load_file(tmp_path / "runs/t/model/model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("language_model"))
    assert distance(after["audio_tower.conv1.weight"], before["audio_tower.conv1.weight"]) > 0.003
    c = synth.load_config(runner.settings(given))
    tok = inserter.load_tokenizer(c)
    path = inserter.Recipe(c, "tasks", "").path(0)
    clips = [clip for number in range(64) for clip in inserter.read_encoded(path, number, tok).clips]
    with torch.no_grad():
        heard = inserter.load_model(tmp_path / "runs/t/model").hear(list(map(torch.from_numpy, clips)))
    embedded = after["language_model.model.embed_tokens.weight"]
    torch.testing.assert_close(heard.norm(dim=1).mean(), embedded.norm(dim=1).mean(), rtol=1e-4, atol=0)


def test_the_classes_of_a_hearing_stage_are_the_most_frequent_tokens(runner):
    c = synth.load_config(runner.settings())
    tok = inserter.load_tokenizer(c)
    stage = synth.Settings(c.train.stage | {"ctc_classes": 5, "mix": {"text": 0.5, "tasks": 0.5, "chat": 0.0}})
    path, counts = inserter.Recipe(c, "tasks", "").path(0), Counter()
    for number in range(synth.open_shard(path).count):
        counts.update(i for ids in inserter.read_encoded(path, number, tok).word_ids for i in ids)
    assert inserter.frequent_tokens(c, tok, stage).tolist() == [i for i, _ in counts.most_common(5)]


# --------------------------------------------------------------------------------------------------
# 2. The same after any interruption
# --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
    """Two stages, 5 and 2 steps, uninterrupted; `events` is the number of its file operations under runs/."""
    folder = tmp_path_factory.mktemp("whole")
    done = runner(folder, stages(5, 2), "train.eval_every=3", kill_event=-1)
    assert done["codes"] == [0], done
    return folder, int(done["out"].split("events ")[1])


def finish(runner: Runner, folder: Path, *more: str, **options: object) -> dict:
    """The run of `whole`, begun or continued in another folder."""
    return runner(folder, stages(5, 2), "train.eval_every=3", *more, **options)


@pytest.mark.parametrize("share", [i / 32 for i in range(33)])
def test_kill_before_any_file_operation(runner, whole, tmp_path, share):
    """Making the run's folder, logging, writing, renaming and removing states and exports, reading them."""
    reference, events = whole
    event = 1 + round(share * (events - 1))
    assert finish(runner, tmp_path, kill_event=event)["codes"] == [-9]
    done = finish(runner, tmp_path)
    assert done["codes"] == [0], done
    same_end(tmp_path, reference)


@pytest.mark.parametrize("save", [1, 2, 5, 6])
def test_kill_with_half_the_weights_written(runner, whole, tmp_path, save):
    assert finish(runner, tmp_path, half_save=save)["codes"] == [-9]
    assert finish(runner, tmp_path)["codes"] == [0]
    same_end(tmp_path, whole[0])


def test_killed_again_and_again(runner, whole, tmp_path):
    kills = 0
    for seconds in (0.15, 0.3, 0.45, 0.6, 0.8, 1.0, 1.2):
        kills += finish(runner, tmp_path, kill_after=seconds)["codes"] == [-9]
    finish(runner, tmp_path)
    assert kills
    same_end(tmp_path, whole[0])


@pytest.mark.parametrize("term_ranks", [[0], [1]])
def test_one_rank_is_told_to_stop_and_all_do(runner, tmp_path, term_ranks):
    """SIGTERM to one of two ranks: it travels with the step's sums, both leave after the same step."""
    reference = tmp_path / "whole"
    folder = tmp_path / "stopped"
    assert finish(runner, reference, world=2)["codes"] == [0, 0]
    stopped = finish(runner, folder, world=2, term_step=2, term_ranks=term_ranks)
    assert stopped["codes"] == [143, 143]
    assert "the same command continues" in stopped["out"]
    step, _ = metrics(folder)[-1]
    assert 2 <= step < 7
    assert json.loads((states(folder)[-1] / "state.json").read_text())["step"] == step
    assert finish(runner, folder, world=2)["codes"] == [0, 0]
    same_end(folder, reference)


def test_two_ranks_stopped_again_and_again(runner, many, twenty, tmp_path):
    """Each rank's lanes go on from where they were, whatever the other rank knew of them when it started."""
    for step in (2, 4, 6, 8):
        runner(tmp_path, *many, stages(12), world=2, term_step=step, term_ranks=[0])
    runner(tmp_path, *many, stages(12), world=2)
    assert metrics(tmp_path, "batch") == metrics(twenty, "batch")[:12]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_sigterm_to_torchrun(runner, many, twenty, tmp_path):
    """The real launcher, with reading processes, which its signal reaches: the batches go on as before."""
    command = [*TORCHRUN, ROOT / "inserter.py", *runner.settings(*many, "train.workers=1")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    path = tmp_path / "runs/t/metrics.jsonl"
    begun = time.time()
    while time.time() - begun < 60 and process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) > 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "stopped by a signal after step" in out, out + err
    assert err.count("Traceback") == 1, "torchrun's own alone"
    assert "got signal: 15" in err
    step, _ = metrics(tmp_path)[-1]
    assert 3 <= step < 20
    assert states(tmp_path)[-1].name == f"{step:08d}"
    assert runner(tmp_path, *many, world=2)["codes"] == [0, 0]
    assert metrics(tmp_path, "batch") == metrics(twenty, "batch")


# --------------------------------------------------------------------------------------------------
# 3. Damage
# --------------------------------------------------------------------------------------------------

def copy_run(source: Path, folder: Path) -> Path:
    shutil.copytree(source / "runs", folder / "runs")
    return folder


def test_a_damaged_state_gives_way_to_the_one_before(runner, whole, tmp_path):
    folder = copy_run(whole[0], tmp_path)
    before, newest = states(folder)
    data = bytearray((newest / "state.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "state.safetensors").write_bytes(data)
    done = finish(runner, folder)
    assert done["codes"] == [0]
    assert f"{newest.relative_to(folder)} is damaged" in done["out"]
    assert f"after step {int(before.name)}" in done["out"]
    same_end(folder, whole[0])


def test_only_damaged_states(runner, whole, tmp_path):
    folder = copy_run(whole[0], tmp_path)
    for state, damaged in zip(states(folder), (b"", b'{"stage": "pretrain"}'), strict=True):
        (state / "state.json").write_bytes(damaged)
    done = finish(runner, folder)
    assert done["codes"] == [2]
    assert done["err"].count("\n") == 1
    assert "runs/t/state is whole" in done["err"]
    assert "fresh=true" in done["err"]
    done = finish(runner, folder, world=2)
    assert done["codes"] == [2, 2]
    assert done["err"].count("fresh=true") == 1


def test_a_new_state_survives_damaged_newer_ones(runner, whole, tmp_path):
    """keep_states counts from the state just written: damaged ones of later steps are not what is kept."""
    assert finish(runner, tmp_path, half_save=5)["codes"] == [-9]    # each save writes a state and an export
    for step in (6, 7):
        copied = tmp_path / f"runs/t/state/{step:08d}"
        shutil.copytree(states(tmp_path)[1], copied)
        (copied / "state.json").unlink()
    done = finish(runner, tmp_path, half_save=3)
    assert done["codes"] == [-9]
    assert done["out"].count("is damaged") == 2
    assert [int(state.name) for state in states(tmp_path)] == [4, 5]
    assert finish(runner, tmp_path)["codes"] == [0]
    same_end(tmp_path, whole[0])


def spoil(state: Path) -> None:
    """Write a NaN into a saved weight, and the digest that goes with it."""
    path = state / "state.safetensors"
    named = load_file(path)
    named["weight.language_model.model.norm.weight"][3] = float("nan")
    save_file(named, path)
    row = json.loads((state / "state.json").read_text())
    row["files"]["state.safetensors"] = digest(path)
    (state / "state.json").write_text(json.dumps(row))


def test_weights_that_are_not_finite_stop_the_run(runner, whole, tmp_path):
    folder = copy_run(whole[0], tmp_path)
    state, newest = states(folder)
    shutil.rmtree(newest)
    spoil(state)
    for world in (1, 2):
        done = finish(runner, folder, world=world)
        assert done["codes"] == [2] * world
        assert done["err"].count("not finite at step 7") == 1
        assert "nothing was changed" in done["err"]
        assert "chat-train-0" in done["err"]
    assert states(folder) == [state]


def test_full_disk(runner, whole, tmp_path):
    """The save after step 4 finds no room: one sentence, the state of step 2 stays and serves."""
    assert finish(runner, tmp_path, half_save=3)["codes"] == [-9]
    (kept,) = states(tmp_path)
    before = (kept / "state.safetensors").read_bytes()
    for limit in (len(before) // 2, len(before) - 100, 1000):
        done = finish(runner, tmp_path, file_limit=limit)
        assert done["codes"] == [2], done
        assert done["err"].count("\n") == 1, done
        assert "could not be written" in done["err"], done
        assert states(tmp_path) == [kept]
        assert (kept / "state.safetensors").read_bytes() == before
    assert finish(runner, tmp_path)["codes"] == [0]
    same_end(tmp_path, whole[0])


# --------------------------------------------------------------------------------------------------
# 4. Wrong use
# --------------------------------------------------------------------------------------------------

def test_other_settings_are_refused(runner, whole, tmp_path):
    folder = copy_run(whole[0], tmp_path)
    changed = [stages(5, 2), "train.eval_every=3", "seed=2", "train.clip=0.5"]
    for world in (1, 2):
        done = runner(folder, *changed, world=world)
        assert done["codes"] == [2] * world
        assert done["err"].count("\n") == 1
        for words in ("seed, train.clip", "fresh=true", "run="):
            assert words in done["err"]
    done = finish(runner, folder)            # what may change: nothing is left to do
    assert done["codes"] == [0]
    assert metrics(folder) == metrics(whole[0])


@pytest.mark.parametrize("argument, world, says", [
    (stages(2, common=COMMON.replace("packs: 4", "packs: 3")), 2,
     "train.stages.pretrain.packs=3 is no multiple of the 2 processes"),
    (stages(2).replace("tasks", "task"), 1, "Unknown recipe 'task'"),
    ("train.pack_length=20", 1, "longer than a pack (20 positions"),
    ("model.vocab=300", 1, "model.vocab=300"),
    ("ask=missing.wav", 1, "missing.wav cannot be read as audio"),
    ("ask=hello", 1, "There is no model in runs/t/model; train it first")])
def test_wrong_use_is_one_sentence(runner, whole, tmp_path, argument, world, says):
    done = runner(tmp_path, stages(2), argument, world=world)
    assert done["codes"] == [2] * world, done
    assert says in done["err"], done
    assert done["err"].count("\n") == 1, done


FAILS = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import synth

def main(arguments):
    time.sleep(2 * (os.environ["RANK"] == "0"))
    raise synth.UserError("This is the sentence.")

synth.run(main)
"""


def test_torchrun_says_it_once_even_when_another_rank_fails_first(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    done = subprocess.run([*TORCHRUN, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("This is the sentence.") == 1
    assert done.stderr.index("This is the sentence.") < done.stderr.index("elastic")
    assert done.stderr.count("exitcode  : 2") == 2, done.stderr
