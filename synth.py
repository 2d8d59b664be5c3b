"""Interleaved data synthesis: text in, shards of text and synthesised speech out.

InSerter pre-trains a speech LLM on documents in which random segments were turned into speech:

    corpus        tom puts the ball in the old garden. the ball is in the garden.
                               |-------- choose --------|
    interleaved   tom puts the [ speech: 1.62 s of audio ]. the ball is in the garden.
                  |-- text --|                           |----------- text ---------|

The data's way through this file, once per corpus shard and recipe:

    corpus shard -> documents -> segments -> parts -> clips (TTS, 16 kHz, gate) -> FLAC -> tar shard

    python synth.py                           make the shards that are missing
    python synth.py shard=0/4                 make the first quarter of them (on four machines, say)
    python synth.py preview=8                 preview.html: hear and see samples
    python synth.py synth.corpus='books/*.txt' data=data/books      your own text

Everything a shard holds follows from the settings and the shard's number, so an interrupted synthesis
continues where it stopped and any number of workers makes the same bytes.
"""
from __future__ import annotations

import base64
import ctypes
import dataclasses
import difflib
import fcntl
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
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import time
import types
import typing
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import soundfile
import torch
import torchaudio
import yaml
from tqdm import tqdm

ROLES = ("system", "user", "assistant")
CORPUS_KEYS = ("corpus", "documents", "held_out_documents", "held_out_share", "shard_documents", "facts")
RATE = 16_000                     # samples per second of every clip, as Whisper's features want it


class UserError(Exception):
    """Wrong use or wrong input: one sentence that says what, where and what to do. Exit status 2, no traceback."""


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

    def __getattr__(self, key: str):
        if key not in self:
            raise AttributeError(f"there is no setting {key}")
        return self[key]


class Table(dict):
    """A map that the YAML writes in braces, such as `mix: {interleaved: 0.4, text: 0.6}`."""


class Argument(str):
    """A value as given on the command line: text where the key wants text, YAML otherwise."""


class StrictLoader(yaml.SafeLoader):
    """YAML 1.2's core types, repeated keys refused: PyYAML alone reads `1e-4` as text, `no` as False, `1:30` as 90."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"The key {key!r} stands twice in {node.start_mark.name} near line "
                                f"{node.start_mark.line + 1}; keep one of the two.")
        return super().construct_mapping(node, deep)

    def construct_table_or_section(self, node):
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


def read_yaml(text: str, name: str):
    """Parse YAML text of the file `name`. UserError on anything that is not YAML."""
    try:
        loader = StrictLoader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}.") from None


@dataclasses.dataclass
class Schema:
    """The project's own config.yaml as the measure of all others: its defaults, and the types of those that are null."""
    defaults: dict
    types: dict[str, type]

    def settle(self, default, value, key: str, source: str):
        """A raw value as the type of its default, strictly: 1 is no bool, "3" no number. UserError names the key.

        key: "train.clip", the empty text for the whole; source: the file's name.
        """
        declared = self.types.get(key.rpartition(".")[2])
        if isinstance(value, Argument):
            source = "the command line"
            wants_text = isinstance(default, str) or (default is None and declared is str and value != "null")
            value = str(value) if wants_text else read_yaml(value, f"{key}={value}")
        if isinstance(default, dict):
            return self.settle_map(default, value, key, source)
        if default is None:
            return None if value is None else checked_type(declared, value, key, source)
        if isinstance(default, list):
            kind = type(default[0]) if default else declared
            return [checked_type(kind, item, key, source) for item in checked_type(list, value, key, source)]
        return checked_type(type(default), value, key, source)

    def settle_map(self, default: dict, value, key: str, source: str) -> Settings:
        """A section, whose keys are those of its default; a table, whose values are of one type; or the stages."""
        if not isinstance(value, dict):
            raise UserError(f"{key} in {source} is a section; write its keys below it.")
        prefix = f"{key}." if key else ""
        if key == "train.stages":                 # a stage has the keys of train.stage, and its values where it says none
            stage = self.defaults["train"]["stage"]
            members = {name: (stage, overlay(stage, own) if isinstance(own, dict) else own) for name, own in value.items()}
        elif isinstance(default, Table):
            first = next(iter(default.values()))
            members = {name: (first, own) for name, own in value.items()}
        else:
            for name in value.keys() - default.keys():
                where = "the command line" if isinstance(value[name], Argument) else source
                near = difflib.get_close_matches(str(name), default, 1, 0.0)[0]
                raise UserError(f"Unknown key {prefix}{name} ({where}); the nearest valid key is {prefix}{near}.")
            for name in default.keys() - value.keys():
                raise UserError(f"The key {prefix}{name} is missing in {source}; take its line from the config.yaml "
                                "that came with the project.")
            members = {name: (default[name], value[name]) for name in default}
        return Settings({str(name): self.settle(theirs, own, f"{prefix}{name}", source)
                         for name, (theirs, own) in members.items()})


def checked_type(kind: type, value, key: str, source: str):
    """The value, if it is of this type; a whole number also serves as a float."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{key} in {source} must be {kind.__name__}, not {value!r}.")
    return value


def overlay(base: dict, over: dict) -> dict:
    """Lay `over` upon `base`, section by section; a table is replaced whole."""
    result = base | over
    for name in base.keys() & over.keys():
        if type(base[name]) is dict and isinstance(over[name], dict):
            result[name] = overlay(base[name], over[name])
    return result


def read_settings(path: Path) -> tuple[dict, dict]:
    """A settings file as (sections, profiles)."""
    if not path.is_file():
        raise UserError(f"There is no settings file {path}; config=FILE names another.")
    raw = read_yaml(path.read_text("utf-8", errors="replace"), path.name)
    if not isinstance(raw, dict) or not isinstance(raw.get("profiles"), dict):
        raise UserError(f"{path.name} must have the section profiles beside its other keys.")
    return raw, raw.pop("profiles")


def load_config(arguments: list[str]) -> Settings:
    """Read config.yaml (or config=FILE), then the profile, then `key=value` arguments such as train.clip=0.5."""
    given = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"The argument {argument!r} is not of the form key=value, for example train.clip=0.5.")
        if key in given:
            raise UserError(f"The key {key} is given twice on the command line; keep one of the two.")
        given[key] = value
    home = Path(__file__).with_name("config.yaml")
    path = Path(given.pop("config", home))
    raw, profiles = read_settings(path)
    profile = given.get("profile", raw.get("profile"))
    if profile not in profiles:
        raise UserError(f"Unknown profile {profile!r}; {path.name} has {', '.join(profiles)}.")
    raw = overlay(raw, profiles[profile] or {})
    for key, value in given.items():
        *sections, last = key.split(".")
        section = raw
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            near = difflib.get_close_matches(key, dotted(raw), 1, 0.0)[0]
            raise UserError(f"Unknown key {key} (the command line); the nearest valid key is {near}.")
        section[last] = Argument(value)
    declared = re.findall(r"^ *(\w+): (?:null|\[\]) +# (text|integer)\b", home.read_text("utf-8"), re.M)
    schema = Schema(read_settings(home)[0], {name: {"text": str, "integer": int}[word] for name, word in declared})
    config = schema.settle(schema.defaults, raw, "", path.name)
    check_config(config)
    return config


def dotted(settings: dict, prefix: str = "") -> dict:
    """Flatten nested settings: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_config(c: Settings) -> None:
    """Refuse settings that contradict each other."""
    def demand(holds: bool, sentence: str) -> None:
        if not holds:
            raise UserError(sentence)

    s = c.synth
    demand(s.level in ("word", "sentence"), f"synth.level must be word or sentence, not {s.level!r}.")
    demand(0 <= s.share <= 1, f"synth.share is a share from 0 to 1, not {s.share}.")
    demand(1 <= s.min_words <= s.max_words, "synth.min_words must be at least 1 and at most synth.max_words.")
    for key in ("documents", "shard_documents", "workers"):
        demand(getattr(s, key) >= 1, f"synth.{key} must be at least 1, not {getattr(s, key)}.")
    for key, pair in (("rate", s.rate), ("pitch", s.pitch), ("gate.chars_per_second", s.gate.chars_per_second)):
        demand(len(pair) == 2 and pair[0] <= pair[1], f"synth.{key} must be [lowest, highest], not {pair}.")
    demand(len(s.accents) > 0, "synth.accents is empty; name one at least, for example [en-us].")
    demand(s.held_out.keys() == {"test", "dev"}, f"synth.held_out needs the keys test and dev, not {', '.join(s.held_out)}.")
    for key, weights, known in (("tasks", s.tasks, TASKS), ("facts", s.facts, FACT_FORMS)):
        demand(weights.keys() <= known.keys() and sum(weights.values()) > 0 and min(weights.values()) >= 0,
               f"synth.{key} must give a share above 0 to some of {', '.join(known)}, and to nothing else.")
    demand(not (c.fresh and c.shard), "fresh=true removes the shards of all shares: give it once, without shard.")
    for name in [*s.shards, *(recipe for stage in c.train.stages.values() for recipe in stage.mix)]:
        near = difflib.get_close_matches(name, RECIPES, 1, 0.0)[0]
        demand(name in RECIPES, f"Unknown recipe {name!r} in synth.shards or a stage's mix; the nearest one is {near}.")
    for name, stage in c.train.stages.items():
        demand((stage.steps is None) != (stage.tokens is None), f"train.stages.{name} needs either steps or tokens.")
        demand(sum(stage.mix.values()) > 0, f"train.stages.{name}.mix gives no recipe a share above 0.")
    demand(c.train.optimizer in ("adamw", "muon"), f"train.optimizer must be adamw or muon, not {c.train.optimizer!r}.")
    demand((c.model.encoder is None) == (c.model.llm is None),
           "model.encoder and model.llm belong together: give both, or neither for a model from scratch.")
    demand(c.model["from"] is None or c.model.encoder is None, "model.from and model.encoder exclude each other: keep one.")
    demand(re.fullmatch(r"\d+/\d+", c.shard or "0/1") is not None and int((c.shard or "0/1").split("/")[0]) <
           int((c.shard or "0/1").split("/")[1]), f"shard must be i/n with i from 0 to n-1, not {c.shard!r}.")
    demand(re.fullmatch(r"[\w.-]+", c.run) is not None, f"run={c.run!r} must be a plain folder name.")


