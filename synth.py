"""Interleaved data synthesis: text in, shards of text and synthesised speech out.

InSerter (ACL 2025, arXiv 2503.02769) pre-trains a speech LLM on text in which random segments were turned
into speech, so that it goes on after heard words as after words that it has read. Only text is predicted:

    document      tom puts the ball in the old garden. the ball is in the garden.
    interleaved   tom puts the [ 1.62 s of audio      ]. the ball is in the garden.
                  |-- text --| |------ speech --------||---------- text ----------|

The data's way through this file; shard n of a recipe is made from shard n of the corpus:

    corpus -> documents -> samples: text and segments to be spoken -> clips (TTS, 16 kHz) -> shards

A DOCUMENT is a line of the corpus: {"text"} or {"messages": [{"role", "content"}]}, where need be with

    lang       its language; else it is synth.lang
    spoken     [start, end]: the characters of the text, or of the first user turn, that the recipe
               `continuation` speaks
    endless    true where a text (no dialogue) was cut off, so that its end is no target

A SAMPLE is what a shard holds and what inserter.py trains on, the same for every recipe:

    {"id": "interleaved-train-000003-000017",     no dots in it; the files are <id>.json, <id>.00.flac, …
     "recipe": "interleaved",                     which of RECIPES made it
     "lang": "en",
     "parts": [{"role": "text", "text": "tom puts the ", "loss": true},
               {"role": "speech", "text": "ball in the old garden", "audio": "00.flac", "seconds": 1.62,
                "voice": "en-us+f3/rate=172/pitch=44"},
               {"role": "text", "text": ". the ball is in the garden.", "loss": true}],
     "messages": null}

    parts      a document, in reading order: text, and speech with the words that it says
    messages   a dialogue in place of parts: [{"role": "user", "content": [parts]}, …], roles as in ROLES
    endless    true as in the document; else left out
    loss       whether the model learns to write this text, or only reads it; speech is never a target
    audio      the clip's file in the same shard: <id>.00.flac, 16 kHz mono, 16 bit
    voice      the voice's id; `seconds` is the clip's length; `noise`, where there is some: "babble 12 dB"

    recipe        a sample of it                                                      loss on
    interleaved   a document with spoken segments, or a dialogue with spoken turns    all text
    tasks         speech, a question about it, the answer                             the answer
    text          a document or a dialogue, nothing spoken                            all text
    chat          a dialogue, its questions spoken or typed                           the assistant's turns
    continuation  what a model read, now spoken, and what it wrote then               what it wrote

    python synth.py                           make the shards that are missing
    python synth.py shard=0/4                 make a quarter of them; 1/4, 2/4 and 3/4 on other machines, say
    python synth.py synth.corpus='books/*.txt' data=data/books      your own text

Everything a shard holds follows from the settings and the shard's number, so an interrupted synthesis
continues where it stopped and any number of workers makes the same bytes.

Names: `c` is all settings, `settings` its section synth (both of class Settings), `rng` a Random, `voice` a
dict with "id", "timbre", "lang" and what its engine wants, `waveform` (samples,) float32 from -1 to 1.
Arguments have no annotations: docstrings give shapes and units.
"""
import copy
import ctypes
import difflib
import functools
import glob
import gzip
import hashlib
import html
import importlib
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import secrets
import shutil
import signal
import sys
import tarfile
import threading
import time
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from random import Random

import numpy as np
import soundfile
import yaml
from tqdm import tqdm

RATE = 16_000                     # samples per second of every clip, as Whisper's features want it
ROLES = ("system", "user", "assistant")


class UserError(Exception):
    """Wrong use or wrong input: one sentence: what, where and what to do. Exit status 2, no traceback."""


# --------------------------------------------------------------------------------------------------
# 1. A document becomes a sample
#
# The heart of the method (paper, section 3.1). Some segments of a document are chosen to be spoken, at word
# level: spans of at least five words until about 30 % of the words are speech; or at sentence level: whole
# sentences, about 40 %. Five recipes make samples of documents.
# Here a speech part has its words, the voice that will say them, and the `loss` that it would have as text;
# section 6 gives it a clip and keeps the voice's id. `voice_for(words)` draws a voice, or gives None for what
# it cannot read. Ranges are lists of (start, end), in order, not overlapping.
# --------------------------------------------------------------------------------------------------

# One Chinese character is one word; "it's", "3.50" and "well-known" are one word each. Vowel signs and
# accents that are characters of their own (as in Hindi), and joiners, stand inside a word.
MARKS = "\u200c\u200d"
MARKS += "".join(chr(i) for i in range(0x300, 0xb000) if unicodedata.category(chr(i)) in ("Mn", "Mc"))
LETTERS = f"[^\\W_\u3400-\u9fff]+(?:[{MARKS}]+[^\\W_\u3400-\u9fff]*)*"
WORD = re.compile(f"[\u3400-\u9fff]|{LETTERS}(?:['’.-]{LETTERS})*")
# A line that goes on in small letters was broken to fit a page.
SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+[\"'”’)\]]*(?=\s)|[。！？।؟۔]+[”’」』）]*"
                          r"|\n(?:\n+|(?![a-zß-ÿĀ-ſα-ωά-ώа-џ]))")
FILLED = re.compile(r"\S(?:.*\S)?", re.S)               # what is left without the outer white space


def count_words(text):
    return len(WORD.findall(text))


def choose_spans(n, share, least, most, rng):
    """Choose word spans (first, end) of a document of n words; on average share * n words are chosen.

    Lengths are drawn first, and the words that stay text are spread over the gaps afterwards. So the share is
    met in expectation for short documents too (of `least` words or more); placing spans until one does not
    fit would favour short ones.

    >>> choose_spans(n=20, share=0.5, least=5, most=9, rng=Random(2))     # here two spans of five
    [(1, 6), (11, 16)]
    """
    lengths = draw_lengths(n=n, share=share, least=least, most=most, rng=rng)
    free = n - sum(lengths) - (len(lengths) - 1)            # beside the one word between each two spans
    cuts = sorted(rng.randint(0, free) for _ in lengths)
    spans = []
    taken = 0
    for cut, length in zip(cuts, lengths):
        first = cut + taken
        spans.append((first, first + length))
        taken += length + 1
    return spans


def draw_lengths(n, share, least, most, rng):
    """Draw span lengths from least to most until the budget of share * n words is spent.

    The length that goes beyond the budget is kept with the probability that makes the expectation exact.
    Where no further span has room, what is left of the budget lengthens one, even beyond `most`.

    >>> draw_lengths(n=20, share=0.5, least=5, most=9, rng=Random(2))
    [5, 5]
    >>> draw_lengths(n=12, share=0.9, least=5, most=9, rng=Random(0))       # 8 of 10.8; no room for five more
    [11]
    """
    budget = share * n
    lengths = []
    while (left := budget - sum(lengths)) > 0:
        room = n - sum(lengths) - len(lengths)              # for a further span, after a word of text
        if room < least:
            more = min(int(left + rng.random()), room + 1)  # to grow, no word has to stay
            if lengths and more > 0:
                lengths[rng.randrange(len(lengths))] += more
            break
        length = rng.randint(least, min(most, room))
        if length > left and rng.random() >= left / length:
            break
        lengths.append(length)
    return lengths


def choose_sentences(words, share, rng):
    """Choose whole sentences, given their numbers of words; on average share of all words is chosen.

    >>> choose_sentences([6, 4, 9, 5], 0.4, Random(0))     # 4 + 5 of 24 words
    [1, 3]
    """
    left = share * sum(words)
    chosen = []
    for i in rng.sample(range(len(words)), len(words)):           # in random order
        if words[i] > left and rng.random() * words[i] >= left:   # the last one, as in draw_lengths
            break
        chosen.append(i)
        left -= words[i]
    return sorted(i for i in chosen if words[i])


def sentences(text):
    """Character ranges of the sentences, outer white space left out.

    >>> sentences("One. Two!"), "One. Two!"[5:9]
    ([(0, 4), (5, 9)], 'Two!')
    """
    ends = [m.end() for m in SENTENCE_END.finditer(text)]
    found = [FILLED.search(text, start, end) for start, end in itertools.pairwise([0, *ends, len(text)])]
    return [m.span() for m in found if m]


def segments(text, settings, rng):
    """Character ranges of the text that shall be spoken, in order: whole words, or whole sentences.

    >>> text = "tom puts the ball in the old garden."
    >>> segments(text, load_config([]).synth, Random(2)), text[9:28]
    ([(9, 28)], 'the ball in the old')
    """
    if settings.level == "sentence":
        ranges = sentences(text)
        words = [count_words(text[start:end]) for start, end in ranges]
        return [ranges[i] for i in choose_sentences(words, settings.share, rng)]
    words = [m.span() for m in WORD.finditer(text)]
    spans = choose_spans(n=len(words), share=settings.share, least=settings.min_words,
                         most=settings.max_words, rng=rng)
    return [(words[first][0], words[end - 1][1]) for first, end in spans]


def text_part(text, loss):
    return {"role": "text", "text": text, "loss": loss}


def splice(text, ranges, loss, voice_for):
    """Cut a text into parts: the ranges are spoken, each by a voice of its own, the rest is text.

    ranges: of characters. What its voice cannot read stays text. Joining the parts' texts gives the text
    back, character for character. A speech part keeps its `loss` for the case that its clip fails the gate.

    >>> splice("tom puts the ball in.", [(9, 17)], loss=True, voice_for=lambda words: {"id": "f3"})
    ... # doctest: +NORMALIZE_WHITESPACE
    [{'role': 'text', 'text': 'tom puts ', 'loss': True},
     {'role': 'speech', 'text': 'the ball', 'loss': True, 'voice': {'id': 'f3'}},
     {'role': 'text', 'text': ' in.', 'loss': True}]
    """
    parts = []
    done = 0                                                # characters that the parts hold so far
    for start, end in ranges:
        voice = voice_for(text[start:end])
        if voice is None:
            continue
        if start > done:
            parts.append(text_part(text[done:start], loss))
        parts.append({"role": "speech", "text": text[start:end], "loss": loss, "voice": voice})
        done = end
    if done < len(text):
        parts.append(text_part(text[done:], loss))
    return parts


