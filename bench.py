"""A small SpeechInstructBench: does the model do what it is told aloud as well as what it is told in writing?

    prompt    "what colour is the sun, in capital letters"        typed, and spoken under five conditions
    response  "IT IS YELLOW."
    checks    change_case:english_capital {}                      followed: yes
              tiny:answer {"kind": "colour", "words": ["yellow"]} followed: yes
    figures   share of prompts with every check followed (prompt-level), share of checks (instruction-level)

A prompt's way through this file:

    tiny world's test split -> prompts.jsonl, audio/*.flac -> answers.jsonl -> scored rows -> results.json, report.html

    python bench.py                           benchmark the run: runs/<run>/bench/
    python bench.py run=asr                   another run
    python bench.py score=FILE.jsonl suite=tiny         score rows that are answered already, of any system

Every figure is computed from answers.jsonl alone by `score_rows`, the function behind `score=`.
"""
from __future__ import annotations

import base64
import collections
import dataclasses
import functools
import hashlib
import html
import inspect
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import string
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

import inserter
import synth
from synth import RATE, UserError


# --------------------------------------------------------------------------------------------------
# 1. Checks: was an instruction followed?
#
# A table of small functions under the instruction ids of SpeechInstructBench (and IFEval before it); the
# arguments are the row's `kwargs`. The ids `tiny:` judge the content, which the tiny world knows: obeying
# "in capital letters" with a wrong answer is not obeying.
# --------------------------------------------------------------------------------------------------

def words_of(text: str) -> list[str]:
    """Lower-cased words without punctuation: "P.S. It's RED!" -> ["p", "s", "it's", "red"]."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def bare(text: str) -> str:
    """Lower-cased, without punctuation and space at both ends."""
    return text.lower().strip(string.punctuation + string.whitespace + "“”")


def compare(count: int, relation: str, limit: int) -> bool:
    return count < limit if relation == "less than" else count >= limit


def two_responses(response: str) -> bool:
    """Two different texts with six asterisks between them; nothing may be empty but the very ends."""
    parts = [part.strip() for part in response.split("******")]
    full = [part for part in parts if part]
    return all(parts[1:-1]) and len(full) == 2 and full[0] != full[1]


@functools.cache
def domain(kind: str) -> set[str]:
    """All words that answer some instruction of a kind of the tiny world."""
    return set(synth.FACTS[kind].values() if kind in synth.FACTS else
               synth.NUMBERS if kind in ("sum", "count") else synth.NOUNS)


@functools.cache
def known_words() -> set[str]:
    """Everything that the tiny world has a name for."""
    return set(synth.NOUNS).union(*synth.GROUPS.values(), *map(domain, synth.FACTS))


def named(response: str, words: Iterable[str]) -> list[str]:
    """Those words of the response that are among `words`, in order."""
    return [word for word in words_of(response) if word in words]


def facts(response: str) -> set[tuple[str, str, str]]:
    """The facts that a response states, true or not: {("sound", "dog", "woof")} of "The dog says woof."."""
    text, word = " ".join(words_of(response)), r"(\w+)"
    return {(kind, x, y) for kind in ("baby", "sound", "home", "food", "colour")
            for x, y in re.findall(synth.KINDS[kind]["fact"].rstrip(".").format(x=word, y=word), text)}


ARGUMENTS = {"end_phrase": str, "keywords": list[str], "keyword": str, "frequency": int, "relation": str,
             "forbidden_words": list[str], "num_words": int, "num_sentences": int, "num_bullets": int,
             "postscript_marker": str, "kind": str, "words": list[str], "group": str, "count": int, "about": str}

CHECKS: dict[str, Callable[..., bool]] = {
    "change_case:english_capital": lambda response: response.isupper(),
    "change_case:english_lowercase": lambda response: response.islower(),
    "startend:end_checker": lambda response, end_phrase: bare(response).endswith(bare(end_phrase)),
    "startend:quotation": lambda response: bool(re.fullmatch(r'\s*".*"\s*', response, re.S)),
    "punctuation:no_comma": lambda response: "," not in response,
    "keywords:existence": lambda response, keywords: all(word.lower() in response.lower() for word in keywords),
    "keywords:frequency": lambda response, keyword, frequency, relation:
        compare(response.lower().count(keyword.lower()), relation, frequency),
    "keywords:forbidden_words": lambda response, forbidden_words:
        not any(re.search(rf"\b{re.escape(word)}\b", response, re.I) for word in forbidden_words),
    "length_constraints:number_words": lambda response, relation, num_words:
        compare(len(re.findall(r"\w+", response)), relation, num_words),
    "length_constraints:number_sentences": lambda response, relation, num_sentences:
        compare(len(synth.sentences(response)), relation, num_sentences),
    "combination:two_responses": two_responses,
    "detectable_format:number_bullet_lists": lambda response, num_bullets:
        len(re.findall(r"^\s*(?:\*[^*]|-).*$", response, re.M)) == num_bullets,
    "detectable_format:title": lambda response: any(t.strip("<> ") for t in re.findall(r"<<[^\n]+>>", response)),
    "detectable_content:postscript": lambda response, postscript_marker:
        bool(re.search(r"\.\s?".join(re.findall(r"\w", postscript_marker.lower())), response.lower())),
    # The words of the kind's domain are exactly those expected, in order: naming all colours, or counting on, fails.
    "tiny:answer": lambda response, kind, words: named(response, domain(kind)) == words,
    "tiny:count": lambda response, group, count: len(set(named(response, synth.GROUPS[group]))) == count,
    "tiny:group": lambda response, group: [] != named(response, known_words()) == named(response, synth.GROUPS[group]),
    "tiny:different": lambda response, group:
        0 < len(named(response, synth.GROUPS[group])) == len(set(named(response, synth.GROUPS[group]))),
    "tiny:list": lambda response, group, count: CHECKS["tiny:count"](response, group, count)
        and CHECKS["tiny:group"](response, group) and CHECKS["tiny:different"](response, group),
    "tiny:two_facts": lambda response, about:
        sum(x == about and synth.FACTS[kind].get(x) == y for kind, x, y in facts(response)) >= 2,
    "tiny:true": lambda response, about: facts(response) != set() and all(
        x == about and synth.FACTS[kind].get(x, y) == y for kind, x, y in facts(response)),
    "tiny:facts": lambda response, about: CHECKS["tiny:two_facts"](response, about)
        and CHECKS["tiny:true"](response, about),
}


def follows(response: str, ids: list[str], kwargs: list[dict]) -> list[bool]:
    """One verdict per instruction. Of two responses the content must be right in each.

    >>> follows("It is yellow.", ["change_case:english_capital", "tiny:answer"],
    ...         [{}, {"kind": "colour", "words": ["yellow"]}])
    [False, True]
    """
    pieces = [response]
    if "combination:two_responses" in ids:
        pieces = [piece for piece in response.split("******") if piece.strip()] or [response]
    return [bool(response.strip()) and all(CHECKS[name](piece, **arguments) for piece in
            (pieces if name.startswith("tiny:") else [response])) for name, arguments in zip(ids, kwargs)]


def loose_variants(response: str) -> list[str]:
    """IFEval's eight: as it is, without the first line, the last, both; and these without asterisks."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [text.replace("*", "") for text in cut]


