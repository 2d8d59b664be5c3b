"""Interleaved data synthesis: text in, shards of text and synthesised speech out.

InSerter pre-trains a speech LLM on documents in which random segments were turned into speech:

    document      tom puts the ball in the old garden. the ball is in the garden.
    interleaved   tom puts the [ 1.62 s of audio      ]. the ball is in the garden.
                  |-- text --| |------ speech --------||---------- text ----------|

The data's way through this file; shard n of a recipe is made from shard n of the corpus:

    corpus -> documents -> samples: text and segments to be spoken -> clips (TTS, 16 kHz, gate) -> shards

A SAMPLE is what a shard holds and what inserter.py trains on, the same for every recipe:

    {"id": "interleaved-train-000017",      no dots in it; the files are <id>.json, <id>.00.flac, …
     "recipe": "interleaved",               which of RECIPES made it
     "lang": "en",                          the document's, or synth.lang
     "parts": [{"role": "text", "text": "tom puts the ", "loss": true},
               {"role": "speech", "text": "ball in the old garden", "audio": "00.flac", "seconds": 1.62,
                "voice": "en-us+f3/rate=172/pitch=44"},
               {"role": "text", "text": ". the ball is in the garden.", "loss": true}],
     "messages": null}

    parts      a document, in reading order: text, and speech with the words that it says
    messages   a dialogue in place of parts: [{"role": "user", "content": [parts]}, …], roles as in ROLES
    endless    true where the text was cut off, so that its end is no target; else left out
    loss       whether the model learns to write this text, or only reads it; speech is never a target
    audio      the clip's file in the same shard: <id>.00.flac, 16 kHz mono, 16 bit
    voice      the voice's id, or "recorded"; `seconds` is the clip's length; `noise`, where there is some:
               "babble 12 dB"

    recipe        a sample of it                                                      loss on
    interleaved   a document with spoken segments, or a dialogue with spoken turns    all text
    tasks         speech, a question about it, the answer                             the answer
    text          a document or a dialogue, nothing spoken                            all text
    chat          a dialogue, its questions spoken or typed                           the assistant's turns
    continuation  what a model was given, spoken, and what it wrote itself            what it wrote

    python synth.py                           make the shards that are missing
    python synth.py shard=0/4                 make a quarter of them; 1/4, 2/4 and 3/4 on other machines, say
    python synth.py plan=true                 say what would be made and what it would cost
    python synth.py synth.corpus='books/*.txt' data=data/books      your own text

Everything a shard holds follows from the settings and the shard's number, so an interrupted synthesis
continues where it stopped and any number of workers makes the same bytes.

Names: `c` is all settings, `settings` its section synth, `rng` a Random.
"""
from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import functools
import glob
import gzip
import hashlib
import heapq
import html
import importlib
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import operator
import os
import re
import secrets
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio
import yaml
from tqdm import tqdm

RATE = 16_000                     # samples per second of every clip, as Whisper's features want it
ROLES = ("system", "user", "assistant")


class UserError(Exception):
    """Wrong use or wrong input: one sentence: what, where and what to do. Exit status 2, no traceback."""


# --------------------------------------------------------------------------------------------------
# 1. A document becomes a sample
#
# The heart of the method (paper, section 3.1). A document is {"text"} or {"messages"}; "lang" may say its
# language. Some segments of it are chosen to be spoken, at word level: spans of at least five words until
# about 30 % of the words are speech; or at sentence level: whole sentences, about 40 %. Five recipes make
# samples of documents. Two kinds of document are for one recipe each: what a model wrote (`continuation`),
# and a recording (`tasks`).
# Here a speech part has its words, the voice that will say them, and the `loss` that it would have as text;
# section 6 gives it a clip and keeps the voice's id.
# --------------------------------------------------------------------------------------------------

Ranges = list[tuple[int, int]]                          # (start, end) of each, in order, not overlapping
VoiceFor = Callable[[str], dict | None]                 # draws a voice for words; None: it cannot read them

# One Chinese character is one word; "it's", "3.50" and "well-known" are one word each. Vowel signs and
# accents that are characters of their own (as in Hindi) stand inside a word.
MARKS = "".join(chr(i) for i in range(0x300, 0xb000) if unicodedata.category(chr(i)) in ("Mn", "Mc"))
LETTERS = f"[^\\W_\u3400-\u9fff]+(?:[{MARKS}]+[^\\W_\u3400-\u9fff]*)*"
WORD = re.compile(f"[\u3400-\u9fff]|{LETTERS}(?:['’.-]{LETTERS})*")
SENTENCE_END = re.compile(r"(?:[.!?]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*|\n+)")
FILLED = re.compile(r"\S(?:.*\S)?", re.S)               # what is left without the outer white space


def count_words(text: str) -> int:
    return len(WORD.findall(text))


def choose_spans(n: int, share: float, least: int, most: int, rng: Random) -> Ranges:
    """Choose word spans (first, end) of a document of n words; on average share * n words are chosen.

    Lengths are drawn first, and the words that stay text are spread over the gaps afterwards. So the share is
    met in expectation for short documents too; placing spans until one does not fit would favour short ones.

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


def draw_lengths(n: int, share: float, least: int, most: int, rng: Random) -> list[int]:
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


def choose_sentences(words: list[int], share: float, rng: Random) -> list[int]:
    """Choose whole sentences, given their numbers of words; on average share of all words is chosen.

    >>> choose_sentences([6, 4, 9, 5], 0.4, Random(0))     # 4 + 5 of 24 words
    [1, 3]
    """
    budget = share * sum(words)
    chosen = []
    for i in rng.sample(range(len(words)), len(words)):           # in random order
        left = budget - sum(words[j] for j in chosen)
        if words[i] <= left:
            chosen.append(i)
            continue
        if rng.random() < left / words[i]:                        # the last one, as in draw_lengths
            chosen.append(i)
        break
    return sorted(i for i in chosen if words[i])


def sentences(text: str) -> Ranges:
    """Character ranges of the sentences, outer white space left out.

    >>> sentences("One. Two!"), "One. Two!"[5:9]
    ([(0, 4), (5, 9)], 'Two!')
    """
    ends = [m.end() for m in SENTENCE_END.finditer(text)]
    found = [FILLED.search(text, start, end) for start, end in itertools.pairwise([0, *ends, len(text)])]
    return [m.span() for m in found if m]


def segments(text: str, settings: Settings, rng: Random) -> Ranges:
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


def text_part(text: str, loss: bool) -> dict:
    return {"role": "text", "text": text, "loss": loss}


def splice(text: str, ranges: Ranges, loss: bool, voice_for: VoiceFor) -> list[dict]:
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


def spoken_range(turn: dict, share: float, least: int | None, rng: Random) -> Ranges:
    """What of a dialogue's turn is spoken: a user's is, with probability `share`, from its first word on.

    Or, half the time, from a later word on, `least` words at least (None: never): the model then meets
    questions that begin as text and go on as speech.

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


def splice_dialogue(turns: list[dict], ranges: list[Ranges], targets: Iterable[str],
                    voice_for: VoiceFor) -> dict:
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


def gender_word(words: str, voice: dict) -> str | None:
    return {"f": "woman", "m": "man"}.get(voice.get("gender"))


def speed_word(words: str, voice: dict) -> str | None:
    """A voice's speed: what it says of itself, or its rate, config.yaml's default range cut in three.

    >>> [speed_word("", voice) for voice in ({"rate": 190}, {"rate": 230}, {"speed": "slow"}, {})]
    ['slow', 'fast', 'slow', None]
    """
    if voice.get("speed"):
        return voice["speed"]
    rate = voice.get("rate")
    if rate is None:
        return None
    if rate < 200:
        return "slow"
    return "normal" if rate < 220 else "fast"


# Each task's question after the speech, and its answer from the words and the voice; None: it is not known.
TASKS = {
    "transcribe": {"ask": "Transcript:", "answer": lambda words, voice: words},
    "speaker": {"ask": "Speaker:", "answer": gender_word},
    "speed": {"ask": "Speed:", "answer": speed_word},
}


# A recipe takes a document, the settings, the generator and `voice_for`, and yields samples, of which
# plan_shard (section 6) completes id, recipe and lang.

def interleaved(document: dict, settings: Settings, rng: Random, voice_for: VoiceFor) -> Iterator[dict]:
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


def tasks(document: dict, settings: Settings, rng: Random, voice_for: VoiceFor) -> Iterator[dict]:
    """Speech tasks: a sentence or question, or some words of it, is spoken; then it is transcribed, or named
    who speaks or how fast. Four samples of a document.

    Short clips teach hearing sooner than whole sentences do: little else than the clip tells what was said.
    Where the answer is not known (a voice of unknown gender), it is transcribed; words that the voice cannot
    read stay text, to be copied.

    A recording, {"audio_filepath", "text", "task", "prompt"}, gives one: itself, its prompt, its text.

    >>> document = {"text": "it is red."}
    >>> voice_for = lambda words: {"id": "f3", "gender": "f", "rate": 190}
    >>> for sample in tasks(document, load_config([]).synth, Random(4), voice_for):
    ...     print([part["text"] for part in sample["parts"]])
    ['red.', 'Speaker:', ' woman']
    ['it is red.', 'Transcript:', ' it is red.']
    ['is', 'Transcript:', ' is']
    ['it is red.', 'Transcript:', ' it is red.']
    """
    if "audio_filepath" in document:
        yield recorded_task(document)
        return
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
        words = text[start:end].rstrip(" ,")
        heard, = splice(words, [(0, len(words))], False, voice_for)
        voice = heard.get("voice", {}) if settings.engine == "espeak" or settings.voices else {}
        answer = TASKS[task]["answer"](words, voice)        # other engines may not follow espeak's voices
        if answer is None:
            task = "transcribe"
            answer = words
        question = text_part(TASKS[task]["ask"], False)
        yield {"parts": [heard, question, text_part(" " + answer, True)], "messages": None}


def recorded_task(document: dict) -> dict:
    """A recording with what is asked of it. Its words are known where it is transcribed.

    >>> sample = recorded_task({"audio_filepath": "a.wav", "text": "angry", "task": "emotion"})
    >>> [(part["role"], part["text"]) for part in sample["parts"]]
    [('speech', ''), ('text', 'Emotion:'), ('text', ' angry')]
    """
    task = document.get("task", "transcribe")
    words = document["text"] if task == "transcribe" else document.get("transcript", "")
    ask = TASKS[task]["ask"] if task in TASKS else f"{task.capitalize()}:"
    place = {key: document[key] for key in ("audio_filepath", "offset", "duration") if key in document}
    heard = {"role": "speech", "text": words, "loss": False, "voice": {"id": "recorded"}, "file": place}
    answer = text_part(" " + document["text"], True)
    return {"parts": [heard, text_part(document.get("prompt", ask), False), answer], "messages": None}


def plain_text(document: dict, settings: Settings, rng: Random, voice_for: VoiceFor) -> Iterator[dict]:
    """Pure text, so that the LLM keeps what it knows; every position is a target.

    >>> list(plain_text({"text": "it is red."}, {}, Random(0), None))
    [{'parts': [{'role': 'text', 'text': 'it is red.', 'loss': True}], 'messages': None}]
    """
    if "text" in document:
        yield {"parts": [text_part(document["text"], True)], "messages": None}
    else:
        nothing = [[] for _ in document["messages"]]
        yield splice_dialogue(document["messages"], nothing, ROLES, voice_for)


def chat(document: dict, settings: Settings, rng: Random, voice_for: VoiceFor) -> Iterator[dict]:
    """Fine-tuning: dialogues whose questions are spoken or typed; the answers alone are targets.

    A document that is no dialogue gives no sample.

    >>> turns = [{"role": "user", "content": "is it red"}, {"role": "assistant", "content": "yes."}]
    >>> settings = load_config(["synth.spoken_questions=1"]).synth
    >>> sample, = chat({"messages": turns}, settings, Random(0), lambda words: {"id": "f3"})
    >>> [(part["role"], part["text"], part["loss"]) for parts in parts_of(sample) for part in parts]
    [('speech', 'is it red', False), ('text', 'yes.', True)]
    """
    if "messages" in document:
        turns = document["messages"]
        ranges = [spoken_range(turn, settings.spoken_questions, None, rng) for turn in turns]
        yield splice_dialogue(turns, ranges, ("assistant",), voice_for)


def continuation(document: dict, settings: Settings, rng: Random, voice_for: VoiceFor) -> Iterator[dict]:
    """Behaviour alignment (BLSP, arXiv 2309.00916; the paper stacks it on top): what a model was given is
    spoken, and what it wrote when it *read* that is the target; so it learns to do the same when it hears.

    document: as `write=` of inserter.py makes them; "spoken" are the characters of the text, or of the first
    user turn, that were given. Others give no sample.

    >>> document = {"text": "tom has a ball. it is red.", "spoken": [0, 15]}
    >>> sample, = continuation(document, {}, Random(0), lambda words: {"id": "f3"})
    >>> [(part["role"], part["text"], part["loss"]) for part in sample["parts"]]
    [('speech', 'tom has a ball.', False), ('text', ' it is red.', True)]
    """
    if "spoken" not in document:
        return
    given = [tuple(document["spoken"])]
    if "text" in document:
        end = given[0][1]
        read = splice(document["text"][:end], given, False, voice_for)
        yield {"parts": [*read, text_part(document["text"][end:], True)], "messages": None}
    else:
        turns = document["messages"]
        first = next(i for i, turn in enumerate(turns) if turn["role"] == "user")
        ranges = [given if i == first else [] for i in range(len(turns))]
        yield splice_dialogue(turns, ranges, ("assistant",), voice_for)


RECIPES = {"interleaved": interleaved, "tasks": tasks, "text": plain_text, "chat": chat,
           "continuation": continuation}