def spoken_range(turn, share, least, rng):
    """Ranges of a turn to be spoken: a user's turn is, with probability `share`, from its first word on.

    Or, half the time, from a later word on, of which `least` or more are left: the model then meets questions
    that begin as text and go on as speech. least=None: always from the first word.

    >>> turn = {"role": "user", "content": "what is the colour of the sun"}
    >>> [spoken_range(turn, 1.0, 5, Random(seed)) for seed in (0, 4)]
    [[(0, 29)], [(8, 29)]]
    """
    starts = [m.start() for m in WORD.finditer(turn["content"])]
    if turn["role"] != "user" or not starts or rng.random() >= share:
        return []
    first = 0
    if least is not None and len(starts) > least and rng.random() < 0.5:
        first = rng.randint(1, len(starts) - least)
    return [(starts[first], len(turn["content"]))]


def splice_dialogue(turns, ranges, targets, voice_for):
    """Splice every turn of a dialogue: ranges[i] is spoken of turn i; the roles `targets` carry loss.

    >>> turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    >>> sample = splice_dialogue(turns, [[(0, 5)], []], ("assistant",), lambda words: {"id": "f3"})
    >>> [(turn["role"], [part["role"] for part in turn["content"]]) for turn in sample["messages"]]
    [('user', ['speech']), ('assistant', ['text'])]
    """
    messages = []
    for turn, spoken in zip(turns, ranges, strict=True):
        parts = splice(turn["content"], spoken, turn["role"] in targets, voice_for)
        messages.append({"role": turn["role"], "content": parts})
    return {"parts": None, "messages": messages}


# Each task's question after the speech, and its answer from the words and the voice; None: it is not known.
TASKS = {
    "transcribe": {"ask": "Transcript:", "answer": lambda words, voice: words},
    "speaker": {"ask": "Speaker:",
                "answer": lambda words, voice: {"f": "woman", "m": "man"}.get(voice.get("gender"))},
}


# A recipe takes a document, the settings, the generator and `voice_for`, and yields samples, of which
# plan_shard (section 6) completes id, recipe and lang.

def interleaved(document, settings, rng, voice_for):
    """Stage 1's own recipe: text with segments of it spoken; in dialogues a question, or its tail, is spoken.

    >>> settings = load_config(["synth.level=sentence", "synth.share=0.4"]).synth
    >>> document = {"text": "tom has a ball. it is red. he likes it."}
    >>> sample, = interleaved(document, settings, Random(7), lambda words: {"id": "f3"})
    >>> [(part["role"], part["text"]) for part in sample["parts"]]
    [('text', 'tom has a ball. '), ('speech', 'it is red.'), ('text', ' he likes it.')]
    """
    if "text" in document:
        ranges = segments(document["text"], settings, rng)
        yield {"parts": splice(document["text"], ranges, True, voice_for), "messages": None}
    else:
        turns = document["messages"]
        ranges = [spoken_range(turn, settings.spoken_turns, settings.min_words, rng) for turn in turns]
        yield splice_dialogue(turns, ranges, ROLES, voice_for)


def tasks(document, settings, rng, voice_for):
    """Speech tasks: a sentence or question, or some words of it, is spoken; then it is transcribed, or named
    who speaks. Four samples of a document.

    Short clips teach hearing sooner than whole sentences do: little else than the clip tells what was said.
    Where the answer is not known (a voice of unknown gender), it is transcribed; words that the voice cannot
    read stay text, to be copied.

    >>> document = {"text": "it is red."}
    >>> voice_for = lambda words: {"id": "f3", "gender": "f"}
    >>> settings = load_config(["synth.tasks={transcribe: 0.5, speaker: 0.5}"]).synth
    >>> for sample in tasks(document, settings, Random(4), voice_for):
    ...     print([part["text"] for part in sample["parts"]])
    ['red.', 'Speaker:', ' woman']
    ['it is red.', 'Speaker:', ' woman']
    ['is', 'Speaker:', ' woman']
    ['it is red.', 'Transcript:', ' it is red.']
    """
    if "messages" in document:
        wholes = [turn["content"] for turn in document["messages"] if turn["role"] == "user"]
    else:
        wholes = [document["text"][start:end] for start, end in sentences(document["text"])]
    texts = [text for text in wholes if WORD.search(text)]
    if not texts:
        return
    for text in rng.choices(texts, k=4):
        cuts = [*(m.start() for m in WORD.finditer(text)), len(text)]
        start = cuts[0]
        end = cuts[-1]
        if rng.random() < 0.7:
            start, end = sorted(rng.sample(cuts, 2))
        task = rng.choices(list(settings.tasks), list(settings.tasks.values()))[0]
        words = " ".join(text[start:end].split()).rstrip(" ,")
        heard, = splice(words, [(0, len(words))], False, voice_for)
        answer = TASKS[task]["answer"](words, heard.get("voice", {}))
        if answer is None:
            task = "transcribe"
            answer = words
        question = text_part(TASKS[task]["ask"], False)
        yield {"parts": [heard, question, text_part(" " + answer, True)], "messages": None}


def plain_text(document, settings, rng, voice_for):
    """Pure text, so that the LLM keeps what it knows; all of it is a target.

    >>> list(plain_text({"text": "it is red."}, load_config([]).synth, Random(0), None))
    [{'parts': [{'role': 'text', 'text': 'it is red.', 'loss': True}], 'messages': None}]
    """
    return interleaved(document, settings, rng, lambda words: None)        # no voice can read it


def chat(document, settings, rng, voice_for):
    """Fine-tuning: dialogues whose questions are spoken or typed; the answers alone are targets.

    A document that is no dialogue with an answer gives no sample.

    >>> turns = [{"role": "user", "content": "is it red"}, {"role": "assistant", "content": "yes."}]
    >>> settings = load_config(["synth.spoken_questions=1"]).synth
    >>> sample, = chat({"messages": turns}, settings, Random(0), lambda words: {"id": "f3"})
    >>> [(part["role"], part["text"], part["loss"]) for parts in parts_of(sample) for part in parts]
    [('speech', 'is it red', False), ('text', 'yes.', True)]
    """
    turns = document.get("messages", [])
    if any(turn["role"] == "assistant" for turn in turns):
        ranges = [spoken_range(turn, settings.spoken_questions, None, rng) for turn in turns]
        yield splice_dialogue(turns, ranges, ("assistant",), voice_for)


def continuation(document, settings, rng, voice_for):
    """Behaviour alignment (BLSP, arXiv 2309.00916; the paper stacks it on top): what a model read is spoken,
    and what it wrote then is the target; so it learns to do the same when it hears.

    A document without "spoken" gives no sample.

    >>> document = {"text": "tom has a ball. it is red.", "spoken": [0, 15]}
    >>> sample, = continuation(document, {}, Random(0), lambda words: {"id": "f3"})
    >>> [(part["role"], part["text"], part["loss"]) for part in sample["parts"]]
    [('speech', 'tom has a ball.', False), ('text', ' it is red.', True)]
    """
    if "spoken" not in document:
        return
    start, end = document["spoken"]
    if "text" in document:
        text = document["text"]
        prompt = splice(text[:end], [(start, end)], False, voice_for)
        yield {"parts": [*prompt, text_part(text[end:], True)], "messages": None}
    else:
        turns = document["messages"]
        ranges = [[] for _ in turns]
        first_user = [turn["role"] for turn in turns].index("user")
        ranges[first_user] = [(start, end)]
        yield splice_dialogue(turns, ranges, ("assistant",), voice_for)


RECIPES = {"interleaved": interleaved, "tasks": tasks, "text": plain_text, "chat": chat,
           "continuation": continuation}


def parts_of(sample):
    """The sample's lists of parts: one for a document, one a message for a dialogue.

    >>> parts_of({"parts": None, "messages": [{"role": "user", "content": [text_part("hi", True)]}]})
    [[{'role': 'text', 'text': 'hi', 'loss': True}]]
    """
    if sample["parts"]:
        return [sample["parts"]]
    return [message["content"] for message in sample["messages"]]


# --------------------------------------------------------------------------------------------------
# 2. Voices
#
# An espeak voice is an accent (a language file), a timbre (one of 104 "variant" files: formants, breath,
# echo), a rate and a pitch. Two timbres may be one vocal tract at two pitches, so training and test voices
# are divided by what the files say, not by their names. An engine speaks:
# engine(texts, voices, seed) -> ([(n,) float32 each], sample rate).
# --------------------------------------------------------------------------------------------------

PARAMETERS = {  # name: (espeak's number, espeak's own default, for a voice that says none)
    "rate": (1, 175),     # words per minute, from 80 to 450; outside of these espeak clamps without a word
    "volume": (2, 100),   # percent, to 300; above 100 espeak's gain control compresses, as a shout is
    "pitch": (3, 50),     # 50 is the timbre's own pitch, 0 an octave below, 99 nearly one above
    "range": (4, 50),     # liveliness of the melody; 0 is monotone, 99 the most
}
# 29 of the 104 timbres reach full scale, where espeak's gain control holds them. One constant factor (2 dB),
# not a level per clip: resampling has room to overshoot, and a shout stays louder than a whisper.
GAIN = 0.8


def nearest(name, valid):
    """The valid name that is most like this one: `nearest("en-su", ["en-us", "cmn"])` -> "en-us"."""
    return difflib.get_close_matches(str(name), list(valid), 1, 0.0)[0]