def verdicts(row: dict) -> dict:
    """A row with its verdicts: `strict` and `loose` (one per instruction), `withdrawn_strict` (adjustment: the checks
    of what the speaker took back), `pred_score` (open-ended: one per decomposed question). No response: all False."""
    response = row.get("response") or ""

    def judge(checks: dict, text: str) -> list[bool]:
        return follows(text, checks["instruction_id_list"], checks["kwargs"])

    row = row | {"strict": judge(row, response),
                 "loose": [any(column) for column in zip(*(judge(row, text) for text in loose_variants(response)))]}
    if row.get("suite") == "adjustment":
        row["withdrawn_strict"] = judge(row["withdrawn"], response)
    if row.get("suite") == "open":
        row["pred_score"] = judge(row["decomposed_checks"], response)
    return row


# --------------------------------------------------------------------------------------------------
# 2. Reading rows
#
# Rows come from this script or from anybody's system, one JSON object per line. Nothing is scored before
# every line has been found right, and nothing is written before everything is scored.
# --------------------------------------------------------------------------------------------------

NEEDS = {"closed": None, "adjustment": "withdrawn", "open": "decomposed_checks", "transcription": "reference"}


def once(pairs: list[tuple[str, object]]) -> dict:
    """JSON object with every name once; json alone would keep the last and drop the others."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field is named twice")
    return dict(pairs)


def read_rows(path: Path) -> list[dict]:
    """Read and check rows. UserError names the file and the line of the first bad one."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a file of answered rows.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line.decode("utf-8"), object_pairs_hook=once))
        except ValueError as error:                                   # JSON's and UTF-8's errors are ValueErrors
            raise UserError(f"{path} line {number} is not JSON in UTF-8 ({error}); mend or remove it.") from None
        check_row(rows[-1], f"{path} line {number}")
    if not rows:
        raise UserError(f"{path} holds no rows; give a file with one JSON object per line.")
    return rows


def check_row(row, where: str) -> None:
    """Refuse a row that cannot be scored."""
    kinds = {"suite": str, "condition": str, "prompt": str, "instruction_id_list": list, "kwargs": list}
    for name, kind in kinds.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise UserError(f"{where} has no {name} of type {kind.__name__}; every row needs {', '.join(kinds)}.")
    for name in ("response", "audio_path", "item", "kind", "constraint", "variant"):
        if not isinstance(row.get(name), str | None):
            raise UserError(f"{where}: {name} must be text, or null where there is none.")
    if row["suite"] not in NEEDS:
        raise UserError(f"{where} has the unknown suite {row['suite']!r}; valid ones are {', '.join(NEEDS)}.")
    if (need := NEEDS[row["suite"]]) and not isinstance(row.get(need), str if need == "reference" else dict):
        raise UserError(f"{where} has no {need}, which rows of {row['suite']} need; keep the fields of prompts.jsonl.")
    check_instructions(row, where)
    if need and need != "reference":
        check_instructions(row[need], f"{where}, {need}")


def check_instructions(checks: dict, where: str) -> None:
    """Known ids, one dict of arguments each, of the types that ARGUMENTS lists."""
    ids, kwargs = checks.get("instruction_id_list"), checks.get("kwargs")
    if not isinstance(ids, list) or not isinstance(kwargs, list) or len(ids) != len(kwargs):
        raise UserError(f"{where}: instruction_id_list and kwargs must be lists of the same length.")
    for name, arguments in zip(ids, kwargs):
        if not isinstance(name, str) or name not in CHECKS:
            raise UserError(f"{where} has the unknown instruction {name!r}; {synth.nearest(name, CHECKS)}.")
        _, *wanted = inspect.signature(CHECKS[name]).parameters       # the first is the response
        if not isinstance(arguments, dict) or set(arguments) != set(wanted):
            raise UserError(f"{where}: kwargs of {name} must be {{{', '.join(wanted)}}}, not {arguments!r}.")
        for key in wanted:
            synth.settle(ARGUMENTS[key], arguments[key], f"kwargs.{key} of {name}", where)


# --------------------------------------------------------------------------------------------------
# 3. Figures
#
# Every figure is a ratio of sums over rows, so one bootstrap over rows serves them all: draw n rows of n
# with replacement, some thousand times, and keep the middle 95 % of the ratios. The seed here is not the
# run's, so that the same answers give the same figures everywhere. Beside each figure stand three floors.
# --------------------------------------------------------------------------------------------------

CONDITIONS = ("standard", "background noise", "accent", "paralinguistic", "disfluency")
FLOORS = SILENCE, NEAREST = "floor: silence", "floor: nearest training prompt"
SHOWN = {"closed": ["strict-prompt"], "adjustment": ["IAR", "ECR"], "open": ["open-score", "strict-prompt"],
         "transcription": ["WER"]}     # the table's figures, the headline first
WARNING = ("Tiny-suite figures: made by a toy world and its rules, never to stand beside published "
           "SpeechInstructBench scores.")


def mode(row: dict) -> str:
    return "floor" if row["condition"] in FLOORS else "spoken" if row.get("audio_path") else "typed"


@functools.lru_cache(maxsize=128)
def resamples_of(n: int, resamples: int) -> np.ndarray:
    """How often each of n rows was drawn in each resample: (resamples, n), float64 so that sums of counts are exact."""
    return np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def estimate(parts: list[tuple[float, float]], resamples: int) -> tuple[float | None, list[float] | None]:
    """Ratio of sums with its 95 % bootstrap interval, from one (numerator, denominator) per row.

    >>> estimate([(1, 1), (1, 1), (0, 1), (1, 1)], 2000)
    (0.75, [0.25, 1.0])
    """
    top, bottom = np.array(parts, float).reshape(-1, 2).T             # (rows,) each
    if not bottom.sum():
        return None, None
    weights = resamples_of(len(top), resamples)
    below = weights @ bottom
    ratios = (weights @ top)[below > 0] / below[below > 0]
    return round(float(top.sum() / bottom.sum()), 6), np.percentile(ratios, [2.5, 97.5]).round(6).tolist()


