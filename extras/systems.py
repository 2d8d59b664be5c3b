"""Other systems answer bench.py's prompts; bench.py scores the file of their answers.

    system=hf:FOLDER           a checkpoint, or a hub's name, that transformers' auto classes open for audio
                               and text: Qwen2-Audio, or the export of a run
    system=cascade:ASR,LLM     two of transformers' models: what the first hears is typed to the second, or to
                               the LLM of a run's export, and stands in the row as "heard"
    system=url:ADDRESS,MODEL   an OpenAI-compatible server that takes audio; its key is the environment's
                               SYSTEM_API_KEY

The prompts are a folder's, as in bench.py, or a file of rows: runs/<run>/bench/prompts.jsonl is the tiny
suite. A spoken prompt is one turn of the user: its clips of at most 30 s, and request=… beside them for
systems that want to be told to answer. Answers are greedy, of at most bench.max_tokens tokens, to bench.batch
prompts at a time; url: sends bench.requests at once. An interrupted command goes on where it was.

    python extras/systems.py prompts=sib system=hf:Qwen/Qwen2-Audio-7B-Instruct to=answers.jsonl \\
        bench.max_tokens=1024 bench.batch=8
    python bench.py score=answers.jsonl

    python extras/systems.py prompts=runs/tiny/bench/prompts.jsonl to=cascade.jsonl \\
        system=cascade:openai/whisper-small,Qwen/Qwen2.5-0.5B-Instruct
    python bench.py score=runs/tiny/bench/answers.jsonl,cascade.jsonl            the run and the cascade
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import base64
import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import soundfile
import torch
import transformers
from tqdm import tqdm

import bench
import inserter
import synth
from synth import RATE, Settings, UserError

TRANSCRIBE = "Write down what is said, word for word."      # beside the clips of the suite transcription
# No speaker says more tokens a second, but an ASR model repeats itself on some clips until it is stopped.
TOKENS_A_SECOND = 10

Turn = tuple[list[np.ndarray], str]           # what a row asks: clips (samples,) at 16 kHz, and a text
Reply = dict                                  # "response", "truncated", and a cascade's "heard"
Ask = Callable[[list[dict], list[Turn]], Iterable[Reply]]             # the replies to some rows


def turn_of(row: dict, folder: Path, request: str) -> Turn:
    """What a row asks; its clip is looked for in `folder`."""
    if row["mode"] != "spoken":
        return [], bench.question_of(row, folder)
    return bench.question_of(row, folder), TRANSCRIBE if row["suite"] == "transcription" else request


# 1. Checkpoints ---------------------------------------------------------------------------------------------
# transformers loads and generates: on a GPU in the checkpoint's type; on a CPU, or a run's LLM, in float32.

def placement() -> dict:
    """Where a model stands, and in which type."""
    device = inserter.device_here()
    return {"device": device, "dtype": "auto" if device.type == "cuda" else torch.float32}


def greedy(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase,
           inputs: transformers.BatchEncoding, max_tokens: int) -> list[Reply]:
    """Answers to prompts that are padded on their left."""
    made = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    made = made[:, inputs["input_ids"].shape[1]:]           # (B, new tokens)
    ends = set(np.atleast_1d(model.generation_config.eos_token_id))
    return [{"response": tokenizer.decode(ids, skip_special_tokens=True), "truncated": not ends & set(ids)}
            for ids in made.tolist()]


def open_hf(c: Settings, name: str) -> Ask:
    """A model that hears and reads: clips and text are its user's turn."""
    processor = transformers.AutoProcessor.from_pretrained(name)
    processor.tokenizer.padding_side = "left"
    where = placement()
    model = transformers.AutoModelForMultimodalLM.from_pretrained(name, dtype=where["dtype"])
    model.to(where["device"]).eval()

    def ask(rows: list[dict], turns: list[Turn]) -> list[Reply]:
        prompts = []
        for clips, text in turns:
            content = [{"type": "audio", "audio_url": ""} for _ in clips]       # where a clip shall stand
            content += [{"type": "text", "text": text}] if text else []
            prompts.append([{"role": "user", "content": content}])
        texts = processor.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
        heard = [clip for clips, _ in turns for clip in clips]
        audio = {"audio": heard, "sampling_rate": RATE} if heard else {}
        inputs = processor(text=texts, add_special_tokens=False, padding=True, return_tensors="pt", **audio)
        return greedy(model, processor.tokenizer, inputs.to(model.device, model.dtype), c.bench.max_tokens)
    return ask


