"""What is left of an LLM after it has learned to hear? 200 everyday questions before and after, and twenty aloud.

    python tests/everyday.py profile=smol [answers.jsonl.gz]

Before: the two models joined, as a run starts; the LLM then answers as its checkpoint does. After: the run's export.
The questions are made by rule, typed, answered greedily. A file of lines with "prompt" and "response", if given, is
text that no stage trains on: its loss is reported before and after. Twenty of the questions are also asked aloud, by
voices that training never hears, and 200 clips of the corpus's dev documents, by other such voices, are written down.
Writes results/everyday-<run>.json.
"""
import gzip
import json
import re
import sys
from pathlib import Path
from random import Random

import torch
from torchaudio.functional import edit_distance

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import inserter                                         # noqa: E402
import synth                                            # noqa: E402

LONGEST = 512                                           # positions of a prompt with its response
TOKENS = 40                                             # of an answer
CLIPS = 200                                             # written down
RULES = {
    "What is the capital of {}?":
        "France Paris, Spain Madrid, Italy Rome, Germany Berlin, Portugal Lisbon, Greece Athens, Japan Tokyo, China "
        "Beijing, Russia Moscow, Egypt Cairo, Kenya Nairobi, Cuba Havana, Peru Lima, Chile Santiago, Canada Ottawa, "
        "Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Poland Warsaw, Austria Vienna, Hungary "
        "Budapest, Ireland Dublin, Scotland Edinburgh, Thailand Bangkok, Vietnam Hanoi, Iran Tehran, Iraq Baghdad, "
        "Syria Damascus, Lebanon Beirut, Jordan Amman, Turkey Ankara, Ukraine Kyiv, Romania Bucharest, Bulgaria Sofia, "
        "Serbia Belgrade, Belgium Brussels, Australia Canberra, Indonesia Jakarta, Philippines Manila",
    "On which continent is {}?":
        "Kenya Africa, Egypt Africa, Nigeria Africa, Ghana Africa, Morocco Africa, Japan Asia, China Asia, India Asia, "
        "Thailand Asia, Vietnam Asia, Nepal Asia, France Europe, Spain Europe, Italy Europe, Poland Europe, Norway "
        "Europe, Greece Europe, Brazil America, Peru America, Chile America, Canada America, Mexico America, Cuba "
        "America, Bolivia America, Ethiopia Africa",
    "Which language do people speak in {}?":
        "Brazil Portuguese, Mexico Spanish, Argentina Spanish, Chile Spanish, Austria German, Germany German, France "
        "French, Italy Italian, Japan Japanese, Russia Russian, Poland Polish, Egypt Arabic, Greece Greek, Turkey "
        "Turkish, Sweden Swedish, Finland Finnish, England English, Australia English, Iran Persian, Portugal "
        "Portuguese",
    "What is the opposite of {}?":
        "hot cold, big small, up down, left right, day night, black white, good bad, happy sad, fast slow, old new, "
        "rich poor, high low, long short, hard soft, wet dry, light dark, early late, full empty, strong weak, open "
        "closed, first last, love hate, war peace, inside outside, near far, loud quiet, clean dirty, thick thin, "
        "above below, alive dead",
    "What is the plural of {}?":
        "mouse mice, child children, foot feet, tooth teeth, man men, woman women, goose geese, ox oxen, leaf leaves, "
        "knife knives, wolf wolves, city cities, box boxes, dog dogs, baby babies, bus buses, life lives, half halves, "
        "party parties, dish dishes",
    "What colour is {}?":
        "grass green, snow white, coal black, milk white, blood red, gold yellow, chocolate brown, cheese yellow, "
        "emerald green, ruby red, sapphire blue, sunflower yellow, salt white, tar black, spinach green, mustard "
        "yellow, cherry red, charcoal black, ivory white, lavender purple",
    "What do you call a baby {}?":
        "dog puppy, cat kitten, cow calf, sheep lamb, horse foal, goat kid, duck duckling, bear cub, frog tadpole, "
        "deer fawn, swan cygnet, goose gosling, lion cub, kangaroo joey, pig piglet"}
NUMBERS = "zero one two three four five six seven eight nine ten".split()


def questions():
    """200 of [question, the word that a right answer has]; a sum may be given in digits."""
    made = []
    for form, pairs in RULES.items():
        for pair in pairs.split(", "):
            thing, wanted = pair.split()
            made.append([form.format(thing), wanted])
    rng = Random(1)
    sums = [(a, b) for a in range(1, 6) for b in range(1, 6)]
    for a, b in rng.sample(sums, 25) + [(6, 1), (6, 2), (7, 2), (8, 1), (9, 1)]:
        made.append([f"What is {NUMBERS[a]} plus {NUMBERS[b]}?", f"{NUMBERS[a + b]}|{a + b}"])
    assert len(made) == 200, len(made)
    return made


def is_right(answer, wanted):
    return bool(re.search(rf"\b(?:{wanted})\b", answer, re.I))


