"""A bad day: processes that are killed, folders that are somebody else's, dialogues without answers, old GPUs."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from test_training import (COMMON, TASKS, TORCHRUN, Runner, damage, logged, marked, rows, runner, stages,   # noqa: F401
                           stat)

import inserter
import synth
from synth import UserError

ROOT = Path(__file__).parents[1]
LONG = stages(pretrain=f"steps: 100000, {TASKS}")
ONE = stages(pretrain=f"steps: 1, {TASKS}")


# --------------------------------------------------------------------------------------------------
# 1. Killed processes
# --------------------------------------------------------------------------------------------------

def test_a_killed_reader_is_one_sentence(runner, marked, tmp_path):                        # noqa: F811
    """The server of readers is a child of the rank; a reader is a child of the server."""
    run = marked(sys.executable, ROOT / "inserter.py", *runner.settings(LONG, "train.workers=1"), folder=tmp_path)
    run.until(logged(tmp_path, 2))
    readers = [reader for server in run.children(run.process.pid) for reader in run.children(server)]
    assert len(readers) == 1
    os.kill(readers[0], signal.SIGKILL)
    run.until(run.ended, seconds=20)
    _, err = run.process.communicate()
    assert run.process.returncode == 2
    assert err.startswith("A process that read samples was killed"), err
    assert err.count("\n") == 1, err


def test_a_readers_error_is_one_sentence_and_ends_the_run(runner, marked, tmp_path):    # noqa: F811
    """Nobody is left who waits for somebody, at the interpreter's end neither."""
    data = tmp_path / "data"
    shutil.copytree(runner.data[-1].removeprefix("data="), data)
    for path in sorted(data.glob("tasks/train-*.tar")):
        for number in range(0, synth.read_index(path)["count"], 10):
            damage(path, number)
    command = [ROOT / "inserter.py", *runner.settings(LONG, "train.workers=1", f"data={data}")]
    run = marked(sys.executable, *command, folder=tmp_path)
    _, err = run.process.communicate(timeout=90)
    assert run.process.returncode == 2
    assert re.fullmatch(r"Sample \d+ in .*/tasks/train-00000\d.tar is damaged; .*[.]\n", err), err
    run.until(run.ended, seconds=10)