def same_settings(path: Path, now: dict, may_change: Iterable[str], remedy: str, begun: bool = True) -> None:
    """Keep `now` in `path`; if other settings stand there already, UserError names the keys that differ.

    begun: false while nothing has been made yet, so that a slip (a glob that matches nothing) can be put right.
    """
    if begun and path.is_file():
        before, now_flat = dotted(read_yaml(path.read_text("utf-8"), str(path))), dotted(now)
        differ = [k for k in sorted(before.keys() | now_flat.keys()) if before.get(k) != now_flat.get(k)
                  and not any(k == m or k.startswith(m + ".") for m in may_change)]
        if differ:
            raise UserError(f"{path.parent} was made with other settings ({', '.join(differ)}); {remedy}.")
    write_whole(path, yaml.dump(now, Dumper=StrictDumper, sort_keys=False, allow_unicode=True).encode())


def write_whole(path: Path, *contents: bytes) -> None:
    """Write a file under a temporary name, flush it, rename it: it is whole or absent. UserError on a full disk."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.writelines(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error.strerror}); make room or choose another folder, then "
                        "start again: what is finished is kept.") from None


# --------------------------------------------------------------------------------------------------
# 2. The tiny world
#
# A grammar of a few hundred words that writes short stories and instruction dialogues, so that the
# whole method runs offline in minutes. Stories carry facts that later sentences need. A dialogue asks
# one of sixteen kinds of instruction under one of fifteen constraints whose names and arguments are
# SpeechInstructBench's own (IFEval's), so a rule knows every verdict. Its word lists end this file.
# --------------------------------------------------------------------------------------------------

def split_of(kind: str, x: str, constraint: str) -> str:
    """The split an instruction belongs to, by hash of the triple (kind, arguments, constraint).

    Where the answer is computed (counting, sums, word lists) whole arguments are held out instead, under
    every constraint. So no test prompt is ever a training prompt, yet every fact is stated in training.
    >>> split_of("colour", "chocolate", "capitals"), split_of("colour", "chocolate", "quotation")
    ('train', 'test')
    """
    x = " ".join(sorted(x.split())) if kind == "sum" else x           # five and six is six and five
    key = f"{kind}|{x}" if kind in COMPUTED else f"{kind}|{x}|{constraint}"
    bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100
    return "test" if bucket < 15 else "dev" if bucket < 20 else "train"


def draw_arguments(kind: str, rng: random.Random) -> tuple[str, list[str]]:
    """Draw an instruction's arguments as they are worded, and the words that answer it, in order.

    ('two to five', ['two', 'three', 'four', 'five']) for "count"; ('sun', ['yellow']) for "colour".
    """
    if kind in FACTS:
        x = rng.choice(sorted(FACTS[kind]))
        return x, [FACTS[kind][x]]
    if kind == "sum":
        a, b = rng.randint(1, 10), rng.randint(1, 10)
        return f"{NUMBERS[a]} and {NUMBERS[b]}", [NUMBERS[a + b]]
    if kind == "count":
        a, more = rng.randint(1, 14), rng.randint(2, 5)
        return f"{NUMBERS[a]} to {NUMBERS[a + more]}", NUMBERS[a:a + more + 1]
    if kind == "say":
        word, times = rng.choice(NOUNS), rng.randint(2, 5)
        return f"{word} {NUMBERS[times]} times", [word] * times
    if kind == "name":
        group, count = rng.choice(sorted(GROUPS)), rng.randint(2, 4)
        return f"{NUMBERS[count]} {group}", rng.sample(GROUPS[group], count)
    if kind == "tell":
        x = rng.choice(sorted(set(FACTS["baby"]) & set(FACTS["sound"])))
        return x, [FACTS["baby"][x], FACTS["sound"][x]]
    words = rng.sample(NOUNS, 3)                                       # "repeat" and "backwards"
    return " ".join(words), words if kind == "repeat" else words[::-1]


def plain_answer(kind: str, x: str, words: list[str]) -> str:
    """The answer without any constraint: a sentence for one word, an enumeration for several."""
    if kind == "tell":
        return " ".join(KINDS[k]["fact"].format(x=x, y=FACTS[k][x]).capitalize() for k in ("baby", "sound"))
    return f"It is {words[0]}." if kind in FACTS or kind == "sum" else f"Here: {', '.join(words)}."


def content_check(kind: str, x: str, words: list[str]) -> tuple[str, dict]:
    """The rule for the content, in the form of one more verifiable instruction: (id, arguments)."""
    if kind == "name":
        return "tiny:list", {"group": x.split()[1], "count": NUMBERS.index(x.split()[0])}
    return ("tiny:facts", {"about": x}) if kind == "tell" else ("tiny:answer", {"kind": kind, "words": words})


def allowed(kind: str, constraint: str) -> bool:
    """Whether a constraint makes sense for a kind: bullets want a list, "in one word" wants one word."""
    shape = "list" if kind in LISTS else "tell" if kind == "tell" else "word"
    return shape in CONSTRAINTS[constraint]["shapes"]


def draw_instruction(rng: random.Random, split: str, kinds: list[str]) -> dict:
    """Draw an instruction of one split: its prompt, reference answer and the checks that judge an answer."""
    while True:
        kind = rng.choice(kinds)
        constraint = rng.choice([c for c in CONSTRAINTS if allowed(kind, c)])
        x, words = draw_arguments(kind, rng)
        if split_of(kind, x, constraint) == split:
            return instruction(kind, x, words, constraint, rng.choice(CONSTRAINTS[constraint]["values"]), rng)


def instruction(kind: str, x: str, words: list[str], constraint: str, value, rng: random.Random) -> dict:
    """Word an instruction, e.g. "what colour is the sun, in capital letters" -> "IT IS YELLOW."."""
    rule, (check, arguments) = CONSTRAINTS[constraint], content_check(kind, x, words)
    ask, how = rng.choice(KINDS[kind]["ask"]).format(x=x), rng.choice(rule["ask"]).format(v=value)
    prompt = ask if not how else f"{ask}, {how}" if rng.random() < 0.7 else f"{how}, {ask}"
    ids, kwargs = [check], [arguments]
    if rule["id"]:
        ids, kwargs = [rule["id"], check], [rule["kwargs"](words, value), arguments]
    return {"kind": kind, "x": x, "constraint": constraint, "value": value, "how": how, "ask": ask, "prompt": prompt,
            "answer": rule["answer"](plain_answer(kind, x, words), words, value),
            "instruction_id_list": ids, "kwargs": kwargs}


def draw_adjustment(rng: random.Random, split: str, kinds: list[str]) -> dict:
    """Draw an instruction whose speaker corrects himself: "count from two to five, no wait, from two to seven".

    The checks are those of the corrected instruction; `withdrawn` has those of the one taken back.
    """
    while True:
        new = draw_instruction(rng, split, kinds)
        kind, constraint, (x, words) = new["kind"], new["constraint"], draw_arguments(new["kind"], rng)
        differs = content_check(kind, x, words) != (new["instruction_id_list"][-1], new["kwargs"][-1])
        if differs and split_of(kind, x, constraint) in ("train", split):
            break
    old = instruction(kind, x, words, constraint, new["value"], rng)
    prompt = f"{old['ask']}, {rng.choice(REPAIRS)}, {KINDS[kind]['again'].format(x=new['x'])}"
    return new | {"prompt": f"{prompt}, {new['how']}" if new["how"] else prompt,
                  "withdrawn": {key: old[key] for key in ("instruction_id_list", "kwargs")}}


def disfluent(prompt: str, rng: random.Random) -> str:
    """Speak a prompt as people do, with a filler, a repetition and a restart at random places.

    "what colour is the sun" -> "um what colour is what colour is uh the sun"
    """
    words = prompt.split()
    at = rng.randrange(len(words))
    words[at:at] = [rng.choice(FILLERS)]
    at, size = rng.randrange(len(words) - 1), rng.randint(1, 2)
    words[at:at] = [w.strip(",") for w in words[at:at + size]]        # said twice
    return " ".join(words if rng.random() < 0.5 else [rng.choice(FILLERS)] + words)


def story(rng: random.Random, facts: dict[str, int]) -> str:
    """Write four sentences or a few more; most need an earlier one (where the ball is now, how many, what was said).

    What people say is any words of the world: a word that is rare in facts and questions is heard often enough here.
    """
    sentences, forms = [], [form for form, weight in facts.items() for _ in range(weight)]
    while len(sentences) < 4:
        a, b = rng.sample(NAMES, 2)
        x, words, (here, there) = rng.choice(NOUNS + KEYWORDS), rng.sample(LEXICON, rng.randint(3, 6)), rng.sample(PLACES, 2)
        n, m, times, line = rng.randint(1, 10), rng.randint(1, 10), rng.randint(2, 5), " ".join(words)
        span, counted = draw_arguments("count", rng)
        sentences += rng.choice([
            [f"{a} puts the {x} in the {here}.", f"{b} takes the {x} to the {there}.", f"now the {x} is in the {there}."],
            [f"{a} has {NUMBERS[n]} apples and gets {NUMBERS[m]} more.", f"{NUMBERS[n]} and {NUMBERS[m]} make {NUMBERS[n + m]}.",
             f"now {a} has {NUMBERS[n + m]} apples."],
            [f"{a} says {line}.", f"{b} says {line} too."],
            [f"{a} says {line}.", f"backwards it is {' '.join(words[::-1])}."],
            [f"{a} says {line}.", f"{b} cries {line.upper()}."],
            [f"{b} cries {line.upper()}.", f"{a} says {line}."],
            [f"{a} says {x} {NUMBERS[times]} times.", f"we hear {' '.join([x] * times)}."],
            [f"{a} counts from {span}.", f"we hear {', '.join(counted)}."],
            [f"{a} counts from {span}.", f"{b} cries {' '.join(counted).upper()}."],
            *[[fact(rng, forms, a, b) for _ in range(count)] for count in (2, 2, 3)]])
    return " ".join(sentences)


def fact(rng: random.Random, forms: list[str], a: str, b: str) -> str:
    """Tell a fact in one of FACT_FORMS: a asks and b replies where the form does so; some forms have the answer in capitals."""
    kind = rng.choice([*sorted(FACTS), *["sum"] * 6])                  # many sums, for there are a hundred
    x, (y,) = draw_arguments(kind, rng)
    stated, again = (KINDS[kind][key].format(x=x, y=y) for key in ("fact", "again"))
    return FACT_FORMS[rng.choice(forms)].format(stated=stated, kind=kind, again=again, y=y, Y=y.upper(), a=a, b=b)


def dialogue(rng: random.Random, split: str) -> list[dict]:
    """One to three questions with their answers; a tenth of them corrected by the speaker, a tenth disfluent."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        style = rng.random()
        task = draw_adjustment(rng, split, CLOSED) if style < 0.1 else draw_instruction(rng, split, list(KINDS))
        prompt = disfluent(task["prompt"], rng) if style > 0.9 else task["prompt"]
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": task["answer"]}]
    return turns