def hash_share(text):
    """A text's fixed place in [0, 1), spread evenly: the first 32 bits of its SHA-256.

    >>> hash_share("tom"), hash_share("anna")
    (0.8803796444553882, 0.3333680231589824)
    """
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2 ** 32


def split_at(place, test, dev):
    """"test" for the places from 0 to `test`, "dev" for the next `dev`, "train" for the rest."""
    if place < test:
        return "test"
    return "dev" if place < test + dev else "train"


def language(code):
    """A code without its region; the Chinese ones whose voices read the script are one.

    >>> language("en-GB-scotland"), language("cmn"), language("yue")
    ('en', 'zh', 'zh')
    """
    code = re.split("[-_]", code.lower())[0]
    return "zh" if code in ("cmn", "yue") else code


@functools.cache
def espeak_files():
    """Library and data folder of espeak-ng's wheel; imported late: it is GPL-3, only its user needs it."""
    try:
        import espeakng_loader
    except ModuleNotFoundError:
        raise UserError("synth.engine=espeak needs the package espeakng-loader: "
                        "pip install espeakng-loader.") from None
    return espeakng_loader.get_library_path(), Path(espeakng_loader.get_data_path())


@functools.cache
def accents():
    """{language code: voice file}: {"en-us": "gmw/en-US", "cmn": "sit/cmn"}; a file's first code counts."""
    folder = espeak_files()[1] / "lang"
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            code = re.search(r"^language\s+(\S+)", path.read_text(errors="replace"), re.M)
            files.setdefault(code[1].lower(), path.relative_to(folder).as_posix())
    return files


@functools.cache
def timbres():
    """{timbre: {"vocal_tract", "gender"}} of the variant files."""
    folder = espeak_files()[1] / "voices" / "!v"
    return {path.name: read_timbre(path.read_text(errors="replace")) for path in sorted(folder.iterdir())}


def read_timbre(text):
    """Vocal tract and gender of a variant file.

    The vocal tract is the frequencies of formants 1 to 5, in percent. Files that differ in name, pitch,
    loudness or echo alone agree in it ("Gene", "Gene2"; "f2", "whisperf"). Files that choose the Klatt
    synthesiser sound so alike, whatever their formants (spectra of their words correlate by up to 0.997),
    that they count as one.

    >>> read_timbre("gender female\\nformant 2 110 100 100   // number, frequency, height, width")
    {'vocal_tract': '100/110/100/100/100', 'gender': 'f'}
    """
    formants = dict(re.findall(r"^formant\s+(\d)\s+(\d+)", text, re.M))
    vocal_tract = "/".join(formants.get(number, "100") for number in "12345")
    if re.search(r"^klatt", text, re.M):
        vocal_tract = "klatt"
    gender = re.search(r"^gender\s+(\w)", text, re.M)
    return {"vocal_tract": vocal_tract, "gender": gender and gender[1].lower()}


def timbre_split(timbre, held_out):
    """"train", "dev" or "test": by hash of the vocal tract, or of the name where it is no timbre of espeak's.

    Never by rate or pitch. held_out: the shares of vocal tracts that are in dev alone and in test alone.

    >>> timbre_split("Gene", {"test": 0.3, "dev": 0.1}) == timbre_split("Gene2", {"test": 0.3, "dev": 0.1})
    True
    """
    try:
        vocal_tract = timbres()[timbre]["vocal_tract"]
    except (KeyError, UserError):                           # no timbre of espeak's, or no espeak
        vocal_tract = timbre
    place = hash_share(f"split {vocal_tract}")              # this salt: a third women, no easier voices
    return split_at(place, held_out["test"], held_out["dev"])


def espeak_voice(accent, timbre, **parameters):
    """A checked voice; parameters: rate, pitch, volume, range; "gender" only where the variant file tells it.

    >>> espeak_voice("en-us", "f3", rate=172, pitch=44)["id"]
    'en-us+f3/rate=172/pitch=44'
    """
    for kind, name, valid in (("accent", accent, accents()), ("timbre", timbre, timbres())):
        if name not in valid:               # espeak would keep its last voice, or say nothing
            raise UserError(f"espeak has no {kind} {name!r}; nearest valid: {nearest(name, valid)}.")
    voice = {"accent": accent, "timbre": timbre, "lang": accent, **parameters}
    voice["id"] = "/".join([f"{accent}+{timbre}", *(f"{key}={value}" for key, value in parameters.items())])
    if timbres()[timbre]["gender"]:
        voice["gender"] = timbres()[timbre]["gender"]
    return voice


def candidates(split, settings):
    """What `draw_voice` chooses from for "train", "dev" or "test": voices of the engine, or espeak's timbres.

    Each split has vocal tracts of its own; a single timbre serves them all. UserError where none is left.
    """
    voices = getattr(load_engine(settings.engine), "voices", [])
    names = {voice["timbre"] for voice in voices}
    if not voices:
        names = set(settings.timbres) or timbres().keys() - settings.special_timbres
    fit = {name for name in names if len(names) == 1 or timbre_split(name, settings.held_out) == split}
    if not fit:
        raise UserError(f"No timbre is left for {split} at synth.held_out={settings.held_out}: "
                        "offer more timbres, or change the shares.")
    return [voice for voice in voices if voice["timbre"] in fit] or sorted(fit)


def draw_voice(rng, choices, settings, lang="en"):
    """One voice for one segment in this language; None where there is no voice of it.

    choices: what `candidates` gave; settings: engine, accents, rate, pitch. A `lang` that is itself one of
    its language's accents gets that accent.
    """
    if isinstance(choices[0], dict):
        fit = [voice for voice in choices if language(voice["lang"]) == language(lang)]
        return rng.choice(fit) if fit else None
    names = settings.accents.get(language(lang))
    if not names:
        return None
    accent = lang if lang in names else rng.choice(names)
    # every second value: in espeak's tables some neighbouring rates (172 and 173 …) are the same speech
    rate, pitch = (rng.randrange(low, high + 1, 2) for low, high in (settings.rate, settings.pitch))
    voice = espeak_voice(accent, rng.choice(choices), rate=rate, pitch=pitch)
    if settings.engine != "espeak":
        voice.pop("gender", None)                           # another engine may not follow it
    return voice


class Espeak:
    """espeak-ng in this process. A process has one such library, so two objects would share their state.

    Pitch flutter and gain control run on from clip to clip and cannot be reset; the seed covers the noise
    only. So bytes repeat for the same calls in the same order in a fresh process, while a clip made by itself
    sounds the same and has other bytes.
    """

    def __init__(self):
        library, data = espeak_files()
        self.library = ctypes.CDLL(library)
        self.library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        synchronous = 2
        buffer_ms = 60_000                             # a clip comes in one or two callbacks
        do_not_exit = 0x8000
        self.rate = self.library.espeak_Initialize(synchronous, buffer_ms, str(data).encode(), do_not_exit)
        self.pieces = []
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self.callback = signature(self.collect)        # kept here, or Python frees it under espeak's feet

    def collect(self, wave, samples, events):
        """espeak's callback: keep the samples (int16 at the address `wave`) and ask for more."""
        if wave and samples > 0:
            self.pieces.append(ctypes.string_at(wave, 2 * samples))
        return 0

    def speak(self, text, voice):
        """text -> (n,) float32 in [-0.8, 0.8] at `self.rate` (22,050 Hz). A parameter that the voice leaves
        out is set to espeak's default, or it would keep the last voice's."""
        name = f"{accents()[voice['accent']]}+{voice['timbre']}"
        codes = [self.library.espeak_SetVoiceByName(name.encode())]
        for key, (number, default) in PARAMETERS.items():
            codes.append(self.library.espeak_SetParameter(number, int(voice.get(key, default)), 0))
        self.library.espeak_SetSynthCallback(self.callback)          # another object's may be set, or be gone
        data = text.replace("\0", " ").encode()
        utf8 = 1
        self.pieces.clear()
        codes.append(self.library.espeak_Synth(data, len(data) + 1, 0, 1, 0, utf8, None, None))
        if any(codes):
            raise UserError(f"espeak-ng refused voice {voice['id']!r} (return codes {codes}): take another.")
        return np.frombuffer(b"".join(self.pieces), np.int16) * np.float32(GAIN / 32768)

    def __call__(self, texts, voices, seed):
        self.library.espeak_ng_SetRandSeed(seed)
        return [self.speak(text, voice) for text, voice in zip(texts, voices, strict=True)], self.rate


@functools.cache                            # a python: engine serves all shards of a process
def load_engine(name):
    """"espeak", or "python:<module>:<function>": the user's own, say CosyVoice 2 in python:my_voices:speak.

    Its attribute `voices`, [{"id", "timbre", "lang", …}], is drawn from; else it gets espeak's voices.
    """
    if name == "espeak":
        return Espeak()
    module, _, function = name.removeprefix("python:").partition(":")
    sys.path.append(os.getcwd())            # finds a my_voices.py that stands in the folder one works in
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"synth.engine={name} is neither espeak nor a python:<module>:<function> that can be "
                        f"imported ({error}).") from None


# --------------------------------------------------------------------------------------------------
# 3. Clips
#
# What may be spoken, and the way from waveform to file. The gate tells the clips that are unfit to train on.
# --------------------------------------------------------------------------------------------------

