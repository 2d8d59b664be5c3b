"""What is left of an LLM after it has learned to hear? 200 everyday questions before and after, and 20 aloud.

    python experiments/everyday.py profile=smol [answers=FILE.jsonl.gz]

Before: the two models joined, as a run starts; the LLM then answers as its checkpoint does. After: the run's
export. The questions are made by rule, typed, answered greedily. A file of lines with "prompt" and "response"
is text that no stage trains on: its loss is reported before and after. Twenty of the questions are also asked
aloud, by voices that training never hears, and 200 clips of the corpus's dev documents, by other such voices,
are written down. Writes results/everyday-<run>.json.
"""
import gzip
import json
import re
import sys
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                           # noqa: E402
import torch                                 # noqa: E402
from torchaudio.functional import edit_distance    # noqa: E402

import inserter                              # noqa: E402
import synth                                 # noqa: E402
from inserter import Encoded, InSerter, Tokenizer    # noqa: E402
from synth import Settings                   # noqa: E402

LONGEST = 512                                # positions of a prompt with its response
TOKENS = 40                                  # of an answer
CLIPS = 200                                  # written down
RULES = {                                    # a question: things, each with the word that a right answer has
    "What is the capital of {}?":
        "France Paris, Spain Madrid, Italy Rome, Germany Berlin, Portugal Lisbon, Greece Athens, Japan "
        "Tokyo, China Beijing, Russia Moscow, Egypt Cairo, Kenya Nairobi, Cuba Havana, Peru Lima, Chile "
        "Santiago, Canada Ottawa, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, "
        "Poland Warsaw, Austria Vienna, Hungary Budapest, Ireland Dublin, Scotland Edinburgh, Thailand "
        "Bangkok, Vietnam Hanoi, Iran Tehran, Iraq Baghdad, Syria Damascus, Lebanon Beirut, Jordan Amman, "
        "Turkey Ankara, Ukraine Kyiv, Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, Belgium "
        "Brussels, Australia Canberra, Indonesia Jakarta, Philippines Manila",
    "On which continent is {}?":
        "Kenya Africa, Egypt Africa, Nigeria Africa, Ghana Africa, Morocco Africa, Japan Asia, China "
        "Asia, India Asia, Thailand Asia, Vietnam Asia, Nepal Asia, France Europe, Spain Europe, Italy "
        "Europe, Poland Europe, Norway Europe, Greece Europe, Brazil America, Peru America, Chile "
        "America, Canada America, Mexico America, Cuba America, Bolivia America, Ethiopia Africa",
    "Which language do people speak in {}?":
        "Brazil Portuguese, Mexico Spanish, Argentina Spanish, Chile Spanish, Austria German, Germany "
        "German, France French, Italy Italian, Japan Japanese, Russia Russian, Poland Polish, Egypt "
        "Arabic, Greece Greek, Turkey Turkish, Sweden Swedish, Finland Finnish, England English, "
        "Australia English, Iran Persian, Portugal Portuguese",
    "What is the opposite of {}?":
        "hot cold, big small, up down, left right, day night, black white, good bad, happy sad, fast "
        "slow, old new, rich poor, high low, long short, hard soft, wet dry, light dark, early late, full "
        "empty, strong weak, open closed, first last, love hate, war peace, inside outside, near far, "
        "loud quiet, clean dirty, thick thin, above below, alive dead",
    "What is the plural of {}?":
        "mouse mice, child children, foot feet, tooth teeth, man men, woman women, goose geese, ox oxen, "
        "leaf leaves, knife knives, wolf wolves, city cities, box boxes, dog dogs, baby babies, bus "
        "buses, life lives, half halves, party parties, dish dishes",
    "What colour is {}?":
        "grass green, snow white, coal black, milk white, blood red, gold yellow, chocolate brown, cheese "
        "yellow, emerald green, ruby red, sapphire blue, sunflower yellow, salt white, tar black, spinach "
        "green, mustard yellow, cherry red, charcoal black, ivory white, lavender purple",
    "What do you call a baby {}?":
        "dog puppy, cat kitten, cow calf, sheep lamb, horse foal, goat kid, duck duckling, bear cub, frog "
        "tadpole, deer fawn, swan cygnet, goose gosling, lion cub, kangaroo joey, pig piglet"}
NUMBERS = "zero one two three four five six seven eight nine ten".split()


def questions() -> list[tuple[str, str]]:
    """200 of (question, the word that a right answer has); a sum may be given in digits."""
    made = []
    for form, pairs in RULES.items():
        for pair in pairs.split(", "):
            thing, wanted = pair.split()
            made.append((form.format(thing), wanted))
    rng = Random(1)
    sums = [(a, b) for a in range(1, 6) for b in range(1, 6)]
    for a, b in rng.sample(sums, 25) + [(6, 1), (6, 2), (7, 2), (8, 1), (9, 1)]:
        made.append((f"What is {NUMBERS[a]} plus {NUMBERS[b]}?", f"{NUMBERS[a + b]}|{a + b}"))
    assert len(made) == 200, len(made)
    return made


def is_right(answer: str, wanted: str) -> bool:
    return bool(re.search(rf"\b(?:{wanted})\b", answer, re.I))


def answers(model: InSerter, tok: Tokenizer, asked: list) -> list[str]:
    return [text for text, _ in inserter.answer(model, tok, asked, TOKENS, batch=50)]


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


# --------------------------------------------------------------------------------------------------
# 1. In writing, before and after
# --------------------------------------------------------------------------------------------------

