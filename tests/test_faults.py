"""A bad day: ranks that disagree, processes that are killed, folders that are somebody else's, file systems that lack."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file
from test_training import COMMON, digest, distance, finish, many, metrics, runner, states, whole       # noqa: F401

import inserter
import synth
from synth import UserError

ROOT = Path(__file__).parents[1]


# --------------------------------------------------------------------------------------------------
# 1. Ranks that do not stand alike
# --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stopped(runner, tmp_path_factory):                                                  # noqa: F811
    """A run that was killed after step 4 of 7."""
    folder = tmp_path_factory.mktemp("stopped")
    assert finish(runner, folder, half_save=5)["codes"] == [-9]
    assert [int(state.name) for state in states(folder)] == [2, 4]
    return folder


def copy_of(stopped: Path, folder: Path) -> Path:
    shutil.copytree(stopped / "runs", folder / "runs")
    return folder


def on_two_disks(runner, tmp_path: Path, first: Path, second: Path) -> str:             # noqa: F811
    done = finish(runner, tmp_path, world=2, folders=[str(first), str(second)])
    assert done["codes"] == [2, 2], done
    assert done["err"].count("\n") == 1, done
    return done["err"]


def test_ranks_at_different_steps_are_refused(runner, stopped, tmp_path):               # noqa: F811
    """Two machines with disks of their own, of which one has the run's states and the other nothing."""
    here, there = copy_of(stopped, tmp_path / "a"), tmp_path / "b"
    there.mkdir()
    said = on_two_disks(runner, tmp_path, here, there)
    assert "do not start alike: rank 0 at step 4 of pretrain" in said and "rank 1 at step 0 of pretrain" in said
    assert "share runs/t" in said


def test_ranks_with_other_weights_are_refused(runner, stopped, tmp_path):               # noqa: F811
    here, there = (copy_of(stopped, tmp_path / name) for name in "ab")
    state = states(there)[-1]
    named = load_file(state / "state.safetensors")
    named["weight.language_model.model.norm.weight"][3] += 1e-6
    save_file(named, state / "state.safetensors")
    row = json.loads((state / "state.json").read_text())
    row["files"]["state.safetensors"] = digest(state / "state.safetensors")
    (state / "state.json").write_text(json.dumps(row))
    said = on_two_disks(runner, tmp_path, here, there)
    assert said.count("at step 4 of pretrain") == 2 and "weights" in said


def test_copies_of_one_state_on_two_disks_go_on(runner, stopped, tmp_path):             # noqa: F811
    here, there = (copy_of(stopped, tmp_path / name) for name in "ab")
    done = finish(runner, tmp_path, world=2, folders=[str(here), str(there)])
    assert done["codes"] == [0, 0], done
    assert metrics(here)[-1] == (7, "sft")


def test_a_rank_does_not_read_what_fresh_removes(runner, stopped, tmp_path):            # noqa: F811
    folder = copy_of(stopped, tmp_path)
    done = finish(runner, folder, "fresh=true", world=2)
    assert done["codes"] == [0, 0], done
    assert "continuing" not in done["out"]
    assert metrics(folder)[0] == (1, "pretrain")


# --------------------------------------------------------------------------------------------------
# 2. Killed processes
# --------------------------------------------------------------------------------------------------

class Marked:
    """A command whose processes, children of children included, are found by a mark in their environment."""

    def __init__(self, command: list, folder: Path):
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, env={**os.environ, "MARK": self.mark})

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

    def until(self, reached, seconds: int = 60):
        """Wait until reached() is true, and return what it gave."""
        for _ in range(seconds * 50):
            if value := reached():
                return value
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


@pytest.fixture
def marked():
    started = []

    def start(*command, folder: Path) -> Marked:
        started.append(Marked(command, folder))
        return started[-1]

    yield start
    for one in started:
        one.close()


def logged(folder: Path):
    path = folder / "runs/t/metrics.jsonl"
    return lambda: path.is_file() and path.read_bytes().count(b"\n") > 2


LONG = f"train.stages={{pretrain: {{steps: 100000, mix: {{tasks: 1.0}}, {COMMON}}}}}"


