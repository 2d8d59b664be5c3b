"""Recordings: a NeMo manifest becomes shards of speech tasks, or asks a run what it hears.

A line is a recording: a sound file of any kind that soundfile reads, its path relative to the manifest. With
an "offset" (seconds) it is `duration` seconds of the file from there on.

    {"audio_filepath": "clips/1.flac", "text": "chapter one", "duration": 2.1, "lang": "en"}
    {"audio_filepath": "clips/2.mp3", "text": "Kapitel eins", "task": "translate", "prompt": "In German:"}
    {"audio_filepath": "clips/3.wav", "text": "angry", "task": "emotion", "transcript": "leave me alone"}

"text" is the answer; "task" is transcribe where nothing else is said; "prompt" is asked after the clip, of
itself the task's name and a colon. Without a "transcript" the words of other tasks' clips are not known, and
a CTC stage would learn that nothing is said: name recordings in its mix only where all words are known.

    python extras/recordings.py manifest=train.json              data/recordings/train-000000.tar, …
    torchrun inserter.py train.stages.pretrain.mix='{interleaved: 0.4, recordings: 0.3, text: 0.3}'
    python extras/recordings.py manifest=dev.json score=true     what the run hears: WER, CER, exact answers
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import math
import os
import re
import shutil
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import soundfile
import torchaudio
from tqdm import tqdm

import bench
import inserter
import synth
from inserter import InSerter, Tokenizer
from synth import RATE, Settings, UserError

ENDS_EARLY = re.compile(r"^data : (\d+) \(should be", re.M)      # libsndfile notes it of a WAV cut short
UNKNOWN_LENGTH = 2 ** 31 - 4096     # bytes; programs that write to a pipe say 2 or 4 GB
ROUNDING = 0.1                      # seconds that a manifest's duration may be too long


# 1. From a line to a clip and a sample ------------------------------------------------------------

def read_manifest(path: Path) -> Iterator[dict]:
    """The recordings of a manifest. UserError names a line that is none."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if line.strip():
                yield recording_of(json.loads(line), path.parent)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f'{path}, line {number}: no recording ({error!r}); each line needs the texts '
                            '"audio_filepath" and "text"; "offset" and "duration" are seconds.') from None


def recording_of(row: dict, folder: Path) -> dict:
    """A line's recording, without other keys. Raises an error of some kind if there is none.

    >>> recording_of({"audio_filepath": "/1.wav", "text": " red.", "duration": "2.5", "id": 7}, Path("."))
    {'audio_filepath': '/1.wav', 'text': 'red.', 'duration': 2.5}
    """
    recording = {"audio_filepath": str(folder / row["audio_filepath"]), "text": synth.clean(row["text"])}
    convert = dict.fromkeys(("lang", "task", "prompt", "transcript"), synth.clean)
    convert |= dict.fromkeys(("offset", "duration"), float)             # some tools write numbers as texts
    return recording | {key: convert[key](row[key]) for key in convert if row.get(key) is not None}


def read_clip(recording: dict, longest: float) -> tuple[np.ndarray, str | None]:
    """The clip (samples,) float32 at 16 kHz, and None or what makes it unfit.

    Recordings longer than `longest` seconds are rejected from their header, without decoding.
    """
    nothing = np.zeros(0, np.float32)
    if not os.path.isfile(recording["audio_filepath"]):
        return nothing, "no such file"
    try:
        with soundfile.SoundFile(recording["audio_filepath"]) as file:
            early = ENDS_EARLY.search(file.extra_info)
            is_short = early and int(early[1]) < UNKNOWN_LENGTH
            file.seek(round(recording.get("offset", 0.0) * file.samplerate))
            frames = file.frames - file.tell()
            if "duration" in recording:
                wanted = round(recording["duration"] * file.samplerate)
                is_short = is_short or frames < wanted - ROUNDING * file.samplerate
                if "offset" in recording:
                    frames = max(0, min(frames, wanted))
            if frames > longest * file.samplerate:
                return nothing, "too long"
            sound = file.read(frames, dtype="float32", always_2d=True)                  # (frames, channels)
            if is_short or len(sound) < frames:
                return nothing, "cut short"
            clip = synth.to_16k(sound.mean(1), file.samplerate)[:int(longest * RATE)]
            return clip, None if np.isfinite(clip).all() else "not finite"
    except (soundfile.SoundFileError, OSError, OverflowError, ValueError):
        return nothing, "unreadable"