# URLs, mail addresses, markup, paths, code, hashes, symbols, emoji; and, by language, letters that the voice
# cannot read.
UNSPEAKABLE = re.compile(r"\w://|https?:|data:\w|www\.|\S@\S+\.\w|[{}<>\[\]\\|_^~`=#*]|\w/\w+/|(?<!\w)/\w"
                         r"|\w:/|\w\(\)|::|\s--\w|&\w+;|\+\+|--;|&&|\$\w*\$|\w\.\w+/\w|\S{40}"
                         r"|\b(?=\w*\d)(?=\w*[a-z])\w{16}"
                         r"|\w\.(com|org|net|uk|io|py|js|md|txt|html?|json|c|cpp|h)\b"
                         r"|[©®°™‣‰‼⁉⃣℃℉№←-⯿㈀-㏿\ue000-\uf8ff\ufe0f\ufffc\U00010000-\U0010ffff]", re.I)
FOREIGN = {"en": re.compile("[^\\W_0-9A-Za-zÀ-ɏ]"), "zh": re.compile("[^\\W_0-9A-Za-zÀ-ɏ㐀-鿿豈-﫿]")}


def speakable(text, lang):
    """Can a voice of this language ("en-gb", "cmn") say it? By script only English and Chinese are judged.

    >>> [speakable(text, "en-us") for text in ("the ball is red", "see https://a.b", "球是红的")]
    [True, False, False]
    """
    foreign = FOREIGN.get(language(lang))
    if not re.search(r"\w", text) or UNSPEAKABLE.search(text):
        return False
    return foreign is None or foreign.search(text) is None