def held_out(path: str, tok: Tokenizer) -> tuple[list[Encoded], int]:
    """The first answer to each prompt of a file as typed dialogues, and the characters of all answers."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    responses = {row["prompt"]: row["response"] for row in reversed(rows)}
    samples = []
    characters = 0
    for prompt, response in responses.items():
        turns = {"user": synth.text_part(prompt, False), "assistant": synth.text_part(response, True)}
        messages = [{"role": role, "content": [part]} for role, part in turns.items()]
        encoded = inserter.encode({"parts": None, "messages": messages}, {}, tok)
        if len(encoded.ids) <= LONGEST and response:
            samples.append(encoded)
            characters += len(response)
    return samples, characters


@torch.no_grad()
def loss(c: Settings, model: InSerter, samples: list[Encoded], characters: int) -> float:
    """Nats a character of the answers, what ends them included."""
    return sum(inserter.nats(c, model, sample) for sample in samples) / characters


def in_writing(c: Settings, models: dict[str, InSerter], tok: Tokenizer) -> tuple[dict, dict]:
    """Figures of the models before and after, and their answers to all questions."""
    asked = questions()
    typed = {name: answers(model, tok, [text for text, _ in asked]) for name, model in models.items()}
    same = sum(a == b for a, b in zip(*typed.values()))
    found = {"questions": len(asked), "same answer": same / len(asked)}
    for name, texts in typed.items():
        right = sum(is_right(text, wanted) for text, (_, wanted) in zip(texts, asked))
        found[f"right {name}"] = right / len(asked)
    if c.answers:
        samples, characters = held_out(c.answers, tok)
        found |= {"held-out answers": len(samples), "their characters": characters}
        for name, model in models.items():
            found[f"nats a character {name}"] = loss(c, model, samples, characters)
    return found, typed


# --------------------------------------------------------------------------------------------------
# 2. Aloud
# --------------------------------------------------------------------------------------------------

def speak(c: Settings, asked: list[str]) -> tuple[list[np.ndarray], list[str]]:
    """The questions as clips by voices that training never hears, and the voices' names."""
    rng = Random(c.seed)
    offered = synth.candidates("test", c.synth)
    voices = [synth.draw_voice(rng, offered, c.synth) for _ in asked]
    texts = [re.sub(r"[^\w' ]", "", text).lower() for text in asked]
    waveforms, rate = synth.load_engine("espeak")(texts, voices, c.seed)
    return [synth.to_16k(waveform, rate) for waveform in waveforms], [voice["id"] for voice in voices]


def answers_aloud(c: Settings, model: InSerter, tok: Tokenizer, typed: dict[str, list[str]]) -> list[dict]:
    """Every tenth question asked aloud: what is heard, and the answers to speech and to text."""
    chosen = questions()[::10]
    clips, voices = speak(c, [text for text, _ in chosen])
    heard = inserter.transcribe(model, tok, clips, TOKENS, batch=20)
    spoken = answers(model, tok, clips)
    rows = []
    for n, (question, wanted) in enumerate(chosen):
        rows.append({
            "question": question,
            "voice": voices[n],
            "heard": heard[n],
            "answer to speech": spoken[n],
            "answer to text": typed["after"][10 * n],
            "answer to text before": typed["before"][10 * n],
            "right": is_right(spoken[n], wanted)})
    return rows


def dev_clips(c: Settings) -> list[tuple[np.ndarray, list[str]]]:
    """Clips of dev documents and their words."""
    found = []
    for path in sorted((Path(c.data) / "tasks").glob("dev-*.tar")):
        for number in range(synth.read_index(path)["count"]):
            sample, files = synth.read_sample(path, number)
            first, question, *_ = sample["parts"]
            if first["role"] == "speech" and question["text"] == synth.TASKS["transcribe"]["ask"]:
                found.append((synth.decode_flac(files[first["audio"]]), words_of(first["text"])))
    return found[::max(1, len(found) // CLIPS)][:CLIPS]


def written_down(c: Settings, model: InSerter, tok: Tokenizer) -> tuple[dict, list[dict]]:
    """Figures of the dev clips' transcripts, and every tenth of these."""
    known = dev_clips(c)
    transcripts = inserter.transcribe(model, tok, [clip for clip, _ in known], 80, batch=20)
    errors = sum(edit_distance(said, words_of(text)) for text, (_, said) in zip(transcripts, known))
    words = sum(len(said) for _, said in known)
    figures = {
        "dev clips": len(known),
        "their hours": sum(len(clip) for clip, _ in known) / synth.RATE / 3600,
        "their words": words,
        "words misheard": errors / max(words, 1)}
    pairs = list(zip(known, transcripts))[::10]
    return figures, [{"said": " ".join(said), "heard": text} for (_, said), text in pairs]


def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments, answers="")
    after, tok = inserter.load_run(c)
    before = inserter.fresh_model(c, inserter.load_tokenizer(c)).to(inserter.device_here()).eval()
    result = {"command": "python experiments/everyday.py " + " ".join(arguments)}
    figures, typed = in_writing(c, {"before": before, "after": after}, tok)
    heard, transcripts = written_down(c, after, tok)
    result |= figures | heard
    for name, value in result.items():
        print(f"{name:26}{value}")
    result["aloud"] = answers_aloud(c, after, tok, typed)
    for row in result["aloud"]:
        print("\n" + "\n".join(f"  {key:24}{value}" for key, value in row.items()))
    result["written"] = transcripts
    synth.write_whole(ROOT / "results" / f"everyday-{c.run}.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    synth.run(main)