def parts_of(sample: dict) -> list[list[dict]]:
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
# echo), a rate and a pitch. Two timbres may be one throat at two pitches, so training and test voices are
# divided by what the files say, not by their names. Three engines speak: engine(texts, voices, seed) ->
# (waveforms, sample rate).
# --------------------------------------------------------------------------------------------------

Waves = tuple[list[np.ndarray], int]     # (samples,) float32 each, and their sample rate

PARAMETERS = {  # name: (espeak's number, lowest, highest, espeak's own default, for a voice that says none)
    "rate": (1, 80, 450, 175),      # words per minute; outside of these espeak clamps without a word
    "volume": (2, 0, 300, 100),     # percent; above 100 espeak's gain control compresses, as a shout is
    "pitch": (3, 0, 99, 50),        # 50 is the timbre's own pitch, 0 an octave below, 99 nearly one above
    "range": (4, 0, 99, 50),        # liveliness of the melody; 0 is monotone
}
# 29 of the 104 timbres reach full scale, where espeak's gain control holds them. One constant factor (2 dB),
# not a level per clip: resampling has room to overshoot (to 0.9), and a shout stays louder than a whisper.
GAIN = 0.8


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: `nearest("en-su", ["en-us", "cmn"])` -> "nearest valid: en-us"."""
    close = difflib.get_close_matches(str(name), valid, 3, 0.4)
    return "nearest valid: " + ", ".join(close or sorted(valid)[:12])


def hash_share(text: str) -> float:
    """A text's fixed place in [0, 1), spread evenly: the first 32 bits of its SHA-256.

    >>> hash_share("tom"), hash_share("anna")
    (0.8803796444553882, 0.3333680231589824)
    """
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2 ** 32


@functools.cache
def espeak_files() -> tuple[str, Path]:
    """Library and data folder of espeak-ng's wheel; imported late: it is GPL-3, only its user needs it."""
    try:
        import espeakng_loader
    except ModuleNotFoundError:
        raise UserError("synth.engine=espeak needs the package espeakng-loader: "
                        "pip install espeakng-loader.") from None
    return espeakng_loader.get_library_path(), Path(espeakng_loader.get_data_path())


@functools.cache
def accents() -> dict[str, str]:
    """{language code: voice file}: {"en-us": "gmw/en-US", "cmn": "sit/cmn"}; a file's first code counts."""
    folder = espeak_files()[1] / "lang"
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        code = re.search(r"^language\s+(\S+)", path.read_text(errors="replace"), re.M)
        found.setdefault(code[1].lower(), path.relative_to(folder).as_posix())
    return found


@functools.cache
def timbres() -> dict[str, dict]:
    """{timbre: {"throat", "gender"}} of the variant files."""
    folder = espeak_files()[1] / "voices" / "!v"
    return {path.name: read_timbre(path.read_text(errors="replace")) for path in sorted(folder.iterdir())}


def read_timbre(text: str) -> dict[str, str | None]:
    """Throat and gender of a variant file.

    The throat is what the file makes of the vocal tract: the frequencies of formants 1 to 5, in percent.
    Files that differ in name, pitch, loudness or echo alone agree in it ("Gene", "Gene2"; "f2", "whisperf").
    Files that choose the Klatt synthesiser sound so alike, whatever their formants (spectra of their words
    correlate by up to 0.997), that they count as one throat.

    >>> read_timbre("gender female\\nformant 2 110 100 100   // number, frequency, height, width")
    {'throat': '100/110/100/100/100', 'gender': 'f'}
    """
    formants = ["100"] * 9
    throat = None
    gender = None
    for line in text.splitlines():
        key, *values = re.split("#|//", line)[0].split() or [""]
        if key == "formant":
            formants[int(values[0])] = values[1]
        elif key == "klatt":
            throat = "klatt"
        elif key == "gender":
            gender = values[0][0].lower()
    return {"throat": throat or "/".join(formants[1:6]), "gender": gender}


def timbre_split(timbre: str, held_out: dict[str, float]) -> str:
    """"train", "dev" or "test": by hash of the throat, or of the name where it is no timbre of espeak's.

    Never by rate or pitch. held_out: the shares of throats that only dev and only test hear.

    >>> timbre_split("Gene", {"test": 0.3, "dev": 0.1}) == timbre_split("Gene2", {"test": 0.3, "dev": 0.1})
    True
    """
    try:
        throat = timbres()[timbre]["throat"]
    except (KeyError, UserError):                           # no timbre of espeak's, or no espeak
        throat = timbre
    share = hash_share(f"split {throat}")   # this salt: a third of the women, no easier voices
    if share < held_out["test"]:
        return "test"
    return "dev" if share < held_out["test"] + held_out["dev"] else "train"


def check_espeak(accent: str, timbre: str) -> None:
    """espeak itself keeps its last voice at an unknown accent, and says nothing of an unknown timbre."""
    for kind, name, valid in (("accent", accent, accents()), ("timbre", timbre, timbres())):
        if name not in valid:
            raise UserError(f"espeak has no {kind} {name!r}; {nearest(name, valid)}.")


def espeak_voice(accent: str, timbre: str, **parameters: int) -> dict:
    """A checked voice; "gender" only where the variant file tells it.

    >>> espeak_voice("en-us", "f3", rate=172, pitch=44)["id"]
    'en-us+f3/rate=172/pitch=44'
    """
    check_espeak(accent, timbre)
    name = f"{accent}+{timbre}"
    for key, value in parameters.items():
        low, high = PARAMETERS[key][1:3]
        if not low <= value <= high:
            raise UserError(f"espeak's {key} goes from {low} to {high}, not {value} ({accent}+{timbre}).")
        name += f"/{key}={value}"
    voice = {"id": name, "engine": "espeak", "accent": accent, "timbre": timbre, "lang": accent, **parameters}
    if timbres()[timbre]["gender"]:
        voice["gender"] = timbres()[timbre]["gender"]
    return voice


def candidates(split: str, settings: Settings, pool: list[dict] | None = None) -> list[str] | list[dict]:
    """What `draw_voice` may choose from: names of espeak's timbres, or voices of a file.

    split     "train", "dev" or "test", each with throats of its own; a single timbre serves them all
    settings  the list in timbres; empty, all of espeak's timbres but special_timbres
    pool      voices from a file instead of espeak's
    """
    if pool:
        names = {voice["timbre"] for voice in pool}
    else:
        for name in [*settings.timbres, *settings.special_timbres]:
            check_espeak("en-us", name)
        names = set(settings.timbres) or timbres().keys() - settings.special_timbres
    fit = {name for name in names if len(names) == 1 or timbre_split(name, settings.held_out) == split}
    if not fit:
        raise UserError(f"No timbre is left for {split} at synth.held_out={settings.held_out}: "
                        "offer more timbres, or change the shares.")
    return [voice for voice in pool if voice["timbre"] in fit] if pool else sorted(fit)


def draw_voice(rng: Random, chosen_from: list[str] | list[dict], settings: Settings) -> dict:
    """One voice for one segment; chosen_from: what `candidates` gave; settings: accents, rate and pitch."""
    chosen = rng.choice(chosen_from)
    if isinstance(chosen, dict):
        return chosen
    accent = rng.choice(settings.accents)
    # every second value: in espeak's tables some neighbouring rates (172 and 173 …) are the same speech
    rate, pitch = (rng.randrange(low, high + 1, 2) for low, high in (settings.rate, settings.pitch))
    return espeak_voice(accent, chosen, rate=rate, pitch=pitch)


def read_voices(path: str | Path) -> list[dict]:
    """Voices from a JSON-lines file, handed to the engine as they are: [{"id", "timbre", "lang", …}]."""
    voices = []
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                voices.append(json.loads(line))
                if not all(isinstance(voices[-1][key], str) for key in ("id", "timbre", "lang")):
                    raise TypeError
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"synth.voices={path} cannot be read ({error}).") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path}, line {number}: a voice is one JSON object per line that has the texts "
                        '"id", "timbre" and "lang".') from None
    if not voices:
        raise UserError(f'{path} holds no voice: write one {{"id", "timbre", "lang"}} per line.')
    return voices


class Espeak:
    """espeak-ng in this process. A process has one such library, so two objects would share their state.

    Pitch flutter and gain control run on from clip to clip and cannot be reset; the seed covers the noise
    only. So bytes repeat for the same calls in the same order in a fresh process, while a clip made by itself
    sounds the same and has other bytes.
    """

    def __init__(self) -> None:
        library, data = espeak_files()
        self.library = ctypes.CDLL(library)
        self.library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        synchronous, buffer_ms, do_not_exit = 2, 60000, 0x8000        # a clip comes in one or two callbacks
        self.rate = self.library.espeak_Initialize(synchronous, buffer_ms, str(data).encode(), do_not_exit)
        if self.rate <= 0:
            raise UserError(f"espeak-ng cannot read its data in {data}: install espeakng-loader again.")
        self.pieces = []
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self.callback = signature(self.collect)        # kept here, or Python frees it under espeak's feet

    def collect(self, wave: int | None, samples: int, events: int) -> int:
        """espeak's callback: keep the samples (int16 at the address `wave`) and ask for more."""
        if wave and samples > 0:
            self.pieces.append(ctypes.string_at(wave, 2 * samples))
        return 0

    def speak(self, text: str, voice: dict) -> np.ndarray:
        """text -> (n,) float32 in [-0.8, 0.8] at `self.rate` (22,050 Hz). A parameter that the voice leaves
        out is set to espeak's default, or it would keep the last voice's."""
        check_espeak(voice.get("accent"), voice.get("timbre"))
        name = f"{accents()[voice['accent']]}+{voice['timbre']}"
        codes = [self.library.espeak_SetVoiceByName(name.encode())]
        for key, (number, _, _, default) in PARAMETERS.items():
            codes.append(self.library.espeak_SetParameter(number, int(voice.get(key, default)), 0))
        self.library.espeak_SetSynthCallback(self.callback)          # another object's may be set, or be gone
        data = text.replace("\0", " ").encode()
        utf8 = 1
        self.pieces.clear()
        codes.append(self.library.espeak_Synth(data, len(data) + 1, 0, 1, 0, utf8, None, None))
        if any(codes):
            raise UserError(f"espeak-ng refused voice {voice['id']!r} (return codes {codes}): take another.")
        return np.frombuffer(b"".join(self.pieces), np.int16) * np.float32(GAIN / 32768)

    def __call__(self, texts: list[str], voices: list[dict], seed: int) -> Waves:
        self.library.espeak_ng_SetRandSeed(seed)
        return [self.speak(text, voice) for text, voice in zip(texts, voices, strict=True)], self.rate


def hf_engine(model_name: str) -> Callable:
    """A transformers text-to-waveform model whose output has `waveform` and `sequence_lengths` (VITS, MMS),
    one padded batch per speaker and call. A voice's "speaker" (an integer) chooses among a model's own."""
    from transformers import AutoModelForTextToWaveform, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        model = AutoModelForTextToWaveform.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        raise UserError(f"synth.engine=hf:{model_name} does not load as a text-to-waveform model: "
                        f"{str(error).strip().splitlines()[0]}") from None
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def engine(texts: list[str], voices: list[dict], seed: int) -> Waves:
        torch.manual_seed(seed)
        speakers = [voice.get("speaker") for voice in voices]
        waveforms = [None] * len(texts)
        for speaker in dict.fromkeys(speakers):
            own = [i for i, other in enumerate(speakers) if other == speaker]
            batch = tokenizer([texts[i] for i in own], return_tensors="pt", padding=True).to(model.device)
            chosen = {} if speaker is None else {"speaker_id": speaker}
            out = model(**batch, **chosen)
            for i, waveform, samples in zip(own, out.waveform, out.sequence_lengths):
                waveforms[i] = waveform[:int(samples)].float().cpu().numpy()     # behind it is padding
        return waveforms, model.config.sampling_rate
    return engine


def python_engine(target: str) -> Callable:
    """The user's own callable, say CosyVoice 2 in `python:my_voices:speak`; what it returns is checked."""
    wrong = f"synth.engine=python:{target}"
    module_name, _, function_name = target.partition(":")
    sys.path.append(os.getcwd())            # finds a my_voices.py that stands in the folder one works in
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ModuleNotFoundError, AttributeError) as error:
        if getattr(error, "name", None) not in (module_name, function_name):
            raise                           # something that *their* module lacks: its traceback says more
        raise UserError(f"{wrong}: no function {function_name!r} in a module {module_name!r}, here or "
                        "installed.") from None

    def engine(texts: list[str], voices: list[dict], seed: int) -> Waves:
        result = function(texts, voices, seed)
        try:
            waveforms, rate = result
            waveforms = [np.asarray(waveform, np.float32) for waveform in waveforms]
        except (TypeError, ValueError):
            waveforms, rate = [], None
        fit = [waveform.ndim for waveform in waveforms] == [1] * len(texts)
        if not fit or not isinstance(rate, int) or rate <= 0:
            raise UserError(f"{wrong} must return (one 1-D waveform per text, sample rate as an integer).")
        return waveforms, rate
    return engine


@functools.cache                        # hf: and python: engines serve all shards of a process
def load_engine(name: str) -> Callable:
    """"espeak" | "hf:<model>" | "python:<module>:<function>" -> engine(texts, voices, seed)."""
    if name == "espeak":
        return Espeak()
    kind, _, target = name.partition(":")
    makers = {"hf": hf_engine, "python": python_engine}
    if kind not in makers or not target:
        raise UserError(f"synth.engine={name} is none of espeak, hf:<model>, python:<module>:<function>.")
    return makers[kind](target)


# --------------------------------------------------------------------------------------------------
# 3. Clips
#
# What may be spoken, and the way from waveform to file. espeak speaks a thousand times faster than real
# time, so what follows it decides the speed: one resampling for many clips, one conversion to 16 bit, one
# FLAC written to memory. Clips that are unfit to train on are told by the gate.
# --------------------------------------------------------------------------------------------------

