"""Many short training runs without paying the imports each time: a warm process forks the ranks of each run.

Reads one job per line from standard input, {"folder", "arguments", …}, and answers each with a line
{"codes": [exit status of each rank, -9 where it was killed], "out": "…", "err": "…"}. Options of a job:

    world       ranks (1)
    folders     a folder for each rank in place of "folder", as on machines with disks of their own
    kill_event  kill -9 the process before its n-th file operation under runs/ (-1: never)
    half_save   kill -9 in the middle of the n-th writing of weights
    kill_after  kill -9 after so many seconds
    term_step   SIGTERM to `term_ranks` once metrics.jsonl has this step
    draw        draw the curves as well, which takes longer than the training here (false)
    file_limit  bytes a file may have: the disk is full beyond them
"""
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot                     # noqa: E402, F401  imported here, not in every run
import torch                                 # noqa: E402
import torch._dynamo                         # noqa: E402, F401
from transformers.models.qwen2_audio import modeling_qwen2_audio     # noqa: E402, F401

import inserter                              # noqa: E402
import synth                                 # noqa: E402

torch.set_num_threads(1)
WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def inject(job: dict) -> list[int]:
    """Put the faults that a job asks for in the way of this process -> [file operations seen so far]."""
    seen = [0]
    saves = [0]
    save_file = inserter.save_file

    def hook(event: str, arguments: tuple) -> None:
        if event not in WATCHED:
            return
        if str(arguments[0]).startswith("runs") or event in ("os.remove", "os.rmdir"):
            seen[0] += 1
            if seen[0] == job["kill_event"]:
                die()

    def half(tensors: dict, path: Path, **options: Any) -> None:
        save_file(tensors, path, **options)
        saves[0] += 1
        if saves[0] == job.get("half_save"):
            os.truncate(path, path.stat().st_size // 2)
            die()

    inserter.save_file = half
    if not job.get("draw"):
        inserter.draw_curves = lambda c: None
    if "kill_event" in job:
        sys.addaudithook(hook)
    if "file_limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], -1))
    return seen


def rank_main(job: dict, rank: int, port: int) -> None:
    """One rank, in a process of its own, as `python inserter.py` or torchrun would run it."""
    os.chdir(folder_of(job, rank))
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    world = job.get("world", 1)
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}
    sys.argv[1:] = job["arguments"]
    code = 0
    seen = inject(job)
    try:
        synth.run(inserter.main)
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if "kill_event" in job:
        print("events", seen[0])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def folder_of(job: dict, rank: int) -> str:
    return job["folders"][rank] if "folders" in job else job["folder"]


def start(job: dict) -> dict[int, int]:
    """Fork the ranks -> {process: rank}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {}
    for rank in range(job.get("world", 1)):
        pid = os.fork()
        if not pid:
            rank_main(job, rank, port)
        ranks[pid] = rank
    return ranks


def reached(job: dict) -> bool:
    path = Path(job["folder"]) / "runs" / "t" / "metrics.jsonl"
    return path.exists() and f'"step": {job["term_step"]},' in path.read_text()


def run(job: dict) -> dict:
    ranks = start(job)
    codes: dict[int, int] = {}
    begun = time.time()
    told = []                                # ranks that get SIGTERM now

    def signal_to(wanted: list[int], number: int) -> None:
        for pid, rank in ranks.items():
            if rank in wanted and rank not in codes:
                os.kill(pid, number)

    while len(codes) < len(ranks):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            codes[ranks[pid]] = code
            if code:                         # the others are stopped, as torchrun does
                told = list(ranks.values())
        if "term_step" in job and reached(job):
            told = job["term_ranks"]
            del job["term_step"]
        signal_to(told, signal.SIGTERM)
        told = []
        if time.time() - begun > job.get("kill_after", 60):
            signal_to(list(ranks.values()), signal.SIGKILL)
        time.sleep(0.005)
    answer: dict[str, Any] = {"codes": [codes[rank] for rank in range(len(ranks))]}
    for name in ("out", "err"):
        files = [Path(folder_of(job, rank)) / f"{name}{rank}" for rank in range(len(ranks))]
        answer[name] = "".join(file.read_text() for file in files)
    return answer


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