def test_who_remains_of_two_ranks_ends_too(runner, marked, tmp_path):                   # noqa: F811
    """kill -9 of one rank under torchrun: it says which one, and nobody is left, no reading process either."""
    run = marked(*TORCHRUN, ROOT / "inserter.py", *runner.settings(LONG, "train.workers=1"), folder=tmp_path)
    run.until(logged(tmp_path, 2))
    ranks = run.children(run.process.pid)
    assert len(run.alive()) >= 7             # torchrun, and two ranks with a fork server and a reader
    (last,) = [pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(last, signal.SIGKILL)
    run.until(run.ended, seconds=20)
    _, err = run.process.communicate()
    assert run.process.returncode == 1
    assert "rank      : 1 (local_rank: 1)" in err, err
    assert "exitcode  : -9" in err, err


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


def python_voice(folder: Path) -> list:
    (folder / "slow_voice.py").write_text(SLOW_VOICE)
    return [sys.executable, ROOT / "synth.py", *SMALL[:-1], "synth.workers=2",
            "synth.engine=python:slow_voice:speak", "synth.shards={chat: 4}"]


def test_a_killed_synthesis_worker_is_one_sentence(tmp_path):
    command = python_voice(tmp_path)
    (tmp_path / "kill").touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1
    assert "A process that made shards was killed" in done.stderr
    (tmp_path / "kill").unlink()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done


@pytest.mark.parametrize("engine", ["python", "espeak"])
def test_synthesis_workers_end_with_who_started_them(marked, tmp_path, engine):         # noqa: F811
    if engine == "python":
        (tmp_path / "wait").touch()
        run = marked(*python_voice(tmp_path), folder=tmp_path)
        run.until((tmp_path / "waiting").exists)
    else:
        run = marked(sys.executable, ROOT / "synth.py", "synth.documents=8000", "synth.workers=2", folder=tmp_path)
        run.until(lambda: any("forkserver" in command for command in run.alive().values()))
    os.kill(run.process.pid, signal.SIGKILL)
    run.until(run.ended, seconds=10)


def test_a_killed_espeak_process_is_one_sentence(marked, tmp_path):                     # noqa: F811
    run = marked(sys.executable, ROOT / "synth.py", "synth.documents=8000", "synth.workers=1", folder=tmp_path)

    def makers() -> list[int]:
        """Processes that make a shard: children of the fork server."""
        servers = [pid for pid, command in run.alive().items() if "forkserver" in command]
        return [child for server in servers for child in run.children(server)]

    os.kill(run.until(makers)[0], signal.SIGKILL)
    _, err = run.process.communicate(timeout=60)
    assert run.process.returncode == 2
    assert err.count("\n") == 1
    assert "A process that made shards was killed" in err
    run.until(run.ended, seconds=10)


# --------------------------------------------------------------------------------------------------
# 2. Somebody else's files
# --------------------------------------------------------------------------------------------------

def test_fresh_leaves_a_users_files_alone(tmp_path, monkeypatch):
    """data=mine with the corpus in mine/text: the recipe `text` may not move in there."""
    monkeypatch.chdir(tmp_path)
    book = tmp_path / "mine" / "text" / "book.txt"
    book.parent.mkdir(parents=True)
    book.write_text("It is red. The ball is in the old garden of tom.\n\nIt is blue.")
    mine = ["data=mine", "synth.corpus=mine/text/*.txt", "synth.held_out_share=0", "synth.workers=1"]
    for arguments in (mine, [*mine, "fresh=true"]):
        with pytest.raises(UserError, match="mine/text holds files that synth.py did not make; choose another"):
            synth.main(arguments)
        assert book.is_file()
    synth.main([*mine, "fresh=true", "synth.shards={tasks: 1}"])
    synth.main([*mine, "fresh=true", "synth.shards={tasks: 1}"])
    assert book.is_file()
    assert (tmp_path / "mine/tasks/train-000000.tar").is_file()


@pytest.mark.parametrize("run", ["..", ".", ".hidden", "_", "-rf", "a/b"])
def test_a_runs_name_is_a_plain_one(run):
    with pytest.raises(UserError, match="must be a plain folder name"):
        synth.load_config([f"run={run}"])


def test_fresh_removes_runs_only(runner, tmp_path):                                     # noqa: F811
    thesis = tmp_path / "runs" / "t" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("two years of work")
    done = runner(tmp_path, ONE, "fresh=true")
    assert done["codes"] == [2], done
    assert "runs/t has no config.yaml" in done["err"]
    assert thesis.is_file()


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
    assert len(set((tmp_path / "file").read_bytes())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_resumed_run_does_not_hold_its_state_file(runner, tmp_path, monkeypatch):     # noqa: F811
    """Neither mapped nor open: it may be removed, and its space is free."""
    assert runner(tmp_path, ONE)["codes"] == [0]
    monkeypatch.chdir(tmp_path)
    state = inserter.load_state(Path("runs/t/state"))
    assert len(state["weights"]) > 30
    assert ".pt" not in Path("/proc/self/maps").read_text()
    assert not any(".pt" in os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink())


# --------------------------------------------------------------------------------------------------
# 3. Evaluation
# --------------------------------------------------------------------------------------------------

def test_dialogues_without_answers_end_no_run(runner, tmp_path):                        # noqa: F811
    """A data folder whose dialogues lack answers, or are far too long; every sort of them in dev too."""
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
    (tmp_path / "odd.jsonl").write_text("\n".join(lines))
    odd = [*SMALL, f"synth.corpus={tmp_path / 'odd.jsonl'}", f"data={tmp_path / 'data'}", "synth.held_out_share=0.3",
           "synth.shards={interleaved: 1, tasks: 1, text: 1, chat: 1}"]
    synth.make_shards(synth.load_config(odd))
    done = runner(tmp_path, stages(sft="steps: 2, mix: {chat: 0.5, text: 0.5}"), *odd, "train.eval_samples=64")
    assert done["codes"] == [0], done
    assert set(rows(tmp_path)[-1]["eval"]) >= {"heard", "typed", "gap", "text", "obeys spoken", "obeys typed"}


# --------------------------------------------------------------------------------------------------
# 4. GPUs
# --------------------------------------------------------------------------------------------------

def test_old_gpus_take_plain_attention_and_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    inserter.is_recent_gpu.cache_clear()
    t4 = torch.device("cuda", 0)
    assert not inserter.is_recent_gpu(t4)
    assert not inserter.uses_kernel(t4, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    inserter.is_recent_gpu.cache_clear()
    assert inserter.is_recent_gpu(t4)
    assert inserter.uses_kernel(t4, 64)
    inserter.is_recent_gpu.cache_clear()