# URLs, mail addresses, markup, paths, code; and, by language, letters that the voice cannot read.
UNSPEAKABLE = re.compile(r"https?:|www\.|\S@\S+\.\w|[{}<>\[\]\\|_^~`=#*]|\w/\w+/|\w\(\)|::|\s--\w|&\w+;"
                         r"|\w\.(com|org|net|py|txt|html?)\b", re.I)
FOREIGN = {"en": re.compile("[^\\W\\d_A-Za-zÀ-ɏ]"), "zh": re.compile("[^\\W\\d_A-Za-zÀ-ɏ㐀-鿿豈-﫿]")}
FOREIGN |= dict.fromkeys(("hak", "ja"), re.compile("[㐀-鿿豈-﫿]"))


def language(code: str) -> str:
    """A code without its region; the Chinese ones whose voices read the script are one.

    >>> language("en-GB-scotland"), language("cmn"), language("yue")
    ('en', 'zh', 'zh')
    """
    code = re.split("[-_]", code.lower())[0]
    return "zh" if code in ("cmn", "yue") else code


def speakable(text: str, lang: str) -> bool:
    """Can a voice of this language ("en-gb", "cmn") say it? By script only English and Chinese are judged,
    and those in which espeak says "Chinese letter" for every character (Hakka, Japanese).

    >>> [speakable(text, "en-us") for text in ("the ball is red", "see https://a.b", "球是红的")]
    [True, False, False]
    """
    foreign = FOREIGN.get(language(lang), UNSPEAKABLE)                 # others: nothing more to judge
    return bool(re.search(r"\w", text)) and not UNSPEAKABLE.search(text) and not foreign.search(text)


def of_language(lang: str | None, chosen_from: list, settings: Settings) -> tuple[list, Settings]:
    """What draws voices for a document in `lang`: of a pool those that speak it, of espeak's accents too.

    lang: None where the document does not say; then it is synth.lang, and where no voice speaks that, all do,
    for one may have left synth.lang as it was.
    """
    wanted = language(lang or settings.lang)
    if isinstance(chosen_from[0], dict):
        fit = [voice for voice in chosen_from if language(voice["lang"]) == wanted]
        return fit if fit or lang else chosen_from, settings
    fit = [accent for accent in settings.accents if accent == lang]
    fit = fit or [accent for accent in settings.accents if language(accent) == wanted]
    if not fit and not lang:
        fit = settings.accents
    return chosen_from if fit else [], Settings(settings | {"accents": fit})


def readable_voice(rng: Random, chosen_from: list, settings: Settings, words: str) -> dict | None:
    """Draw a voice for these words; None where there is none that can read them, so that they stay text."""
    if not chosen_from:
        return None
    voice = draw_voice(rng, chosen_from, settings)
    return voice if speakable(words, voice.get("lang", settings.lang)) else None


@functools.cache
def filters(rate: int) -> tuple[int, int, list[tuple[int, int, torch.Tensor]]]:
    """torchaudio's windowed-sinc filters to 16 kHz: (half width, taps, [(first, last, (taps, phases))]).

    From 22,050 Hz, 441 samples in give 320 out, each phase by its own filter. torchaudio convolves with all
    320 at full length, nine tenths of it zeros; here 32 neighbouring phases share the stretch that they need.
    With 16 zero crossings in place of its default 6, tones up to 7 kHz keep their level."""
    resample = torchaudio.transforms.Resample(rate, RATE, lowpass_filter_width=16)
    bank = []
    for phases in resample.kernel[:, 0].split(32):                                   # (320, 487) by 32
        used = (phases.abs().amax(0) > 1e-12).nonzero()
        first = int(used[0])
        last = int(used[-1]) + 1
        bank.append((first, last, phases[:, first:last].T.contiguous()))
    return resample.width, resample.kernel.shape[-1], bank


def to_16k(waveforms: list[np.ndarray], rate: int) -> list[np.ndarray]:
    """[(n,) float32 at `rate`] -> [(ceil(n * 16000 / rate),) float32 at 16 kHz]: computes exactly
    `torchaudio.transforms.Resample`, many clips at once, in a quarter of its time.

    A clip that starts at a multiple of 441 samples starts at one of 320 afterwards. So clips are laid end to
    end at such offsets, with silence between them that is as long as the filters reach.
    """
    if rate // math.gcd(rate, RATE) > 1000:                 # 44,101: a filter for each of 16,000 phases
        rate = max(50, round(rate / 50) * 50)               # off by a thousandth of a tone
    if rate == RATE or not waveforms:
        return list(waveforms)
    width, taps, bank = filters(rate)
    period = rate // math.gcd(rate, RATE)
    offsets = [0]
    for waveform in waveforms:
        offsets.append(offsets[-1] + math.ceil((len(waveform) + width) / period) * period)
    track = np.zeros(offsets[-1] + taps, np.float32)
    for offset, waveform in zip(offsets, waveforms):
        track[width + offset:width + offset + len(waveform)] = waveform
    frames = torch.from_numpy(track).unfold(0, taps, period)                         # (periods, 487), a view
    filtered = [frames[:, first:last] @ phases for first, last, phases in bank]      # (periods, 32) each
    track = torch.cat(filtered, 1).flatten().numpy()                                 # now at 16 kHz
    clips = []
    for offset, waveform in zip(offsets, waveforms):
        start = offset * RATE // rate
        clips.append(track[start:start + math.ceil(len(waveform) * RATE / rate)])
    return clips


BABBLE_VOICES = 5


def noise_of(kind: str, samples: int, clips: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """(samples,) float32 of noise, of any level.

    kind: white; pink (power falls as 1/f); coloured (its power walks at random from octave to octave); babble
    (five clips that others said, at once); or the path of a recording, from anywhere in it.
    """
    if kind == "babble":
        total = np.zeros(samples, np.float32)
        for i in rng.choice(len(clips), BABBLE_VOICES):
            loudness = np.sqrt(np.mean(clips[i] ** 2))
            total += np.roll(np.resize(clips[i] / loudness, samples), rng.integers(samples))
        return total
    if kind in ("white", "pink", "coloured"):
        spectrum = np.fft.rfft(rng.standard_normal(samples))
        if kind == "pink":
            spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
        if kind == "coloured":
            levels = np.cumsum(rng.normal(-1.5, 6.0, 9))                # dB at 31.25 Hz, 62.5 Hz, … 8 kHz
            hertz = np.linspace(0, RATE / 2, len(spectrum))
            octaves = np.log2(np.maximum(hertz, 31.25) / 31.25)
            spectrum *= 10 ** (np.interp(octaves, np.arange(9), levels) / 20)
        return np.fft.irfft(spectrum, samples).astype(np.float32)
    recording = read_recording(kind)
    repeated = np.resize(recording, max(samples, len(recording)))
    loud = np.flatnonzero(recording)                        # begin where there is sound: silence has no level
    return np.roll(repeated, -int(rng.choice(loud)))[:samples]


def recordings(folder: str, key: str) -> list[str]:
    """The sound files of a folder; UserError, which names the setting `key`, where there is none."""
    found = [str(path) for path in Path(folder).glob("*") if path.suffix.lower() in (".wav", ".flac", ".ogg")]
    demand(len(found) > 0, f"{key}={folder} holds no .wav, .flac or .ogg file; give a folder of recordings, "
                           "or null.")
    return sorted(found)


@functools.lru_cache(maxsize=256)
def read_recording(path: str) -> np.ndarray:
    """A recording as (samples,) float32 at 16 kHz, channels averaged. UserError if it is broken or silent."""
    try:
        recording, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise UserError(f"The noise recording {path} cannot be read ({error}); remove it.") from None
    recording = to_16k([recording.mean(1)], rate)[0]
    demand(bool(np.any(recording)), f"The noise recording {path} is empty or silent; remove it.")
    return recording


def mix(speech: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """(samples,) of both, with `snr` dB between them, never beyond full scale."""
    speech, noise = map(torch.from_numpy, (speech, noise))
    mixed = torchaudio.functional.add_noise(speech, noise, torch.tensor(snr))
    return (mixed / max(1.0, float(mixed.abs().max()))).numpy()


def lay_noise(parts: list[dict], settings: Settings, rng: np.random.Generator) -> None:
    """Lay noise under a share of the parts' waveforms, and name it in the part; settings: synth.noise.

    Half of it is the babble of other parts, half coloured; or recordings. bench.py tests with babble of
    voices that training never hears, and with pink and white noise.
    """
    kinds = recordings(settings.folder, "synth.noise.folder") if settings.folder else ["babble", "coloured"]
    clean = [part["waveform"] for part in parts]
    for i, part in enumerate(parts):
        if not np.any(clean[i]) or rng.random() >= settings.share:
            continue
        others = [clip for j, clip in enumerate(clean) if j != i and np.any(clip)]
        kind = kinds[rng.integers(len(kinds))]
        if kind == "babble" and not others:
            kind = "coloured"
        snr = rng.uniform(*settings.snr)
        part["waveform"] = mix(clean[i], noise_of(kind, len(clean[i]), others, rng), snr)
        part["noise"] = f"{Path(kind).stem} {snr:.0f} dB"


def gate(waveform: np.ndarray, text: str, limits: Settings, recorded: bool = False) -> str | None:
    """None if the clip ((n,) float32, 16 kHz) is fit to train on, else the reason. Limits: min_rms (of full
    scale), max_clipped (share of samples), chars_per_second [low, high], max_seconds.

    recorded: by somebody: its words may be unknown, and people pause, so the pace is not judged

    Letters and digits count, a Chinese one as four (espeak says 3.4 of them a second where it says 16.4
    English letters). Three frames of 10 ms are the least that gives one audio position.
    """
    seconds = len(waveform) / RATE
    if not seconds or not (recorded or re.search(r"\w", text)):
        return "empty"
    if seconds < 0.03:
        return "too short"
    if seconds > limits.max_seconds:
        return "too long"
    energy = np.dot(waveform, waveform)
    if not energy >= limits.min_rms * limits.min_rms * len(waveform):        # "not >=": nan is silent too
        return "silent"
    if np.count_nonzero(np.abs(waveform) >= 0.999) > limits.max_clipped * len(waveform):
        return "clipped"
    if recorded:
        return None
    pace = sum(4 if char >= "㐀" else 1 for char in text if char.isalnum()) / seconds
    low, high = limits.chars_per_second
    if pace > high:
        return "too fast"
    return "too slow" if pace < low else None


def read_recorded(document: dict, longest: float) -> tuple[np.ndarray, str | None]:
    """The recording of a manifest's line, of any rate and container that soundfile reads: (samples,) float32
    at 16 kHz, and why there is none. With an "offset" it is `duration` seconds of the file (or its rest) from
    there on. Longer ones than `longest` seconds, endless ones too, are told by their head."""
    nothing = np.zeros(0, np.float32)
    path = document["audio_filepath"]
    if not os.path.isfile(path):
        return nothing, "no such file"
    try:
        with soundfile.SoundFile(path) as file:
            frames = file.frames
            if "offset" in document:
                file.seek(round(document["offset"] * file.samplerate))
                frames -= file.tell()
                if "duration" in document:
                    frames = max(0, min(frames, round(document["duration"] * file.samplerate)))
            if frames > longest * file.samplerate:
                return nothing, "too long"
            sound = file.read(frames, dtype="float32", always_2d=True)
            return to_16k([sound.mean(1)], file.samplerate)[0][:int(longest * RATE)], None
    except (soundfile.SoundFileError, OSError, OverflowError, ValueError):
        return nothing, "unreadable"


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """(n,) float32 -> (n,) int16, rounded and clamped: the one place where samples become integers."""
    return np.clip(np.rint(waveform * np.float32(32767)), -32768, 32767).astype(np.int16)


def flac_bytes(samples: np.ndarray) -> bytes:
    """(n,) int16 at 16 kHz -> FLAC, 16 bit mono; the same samples give the same bytes."""
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def decode_flac(data: bytes) -> np.ndarray:
    """FLAC bytes -> (samples,) float32 at 16 kHz."""
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


# --------------------------------------------------------------------------------------------------
# 4. Shards
#
# A shard is a tar file in WebDataset's convention. Beside x.tar stands x.json: for every sample its id,
# byte offset, length and SHA-256, so that a reader seeks to its own samples and verifies them. Plain tar
# readers lose samples silently: of 16-member shards cut at a random byte one in three raises nothing.
# --------------------------------------------------------------------------------------------------

END = bytes(1024)                         # what ends a tar file


def shard_path(c: Settings, recipe: str, split: str, number: int) -> Path:
    return Path(c.data) / recipe / f"{split}-{number:06d}.tar"


def tar_member(name: str, data: bytes) -> bytes:
    """One tar member as bytes, without time or user, so that the same samples make the same shard."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that is appended to. A last line that a kill left half-written is cut off."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return data[:whole].splitlines()


def write_whole(path: Path, *contents: bytes) -> None:
    """Write a file aside, flush it, rename it: it is whole or absent. UserError on a full disk."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")     # two machines may share the folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.writelines(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error.strerror}); make room or choose another "
                        "folder, then start again: what is finished is kept.") from None


def write_shard(path: Path, samples: list[dict], clips: dict[str, dict[str, bytes]], extra: dict) -> None:
    """Write x.json, then x.tar, both whole or absent; a tar that exists is finished.

    clips: {sample id: {"00.flac": bytes}}; extra: further keys of x.json.
    """
    blobs = []
    rows = []
    offset = 0
    for sample in samples:
        name = sample["id"]
        members = {"json": json.dumps(sample, ensure_ascii=False).encode(), **clips[name]}
        blob = b"".join(tar_member(f"{name}.{suffix}", data) for suffix, data in members.items())
        rows.append([name, offset, len(blob), hashlib.sha256(blob).hexdigest()])
        blobs.append(blob)
        offset += len(blob)
    index = {"count": len(samples), **extra, "samples": rows}
    write_whole(path.with_suffix(".json"), json.dumps(index).encode())
    write_whole(path, *blobs, END)