def tiny_world(seed: int, split: str, documents: int, facts: dict[str, int]) -> Iterator[dict]:
    """Stream the world's documents: half stories {"text"}, half dialogues {"messages"}; a function of its arguments."""
    for n in range(documents):
        rng = random.Random(f"{seed} world {split} {n}")
        yield {"text": story(rng, facts)} if n % 2 else {"messages": dialogue(rng, split)}


# --------------------------------------------------------------------------------------------------
# 3. The corpus
#
# One streaming pass cleans the documents, splits them by hash, and writes corpus shards of k documents
# each: data/corpus/train-000000.jsonl. Shard n of every recipe is made from corpus shard n alone.
# --------------------------------------------------------------------------------------------------

def clean(text: str) -> str:
    """Keep the text, drop tags, character references and control characters.

    >>> clean("<p>5 &lt; 7,\\x00 a < b &amp; c</p>")
    '5 < 7, a < b & c'
    """
    text = re.sub(r"(?is)<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-z][^<>]*>", "", text.replace("\r\n", "\n"))
    text = html.unescape(text).replace("\xa0", " ")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffd]", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[^\S\n]*\n", "\n", text)).strip()


def user_corpus(pattern: str) -> Iterator[dict]:
    """Stream documents {"text"} or {"messages"} from *.txt (blank lines between documents) and *.jsonl[.gz] files."""
    paths = sorted(filter(os.path.isfile, glob.glob(os.path.expanduser(pattern), recursive=True)))
    if not paths:
        raise UserError(f"synth.corpus={pattern!r} matches no file; give a glob such as 'books/*.txt', or tiny.")
    for path in paths:
        opener = gzip.open if path.endswith(".gz") else open
        try:
            with opener(path, "rt", encoding="utf-8-sig") as file:
                yield from read_jsonl(file, path) if path.endswith((".jsonl", ".jsonl.gz")) else read_paragraphs(file)
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
            document = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{path} line {number} is not JSON; mend or remove the line.") from None
        try:
            fit = all(isinstance(text, str) for text in texts_of(document))
            fit = fit and all(m["role"] in ROLES for m in document.get("messages", []))
        except (KeyError, TypeError):
            fit = False
        if not fit:
            raise UserError(f'{path} line {number} has neither "text" nor "messages" of the form [{{"role", "content"}}], '
                            f"texts both, role one of {', '.join(ROLES)}; give it one of them.")
        yield document


def make_corpus(c: Settings) -> dict[str, int]:
    """Write the corpus shards that the settings name, once; return the number of shards of each split.

    Ranks that start together wait for the first at a lock file. Documents that are empty after cleaning are
    counted and left out.
    """
    folder = Path(c.data) / "corpus"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another folder with data=….") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings = {k: v for k, v in c.synth.items() if k in CORPUS_KEYS} | {"seed": c.seed}
        done = folder / "index.json"
        same_settings(folder / "settings.yaml", settings, (), OTHER_DATA, done.is_file())
        if not done.is_file():
            write_whole(done, json.dumps(write_corpus(c, folder)).encode())
        return json.loads(done.read_text())["shards"]


def write_corpus(c: Settings, folder: Path) -> dict:
    waiting, written, empty = {"train": [], "dev": [], "test": []}, Counter(), 0

    def flush(split: str) -> None:
        write_whole(folder / f"{split}-{written[split]:06d}.jsonl", *waiting[split])
        written[split] += 1
        waiting[split].clear()

    for split, document in split_documents(c):
        if not any(text.strip() for text in texts_of(document)):
            empty += 1
            continue
        waiting[split].append(json.dumps(document, ensure_ascii=False).encode() + b"\n")
        if len(waiting[split]) == c.synth.shard_documents:
            flush(split)
    for split in [s for s in waiting if waiting[s]]:
        flush(split)
    if not written["train"]:
        raise UserError(f"synth.corpus={c.synth.corpus!r} holds no text; check the files.")
    return {"shards": dict(written), "empty_documents": empty}


def texts_of(document: dict) -> list[str]:
    return [m["content"] for m in document["messages"]] if "messages" in document else [document["text"]]


def split_documents(c: Settings) -> Iterator[tuple[str, dict]]:
    """Pair each cleaned document with its split. The tiny world knows its own; other text is split by hash."""
    if c.synth.corpus == "tiny":
        for split, count in (("train", c.synth.documents), ("dev", c.synth.held_out_documents)):
            yield from ((split, document) for document in tiny_world(c.seed, split, count, c.synth.facts))
        return
    for document in user_corpus(c.synth.corpus):
        if "messages" in document:
            document = {"messages": [{"role": m["role"], "content": clean(m["content"])} for m in document["messages"]]}
        else:
            document = {"text": clean(document["text"])}
        place = int(hashlib.sha256("\n".join(texts_of(document)).encode()).hexdigest()[:8], 16) / 2 ** 32
        yield ("dev" if place < c.synth.held_out_share else "test" if place < 2 * c.synth.held_out_share else "train"), document


# --------------------------------------------------------------------------------------------------
# 4. Segments: what becomes speech
#
# The heart of the method (paper, section 3.1). Word-level: spans of at least five consecutive words, not
# overlapping, until about 30 % of the words are speech. Sentence-level: whole sentences, about 40 %.
# The share is met in expectation for every document, also for short ones, because lengths are drawn
# first and the text between them is spread afterwards; drawing until it fits would favour short spans.
# --------------------------------------------------------------------------------------------------