def asked(model, tok, said):
    return [text for text, _ in inserter.answer(model, tok, said, TOKENS, 50)]


def held_out(path, tok):
    """The first answer to each prompt of a file as typed dialogues, and the characters of all answers."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        rows = {row["prompt"]: row["response"] for row in reversed([json.loads(line) for line in file])}
    samples, characters = [], 0
    for prompt, response in rows.items():
        turns = [("user", synth.text_part(prompt, False)), ("assistant", synth.text_part(response, True))]
        messages = [{"role": role, "content": [part]} for role, part in turns]
        encoded = inserter.encode({"parts": None, "messages": messages}, {}, tok)
        if len(encoded.ids) <= LONGEST and response:
            samples.append(encoded)
            characters += len(response)
    return samples, characters


@torch.no_grad()
def loss(c, model, samples, characters):
    """Nats a character of the answers, what ends them included."""
    return sum(inserter.nats(c, model, batch) for batch in inserter.batches(samples, 4)) / characters


def aloud(c, chosen):
    """The questions as 16 kHz clips by voices that training never hears, and the voices' names."""
    rng = Random(c.seed)
    offered = synth.candidates("test", c.synth)
    voices = [synth.draw_voice(rng, offered, c.synth) for _ in chosen]
    texts = [re.sub(r"[^\w' ]", "", question).lower() for question, _ in chosen]
    return synth.to_16k(*synth.Espeak()(texts, voices, c.seed)), [voice["id"] for voice in voices]


def transcriptions(c):
    """Clips of dev documents and their words: [(waveform at 16 kHz, words)]."""
    folder, found = Path(c.data) / "tasks", []
    for number in synth.finished_shards(folder, "dev"):
        shard = synth.open_shard(folder / f"dev-{number:06d}.tar")
        for i in range(shard.count):
            sample, files = shard.read(i)
            speech = [part for part in sample["parts"] if part["role"] == "speech"]
            asks = sample["parts"][-2]["text"] if len(sample["parts"]) > 2 else ""
            if asks == synth.TASKS["transcribe"]["ask"]:
                found.append((synth.decode_flac(files[speech[0]["audio"]]), words(speech[0]["text"])))
    return found[::max(1, len(found) // CLIPS)][:CLIPS]


def words(text):
    return re.findall(r"[\w']+", text.lower())


def main(arguments):
    files = [argument for argument in arguments if "=" not in argument]
    c = synth.load_config([argument for argument in arguments if "=" in argument])
    after, tok = inserter.load_run(c)
    before = inserter.fresh_model(c, inserter.load_tokenizer(c)).to(inserter.device_here()).eval()
    everyday = questions()
    typed = {name: asked(model, tok, [question for question, _ in everyday])
             for name, model in (("before", before), ("after", after))}
    pairs = list(zip(typed["before"], typed["after"]))
    result = {
        "command": "python tests/everyday.py " + " ".join(arguments),
        "questions": len(everyday),
        "same answer": sum(a == b for a, b in pairs) / len(pairs),
        "right before": sum(is_right(a, wanted) for a, (_, wanted) in zip(typed["before"], everyday)) / len(everyday),
        "right after": sum(is_right(a, wanted) for a, (_, wanted) in zip(typed["after"], everyday)) / len(everyday)}
    for path in files:
        samples, characters = held_out(path, tok)
        result |= {"held-out answers": len(samples), "their characters": characters}
        for name, model in (("before", before), ("after", after)):
            result[f"nats a character {name}"] = loss(c, model, samples, characters)
    chosen = everyday[::10]
    clips, voices = aloud(c, chosen)
    heard = inserter.transcribe(after, tok, list(clips), TOKENS, 20)
    spoken = asked(after, tok, list(clips))
    known = transcriptions(c)
    written = inserter.transcribe(after, tok, [clip for clip, _ in known], 80, 20)
    errors = sum(edit_distance(said, words(text)) for text, (_, said) in zip(written, known))
    result |= {"dev clips": len(known), "their hours": sum(len(clip) for clip, _ in known) / synth.RATE / 3600,
               "their words": sum(len(said) for _, said in known)}
    result["words misheard"] = errors / result["their words"]
    for name, value in result.items():
        print(f"{name:26}{value}")
    result["aloud"] = []
    for (question, wanted), voice, text, reply, (a, b) in zip(chosen, voices, heard, spoken, pairs[::10]):
        row = {"question": question, "voice": voice, "heard": text, "answer to speech": reply,
               "answer to text": b, "answer to text before": a, "right": is_right(reply, wanted)}
        result["aloud"].append(row)
        print("\n" + "\n".join(f"  {key:24}{value}" for key, value in row.items()))
    result["written"] = [{"said": " ".join(said), "heard": text}
                         for text, (_, said) in list(zip(written, known))[::10]]
    synth.write_whole(ROOT / "results" / f"everyday-{c.run}.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    synth.run(main)