DAMAGED = "remove the shard's two files and run synth.py again"


def read_index(path: Path) -> dict:
    """The index beside a shard. UserError where it or the shard is missing or cut short."""
    try:
        index = json.loads(path.with_suffix(".json").read_text())
        size = path.stat().st_size
        expected = sum(length for _, _, length, _ in index["samples"]) + len(END)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; {DAMAGED}.") from None
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        raise UserError(f"{path.with_suffix('.json')} is damaged; {DAMAGED}.") from None
    if size != expected:
        raise UserError(f"{path} has {size} bytes where its index says {expected}; {DAMAGED}.")
    return index


def read_head(path: Path) -> dict:
    """What a shard's index says before its samples, which may be thousands: {"count", "counts"}."""
    path = path.with_suffix(".json")
    head = b""
    try:
        with open(path, "rb") as file:
            while b', "samples": [' not in head:
                head += file.read(4096) or b"\0"
                if head.endswith(b"\0"):
                    raise ValueError
        return json.loads(head.partition(b', "samples": [')[0] + b"}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {DAMAGED}.") from None
    except ValueError:
        raise UserError(f"{path} is damaged; {DAMAGED}.") from None


class Shard:
    """An open shard, whose samples are sought, read and verified by its index."""

    def __init__(self, path: Path):
        rows = read_index(path)["samples"]
        self.path = path
        self.count = len(rows)
        self.places = np.array([row[1:3] for row in rows], np.int64).reshape(-1, 2)        # offset, length
        self.digests = b"".join(bytes.fromhex(row[3]) for row in rows)
        self.file = open(path, "rb")

    def read(self, number: int) -> tuple[dict, dict[str, bytes]]:
        """One sample: itself and its clips {"00.flac": bytes}. UserError says which one is damaged."""
        offset, length = self.places[number].tolist()
        self.file.seek(offset)
        blob = self.file.read(length)
        if hashlib.sha256(blob).digest() != self.digests[32 * number:32 * number + 32]:
            name = read_index(self.path)["samples"][number][0]
            raise UserError(f"Sample {name} in {self.path} is damaged (its SHA-256 differs); {DAMAGED}.")
        with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
            members = {member.name.partition(".")[2]: tar.extractfile(member).read() for member in tar}
        return json.loads(members.pop("json")), members


open_shard = functools.lru_cache(maxsize=256)(Shard)        # each lane reads on in one shard of a recipe


def read_sample(path: Path, number: int) -> tuple[dict, dict[str, bytes]]:
    return open_shard(path).read(number)


# --------------------------------------------------------------------------------------------------
# 5. The corpus
#
# One streaming pass cleans the documents, splits them by hash, cuts the long ones, and writes corpus
# shards of k documents each: data/corpus/train-000000.jsonl. The built-in corpus is the tiny world
# (section 9); another is a glob of the user's files.
# --------------------------------------------------------------------------------------------------

CORPUS_KEYS = ("corpus", "documents", "held_out_documents", "held_out_share", "shard_documents",
               "max_document", "facts")
OTHER_DATA = "choose another folder with data=…, or make it anew with python synth.py fresh=true"


def make_corpus(c: Settings) -> dict[str, int]:
    """Write the corpus shards that the settings name, once; return the number of shards of each split.

    Ranks that start together wait for the first at a lock file.
    """
    folder = Path(c.data) / "corpus"
    check_ours(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); "
                        "choose another folder with data=….") from None
    with lock:
        with contextlib.suppress(OSError):                  # without locks all write the same files
            fcntl.flock(lock, fcntl.LOCK_EX)
        shaping = {key: c.synth[key] for key in CORPUS_KEYS} | {"seed": c.seed}
        index = folder / "index.json"
        same_settings(path=folder / "settings.yaml", now=shaping, may_change=(), remedy=OTHER_DATA,
                      begun=index.is_file())
        if not index.is_file():
            for left in folder.glob(".ready*"):             # by a killed process
                shutil.rmtree(left, ignore_errors=True)
            write_whole(index, json.dumps(write_corpus(c, folder)).encode())
        made = json.loads(index.read_text())
        now, then = corpus_files(c), made.get("files", {})
        changed = [path for path in sorted(now.keys() | then.keys())
                   if path not in now or path not in then or has_changed(path, now[path], *then[path])]
        demand(not (now and then and changed), f"The files of synth.corpus have changed since {folder} was "
                                               f"made ({', '.join(changed[:3])}); {OTHER_DATA}.")
        return made["shards"]


def corpus_files(c: Settings) -> dict[str, list[int]]:
    """{path: [bytes, time of the last change]} of the corpus's files that are here: who has the shards can do
    without them."""
    found = {}
    for name in corpus_names(c):
        if name != "tiny" and not name.startswith("hf:"):
            for path in files_of(c, name):
                found[path] = [os.path.getsize(path), os.stat(path).st_mtime_ns]
    return found


def digest_of_ends(path: str) -> str:
    """SHA-256 of a file's first and last megabyte."""
    with open(path, "rb") as file:
        head = file.read(2 ** 20)
        file.seek(max(0, os.path.getsize(path) - 2 ** 20))
        return hashlib.sha256(head + file.read()).hexdigest()


def has_changed(path: str, now: list[int], then: list[int], digest: str) -> bool:
    """Whether a file is another one: a copy may have another time, then its ends decide."""
    return now != then and (now[0] != then[0] or digest_of_ends(path) != digest)


def write_corpus(c: Settings, folder: Path) -> dict:
    """Write every corpus shard; documents that are empty after cleaning are counted and left out."""
    files = {path: [state, digest_of_ends(path)] for path, state in corpus_files(c).items()}
    waiting = {"train": [], "dev": [], "test": []}
    written = Counter()
    empty = 0

    def flush(split: str) -> None:
        write_whole(folder / f"{split}-{written[split]:06d}.jsonl", *waiting[split])
        written[split] += 1
        waiting[split].clear()

    for split, document in split_documents(c):
        if split is None:
            empty += 1
            continue
        waiting[split].append(json.dumps(document, ensure_ascii=False).encode() + b"\n")
        if len(waiting[split]) == c.synth.shard_documents:
            flush(split)
    for split, lines in waiting.items():
        if lines:
            flush(split)
    if not written["train"]:
        raise UserError(f"synth.corpus={c.synth.corpus!r} holds no text; check the files.")
    return {"shards": dict(written), "empty_documents": empty, "files": files}


Split = Iterator[tuple[str | None, dict]]        # (train, dev or test; document); None for one that was empty


def split_documents(c: Settings) -> Split:
    """The documents, cleaned, cut and split; those of several corpora mixed evenly, from first to last."""
    corpora = corpus_names(c)
    if len(corpora) == 1:
        yield from split_corpus(c, corpora[0])
        return
    for _, split, document in heapq.merge(*(placed(c, name) for name in corpora), key=operator.itemgetter(0)):
        yield split, document


def corpus_names(c: Settings) -> list[str]:
    return [name.strip() for name in c.synth.corpus.split(",")]


def placed(c: Settings, name: str) -> Iterator[tuple[float, str | None, dict]]:
    """One corpus's documents with their places between its beginning, 0, and its end, 1."""
    count = sum(1 for _ in split_corpus(c, name))
    for number, (split, document) in enumerate(split_corpus(c, name)):
        yield (number + 0.5) / count, split, document


def split_corpus(c: Settings, name: str) -> Split:
    """The tiny world, whose documents know their splits, or the files of a glob or of a data set."""
    if name == "tiny":
        for split, count in (("train", c.synth.documents), ("dev", c.synth.held_out_documents)):
            for document in tiny_world(c.seed, split, count, c.synth.facts):
                for piece in cut_document(document, c.synth.max_document):
                    yield split, piece
        return
    paths = corpus_paths(c, name)
    if len(paths) > 1 and c.synth.workers > 1 and not c.plan:
        yield from split_files(c, paths)
    else:
        for path in paths:
            yield from split_file(c, path)


def split_files(c: Settings, paths: list[str]) -> Split:
    """The documents of many files, in order, each file made ready by one of synth.workers processes.

    They write what they make beside the corpus shards, at most two files each ahead of what is read here.
    """
    with (tempfile.TemporaryDirectory(prefix=".ready", dir=Path(c.data) / "corpus") as folder,
          process_pool(c.synth.workers, "spawn", end_with_parent) as pool):
        ready = [Path(folder) / str(number) for number in range(len(paths))]
        jobs = []
        for number, path in enumerate(ready):
            while len(jobs) < min(number + 2 * c.synth.workers, len(paths)):
                jobs.append(pool.submit(write_ready, c, paths[len(jobs)], ready[len(jobs)]))
            try:
                jobs[number].result()
            except concurrent.futures.process.BrokenProcessPool:
                raise UserError(f"A process that read {paths[number]} or a file near it was killed, perhaps "
                                "for want of memory; start again with fewer synth.workers.") from None
            with open(path, "rb") as file:
                yield from map(json.loads, file)
            path.unlink()


def write_ready(c: Settings, path: str, ready: Path) -> None:
    with open(ready, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in split_file(c, path))


def split_file(c: Settings, path: str) -> Split:
    """The documents of a user's file, divided by hash."""
    for document in read_documents(path):
        before = texts_of(document)
        if "messages" in document:
            turns = [turn | {"content": clean(turn["content"])} for turn in document["messages"]]
            document |= {"messages": turns}
        else:
            document |= {"text": clean(document["text"])}
        if not any(texts_of(document)):
            yield None, document
            continue
        if texts_of(document) != before:
            document.pop("spoken", None)                    # it counts characters of what has changed
        share = hash_share(telling(document))
        split = "train"
        if share < 2 * c.synth.held_out_share:
            split = "dev" if share < c.synth.held_out_share else "test"
        for piece in cut_document(document, c.synth.max_document):
            yield split, piece


def telling(document: dict) -> str:
    """The text whose hash says where a document belongs: of a recording its words, or else its name."""
    if "audio_filepath" not in document:
        return "\n".join(texts_of(document))
    words = document["text"] if document.get("task", "transcribe") == "transcribe" else ""
    return words or document.get("transcript") or os.path.basename(document["audio_filepath"])


def texts_of(document: dict) -> list[str]:
    if "messages" in document:
        return [turn["content"] for turn in document["messages"]]
    return [document["text"]]


def clean(text: str) -> str:
    """Keep the text, drop tags, character references and control characters.

    >>> clean("<p>5 &lt; 7,\\x00 a < b &amp; c</p>")
    '5 < 7, a < b & c'
    """
    text = text.replace("\r\n", "\n")
    text = re.sub(r"(?is)<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-z][^<>]*>", "", text)
    text = html.unescape(text).replace("\xa0", " ")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffd]", "", text)
    text = re.sub(r"[^\S\n]*\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def cut_document(document: dict, most: int) -> list[dict]:
    """Cut a document into pieces of at most `most` words: training leaves out what is longer than a pack."""
    if "spoken" in document or "audio_filepath" in document:
        return [document]                                   # what belongs together
    if "messages" in document:
        return [document | {"messages": piece} for piece in cut_dialogue(document["messages"], most)]
    return [document | {"text": piece} for piece in cut_text(document["text"], most)]


def cut_text(text: str, most: int) -> list[str]:
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
    pieces = [""]
    held = 0                                                # words of the last piece
    for start, end in itertools.pairwise([*cuts, len(text)]):
        words = count_words(text[start:end])
        if held + words > most:
            pieces.append("")
            held = 0
        pieces[-1] += text[start:end]
        held += words
    return pieces


def cut_dialogue(turns: list[dict], most: int) -> list[list[dict]]:
    """Cut a dialogue before user turns; a leading system turn is repeated in every piece.

    An exchange that is too long alone stays whole: an answer without its question would teach nothing.

    >>> said = {"system": "be kind", "user": "what is red", "assistant": "it is the apple"}
    >>> turns = [{"role": role, "content": said[role]} for role in ("system", *2 * ("user", "assistant"))]
    >>> [[turn["role"] for turn in piece] for piece in cut_dialogue(turns, 9)]
    [['system', 'user', 'assistant'], ['system', 'user', 'assistant']]
    """
    opening = [turn for turn in turns[:1] if turn["role"] == "system"]
    exchanges = []                                          # each begins with a user's turn
    for turn in turns[len(opening):]:
        if turn["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(turn)
    pieces = [opening]
    for exchange in exchanges:
        longer = pieces[-1] + exchange
        words = sum(count_words(turn["content"]) for turn in longer)
        if words <= most or pieces[-1] == opening:
            pieces[-1] = longer
        else:
            pieces.append(opening + exchange)
    return pieces


def corpus_paths(c: Settings, name: str) -> list[str]:
    """The files of a glob, or of a data set of the hub: hf:NAME, or hf:NAME:GLOB for some of its files."""
    paths = files_of(c, fetched(*name.split(":", 2)[1:]) if name.startswith("hf:") else name)
    demand(bool(paths), f"synth.corpus: {name!r} matches no file; give a glob such as 'books/*.txt', "
                        "or tiny.")
    return paths


def files_of(c: Settings, pattern: str) -> list[str]:
    """The files of a glob, without our own work: what stands in runs, and the shards and indexes in data."""
    made = "|".join(("corpus", *RECIPES))
    ours = re.compile(f"{re.escape(os.path.abspath('runs'))}/|{re.escape(os.path.abspath(c.data))}/({made})/"
                      r"((train|dev|test)-\d{6}\.|index\.json$|\.)")
    paths = glob.glob(os.path.expanduser(pattern), recursive=True)
    return sorted(path for path in paths
                  if os.path.isfile(path) and not ours.match(os.path.abspath(path)))


@functools.cache
def fetched(name: str, files: str = "") -> str:
    """Fetch a data set's files, none of its code, into the hub's cache: a glob of them. Of several kinds that
    say the same, parquet counts."""
    import huggingface_hub
    kinds = ["*.parquet", "*.jsonl", "*.jsonl.gz", "*.txt"]
    try:
        folder = huggingface_hub.snapshot_download(name, repo_type="dataset",
                                                   allow_patterns=[files] if files else kinds)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(f"synth.corpus=hf:{name} cannot be fetched ({said}); give files that are here by "
                        "their glob.") from None
    files = files or next((kind for kind in kinds if any(Path(folder).rglob(kind))), kinds[0])
    return f"{glob.escape(folder)}/" + (files if "/" in files else f"**/{files}")


def read_documents(path: str) -> Iterator[dict]:
    """Stream documents from a file: *.txt (blank lines between them), *.json[l][.gz] (lines) or *.parquet."""
    if path.endswith(".parquet"):
        for number, row in enumerate(parquet_rows(path, FIELDS), 1):
            yield document_of(row, path, f"row {number}")
        return
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            if path.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):     # NeMo's manifests are *.json
                yield from read_jsonl(file, path)
            else:
                yield from read_paragraphs(file)
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); convert or remove it.") from None