# One Chinese character is one word.
WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+(?:['’.-][^\W_\u3400-\u9fff]+)*")
SENTENCE_END = re.compile(r"(?:[.!?]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*|\n+)")


def choose_spans(n: int, share: float, least: int, most: int, rng: random.Random) -> list[tuple[int, int]]:
    """Choose word spans (first, end) of a document of n words; on average share * n words are chosen.

    1. Draw lengths from least..most while they fit into the budget share * n; the one that goes beyond it is
       kept with the probability that makes the expectation exact. Room for one word between spans is kept.
    2. Where no further span fits, what is left of the budget lengthens a span (rounded at random).
    3. Spread the words that stay text at random over the gaps.

    >>> choose_spans(20, 0.5, 5, 9, random.Random(2))       # 10 of 20 words on average: here two spans of five
    [(1, 6), (11, 16)]
    """
    budget, lengths = share * n, []
    while (left := budget - sum(lengths)) > 0:
        room = n - sum(lengths) - len(lengths)
        if room < least:
            more = min(int(left + rng.random()), n - sum(lengths) - max(len(lengths) - 1, 0))
            if lengths and more > 0:
                lengths[rng.randrange(len(lengths))] += more
            break
        length = rng.randint(least, min(most, room))
        if length > left and rng.random() >= left / length:
            break
        lengths.append(length)
    free = n - sum(lengths) - max(len(lengths) - 1, 0)
    cuts = sorted(rng.randint(0, free) for _ in lengths)
    starts = [cut + sum(lengths[:i]) + i for i, cut in enumerate(cuts)]
    return [(start, start + length) for start, length in zip(starts, lengths)]


def choose_sentences(words: list[int], share: float, rng: random.Random) -> list[int]:
    """Choose whole sentences, given their numbers of words; on average share of all words is chosen.

    >>> choose_sentences([6, 4, 9, 5], 0.4, random.Random(0))     # 4 + 5 of 24 words
    [1, 3]
    """
    budget, chosen = share * sum(words), []
    for i in rng.sample(range(len(words)), len(words)):
        left = budget - sum(words[j] for j in chosen)
        if words[i] > left:
            chosen += [i] if rng.random() < left / words[i] else []
            break
        chosen.append(i)
    return sorted(i for i in chosen if words[i])


def sentences(text: str) -> list[tuple[int, int]]:
    """Character ranges of the sentences, outer white space left out.

    >>> [("One. Two!"[a:b]) for a, b in sentences("One. Two!")]
    ['One.', 'Two!']
    """
    ends = [m.end() for m in SENTENCE_END.finditer(text)] + [len(text)]
    pieces = [(a, b, text[a:b]) for a, b in zip([0, *ends], ends)]
    return [(a + len(t) - len(t.lstrip()), b - len(t) + len(t.rstrip())) for a, b, t in pieces if t.strip()]


def segments(text: str, s: Settings, rng: random.Random) -> list[tuple[int, int]]:
    """Character ranges of the text that shall be spoken, in order: the method's choice at word or sentence level."""
    if s.level == "sentence":
        ranges = sentences(text)
        chosen = choose_sentences([len(WORD.findall(text[a:b])) for a, b in ranges], s.share, rng)
        return [ranges[i] for i in chosen]
    words = [m.span() for m in WORD.finditer(text)]
    return [(words[a][0], words[b - 1][1]) for a, b in choose_spans(len(words), s.share, s.min_words, s.max_words, rng)]


def splice(text: str, ranges: list[tuple[int, int]], loss: bool) -> list[dict]:
    """Cut a text into parts; joining their texts gives it back, character for character.

    >>> [(p["role"], p["text"]) for p in splice("tom puts the ball in.", [(9, 17)], True)]
    [('text', 'tom puts '), ('speech', 'the ball'), ('text', ' in.')]
    """
    parts, at = [], 0
    for a, b in ranges:
        parts += [text_part(text[at:a], loss)] * (a > at) + [{"role": "speech", "text": text[a:b]}]
        at = b
    return parts + [text_part(text[at:], loss)] * (at < len(text))


def text_part(text: str, loss: bool) -> dict:
    return {"role": "text", "text": text, "loss": loss}


# --------------------------------------------------------------------------------------------------
# 5. Voices
#
# Library and data come in one wheel. A voice is an accent (a language file), a timbre (one of 104 "variant"
# files: formants, breath, echo), a rate and a pitch. Two timbres may be one throat at two pitches, so train
# and test are divided by what the files say, not by their names.
# --------------------------------------------------------------------------------------------------

def nearest(name, valid):
    """The end of an error message: `nearest("en-su", ["en-us", "cmn"])` -> "nearest valid: en-us"."""
    close = difflib.get_close_matches(str(name), valid, 3, 0.4)
    return "nearest valid: " + ", ".join(close or sorted(valid)[:12])


PARAMETERS = {  # name: (espeak's number, lowest, highest, espeak's own default, for a voice that says none)
    "rate": (1, 80, 450, 175),      # words per minute; outside of these espeak clamps without a word
    "volume": (2, 0, 300, 100),     # percent; above 100 espeak's gain control compresses, as a shout is
    "pitch": (3, 0, 99, 50),        # 50 is the timbre's own pitch, 0 an octave below, 99 nearly one above
    "range": (4, 0, 99, 50),        # liveliness of the melody; 0 is monotone
}
# 29 of the 104 timbres reach full scale, where espeak's gain control holds them. One constant factor (2 dB),
# not a level per clip: resampling has room to overshoot (to 0.9), and a shout stays louder than a whisper.
GAIN = 0.8


@functools.cache
def espeak_files() -> tuple[str, Path]:
    """Library and data folder of espeak-ng's wheel; imported late, for it is GPL-3 and only its user needs it."""
    try:
        import espeakng_loader
    except ModuleNotFoundError:
        raise UserError("synth.engine=espeak needs the package espeakng-loader: pip install espeakng-loader.") from None
    return espeakng_loader.get_library_path(), Path(espeakng_loader.get_data_path())


@functools.cache
def accents():
    """{language code: voice file}: {"en-us": "gmw/en-US", "cmn": "sit/cmn"}; a file's first code counts."""
    found = {}
    for path in sorted(p for p in (espeak_files()[1] / "lang").rglob("*") if p.is_file()):
        code = re.search(r"^language\s+(\S+)", path.read_text(errors="replace"), re.M)
        found.setdefault(code[1].lower(), path.relative_to(espeak_files()[1] / "lang").as_posix())
    return found


@functools.cache
def timbres():
    """{timbre: {"throat", "gender"}} of the variant files.

    The throat is what the file makes of the vocal tract: the frequencies of formants 1 to 5, in percent.
    Files that differ in name, pitch, loudness or echo alone agree in it ("Gene", "Gene2"; "f2", "whisperf").
    Files that choose the Klatt synthesiser sound so alike, whatever their formants (spectra of their words
    correlate by up to 0.997), that they count as one throat."""
    found = {}
    for path in sorted((espeak_files()[1] / "voices" / "!v").iterdir()):
        formants, throat, gender = ["100"] * 9, None, None
        for line in path.read_text(errors="replace").splitlines():
            key, *values = re.split("#|//", line)[0].split() or [""]
            if key == "formant":
                formants[int(values[0])] = values[1]
            throat = "klatt" if key == "klatt" else throat
            gender = values[0][0].lower() if key == "gender" else gender
        found[path.name] = {"throat": throat or "/".join(formants[1:6]), "gender": gender}
    return found


def timbre_split(timbre, held_out):
    """"train", "dev" or "test": by hash of the throat, or of the name where it is no timbre of espeak's; never by
    rate or pitch. `held_out`: the shares of throats that only dev and only test hear.

    >>> timbre_split("Gene", {"test": 0.3, "dev": 0.1}) == timbre_split("Gene2", {"test": 0.3, "dev": 0.1})
    True
    """
    throat = timbres()[timbre]["throat"] if timbre in timbres() else timbre
    # "split" is a salt: it leaves a third of the women and no easier voices to the test
    share = int(hashlib.sha256(f"split {throat}".encode()).hexdigest()[:8], 16) / 2 ** 32
    return "test" if share < held_out["test"] else "dev" if share < held_out["test"] + held_out["dev"] else "train"


def check_espeak(accent, timbre):
    """espeak itself keeps its last voice at an unknown accent, and says nothing of an unknown timbre."""
    for kind, name, valid in (("accent", accent, accents()), ("timbre", timbre, timbres())):
        if name not in valid:
            raise UserError(f"espeak has no {kind} {name!r}; {nearest(name, valid)}.")


def espeak_voice(accent, timbre, **parameters):
    """A checked voice; "gender" only where the variant file tells it.

    >>> espeak_voice("en-us", "f3", rate=172, pitch=44)["id"]
    'en-us+f3/rate=172/pitch=44'
    """
    check_espeak(accent, timbre)
    for name, value in parameters.items():
        low, high = PARAMETERS[name][1:3]
        if not low <= value <= high:
            raise UserError(f"espeak's {name} goes from {low} to {high}, not {value} ({accent}+{timbre}).")
    voice = {"id": f"{accent}+{timbre}" + "".join(f"/{k}={v}" for k, v in parameters.items()),
             "engine": "espeak", "accent": accent, "timbre": timbre, "lang": accent, **parameters}
    gender = timbres()[timbre]["gender"]
    return voice | ({"gender": gender} if gender else {})


def candidates(split, settings, pool=None):
    """What `draw_voice` may choose from: names of espeak's timbres, or voices of a file.

    split     "train", "dev" or "test"
    settings  the section synth: a list in timbres counts whatever the split; empty, the split's own timbres do,
              special_timbres left out
    pool      voices from a file instead of espeak's; where all have one timbre it serves every split
    """
    if pool is None and settings.timbres:
        return settings.timbres
    for name in settings.special_timbres:
        check_espeak("en-us", name)
    names = {v["timbre"] for v in pool} if pool else timbres().keys() - settings.special_timbres
    alone = pool and len(names) == 1
    fit = {name for name in names if alone or timbre_split(name, settings.held_out) == split}
    if not fit:
        raise UserError(f"No timbre is left for {split} at synth.held_out={settings.held_out}: offer more timbres, or change "
                        "the shares.")
    return [v for v in pool if v["timbre"] in fit] if pool else sorted(fit)


def draw_voice(rng, chosen_from, settings):
    """One voice for one segment: `rng` a random.Random, `chosen_from` from `candidates`; settings: accents,
    rate and pitch of the section synth."""
    chosen = rng.choice(chosen_from)
    if isinstance(chosen, dict):
        return chosen
    # every second value: in espeak's tables some neighbouring rates (172 and 173 …) are the same speech
    return espeak_voice(rng.choice(settings.accents), chosen, **{
        k: rng.randrange(low, high + 1, 2) for k, (low, high) in (("rate", settings.rate), ("pitch", settings.pitch))})


def read_voices(path):
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
                        f'"id", "timbre" and "lang".') from None
    if not voices:
        raise UserError(f'{path} holds no voice: write one {{"id", "timbre", "lang"}} per line.')
    return voices


# Engines: three ways to speak, one signature engine(texts, voices, seed) -> (waveforms, sample rate). espeak's
# state (pitch flutter, gain control) runs on from clip to clip and cannot be reset; the seed covers its noise
# only. So bytes repeat for the same calls in the same order in a fresh process, while a clip made by itself
# sounds the same and has other bytes.

class Espeak:
    """espeak-ng in this process. A process has one such library, so two objects would share their state."""

    def __init__(self):
        self.library, self.pieces = ctypes.CDLL(espeak_files()[0]), []
        self.library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        synchronous, buffer_ms, do_not_exit = 2, 60000, 0x8000        # a clip comes in one or two callbacks
        self.rate = self.library.espeak_Initialize(synchronous, buffer_ms, str(espeak_files()[1]).encode(), do_not_exit)
        if self.rate <= 0:
            raise UserError(f"espeak-ng cannot read its data in {espeak_files()[1]}: install espeakng-loader again.")
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self.callback = signature(self.collect)        # kept here, or Python frees it under espeak's feet
        self.library.espeak_SetSynthCallback(self.callback)

    def collect(self, wave, samples, events):
        if wave and samples > 0:
            self.pieces.append(ctypes.string_at(wave, 2 * samples))   # int16
        return 0

    def speak(self, text, voice):
        """text -> (n,) float32 in [-0.8, 0.8] at `self.rate` (22,050 Hz). A parameter that the voice leaves
        out is set to espeak's default, or it would keep the last voice's."""
        check_espeak(voice.get("accent"), voice.get("timbre"))
        name = f"{accents()[voice['accent']]}+{voice['timbre']}".encode()
        codes = [self.library.espeak_SetVoiceByName(name)]
        for key, (number, _, _, default) in PARAMETERS.items():
            codes.append(self.library.espeak_SetParameter(number, int(voice.get(key, default)), 0))
        data, utf8 = text.replace("\0", " ").encode(), 1
        self.pieces.clear()
        codes.append(self.library.espeak_Synth(data, len(data) + 1, 0, 1, 0, utf8, None, None))
        if any(codes):
            raise UserError(f"espeak-ng refused voice {voice['id']!r} (return codes {codes}): take another.")
        return np.frombuffer(b"".join(self.pieces), np.int16) * np.float32(GAIN / 32768)

    def __call__(self, texts, voices, seed):
        self.library.espeak_ng_SetRandSeed(seed)
        return [self.speak(t, v) for t, v in zip(texts, voices, strict=True)], self.rate


def hf_engine(model_name):
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
    def engine(texts, voices, seed):
        torch.manual_seed(seed)
        waveforms = [None] * len(texts)
        for speaker in dict.fromkeys(v.get("speaker") for v in voices):
            of = [i for i, v in enumerate(voices) if v.get("speaker") == speaker]
            batch = tokenizer([texts[i] for i in of], return_tensors="pt", padding=True).to(model.device)
            out = model(**batch, **({} if speaker is None else {"speaker_id": speaker}))
            for i, waveform, samples in zip(of, out.waveform, out.sequence_lengths):
                waveforms[i] = waveform[:int(samples)].float().cpu().numpy()     # behind it is padding
        return waveforms, model.config.sampling_rate
    return engine


def python_engine(target):
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
                        f"installed.") from None

    def engine(texts, voices, seed):
        result = function(texts, voices, seed)
        try:
            waveforms, rate = result
            waveforms = [np.asarray(w, np.float32) for w in waveforms]
        except (TypeError, ValueError):
            waveforms, rate = [], None
        if [w.ndim for w in waveforms] != [1] * len(texts) or not isinstance(rate, int) or rate <= 0:
            raise UserError(f"{wrong} must return (one 1-D waveform per text, sample rate as an integer).")
        return waveforms, rate
    return engine


