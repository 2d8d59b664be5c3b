"""Many short training runs without paying the imports each time: a warm process forks the ranks of each run.

Reads one job per line from standard input, {"folder", "arguments", …}, and answers each with a line
{"codes": [exit status of each rank, -9 where it was killed], "out": "…", "err": "…"}. Options of a job:

    world       ranks (1)
    events      true: write the file operations under runs/ to the file `events`, one per line
    kill_event  kill -9 the process before its n-th file operation under runs/
    half_save   kill -9 in the middle of the n-th writing of weights: each save writes an export, then a state
    term_step   SIGTERM to `term_ranks` once metrics.jsonl has this step
    draw        draw the curves as well, which takes longer than the training here (false)
    file_limit  bytes a file may have: the disk is full beyond them
    patience    seconds that a rank which fails waits for rank 0 to speak (as synth.run says)
"""
import importlib
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

import torch                                 # noqa: E402

import inserter                              # noqa: E402
import synth                                 # noqa: E402

torch.set_num_threads(1)
WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
WARM = ("matplotlib.figure", "torch._dynamo", "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.qwen2_audio.modeling_qwen2_audio")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def inject(job: dict) -> None:
    """Put the faults that a job asks for in the way of this process."""
    seen = [0]
    saves = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event not in WATCHED or not str(arguments[0]).startswith("runs"):
            return
        seen[0] += 1
        if job.get("events"):
            os.write(events, f"{event} {arguments[0]}\n".encode())
        if seen[0] == job.get("kill_event"):
            die()

    def written(path: Any) -> None:
        saves[0] += 1
        if saves[0] == job.get("half_save"):
            os.truncate(path, os.stat(path).st_size // 2)
            die()

    def save_file(tensors: dict, path: Path, **options: Any) -> None:
        inserter_save_file(tensors, path, **options)
        written(path)

    def replace(aside: Path, path: Path) -> None:
        if path.suffix == ".pt":
            written(aside)
        os_replace(aside, path)

    inserter_save_file, inserter.save_file = inserter.save_file, save_file
    os_replace, os.replace = os.replace, replace
    if not job.get("draw"):
        inserter.draw_curves = lambda folder: None
    if job.get("events"):
        events = os.open("events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if job.get("events") or "kill_event" in job:
        sys.addaudithook(hook)
    if "patience" in job:
        sleep = time.sleep
        synth.time.sleep = lambda seconds: sleep(min(seconds, job["patience"]))
    if "file_limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], -1))


def rank_main(job: dict, rank: int, port: int) -> None:
    """One rank, in a process of its own, as `python inserter.py` or torchrun would run it."""
    os.chdir(job["folder"])
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
    inject(job)
    try:
        synth.run(inserter.main)
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
                signal_to(list(ranks.values()), signal.SIGTERM)
        if "term_step" in job and reached(job):
            signal_to(job["term_ranks"], signal.SIGTERM)
            del job["term_step"]
        if time.time() - begun > 120:
            signal_to(list(ranks.values()), signal.SIGKILL)
        time.sleep(0.005)
    answer: dict[str, Any] = {"codes": [codes[rank] for rank in range(len(ranks))]}
    for name in ("out", "err"):
        files = [Path(job["folder"]) / f"{name}{rank}" for rank in range(len(ranks))]
        answer[name] = "".join(file.read_text() for file in files)
    return answer


def main() -> None:
    for name in WARM:                        # here, for reading processes import this file too
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