def open_llm(name: str) -> transformers.PreTrainedModel:
    """An LLM, or that of a Qwen2-Audio."""
    if not isinstance(transformers.AutoConfig.from_pretrained(name), transformers.Qwen2AudioConfig):
        return transformers.pipeline("text-generation", name, **placement()).model
    llm = inserter.their_llm(inserter.load_model(name))
    llm.generation_config = transformers.GenerationConfig.from_pretrained(name)
    return llm.to(inserter.device_here())


def open_cascade(c: Settings, names: str) -> Ask:
    """A model that hears and one that reads what was heard. The first alone answers a transcription."""
    asr, _, llm = names.partition(",")
    hear = transformers.pipeline("automatic-speech-recognition", asr, **placement())
    reader = open_llm(llm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def transcripts(clips: list[np.ndarray]) -> list[str]:
        seconds = max(map(len, clips)) / RATE
        limits = {"max_new_tokens": 10 + int(TOKENS_A_SECOND * seconds), "num_beams": 1}
        generating = {"generate_kwargs": limits} if hear.type.startswith("seq2seq") else {}
        inputs = [{"raw": clip, "sampling_rate": RATE} for clip in clips]
        outputs = hear(inputs, batch_size=c.bench.batch, **generating)
        return [output["text"].strip() for output in outputs]

    def ask(rows: list[dict], turns: list[Turn]) -> list[Reply]:
        spoken = [clip for clips, _ in turns for clip in clips]
        written = iter(transcripts(spoken) if spoken else [])
        replies = []
        asked = []
        for row, (clips, text) in zip(rows, turns, strict=True):
            heard = " ".join(next(written) for _ in clips).strip()
            replies.append({"response": heard, "truncated": False} | ({"heard": heard} if clips else {}))
            asked.append([{"role": "user", "content": f"{heard}\n{text}".strip()}])
        wanted = [n for n, row in enumerate(rows) if row["suite"] != "transcription"]
        if wanted:
            inputs = tokenizer.apply_chat_template([asked[n] for n in wanted], add_generation_prompt=True,
                                                   padding=True, return_tensors="pt", return_dict=True)
            answers = greedy(reader, tokenizer, inputs.to(reader.device), c.bench.max_tokens)
            for n, answer in zip(wanted, answers, strict=True):
                replies[n] |= answer
        return replies
    return ask


# 2. Servers -------------------------------------------------------------------------------------------------

def open_url(c: Settings, name: str) -> Ask:
    """A server. A request that it refuses for what it asks, and a reply that is none, are missing answers."""
    import openai                      # here: only a server needs it
    address, _, model = name.rpartition(",")
    key = os.environ.get("SYSTEM_API_KEY") or "no-key-was-given"
    client = openai.OpenAI(base_url=address, api_key=key)

    def safe(said: str) -> str:
        """Without the key, should the server say it, and without half a surrogate pair, which is no text."""
        return said.replace(key, "[key]").encode("utf-8", "replace").decode()

    def reply_to(turn: Turn) -> Reply:
        clips, text = turn
        content = [wav_part(clip) for clip in clips]
        content += [{"type": "text", "text": text}] if text else []
        request = {"model": model, "messages": [{"role": "user", "content": content}]}
        try:
            reply = client.chat.completions.create(**request, max_tokens=c.bench.max_tokens, temperature=0)
            choice = reply.choices[0]
            response = safe(choice.message.content or "")
            return {"response": response, "truncated": choice.finish_reason == "length"}
        except openai.BadRequestError as error:              # too long, or against the server's rules
            return {"response": None, "problem": safe(error.message)}
        except (AttributeError, IndexError, TypeError, ValueError):
            return {"response": None, "problem": "what the server sent is no completion"}
        except openai.OpenAIError as error:
            raise UserError(f"{address}: {safe(str(error))}; what is answered so far is kept.") from None

    def ask(rows: list[dict], turns: list[Turn]) -> Iterable[Reply]:
        with ThreadPoolExecutor(c.bench.requests) as pool:
            yield from pool.map(reply_to, turns)
    return ask


def wav_part(clip: np.ndarray) -> dict:
    """A clip as the part of a message."""
    file = io.BytesIO()
    soundfile.write(file, clip, RATE, format="WAV", subtype="PCM_16")
    return {"type": "input_audio",
            "input_audio": {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}}


SYSTEMS = {"hf": open_hf, "cascade": open_cascade, "url": open_url}


# 3. The file of answers -------------------------------------------------------------------------------------

def read_prompts(c: Settings) -> tuple[Path, list[dict]]:
    """(where the rows' clips are looked for, the rows)"""
    path = Path(c.prompts)
    if path.is_file():
        rows = bench.read_rows(path, suite=c.suite, condition="standard", lang="en")
        return path.parent, [{"key": number} | row for number, row in enumerate(rows, 1)]
    rows = bench.read_folder(path)
    return path, [row | {"mode": "spoken" if row["audio_path"] else "typed"} for row in rows]


@torch.inference_mode()
def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments, system="", to="", request="")
    kind, _, name = c.system.partition(":")
    if not c.prompts or not c.to:
        raise UserError("prompts=FOLDER and to=FILE.jsonl are missing: what is asked, and where the answers "
                        "shall stand.")
    if kind not in SYSTEMS or not name or (kind != "hf" and "," not in name):
        raise UserError(f"There is no system {c.system!r}; it is hf:FOLDER, cascade:ASR,LLM or "
                        "url:ADDRESS,MODEL.")
    path = Path(c.to)
    settings_path = Path(f"{path}.yaml")
    if path.is_file() and not settings_path.is_file():
        raise UserError(f"{path} was not begun by this script, so it is not continued; choose another file.")
    folder, rows = read_prompts(c)
    if c.fresh:
        path.unlink(missing_ok=True)
    settings = {key: c[key] for key in ("prompts", "system", "request")} | {"max_tokens": c.bench.max_tokens}
    remedy = f"choose another file than {path}, or fresh=true"
    synth.same_settings(settings_path, settings, remedy, begun=path.is_file())
    answered = {row["key"] for row in bench.kept_lines(path)}
    todo = [row for row in rows if row["key"] not in answered]
    todo.sort(key=lambda row: (row["suite"], row["mode"], len(row["prompt"])))      # batches of like lengths
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        ask = SYSTEMS[kind](c, name) if todo else None
    except (RuntimeError, ValueError) as error:              # with which transformers refuses a checkpoint
        raise UserError(f"{c.system} does not open: {str(error).splitlines()[0]}") from None
    with open(path, "ab", 0) as file, tqdm(total=len(todo), desc="answers", disable=None) as bar:
        for start in range(0, len(todo), c.bench.batch):
            batch = todo[start:start + c.bench.batch]
            turns = [turn_of(row, folder, c.request) for row in batch]
            for row, reply in zip(batch, ask(batch, turns), strict=True):
                file.write(bench.jsonl([row | reply]))
                bar.update()
    missing = [row for row in bench.read_rows(path) if row["response"] is None]
    print(f"{len(rows)} answers stand in {path}; score them with python bench.py score={path}.")
    if missing:
        print(f"{len(missing)} of them are missing, the first because: {missing[0]['problem']}")


if __name__ == "__main__":
    synth.run(main)