@functools.cache                        # hf: and python: engines serve all shards of a process
def load_engine(name):
    """"espeak" | "hf:<model>" | "python:<module>:<function>" -> engine."""
    kind, _, rest = name.partition(":")
    engine = {"hf": hf_engine, "python": python_engine}.get(kind)
    if name != "espeak" and not (engine and rest):
        raise UserError(f"synth.engine={name} is none of espeak, hf:<model>, python:<module>:<function>.")
    return Espeak() if name == "espeak" else engine(rest)


# From waveform to file: espeak speaks a thousand times faster than real time, so what follows it decides the
# speed. One resampling for many clips, one conversion to 16 bit, one FLAC written to memory.

@functools.cache
def filters(rate):
    """torchaudio's windowed-sinc filters to 16 kHz: (half width, taps, [(first, last, (taps, phases))]).

    From 22,050 Hz, 441 samples in give 320 out, each phase by its own filter. torchaudio convolves with all
    320 at full length, nine tenths of it zeros; here 32 neighbouring phases share the stretch that they need.
    16 zero crossings, not its default 6: 7 kHz keeps its level (there -1.8 dB), 9 kHz folds at -46 (-17)."""
    resample, bank = torchaudio.transforms.Resample(rate, RATE, lowpass_filter_width=16), []
    for phases in resample.kernel[:, 0].split(32):                                   # (320, 487) by 32
        used = (phases.abs().amax(0) > 1e-12).nonzero()
        first, last = int(used[0]), int(used[-1]) + 1
        bank.append((first, last, phases[:, first:last].T.contiguous()))
    return resample.width, resample.kernel.shape[-1], bank