def task_sample(recording: dict) -> dict:
    """A recording as a sample of a speech task: the clip, what is asked of it, the answer.

    >>> sample = task_sample({"text": "angry", "task": "emotion"})
    >>> [(part["role"], part["text"]) for part in sample["parts"]]
    [('speech', ''), ('text', 'Emotion:'), ('text', ' angry')]
    """
    task = recording.get("task", "transcribe")
    words = recording["text"] if task == "transcribe" else recording.get("transcript", "")
    ask = synth.TASKS[task]["ask"] if task in synth.TASKS else f"{task.capitalize()}:"
    speech = {"role": "speech", "text": words, "audio": "00.flac", "voice": "recorded"}
    question = synth.text_part(recording.get("prompt", ask), loss=False)
    answer = synth.text_part(" " + recording["text"], loss=True)
    return {"parts": [speech, question, answer], "messages": None}


# 2. Shards ----------------------------------------------------------------------------------------

def fit_clip(limits: Settings, recording: dict) -> tuple[bytes, float, str | None]:
    """A clip as FLAC, its seconds, and None or what makes it unfit: as of synthesised speech, at any pace."""
    clip, unfit = read_clip(recording, limits.max_seconds)
    any_pace = Settings(limits | {"chars_per_second": [0.0, math.inf]})
    unfit = unfit or synth.gate(clip, recording["text"], any_pace)
    return b"" if unfit else synth.flac_bytes(clip), len(clip) / RATE, unfit


def make_shard(c: Settings, path: Path, first: int, recordings: list[dict]) -> None:
    """The shard of these recordings, the first of which is the manifest's `first`."""
    samples = []
    clips = {}
    counts = Counter()
    with ThreadPoolExecutor(c.synth.workers) as pool:
        fit = pool.map(lambda recording: fit_clip(c.synth.gate, recording), recordings)
        for number, (recording, (flac, seconds, unfit)) in enumerate(zip(recordings, fit), first):
            if unfit:
                counts[f"rejected: {unfit}"] += 1
                continue
            name = f"recordings-train-{number:06d}"
            clips[name] = {"00.flac": flac}
            lang = recording.get("lang", c.synth.lang)
            samples.append({"id": name, "recipe": "tasks", "lang": lang} | task_sample(recording))
            samples[-1]["parts"][0]["seconds"] = round(seconds, 3)
            counts["seconds"] += seconds
    if counts["rejected: no such file"] == len(recordings):
        raise UserError(f"None of {len(recordings)} recordings from {recordings[0]['audio_filepath']} on is "
                        "there; audio_filepath is relative to the manifest.")
    synth.write_shard(path, samples, clips, dict(counts))