def row_parts(row: dict) -> dict[str, tuple[float, float]]:
    """What a scored row adds to each figure: metric -> (numerator, denominator)."""
    if row["suite"] == "transcription":
        heard, said = words_of(row.get("response") or ""), words_of(row["reference"])
        return {"WER": (torchaudio.functional.edit_distance(said, heard), len(said))}
    strict, loose = row["strict"], row["loose"]
    parts = {"strict-prompt": (all(strict), 1), "strict-instruction": (sum(strict), len(strict)),
             "loose-prompt": (all(loose), 1), "loose-instruction": (sum(loose), len(loose)),
             "mean-prompt": ((all(strict) + all(loose)) / 2, 1),
             "mean-instruction": ((sum(strict) + sum(loose)) / 2, len(strict))}
    if row["suite"] == "adjustment":   # IAR: follows the correction; ECR: what was taken back (lower is better)
        parts |= {"IAR": parts["strict-prompt"], "ECR": (all(row["withdrawn_strict"]), 1)}
    if row["suite"] == "open":
        parts["open-score"] = (sum(row["pred_score"]), len(row["pred_score"]))
    return parts


def figures(rows: list[dict], metrics: Iterable[str], resamples: int) -> dict:
    """{"count": 320, "strict-prompt": 0.61, …, "interval": {"strict-prompt": [0.55, 0.66], …}} of scored rows."""
    parts = [row_parts(row) for row in rows]
    found = {name: estimate([p[name] for p in parts], resamples) for name in metrics}
    return {"count": len(rows)} | {name: value for name, (value, _) in found.items()} | {
        "interval": {name: interval for name, (_, interval) in found.items()}}


def group_figures(rows: list[dict], resamples: int) -> dict:
    """All figures of one suite, condition and mode, then the headline figure by kind, constraint and variant."""
    headline = SHOWN[rows[0]["suite"]][:1]
    result = figures(rows, row_parts(rows[0]), resamples)
    result["missing"] = sum(row.get("response") is None for row in rows)
    result["truncated"] = sum(bool(row.get("truncated")) for row in rows)
    for field in ("kind", "constraint", "variant"):
        values = sorted({row[field] for row in rows if row.get(field)})
        result[f"by {field}"] = {value: figures([row for row in rows if row.get(field) == value], headline, resamples)
                                 for value in values}
    parts = collections.defaultdict(list)
    for row in rows:
        for name, strict in zip(row["instruction_id_list"], row["strict"]):
            parts[name].append((strict, 1))
    estimates = {name: (len(found), *estimate(found, resamples)) for name, found in sorted(parts.items())}
    result["by instruction"] = {name: dict(zip(("count", "strict-instruction", "interval"), found))
                                for name, found in estimates.items()}
    return result


def other_prompts(rows: list[dict]) -> list[dict]:
    """The floor that costs nothing: each row with another row's response, by a seeded derangement."""
    order = random.Random("derangement").sample(range(len(rows)), len(rows)) if len(rows) > 1 else []
    return [verdicts(rows[i] | {"response": rows[j].get("response")}) for i, j in zip(order, order[1:] + order[:1])]


def gap_of(typed: list[dict], spoken: list[dict], metric: str, resamples: int) -> dict:
    """Typed minus spoken over the prompts that have both, with the interval of paired resamples."""
    ceiling = {row["item"]: row_parts(row)[metric] for row in typed if "item" in row}
    pairs = [(ceiling[row.get("item")], row_parts(row)[metric]) for row in spoken if row.get("item") in ceiling]
    difference, interval = estimate([(a - b, n) for (a, n), (b, _) in pairs], resamples)
    return {"difference": difference, "interval": interval, "pairs": len(pairs)}


def score_rows(rows: list[dict], resamples: int) -> tuple[list[dict], dict]:
    """Score answered rows; return them with their verdicts, and all figures.

    results[suite][condition][mode] has counts, fractions, intervals and floors (mode: typed, spoken, or floor);
    results[suite][condition]["gap"][metric] is typed minus spoken. A condition without typed rows of its own (the
    wording is the standard one) is held against those of "standard".
    """
    scored = [verdicts(row) for row in rows]
    groups: dict[tuple, list[dict]] = {}
    for row in scored:
        groups.setdefault((row["suite"], row["condition"], mode(row)), []).append(row)
    decodings = {json.dumps(row["decoding"]): row["decoding"] for row in rows if "decoding" in row}
    results = {"suite": "tiny", "warning": WARNING, "rows": len(rows), "bootstrap": resamples,
               "decoding": list(decodings.values()),
               "missing": sum(row.get("response") is None for row in rows),
               "truncated": sum(bool(row.get("truncated")) for row in rows)}
    for (suite, condition, how), group in groups.items():
        place = results.setdefault(suite, {}).setdefault(condition, {})
        place[how] = group_figures(group, resamples)
        if suite == "transcription" or how == "floor":
            continue
        floors = {"other prompts": other_prompts(group), "silence": groups.get((suite, SILENCE, "floor"), []),
                  "nearest training prompt": groups.get((suite, NEAREST, "floor"), [])}
        place[how]["floors"] = {floor: {metric: estimate([row_parts(row)[metric] for row in found], 1)[0]
                                        for metric in SHOWN[suite]} for floor, found in floors.items()}
        typed = groups.get((suite, condition, "typed")) or groups.get((suite, "standard", "typed"))
        if how == "spoken" and typed:
            place["gap"] = {metric: gap_of(typed, group, metric, resamples) for metric in SHOWN[suite]}
    return scored, results


def score_file(c: synth.Config) -> dict:
    """`score=FILE.jsonl`: write FILE.jsonl.scored.jsonl and FILE.jsonl.results.json, both after all is scored."""
    path = Path(c.score)
    scored, results = score_rows(read_rows(path), c.bench.bootstrap)
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in scored]
    synth.write_whole(path.with_name(path.name + ".scored.jsonl"), *lines)
    synth.write_whole(path.with_name(path.name + ".results.json"), json.dumps(results, indent=1).encode())
    return results