def test_readers_end_with_their_rank(runner, marked, tmp_path):                         # noqa: F811
    run = marked(sys.executable, ROOT / "inserter.py", *runner.settings(LONG, "train.workers=2"), folder=tmp_path)
    run.until(logged(tmp_path))
    assert len(run.alive()) >= 4             # the rank, the fork server, two readers
    os.kill(run.process.pid, signal.SIGKILL)
    run.until(run.ended, seconds=10)


def test_a_killed_reader_is_one_sentence(runner, marked, tmp_path):                      # noqa: F811
    """The server of readers is a child of the rank; a reader is a child of the server."""
    run = marked(sys.executable, ROOT / "inserter.py", *runner.settings(LONG, "train.workers=1"), folder=tmp_path)
    run.until(logged(tmp_path))
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in run.alive()}
    readers = [pid for pid, parent in parents.items() if parents.get(parent) == run.process.pid]
    assert len(readers) == 1, parents
    os.kill(readers[0], signal.SIGKILL)
    run.until(run.ended, seconds=10)
    _, err = run.process.communicate()
    assert run.process.returncode == 2
    assert "A process that read samples was killed" in err and "Traceback" not in err


def test_who_remains_of_two_ranks_says_so(runner, marked, tmp_path):                    # noqa: F811
    """kill -9 of one rank under torchrun: a sentence from the other, and nobody is left."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = marked(*torchrun, ROOT / "inserter.py", *runner.settings(LONG, "train.workers=1"), folder=tmp_path)
    run.until(logged(tmp_path))
    ranks = [pid for pid, command in run.alive().items()
             if "inserter.py" in command and "torch.distributed" not in command and "forkserver" not in command]
    rank_1 = [pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
              and f" {run.process.pid} " in Path(f"/proc/{pid}/stat").read_text()]
    os.kill(rank_1[0], signal.SIGKILL)
    run.until(run.ended, seconds=10)
    _, err = run.process.communicate()
    assert "Another process of this run has gone" in err
    assert "IndexError" not in err and "RuntimeError" not in err


SLOW_VOICE = """
import os, time
import numpy as np

def speak(texts, voices, seed):
    if os.path.exists("kill"):
        os.kill(os.getpid(), 9)
    if os.path.exists("wait"):
        open("waiting", "w").close()
        time.sleep(1000)
    return [np.sin(np.arange(1600 * max(len(text), 9)) / 9) * 0.3 for text in texts], 24000