def make_shards(c: Settings) -> None:
    """Make the shards that are missing, and print what all of them hold."""
    folder = Path(c.data) / "recordings"
    if c.fresh and (folder / "settings.yaml").is_file():
        shutil.rmtree(folder)
    size = c.synth.shard_documents
    checksum = zlib.crc32(Path(c.manifest).read_bytes())
    shaping = {"manifest": checksum, "shard_documents": size, "lang": c.synth.lang, "gate": c.synth.gate}
    synth.same_settings(folder / "settings.yaml", shaping, "choose another folder with data=…, or fresh=true",
                        begun=any(folder.glob("*.tar")))
    recordings = list(read_manifest(Path(c.manifest)))
    total = Counter()
    for first in tqdm(range(0, len(recordings), size), desc="shards", disable=None):
        path = synth.shard_path(c, "recordings", "train", first // size)
        if not path.is_file():
            make_shard(c, path, first, recordings[first:first + size])
        index = synth.read_index(path)
        total += Counter(index["counts"], samples=index["count"])
    rejected = [f"{name.removeprefix('rejected: ')} {n}" for name, n in total.items() if "rejected" in name]
    print(f"{folder} holds {total['samples']} of {len(recordings)} recordings, "
          f"{total['seconds'] / 3600:.2f} hours; left out: {', '.join(rejected) or 'none'}.")


# 3. What a run hears ------------------------------------------------------------------------------

def compared(row: dict) -> dict[str, tuple[int, int]]:
    """How far a response is from a recording's text, without case and punctuation.

    >>> compared({"text": "It is red.", "response": "it is read"})
    {'WER': (1, 3), 'CER': (1, 7), 'exact': (0, 1)}
    """
    wanted, said = (synth.WORD.findall((text or "").lower()) for text in (row["text"], row["response"]))
    letters = "".join(wanted)
    distance = torchaudio.functional.edit_distance
    return {
        "WER": (distance(wanted, said), len(wanted)),
        "CER": (distance(letters, "".join(said)), len(letters)),
        "exact": (int(wanted == said), 1)}


def ask(c: Settings, model: InSerter, tok: Tokenizer, recordings: list[dict], path: Path) -> list[dict]:
    """The recordings with their responses, None where a clip is unfit; `path` keeps them as they come."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    done = {row["number"]: row for row in map(json.loads, lines)}
    todo = [number for number in range(len(recordings)) if number not in done]
    for first in tqdm(range(0, len(todo), c.bench.batch), desc="answers", disable=None):
        prompts = {}
        for number in todo[first:first + c.bench.batch]:
            clip, unfit = read_clip(recordings[number], longest=30.0)       # of Whisper's window
            if not unfit and inserter.audio_positions(len(clip)):
                question = {"parts": task_sample(recordings[number])["parts"][:2]}
                prompts[number] = inserter.encode(question, {"00.flac": clip}, tok, reply=True)
        responses = inserter.complete(model, tok, list(prompts.values()), c.max_tokens, c.bench.batch)
        for number, (text, _) in zip(prompts, responses):
            done[number] = {"number": number} | recordings[number] | {"response": text.strip()}
        lines = [json.dumps(done[number], ensure_ascii=False) + "\n" for number in sorted(done)]
        synth.write_whole(path, "".join(lines).encode())
    return [done.get(number, recording | {"response": None}) for number, recording in enumerate(recordings)]


def score(c: Settings) -> None:
    """Ask the run about the recordings, and print the figures of each task and language."""
    manifest = Path(c.manifest)
    recordings = list(read_manifest(manifest))
    if not recordings:
        raise UserError(f"{manifest} names no recording.")
    model, tok = inserter.load_run(c)
    path = inserter.run_folder(c) / "recordings" / f"{manifest.stem}.jsonl"
    if c.fresh:
        path.unlink(missing_ok=True)
    weights = inserter.run_folder(c) / "model" / "model.safetensors"
    checksums = {"model": zlib.crc32(weights.read_bytes()), "manifest": zlib.crc32(manifest.read_bytes())}
    shaping = checksums | {"max_tokens": c.max_tokens}
    synth.same_settings(Path(f"{path}.yaml"), shaping, "ask anew with fresh=true", begun=path.is_file())
    groups = defaultdict(list)
    for row in ask(c, model, tok, recordings, path):
        groups[row.get("task", "transcribe"), row.get("lang", c.synth.lang)].append(row)
    results = []
    for (task, lang), rows in sorted(groups.items()):
        unfit = sum(row["response"] is None for row in rows)
        results.append({"task": task, "lang": lang, "count": len(rows), "unfit": unfit})
        for metric in ("WER", "CER", "exact"):
            counts = [compared(row)[metric] for row in rows]
            results[-1][f"{metric} %"] = bench.estimate(counts, c.bench.bootstrap)
    bench.print_results(results)
    print(f"{path} has the answers.")


def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments, manifest="", score=False, max_tokens=256)          # of an answer
    if not c.manifest:
        raise UserError("manifest=FILE.json is missing: recordings, one JSON object a line.")
    score(c) if c.score else make_shards(c)


if __name__ == "__main__":
    synth.run(main)
