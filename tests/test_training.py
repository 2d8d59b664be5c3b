"""Training runs, whole: the same for any number of ranks and readers, the same after any interruption."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import inserter
import synth

ROOT = Path(__file__).parents[1]
PROJECT = os.environ | {"PYTHONPATH": str(ROOT)}            # as if the tests' folders were the project's
TINY = [
    "model.audio.encoder_layers=1",
    "model.audio.d_model=32",
    "model.audio.encoder_attention_heads=2",
    "model.audio.encoder_ffn_dim=128",
    "model.text.num_hidden_layers=1",
    "model.text.hidden_size=32",
    "model.text.num_attention_heads=2",
    "model.text.num_key_value_heads=1",
    "model.text.intermediate_size=48",
    "model.text.vocab_size=600",
    "train.pack_length=192",
    "train.packs_at_once=1",
    "train.log_every=1",
    "train.eval_every=1000",
    "train.eval_samples=2",
    "train.workers=0",
    "train.save_every=2",
    "train.stage.optimizer=adamw",
    "bench.max_tokens=4",
    "run=t"]
MIX = "mix: {interleaved: 0.4, tasks: 0.3, text: 0.3}"
TASKS = "mix: {tasks: 1.0}"
COMMON = ("packs: 4, lr: 1.0e-2, muon_lr: 0.02, lr_scale: {encoder: 1.0, adapter: 1.0, llm: 1.0}, ramp: 2, "
          "floor: 0.1")


def stages(common: str = COMMON, **own: str) -> str:
    """The stages of a run by name: what each says itself, beside what is common to all."""
    return f"train.stages={{{', '.join(f'{name}: {{{text}, {common}}}' for name, text in own.items())}}}"


class Runner:
    """Speaks to runner.py."""

    def __init__(self, data: list[str]):
        self.data = data
        command = [sys.executable, ROOT / "tests" / "runner.py"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=PROJECT)

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
    """With a copy of the data, for the first run adds a tokenizer to it."""
    *settings, data = small_data
    copy = tmp_path_factory.mktemp("training") / "data"
    shutil.copytree(data.removeprefix("data="), copy)
    runner = Runner([*settings, f"data={copy}"])
    yield runner
    runner.process.stdin.close()
    runner.process.wait()


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs/t/metrics.jsonl").read_text().splitlines()]


def metrics(folder: Path, *keys: str) -> list[tuple]:
    """(step, stage, *keys) of every logged step."""
    return [tuple(row[key] for key in ("step", "stage", *keys)) for row in rows(folder) if "loss" in row]


def states(folder: Path) -> list[Path]:
    return sorted((folder / "runs/t/state").glob("*.pt"))


def load_state(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same(a: object, b: object) -> bool:
    """Equal to the bit: nested dicts and lists of tensors and plain values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_end(folder: Path, reference: Path) -> None:
    """The same steps, states and weights, and nothing is left of an interrupted save."""
    keys = ("loss", "batch", "grad norm")
    assert metrics(folder, *keys) == metrics(reference, *keys)
    assert [row for row in rows(folder) if "eval" in row] == [row for row in rows(reference) if "eval" in row]
    assert [path.name for path in states(folder)] == [path.name for path in states(reference)]
    for one, other in zip(states(folder), states(reference)):
        assert same(load_state(one), load_state(other))
    exports = [(each / "runs/t/model/model.safetensors").read_bytes() for each in (folder, reference)]
    assert exports[0] == exports[1]
    assert sorted((folder / "runs/t/state").iterdir()) == states(folder)
    assert not list((folder / "runs/t").glob(".[no]*"))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def weights(folder: Path, step: int) -> Tensor:
    """Every trained weight of the state of a step, as one vector."""
    named = load_state(folder / f"runs/t/state/{step:08d}.pt")["weights"]
    return torch.cat([tensor.flatten() for name, tensor in named.items() if "embed_positions" not in name])


def slots(folder: Path, step: int, name: str) -> list[Tensor]:
    """One slot of every parameter that has it in the state of a step."""
    optimizers = load_state(folder / f"runs/t/state/{step:08d}.pt")["slots"]
    return [kept[name] for optimizer in optimizers for kept in optimizer["state"].values() if name in kept]