def read_paragraphs(file: Iterable[str]) -> Iterator[dict]:
    for filled, lines in itertools.groupby(file, lambda line: bool(line.strip())):
        if filled:
            yield {"text": "".join(lines)}


def read_jsonl(file: Iterable[str], path: str) -> Iterator[dict]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{path} line {number} is not JSON, of which each line is one document; mend or "
                            "remove the line.") from None
        yield document_of(row, path, f"line {number}")


def parquet_rows(path: str, wanted: Iterable[str] | None = None) -> Iterator[dict]:
    """Stream the rows of a parquet file without what is null; wanted: the columns that are read, if there."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow.") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if wanted is None or name in wanted]
            for batch in file.iter_batches(100, columns=columns):
                for row in batch.to_pylist():
                    yield {key: value for key, value in row.items() if value is not None}
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}); mend or remove it.") from None


# What a document may have, and what that is made of; what is not is somebody else's.
FIELDS = {"text": object, "messages": object, "conversations": object, "spoken": list, "endless": bool}
FIELDS |= dict.fromkeys(("lang", "audio_filepath", "task", "prompt", "transcript"), str)
FIELDS |= dict.fromkeys(("offset", "duration"), int | float)
SPEAKERS = {"human": "user", "gpt": "assistant"}


def document_of(row: object, path: str, where: str) -> dict:
    """The document of a line or row, without what it does not need. UserError if there is none.

    >>> document_of({"conversations": [{"from": "human", "value": "hi"}], "id": 7}, "a.jsonl", "line 1")
    {'messages': [{'role': 'user', 'content': 'hi'}]}
    """
    try:
        document = {key: row[key] for key, kind in FIELDS.items()
                    if row.get(key) is not None and isinstance(row[key], kind)}
        turns = document.pop("messages", None) or document.pop("conversations", None)
        if turns or "text" not in document:
            document.pop("text", None)
            document["messages"] = [turn_of(turn) for turn in turns]
        fit = all(isinstance(text, str) for text in texts_of(document))
        fit = fit and all(turn["role"] in ROLES for turn in document.get("messages", []))
        fit = fit and ("audio_filepath" not in document or "text" in document)
        if "spoken" in document:
            start, end = map(operator.index, document["spoken"])
            said = [turn["content"] for turn in document.get("messages", []) if turn["role"] == "user"]
            fit = fit and 0 <= start < end <= len(said[0] if "messages" in document else document["text"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        fit = False
    if not fit:
        raise UserError(f'{path} {where} has neither "text" nor "messages" of the form [{{"role", '
                        f'"content"}}], texts both, role one of {", ".join(ROLES)}, or "spoken" is no range '
                        'of its characters; give it one of them.')
    if "audio_filepath" in document:
        document["audio_filepath"] = os.path.join(os.path.dirname(path), document["audio_filepath"])
    return document


def turn_of(turn: dict) -> dict:
    """A turn {"role", "content"}, or {"from", "value"} as ShareGPT has it."""
    role = turn["role"] if "role" in turn else SPEAKERS.get(turn["from"], turn["from"])
    return {"role": role, "content": turn["content"] if "content" in turn else turn["value"]}


# --------------------------------------------------------------------------------------------------
# 6. Making shards
#
# Plan a shard's samples with sections 1 and 2, speak their segments, gate the clips, write. espeak's state
# survives from call to call, so every espeak shard is made by one fresh process: its bytes then depend on
# the settings and its number alone. Other engines are expensive to load and stay loaded.
# --------------------------------------------------------------------------------------------------

Key = tuple[str, str, int]        # of a shard: recipe, split, number
CLIPS_AT_ONCE = 32                # clips resampled, and batched by hf: engines, together


def plan_shard(c: Settings, recipe: str, split: str, number: int) -> list[dict]:
    """The samples of corpus shard `number`, without clips."""
    path = Path(c.data) / "corpus" / f"{split}-{number:06d}.jsonl"
    return plan_samples(c, recipe, split, number, path.read_bytes().splitlines())


def plan_samples(c: Settings, recipe: str, split: str, number: int, lines: list[bytes]) -> list[dict]:
    """The samples of a corpus shard's lines; their speech parts have a voice, a dict, and no clip yet.

    A document's generator is seeded by the number of samples before it; a sample's voices are drawn before
    the next sample.
    """
    settings = c.synth
    pool = read_voices(settings.voices) if settings.voices else None
    chosen_from = candidates(split, settings, pool)
    first = number * 4 * settings.shard_documents           # `tasks` makes four samples of a document
    speaking = functools.cache(lambda lang: of_language(lang, chosen_from, settings))
    samples = []
    for document in map(json.loads, lines):
        if "audio_filepath" in document and recipe != "tasks":
            continue                                        # a recording is no text to be spoken
        rng = Random(f"{c.seed} {recipe} {split} {number} {len(samples)}")
        lang = document.get("lang") or None
        draw = functools.partial(readable_voice, rng, *speaking(lang))
        for sample in RECIPES[recipe](document, settings, rng, draw):
            name = f"{recipe}-{split}-{first + len(samples):06d}"
            samples.append({"id": name, "recipe": recipe, "lang": lang or settings.lang} | sample)
            if document.get("endless") and recipe != "tasks":
                samples[-1]["endless"] = True
    return samples


def make_shard(c: Settings, key: Key) -> float:
    """Make the shard (recipe, split, number); returns the seconds that it took."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    samples = plan_shard(c, *key)
    speak(samples, c, key)
    counts = Counter()
    clips = {}
    for sample in samples:
        files = {}
        recorded = any("file" in part for parts in parts_of(sample) for part in parts)
        for parts in parts_of(sample):
            parts[:] = finish_parts(parts, files, counts)
        if files or not recorded:                           # without its recording a sample says nothing
            clips[sample["id"]] = files
    lost = counts["rejected: no such file"]
    if lost and lost == len(samples):
        raise UserError(f"None of the {lost} recordings of a shard is there; start where the manifest was, "
                        "for audio_filepath is relative to it.")
    samples = [sample for sample in samples if sample["id"] in clips]
    counts["samples"] = len(samples)
    write_shard(shard_path(c, *key), samples, clips, {"counts": dict(sorted(counts.items()))})
    return time.perf_counter() - started


def speak(samples: list[dict], c: Settings, key: Key) -> None:
    """Give every speech part its "waveform", (samples,) float32 at 16 kHz, and what makes that "unfit", or
    None; the engine gets CLIPS_AT_ONCE. Noise comes last, so that it hides nothing from the gate."""
    recipe, split, number = key
    lists = [parts for sample in samples for parts in parts_of(sample)]
    spoken = [part for parts in lists for part in parts if part["role"] == "speech"]
    for first in range(0, len(spoken), CLIPS_AT_ONCE):
        batch = spoken[first:first + CLIPS_AT_ONCE]
        seed = int(hash_share(f"{c.seed} {recipe} {split} {number} {first}") * 2 ** 31)
        ours = [part for part in batch if "file" not in part]
        if ours:
            texts = [part["text"] for part in ours]
            voices = [part["voice"] for part in ours]
            waveforms, rate = load_engine(c.synth.engine)(texts, voices, seed)
            for part, waveform in zip(ours, to_16k(waveforms, rate)):
                part["waveform"] = waveform
        for part in batch:
            recorded = "file" in part
            if recorded:
                part["waveform"], part["unfit"] = read_recorded(part["file"], c.synth.gate.max_seconds)
            part["unfit"] = part.get("unfit") or gate(part["waveform"], part["text"], c.synth.gate, recorded)
        if c.synth.noise.share and recipe in c.synth.noise.recipes:
            fit = [part for part in batch if not part["unfit"]]
            lay_noise(fit, c.synth.noise, np.random.default_rng(seed))


def finish_parts(parts: list[dict], files: dict[str, bytes], counts: Counter) -> list[dict]:
    """The parts as a shard keeps them, neighbouring texts joined; adds to the files and the counts."""
    done = []
    for part in parts:
        counts["words"] += count_words(part["text"])
        if part["role"] == "speech":
            part = finish_speech(part, files, counts)
        if done and part["role"] == done[-1]["role"] == "text" and part["loss"] == done[-1]["loss"]:
            part = text_part(done.pop()["text"] + part["text"], part["loss"])
        done.append(part)
    return done


def finish_speech(part: dict, files: dict[str, bytes], counts: Counter) -> dict:
    """Put a clip into the sample's files; one that fails the gate is counted, its part becomes text again (a
    recording's sample is left out)."""
    text = part["text"]
    voice = part["voice"]
    waveform = part["waveform"]
    if part["unfit"]:
        counts[f"rejected: {part['unfit']}"] += 1
        if "file" not in part:
            counts[f"rejected voice: {voice.get('timbre', voice['id'])}"] += 1
        return text_part(text, part["loss"])
    name = f"{len(files):02d}.flac"
    files[name] = flac_bytes(to_int16(waveform))
    counts["clips"] += 1
    counts["speech words"] += count_words(text)
    counts["audio samples"] += len(waveform)
    seconds = round(len(waveform) / RATE, 3)
    heard = {"role": "speech", "text": text, "audio": name, "seconds": seconds, "voice": voice["id"]}
    return heard | ({"noise": part["noise"]} if "noise" in part else {})


def wanted_shards(c: Settings) -> list[Key]:
    """All shards that the settings ask for, as (recipe, split, number); makes the corpus if need be.

    For dev one shard of each recipe is enough, and nothing is read from test.
    """
    corpus = make_corpus(c)
    wanted = []
    for recipe, most in c.synth.shards.items():
        if most:
            wanted += [(recipe, "train", number) for number in chosen_shards(range(corpus["train"]), most)]
            wanted += [(recipe, "dev", number) for number in range(min(corpus.get("dev", 0), 1))]
    return wanted


def chosen_shards(numbers: Iterable[int], most: int) -> list[int]:
    """At most so many of these shards, evenly from all over them; who asks for more gets these and others.

    >>> chosen_shards(range(10), 3), chosen_shards(range(10), 4)
    ([0, 2, 5], [0, 2, 5, 7])
    """
    golden = (5 ** 0.5 - 1) / 2
    return sorted(sorted(numbers, key=lambda number: number * golden % 1)[:most])


def finished_shards(folder: Path, split: str) -> list[int]:
    """The numbers of a split's shards that are there."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name[-10:-4]) for name in names if re.fullmatch(rf"{split}-\d{{6}}\.tar", name))


def make_shards(c: Settings) -> None:
    """Make the shards of this process's share that do not exist yet, then print the closing report."""
    if c.fresh:
        remove_data(c)
    wanted = wanted_shards(c)
    shaping = c.synth | {"seed": c.seed}
    del shaping["shards"], shaping["workers"]               # how many shards shapes none of them
    for recipe in dict.fromkeys(recipe for recipe, _, _ in wanted):
        folder = Path(c.data) / recipe
        check_ours(folder)
        same_settings(path=folder / "settings.yaml", now=shaping, may_change=(), remedy=OTHER_DATA,
                      begun=any(folder.glob("*.tar")))
    share, shares = share_of(c.shard)
    missing = [key for key in wanted[share::shares] if not shard_path(c, *key).is_file()]
    took = make_missing(c, missing) if missing else 0.0
    if share == 0:
        finished = [key for key in wanted if shard_path(c, *key).is_file()]
        report(c, finished, len(missing), took)


def remove_data(c: Settings) -> None:
    """Remove what was made in the data folder: folders that have our settings.yaml, and the tokenizer."""
    for name in [*c.synth.shards, "corpus"]:
        folder = Path(c.data) / name
        if (folder / "settings.yaml").is_file():
            shutil.rmtree(folder)
            if name == "corpus":
                shutil.rmtree(Path(c.data) / "tokenizer", ignore_errors=True)


def check_ours(folder: Path) -> None:
    """Refuse to work in a folder that holds a user's files: fresh=true would remove them."""
    foreign = folder.is_dir() and not (folder / "settings.yaml").is_file() and any(folder.glob("[!.]*"))
    demand(not foreign, f"{folder} holds files that synth.py did not make; choose another folder with "
                        "data=….")