def to_16k(waveform, rate):
    """(…, n) at `rate` -> (…, ceil(n * 16000 / rate)) float32 at 16 kHz, by the clip's spectrum.

    What lies above 8 kHz is cut off. From 22,050 Hz, 441 samples in are 320 out: the clip is padded with
    zeros to whole periods, so that both spectra have the same frequencies, and by one period more,
    so that its end does not ring into its beginning.
    """
    waveform = np.asarray(waveform, np.float32)
    if rate == RATE:
        return waveform
    down = rate // math.gcd(rate, RATE)
    up = RATE // math.gcd(rate, RATE)
    samples = waveform.shape[-1]
    periods = samples // down + 2
    spectrum = np.fft.rfft(waveform, periods * down)[..., :periods * up // 2 + 1]
    resampled = np.fft.irfft(spectrum, periods * up) * (up / down)
    return resampled[..., :math.ceil(samples * RATE / rate)].astype(np.float32)


BABBLE_VOICES = 5


def noise_of(kind, samples, clips, rng):
    """(samples,) float32 of noise, of any level.

    kind: white; pink (power falls as 1/f); coloured (its power walks at random from octave to octave); babble
    (five of `clips`, which others said, at once).
    """
    if kind == "babble":
        total = np.zeros(samples, np.float32)
        for i in rng.choice(len(clips), BABBLE_VOICES):
            loudness = np.sqrt(np.mean(clips[i] ** 2))
            total += np.roll(np.resize(clips[i] / loudness, samples), rng.integers(samples))
        return total
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    if kind == "pink":
        spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    if kind == "coloured":
        levels = np.cumsum(rng.normal(-1.5, 6.0, 9))                # dB at 31.25 Hz, 62.5 Hz, … 8 kHz
        hertz = np.linspace(0, RATE / 2, len(spectrum))
        octaves = np.log2(np.maximum(hertz, 31.25) / 31.25)
        spectrum *= 10 ** (np.interp(octaves, np.arange(9), levels) / 20)
    return np.fft.irfft(spectrum, samples).astype(np.float32)


def mix(speech, noise, snr):
    """(samples,) of both, with `snr` dB between their energies, never beyond full scale."""
    scale = np.sqrt(np.sum(speech ** 2) / np.sum(noise ** 2)) * 10 ** (-snr / 20)
    mixed = speech + scale * noise
    return (mixed / max(1.0, np.abs(mixed).max())).astype(np.float32)


def lay_noise(parts, settings, rng):
    """Lay noise under a share of the parts' waveforms, and name it in the part; settings: synth.noise.

    Half of it is the babble of other parts, half coloured. bench.py tests with babble of voices that training
    never hears, and with pink and white noise.
    """
    waveforms = [part["waveform"] for part in parts]
    for i, part in enumerate(parts):
        if rng.random() >= settings.share:
            continue
        others = waveforms[:i] + waveforms[i + 1:]
        kind = "babble" if others and rng.random() < 0.5 else "coloured"
        snr = rng.uniform(*settings.snr)
        part["waveform"] = mix(waveforms[i], noise_of(kind, len(waveforms[i]), others, rng), snr)
        part["noise"] = f"{kind} {snr:.0f} dB"


FULL_SCALE = 4                    # 1 is full scale; resampling and loud recordings go a little beyond it


def gate(waveform, text, limits):
    """None if the clip ((n,) float32, 16 kHz) is fit to train on, else the reason. Limits: min_rms (of full
    scale), max_clipped (share of samples), chars_per_second [low, high], max_seconds.

    Letters and digits count, a Chinese one as four (espeak says 3.4 of them a second where it says 16.4
    English letters). Three frames of 10 ms are the least that gives one audio position.
    """
    seconds = len(waveform) / RATE
    if not seconds or not re.search(r"\w", text):
        return "empty"
    if seconds < 0.03:
        return "too short"
    if seconds > limits.max_seconds:
        return "too long"
    if not np.isfinite(waveform).all():
        return "not finite"
    if np.abs(waveform).max() > FULL_SCALE:
        return "beyond full scale"
    if np.sqrt(np.mean(waveform ** 2)) < limits.min_rms:
        return "silent"
    if np.mean(np.abs(waveform) >= 0.999) > limits.max_clipped:
        return "clipped"
    pace = sum(4 if char >= "㐀" else 1 for char in text if char.isalnum()) / seconds
    low, high = limits.chars_per_second
    if pace > high:
        return "too fast"
    return "too slow" if pace < low else None


def flac_bytes(waveform):
    """(samples,) float32 at 16 kHz -> FLAC, 16 bit mono, clamped; the same samples give the same bytes."""
    file = io.BytesIO()
    soundfile.write(file, waveform, RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def decode_flac(data):
    """FLAC bytes -> (samples,) float32 at 16 kHz."""
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


# --------------------------------------------------------------------------------------------------
# 4. Shards
#
# A shard is a tar file in WebDataset's convention. Beside x.tar stands x.json: of every sample its id, byte
# offset and length, so that a reader seeks to its own samples, and its CRC-32, so that it sees damage. Plain
# tar readers lose samples silently: of 16-member shards cut at a random byte one in three raises nothing.
# --------------------------------------------------------------------------------------------------

def shard_path(c, recipe, split, number):
    return Path(c.data) / recipe / f"{split}-{number:06d}.tar"


def write_whole(path, *contents):
    """Write a file aside, flush it, rename it: it is whole or absent."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")     # two machines may share the folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.writelines(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)                       # is there after an error alone


def write_shard(path, samples, clips, counts):
    """Write x.json, then x.tar, both whole or absent; a tar that exists is finished.

    clips: {sample id: {"00.flac": bytes}}; counts: what a report wants to know of the shard.
    """
    data = bytearray()
    rows = []
    for sample in samples:
        start = len(data)
        members = {"json": json.dumps(sample, ensure_ascii=False).encode(), **clips[sample["id"]]}
        for suffix, content in members.items():
            info = tarfile.TarInfo(f"{sample['id']}.{suffix}")         # without time or user: bytes repeat
            info.size = len(content)
            data += info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)
        rows.append([sample["id"], start, len(data) - start, zlib.crc32(data[start:])])
    index = {"count": len(samples), "counts": counts, "samples": rows}
    write_whole(path.with_suffix(".json"), json.dumps(index).encode())
    write_whole(path, data, bytes(1024))                    # a tar file ends with zeros


def read_index(path):
    """The index of a shard x.tar: {"count", "counts", "samples": [[id, offset, length, CRC-32], …]}."""
    return json.loads(path.with_suffix(".json").read_bytes())


@functools.cache
def sample_count(path):
    return read_index(path)["count"]


@functools.lru_cache(maxsize=256)
def open_shard(path):
    """An open shard and, of each sample, (offset, length, CRC-32)."""
    rows = read_index(path)["samples"]
    return open(path, "rb", buffering=0), np.array([row[1:] for row in rows], np.int64)


def read_sample(path, number):
    """One sample: itself and its clips {"00.flac": bytes}. UserError says which one is damaged."""
    file, places = open_shard(path)
    offset, length, crc = places[number].tolist()
    blob = os.pread(file.fileno(), length, offset)          # no seek: processes may share the open file
    if zlib.crc32(blob) != crc:
        raise UserError(f"Sample {number} in {path} is damaged; remove the shard's two files and run "
                        "synth.py again.")
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        members = {member.name.partition(".")[2]: tar.extractfile(member).read() for member in tar}
    return json.loads(members.pop("json")), members


# --------------------------------------------------------------------------------------------------
# 5. The corpus
#
# One streaming pass cleans the documents, splits them by hash, cuts the long ones, and writes corpus shards
# of k documents each: data/corpus/train-000000.jsonl. The built-in corpus is the tiny world (section 8);
# others are globs of the user's files, read one after the other. A line from which nothing can be learned is
# left out and counted.
# --------------------------------------------------------------------------------------------------

CORPUS_KEYS = ("corpus", "seed", "documents", "held_out_documents", "held_out_share", "shard_documents",
               "max_document", "facts")


def corpus_names(settings):
    """What `corpus` lists: "tiny", or globs, as absolute paths."""
    names = [name.strip() for name in settings.corpus.split(",")]
    return [name if name == "tiny" else os.path.abspath(name) for name in names]


def make_corpus(c):
    """Write the corpus shards that the settings name, once; return the number of shards of each split."""
    folder = Path(c.data) / "corpus"
    index = folder / "index.json"                           # written last: where it is, the corpus is whole
    keep_settings(c, folder, CORPUS_KEYS, begun=index.is_file())
    if not index.is_file():
        waiting = {"train": [], "dev": [], "test": []}
        shards = Counter()
        documents = Counter()
        left_out = Counter()

        def write(split):
            write_whole(folder / f"{split}-{shards[split]:06d}.jsonl", *waiting[split])
            waiting[split].clear()
            shards[split] += 1

        for split, document in split_documents(c, left_out):
            documents[split] += 1
            for piece in cut_document(document, c.synth.max_document):
                waiting[split].append(json.dumps(piece, ensure_ascii=False).encode() + b"\n")
                if len(waiting[split]) == c.synth.shard_documents:
                    write(split)
        for split in waiting:
            if waiting[split]:
                write(split)
        found = ", ".join(f"{documents[split]} for {split}" for split in waiting)
        found += "".join(f"; {count} lines left out: {reason}" for reason, count in left_out.items())
        if not shards["train"]:
            raise UserError(f"synth.corpus={c.synth.corpus!r} holds no text to train on ({found}); check the "
                            "files.")
        print(f"corpus: {found}" + ("" if documents["dev"] else "; without dev there is no gap curve"))
        write_whole(index, json.dumps(shards).encode())
    return json.loads(index.read_text())


def keep_settings(c, folder, keys, begun):
    """Keep the settings that shape a folder. UserError if it has others, or files of the user's."""
    if any(folder.glob("[!.]*")) and not (folder / "settings.yaml").is_file():
        raise UserError(f"{folder} holds files that synth.py did not make; choose another folder with "
                        "data=….")
    settings = c.synth | {"seed": c.seed}
    same_settings(
        folder / "settings.yaml",
        {key: settings[key] for key in keys},
        remedy="choose another folder with data=…, or make it anew with python synth.py fresh=true",
        shaping=lambda kept: kept | {"corpus": corpus_names(kept)},
        begun=begun)


def split_documents(c, left_out):
    """The documents, each with its split: the tiny world's know theirs, others are divided by hash.

    left_out: counts the lines that are no document, by reason
    """
    settings = c.synth
    for name in corpus_names(settings):
        if name == "tiny":
            for split, count in (("train", settings.documents), ("dev", settings.held_out_documents)):
                for document in tiny_world(c.seed, split, count, settings.facts):
                    yield split, document
            continue
        paths = sorted(glob.glob(name, recursive=True))
        paths = [path for path in paths if not Path(path).with_name("settings.yaml").is_file()]    # our own
        if not paths:
            raise UserError(f"synth.corpus: {name!r} matches no file; give a glob such as "
                            "'books/*.txt', or tiny.")
        for document in itertools.chain.from_iterable(read_documents(path, left_out) for path in paths):
            place = hash_share("\n".join(texts_of(document)))
            yield split_at(place, settings.held_out_share, settings.held_out_share), document


def read_documents(path, left_out):
    """Stream cleaned documents from *.jsonl or *.ndjson (one a line) or *.txt (blank lines between them).

    Each may be compressed, *.gz. Lines that are no document are counted in `left_out`, by reason, and the
    first of each is printed. UserError: the file cannot be read
    """
    name = path.lower().removesuffix(".gz")
    if not name.endswith((".txt", ".jsonl", ".ndjson")):
        raise UserError(f"{path} is none of *.txt, *.jsonl and *.ndjson; extras/corpora.py converts others.")
    opener = open if name == path.lower() else gzip.open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as rows:
            if name.endswith(".txt"):
                paragraphs = itertools.groupby(rows, str.isspace)
                rows = (json.dumps({"text": "".join(lines)}, ensure_ascii=False) for _, lines in paragraphs)
            for number, row in enumerate(rows, 1):
                try:
                    document = document_of(json.loads(row.encode())) if row.strip() else {"text": ""}
                except (ValueError, TypeError, AttributeError, RecursionError) as error:
                    known = type(error) is ValueError
                    reason = str(error) if known else "no UTF-8, no JSON object, or of another shape"
                    if not left_out[reason]:
                        print(f"{path}, line {number}, is left out: {reason}")
                    left_out[reason] += 1
                    continue
                if any(texts_of(document)):
                    yield document
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read to its end ({error}); mend or remove it.") from None


MEDIA = """audio audios audio_filepath audio_path audio_file wav sound speech clip image images video
    videos""".split()
ROLE_OF = {"human": "user", "gpt": "assistant", "developer": "system"} | {role: role for role in ROLES}


def document_of(row):
    """The cleaned document of a line, without other keys. ValueError says why there is none.

    >>> document_of({"text": "<b>5 &lt; 7</b>", "lang": "en", "url": "a.b"})
    {'text': '5 < 7', 'lang': 'en'}
    """
    if any(row[key] for key in row if key.lower() in MEDIA):
        raise ValueError("it has sound or pictures; extras/recordings.py reads sound")
    spoken = row.get("spoken")                              # counts characters, so nothing is cleaned
    turns = row.get("messages") or row.get("conversations")
    if turns:
        turns = [{"role": "system", "content": row.get("system")}, *turns]
        document = {"messages": messages_of(turns, str if spoken else clean)}
    elif isinstance(row.get("text"), str):
        text = re.sub(r"\n{3,}", "\n\n", clean(without_markup(row["text"])))
        document = {"text": row["text"] if spoken else text}
    else:
        raise ValueError("it has no text and no messages")
    if lang := row.get("lang") or row.get("language"):
        document["lang"] = clean(str(lang))
    if spoken:
        start, end = spoken
        if not 0 <= start < end:
            raise ValueError("spoken is no range of characters")
        document["spoken"] = [start, end]
    if row.get("endless"):
        document["endless"] = True
    return document


def messages_of(turns, tidy):
    """The messages of a dialogue, as OpenAI-compatible servers and ShareGPT's exports write them.

    ValueError: a turn is no text, or of a tool, so that nothing can be learned from the dialogue

    >>> turns = [{"from": "human", "value": "hi "}, {"role": "assistant", "content": [{"text": "hello"}]}]
    >>> messages_of(turns, clean)
    [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello'}]
    """
    messages = []
    for turn in turns:
        role = ROLE_OF.get(turn.get("role") or turn.get("from"))
        content = turn.get("content") or turn.get("value")
        if isinstance(content, list):
            content = "\n".join(part.get("text") for part in content)       # a TypeError, if one is no text
        if role is None or turn.get("tool_calls") or turn.get("function_call"):
            raise ValueError("a turn is neither the system's, the user's nor the assistant's")
        content = tidy(content or "")
        if content:
            messages.append({"role": role, "content": content})
        elif role != "system":
            raise ValueError("a turn says nothing")
    return messages


def texts_of(document):
    if "messages" in document:
        return [turn["content"] for turn in document["messages"]]
    return [document["text"]]


def clean(text):
    """Keep what can be seen: no control characters, signs without width or white space at a line's end.

    >>> clean("soft\\xadly \\r\\n a < b")
    'softly\\n a < b'
    """
    text = re.sub(INVISIBLE, "", "\n".join(line.rstrip() for line in text.splitlines()).replace("\xa0", " "))
    return re.sub(r"\A\n*(?: (?! ))?", "", text).rstrip()           # but an indent stays


# Joiners and breaks without width count where a letter that is not Latin follows.
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200e\u200f\u202a-\u202e\u2060-\u206f"
                       "\ud800-\udfff\ufeff\ufffd]|[\u200b-\u200d](?![^\x00-\u024f])")
COMMENT = re.compile(r"(?is)<!--(?:(?!<!--).)*?-->|<(script|style)\b(?:(?!<\1\b).)*?</\1\s*>|<!doctype[^<>]*>"
                     r"|<\?xml[^<>]*>")
INLINE = """a abbr b big cite code em font i ins kbd mark q s samp small span strike strong sub sup tt u var
    label button""".split()
BLOCK = """address article aside blockquote body br caption center dd details div dl dt figcaption figure
    footer form h1 h2 h3 h4 h5 h6 head header hr html img input legend li main nav noscript ol option p pre
    section select summary table tbody td textarea tfoot th thead title tr ul video""".split()
TAG = re.compile(rf"""(?i)</?({"|".join(INLINE + BLOCK)})"""
                 r"""(?:\s+[^\s"'<>=]+(?:\s*=\s*(?:"[^"]*"|'[^']*'|[^\s<>"']+))?)*\s*/?>""")


def without_markup(text):
    """Drop HTML's own tags, those of blocks to line breaks, and resolve character references.

    A tag that is nowhere closed is none, but for a few.

    >>> without_markup("<p>5 &lt; 7</p>, vector<int> v"), without_markup("if a<b and c>d")
    ('\\n5 < 7\\n, vector<int> v', 'if a<b and c>d')
    """
    text = re.sub(COMMENT, "", text)
    closed = set(re.findall(r"</(\w+)\s*>", text.lower())) | {"br", "hr", "img", "li", "p"}

    def replaced(tag):
        name = tag[1].lower()
        return tag[0] if name not in closed else "" if name in INLINE else "\n"

    return re.sub(r"&#?\w+;", lambda reference: html.unescape(reference[0]), re.sub(TAG, replaced, text))


def cut_document(document, most):
    """Cut a text into pieces of at most `most` words: training leaves out what is longer than a pack.

    Dialogues stay whole, for an answer without its question would teach nothing, and so do documents whose
    count of characters, or missing end, would no longer be right.
    """
    if "messages" in document or "spoken" in document or "endless" in document:
        return [document]
    return [document | {"text": piece} for piece in cut_text(document["text"], most)]


def cut_text(text, most):
    """Cut a text at sentence ends; a sentence that is too long alone is cut before its words.

    White space stays at the end of the piece before, so that joining the pieces gives the text back.

    >>> cut_text("One two. Three four five six. Seven.", 3)
    ['One two. ', 'Three four five ', 'six. Seven.']
    """
    starts = [start for start, _ in sentences(text)]
    cuts = [0]                                              # where a piece may begin
    for start, end in itertools.pairwise([*starts, len(text)]):
        words = [m.start() for m in WORD.finditer(text, start, end)]
        cuts += [start, *words[most::most]]
    bounds = [0]
    held = 0                                                # words since the last bound
    for start, end in itertools.pairwise([*cuts, len(text)]):
        words = count_words(text[start:end])
        if held + words > most:
            bounds.append(start)
            held = 0
        held += words
    return [text[start:end] for start, end in itertools.pairwise([*bounds, len(text)])]


# --------------------------------------------------------------------------------------------------
# 6. Making shards
#
# Plan a shard's samples with sections 1 and 2, speak their segments, gate the clips, write. espeak's state
# survives from call to call, so every espeak shard is made by one fresh process: its bytes then depend on
# the settings and its number alone. Other engines are expensive to load: their processes make many shards.
# --------------------------------------------------------------------------------------------------

CLIPS_AT_ONCE = 32                # clips that an engine speaks in one call, and that babble under each other
GOLDEN = (5 ** 0.5 - 1) / 2       # its multiples, modulo 1, lie evenly however many they are


def plan_shard(c, recipe, split, number, counts):
    """The samples of corpus shard `number`; their speech parts have a voice, a dict, and no clip yet.

    What would be too long a clip at the fastest pace stays text, and so does what no voice can say; `counts`
    counts the languages without a voice.
    """
    choices = candidates(split, c.synth)
    longest = c.synth.gate.max_seconds * c.synth.gate.chars_per_second[1]
    samples = []
    lines = (Path(c.data) / "corpus" / f"{split}-{number:06d}.jsonl").read_bytes().splitlines()
    for place, document in enumerate(map(json.loads, lines)):
        lang = document.get("lang", c.synth.lang)
        rng = Random(f"{c.seed} {recipe} {split} {number} {place}")

        def voice_for(words):
            if len(words) > longest or not speakable(words, lang):
                counts["rejected: too long to be said"] += len(words) > longest
                return None
            voice = draw_voice(rng, choices, c.synth, lang)
            counts[f"rejected: no voice for {lang}"] += voice is None
            return voice

        for sample in RECIPES[recipe](document, c.synth, rng, voice_for):
            name = f"{recipe}-{split}-{number:06d}-{len(samples):06d}"
            samples.append({"id": name, "recipe": recipe, "lang": lang} | sample)
            if "endless" in document and recipe != "tasks":
                samples[-1]["endless"] = True
    return samples


def make_shard(c, recipe, split, number):
    """Make one shard: plan its samples, speak them, write them."""
    counts = Counter()
    samples = plan_shard(c, recipe, split, number, counts)
    spoken = [part for sample in samples for parts in parts_of(sample) for part in parts
              if part["role"] == "speech"]
    noise = c.synth.noise if recipe in c.synth.noise.recipes else None
    counts["samples"] = len(samples)
    for start in range(0, len(spoken), CLIPS_AT_ONCE):
        seed = int(hash_share(f"{c.seed} {recipe} {split} {number} {start}") * 2 ** 31)
        counts += speak(spoken[start:start + CLIPS_AT_ONCE], c.synth, noise, seed)
    clips = {}
    for sample in samples:
        files = clips[sample["id"]] = {}
        for parts in parts_of(sample):
            parts[:] = joined(parts)
            for part in parts:
                counts[part["role"] + " words"] += count_words(part["text"])
                if part["role"] == "speech":
                    counts["seconds"] += part["seconds"]
                    part["audio"] = f"{len(files):02d}.flac"
                    files[part["audio"]] = part.pop("flac")
    write_shard(shard_path(c, recipe, split, number), samples, clips, counts)


def speak(parts, settings, noise, seed):
    """Give every speech part its clip, "flac", and "seconds"; one that fails the gate becomes text again.

    Noise comes after the gate, so that it hides nothing from it and nothing unfit is anybody's babble.
    -> how many clips there are, and how many were rejected for which reason
    """
    texts = [part["text"] for part in parts]
    waveforms, rate = load_engine(settings.engine)(texts, [part["voice"] for part in parts], seed)
    counts = Counter()
    fit = []
    for part, waveform in zip(parts, waveforms, strict=True):
        part["waveform"] = np.atleast_1d(to_16k(waveform, rate).squeeze())
        part["voice"] = part["voice"]["id"]
        reason = gate(part["waveform"], part["text"], settings.gate)
        counts[f"rejected: {reason}" if reason else "clips"] += 1
        if reason:
            part["role"] = "text"
        else:
            fit.append(part)
    if noise:
        lay_noise(fit, noise, np.random.default_rng(seed))
    for part in fit:
        del part["loss"]
        waveform = part.pop("waveform")                     # those of a whole shard would fill the memory
        part["flac"] = flac_bytes(waveform)
        part["seconds"] = round(len(waveform) / RATE, 3)
    return counts


def joined(parts):
    """The parts, neighbouring texts of the same loss made one."""
    done = []
    for (role, loss), group in itertools.groupby(parts, key=lambda part: (part["role"], part.get("loss"))):
        if role == "text":
            done.append(text_part("".join(part["text"] for part in group), loss))
        else:
            done += group
    return done


def wanted_shards(c):
    """All shards that the settings ask for, as (recipe, split, number); makes the corpus if need be.

    They are spread evenly over the corpus; who asks for more keeps those. For dev one shard of each recipe is
    enough, and nothing is read from test.
    """
    corpus = make_corpus(c)
    order = sorted(range(corpus["train"]), key=lambda number: number * GOLDEN % 1)
    wanted = []
    for recipe, most in c.synth.shards.items():
        wanted += [(recipe, "train", number) for number in sorted(order[:most])]
        if most and "dev" in corpus:
            wanted.append((recipe, "dev", 0))
    return wanted


def make_shards(c):
    """Make the shards of this process's share that do not exist yet, then print the closing report."""
    if c.fresh:
        made = [Path(c.data) / name / "settings.yaml" for name in ("corpus", *RECIPES)]
        for path in [*made, *Path(c.data).glob("tokenizer-*/tokenizer.json")]:
            if path.is_file():                              # else the folder is not ours
                shutil.rmtree(path.parent)
    wanted = wanted_shards(c)
    shaping = [key for key in (*c.synth, "seed") if key not in ("shards", "workers")]
    for recipe in c.synth.shards:
        folder = Path(c.data) / recipe
        keep_settings(c, folder, shaping, begun=any(folder.glob("*.tar")))
    share, shares = map(int, (c.shard or "0/1").split("/"))
    missing = [key for key in wanted[share::shares] if not shard_path(c, *key).is_file()]
    if missing:
        make_missing(c, missing)
    report(c, [key for key in wanted if shard_path(c, *key).is_file()])


def make_missing(c, keys):
    """Make these shards in synth.workers processes; with espeak each makes one. UserError if one dies."""
    espeak = c.synth.engine == "espeak"
    context = multiprocessing.get_context("forkserver" if espeak else "spawn")
    context.set_forkserver_preload(["numpy", "soundfile", "tqdm", "yaml"])
    pool = ProcessPoolExecutor(
        max_workers=c.synth.workers,
        mp_context=context,
        initializer=end_with_parent,
        max_tasks_per_child=1 if espeak else None)
    try:
        jobs = [pool.submit(make_shard, c, *key) for key in keys]
        for job in tqdm(as_completed(jobs), total=len(keys), desc="shards", disable=None):
            job.result()
    except BrokenProcessPool:
        raise UserError("A process that made shards was killed, perhaps for want of memory; start again, if "
                        "need be with fewer synth.workers: finished shards are kept.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent():
    """Let this process end when the one that asked for it is gone, killed without a chance to say so."""
    def watch():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def report(c, keys):
    """Print what stands in the data folder: samples, hours, share of speech, clips that failed the gate."""
    for recipe, group in itertools.groupby(keys, key=lambda key: key[0]):
        n = sum((Counter(read_index(shard_path(c, *key))["counts"]) for key in group), Counter())
        share = n["speech words"] / max(1, n["speech words"] + n["text words"])
        rejected = ", ".join(f"{n[key]} {key}" for key in sorted(n) if key.startswith("rejected"))
        hours = n["seconds"] / 3600
        print(f"{recipe:<12} {n['samples']:>8} samples, {hours:8.2f} h of speech in {n['clips']:>8} clips, "
              f"{share:6.1%} of the words; {rejected or 'no clip rejected'}")


# --------------------------------------------------------------------------------------------------
# 7. Settings and the command line
#
# config.yaml says which keys exist and of what type. A profile overrides it, the command line overrides both.
# --------------------------------------------------------------------------------------------------

TABLES = ("shards", "facts", "tasks", "held_out", "accents", "mix", "lr_scale")   # free names; replaced whole
EXPECTED = {"UserError", "OSError", "YAMLError", "JSONDecodeError", "UnicodeDecodeError", "SafetensorError",
            "LibsndfileError", "OpenAIError"}               # what wrong input and servers that are away raise


class Settings(dict):
    """A section of the settings: c.train.clip is c["train"]["clip"]."""

    def __getattr__(self, key):
        if key not in self:
            raise AttributeError(f"there is no setting {key}")
        return self[key]


class StrictLoader(yaml.SafeLoader):
    """PyYAML alone reads 1e-4 as a text, and of a key that stands twice the last."""

    def construct_mapping(self, node, deep=False):
        for key, count in Counter(key.value for key, _ in node.value).items():
            if count > 1:
                raise UserError(f"The key {key} stands twice in the settings, near line "
                                f"{node.start_mark.line + 1}; keep one of the two.")
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
                                   list("-+0123456789"))


class Argument(str):
    """A value as it stands on the command line: a text where the key wants one, YAML otherwise."""


def load_config(arguments, **own):
    """config.yaml, then the profile, then arguments such as "train.clip=0.5".

    own: further keys with their defaults. train.stages={…} replaces all stages; each is completed from
    train.stage. UserError names a key that does not exist, or whose value is of another type.
    """
    c = yaml.load(Path(__file__).with_name("config.yaml").read_text("utf-8"), StrictLoader) | own
    profiles = c.pop("profiles")
    changes = dict(argument.partition("=")[::2] for argument in arguments)
    profile = changes.get("profile", c["profile"])
    if profile not in profiles:
        raise UserError(f"There is no profile {profile!r}; config.yaml has {', '.join(profiles)}.")
    overlay(c, profiles[profile], "", f"profile {profile}")
    for key, text in changes.items():
        if key == "train.stages":
            c["train"]["stages"] = {}
        parts = key.split(".")
        if parts[:2] == ["train", "stages"] and len(parts) > 3 and parts[2] not in c["train"]["stages"]:
            raise UserError(f"There is no stage {parts[2]!r}; a new one is given whole: "
                            f"train.stages.{parts[2]}={{…}}.")
        value = Argument(text)
        for name in reversed(key.split(".")):
            value = {name: value}
        overlay(c, value, "", "the command line")
    for name, changed in c["train"]["stages"].items():
        stage = copy.deepcopy(c["train"]["stage"])
        c["train"]["stages"][name] = overlay(stage, changed, "train.stage.", f"stage {name}")
    c = as_settings(c)
    check_config(c)
    return c


def overlay(base, over, prefix, where):
    """Lay `over` upon `base`, section by section; prefix and where: for the UserError.

    >>> overlay({"a": {"b": 1, "c": 2.0}}, {"a": {"c": Argument("3")}}, prefix="", where="here")
    {'a': {'b': 1, 'c': 3.0}}
    """
    for name, value in over.items():
        default = base.get(name)
        if isinstance(value, Argument):
            value = str(value) if isinstance(default, str) else yaml.load(value, StrictLoader)
        if isinstance(default, dict) and isinstance(value, dict) and name not in TABLES:
            overlay(default, value, f"{prefix}{name}.", where)
        elif prefix.startswith("train.stages.") and not isinstance(default, dict):
            base[name] = value                              # checked when the stage is completed
        elif name not in base:
            raise UserError(f"Unknown key {prefix}{name} ({where}); the nearest valid key is "
                            f"{prefix}{nearest(name, base)}.")
        elif isinstance(default, float) and type(value) is int:
            base[name] = float(value)
        elif type(value) is type(default):
            base[name] = value
        else:
            raise UserError(f"{prefix}{name} ({where}) must be {type(default).__name__}, not {value!r}.")
    return base


def as_settings(value):
    return Settings({k: as_settings(v) for k, v in value.items()}) if isinstance(value, dict) else value


POSITIVE = re.compile(r"model\..*|synth\.workers|.*\.(shard_documents|max_document|max_seconds|pack_length"
                      r"|packs|packs_at_once|loss_chunk|clip|keep_states|batch|max_tokens|bootstrap|votes"
                      r"|requests)")


def check_config(c):
    """Refuse numbers that mean nothing (0 is "none" or "never"), and settings that contradict each other."""
    flat = dotted(c)
    for key, value in flat.items():
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and not key.endswith("snr"):
                above = POSITIVE.fullmatch(key)
                if not (number > 0 if above else number >= 0):
                    raise UserError(f"{key}={value} must be {'above 0' if above else '0 or more'}.")
    settings = c.synth
    audio, text = c.model.audio, c.model.text
    numbers = re.fullmatch(r"(\d+)/(\d+)", c.shard or "0/1")
    wrong = {
        "synth.share must be from 0 to 1": settings.share > 1,
        "synth.min_words must be from 1 to max_words": not 1 <= settings.min_words <= settings.max_words,
        "synth.gate.max_seconds must be at most 30, Whisper's window": settings.gate.max_seconds > 30,
        f"run={c.run!r} must be a plain folder name": not re.fullmatch(r"[^\W_][\w.-]*", c.run),
        f"shard={c.shard!r} must be i/n with i below n": not numbers or int(numbers[1]) >= int(numbers[2]),
        "synth.level must be word or sentence": settings.level not in ("word", "sentence"),
        f"synth.tasks gives shares to {', '.join(TASKS)}":
            not settings.tasks.keys() <= TASKS.keys() or not any(settings.tasks.values()),
        f"synth.noise.recipes may have {', '.join(RECIPES)}": not set(settings.noise.recipes) <= set(RECIPES),
        "bench.snr must be numbers, and train.betas two of them":
            str in map(type, c.bench.snr + c.train.betas) or len(c.train.betas) != 2,
        "train.precision must be auto, float32 or bfloat16":
            c.train.precision not in ("auto", "float32", "bfloat16"),
        "model.audio.d_model must be even and a multiple of encoder_attention_heads":
            audio.d_model % 2 or audio.d_model % audio.encoder_attention_heads,
        "model.audio.max_source_positions must be 1500 or more": audio.max_source_positions < 1500,
        "model.text.hidden_size must be a multiple of 2 x num_attention_heads":
            text.hidden_size % (2 * text.num_attention_heads),
        "model.text.num_attention_heads must be a multiple of num_key_value_heads":
            text.num_attention_heads % text.num_key_value_heads,
        "model.text.vocab_size must be 262 or more: bytes and marks": text.vocab_size < 262,
    }
    for name, stage in c.train.stages.items():
        wrong[f"stage {name}: optimizer must be adamw or muon"] = stage.optimizer not in ("adamw", "muon")
        wrong[f"stage {name}: mix gives no recipe a share"] = not any(stage.mix.values())
        wrong[f"stage {name}: lr_scale has encoder, adapter and llm"] = stage.lr_scale.keys() != {
            "encoder", "adapter", "llm"}
    for name in settings.shards:
        near = nearest(name, RECIPES)
        wrong[f"synth.shards has {name!r}; the nearest recipe is {near}"] = name != near
    for key in ("synth.rate", "synth.pitch", "synth.noise.snr", "synth.gate.chars_per_second"):
        pair = flat[key]
        wrong[f"{key} must be [lowest, highest], not {pair}"] = (
            len(pair) != 2 or str in map(type, pair) or pair != sorted(pair))
    for sentence, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(f"{sentence}.")


def same_settings(path, now, remedy, shaping=lambda settings: settings, begun=True):
    """Keep `now` in `path`; if other settings stand there already, UserError names the keys that differ.

    shaping: takes settings and returns what of them counts; begun: false while nothing has been made yet, so
    that a slip (a glob that matches nothing) can be put right.
    """
    plain = json.loads(json.dumps(now))                     # YAML writes no Settings
    before = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else None
    if before == plain:                                     # the folder may be read-only
        return
    if begun and before:
        before, after = (dotted(shaping(as_settings(settings))) for settings in (before, now))
        differ = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
        if differ:
            raise UserError(f"{path.parent} was made with other settings ({', '.join(differ)}); {remedy}.")
    write_whole(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode())


def dotted(settings, prefix=""):
    """Flatten nested settings: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in settings.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def run(main):
    """Run a script's main(arguments). What is EXPECTED of users and their files becomes one sentence and exit
    status 2; debug=true shows the traceback."""
    try:
        main(sys.argv[1:])
    except Exception as error:
        if os.environ.get("RANK", "0") != "0":              # torchrun ends this rank once rank 0 has spoken
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        names = {kind.__name__ for kind in type(error).__mro__}
        if not names & EXPECTED or "debug=true" in sys.argv:
            raise
        sentence = " ".join(str(error).split())
        if "UserError" not in names:
            sentence = f"{type(error).__name__}: {sentence.rstrip('.')}."
        print(sentence, file=sys.stderr, flush=True)
        sys.exit(2)


def main(arguments):
    c = load_config(arguments)
    if c.fresh and c.shard:
        raise UserError("fresh=true removes the shards of all shares: give it once, without shard=i/n.")
    make_shards(c)


# --------------------------------------------------------------------------------------------------
# 8. The tiny world
#
# A grammar of a few hundred words that writes short stories and instruction dialogues, so that the
# whole method runs offline in minutes. Stories carry facts that later sentences need. A dialogue asks
# one of sixteen kinds of instruction under none or one of fifteen constraints whose names and arguments are
# SpeechInstructBench's own (IFEval's), so a rule knows every verdict. assets/tiny_world.yaml has the words.
# --------------------------------------------------------------------------------------------------

WORLD = yaml.safe_load((Path(__file__).parent / "assets" / "tiny_world.yaml").read_text("utf-8"))
NUMBERS = WORLD["numbers"]                # from zero on
NAMES = WORLD["names"]
NOUNS = WORLD["nouns"]
PLACES = WORLD["places"]
KEYWORDS = WORLD["keywords"]
FILLERS = WORLD["fillers"]
REPAIRS = WORLD["repairs"]
FACTS = WORLD["facts"]                    # {"colour": {"sun": "yellow", …}, …}
FACT_FORMS = WORLD["fact_forms"]
GROUPS = WORLD["groups"]
KINDS = WORLD["kinds"]
OPEN = WORLD["open"]
CLOSED = [kind for kind in KINDS if kind not in OPEN]
COMPUTED = WORLD["computed"]
ANSWERS = WORLD["answers"]
CONSTRAINTS = WORLD["constraints"]
FACT_WORDS = " ".join(f"{x} {y}" for known in FACTS.values() for x, y in known.items()).split()
LEXICON = sorted({*NOUNS, *KEYWORDS, *NUMBERS, *FACT_WORDS})


def tiny_world(seed, split, documents, facts):
    """Stream the documents: dialogues {"messages"} and stories {"text"} by turns, fixed by the arguments."""
    for n in range(documents):
        rng = Random(f"{seed} world {split} {n}")
        yield {"text": story(rng, facts)} if n % 2 else {"messages": dialogue(rng, split)}


def story(rng, facts):
    """Write four sentences or a few more; facts: how often one is told in each of FACT_FORMS."""
    forms = [form for form, times in facts.items() for _ in range(times)]
    told = []
    while len(told) < 4:
        told += rng.choice(draw_scenes(rng, forms))
    return " ".join(told)


def draw_scenes(rng, forms):
    """The scenes that a story may go on with; in most a sentence needs an earlier one: where is the ball now?

    What people say is any words of the world: a word that is rare in facts and questions is heard often
    enough.
    """
    a, b = rng.sample(NAMES, 2)
    thing = rng.choice(NOUNS + KEYWORDS)
    words = rng.sample(LEXICON, rng.randint(3, 6))
    line = " ".join(words)
    here, there = rng.sample(PLACES, 2)
    n = rng.randint(1, 10)
    m = rng.randint(1, 10)
    times = rng.randint(2, 5)
    span, counted = draw_arguments("count", rng)
    told = [[fact(rng, forms, a, b) for _ in range(count)] for count in (2, 2, 3)]
    return [
        [f"{a} puts the {thing} in the {here}.", f"{b} takes the {thing} to the {there}.",
         f"now the {thing} is in the {there}."],
        [f"{a} has {NUMBERS[n]} apples and gets {NUMBERS[m]} more.",
         f"{NUMBERS[n]} and {NUMBERS[m]} make {NUMBERS[n + m]}.", f"now {a} has {NUMBERS[n + m]} apples."],
        [f"{a} says {line}.", f"{b} says {line} too."],
        [f"{a} says {line}.", f"backwards it is {' '.join(words[::-1])}."],
        [f"{a} says {line}.", f"{b} cries {line.upper()}."],
        [f"{b} cries {line.upper()}.", f"{a} says {line}."],
        [f"{a} says {thing} {NUMBERS[times]} times.", f"we hear {' '.join([thing] * times)}."],
        [f"{a} counts from {span}.", f"we hear {', '.join(counted)}."],
        [f"{a} counts from {span}.", f"{b} cries {' '.join(counted).upper()}."],
        *told]


def fact(rng, forms, a, b):
    """Tell a fact in one of FACT_FORMS; in some of them a asks and b replies."""
    kind = rng.choice([*sorted(FACTS), *["sum"] * 6])                  # many sums, for there are a hundred
    x, (y,) = draw_arguments(kind, rng)
    stated = KINDS[kind]["fact"].format(x=x, y=y)
    again = KINDS[kind]["again"].format(x=x)
    form = FACT_FORMS[rng.choice(forms)]
    return form.format(stated=stated, kind=kind, again=again, y=y, Y=y.upper(), a=a, b=b)


def dialogue(rng, split):
    """One to three questions with their answers; the speaker corrects a tenth, a tenth is disfluent."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        style = rng.random()
        if style < 0.1:
            task = draw_adjustment(rng, split, CLOSED)
        else:
            task = draw_instruction(rng, split, list(KINDS))
        prompt = disfluent(task["prompt"], rng) if style > 0.9 else task["prompt"]
        turns.append({"role": "user", "content": prompt})
        turns.append({"role": "assistant", "content": task["answer"]})
    return turns


def draw_instruction(rng, split, kinds):
    """Draw an instruction of one split: its prompt, reference answer and the checks that judge an answer."""
    while True:
        kind = rng.choice(kinds)
        shape = KINDS[kind]["shape"]
        fit = [name for name, rule in CONSTRAINTS.items() if shape in rule.get("shapes", ANSWERS)]
        constraint = rng.choice(fit)
        x, words = draw_arguments(kind, rng)
        if split_of(kind, x, constraint) == split:
            value = rng.choice(list(CONSTRAINTS[constraint]["values"]))
            return instruction(kind=kind, x=x, words=words, constraint=constraint, value=value, rng=rng)


def draw_arguments(kind, rng):
    """Draw an instruction's arguments as they are worded, and the words that answer it, in order.

    ('two to five', ['two', 'three', 'four', 'five']) for "count"; ('sun', ['yellow']) for "colour".
    """
    if kind in FACTS:
        x = rng.choice(sorted(FACTS[kind]))
        return x, [FACTS[kind][x]]
    if kind == "sum":
        a = rng.randint(1, 10)
        b = rng.randint(1, 10)
        return f"{NUMBERS[a]} and {NUMBERS[b]}", [NUMBERS[a + b]]
    if kind == "count":
        first = rng.randint(1, 14)
        last = first + rng.randint(2, 5)
        return f"{NUMBERS[first]} to {NUMBERS[last]}", NUMBERS[first:last + 1]
    if kind == "say":
        word = rng.choice(NOUNS)
        times = rng.randint(2, 5)
        return f"{word} {NUMBERS[times]} times", [word] * times
    if kind == "name":
        group = rng.choice(sorted(GROUPS))
        count = rng.randint(2, 4)
        return f"{NUMBERS[count]} {group}", rng.sample(GROUPS[group], count)
    if kind == "tell":
        x = rng.choice(sorted(FACTS["baby"].keys() & FACTS["sound"].keys()))
        return x, [FACTS["baby"][x], FACTS["sound"][x]]
    words = rng.sample(NOUNS, 3)                                       # "repeat" and "backwards"
    return " ".join(words), words if kind == "repeat" else words[::-1]


def split_of(kind, x, constraint):
    """The split an instruction belongs to, by hash of the triple (kind, arguments, constraint).

    Where the answer is computed (counting, sums, word lists) whole arguments are held out instead, under
    every constraint. So no test prompt is ever a training prompt, yet every fact is stated in training.

    >>> split_of("colour", "chocolate", "capitals"), split_of("colour", "chocolate", "quotation")
    ('train', 'test')
    """
    if kind == "sum":
        x = " ".join(sorted(x.split()))                                # five and six is six and five
    key = f"{kind}|{x}" if kind in COMPUTED else f"{kind}|{x}|{constraint}"
    return split_at(hash_share(key) * 2 ** 32 % 100, test=15, dev=5)       # percent


def instruction(kind, x, words, constraint, value, rng):
    """Word an instruction: "what colour is the sun, in capital letters", whose answer is "IT IS YELLOW."."""
    rule = CONSTRAINTS[constraint]
    ask = rng.choice(KINDS[kind]["ask"]).format(x=x)
    how = rng.choice(rule["ask"]).format(v=value)
    prompt = ask
    if how:
        prompt = f"{ask}, {how}" if rng.random() < 0.7 else f"{how}, {ask}"
    ids = ["tiny:answer"]                                   # the content is one more verifiable instruction
    kwargs = [{"kind": kind, "words": words}]
    if "id" in rule:
        ids.insert(0, rule["id"])
        kwargs.insert(0, rule["values"][value])
    if constraint == "bullets":
        kwargs[0] = {"num_bullets": len(words)}
    plain = ANSWERS[KINDS[kind]["shape"]].format(*words, x=x, words=", ".join(words))
    return {"kind": kind, "x": x, "constraint": constraint, "value": value, "how": how, "ask": ask,
            "prompt": prompt, "answer": constrained(plain, words, rule["answer"], value),
            "instruction_id_list": ids, "kwargs": kwargs}


def constrained(plain, words, form, value):
    """The plain answer in the form that a constraint and its value ask for.

    >>> constrained("It is yellow.", ["yellow"], "{s} I like the {v}.", "winter")
    'It is yellow. I like the winter.'
    """
    value = value or ""
    if isinstance(form, dict):
        form = form[value.split()[-1]]
    return form.format(
        *value.split(),
        s=plain,
        v=value,
        Value=value.capitalize(),
        word=words[0],
        upper=plain.upper(),
        lower=plain.lower(),
        no_commas=plain.replace(",", ""),
        uncapitalised=plain[0].lower() + plain[1:],
        bullets="\n".join(f"* {word}" for word in words))


def draw_adjustment(rng, split, kinds):
    """Draw an instruction whose speaker corrects himself: "count from two to five, no wait, from two to six".

    The checks are those of the corrected instruction; `withdrawn` has those of the one taken back.
    """
    while True:
        new = draw_instruction(rng, split, kinds)
        kind = new["kind"]
        x, words = draw_arguments(kind, rng)
        if words != new["kwargs"][-1]["words"] and split_of(kind, x, new["constraint"]) in ("train", split):
            break
    old = instruction(kind=kind, x=x, words=words, constraint=new["constraint"], value=new["value"], rng=rng)
    prompt = f"{old['ask']}, {rng.choice(REPAIRS)}, {KINDS[kind]['again'].format(x=new['x'])}"
    if new["how"]:
        prompt += f", {new['how']}"
    withdrawn = {key: old[key] for key in ("instruction_id_list", "kwargs")}
    return new | {"prompt": prompt, "withdrawn": withdrawn}


def disfluent(prompt, rng):
    """Speak a prompt as people do, with fillers and a repetition at random places.

    >>> disfluent("what colour is the sun", Random(2))
    'er um what um what colour is the sun'
    """
    words = prompt.split()
    words.insert(rng.randrange(len(words)), rng.choice(FILLERS))
    first = rng.randrange(len(words) - 1)
    last = first + rng.randint(1, 2)
    words[first:first] = [word.strip(",") for word in words[first:last]]        # said twice
    if rng.random() >= 0.5:
        words.insert(0, rng.choice(FILLERS))
    return " ".join(words)


if __name__ == "__main__":
    run(main)