# --------------------------------------------------------------------------------------------------
# 1. The same for any number of ranks and readers
# --------------------------------------------------------------------------------------------------

WHOLE = stages(
    hear=f"ctc: true, ctc_classes: 40, optimizer: muon, steps: 2, {TASKS}",
    pretrain=f"steps: 3, {MIX}",
    sft="optimizer: muon, steps: 2, mix: {chat: 1.0}")


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
    """Three stages, by CTC, AdamW and Muon, uninterrupted; `events` lists its file operations under runs/."""
    folder = tmp_path_factory.mktemp("whole")
    done = runner(folder, WHOLE, events=True)
    assert done["codes"] == [0], done
    return folder


@pytest.fixture(scope="module")
def many(whole):
    """8 steps, every state kept, from the model of another run: a fresh one has gradients of zero."""
    return [
        stages(pretrain=f"steps: 8, {MIX}"),
        "train.save_every=1",
        "train.keep_states=100",
        "train.clip=1e9",
        "train.weight_decay=0.0",
        f"model.from={whole / 'runs/t/model'}"]


@pytest.fixture(scope="module")
def eight(runner, many, tmp_path_factory):
    """One process that reads for itself."""
    folder = tmp_path_factory.mktemp("eight")
    done = runner(folder, *many, draw=True)
    assert done["codes"] == [0], done
    assert "next: python bench.py" in done["out"]
    assert (folder / "runs/t/curves.png").read_bytes().startswith(b"\x89PNG")
    return folder


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_processes_change_nothing(runner, many, eight, tmp_path, workers):
    assert runner(tmp_path, *many, f"train.workers={workers}")["codes"] == [0]
    same_end(tmp_path, eight)
    assert len(metrics(tmp_path)) == 8
    assert len(set(metrics(tmp_path, "batch"))) == 8