# --------------------------------------------------------------------------------------------------
# 4. The tiny suite's prompts
#
# Drawn from the tiny world's test split by the seed: closed-ended instructions in equal numbers of every
# kind, adjustment ones and open-ended ones. A row is one way to ask one of them: typed, or spoken under a
# condition. Rows of one prompt share `item`.
# --------------------------------------------------------------------------------------------------

def draw_tasks(draw: Callable, kinds: list[str], count: int, rng: random.Random) -> list[dict]:
    """Draw `count` different test instructions, the kinds in turn. UserError where the world has fewer."""
    tasks: dict[str, dict] = {}
    vain = 0
    while len(tasks) < count and vain < 1000:
        task, before = draw(rng, "test", [kinds[len(tasks) % len(kinds)]]), len(tasks)
        tasks.setdefault(" ".join(words_of(task["prompt"])), task)
        vain = vain + 1 if len(tasks) == before else 0
    if len(tasks) < count:
        raise UserError(f"The tiny world does not have {count} different test prompts of one suite; lower bench.rows, "
                        "bench.adjustment_rows or bench.open_rows.")
    return list(tasks.values())


def decompose(task: dict) -> dict:
    """An open-ended task's yes/no questions, each with the check that answers it."""
    name, arguments = task["instruction_id_list"][-1], task["kwargs"][-1]
    if name == "tiny:list":
        group = {"group": arguments["group"]}
        asked = [(f"Are exactly {arguments['count']} {arguments['group']} named?", "tiny:count", arguments),
                 (f"Are all of them {arguments['group']}?", "tiny:group", group),
                 ("Are they all different?", "tiny:different", group)]
    else:
        asked = [(f"Are at least two facts about the {arguments['about']} told?", "tiny:two_facts", arguments),
                 (f"Is all of it true of the {arguments['about']}?", "tiny:true", arguments)]
    if task["how"]:
        asked.append((f"Is it answered as asked: {task['how']}?", task["instruction_id_list"][0], task["kwargs"][0]))
    questions, ids, kwargs = map(list, zip(*asked))
    return {"decomposed_questions": questions, "decomposed_checks": {"instruction_id_list": ids, "kwargs": kwargs}}


def row_of(item: str, suite: str, condition: str, task: dict, c: synth.Config, spoken: bool, **extra) -> dict:
    """One row of prompts.jsonl; `extra` overrides."""
    key = f"{item}-{condition.replace(' ', '-')}-{'spoken' if spoken else 'typed'}"
    row = {"key": key, "suite": suite, "condition": condition, "lang": c.synth.lang, "prompt": task["prompt"],
           "audio_path": f"audio/{key}.flac" if spoken else None, "instruction_id_list": task["instruction_id_list"],
           "kwargs": task["kwargs"], "decomposed_questions": [], "reference": task["answer"],
           "item": item, "kind": task["kind"], "constraint": task["constraint"]}
    return row | ({"withdrawn": task["withdrawn"]} if "withdrawn" in task else {}) | extra


def draw_rows(c: synth.Config) -> list[dict]:
    """All rows of the suite but the floors, with the voice of those that are to be spoken."""
    rows, b = [], c.bench
    parts = {"closed": (synth.draw_instruction, synth.CLOSED, b.rows),
             "adjustment": (synth.draw_adjustment, synth.CLOSED, b.adjustment_rows),
             "open": (synth.draw_instruction, list(synth.OPEN), b.open_rows)}
    for suite, (draw, kinds, count) in parts.items():
        rng = random.Random(f"{c.seed} bench {suite}")
        tasks = draw_tasks(draw, kinds, count, rng)
        for n, task in enumerate(rng.sample(tasks, count)):           # or a kind would always meet the same accents
            extra = decompose(task) if suite == "open" else {}
            make = functools.partial(row_of, f"{suite}-{n:04d}", suite, c=c, **extra)
            voice = synth.draw_voice(rng, synth.candidates("test", c.synth), c.synth)
            rows += [make("standard", task=task, spoken=False),
                     make("standard", task=task, spoken=True, voice=voice)]
            if suite == "closed":
                rows += condition_rows(make, task, n, c, rng)
    return rows