def make_missing(c: Settings, keys: list[Key]) -> float:
    """Make these shards in synth.workers processes; returns the seconds that they took, added up."""
    workers = min(max(1, c.synth.workers // local_ranks()), len(keys))
    if c.synth.engine == "espeak":
        make = in_a_fresh_process
        pool = concurrent.futures.ThreadPoolExecutor(workers)
    else:
        make = make_shard
        pool = process_pool(workers, "spawn", start_worker, multiprocessing.get_context("spawn").Value("i"))
    jobs = [pool.submit(make, c, key) for key in keys]
    took = 0.0
    try:
        for job in tqdm(concurrent.futures.as_completed(jobs), total=len(keys), desc="shards", disable=None):
            took += job.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError("A process that made shards was killed, perhaps for want of memory; start again, if "
                        "need be with fewer synth.workers: finished shards are kept.") from None
    finally:
        pool.shutdown(cancel_futures=True)
    return took


def process_pool(workers: int, method: str, initializer: Callable,
                 *arguments: object) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that have our modules at hand. One that is killed ends all work, with BrokenProcessPool."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["numpy", "torch", "torchaudio", "soundfile", "yaml"])
    return concurrent.futures.ProcessPoolExecutor(workers, context, initializer, arguments)


def in_a_fresh_process(c: Settings, key: Key) -> float:
    """make_shard in a process of its own."""
    with process_pool(1, "forkserver", end_with_parent) as process:
        return process.submit(make_shard, c, key).result()


def start_worker(started: Any) -> None:
    """Begin a process that serves many shards; `started` counts them, so that they share the GPUs."""
    end_with_parent()
    with started.get_lock():
        number = int(os.environ.get("LOCAL_RANK", 0)) + started.value * local_ranks()
        started.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def local_ranks() -> int:
    """Processes that torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def end_with_parent() -> None:
    """Let this process end when the one that asked for it is gone, killed without a chance to say so."""
    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def report(c: Settings, keys: list[Key], made: int, took: float) -> None:
    """Print what stands in the data folder: samples, hours, share of speech, clips that failed the gate."""
    row = "{:<12} {:<6} {:>6} {:>8} {:>7} {:>8} {:>13}"
    print(row.format("recipe", "split", "shards", "samples", "hours", "clips", "speech words"))
    total = Counter()
    for recipe, split in dict.fromkeys(key[:2] for key in keys):
        shards = [read_index(shard_path(c, *key))["counts"] for key in keys if key[:2] == (recipe, split)]
        n = sum(map(Counter, shards), Counter())
        total += n
        hours = f"{n['audio samples'] / RATE / 3600:.2f}"
        share = f"{n['speech words'] / max(n['words'], 1):.1%}"
        print(row.format(recipe, split, len(shards), n["samples"], hours, n["clips"], share))
    reasons = most_frequent(total, "rejected: ")
    voices = most_frequent(total, "rejected voice: ")
    print(f"clips that failed the gate and became text again, or were left out: {reasons or 'none'}" +
          (f"; most often of {voices}" if voices else ""))
    if made:
        speed = total["audio samples"] / RATE / took
        print(f"{made} shards made in {took:.0f} process-seconds" +
              (f", {speed:.0f} times real time on a core" if made == len(keys) else ""))


class Trial(NamedTuple):
    """What was seen of a recipe in a small trial, for each document of the corpus."""
    samples: float
    hours: float
    gigabytes: float
    process_hours: float


def plan(c: Settings) -> None:
    """Print what the settings would make and what it would cost, from a small trial; nothing is written."""
    torch.set_num_threads(1)                                # as a process has that makes shards
    lines = []
    documents = 0
    for split, document in split_documents(c):
        if split == "train":
            documents += 1
            if documents <= 300:
                lines.append(json.dumps(document, ensure_ascii=False).encode())
    demand(bool(lines), f"synth.corpus={c.synth.corpus!r} holds no text; check the files.")
    row = "{:<12} {:>8} {:>12} {:>10} {:>10} {:>14}"
    print(row.format("recipe", "shards", "samples", "hours", "GB", "process-hours"))
    total = Trial(0, 0, 0, 0)
    all_shards = 0
    for recipe, most in c.synth.shards.items():
        shards = min(most, math.ceil(documents / c.synth.shard_documents))
        used = min(shards * c.synth.shard_documents, documents)
        made = Trial(*(figure * used for figure in trial(c, recipe, lines)))
        total = Trial(*map(sum, zip(total, made)))
        all_shards += shards
        print(row.format(recipe, shards, f"{made.samples:,.0f}", *(f"{figure:,.2f}" for figure in made[1:])))
    print(row.format("all", all_shards, f"{total.samples:,.0f}", *(f"{figure:,.2f}" for figure in total[1:])))
    print(f"of {documents:,} documents, measured on 50 clips of each recipe that speaks; nothing was written")
    if c.plan != "true" and total.hours:
        times = float(c.plan) / total.hours
        print(f"{int(c.plan):,} hours of speech of this kind: {documents * times:,.0f} documents, "
              f"{total.samples * times:,.0f} samples, {all_shards * times:,.0f} shards, "
              f"{total.gigabytes * times / 1000:,.1f} TB; {total.process_hours * times:,.0f} process-hours "
              f"by {c.synth.engine}, {int(c.plan) * 0.055:,.0f} GPU-hours by a TTS of real-time factor 0.055")


def trial(c: Settings, recipe: str, lines: list[bytes]) -> Trial:
    """Speak 50 of the clips that a recipe makes of these documents."""
    samples = plan_samples(c, recipe, "train", 0, lines)
    spoken = [part for sample in samples for parts in parts_of(sample) for part in parts
              if part["role"] == "speech"]
    bytes_of_text = len(json.dumps(samples, default=str)) + 1600 * len(samples) + 1000 * len(spoken)
    if not spoken:
        return Trial(len(samples) / len(lines), 0, bytes_of_text / len(lines) / 1e9, 0)
    chosen = Random(c.seed).sample(spoken, min(50, len(spoken)))
    letters, letters_chosen = (sum(len(part["text"]) for part in parts) for parts in (spoken, chosen))
    ratio = letters / letters_chosen if letters_chosen else len(spoken) / len(chosen)
    times = ratio / len(lines)                              # from what is chosen to what a document has
    load_engine(c.synth.engine)                             # loading it is not measured
    files: dict[str, bytes] = {}
    counts: Counter = Counter()
    started = time.perf_counter()
    speak([{"parts": chosen, "messages": None}], c, (recipe, "train", 0))
    finish_parts(chosen, files, counts)
    took = time.perf_counter() - started
    size = sum(map(len, files.values()))
    return Trial(
        samples=len(samples) / len(lines),
        hours=counts["audio samples"] / RATE / 3600 * times,
        gigabytes=(size * times + bytes_of_text / len(lines)) / 1e9,
        process_hours=took / 3600 * times)


def most_frequent(counts: Counter, kind: str) -> str:
    """The ten largest counts of a kind: "silent 12, clipped 3" for the kind "rejected: "."""
    own = Counter({key.removeprefix(kind): n for key, n in counts.items() if key.startswith(kind)})
    return ", ".join(f"{key} {n}" for key, n in own.most_common(10))


# --------------------------------------------------------------------------------------------------
# 7. Settings
#
# config.yaml is the schema: it says which keys exist, and the type of a key is that of its default (where
# that is null or empty, the first word of its comment: text or integer). A profile overrides the file, the
# command line overrides both. An indented block is a section, with fixed keys; a map in braces is a table,
# whose names are free and which is replaced whole.
# --------------------------------------------------------------------------------------------------

class Settings(dict):
    """A section of the settings: c.train.clip is c["train"]["clip"]."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, key: str) -> object:
        if key not in self:
            raise AttributeError(f"there is no setting {key}")
        return self[key]


class Table(dict):
    """A map that the YAML writes in braces, such as `mix: {interleaved: 0.4, text: 0.6}`."""


class Argument(str):
    """A value as given on the command line: text where the key wants text, YAML otherwise."""


def load_config(arguments: list[str]) -> Settings:
    """Read config.yaml (or config=FILE), lay the profile upon it, then arguments such as train.clip=0.5."""
    given = parse_arguments(arguments)
    home = Path(__file__).with_name("config.yaml")
    path = Path(given.pop("config", home))
    raw, profiles = read_settings(path)
    profile = given.get("profile", raw.get("profile"))
    if profile not in profiles:
        raise UserError(f"Unknown profile {profile!r}; {path.name} has {', '.join(profiles)}.")
    raw = overlay(raw, profiles[profile] or {})
    for key, value in given.items():
        put(raw, key, Argument(value))
    inherit_stage(raw)
    schema = read_schema(home)
    c = schema.settle(schema.defaults, raw, "", path.name)
    check_config(c)
    return c


def parse_arguments(arguments: list[str]) -> dict[str, str]:
    """["train.clip=0.5"] -> {"train.clip": "0.5"}."""
    given = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"The argument {argument!r} is not of the form key=value, for example "
                            "train.clip=0.5.")
        if key in given:
            raise UserError(f"The key {key} is given twice on the command line; keep one of the two.")
        given[key] = value
    return given


def put(raw: dict, key: str, value: Argument) -> None:
    """Put the value of a dotted key into its section."""
    *sections, last = key.split(".")
    section = raw
    for name in sections:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        near = closest(key, dotted(raw))
        raise UserError(f"Unknown key {key} (the command line); the nearest valid key is {near}.")
    section[last] = value


def inherit_stage(raw: dict) -> None:
    """A stage has the values of train.stage where it says nothing else, also on the command line."""
    match raw:
        case {"train": {"stage": dict(stage), "stages": stages}}:
            stages = parsed(stages, "train.stages")
            if isinstance(stages, dict):
                for name, own in stages.items():
                    own = parsed(own, f"train.stages.{name}")
                    stages[name] = overlay(stage, own) if isinstance(own, dict) else own
            raw["train"]["stages"] = stages


def parsed(value: object, key: str) -> object:
    """A value of the command line as YAML; others as they are."""
    return read_yaml(value, f"{key}={value}") if isinstance(value, Argument) else value


def overlay(base: dict, over: dict) -> dict:
    """Lay `over` upon `base`, section by section; a table is replaced whole.

    >>> overlay({"a": {"b": 1, "c": 2}, "t": Table(x=1)}, {"a": {"b": 3}, "t": {"y": 1}})
    {'a': {'b': 3, 'c': 2}, 't': {'y': 1}}
    """
    result = base | over
    for name in base.keys() & over.keys():
        if type(base[name]) is dict and isinstance(over[name], dict):
            result[name] = overlay(base[name], over[name])
    return result


def dotted(settings: dict, prefix: str = "") -> dict:
    """Flatten nested settings: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def closest(name: str, valid: Iterable[str]) -> str:
    return difflib.get_close_matches(str(name), valid, 1, 0.0)[0]


def read_settings(path: Path) -> tuple[dict, dict]:
    """A settings file as (sections, profiles)."""
    if not path.is_file():
        raise UserError(f"There is no settings file {path}; config=FILE names another.")
    raw = read_yaml(path.read_text("utf-8", errors="replace"), path.name)
    if not isinstance(raw, dict) or not isinstance(raw.get("profiles"), dict):
        raise UserError(f"{path.name} must have the section profiles beside its other keys.")
    return raw, raw.pop("profiles")


def read_schema(path: Path) -> Schema:
    """The project's own config.yaml, its comments included: `voices: null  # text: FILE.jsonl …`."""
    defaults, _ = read_settings(path)
    declared = re.findall(r"^ *(\w+): (?:null|\[\]) +# (text|integer)\b", path.read_text("utf-8"), re.M)
    types = {"text": str, "integer": int}
    return Schema(defaults, {name: types[word] for name, word in declared})


@dataclasses.dataclass
class Schema:
    """What all settings are measured by: the defaults, and the types of those that are null or empty."""
    defaults: dict
    types: dict[str, type]

    def settle(self, default: object, value: object, key: str, source: str) -> object:
        """A raw value as the type of its default, strictly: 1 is no bool, "3" no number.

        key: "train.clip", the empty text for the whole; source: the file's name, both for the UserError.
        """
        declared = self.types.get(key.rpartition(".")[2])
        if isinstance(value, Argument):
            source = "the command line"
            wants_text = isinstance(default, str) or (default is None and declared is str and value != "null")
            value = str(value) if wants_text else parsed(value, key)
        if isinstance(default, dict):
            return self.settle_map(default, value, key, source)
        if default is None:
            return None if value is None else checked_type(declared, value, key, source)
        if isinstance(default, list):
            kind = type(default[0]) if default else declared
            return [checked_type(kind, item, key, source) for item in checked_type(list, value, key, source)]
        return checked_type(type(default), value, key, source)

    def settle_map(self, default: dict, value: object, key: str, source: str) -> Settings:
        """A section, whose keys are its default's; a table, whose values are of one type; or the stages."""
        if not isinstance(value, dict):
            raise UserError(f"{key} in {source} is a section; write its keys below it.")
        prefix = f"{key}." if key else ""
        if key == "train.stages":
            default = dict.fromkeys(value, self.defaults["train"]["stage"])
        elif isinstance(default, Table):
            default = dict.fromkeys(value, next(iter(default.values())))
        else:
            check_keys(default, value, prefix, source)
        return Settings({str(name): self.settle(default[name], value[name], f"{prefix}{name}", source)
                         for name in default})


def check_keys(default: dict, value: dict, prefix: str, source: str) -> None:
    """A section has exactly the keys of its default."""
    for name in value.keys() - default.keys():
        where = "the command line" if isinstance(value[name], Argument) else source
        raise UserError(f"Unknown key {prefix}{name} ({where}); the nearest valid key is "
                        f"{prefix}{closest(name, default)}.")
    for name in default.keys() - value.keys():
        raise UserError(f"The key {prefix}{name} is missing in {source}; take its line from the config.yaml "
                        "that came with the project.")


def checked_type(kind: type, value: object, key: str, source: str) -> object:
    """The value, if it is of this type; a whole number also serves as a float."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{key} in {source} must be {kind.__name__}, not {value!r}.")
    return value


def demand(holds: bool, sentence: str) -> None:
    if not holds:
        raise UserError(sentence)


def check_config(c: Settings) -> None:
    """Refuse settings that contradict each other."""
    check_synth(c.synth)
    check_model(c.model)
    folders = [os.path.realpath(folder) for folder in (c.bench.noise, c.synth.noise.folder) if folder]
    demand(len(folders) == len(set(folders)),
           "bench.noise and synth.noise.folder are one folder: test with noises that training never hears.")
    for key in ("keep_states", "open_documents"):
        demand(c.train[key] >= 1, f"train.{key} must be at least 1, not {c.train[key]}.")
    for key in ("train", "bench"):
        demand(c[key].precision in ("auto", "float32", "bfloat16"),
               f"{key}.precision must be auto, float32 or bfloat16, not {c[key].precision!r}.")
    recipes = [*c.synth.shards]
    for name, stage in c.train.stages.items():
        demand(stage.ctc_classes >= 0, f"train.stages.{name}.ctc_classes must be at least 0.")
        demand(stage.optimizer in ("adamw", "muon"),
               f"train.stages.{name}.optimizer must be adamw or muon, not {stage.optimizer!r}.")
        demand(stage.optimizer == "adamw" or stage.steps == 0 or not c.train.shard,
               f"train.shard=true cannot divide Muon's slots; set train.stages.{name}.optimizer=adamw.")
        one_length = (stage.steps is None) != (stage.tokens is None)
        demand(one_length and stage.tokens != 0, f"train.stages.{name} needs either steps or tokens.")
        demand(sum(stage.mix.values()) > 0, f"train.stages.{name}.mix gives no recipe a share above 0.")
        recipes += stage.mix
    for name in recipes:
        near = closest(name, RECIPES)
        demand(name == near,
               f"Unknown recipe {name!r} in synth.shards or a stage's mix; the nearest one is {near}.")
    demand(len(c.writing.tokens) == 2,
           f"writing.tokens must be [of a question, of a reply], not {c.writing.tokens}.")
    demand(re.fullmatch(r"[^\W_][\w.-]*", c.run) is not None,
           f"run={c.run!r} must be a plain folder name that begins with a letter or digit.")
    share_of(c.shard)
    demand(c.plan is None or re.fullmatch(r"true|[1-9]\d*", c.plan) is not None,
           f"plan must be true, or a number of hours, not {c.plan!r}.")


def check_synth(settings: Settings) -> None:
    """The demands on the section synth."""
    demand(settings.level in ("word", "sentence"),
           f"synth.level must be word or sentence, not {settings.level!r}.")
    demand(0 <= settings.share <= 1, f"synth.share is a share from 0 to 1, not {settings.share}.")
    demand(1 <= settings.min_words <= settings.max_words,
           "synth.min_words must be at least 1 and at most synth.max_words.")
    for key in ("documents", "shard_documents", "max_document", "workers"):
        demand(settings[key] >= 1, f"synth.{key} must be at least 1, not {settings[key]}.")
    pairs = {"rate": settings.rate, "pitch": settings.pitch,
             "gate.chars_per_second": settings.gate.chars_per_second, "noise.snr": settings.noise.snr}
    for key, pair in pairs.items():
        demand(len(pair) == 2 and pair[0] <= pair[1], f"synth.{key} must be [lowest, highest], not {pair}.")
    demand(0 <= settings.noise.share <= 1,
           f"synth.noise.share is a share from 0 to 1, not {settings.noise.share}.")
    for name in settings.noise.recipes:
        demand(name in RECIPES, f"synth.noise.recipes has {name!r}; valid ones are {', '.join(RECIPES)}.")
    demand(len(settings.accents) > 0, "synth.accents is empty; name one at least, for example [en-us].")
    demand(settings.held_out.keys() == {"test", "dev"},
           f"synth.held_out needs the keys test and dev, not {', '.join(settings.held_out)}.")
    check_weights("tasks", settings.tasks, TASKS)
    check_weights("facts", settings.facts, FACT_FORMS)


def check_weights(key: str, weights: dict[str, float], known: Iterable[str]) -> None:
    fit = weights.keys() <= set(known) and sum(weights.values()) > 0 and min(weights.values()) >= 0
    demand(fit, f"synth.{key} must give a share above 0 to some of {', '.join(known)}, and to nothing else.")


def check_model(model: Settings) -> None:
    demand((model.encoder is None) == (model.llm is None),
           "model.encoder and model.llm belong together: give both, or neither for a model from scratch.")
    demand(model["from"] is None or model.encoder is None,
           "model.from and model.encoder exclude each other: keep one.")


def share_of(shard: str | None) -> tuple[int, int]:
    """(i, n) of the setting shard=i/n; without it this process's place under torchrun or in a SLURM job.

    >>> share_of("2/4"), share_of(None)
    ((2, 4), (0, 1))
    """
    if shard is None:
        shard = "{}/{}".format(*place_among_processes(os.environ))
    numbers = re.fullmatch(r"(\d+)/(\d+)", shard)
    share, shares = map(int, numbers.groups()) if numbers else (0, 0)
    demand(share < shares, f"shard must be i/n with i from 0 to n-1, not {shard!r}; of a SLURM array without "
                           "gaps it follows by itself.")
    return share, shares


def place_among_processes(environment: Mapping[str, str]) -> tuple[int, int]:
    """(i, n): the i-th of n processes that torchrun, a SLURM array or srun has started; alone, (0, 1).

    >>> place_among_processes({"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "3",
    ...                        "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_STEP": "2"})    # 2, 4 and 6
    (2, 3)
    """
    def number(name: str, default: int = 0) -> int:
        return int(environment.get(name, default))

    if "WORLD_SIZE" in environment:
        return number("RANK"), number("WORLD_SIZE")
    if "SLURM_ARRAY_TASK_COUNT" in environment:
        place = number("SLURM_ARRAY_TASK_ID") - number("SLURM_ARRAY_TASK_MIN")
        return place // number("SLURM_ARRAY_TASK_STEP", 1), number("SLURM_ARRAY_TASK_COUNT")
    return number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS", 1)


def same_settings(path: Path, now: dict, may_change: Iterable[str], remedy: str, begun: bool = True,
                  made: Path | None = None) -> None:
    """Keep `now` in `path`; if other settings stand there already, UserError names the keys that differ.

    may_change: keys and sections that may differ; begun: false while nothing has been made yet, so that a
    slip (a glob that matches nothing) can be put right; made: what was made, if not the folder of `path`.
    """
    if begun and path.is_file():
        before = dotted(without_idle(read_yaml(path.read_text("utf-8"), str(path))))
        after = dotted(without_idle(now))
        differ = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
        free = tuple(f"{key}." for key in may_change)
        differ = [key for key in differ if not f"{key}.".startswith(free)]
        if differ:
            raise UserError(f"{made or path.parent} was made with other settings ({', '.join(differ)}); "
                            f"{remedy}.")
    write_whole(path, yaml.dump(now, Dumper=StrictDumper, sort_keys=False, allow_unicode=True).encode())


def without_idle(settings: dict) -> dict:
    """Settings without the stages of no steps: a stage that is new in config.yaml changes no run."""
    match settings:
        case {"train": {"stages": dict(stages)}}:
            stages = {name: stage for name, stage in stages.items() if stage["steps"] != 0}
            return settings | {"train": settings["train"] | {"stages": stages}}
    return settings


class StrictLoader(yaml.SafeLoader):
    """YAML 1.2's core types, no key twice: PyYAML alone reads `1e-4` as text, `no` as False, `1:30` as 90."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"The key {key!r} stands twice in {node.start_mark.name} near line "
                                f"{node.start_mark.line + 1}; keep one of the two.")
        return super().construct_mapping(node, deep)

    def construct_table_or_section(self, node: yaml.MappingNode) -> dict:
        kind = Table if node.flow_style else dict
        return kind(self.construct_mapping(node, deep=True))