def to_16k(waveforms, rate):
    """[(n,) float32 at `rate`] -> [(ceil(n * 16000 / rate),) float32 at 16 kHz]: computes exactly
    `torchaudio.transforms.Resample`, many clips at once, in a quarter of its time.

    A clip that starts at a multiple of 441 samples starts at one of 320 afterwards. So clips are laid end to
    end at such places, with silence between them that is as long as the filters reach.
    """
    if rate == RATE or not waveforms:
        return list(waveforms)
    (width, taps, bank), period, starts, end = filters(rate), rate // math.gcd(rate, RATE), [], 0
    for w in waveforms:
        starts.append(end)
        end += math.ceil((len(w) + width) / period) * period
    line = np.zeros(end + taps, np.float32)
    for start, w in zip(starts, waveforms):
        line[width + start:width + start + len(w)] = w
    frames = torch.from_numpy(line).unfold(0, taps, period)                          # (periods, 487), a view
    line = torch.cat([frames[:, first:last] @ f for first, last, f in bank], 1).flatten().numpy()
    return [line[s * RATE // rate:][:math.ceil(len(w) * RATE / rate)] for s, w in zip(starts, waveforms)]


def gate(waveform, text, settings):
    """None if the clip ((n,) float32, 16 kHz) is fit to train on, else the reason. Settings: min_rms (of full
    scale), max_clipped (share of samples), chars_per_second [low, high], max_seconds.

    Letters and digits count, a Chinese one as four (espeak says 3.4 of them a second where it says 16.4
    English letters). Three frames of 10 ms are the least that gives one audio position.
    """
    seconds, floor = len(waveform) / RATE, settings.min_rms
    if not seconds or not re.search(r"\w", text):
        return "empty"
    if seconds < 0.03 or seconds > settings.max_seconds:
        return "too short" if seconds < 0.03 else "too long"
    if not np.dot(waveform, waveform) >= floor * floor * len(waveform):      # "not >=": nan is silent too
        return "silent"
    if np.count_nonzero(np.abs(waveform) >= 0.999) > settings.max_clipped * len(waveform):
        return "clipped"
    pace = sum(4 if c >= "㐀" else 1 for c in text if c.isalnum()) / seconds
    low, high = settings.chars_per_second
    return "too fast" if pace > high else "too slow" if pace < low else None


def to_int16(waveform):
    """(n,) float32 -> (n,) int16, rounded and clamped: the one place where samples become integers."""
    return np.clip(np.rint(waveform * np.float32(32767)), -32768, 32767).astype(np.int16)


def flac_bytes(samples):
    """(n,) int16 at 16 kHz -> FLAC, 16 bit mono; the same samples give the same bytes."""
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


# URLs, mail addresses, markup, paths, code; and, by language, letters that the voice cannot read.
UNSPEAKABLE = re.compile(r"https?:|www\.|\S@\S+\.\w|[{}<>\[\]\\|_^~`=#*]|\w/\w+/|\w\(\)|::|\s--\w|&\w+;"
                         r"|\w\.(com|org|net|py|txt|html?)\b", re.I)
FOREIGN = {"en": re.compile("[^\\W\\d_A-Za-zÀ-ɏ]")} | dict.fromkeys(
    ("cmn", "zh", "yue", "hak"), re.compile("[^\\W\\d_A-Za-zÀ-ɏ㐀-鿿豈-﫿]"))


def speakable(text, lang):
    """Can a voice of this language ("en-gb", "cmn") say it? Only English and Chinese are judged by script.

    >>> [speakable(text, "en-us") for text in ("the ball is red", "see https://a.b", "球是红的")]
    [True, False, False]
    """
    foreign = FOREIGN.get(lang.lower().split("-")[0], UNSPEAKABLE)
    return bool(re.search(r"\w", text)) and not UNSPEAKABLE.search(text) and not foreign.search(text)


# --------------------------------------------------------------------------------------------------
# 6. Recipes: a document becomes samples
#
# A sample has `parts` (a document) or `messages` (a dialogue whose contents are such parts). Loss is
# data: every text part says whether it is a target. Clips are planned here, with text and voice, and
# spoken afterwards, all of a shard in one go.
# --------------------------------------------------------------------------------------------------

def interleaved(document: dict, s: Settings, rng: random.Random) -> Iterator[dict]:
    """Stage 1's own recipe: text with segments of it spoken; in dialogues the question, or its tail, is spoken."""
    if "text" in document:
        yield {"parts": splice(document["text"], segments(document["text"], s, rng), True), "messages": None}
    else:
        yield {"parts": None, "messages": [message(m, s.spoken_turns, s, rng, True, True) for m in document["messages"]]}


def message(m: dict, spoken: float, s: Settings, rng: random.Random, loss: bool, tails: bool) -> dict:
    """One turn. A user's is spoken with probability `spoken`: whole, or (half the time, if tails) from a random word on."""
    text, ranges = m["content"], []
    words = [w.start() for w in WORD.finditer(text)]
    if m["role"] == "user" and words and rng.random() < spoken:
        tail = tails and len(words) > s.min_words and rng.random() < 0.5
        ranges = [(words[rng.randint(1, len(words) - s.min_words)] if tail else words[0], len(text))]
    return {"role": m["role"], "content": splice(text, ranges, loss)}


def tasks(document: dict, s: Settings, rng: random.Random) -> Iterator[dict]:
    """Speech tasks: a sentence or question, or some words of it, is spoken, then transcribed, or its speaker or speed is named.

    Short clips teach hearing sooner than whole sentences do, for little else than the clip tells what was said.
    """
    whole = [m["content"] for m in document.get("messages", []) if m["role"] == "user"] or [
        document["text"][a:b] for a, b in sentences(document.get("text", ""))]
    texts = [text for text in whole if WORD.search(text)]
    for text in rng.choices(texts, k=4 * bool(texts)):
        cuts = [*(m.start() for m in WORD.finditer(text)), len(text)]
        a, b = sorted(rng.sample(cuts, 2)) if rng.random() < 0.7 else (cuts[0], cuts[-1])
        task, part = rng.choices(list(s.tasks), list(s.tasks.values()))[0], {"role": "speech", "text": text[a:b].rstrip(" ,")}
        yield {"parts": [part, text_part(TASKS[task]["ask"], False), {"role": "answer", "task": task}], "messages": None}


def typed(document: dict, s: Settings, rng: random.Random) -> Iterator[dict]:
    """Pure text, so that the LLM keeps what it knows; every position is a target."""
    if "text" in document:
        yield {"parts": [text_part(document["text"], True)], "messages": None}
    else:
        yield {"parts": None, "messages": [message(m, 0, s, rng, True, False) for m in document["messages"]]}


def chat(document: dict, s: Settings, rng: random.Random) -> Iterator[dict]:
    """Fine-tuning: dialogues with spoken and typed questions, the answers alone are targets."""
    if "messages" in document:
        yield {"parts": None, "messages": [message(m, s.spoken_questions, s, rng, m["role"] == "assistant", False)
                                           for m in document["messages"]]}


RECIPES: dict[str, Callable] = {"interleaved": interleaved, "tasks": tasks, "text": typed, "chat": chat}
TASKS = {"transcribe": {"ask": "Transcript:", "answer": lambda part: part["text"]},
         "speaker": {"ask": "Speaker:", "answer": lambda part: {"f": "woman", "m": "man"}.get(part["voice"].get("gender"))},
         "speed": {"ask": "Speed:", "answer": lambda part: part["voice"].get("speed") or speed_of(part["voice"].get("rate"))}}


def speed_of(rate: int | None) -> str | None:
    """An espeak rate (words per minute) in a word: config.yaml's default range in three equal parts; None stays None."""
    return None if rate is None else "slow" if rate < 200 else "fast" if rate >= 220 else "normal"


def parts_of(sample: dict) -> list[list[dict]]:
    """The sample's lists of parts: one for a document, one a message for a dialogue."""
    return [sample["parts"]] if sample["parts"] else [m["content"] for m in sample["messages"]]


def plan_shard(c: Settings, recipe: str, split: str, shard: int) -> list[dict]:
    """Read corpus shard `shard` and plan its samples; speech parts have text and voice, audio follows."""
    s, path = c.synth, Path(c.data) / "corpus" / f"{split}-{shard:06d}.jsonl"
    voices, samples = candidates(split, s, read_voices(s.voices) if s.voices else None), []
    for line in path.read_bytes().splitlines():
        document = json.loads(line)
        rng = random.Random(f"{c.seed} {recipe} {split} {shard} {len(samples)}")
        for sample in RECIPES[recipe](document, s, rng):
            name = f"{recipe}-{split}-{shard * 4 * s.shard_documents + len(samples):06d}"
            for parts in parts_of(sample):
                plan_voices(parts, recipe, voices, s, rng)
            samples.append({"id": name, "recipe": recipe, "lang": s.lang} | sample)
    return samples


def plan_voices(parts: list[dict], recipe: str, voices: list, s: Settings, rng: random.Random) -> None:
    """Give every speech part a voice of its own, the answer of a speech task its text, unspeakable segments back to text."""
    loss = recipe == "interleaved"
    for i, part in enumerate(parts):
        if part["role"] == "speech":
            part["voice"] = draw_voice(rng, voices, s)
            if not speakable(part["text"], part["voice"].get("lang", s.lang)):
                parts[i] = text_part(part["text"], loss)
        elif part["role"] == "answer":
            answer = TASKS[part["task"]]["answer"](parts[0]) if parts[0]["role"] == "speech" else None
            if answer is None:                                        # not known of this voice: transcribe instead
                parts[i - 1], answer = text_part(TASKS["transcribe"]["ask"], False), parts[0]["text"]
            parts[i] = text_part(" " + answer, True)


# --------------------------------------------------------------------------------------------------
# 7. Shards
#
# A shard is a tar file in WebDataset's convention. Beside x.tar stands x.json: for every sample its id,
# byte offset, length and SHA-256, so that a reader seeks to its own samples and verifies them. Plain tar
# readers lose samples silently: of 16-member shards cut at a random byte one in three raises nothing.
# --------------------------------------------------------------------------------------------------

def tar_member(name: str, data: bytes) -> bytes:
    """One tar member as bytes, without time or user, so that the same samples make the same shard."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def shard_path(c: Settings, recipe: str, split: str, number: int) -> Path:
    return Path(c.data) / recipe / f"{split}-{number:06d}.tar"


def write_shard(path: Path, samples: list[dict], clips: dict[str, dict[str, bytes]], extra: dict) -> None:
    """Write x.json, then x.tar, both whole or absent; a tar that exists is finished."""
    blobs, rows, offset = [], [], 0
    for sample in samples:
        members = {"json": json.dumps(sample, ensure_ascii=False).encode(), **clips[sample["id"]]}
        blob = b"".join(tar_member(f"{sample['id']}.{name}", data) for name, data in members.items())
        rows.append([sample["id"], offset, len(blob), hashlib.sha256(blob).hexdigest()])
        blobs.append(blob)
        offset += len(blob)
    index = {"count": len(samples), **extra, "samples": rows}
    write_whole(path.with_suffix(".json"), json.dumps(index).encode())
    write_whole(path, *blobs, bytes(1024))


@functools.lru_cache(maxsize=4096)
def read_index(path: Path) -> dict:
    """The index beside a shard. UserError where it or the shard is missing or cut short."""
    remedy = "remove the shard's two files and run synth.py again"
    try:
        index = json.loads(path.with_suffix(".json").read_text())
        size, (_, offset, length, _) = path.stat().st_size, (index["samples"] or [(0, 0, 0, 0)])[-1]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; {remedy}.") from None
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        raise UserError(f"{path.with_suffix('.json')} is damaged; {remedy}.") from None
    if size != offset + length + 1024:
        raise UserError(f"{path} has {size} bytes where its index says {offset + length + 1024}; {remedy}.")
    return index


def read_sample(path: Path, number: int) -> tuple[dict, dict[str, bytes]]:
    """Read and verify one sample: its JSON and its clips {"00.flac": bytes}. UserError names a damaged one."""
    name, offset, length, digest = read_index(path)["samples"][number]
    with open(path, "rb") as file:
        file.seek(offset)
        blob = file.read(length)
    if hashlib.sha256(blob).hexdigest() != digest:
        raise UserError(f"Sample {name} in {path} is damaged (its SHA-256 differs); remove the shard's two files and "
                        "run synth.py again.")
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        members = {m.name.partition(".")[2]: tar.extractfile(m).read() for m in tar}
    return json.loads(members.pop("json")), members


def decode_flac(data: bytes) -> np.ndarray:
    """FLAC bytes -> (samples,) float32 at 16 kHz."""
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


# --------------------------------------------------------------------------------------------------
# 8. Making shards
#
# espeak's state survives from call to call, so every espeak shard is made by one fresh process: its bytes
# then depend on the settings and its number alone. Other engines are expensive to load and stay loaded.
# --------------------------------------------------------------------------------------------------

CLIPS_AT_ONCE = 32                # clips resampled, and batched by hf: engines, together


def make_shard(c: Settings, recipe: str, split: str, number: int) -> dict:
    """Plan a shard's samples, speak them, gate them, write them. Returns its counts and the seconds it took."""
    torch.set_num_threads(1)
    started, samples = time.perf_counter(), plan_shard(c, recipe, split, number)
    spoken = [part for sample in samples for parts in parts_of(sample) for part in parts if part["role"] == "speech"]
    counts, waveforms = Counter(samples=len(samples)), {}
    engine = load_engine(c.synth.engine) if spoken else None
    for at in range(0, len(spoken), CLIPS_AT_ONCE):
        batch = spoken[at:at + CLIPS_AT_ONCE]
        seed = int(hashlib.sha256(f"{c.seed} {recipe} {split} {number} {at}".encode()).hexdigest()[:8], 16) >> 1
        raw, rate = engine([p["text"] for p in batch], [p["voice"] for p in batch], seed)
        waveforms |= {id(part): w for part, w in zip(batch, to_16k(raw, rate))}
    clips = {}
    for sample in samples:
        clips[sample["id"]] = files = {}
        for parts in parts_of(sample):
            parts[:] = finish_parts(parts, waveforms, files, recipe == "interleaved", c.synth.gate, counts)
    write_shard(shard_path(c, recipe, split, number), samples, clips, {"counts": dict(sorted(counts.items()))})
    return dict(counts) | {"took": time.perf_counter() - started}


def finish_parts(parts: list[dict], waveforms: dict, files: dict[str, bytes], loss: bool, gate_settings: Settings,
                 counts: Counter) -> list[dict]:
    """Give speech parts their clip; speech that fails the gate becomes text again and is counted by reason and voice."""
    done: list[dict] = []
    for part in parts:
        words = len(WORD.findall(part["text"]))
        if part["role"] == "speech":
            waveform = waveforms.pop(id(part))
            if reason := gate(waveform, part["text"], gate_settings):
                counts[f"rejected: {reason}"] += 1
                counts[f"rejected voice: {part['voice'].get('timbre', part['voice']['id'])}"] += 1
                part = text_part(part["text"], loss)
            else:
                files[f"{len(files):02d}.flac"] = flac_bytes(to_int16(waveform))
                counts["clips"] += 1
                counts["speech words"] += words
                counts["audio samples"] += len(waveform)
                part = {"role": "speech", "text": part["text"], "audio": [*files][-1],
                        "seconds": round(len(waveform) / RATE, 3), "voice": part["voice"]["id"]}
        counts["words"] += words
        if done and part["role"] == done[-1]["role"] == "text" and part["loss"] == done[-1]["loss"]:
            part = text_part(done.pop()["text"] + part["text"], part["loss"])
        done.append(part)
    return done


def shaping_settings(c: Settings, recipe: str) -> dict:
    """The settings that shape a recipe's bytes; the number of shards and of workers does not."""
    return {k: v for k, v in c.synth.items() if k not in ("shards", "workers")} | {"seed": c.seed}


OTHER_DATA = "choose another folder with data=…, or make it anew with fresh=true"


def wanted_shards(c: Settings) -> list[tuple[str, str, int]]:
    """All shards that the settings ask for, as (recipe, split, number); makes the corpus if need be."""
    corpus = make_corpus(c)
    return [(recipe, split, n) for recipe, most in c.synth.shards.items() if most for split in corpus
            for n in range(min(most, corpus[split]) if split == "train" else corpus[split])]


def make_shards(c: Settings) -> None:
    """Make the shards of this process's share that do not exist yet, then print the closing report."""
    if c.fresh:
        for name in [*c.synth.shards, "corpus", "tokenizer"]:
            shutil.rmtree(Path(c.data) / name, ignore_errors=True)
    wanted = wanted_shards(c)
    for recipe in dict.fromkeys(recipe for recipe, _, _ in wanted):
        folder = Path(c.data) / recipe
        same_settings(folder / "settings.yaml", shaping_settings(c, recipe), (), OTHER_DATA, any(folder.glob("*.tar")))
    part, parts = map(int, (c.shard or "0/1").split("/"))
    mine = [key for key in wanted[part::parts] if not shard_path(c, *key).is_file()]
    fresh = c.synth.engine == "espeak"
    context = multiprocessing.get_context("forkserver" if fresh else "spawn")
    if fresh:
        context.set_forkserver_preload(["numpy", "torch", "torchaudio", "soundfile", "yaml"])
    took = 0.0
    if mine:
        with context.Pool(min(c.synth.workers, len(mine)), maxtasksperchild=1 if fresh else None) as pool:
            jobs = pool.imap_unordered(functools.partial(run_job, c), mine)
            for counts in tqdm(jobs, total=len(mine), desc="shards", disable=None):
                if "sentence" in counts:
                    raise UserError(counts["sentence"])
                took += counts["took"]
    if part == 0:
        report(c, [key for key in wanted if shard_path(c, *key).is_file()], len(mine), took)


def run_job(c: Settings, key: tuple[str, str, int]) -> dict:
    """make_shard in a worker process; a UserError comes back as its sentence."""
    try:
        return make_shard(c, *key)
    except UserError as error:
        return {"sentence": str(error)}


def report(c: Settings, keys: list[tuple[str, str, int]], made: int, took: float) -> None:
    """Print what stands in the data folder: samples, hours, share of speech, rejected clips by reason and voice."""
    print(f"{'recipe':<12} {'split':<6} {'shards':>6} {'samples':>8} {'hours':>7} {'clips':>8} {'speech words':>13}")
    rejected = Counter()
    for recipe, split in dict.fromkeys(key[:2] for key in keys):
        shards = [read_index(shard_path(c, *key))["counts"] for key in keys if key[:2] == (recipe, split)]
        n = sum(map(Counter, shards), Counter())
        rejected += Counter({k: v for k, v in n.items() if k.startswith("rejected")})
        share = f"{n['speech words'] / max(n['words'], 1):.1%}"
        print(f"{recipe:<12} {split:<6} {len(shards):>6} {n['samples']:>8} {n['audio samples'] / RATE / 3600:>7.2f} "
              f"{n['clips']:>8} {share:>13}")
    reasons, voices = (Counter({k.removeprefix(kind): v for k, v in rejected.items() if k.startswith(kind)}).most_common(10)
                       for kind in ("rejected: ", "rejected voice: "))
    print("clips that failed the gate and became text again: " + (", ".join(f"{k} {v}" for k, v in reasons) or "none") +
          (f"; most often of {', '.join(f'{k} {v}' for k, v in voices)}" if voices else ""))
    if made:
        seconds = sum(read_index(shard_path(c, *key))["counts"].get("audio samples", 0) for key in keys) / RATE
        print(f"{made} shards made in {took:.0f} process-seconds" + (f", {seconds / took:.0f} times real time on a core"
              if made == len(keys) else ""))


# --------------------------------------------------------------------------------------------------
# 9. Preview: listen before you train
# --------------------------------------------------------------------------------------------------

def preview(c: Settings) -> Path:
    """Write preview.html: samples of every recipe with their clips in place, and each token's loss flag."""
    import inserter                                                   # ids and labels have one home

    keys = [key for key in wanted_shards(c) if key[1] == "train" and shard_path(c, *key).is_file()]
    if not keys:
        raise UserError(f"There are no shards in {c.data} to preview; run synth.py first.")
    tokenizer, cards, by_recipe = inserter.load_tokenizer(c), [], {}
    for key in keys:
        by_recipe.setdefault(key[0], shard_path(c, *key))
    for i in range(c.preview):
        path = list(by_recipe.values())[i % len(by_recipe)]
        count = read_index(path)["count"]
        if i // len(by_recipe) < count:
            cards.append(sample_card(*read_sample(path, i // len(by_recipe)), inserter, tokenizer))
    page = Path("preview.html")
    write_whole(page, PAGE.format(title="InSerter: samples", body="\n".join(cards)).encode())
    return page


def sample_card(sample: dict, files: dict[str, bytes], inserter, tokenizer) -> str:
    """One sample as HTML: the parts as a reader meets them, then every token, targets underlined."""
    blocks = []
    for parts, who in zip(parts_of(sample), [m["role"] for m in sample["messages"] or []] or [""]):
        spans = []
        for part in parts:
            text = html.escape(part["text"])
            if part["role"] == "speech":
                audio = base64.b64encode(files[part["audio"]]).decode()
                spans.append(f'<span class="speech">{text}<br><audio controls preload="metadata" '
                             f'src="data:audio/flac;base64,{audio}"></audio><small>{html.escape(part["voice"])}, '
                             f'{part["seconds"]} s</small></span>')
            else:
                spans.append(f'<span class="{"loss" if part["loss"] else "text"}">{text}</span>')
        blocks.append(f"<p>{f'<b>{who}</b> ' if who else ''}{''.join(spans)}</p>")
    encoded = inserter.encode(sample, {name: decode_flac(data) for name, data in files.items()}, tokenizer)
    shown, held = [], []                                              # [token, target, times]
    for i, target in zip(encoded.ids, [False] + [label >= 0 for label in encoded.labels]):
        held.append(i)
        token = tokenizer.decode(held)
        if "\ufffd" in token and len(held) < 4:                       # a piece of a character: shown with what completes it
            continue
        held.clear()
        if shown and token == shown[-1][0] == inserter.AUDIO:
            shown[-1][2] += 1
        else:
            shown.append([token, target, 1])
    tokens = "".join(f'<code class="{"loss" if target else ""}">{html.escape(token).replace(chr(10), "⏎")}</code>' +
                     f"× {times} " * (times > 1) for token, target, times in shown)
    return (f"<section><h2>{sample['id']}</h2>{''.join(blocks)}<details><summary>{len(encoded.ids)} positions, "
            f"{sum(label >= 0 for label in encoded.labels)} targets (underlined)</summary>{tokens}</details></section>")


# --------------------------------------------------------------------------------------------------
# 10. The command line
# --------------------------------------------------------------------------------------------------

def run(main: Callable[[list[str]], None]) -> None:
    """Run a script's main; a UserError becomes one sentence on standard error and exit status 2.

    Under torchrun rank 0 says it: torchrun then ends the other ranks by SIGTERM, which gives them the same status.
    After 30 s without that signal an error is a rank's own, and it speaks itself.
    """
    rank_0 = os.environ.get("RANK", "0") == "0"
    if not rank_0:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    try:
        main(sys.argv[1:])
    except UserError as error:
        if not rank_0:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))      # training has its own handler
            for _ in range(300):            # one long sleep would not see a signal that another thread has caught
                time.sleep(0.1)
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)


def main(arguments: list[str]) -> None:
    config = load_config(arguments)
    if config.preview is not None:
        print(f"{preview(config)} is written; open it in a browser.")
    else:
        make_shards(config)


# --------------------------------------------------------------------------------------------------
# Data: the tiny world's words
# --------------------------------------------------------------------------------------------------

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen nineteen twenty").split()
NAMES = "tom anna ben mary sam lucy peter jane max emma".split()
NOUNS = ("apple river stone candle ladder button window basket feather hammer lemon mirror needle pencil rocket "
         "saddle ticket blanket bottle camera drum guitar kettle lantern magnet pillow ribbon spoon trumpet wagon").split()
PLACES = "garden kitchen market forest village harbour tower cellar attic meadow".split()
KEYWORDS = "winter summer music holiday morning evening weather island mountain picnic party story dinner freedom".split()
FILLERS = "um uh er well".split()
REPAIRS = ["no wait", "sorry i mean", "no actually", "oh no i meant"]
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = "january february march april may june july august september october november december".split()
_PAIRS = ("hot cold, big small, tall short, happy sad, wet dry, fast slow, hard soft, full empty, early late, rich poor, "
          "clean dirty, loud quiet, strong weak, light dark, sweet bitter, wide narrow").split(", ")


def _neighbours(names: list[str]) -> dict[str, str]:
    n = len(names)
    return {f"after {names[i]}": names[(i + 1) % n] for i in range(n)} | {f"before {names[i]}": names[i - 1] for i in range(n)}


def _table(text: str) -> dict[str, str]:
    return {pair.rsplit(" ", 1)[0]: pair.rsplit(" ", 1)[1] for pair in text.split(", ")}


# In each table an answer belongs to one argument alone, so that the answer to a similar question is wrong.
FACTS = {
    "colour": _table("sun yellow, grass green, sky blue, snow white, coal black, blood red, chocolate brown, elephant grey, "
                     "carrot orange, flamingo pink, plum purple, moon silver, treasure golden"),
    "opposite": {a: b for pair in _PAIRS for a, b in (pair.split(), pair.split()[::-1])},
    "day": _neighbours(DAYS),
    "month": _neighbours(MONTHS),
    "baby": _table("dog puppy, cat kitten, cow calf, horse foal, sheep lamb, lion cub, duck duckling, goat kid, frog tadpole, "
                   "hen chick, pig piglet, owl owlet"),
    "sound": _table("dog woof, cat meow, cow moo, sheep baa, duck quack, lion roar, bee buzz, snake hiss, pig oink, bird tweet, "
                    "horse neigh, owl hoot"),
    "home": _table("bee hive, bird nest, spider web, dog kennel, horse stable, lion den, king palace, bear cave, rabbit burrow, "
                   "hen coop, monk abbey, fish pond, cow barn"),
    "worker": _table("bakes bread baker, drives the bus driver, cuts hair barber, heals the sick doctor, grows food farmer, "
                     "sings songs singer, paints pictures painter, flies the plane pilot, brings letters postman, sews clothes tailor, "
                     "catches thieves policeman, guards the sheep shepherd, digs for gold miner"),
    "food": _table("rabbit lettuce, monkey bananas, panda bamboo, mouse cheese, horse hay, squirrel nuts, bear honey, bird worms, "
                   "spider flies, dog bones, cat mice, whale plankton"),
}
LEXICON = sorted({*NOUNS, *KEYWORDS, *NUMBERS}.union(*(f"{x} {y}".split() for table in FACTS.values() for x, y in table.items())))
COMPUTED = ("sum", "count", "repeat", "say", "backwards")            # whole arguments are held out
LISTS = ("count", "repeat", "say", "backwards", "name")              # answered by several words
VERBATIM = ("repeat", "say")                                         # the answer stands in the prompt
GROUPS = {"animals": sorted(set(FACTS["baby"]) | set(FACTS["sound"])), "colours": sorted(FACTS["colour"].values()),
          "days": DAYS, "months": MONTHS, "workers": sorted(FACTS["worker"].values()), "numbers": NUMBERS[1:],
          "names": NAMES, "places": PLACES}

# How each kind is asked, how its argument is given again in a correction, and its fact as a story tells it.
KINDS = {
    "colour": {"ask": ["what is the colour of the {x}", "what colour is the {x}", "tell me the colour of the {x}"],
               "again": "the {x}", "fact": "the {x} is {y}."},
    "opposite": {"ask": ["what is the opposite of {x}", "tell me the opposite of {x}"], "again": "of {x}",
                 "fact": "the opposite of {x} is {y}."},
    "day": {"ask": ["which day comes {x}", "what day is right {x}"], "again": "{x}", "fact": "the day {x} is {y}."},
    "month": {"ask": ["which month comes {x}", "what month is right {x}"], "again": "{x}", "fact": "the month {x} is {y}."},
    "baby": {"ask": ["what is the baby of a {x} called", "what do you call the young of a {x}"], "again": "of a {x}",
             "fact": "the baby of a {x} is a {y}."},
    "sound": {"ask": ["what does the {x} say", "which sound does the {x} make"], "again": "the {x}", "fact": "the {x} says {y}."},
    "home": {"ask": ["where does the {x} live", "what is the home of the {x}"], "again": "the {x}", "fact": "the {x} lives in the {y}."},
    "worker": {"ask": ["who is it that {x}", "tell me who {x}"], "again": "who {x}", "fact": "the {y} {x}."},
    "food": {"ask": ["what does the {x} eat", "which food does the {x} like"], "again": "the {x}", "fact": "the {x} eats {y}."},
    "sum": {"ask": ["what is the sum of {x}", "how much is {x}", "add {x}"], "again": "{x}", "fact": "the sum of {x} is {y}."},
    "count": {"ask": ["count from {x}", "please count from {x}"], "again": "from {x}"},
    "repeat": {"ask": ["repeat the words {x}", "say after me {x}"], "again": "{x}"},
    "say": {"ask": ["say the word {x}", "please say {x}"], "again": "{x}"},
    "backwards": {"ask": ["say backwards {x}", "reverse the words {x}"], "again": "{x}"},
    "name": {"ask": ["name {x}", "give me {x}", "tell me {x}"], "again": "{x}"},
    "tell": {"ask": ["tell me two things about the {x}", "what do you know about the {x}"], "again": "the {x}"},
}
OPEN = ("name", "tell")                                              # many answers are right
CLOSED = [kind for kind in KINDS if kind not in OPEN]

# How a story tells a fact. The last two ask for it in words that no prompt has, and reply as an assistant does:
# "anna asks the home, of the monk. tom cries IT IS ABBEY."
FACT_FORMS = {"stated": "{stated}", "louder": "{stated} yes, {Y}.", "asked": "{a} asks the {kind}, {again}. {b} says it is {y}.",
              "cried": "{a} asks the {kind}, {again}. {b} cries IT IS {Y}."}

# Constraints: SpeechInstructBench's instruction id and arguments, wordings, and the answer made from the plain
# sentence s, the answering words w and the drawn value v.
_ANY, _COUNTS = ("word", "list", "tell"), {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}
CONSTRAINTS = {
    "none": {"id": None, "values": [None], "ask": [""], "shapes": _ANY, "answer": lambda s, w, v: s},
    "capitals": {"id": "change_case:english_capital", "values": [None], "kwargs": lambda w, v: {}, "shapes": _ANY,
                 "ask": ["in capital letters", "all in capitals"], "answer": lambda s, w, v: s.upper()},
    "lowercase": {"id": "change_case:english_lowercase", "values": [None], "kwargs": lambda w, v: {}, "shapes": _ANY,
                  "ask": ["in lower case", "all in small letters"], "answer": lambda s, w, v: s.lower()},
    "end": {"id": "startend:end_checker", "values": ["thank you", "that is all", "have a nice day", "see you soon"],
            "kwargs": lambda w, v: {"end_phrase": v}, "shapes": _ANY, "ask": ["end with {v}", "finish with the words {v}"],
            "answer": lambda s, w, v: f"{s} {v.capitalize()}."},
    "quotation": {"id": "startend:quotation", "values": [None], "kwargs": lambda w, v: {}, "shapes": _ANY,
                  "ask": ["in quotation marks", "put your answer in quotes"], "answer": lambda s, w, v: f'"{s}"'},
    "no_comma": {"id": "punctuation:no_comma", "values": [None], "kwargs": lambda w, v: {}, "shapes": ("list",),
                 "ask": ["without commas", "do not use any commas"], "answer": lambda s, w, v: s.replace(",", "")},
    "keyword": {"id": "keywords:existence", "values": KEYWORDS, "kwargs": lambda w, v: {"keywords": [v]}, "shapes": _ANY,
                "ask": ["use the word {v}", "with the word {v} in it"], "answer": lambda s, w, v: f"{s} I like the {v}."},
    "frequency": {"id": "keywords:frequency", "values": [f"{k} {n}" for k in KEYWORDS for n in ("two", "three")],
                  "kwargs": lambda w, v: {"keyword": v.split()[0], "frequency": _COUNTS[v.split()[1]], "relation": "at least"},
                  "shapes": _ANY, "ask": ["use the word {v} times", "with the word {v} times"],
                  "answer": lambda s, w, v: f"{s} " + " ".join([v.split()[0]] * _COUNTS[v.split()[1]]) + "."},
    "forbidden": {"id": "keywords:forbidden_words", "values": ["it", "is"], "kwargs": lambda w, v: {"forbidden_words": [v]},
                  "shapes": ("word",), "ask": ["do not use the word {v}", "without the word {v}"],
                  "answer": lambda s, w, v: f"Just {w[0]}."},
    "few_words": {"id": "length_constraints:number_words", "values": ["three", "four"],
                  "kwargs": lambda w, v: {"relation": "less than", "num_words": _COUNTS[v]}, "shapes": ("word",),
                  "ask": ["in less than {v} words", "use less than {v} words"], "answer": lambda s, w, v: f"Just {w[0]}."},
    "many_words": {"id": "length_constraints:number_words", "values": ["five", "six", "seven"],
                   "kwargs": lambda w, v: {"relation": "at least", "num_words": _COUNTS[v]}, "shapes": ("word",),
                   "ask": ["in at least {v} words", "use at least {v} words"],
                   "answer": lambda s, w, v: f"The answer to your question is {w[0]}."},
    "sentences": {"id": "length_constraints:number_sentences", "values": ["two", "three"],
                  "kwargs": lambda w, v: {"relation": "at least", "num_sentences": _COUNTS[v]}, "shapes": ("word", "list"),
                  "ask": ["in at least {v} sentences", "use at least {v} sentences"],
                  "answer": lambda s, w, v: f"{s} I am sure." + (" You can trust me." if v == "three" else "")},
    "two_responses": {"id": "combination:two_responses", "values": [None], "kwargs": lambda w, v: {}, "shapes": _ANY,
                      "ask": ["give two responses", "answer in two ways"],
                      "answer": lambda s, w, v: f"{s}\n******\nAgain: {s[0].lower() + s[1:]}"},
    "bullets": {"id": "detectable_format:number_bullet_lists", "values": [None], "shapes": ("list",),
                "kwargs": lambda w, v: {"num_bullets": len(w)},
                "ask": ["as a bullet list", "with bullet points"], "answer": lambda s, w, v: "\n".join(f"* {x}" for x in w)},
    "title": {"id": "detectable_format:title", "values": [None], "kwargs": lambda w, v: {}, "shapes": _ANY,
              "ask": ["add a title", "with a title"], "answer": lambda s, w, v: f"<<Answer>>\n{s}"},
    "postscript": {"id": "detectable_content:postscript", "values": [None], "kwargs": lambda w, v: {"postscript_marker": "P.S."},
                   "shapes": _ANY, "ask": ["add a postscript", "with a postscript"], "answer": lambda s, w, v: f"{s}\nP.S. Thank you."},
}

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }}
section {{ border-top: 1px solid #ccc; padding: .5em 0 }} h2 {{ font-size: 1em; color: #666; margin: .3em 0 }}
p {{ white-space: pre-wrap; overflow-wrap: anywhere }} summary {{ cursor: pointer; color: #666 }}
.speech {{ display: inline-block; vertical-align: top; background: #e6f0fb; border-radius: .4em; padding: .1em .5em; margin: .1em }}
.speech small {{ color: #467; margin-left: .6em }} .speech audio {{ height: 2em; width: 17em; vertical-align: middle }}
.loss {{ border-bottom: 2px solid #e08a00 }} .key span {{ margin-right: 1.5em }}
code {{ display: inline-block; white-space: pre-wrap; margin: 0 1px .3em; background: #f0f0f0 }}</style>
<h1>{title}</h1><p class="key"><span class="speech">speech, with the words spoken</span><span class="loss">text that \
carries loss</span><span>text that only conditions</span></p>
{body}</html>
"""



if __name__ == "__main__":
    run(main)