def test_a_step_sees_samples_from_all_over(small_data):
    """Four lanes, four shards: in each epoch every lane reads another shard."""
    recipe = inserter.Recipe(synth.load_config(small_data), "interleaved")
    assert recipe.counts == [30] * 4
    for epoch in range(3):
        first = [recipe.locate(epoch, lane * recipe.total // 4)[0] for lane in range(4)]
        assert len(set(first)) == 4


def test_two_ranks_train_the_same_model_with_adamw(runner, many, eight, tmp_path):
    assert runner(tmp_path, *many, world=2)["codes"] == [0, 0]
    keys = ("batch", "targets", "waste")
    assert metrics(tmp_path, *keys) == metrics(eight, *keys)
    one, two = (slots(folder, 1, "exp_avg") for folder in (eight, tmp_path))
    assert len(one) == len(two) > 30
    gradients = max(map(distance, two, one))                            # times 1 - beta1
    assert gradients < 1e-6
    after = distance(weights(tmp_path, 5), weights(eight, 5))
    assert after < 1e-5
    print(f"\n1 and 2 ranks, AdamW: gradients of step 1 within {gradients:.1e}, "
          f"weights after 5 steps {after:.1e}")


def test_two_ranks_with_muon(runner, many, eight, tmp_path):
    """Muon rounds to bfloat16: ids and first gradients agree, then the weights drift."""
    folders = [tmp_path / "1", tmp_path / "2"]
    for world, folder in enumerate(folders, 1):
        done = runner(folder, *many, stages(pretrain=f"steps: 3, optimizer: muon, {MIX}"), world=world)
        assert done["codes"] == [0] * world
        assert metrics(folder, "batch") == metrics(eight, "batch")[:3]
    one, two = (slots(folder, 1, "momentum_buffer") for folder in folders)
    assert len(one) == len(two) >= 14
    assert max(map(distance, two, one)) < 1e-6
    one, two = (weights(folder, 3) for folder in folders)
    print(f"\n1 and 2 ranks, Muon: weights after 3 steps differ by {distance(two, one):.1e}")


def test_a_ctc_stage_on_two_ranks(runner, many, tmp_path):
    """It does not run the LLM's blocks: their weights stay, and no rank waits for their gradients."""
    ctc = stages(pretrain=f"ctc: true, steps: 3, {TASKS}")
    one, two = tmp_path / "1", tmp_path / "2"
    assert runner(one, *many, ctc, world=1)["codes"] == [0]
    assert runner(two, *many, ctc, world=2)["codes"] == [0, 0]
    first, last, other = weights(one, 1), weights(one, 3), weights(two, 3)
    assert distance(other, last) < 1e-5 < distance(first, last)
    before, after = (load_state(path)["weights"] for path in (states(one)[0], states(one)[-1]))
    blocks = [name for name in before if name.startswith("language_model.model.layers")]
    assert blocks
    assert all(torch.equal(before[name], after[name]) for name in blocks)


def test_a_hearing_stage_leaves_the_llm_as_it_was(runner, many, tmp_path):
    """CTC over sampled classes, two ranks: the LLM's weights stay to the bit, encoder and adapter move, and what is
    heard ends up as long as the LLM's embeddings."""
    hear = ("{hear: {ctc: true, ctc_classes: 40, steps: 4, mix: {tasks: 1.0}, packs: 2, lr: 1.0e-2, muon_lr: 0.05, "
            "lr_scale: {encoder: 1.0, adapter: 1.0, llm: 0.0}, optimizer: muon}}")
    given = next(argument for argument in many if argument.startswith("model.from="))
    done = runner(tmp_path, given, f"train.stages={hear}", world=2)
    assert done["codes"] == [0, 0], done
    assert [row["step"] for row in rows(tmp_path) if "eval" in row] == [0, 4]           # before and after
    before = load_file(Path(given.removeprefix("model.from=")) / "model.safetensors")
    after = load_file(tmp_path / "runs/t/model/model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("language_model"))
    assert distance(after["audio_tower.conv1.weight"], before["audio_tower.conv1.weight"]) > 0.003
    c = synth.load_config(runner.settings(given))
    tok = inserter.load_tokenizer(c)
    path = inserter.Recipe(c, "tasks").paths[0]
    model = inserter.load_model(tmp_path / "runs/t/model")
    batch = inserter.collate([inserter.read_encoded(path, number, tok) for number in range(64)], model.mels)
    with torch.no_grad():
        heard = model.hear(batch["mel"], batch["frames"])
    embedded = after["language_model.model.embed_tokens.weight"]
    torch.testing.assert_close(heard.norm(dim=1).mean(), embedded.norm(dim=1).mean(), rtol=1e-4, atol=0)


def test_the_classes_of_a_hearing_stage_are_the_most_frequent_tokens(runner, whole):
    c = synth.load_config(runner.settings())
    tok = inserter.load_tokenizer(c)
    stage = synth.Settings(c.train.stage | {"ctc_classes": 5, "mix": {"text": 0.5, "tasks": 0.5, "chat": 0.0}})
    path = inserter.Recipe(c, "tasks").paths[0]
    counts = Counter()
    for number in range(synth.read_index(path)["count"]):
        counts.update(i for ids in inserter.read_encoded(path, number, tok).word_ids for i in ids)
    assert inserter.frequent_tokens(c, tok, stage).tolist() == [i for i, _ in counts.most_common(5)]
    stage.ctc_classes = 0
    assert inserter.frequent_tokens(c, tok, stage).tolist() == list(range(len(tok.hf)))


def test_what_is_never_due_and_a_stage_of_tokens(runner, many, tmp_path):
    """log_every, eval_every and save_every of 0 are never; a stage without a length is left out, one of tokens ends
    with the step that reaches them."""
    never = ["train.log_every=0", "train.eval_every=0", "train.save_every=0"]
    two = stages(left_out=TASKS, pretrain=f"tokens: 600, {MIX}")
    done = runner(tmp_path, *many, *never, two, draw=True)
    assert done["codes"] == [0], done
    (kept,) = states(tmp_path)
    progress = load_state(kept)["progress"]
    assert progress["stage"] == "pretrain"
    assert 600 <= progress["targets"] < 600 + 4 * 192
    assert [(row["step"], "eval" in row) for row in rows(tmp_path)] == [(0, True), (progress["step"], True)]


# --------------------------------------------------------------------------------------------------
# 2. The same after any interruption
# --------------------------------------------------------------------------------------------------

def finish(runner: Runner, folder: Path, *more: str, **options: object) -> dict:
    """The run of `whole`, begun or continued in another folder."""
    return runner(folder, WHOLE, *more, **options)


@pytest.mark.parametrize("operation, nth", [
    ("open runs/t/[.]config.yaml", 0),                      # the first file of the run
    ("open runs/t/metrics.jsonl", 2),                       # after a step, before any state
    ("os.rename runs/t/[.]new.model", 0),                   # with an export that is not yet in place
    ("open runs/t/state", 0),                               # with an export, without a state
    ("os.rename runs/t/state", 0),                          # with a state that is not yet in place
    ("open runs/t/[.]new.model/model.safetensors", 1),      # between writing an export and flushing it
    ("os.rename runs/t/model", 1),                          # before the export gives way to a new one
    ("os.rename runs/t/[.]new.model", 2),                   # when it has given way
    ("shutil.rmtree runs/t/[.]old.model", 7),               # when the new one is in place
    ("os.remove runs/t/state/0", 0),                        # with a state too many
    ("open runs/t/metrics.jsonl", -1),                      # after the last step
    ("os.rename runs/t/state", -1)])                        # with all but the last state
def test_kill_before_a_file_operation(runner, whole, tmp_path, operation, nth):
    events = (whole / "events").read_text().splitlines()
    places = [number for number, event in enumerate(events, 1) if re.match(operation, event)]
    assert finish(runner, tmp_path, kill_event=places[nth])["codes"] == [-9]
    done = finish(runner, tmp_path)
    assert done["codes"] == [0], done
    same_end(tmp_path, whole)


@pytest.mark.parametrize("save", [3, 6])
def test_kill_with_half_the_weights_written(runner, whole, tmp_path, save):
    """Of an export, of a state."""
    assert finish(runner, tmp_path, half_save=save)["codes"] == [-9]
    assert finish(runner, tmp_path)["codes"] == [0]
    same_end(tmp_path, whole)


def test_killed_again_and_again(runner, whole, tmp_path):
    """In the midst of a run, while it reads its state, soon after, and in the next save."""
    for options in ({"half_save": 4}, {"kill_event": 2}, {"kill_event": 9}, {"half_save": 2}, {"half_save": 1}):
        assert finish(runner, tmp_path, **options)["codes"] == [-9]
    finish(runner, tmp_path)
    same_end(tmp_path, whole)


def test_one_rank_is_told_to_stop_and_all_do(runner, tmp_path):
    """SIGTERM to one of two ranks: it travels with the step's sums, both leave after the same step; each rank's lanes
    go on from where they were, whatever the other rank knew of them when it started."""
    reference = tmp_path / "whole"
    folder = tmp_path / "stopped"
    assert finish(runner, reference, world=2)["codes"] == [0, 0]
    step = 0
    for rank in (1, 0):
        after = step + 1
        stopped = finish(runner, folder, world=2, term_step=after, term_ranks=[rank])
        assert stopped["codes"] == [143, 143], stopped
        assert "the same command continues" in stopped["out"]
        step, _ = metrics(folder)[-1]
        assert after <= step < 7
        assert load_state(states(folder)[-1])["progress"]["step"] == step
    assert finish(runner, folder, world=2)["codes"] == [0, 0]
    keys = ("loss", "batch", "grad norm")
    assert metrics(folder, *keys) == metrics(reference, *keys)
    assert same(load_state(states(folder)[-1]), load_state(states(reference)[-1]))


def test_a_run_goes_on_with_another_number_of_ranks(runner, whole, tmp_path):
    """One rank, then two: the same batches."""
    assert finish(runner, tmp_path, half_save=6)["codes"] == [-9]      # the third save's state
    assert len(metrics(tmp_path)) == 5
    done = finish(runner, tmp_path, world=2)
    assert done["codes"] == [0, 0], done
    assert "in stage pretrain after step 4" in done["out"]
    assert metrics(tmp_path, "batch") == metrics(whole, "batch")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


class Marked:
    """A command whose processes, children of children included, are found by a mark in their environment."""

    def __init__(self, command: list, folder: Path):
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, env=PROJECT | {"MARK": self.mark})

    def alive(self) -> dict[int, str]:
        """{process: command line} of what still runs."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"MARK={self.mark}".encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:                  # it has just ended
                continue
        return found

    def children(self, parent: int) -> list[int]:
        return [pid for pid in self.alive() if stat(pid)[1] == parent]

    def until(self, reached, seconds: int = 90):
        """Wait until reached() is true, and return what it gave."""
        for _ in range(seconds * 50):
            if value := reached():
                return value
            if not self.alive() and not reached():
                break
            time.sleep(0.02)
        raise AssertionError(f"waited {seconds} s in vain; {self.process.poll()=}, {self.alive()=}")

    def ended(self) -> bool:
        """Nobody is left."""
        self.process.poll()
        return not self.alive()

    def close(self) -> None:
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def stat(pid: int) -> tuple[str, int, int]:
    """State, parent and group of a process."""
    try:
        state, parent, group, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:                          # it has just ended
        return "", 0, 0
    return state, int(parent), int(group)


@pytest.fixture
def marked():
    started = []

    def start(*command, folder: Path) -> Marked:
        started.append(Marked(command, folder))
        return started[-1]

    yield start
    for one in started:
        one.close()


def logged(folder: Path, step: int):
    path = folder / "runs/t/metrics.jsonl"
    return lambda: path.is_file() and f'"step": {step},' in path.read_text()


def test_sigterm_to_torchrun(runner, marked, tmp_path):
    """The real launcher. A missing shard and the tokenizer are made first. Its signal goes to the whole group of each
    rank: the processes there that help to read live on, all ranks stop at one step, and the run goes on to the same
    batches as one that was not stopped and had everything."""
    data = tmp_path / "data"
    shutil.copytree(runner.data[-1].removeprefix("data="), data, ignore=shutil.ignore_patterns("tokenizer-*"))
    shard = data / "text" / "train-000002.tar"
    made = shard.read_bytes()
    shard.unlink()
    long = [stages(pretrain=f"steps: 60, {MIX}"), "train.save_every=100", f"data={data}"]
    run = marked(*TORCHRUN, ROOT / "inserter.py", *runner.settings(*long, "train.workers=1"), folder=tmp_path)
    run.until(logged(tmp_path, 2))
    assert shard.read_bytes() == made
    ranks = run.children(run.process.pid)
    assert len(ranks) == 2
    helpers = [pid for pid in run.alive() if pid not in ranks and stat(pid)[2] in ranks]
    assert len(helpers) >= 2, "a fork server of each"
    for pid in helpers:
        os.kill(pid, signal.SIGTERM)
    run.until(logged(tmp_path, 12))          # more than what had been read ahead
    run.process.send_signal(signal.SIGTERM)
    out, err = run.process.communicate(timeout=60)
    assert "stopped by a signal after step" in out, out + err
    assert err.count("Traceback") == 1, err                             # torchrun's own alone
    assert "got signal: 15" in err
    run.until(run.ended, seconds=10)
    step, _ = metrics(tmp_path)[-1]
    assert 12 <= step < 60
    assert [state.name for state in states(tmp_path)] == [f"{step:08d}.pt"]
    assert runner(tmp_path, *long, world=2)["codes"] == [0, 0]
    assert runner(tmp_path / "whole", *long)["codes"] == [0]
    assert metrics(tmp_path, "batch") == metrics(tmp_path / "whole", "batch")


# --------------------------------------------------------------------------------------------------
# 3. Damage
# --------------------------------------------------------------------------------------------------

def copy_run(source: Path, folder: Path) -> Path:
    shutil.copytree(source / "runs", folder / "runs")
    return folder


def truncated(data: bytes) -> bytes:
    return data[:-100]


def flipped(data: bytes) -> bytes:
    """One bit in the middle, in the weights or slots."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


@pytest.mark.parametrize("harm", [truncated, flipped])
def test_a_damaged_state_gives_way_to_the_one_before(runner, whole, tmp_path, harm):
    folder = copy_run(whole, tmp_path)
    before, newest = states(folder)
    newest.write_bytes(harm(newest.read_bytes()))
    done = finish(runner, folder)
    assert done["codes"] == [0], done
    assert f"{newest.relative_to(folder)} is damaged" in done["out"]
    assert f"after step {int(before.stem)}" in done["out"]
    same_end(folder, whole)


def test_only_damaged_states(runner, whole, tmp_path):
    folder = copy_run(whole, tmp_path)
    for state, damaged in zip(states(folder), (b"", b"somebody else's file"), strict=True):
        state.write_bytes(damaged)
    done = finish(runner, folder)
    assert done["codes"] == [2], done
    assert done["err"].count("\n") == 1
    assert "runs/t/state is whole" in done["err"]
    assert "fresh=true" in done["err"]
    done = finish(runner, folder, world=2)
    assert done["codes"] == [2, -15]
    assert done["err"].count("\n") == 1


def test_a_new_state_survives_damaged_newer_ones(runner, whole, tmp_path):
    """keep_states counts from the state just written: damaged ones of later steps are not what is kept."""
    assert finish(runner, tmp_path, half_save=5)["codes"] == [-9]      # each save writes an export, then a state
    for step in (6, 7):
        (tmp_path / f"runs/t/state/{step:08d}.pt").write_bytes(b"PK\x03\x04 half a file")
    done = finish(runner, tmp_path, half_save=3)
    assert done["codes"] == [-9]
    assert done["out"].count("is damaged") == 2
    assert [int(state.stem) for state in states(tmp_path)] == [4, 5]
    assert finish(runner, tmp_path)["codes"] == [0]
    same_end(tmp_path, whole)


def test_weights_that_are_not_finite_stop_the_run(runner, whole, tmp_path):
    folder = copy_run(whole, tmp_path)
    state, newest = states(folder)
    newest.unlink()
    kept = load_state(state)
    kept["weights"]["language_model.model.norm.weight"][3] = float("nan")
    torch.save(kept, state)
    for world in (1, 2):
        done = finish(runner, folder, world=world)
        assert done["codes"] == [2, -15][:world]
        assert done["err"].count("\n") == 1
        assert "not finite at step 7; nothing was changed" in done["err"]
        assert len(re.findall(r"chat-train-0\d+", done["err"])) >= 4, "of both ranks"
    assert states(folder) == [state]


def test_full_disk(runner, whole, tmp_path):
    """The second save finds no room: one sentence, the first state stays and serves."""
    assert finish(runner, tmp_path, half_save=3)["codes"] == [-9]
    (kept,) = states(tmp_path)
    before = kept.read_bytes()
    for limit in (len(before) - 100, 1000):
        done = finish(runner, tmp_path, file_limit=limit)
        assert done["codes"] == [2], done
        assert done["err"].count("\n") == 1, done
        assert re.search("too large|could not be written", done["err"]), done
        assert states(tmp_path) == [kept]
        assert kept.read_bytes() == before
    assert finish(runner, tmp_path)["codes"] == [0]
    same_end(tmp_path, whole)


# --------------------------------------------------------------------------------------------------
# 4. Wrong use
# --------------------------------------------------------------------------------------------------

def test_other_settings_are_refused(runner, whole, tmp_path):
    folder = copy_run(whole, tmp_path)
    for world in (1, 2):
        done = finish(runner, folder, "seed=2", "train.clip=0.5", "train.betas=[0.9, 0.9]", world=world)
        assert done["codes"] == [2, -15][:world]
        assert done["err"].count("\n") == 1
        for words in ("(seed, train.betas, train.clip)", "fresh=true", "run="):
            assert words in done["err"], done
    longer = WHOLE.replace("steps: 3", "steps: 4")                      # of a stage that is over
    done = runner(folder, longer)
    assert done["codes"] == [2]
    assert "(train.stages.pretrain.steps)" in done["err"]
    assert metrics(folder) == metrics(whole)


def test_the_same_said_otherwise_is_accepted(runner, whole, tmp_path):
    """Numbers in other words, keys in another order, values that a stage has anyway, and what shapes no weight."""
    folder = copy_run(whole, tmp_path)
    state = load_state(states(folder)[-1])
    common = "floor: 0.10, lr: 0.01, ramp: 2, muon_lr: 2e-2, packs: 4"
    other = WHOLE.replace(COMMON, common)
    assert COMMON not in other
    done = runner(folder, other, "train.log_every=10", "train.workers=2", "bench.max_tokens=5", "debug=true",
                  "train.stage.lr_scale={llm: 1, adapter: 1.0, encoder: 1.0}")
    assert done["codes"] == [0], done
    assert metrics(folder) == metrics(whole), "nothing was left to do"
    assert same(load_state(states(folder)[-1]), state)


def test_a_stage_that_is_not_over_may_become_longer(runner, whole, tmp_path):
    """And what only trades memory for time may change: the run goes on."""
    folder = copy_run(whole, tmp_path)
    longer = WHOLE.replace("optimizer: muon, steps: 2, mix: {chat", "optimizer: muon, steps: 4, mix: {chat")
    memory = ["train.packs_at_once=2", "train.checkpointing=true", "train.loss_chunk=64"]
    done = runner(folder, longer, *memory)
    assert done["codes"] == [0], done
    assert "continuing run t in stage sft after step 7" in done["out"]
    assert metrics(folder)[:7] == metrics(whole)
    assert metrics(folder)[-1] == (9, "sft")
    assert yaml.safe_load((folder / "runs/t/config.yaml").read_text())["train"]["stages"]["sft"]["steps"] == 4


def test_fresh_begins_again_on_all_ranks(runner, whole, tmp_path):
    folder = copy_run(whole, tmp_path)
    done = runner(folder, stages(pretrain=f"steps: 1, {MIX}"), "seed=1", "fresh=true", world=2)
    assert done["codes"] == [0, 0], done
    assert "continuing" not in done["out"]
    assert metrics(folder) == [(1, "pretrain")]


@pytest.mark.parametrize("argument, world, says", [
    (stages(pretrain=f"steps: 2, {MIX}", common=COMMON.replace("packs: 4", "packs: 3")), 2,
     "train.stages.pretrain.packs=3 is no multiple of the 2 processes"),
    (stages(pretrain=f"steps: 2, {MIX.replace('tasks', 'task')}"), 1, "data/task has no sample"),
    ("train.pack_length=20", 1, "longer than a pack; raise train.pack_length=20"),
    ("ask=missing.wav", 1, "missing.wav"),
    ("ask=hello", 1, "There is no model in runs/t/model; train it first"),
    ("model.from=runs/other/model", 1, "runs/other/model")])
def test_wrong_use_is_one_sentence(runner, whole, tmp_path, argument, world, says):
    if "missing" in argument:
        copy_run(whole, tmp_path)
    done = runner(tmp_path, stages(pretrain=f"steps: 2, {MIX}"), argument, world=world)
    assert done["codes"] == [2, -15][:world], done
    assert says in done["err"], done
    assert done["err"].count("\n") == 1, done


def damage(path: Path, number: int) -> None:
    """Change the last byte of a sample."""
    _, offset, length, *_ = synth.read_index(path)["samples"][number]
    data = bytearray(path.read_bytes())
    data[offset + length - 513] ^= 1
    path.write_bytes(data)


def test_another_rank_than_the_first_fails_alone(runner, many, tmp_path):
    """In its reading process: its sentence is said, after it has waited for rank 0 to speak."""
    data = tmp_path / "data"
    shutil.copytree(runner.data[-1].removeprefix("data="), data)
    c = synth.load_config(runner.settings(f"data={data}"))
    recipe = inserter.Recipe(c, "tasks", "pretrain")
    path, number = recipe.locate(0, recipe.total // 2)                  # what the second of two lanes reads first
    damage(path, number)
    two = stages(pretrain=f"steps: 2, {TASKS}", common=COMMON.replace("packs: 4", "packs: 2"))
    done = runner(tmp_path, *many, two, f"data={data}", "train.workers=1", world=2, patience=1)
    assert done["codes"] == [1, 2], done
    said = re.findall(f"^Sample {number} in {re.escape(str(path))} is damaged; .*[.]$", done["err"], re.M)
    assert len(said) == 1, done


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
    assert done.stderr.count("exitcode  : 2") == 1, done.stderr