class StrictDumper(yaml.SafeDumper):
    """Writes what StrictLoader reads back: run: '1e4' in quotes, for a bare 1e4 is a number."""


StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern in (
        ("null", r"~|null"),
        ("bool", r"true|false"),
        ("int", r"[-+]?(0|[1-9][0-9]*)"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf")):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)
StrictLoader.add_constructor("tag:yaml.org,2002:map", StrictLoader.construct_table_or_section)
StrictDumper.yaml_implicit_resolvers = StrictLoader.yaml_implicit_resolvers
StrictDumper.add_multi_representer(dict, StrictDumper.represent_dict)


def read_yaml(text: str, name: str) -> object:
    """Parse YAML text of the file `name`. UserError on anything that is not YAML."""
    try:
        loader = StrictLoader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}.") from None


# --------------------------------------------------------------------------------------------------
# 8. The command line
#
# A mistake of the user's is one sentence on standard error and exit status 2, without a traceback;
# a mistake of ours shows its traceback.
# --------------------------------------------------------------------------------------------------

def run(main: Callable[[list[str]], None]) -> None:
    """Run a script's main; a UserError becomes one sentence on standard error and exit status 2.

    Under torchrun rank 0 says it: torchrun then ends the other ranks by SIGTERM, which gives them the same
    status. After 30 s without that signal an error is a rank's own, and it speaks itself.
    """
    rank_0 = os.environ.get("RANK", "0") == "0"
    if not rank_0:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    try:
        main(sys.argv[1:])
    except UserError as error:
        if not rank_0:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))      # training has its own handler
            for _ in range(300):            # one long sleep would miss a signal that another thread caught
                time.sleep(0.1)
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)


def main(arguments: list[str]) -> None:
    c = load_config(arguments)
    for key in ("preview", "ask"):
        demand(c[key] is None, f"{key} belongs to inserter.py: run python inserter.py {key}={c[key]}.")
    demand(not (c.fresh and share_of(c.shard)[1] > 1),
           "fresh=true removes the shards of all shares: give it once, in a process alone.")
    if c.plan:
        plan(c)
    else:
        make_shards(c)


# --------------------------------------------------------------------------------------------------
# 9. The tiny world
#
# A grammar of a few hundred words that writes short stories and instruction dialogues, so that the
# whole method runs offline in minutes. Stories carry facts that later sentences need. A dialogue asks
# one of sixteen kinds of instruction under none or one of fifteen constraints whose names and arguments are
# SpeechInstructBench's own (IFEval's), so a rule knows every verdict.
# --------------------------------------------------------------------------------------------------

def tiny_world(seed: int, split: str, documents: int, facts: dict[str, int]) -> Iterator[dict]:
    """Stream the documents: dialogues {"messages"} and stories {"text"} by turns, fixed by the arguments."""
    for n in range(documents):
        rng = Random(f"{seed} world {split} {n}")
        yield {"text": story(rng, facts)} if n % 2 else {"messages": dialogue(rng, split)}


def story(rng: Random, facts: dict[str, int]) -> str:
    """Write four sentences or a few more; facts: how often one is told in each of FACT_FORMS."""
    forms = [form for form, times in facts.items() for _ in range(times)]
    sentences = []
    while len(sentences) < 4:
        sentences += rng.choice(draw_scenes(rng, forms))
    return " ".join(sentences)


def draw_scenes(rng: Random, forms: list[str]) -> list[list[str]]:
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


def fact(rng: Random, forms: list[str], a: str, b: str) -> str:
    """Tell a fact in one of FACT_FORMS; in some of them a asks and b replies."""
    kind = rng.choice([*sorted(FACTS), *["sum"] * 6])                  # many sums, for there are a hundred
    x, (y,) = draw_arguments(kind, rng)
    stated = KINDS[kind]["fact"].format(x=x, y=y)
    again = KINDS[kind]["again"].format(x=x)
    form = FACT_FORMS[rng.choice(forms)]
    return form.format(stated=stated, kind=kind, again=again, y=y, Y=y.upper(), a=a, b=b)


def dialogue(rng: Random, split: str) -> list[dict]:
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


def draw_instruction(rng: Random, split: str, kinds: list[str]) -> dict:
    """Draw an instruction of one split: its prompt, reference answer and the checks that judge an answer."""
    while True:
        kind = rng.choice(kinds)
        constraint = rng.choice([name for name in CONSTRAINTS if allowed(kind, name)])
        x, words = draw_arguments(kind, rng)
        if split_of(kind, x, constraint) == split:
            value = rng.choice(CONSTRAINTS[constraint].values)
            return instruction(kind=kind, x=x, words=words, constraint=constraint, value=value, rng=rng)


def draw_arguments(kind: str, rng: Random) -> tuple[str, list[str]]:
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


def split_of(kind: str, x: str, constraint: str) -> str:
    """The split an instruction belongs to, by hash of the triple (kind, arguments, constraint).

    Where the answer is computed (counting, sums, word lists) whole arguments are held out instead, under
    every constraint. So no test prompt is ever a training prompt, yet every fact is stated in training.

    >>> split_of("colour", "chocolate", "capitals"), split_of("colour", "chocolate", "quotation")
    ('train', 'test')
    """
    if kind == "sum":
        x = " ".join(sorted(x.split()))                                # five and six is six and five
    key = f"{kind}|{x}" if kind in COMPUTED else f"{kind}|{x}|{constraint}"
    percent = hash_share(key) * 2 ** 32 % 100
    if percent < 15:
        return "test"
    return "dev" if percent < 20 else "train"


def allowed(kind: str, constraint: str) -> bool:
    """Whether a constraint makes sense for a kind: bullets want a list, "in less than four words" one."""
    shape = "word"
    if kind in LISTS:
        shape = "list"
    if kind == "tell":
        shape = "tell"
    return shape in CONSTRAINTS[constraint].shapes


def instruction(kind: str, x: str, words: list[str], constraint: str, value: str | None, rng: Random) -> dict:
    """Word an instruction, e.g. "what colour is the sun, in capital letters" -> "IT IS YELLOW."."""
    rule = CONSTRAINTS[constraint]
    ask = rng.choice(KINDS[kind]["ask"]).format(x=x)
    how = rng.choice(rule.ask).format(v=value)
    prompt = ask
    if how:
        prompt = f"{ask}, {how}" if rng.random() < 0.7 else f"{how}, {ask}"
    check, arguments = content_check(kind, x, words)
    ids = [check]
    kwargs = [arguments]
    if rule.id:
        ids = [rule.id, check]
        kwargs = [rule.kwargs(words, value), arguments]
    answer = rule.answer(plain_answer(kind, x, words), words, value)
    return {"kind": kind, "x": x, "constraint": constraint, "value": value, "how": how, "ask": ask,
            "prompt": prompt, "answer": answer, "instruction_id_list": ids, "kwargs": kwargs}