def condition_rows(make: Callable, task: dict, n: int, c: synth.Config, rng: random.Random) -> list[dict]:
    """One closed-ended instruction under the four conditions beside standard; noises, accents, styles in turn."""
    b, standard = c.bench, functools.partial(synth.draw_voice, rng, synth.candidates("test", c.synth), c.synth)
    noise, snr = noises(b)[n % len(noises(b))], b.snr[n // len(noises(b)) % len(b.snr)]
    accent, style = b.accents[n % len(b.accents)], list(STYLES)[n % len(STYLES)]
    abroad = synth.draw_voice(rng, synth.candidates("test", c.synth), dataclasses.replace(c.synth, accents=[accent]))
    wording = task | {"prompt": synth.disfluent(task["prompt"], rng)}
    return [make("background noise", task=task, spoken=True, voice=standard(), noise={"kind": noise, "snr": snr},
                 variant=f"{Path(noise).stem} {snr:g} dB"),
            make("accent", task=task, spoken=True, voice=abroad, variant=accent),
            make("paralinguistic", task=task, spoken=True, voice=style_voice(style, c, rng), variant=style),
            make("disfluency", task=wording, spoken=True, voice=standard()),
            make("disfluency", task=wording, spoken=False)]


def style_voice(style: str, c: synth.Config, rng: random.Random) -> dict:
    """A voice that whispers, shouts, …: espeak's parameters drawn from the ranges in STYLES."""
    values = {name: rng.randint(*span) for name, span in STYLES[style].items() if name != "timbres"}
    timbre = rng.choice(STYLES[style].get("timbres") or synth.candidates("test", c.synth))
    return synth.espeak_voice(rng.choice(c.synth.accents), timbre, **values)


def floor_rows(rows: list[dict]) -> list[dict]:
    """For every prompt of the standard condition: one row that is asked by silence, one answered by the training data.

    Silence is as long as the spoken prompt, rounded up to quarters of a second, so that few lengths are asked.
    """
    spoken = [row for row in rows if row["condition"] == "standard" and row["audio_path"]]
    base = [row | {"audio_path": None, "voice": None} for row in spoken]
    return ([row | {"key": f"{row['item']}-silence", "condition": SILENCE, "seconds": -(-row["seconds"] * 4 // 1) / 4}
             for row in base] + [row | {"key": f"{row['item']}-nearest", "condition": NEAREST} for row in base])


def transcription_rows(rows: list[dict]) -> list[dict]:
    """Every closed-ended clip once more, to be written down: what the model hears, apart from what it obeys."""
    clips = [row for row in rows if row["suite"] == "closed" and row["audio_path"]]
    return [row | {"key": f"{row['key']}-transcription", "suite": "transcription", "reference": row["prompt"],
                   "instruction_id_list": [], "kwargs": []} for row in clips]


# --------------------------------------------------------------------------------------------------
# 5. Speaking the prompts
#
# espeak speaks them, whatever engine made the training data: it has the accents and the styles. All in one
# fresh process, in one order, because espeak's state runs on from clip to clip.
# --------------------------------------------------------------------------------------------------

BABBLE_VOICES = 5


@functools.cache
def folder_noises(folder: str) -> list[str]:
    found = sorted(str(path) for path in Path(folder).glob("*") if path.suffix.lower() in (".wav", ".flac", ".ogg"))
    if not found:
        raise UserError(f"bench.noise={folder} holds no .wav, .flac or .ogg file; give a folder of recordings, or null.")
    return found


def noises(b: synth.Bench) -> list[str]:
    return folder_noises(b.noise) if b.noise else ["babble", "pink", "white"]


def noise_of(kind: str, samples: int, clips: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """(samples,) float32 noise: white, pink (power falls as 1/f), babble (other prompts' clips), or a recording."""
    if kind == "babble":
        chosen = [clips[i] / np.sqrt(np.mean(clips[i] ** 2)) for i in rng.choice(len(clips), BABBLE_VOICES)]
        return sum(np.roll(np.resize(clip, samples), rng.integers(samples)) for clip in chosen)
    if kind in ("pink", "white"):
        noise = rng.standard_normal(samples)
        if kind == "white":
            return noise.astype(np.float32)
        spectrum = np.fft.rfft(noise) / np.sqrt(np.maximum(np.arange(samples // 2 + 1), 1))
        return np.fft.irfft(spectrum, samples).astype(np.float32)
    recording = read_recording(kind)
    return np.roll(np.resize(recording, max(samples, len(recording))), rng.integers(len(recording)))[:samples]


@functools.cache
def read_recording(path: str) -> np.ndarray:
    """A recording as (samples,) float32 at 16 kHz, channels averaged. UserError where it is broken or silent."""
    try:
        recording, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise UserError(f"The noise recording {path} cannot be read ({error}); remove it from bench.noise.") from None
    recording = synth.to_16k([recording.mean(1)], rate)[0]
    if not np.any(recording):
        raise UserError(f"The noise recording {path} is empty or silent; remove it from bench.noise.")
    return recording


def speak(c: synth.Config, rows: list[dict], folder: Path) -> list[float]:
    """Speak the rows in order, add their noise, write folder/<audio_path>; return the clips' seconds."""
    torch.set_num_threads(1)
    engine, clean, seconds = synth.load_engine("espeak"), {}, []
    for at in range(0, len(rows), synth.CLIPS_AT_ONCE):
        batch = rows[at:at + synth.CLIPS_AT_ONCE]
        raw, rate = engine([row["prompt"] for row in batch], [row["voice"] for row in batch], c.seed * 1000 + at)
        for row, waveform in zip(batch, synth.to_16k(raw, rate)):
            if row["condition"] == "standard":
                clean[row["item"]] = waveform
            if "noise" in row:
                rng = np.random.default_rng([c.seed, len(seconds)])
                others = [clip for item, clip in clean.items() if item != row["item"]]
                noise, snr = noise_of(row["noise"]["kind"], len(waveform), others, rng), torch.tensor(row["noise"]["snr"])
                mixed = torchaudio.functional.add_noise(torch.from_numpy(waveform), torch.from_numpy(noise), snr)
                waveform = (mixed / max(1.0, float(mixed.abs().max()))).numpy()       # never beyond full scale
            (folder / row["audio_path"]).write_bytes(synth.flac_bytes(synth.to_int16(waveform)))
            seconds.append(round(len(waveform) / RATE, 3))
    return seconds


def speak_job(c: synth.Config, rows: list[dict], folder: Path) -> list[float] | str:
    """`speak` in a process of its own; a UserError comes back as its sentence."""
    try:
        return speak(c, rows, folder)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{folder / 'audio'} could not be written ({error.strerror}); make room, then start again."


def make_prompts(c: synth.Config, folder: Path) -> list[dict]:
    """Read prompts.jsonl, or draw and speak the suite and write it: last, so that one which exists is whole."""
    path = folder / "prompts.jsonl"
    if path.is_file():
        return read_rows(path)
    rows = draw_rows(c)
    spoken = sorted((row for row in rows if row["audio_path"]), key=lambda row: row["condition"] != "standard")
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    with context.Pool(1) as pool:
        seconds = pool.apply(speak_job, (c, spoken, folder))
    if isinstance(seconds, str):
        raise UserError(seconds)
    for row, length in zip(spoken, seconds):
        row |= {"seconds": length, "voice": row["voice"]["id"]}
    rows += floor_rows(rows) + transcription_rows(rows)
    synth.write_whole(path, *(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    return rows


# --------------------------------------------------------------------------------------------------
# 6. Asking the model
#
# Answers are appended batch by batch, so an interrupted benchmark continues with the next batch. The
# floor "nearest training prompt" asks no model: it is what a table of the training dialogues would answer.
# --------------------------------------------------------------------------------------------------

def training_turns(c: synth.Config) -> list[tuple[str, str]]:
    """(question, answer) of every turn in the training corpus, repeated ones left out, in order."""
    turns = {}
    for path in sorted((Path(c.data) / "corpus").glob("train-*.jsonl")):
        for line in path.read_bytes().splitlines():
            messages = json.loads(line).get("messages", [])
            turns |= {(a["content"], b["content"]): None for a, b in zip(messages, messages[1:]) if a["role"] == "user"}
    return list(turns)


def nearest_prompts(prompts: list[str], questions: list[str]) -> list[int]:
    """For each prompt the index of the nearest question: the one with which it shares most words, counted against the
    longer of the two; of equals the one with the smallest word edit distance, and of these the first."""
    ids = {word: i for i, word in enumerate(dict.fromkeys(words_of(" ".join([*questions, *prompts]))))}
    counts = np.zeros((len(questions), len(ids)), np.int16)           # (questions, words)
    for i, question in enumerate(questions):
        np.add.at(counts[i], [ids[word] for word in words_of(question)], 1)
    lengths, found = counts.sum(1), []
    for prompt in map(words_of, prompts):
        common = sum(np.minimum(counts[:, ids[word]], n) for word, n in collections.Counter(prompt).items())
        differ = np.maximum(lengths, len(prompt)) - common            # (questions,)
        found.append(min(map(int, np.flatnonzero(differ == differ.min())), key=lambda i: (
            torchaudio.functional.edit_distance(prompt, words_of(questions[i])), i)))
    return found


def answered_keys(path: Path) -> set[str]:
    """The rows answered so far. A last line that a kill left half-written is cut off."""
    if not path.is_file() or not path.stat().st_size:
        return set()
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return {row["key"] for row in read_rows(path)} if whole else set()


def way(row: dict) -> tuple[int, int, str]:
    """Rows of one suite, condition and mode are asked together, in the order in which the table shows them."""
    return list(SHOWN).index(row["suite"]), [*CONDITIONS, *FLOORS].index(row["condition"]), mode(row)


def ask_rows(c: synth.Config, folder: Path, rows: list[dict]) -> list[dict]:
    """Answer the rows that answers.jsonl lacks; return all answered rows as they stand there."""
    path = folder / "answers.jsonl"
    done, turns = answered_keys(path), training_turns(c)
    todo = sorted((row for row in rows if row["key"] not in done and (turns or row["condition"] != NEAREST)), key=way)
    if todo:
        model, tokenizer = inserter.load_run(c)
        with tqdm(total=len(todo), desc="answers", disable=None) as bar, open(path, "ab") as file:
            for _, group in itertools.groupby(todo, key=way):
                group = list(group)
                for at in range(0, len(group), c.bench.batch):
                    batch = ask_batch(c, folder, group[at:at + c.bench.batch], model, tokenizer, turns)
                    try:
                        file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in batch))
                        file.flush()
                        os.fsync(file.fileno())
                    except OSError as error:
                        raise UserError(f"{path} could not be written ({error.strerror}); make room and start again: "
                                        "what is answered is kept.") from None
                    bar.update(len(batch))
    return read_rows(path)


def ask_batch(c: synth.Config, folder: Path, batch: list[dict], model, tokenizer, turns: list) -> list[dict]:
    """Answer rows of one way of asking; each returns with `response`, `truncated`, and `pred_score` if open-ended."""
    most, first = c.bench.max_tokens, batch[0]
    if first["condition"] == NEAREST:
        nearest = nearest_prompts([row["prompt"] for row in batch], [question for question, _ in turns])
        batch = [row | {"nearest": turns[i][0]} for row, i in zip(batch, nearest)]
        answers = [(turns[i][1], False) for i in nearest]
    else:
        batch = [row | {"decoding": {"method": "greedy", "max_tokens": most}} for row in batch]
        if first["condition"] == SILENCE:
            lengths = sorted({row["seconds"] for row in batch})
            silent = [np.zeros(round(seconds * RATE), np.float32) for seconds in lengths]
            answer_of = dict(zip(lengths, inserter.answer(model, tokenizer, silent, most, c.bench.batch)))
            answers = [answer_of[row["seconds"]] for row in batch]
        elif first["suite"] == "transcription":
            clips = [read_clip(folder, row) for row in batch]
            answers = [(text, False) for text in inserter.transcribe(model, tokenizer, clips, most, c.bench.batch)]
        else:
            questions = [read_clip(folder, row) if row["audio_path"] else row["prompt"] for row in batch]
            answers = inserter.answer(model, tokenizer, questions, most, c.bench.batch)
    batch = [row | {"response": text, "truncated": cut} for row, (text, cut) in zip(batch, answers, strict=True)]
    return [row | {"pred_score": verdicts(row)["pred_score"]} if row["suite"] == "open" else row for row in batch]


def read_clip(folder: Path, row: dict) -> np.ndarray:
    """A prompt's clip: (samples,) float32 at 16 kHz."""
    path = folder / row["audio_path"]
    try:
        return synth.decode_flac(path.read_bytes())
    except (OSError, soundfile.SoundFileError):
        raise UserError(f"The clip {path} is missing or damaged; make the prompts anew with fresh=true.") from None


# --------------------------------------------------------------------------------------------------
# 7. The table and the page
# --------------------------------------------------------------------------------------------------

COLUMNS = ("condition", "figure", "rows", "typed %", "spoken %", "gap", "95 % of the gap", "other prompts", "silence",
           "nearest")
PAGE_BYTES = 11_000_000           # of base64 audio; a page beyond 15 MB opens slowly


def percent(figure: dict | None, metric: str) -> str:
    """61.3 [55.9, 66.6] of {"strict-prompt": 0.613, "interval": …}."""
    if not figure or figure[metric] is None:
        return "-"
    low, high = figure["interval"][metric]
    return f"{100 * figure[metric]:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def conditions_of(results: dict, suite: str) -> dict[str, dict]:
    """A suite's conditions without the floors."""
    return {name: place for name, place in results.get(suite, {}).items() if name not in FLOORS}


def points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def table_rows(results: dict) -> Iterator[list[str]]:
    """The result table as text cells, one row for each condition and figure of each suite."""
    for suite, metrics in SHOWN.items():
        for condition, place in conditions_of(results, suite).items():
            typed = place.get("typed") or conditions_of(results, suite).get("standard", {}).get("typed")
            shown = place.get("spoken") or typed
            floors = shown.get("floors") or {name: dict.fromkeys(metrics) for name in COLUMNS[-3:]}
            for metric in metrics:
                gap = place.get("gap", {}).get(metric, {})
                yield [condition if suite == "closed" else f"{suite}: {condition}", metric, str(shown["count"]),
                       percent(typed, metric), percent(place.get("spoken"), metric), points(gap.get("difference")),
                       " to ".join(map(points, gap.get("interval") or [None])),
                       *(points(floor[metric]) for floor in floors.values())]


def print_table(results: dict) -> None:
    rows = [list(COLUMNS), *table_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    print(results["warning"])
    for row in rows:
        cells = [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells))
    print(f"{results['rows']} rows, {results['truncated']} answers truncated, {results['missing']} missing. Floors: these "
          "answers against other prompts' instructions; the model fed silence; the answer of the nearest training prompt.")


def chart(results: dict) -> str:
    """Closed-ended conditions as bars, typed beside spoken, with 95 % intervals: an inline SVG."""
    places = conditions_of(results, "closed")
    width, height, left, step = 760, 330, 50, 700 / max(len(places), 1)

    def y(share: float) -> float:
        return round(280 - 240 * share, 1)

    marks = [f'<line x1="{left}" x2="{width}" y1="{y(p / 100)}" y2="{y(p / 100)}" class="grid"/>'
             f'<text x="{left - 8}" y="{y(p / 100) + 4}" text-anchor="end">{p}</text>' for p in range(0, 101, 20)]
    for i, (condition, place) in enumerate(places.items()):
        centre = left + step * (i + 0.5)
        both = {"typed": place.get("typed") or places.get("standard", {}).get("typed"), "spoken": place.get("spoken")}
        for offset, (how, figure) in zip((-32, 2), both.items()):
            if figure:
                share, (low, high) = figure["strict-prompt"], figure["interval"]["strict-prompt"]
                x = centre + offset + 15
                marks.append(f'<rect class="{how}" x="{x - 15:.0f}" y="{y(share)}" width="30" height="{280 - y(share):.1f}"/>'
                             f'<path class="whisker" d="M{x:.0f} {y(low)}V{y(high)}m-4 0h8M{x - 4:.0f} {y(low)}h8"/>'
                             f'<text x="{x:.0f}" y="{y(high) - 5}" text-anchor="middle">{100 * share:.0f}</text>')
        marks.append(f'<text x="{centre:.0f}" y="300" text-anchor="middle">{html.escape(condition)}</text>')
    legend = "".join(f'<rect x="{left + 110 * i}" y="4" width="14" height="14" class="{how}"/>'
                     f'<text x="{left + 20 + 110 * i}" y="16">{how}</text>' for i, how in enumerate(("typed", "spoken")))
    note = "strict prompt-level accuracy in percent; whiskers: 95 % bootstrap"
    return (f'<svg viewBox="0 0 {width + 10} {height}" role="img" aria-label="{note}">{legend}{"".join(marks)}'
            f'<text x="{left}" y="324">{note}</text></svg>')


def html_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in
             [("th", header), *(("td", row) for row in rows)]]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def breakdown(results: dict, field: str) -> str:
    """The closed-ended rows' strict prompt-level accuracy by kind, constraint or variant, one column per condition."""
    columns = {condition if how == "floor" else f"{condition}, {how}": place[how][f"by {field}"]
               for condition, place in results.get("closed", {}).items() for how in ("typed", "spoken", "floor")
               if place.get(how, {}).get(f"by {field}")}
    names = sorted({name for found in columns.values() for name in found})
    cells = [[name, *(percent(found.get(name), "strict-prompt") for found in columns.values())] for name in names]
    return html_table([field, *columns], cells)


def cards(scored: list[dict], folder: Path) -> tuple[str, int]:
    """Rows as HTML, the first n of every suite, condition and mode, as many as PAGE_BYTES of audio allow."""
    groups, heard = collections.defaultdict(list), {}
    for row in scored:
        if row["suite"] == "transcription":
            heard[row["audio_path"]] = row["response"]
        else:
            groups[way(row)].append(row)
    shown, used, n = collections.defaultdict(list), 0, 0
    while used < PAGE_BYTES and any(len(rows) > n for rows in groups.values()):
        for key, rows in groups.items():
            if len(rows) > n:
                path = rows[n]["audio_path"]
                audio = base64.b64encode((folder / path).read_bytes()).decode() if path else ""
                shown[key].append(card(rows[n], audio, heard.get(path)))
                used += len(audio)
        n += 1
    return "\n".join(itertools.chain(*shown.values())), n


def card(row: dict, audio: str, heard: str | None) -> str:
    """One row: what is asked and heard, what should and does come, and the verdict of every instruction."""
    judged = list(zip(row["instruction_id_list"], row["kwargs"], row["strict"]))
    if row["suite"] == "open":
        judged = [(question, {}, verdict) for question, verdict in zip(row["decomposed_questions"], row["pred_score"])]
    chips = ""
    for name, arguments, verdict in judged:
        text = " ".join([name, *(f"{key}: {value}" for key, value in arguments.items())])
        chips += f'<span class="{"yes" if verdict else "no"}">{"✓" if verdict else "✗"} {html.escape(text)}</span>'
    notes = [row["key"], row["condition"], mode(row), *(row[name] for name in ("variant", "voice") if row.get(name)),
             *(["truncated"] if row.get("truncated") else [])]
    lines = {"heard as": heard, "nearest training prompt": row.get("nearest"), "answer": row["response"],
             "reference": row["reference"]}
    if all(row.get("withdrawn_strict", [False])):
        lines["follows"] = "what the speaker took back"
    player = f'<audio controls preload="none" src="data:audio/flac;base64,{audio}"></audio>' if audio else ""
    return (f'<section data-condition="{html.escape(row["suite"])}: {html.escape(row["condition"])}, {mode(row)}" '
            f'data-verdict="{"followed" if all(verdict for *_, verdict in judged) else "not followed"}">'
            f'<small>{html.escape(" · ".join(notes))}</small><p class="ask">{html.escape(row["prompt"])}{player}</p>' +
            "".join(f"<p><b>{name}</b> {html.escape(text)}</p>" for name, text in lines.items() if text is not None) +
            f"<p>{chips}</p></section>")


def write_report(c: synth.Config, folder: Path, scored: list[dict], results: dict) -> Path:
    """Write report.html, one page that needs no other file."""
    body, n = cards(scored, folder)
    gap = results["closed"]["standard"]["gap"]["strict-prompt"]["difference"]
    figures = [("gap", f"{points(gap)} points")]
    for suite, how, metric in (("closed", "typed", "strict-prompt"), ("closed", "spoken", "strict-prompt"),
                               ("adjustment", "spoken", "IAR"), ("adjustment", "spoken", "ECR"),
                               ("open", "spoken", "open-score"), ("transcription", "spoken", "WER")):
        figures.append((f"{suite}, {how}: {metric}", percent(results[suite]["standard"][how], metric)))
    page = PAGE.format(title=f"Benchmark of the run {html.escape(c.run)}", warning=html.escape(results["warning"]),
                       figures="".join(f"<div><b>{html.escape(value)}</b>{name}</div>" for name, value in figures),
                       chart=chart(results), table=html_table(COLUMNS, table_rows(results)), rows=body, shown=n,
                       kinds=breakdown(results, "kind"), constraints=breakdown(results, "constraint"),
                       variants=breakdown(results, "variant"), decoding=html.escape(json.dumps(results["decoding"])),
                       truncated=results["truncated"], missing=results["missing"], total=results["rows"])
    synth.write_whole(folder / "report.html", page.encode())
    return folder / "report.html"


# --------------------------------------------------------------------------------------------------
# 8. The command line
# --------------------------------------------------------------------------------------------------

SHAPING = ("lang", "accents", "rate", "pitch", "timbres", "special_timbres", "held_out")     # synth's: the voices


def check_settings(c: synth.Config) -> Path:
    """Find the run's model; return the benchmark's folder, refusing to continue one made by other settings."""
    model, folder, b = Path("runs") / c.run / "model", Path("runs") / c.run / "bench", c.bench
    if not (model / "config.json").is_file():
        raise UserError(f"There is no model in {model}; train it with torchrun inserter.py run={c.run}, or name another.")
    least = min(b.batch, b.max_tokens, b.bootstrap, len(b.snr), len(b.accents))
    if min(b.rows, b.adjustment_rows, b.open_rows) < 2 or least < 1:
        raise UserError("bench.rows, bench.adjustment_rows and bench.open_rows must be at least 2, bench.batch, "
                        "bench.max_tokens and bench.bootstrap at least 1, bench.snr and bench.accents not empty.")
    if known := set(b.accents) & set(c.synth.accents):
        raise UserError(f"bench.accents must not be training's own; take {', '.join(sorted(known))} out.")
    if c.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    digest = hashlib.sha256()
    for path in sorted(path for path in model.iterdir() if path.is_file()):
        digest.update(path.read_bytes())
    settings = {"bench": {k: v for k, v in vars(b).items() if k not in ("batch", "bootstrap")}, "seed": c.seed,
                "synth": {k: v for k, v in vars(c.synth).items() if k in SHAPING}, "model": digest.hexdigest()}
    remedy = "name another run with run=…, or benchmark anew with fresh=true"
    synth.same_settings(folder / "settings.json", settings, (), remedy)
    return folder


def benchmark(c: synth.Config) -> dict:
    folder = check_settings(c)
    rows = ask_rows(c, folder, make_prompts(c, folder))
    scored, results = score_rows(rows, c.bench.bootstrap)
    synth.write_whole(folder / "results.json", json.dumps(results, indent=1).encode())
    write_report(c, folder, scored, results)
    return results


def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments)
    if c.suite != "tiny":
        raise UserError(f"There is no suite {c.suite!r}; the valid one is tiny.")
    print_table(score_file(c) if c.score is not None else benchmark(c))
    print(f"{c.score}.results.json and {c.score}.scored.jsonl are written." if c.score is not None else
          f"runs/{c.run}/bench/report.html is written; open it in a browser to hear the prompts.")


# --------------------------------------------------------------------------------------------------
# Data: the styles of the paralinguistic condition, and the page
# --------------------------------------------------------------------------------------------------

# espeak's parameters are drawn from these ranges; without "timbres", from the timbres that training never hears.
STYLES = {
    "whisper": {"timbres": ["whisper", "whisperf", "caleb"], "rate": (140, 210), "pitch": (30, 70)},
    "shout": {"rate": (140, 180), "pitch": (75, 95), "range": (80, 99), "volume": (250, 300)},
    "child": {"timbres": ["zac", "belinda"], "rate": (150, 190), "pitch": (50, 80), "range": (50, 70)},
    "old": {"timbres": ["grandma", "grandpa", "croak"], "rate": (100, 130), "pitch": (20, 45), "range": (20, 40)},
    "fast": {"rate": (270, 320), "pitch": (30, 70)},
    "slow": {"rate": (85, 105), "pitch": (30, 70)},
}

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: #222 }}
.warning {{ background: #fff3d6; border-left: 4px solid #e08a00; padding: .6em 1em }}
.figures {{ display: flex; flex-wrap: wrap; gap: 1em }} .figures b {{ display: block; font-size: 1.25em }}
.figures div {{ background: #f3f5f8; border-radius: .5em; padding: .6em 1em }}
svg {{ width: 100%; max-width: 52em; font-size: 12px; font-family: inherit }}
.grid {{ stroke: #ddd }} .whisker {{ stroke: #222; fill: none }} .typed {{ fill: #a9b4c2 }} .spoken {{ fill: #2f6fb3 }}
.scroll {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: .85em }}
td, th {{ padding: .25em .7em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }}
td:first-child, th:first-child {{ text-align: left }} section {{ border-top: 1px solid #ccc; padding: .5em 0 }}
section p {{ margin: .2em 0; white-space: pre-wrap }} section small {{ color: #667 }} .ask {{ font-weight: 600 }}
audio {{ height: 2em; width: 19em; vertical-align: middle; margin-left: 1em }} p b {{ color: #888; font-weight: 400 }}
.yes, .no {{ border-radius: .4em; padding: .05em .5em; margin-right: .5em; font-size: .85em }}
.yes {{ background: #dff1e0 }} .no {{ background: #f8dcda }} summary {{ cursor: pointer; color: #456 }}</style>
<h1>{title}</h1><p class="warning">{warning}</p>
<p>Closed-ended prompts, standard condition, strict prompt-level accuracy in percent with 95 % intervals; then the spoken
adjustment, open-ended and transcription figures. ECR and WER: lower is better.</p><div class="figures">{figures}</div>
<h2>Typed against spoken</h2>{chart}<h2>All conditions</h2><div class="scroll">{table}</div>
<p>The last three columns are floors in percent: the same answers scored against other prompts' instructions, the model fed
silence, and the answer of the nearest training prompt. {total} rows, {truncated} answers truncated, {missing} missing.
Decoding: {decoding}.</p>
<h2>By kind of instruction</h2><div class="scroll">{kinds}</div>
<details><summary>By constraint</summary><div class="scroll">{constraints}</div></details>
<details><summary>By noise, accent and style</summary><div class="scroll">{variants}</div></details>
<h2>Rows</h2><p>The first {shown} of every condition, or as many as it has; all are in answers.jsonl.
<select id="condition"><option>all conditions</option></select> <select id="verdict"><option>all verdicts</option>
<option>followed</option><option>not followed</option></select>
<span id="count"></span></p>
{rows}
<script>
const rows = [...document.querySelectorAll("section")], pick = id => document.getElementById(id);
for (const name of new Set(rows.map(r => r.dataset.condition))) pick("condition").add(new Option(name));
function filter() {{
  const [c, v] = ["condition", "verdict"].map(id => pick(id).selectedIndex ? pick(id).value : null);
  for (const r of rows) r.hidden = (c && r.dataset.condition != c) || (v && r.dataset.verdict != v);
  pick("count").textContent = rows.filter(r => !r.hidden).length + " shown";
}}
pick("condition").onchange = pick("verdict").onchange = filter; filter();
</script></html>
"""


if __name__ == "__main__":
    synth.run(main)