"""


def python_voice(folder: Path, workers: int = 2) -> list:
    (folder / "slow_voice.py").write_text(SLOW_VOICE)
    return [sys.executable, ROOT / "synth.py", *SMALL[:-1], f"synth.workers={workers}",
            "synth.engine=python:slow_voice:speak", "synth.shards={chat: 4}"]


def test_a_killed_synthesis_worker_is_one_sentence(tmp_path):
    command = python_voice(tmp_path)
    (tmp_path / "kill").touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1 and "A process that made shards was killed" in done.stderr
    (tmp_path / "kill").unlink()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done


@pytest.mark.parametrize("engine", ["python", "espeak"])
def test_synthesis_workers_end_with_who_started_them(marked, tmp_path, engine):
    if engine == "python":
        (tmp_path / "wait").touch()
        run = marked(*python_voice(tmp_path), folder=tmp_path)
        run.until((tmp_path / "waiting").exists)
    else:
        run = marked(sys.executable, ROOT / "synth.py", "synth.documents=8000", "synth.workers=2", folder=tmp_path)
        run.until(lambda: any("forkserver" in command for command in run.alive().values()))
    os.kill(run.process.pid, signal.SIGKILL)
    run.until(run.ended, seconds=10)


def test_a_killed_espeak_process_is_one_sentence(marked, tmp_path):
    run = marked(sys.executable, ROOT / "synth.py", "synth.documents=8000", "synth.workers=1", folder=tmp_path)

    def child():
        """A process that makes a shard: a child of the fork server."""
        found = run.alive()
        servers = [pid for pid, command in found.items() if "forkserver" in command]
        return [pid for pid in found for server in servers
                if Path(f"/proc/{pid}/stat").read_text().split(") ")[1].split()[1] == str(server)]

    os.kill(run.until(child)[0], signal.SIGKILL)
    _, err = run.process.communicate(timeout=60)
    assert run.process.returncode == 2
    assert err.count("\n") == 1 and "A process that made shards was killed" in err
    run.until(run.ended, seconds=10)


def test_waiting_for_shards_says_so_and_has_an_end(monkeypatch, tmp_path, capsys):
    """Once a minute; an hour without a new shard is too long, one that comes starts the hour again."""
    minutes = [0]
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]

    def sleep(seconds):
        minutes[0] += seconds / 60
        if minutes[0] > 50:
            paths[0].touch()

    monkeypatch.setattr(inserter.time, "sleep", sleep)
    with pytest.raises(UserError, match=r"No shard has come for an hour, and 1 are missing, .*b\.tar"):
        inserter.wait_for(paths)
    said = capsys.readouterr().out.splitlines()
    assert round(minutes[0]) == 111 and len(said) == 111
    assert "2 shards" in said[0] and "1 shards" in said[-1]
    paths[1].touch()
    inserter.wait_for(paths)


# --------------------------------------------------------------------------------------------------
# 3. Somebody else's files
# --------------------------------------------------------------------------------------------------

def test_fresh_leaves_a_users_files_alone(tmp_path, monkeypatch):
    """data=mine with the corpus in mine/text: the recipe `text` may not move in there."""
    monkeypatch.chdir(tmp_path)
    book = tmp_path / "mine" / "text" / "book.txt"
    book.parent.mkdir(parents=True)
    book.write_text("It is red. The ball is in the old garden of tom.\n\nIt is blue.")
    mine = ["data=mine", "synth.corpus=mine/text/*.txt", "synth.held_out_share=0"]
    for arguments in (mine, [*mine, "fresh=true"]):
        with pytest.raises(UserError, match="mine/text holds files that synth.py did not make; choose another"):
            synth.main(arguments)
        assert book.is_file()
    synth.main([*mine, "fresh=true", "synth.shards={tasks: 1}"])
    synth.main([*mine, "fresh=true", "synth.shards={tasks: 1}"])
    assert book.is_file() and (tmp_path / "mine/tasks/train-000000.tar").is_file()


@pytest.mark.parametrize("run", ["..", ".", ".hidden", "_", "-rf"])
def test_a_runs_name_is_a_plain_one(run):
    with pytest.raises(UserError, match="must be a plain folder name that begins with a letter or digit"):
        synth.load_config([f"run={run}"])


def test_fresh_removes_runs_only(runner, tmp_path):                                     # noqa: F811
    thesis = tmp_path / "runs" / "t" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("two years of work")
    done = finish(runner, tmp_path, "fresh=true")
    assert done["codes"] == [2] and "runs/t has no config.yaml" in done["err"], done
    assert thesis.is_file()


# --------------------------------------------------------------------------------------------------
# 4. Evaluation
# --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def odd_dialogues(tmp_path_factory):
    """A data folder whose dialogues lack answers, or are far too long; every sort of them in dev too."""
    folder = tmp_path_factory.mktemp("odd")
    sorts = [
        [("user", "what colour is the sun"), ("assistant", "")],
        [("user", "what colour is the sky")],
        [("assistant", "hello there")],
        [("user", ""), ("assistant", "it is blue.")],
        [("system", "be kind"), ("user", "is it red"), ("assistant", "it is red.")],
        [("user", "count for me"), ("assistant", "one two three " * 300)]]
    lines = []
    for n in range(120):
        turns = [{"role": role, "content": f"{said} {n}" if said else ""} for role, said in sorts[n % len(sorts)]]
        lines.append(json.dumps({"messages": turns}))
    (folder / "odd.jsonl").write_text("\n".join(lines))
    settings = [*SMALL, f"synth.corpus={folder / 'odd.jsonl'}", f"data={folder / 'data'}", "synth.held_out_share=0.3",
                "synth.shards={interleaved: 1, tasks: 1, text: 1, chat: 1}"]
    synth.make_shards(synth.load_config(settings))
    return settings


def test_dialogues_without_answers_end_no_run(runner, odd_dialogues, tmp_path):         # noqa: F811
    stage = f"train.stages={{sft: {{steps: 2, mix: {{chat: 0.5, text: 0.5}}, {COMMON}}}}}"
    done = runner(tmp_path, stage, *odd_dialogues, "train.eval_samples=64")
    assert done["codes"] == [0], done
    point = json.loads((tmp_path / "runs/t/metrics.jsonl").read_text().splitlines()[-1])["eval"]
    assert set(point) >= {"heard", "typed", "gap", "text", "obeys spoken", "obeys typed"}


def test_a_pass_of_the_evaluation_is_no_longer_than_trainings(odd_dialogues, monkeypatch):
    c = synth.load_config([*odd_dialogues, "train.pack_length=100", "train.packs_at_once=2", "train.eval_samples=64",
                           "model.vocab=600", "bench.max_tokens=4"])
    tok = inserter.load_tokenizer(c)
    passes = []
    batch_of = inserter.batch_of

    def recorded(packs):
        passes.append(sum(len(pack.ids) for pack in packs))
        return batch_of(packs)

    monkeypatch.setattr(inserter, "batch_of", recorded)
    point = inserter.evaluate(c, inserter.fresh_model(c, tok), tok)
    assert len(passes) > 3 and max(passes) <= 200
    assert point["gap"] == pytest.approx(point["heard"] - point["typed"])


# --------------------------------------------------------------------------------------------------
# 5. File systems, drivers, memory
# --------------------------------------------------------------------------------------------------

def test_a_resumed_run_does_not_hold_its_state_file(stopped, monkeypatch):
    monkeypatch.chdir(stopped)
    _, tensors = inserter.load_state(synth.load_config(["run=t"]))
    assert len(tensors) > 30
    assert "state.safetensors" not in Path("/proc/self/maps").read_text()


def test_two_machines_write_one_file_at_once(tmp_path):
    """Threads share a process id as two machines may; each write is whole and none fails."""
    failed = []

    def write(letter: bytes) -> None:
        for _ in range(100):
            try:
                synth.write_whole(tmp_path / "file", letter * 5000)
            except UserError as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(set((tmp_path / "file").read_bytes())) == 1 and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(synth.fcntl, "flock", refuse)
    c = synth.load_config([*SMALL, f"data={tmp_path / 'data'}"])
    assert synth.make_corpus(c)["train"] == 4


def test_after_running_out_of_memory(runner, stopped, tmp_path):                        # noqa: F811
    """What only trades memory for time may change: the run goes on to the same batches."""
    folder = copy_of(stopped, tmp_path)
    done = finish(runner, folder, "train.packs_at_once=2", "train.checkpointing=true", "train.loss_chunk=64")
    assert done["codes"] == [0], done
    assert metrics(folder)[-1] == (7, "sft")


def test_more_processes_than_gpus_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(synth.UserError, match="no GPU for process 2 .* 2 GPUs; start torchrun with --nproc-per-node=2"):
        inserter.start_group()


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(inserter.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="There is a GPU here"):
        inserter.demand_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    inserter.demand_gpu()


def test_workers_share_the_gpus(monkeypatch):
    """Three ranks' workers on four GPUs: rank 1's take GPUs 1, 0, 3, …"""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(synth, "end_with_parent", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    started = synth.multiprocessing.get_context("spawn").Value("i")
    for _ in range(3):
        synth.start_worker(started)
    assert taken == [1, 0, 3]


# --------------------------------------------------------------------------------------------------
# 6. Indexes and lanes
# --------------------------------------------------------------------------------------------------

def test_the_head_of_an_index_is_read_alone(small_data, tmp_path):
    path = synth.shard_path(synth.load_config(small_data), "interleaved", "train", 1)
    index = synth.read_index(path)
    assert synth.read_head(path) == {"count": index["count"], "counts": index["counts"]}
    large = tmp_path / "x.tar"
    counts = {f"rejected voice: {n}": n for n in range(1000)}                           # longer than one read
    large.with_suffix(".json").write_text(json.dumps({"count": 3, "counts": counts, "samples": []}))
    assert synth.read_head(large) == {"count": 3, "counts": counts}
    for text in ('{"count": 3', "", '{"count", "samples": ['):
        large.with_suffix(".json").write_text(text)
        with pytest.raises(UserError, match="x.json is damaged; remove"):
            synth.read_head(large)


def test_a_step_sees_samples_from_all_over(small_data):
    """Four lanes, four shards: in each epoch every lane reads another shard."""
    c = synth.load_config([*small_data, "model.vocab=600"])
    recipe = inserter.Recipe(c, "interleaved", "")
    assert recipe.counts == [30] * 4
    for epoch in range(3):
        first = [recipe.locate(epoch, lane * recipe.total // 4)[0] for lane in range(4)]
        assert len(set(first)) == 4


def test_shards_are_chosen_from_all_over_a_corpus():
    for most in (1, 10, 100):
        chosen = np.array(synth.chosen_shards(range(1000), most))
        assert len(set(chosen)) == most and np.diff(np.append(chosen, 1000 + chosen[0])).max() <= 1000 / most * 2.7
        assert set(chosen) <= set(synth.chosen_shards(range(1000), most + 7))


# --------------------------------------------------------------------------------------------------
# 7. Models beyond one GPU
# --------------------------------------------------------------------------------------------------

def test_sharded_training_is_that_of_plain_ddp(runner, many, tmp_path):                 # noqa: F811
    """Two ranks: the same first gradients and weights, the state and the export whole."""
    arguments = [argument for argument in many if not argument.startswith("train.stages")]
    stage = f"train.stages={{pretrain: {{steps: 4, mix: {{tasks: 0.5, text: 0.5}}, {COMMON}}}}}"
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    assert runner(plain, *arguments, stage, world=2)["codes"] == [0, 0]
    done = runner(sharded, *arguments, stage, "train.shard=true", world=2)
    assert done["codes"] == [0, 0], done
    assert metrics(plain, "batch", "targets") == metrics(sharded, "batch", "targets")
    one, two = (load_file(states(folder)[0] / "state.safetensors") for folder in (plain, sharded))
    assert one.keys() == two.keys() and all(one[name].shape == two[name].shape for name in one)
    gradients = [name for name in one if name.startswith("optim.exp_avg.")]
    assert len(gradients) > 30
    assert max(distance(two[name], one[name]) for name in gradients) < 1e-6
    ends = [load_file(folder / "runs/t/model/model.safetensors") for folder in (plain, sharded)]
    assert ends[0].keys() == ends[1].keys()
    assert max(distance(ends[1][name], ends[0][name]) for name in ends[0] if ends[0][name].any()) < 1e-5


def test_a_second_stage_trains_everything_that_is_sharded(runner, many, tmp_path):      # noqa: F811
    """After the point between the stages too: FSDP2 leaves embeddings, head and adapter whole after a forward pass
    without gradients, and an optimizer made then would hold what nobody trains."""
    arguments = [argument for argument in many if not argument.startswith("train.stages")]
    two = (f"train.stages={{pretrain: {{steps: 2, mix: {{tasks: 0.5, text: 0.5}}, {COMMON}}}, "
           f"sft: {{steps: 3, mix: {{chat: 1.0}}, {COMMON}}}}}")
    ends = []
    for name, shard in (("plain", "false"), ("sharded", "true")):
        done = runner(tmp_path / name, *arguments, two, f"train.shard={shard}", "train.eval_every=1", world=2)
        assert done["codes"] == [0, 0], done
        ends.append(load_file(states(tmp_path / name)[-1] / "state.safetensors"))
    assert metrics(tmp_path / "plain", "batch") == metrics(tmp_path / "sharded", "batch")
    assert ends[0].keys() == ends[1].keys()
    assert max(distance(ends[1][name], ends[0][name]) for name in ends[0]
               if name.startswith("weight.") and ends[0][name].any()) < 1e-4


def test_a_run_goes_on_sharded_and_back(runner, many, tmp_path):                        # noqa: F811
    """Two steps plain, two sharded, two plain again: the same losses as without the changes."""
    def go(folder, steps, *more):
        stage = f"train.stages={{pretrain: {{steps: 6, mix: {{tasks: 0.5, text: 0.5}}, {COMMON}}}}}"
        arguments = [argument for argument in many if not argument.startswith("train.stages")]
        options = {"term_step": steps, "term_ranks": [0]} if steps else {}
        return runner(folder, *arguments, stage, *more, world=2, **options)["codes"]

    assert go(tmp_path / "plain", 0) == [0, 0]
    mixed = tmp_path / "mixed"
    assert go(mixed, 2) == [143, 143]
    assert go(mixed, 4, "train.shard=true") in ([143, 143], [0, 0])
    assert go(mixed, 0) == [0, 0]
    assert metrics(tmp_path / "plain", "batch") == metrics(mixed, "batch")
    for (*which, want), (*other, got) in zip(metrics(tmp_path / "plain", "loss"), metrics(mixed, "loss"), strict=True):
        assert which == other and got == pytest.approx(want, rel=1e-4)


def test_sharding_wants_adamw():
    with pytest.raises(UserError, match="train.shard=true cannot divide Muon's slots; set train.stages.warmup_hear"):
        synth.load_config(["train.shard=true"])


# --------------------------------------------------------------------------------------------------
# 8. Many machines
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("environment, share", [
    ({}, (0, 1)),
    ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
    ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "2"}, (3, 4)),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (0, 1))])              # the batch script itself, in no step
def test_a_process_takes_its_share_from_its_environment(monkeypatch, environment, share):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert synth.share_of(None) == share
    assert synth.share_of("1/2") == (1, 2)


def test_shares_by_environment_make_everything_once(tmp_path, monkeypatch, small_data):
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        synth.main([*SMALL, f"data={tmp_path / 'data'}"])
        with pytest.raises(UserError, match="fresh=true removes the shards of all shares"):
            synth.main([*SMALL, f"data={tmp_path / 'data'}", "fresh=true"])
    with pytest.raises(UserError, match="give it once, in a process alone"):
        synth.main([*SMALL, f"data={tmp_path / 'data'}", "fresh=true", "shard=0/2"])
    c = synth.load_config(small_data)
    for key in synth.wanted_shards(c):
        path = synth.shard_path(c, *key)
        assert (tmp_path / "data" / path.relative_to(c.data)).read_bytes() == path.read_bytes()


def test_a_plan_says_what_will_be_made_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    size = ["synth.documents=400", "synth.held_out_documents=20", "synth.shard_documents=100"]
    synth.main([*size, "data=planned", "plan=1000"])
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out.splitlines()
    planned = {row.split()[0]: [float(cell.replace(",", "")) for cell in row.split()[1:]] for row in said[1:6]}
    synth.main([*size, "data=made"])
    for row in capsys.readouterr().out.splitlines():
        cells = row.split()
        if cells[1:2] == ["train"]:
            shards, samples, hours, _, _ = planned[cells[0]]
            assert shards == int(cells[2]) and samples == pytest.approx(int(cells[3]), rel=0.02)
            assert hours == pytest.approx(float(cells[4]), rel=0.15, abs=0.006)
    assert said[-1].startswith("1,000 hours of speech of this kind:") and "55 GPU-hours" in said[-1]
    with pytest.raises(UserError, match="plan must be true, or a number of hours, not 'yes'"):
        synth.load_config(["plan=yes"])


def test_old_gpus_take_plain_attention_and_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    inserter.is_recent_gpu.cache_clear()
    t4 = torch.device("cuda", 0)
    assert not inserter.is_recent_gpu(t4) and not inserter.uses_kernel(t4, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    inserter.is_recent_gpu.cache_clear()
    assert inserter.is_recent_gpu(t4) and inserter.uses_kernel(t4, 64)
    inserter.is_recent_gpu.cache_clear()