def plain_answer(kind: str, x: str, words: list[str]) -> str:
    """The answer without any constraint: a sentence for one word, an enumeration for several."""
    if kind == "tell":
        told = [KINDS[about]["fact"].format(x=x, y=FACTS[about][x]) for about in ("baby", "sound")]
        return " ".join(sentence.capitalize() for sentence in told)
    return f"Here: {', '.join(words)}." if kind in LISTS else f"It is {words[0]}."


def content_check(kind: str, x: str, words: list[str]) -> tuple[str, dict]:
    """The rule for the content, in the form of one more verifiable instruction: (id, arguments)."""
    if kind == "name":
        count, group = x.split()
        return "tiny:list", {"group": group, "count": NUMBERS.index(count)}
    if kind == "tell":
        return "tiny:facts", {"about": x}
    return "tiny:answer", {"kind": kind, "words": words}


def draw_adjustment(rng: Random, split: str, kinds: list[str]) -> dict:
    """Draw an instruction whose speaker corrects himself: "count from two to five, no wait, from two to six".

    The checks are those of the corrected instruction; `withdrawn` has those of the one taken back.
    """
    while True:
        new = draw_instruction(rng, split, kinds)
        kind = new["kind"]
        x, words = draw_arguments(kind, rng)
        differs = content_check(kind, x, words) != (new["instruction_id_list"][-1], new["kwargs"][-1])
        if differs and split_of(kind, x, new["constraint"]) in ("train", split):
            break
    old = instruction(kind=kind, x=x, words=words, constraint=new["constraint"], value=new["value"], rng=rng)
    prompt = f"{old['ask']}, {rng.choice(REPAIRS)}, {KINDS[kind]['again'].format(x=new['x'])}"
    if new["how"]:
        prompt += f", {new['how']}"
    withdrawn = {key: old[key] for key in ("instruction_id_list", "kwargs")}
    return new | {"prompt": prompt, "withdrawn": withdrawn}


def disfluent(prompt: str, rng: Random) -> str:
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


# --------------------------------------------------------------------------------------------------
# 10. The tiny world's words
#
# Data alone: word lists, facts, the kinds of instruction, the constraints.
# In each table of facts an answer belongs to one argument alone, so that the answer to a similar question
# is wrong.
# --------------------------------------------------------------------------------------------------

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
           "sixteen seventeen eighteen nineteen twenty").split()
NAMES = "tom anna ben mary sam lucy peter jane max emma".split()
NOUNS = ("apple river stone candle ladder button window basket feather hammer lemon mirror needle pencil "
         "rocket saddle ticket blanket bottle camera drum guitar kettle lantern magnet pillow ribbon spoon "
         "trumpet wagon").split()
PLACES = "garden kitchen market forest village harbour tower cellar attic meadow".split()
KEYWORDS = ("winter summer music holiday morning evening weather island mountain picnic party story dinner "
            "freedom").split()
FILLERS = "um uh er well".split()
REPAIRS = ["no wait", "sorry i mean", "no actually", "oh no i meant"]
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = "january february march april may june july august september october november december".split()


def table(text: str) -> dict[str, str]:
    """"sun yellow, bakes bread baker" -> {"sun": "yellow", "bakes bread": "baker"}."""
    return dict(pair.rsplit(" ", 1) for pair in text.split(", "))


def neighbours(names: list[str]) -> dict[str, str]:
    """{"after monday": "tuesday", …, "before monday": "sunday", …}; the last is followed by the first."""
    after = {f"after {name}": follower for name, follower in zip(names, [*names[1:], names[0]])}
    return after | {f"before {follower}": name.removeprefix("after ") for name, follower in after.items()}


OPPOSITES = table("hot cold, big small, tall short, happy sad, wet dry, fast slow, hard soft, full empty, "
                  "early late, rich poor, clean dirty, loud quiet, strong weak, light dark, sweet bitter, "
                  "wide narrow")
FACTS = {
    "colour": table("sun yellow, grass green, sky blue, snow white, coal black, blood red, chocolate brown, "
                    "elephant grey, carrot orange, flamingo pink, plum purple, moon silver, treasure golden"),
    "opposite": OPPOSITES | {second: first for first, second in OPPOSITES.items()},
    "day": neighbours(DAYS),
    "month": neighbours(MONTHS),
    "baby": table("dog puppy, cat kitten, cow calf, horse foal, sheep lamb, lion cub, duck duckling, "
                  "goat kid, frog tadpole, hen chick, pig piglet, owl owlet"),
    "sound": table("dog woof, cat meow, cow moo, sheep baa, duck quack, lion roar, bee buzz, snake hiss, "
                   "pig oink, bird tweet, horse neigh, owl hoot"),
    "home": table("bee hive, bird nest, spider web, dog kennel, horse stable, lion den, king palace, "
                  "bear cave, rabbit burrow, hen coop, monk abbey, fish pond, cow barn"),
    "worker": table("bakes bread baker, drives the bus driver, cuts hair barber, heals the sick doctor, "
                    "grows food farmer, sings songs singer, paints pictures painter, flies the plane pilot, "
                    "brings letters postman, sews clothes tailor, catches thieves policeman, "
                    "guards the sheep shepherd, digs for gold miner"),
    "food": table("rabbit lettuce, monkey bananas, panda bamboo, mouse cheese, horse hay, squirrel nuts, "
                  "bear honey, bird worms, spider flies, dog bones, cat mice, whale plankton"),
}
FACT_WORDS = " ".join(f"{x} {y}" for known in FACTS.values() for x, y in known.items()).split()
LEXICON = sorted({*NOUNS, *KEYWORDS, *NUMBERS, *FACT_WORDS})
GROUPS = {
    "animals": sorted(FACTS["baby"].keys() | FACTS["sound"].keys()),
    "colours": sorted(FACTS["colour"].values()),
    "days": DAYS,
    "months": MONTHS,
    "workers": sorted(FACTS["worker"].values()),
    "numbers": NUMBERS[1:],
    "names": NAMES,
    "places": PLACES,
}

# How each kind is asked, how its argument is given again in a correction, and its fact as a story tells it.
KINDS = {
    "colour": {"ask": ["what is the colour of the {x}", "what colour is the {x}",
                       "tell me the colour of the {x}"],
               "again": "the {x}", "fact": "the {x} is {y}."},
    "opposite": {"ask": ["what is the opposite of {x}", "tell me the opposite of {x}"],
                 "again": "of {x}", "fact": "the opposite of {x} is {y}."},
    "day": {"ask": ["which day comes {x}", "what day is right {x}"],
            "again": "{x}", "fact": "the day {x} is {y}."},
    "month": {"ask": ["which month comes {x}", "what month is right {x}"],
              "again": "{x}", "fact": "the month {x} is {y}."},
    "baby": {"ask": ["what is the baby of a {x} called", "what do you call the young of a {x}"],
             "again": "of a {x}", "fact": "the baby of a {x} is a {y}."},
    "sound": {"ask": ["what does the {x} say", "which sound does the {x} make"],
              "again": "the {x}", "fact": "the {x} says {y}."},
    "home": {"ask": ["where does the {x} live", "what is the home of the {x}"],
             "again": "the {x}", "fact": "the {x} lives in the {y}."},
    "worker": {"ask": ["who is it that {x}", "tell me who {x}"],
               "again": "who {x}", "fact": "the {y} {x}."},
    "food": {"ask": ["what does the {x} eat", "which food does the {x} like"],
             "again": "the {x}", "fact": "the {x} eats {y}."},
    "sum": {"ask": ["what is the sum of {x}", "how much is {x}", "add {x}"],
            "again": "{x}", "fact": "the sum of {x} is {y}."},
    "count": {"ask": ["count from {x}", "please count from {x}"], "again": "from {x}"},
    "repeat": {"ask": ["repeat the words {x}", "say after me {x}"], "again": "{x}"},
    "say": {"ask": ["say the word {x}", "please say {x}"], "again": "{x}"},
    "backwards": {"ask": ["say backwards {x}", "reverse the words {x}"], "again": "{x}"},
    "name": {"ask": ["name {x}", "give me {x}", "tell me {x}"], "again": "{x}"},
    "tell": {"ask": ["tell me two things about the {x}", "what do you know about the {x}"],
             "again": "the {x}"},
}
OPEN = ("name", "tell")                                              # many answers are right
CLOSED = [kind for kind in KINDS if kind not in OPEN]
COMPUTED = ("sum", "count", "repeat", "say", "backwards")            # whole arguments are held out
LISTS = ("count", "repeat", "say", "backwards", "name")              # answered by several words

# How a story tells a fact. The last two ask for it in words that no prompt has, and reply as an assistant
# does: "anna asks the home, the monk. tom cries IT IS ABBEY."
FACT_FORMS = {
    "stated": "{stated}",
    "louder": "{stated} yes, {Y}.",
    "asked": "{a} asks the {kind}, {again}. {b} says it is {y}.",
    "cried": "{a} asks the {kind}, {again}. {b} cries IT IS {Y}.",
}

COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}


class Constraint(NamedTuple):
    """A constraint on an answer: SpeechInstructBench's id for it, how it is asked, and how it is met.

    The answer is made from the plain sentence s, the answering words w and the drawn value v; the
    benchmark's arguments (kwargs) from w and v.
    """
    id: str | None
    ask: list[str]
    answer: Callable[[str, list[str], str | None], str]
    values: list = (None,)
    kwargs: Callable[[list[str], str | None], dict] = lambda w, v: {}
    shapes: tuple = ("word", "list", "tell")                         # of answers that it suits


def use_often(s: str, w: list[str], v: str) -> str:
    word, times = v.split()
    return f"{s} " + " ".join([word] * COUNTS[times]) + "."


CONSTRAINTS = {
    "none": Constraint(None, [""], lambda s, w, v: s),
    "capitals": Constraint(
        id="change_case:english_capital",
        ask=["in capital letters", "all in capitals"],
        answer=lambda s, w, v: s.upper()),
    "lowercase": Constraint(
        id="change_case:english_lowercase",
        ask=["in lower case", "all in small letters"],
        answer=lambda s, w, v: s.lower()),
    "end": Constraint(
        id="startend:end_checker",
        values=["thank you", "that is all", "have a nice day", "see you soon"],
        kwargs=lambda w, v: {"end_phrase": v},
        ask=["end with {v}", "finish with the words {v}"],
        answer=lambda s, w, v: f"{s} {v.capitalize()}."),
    "quotation": Constraint(
        id="startend:quotation",
        ask=["in quotation marks", "put your answer in quotes"],
        answer=lambda s, w, v: f'"{s}"'),
    "no_comma": Constraint(
        id="punctuation:no_comma",
        shapes=("list",),
        ask=["without commas", "do not use any commas"],
        answer=lambda s, w, v: s.replace(",", "")),
    "keyword": Constraint(
        id="keywords:existence",
        values=KEYWORDS,
        kwargs=lambda w, v: {"keywords": [v]},
        ask=["use the word {v}", "with the word {v} in it"],
        answer=lambda s, w, v: f"{s} I like the {v}."),
    "frequency": Constraint(
        id="keywords:frequency",
        values=[f"{word} {times}" for word in KEYWORDS for times in ("two", "three")],
        kwargs=lambda w, v: {"keyword": v.split()[0], "frequency": COUNTS[v.split()[1]],
                             "relation": "at least"},
        ask=["use the word {v} times", "with the word {v} times"],
        answer=use_often),
    "forbidden": Constraint(
        id="keywords:forbidden_words",
        values=["it", "is"],
        kwargs=lambda w, v: {"forbidden_words": [v]},
        shapes=("word",),
        ask=["do not use the word {v}", "without the word {v}"],
        answer=lambda s, w, v: f"Just {w[0]}."),
    "few_words": Constraint(
        id="length_constraints:number_words",
        values=["three", "four"],
        kwargs=lambda w, v: {"relation": "less than", "num_words": COUNTS[v]},
        shapes=("word",),
        ask=["in less than {v} words", "use less than {v} words"],
        answer=lambda s, w, v: f"Just {w[0]}."),
    "many_words": Constraint(
        id="length_constraints:number_words",
        values=["five", "six", "seven"],
        kwargs=lambda w, v: {"relation": "at least", "num_words": COUNTS[v]},
        shapes=("word",),
        ask=["in at least {v} words", "use at least {v} words"],
        answer=lambda s, w, v: f"The answer to your question is {w[0]}."),
    "sentences": Constraint(
        id="length_constraints:number_sentences",
        values=["two", "three"],
        kwargs=lambda w, v: {"relation": "at least", "num_sentences": COUNTS[v]},
        shapes=("word", "list"),
        ask=["in at least {v} sentences", "use at least {v} sentences"],
        answer=lambda s, w, v: f"{s} I am sure." + (" You can trust me." if v == "three" else "")),
    "two_responses": Constraint(
        id="combination:two_responses",
        ask=["give two responses", "answer in two ways"],
        answer=lambda s, w, v: f"{s}\n******\nAgain: {s[0].lower() + s[1:]}"),
    "bullets": Constraint(
        id="detectable_format:number_bullet_lists",
        kwargs=lambda w, v: {"num_bullets": len(w)},
        shapes=("list",),
        ask=["as a bullet list", "with bullet points"],
        answer=lambda s, w, v: "\n".join(f"* {word}" for word in w)),
    "title": Constraint(
        id="detectable_format:title",
        ask=["add a title", "with a title"],
        answer=lambda s, w, v: f"<<Answer>>\n{s}"),
    "postscript": Constraint(
        id="detectable_content:postscript",
        kwargs=lambda w, v: {"postscript_marker": "P.S."},
        ask=["add a postscript", "with a postscript"],
        answer=lambda s, w, v: f"{s}\nP.S. Thank you."),
}


if __name__ == "__main__":
    run(main)
