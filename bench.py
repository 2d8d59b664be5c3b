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
    python bench.py score=FILE.jsonl suite=closed       answers to SpeechInstructBench itself; official=true as officially

Every figure is computed from answers.jsonl alone by `score_rows`, the function behind `score=`.
"""
from __future__ import annotations

import ast
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
# Tables of small functions under the instruction ids of SpeechInstructBench, which are IFEval's with Chinese
# added; the arguments are the row's `kwargs`. CHECKS are the benchmark's 25 types as they should be, OFFICIAL
# the same with the official evaluator's faults, TINY those of the tiny suite: its answers are a few words
# long, too short to tell their language, and the ids `tiny:` judge the content, which the tiny world knows.
# Obeying "in capital letters" with a wrong answer is not obeying.
# --------------------------------------------------------------------------------------------------

def words_of(text: str) -> list[str]:
    """Lower-cased words without punctuation: "P.S. It's RED!" -> ["p", "s", "it's", "red"]."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def unmarked(text: str) -> str:
    """Lower-cased, without any punctuation mark, English or Chinese."""
    return text.strip().lower().translate(dict.fromkeys(map(ord, string.punctuation + "，。！？；：“”‘’（）—【】《》〈〉、·")))


def compare(count: int, relation: str, limit: int) -> bool:
    return count < limit if relation == "less than" else count >= limit


def hits(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.I))


@functools.cache
def punkt():
    """The package nltk where it stands with its English sentence model, which the official code uses; else None."""
    try:
        import nltk                    # here: only scoring needs it, and only if it is installed
        return nltk if nltk.sent_tokenize(".") else None
    except (ImportError, LookupError):
        return None


def ends_sentence(mark: re.Match) -> bool:
    """Whether a SENTENCE_MARK ends a sentence: not after "e.g.", an initial, or "3." before a small letter."""
    word, dots, closing, after = mark.groups()
    word, capital = word.lower().lstrip("*'_-"), after[:1].isupper()
    if dots != "." or re.search("[.?!]", closing):
        return capital or not dots.startswith("..")
    if word in ABBREVIATIONS or re.fullmatch(r"(?!p\.(p\.)?s)([a-z]\.)+[a-z]", word):
        return capital and after.lower() in STARTERS or word == "etc" and after[:1].isdigit()
    if re.fullmatch("[a-z]", word):    # an initial, unless it numbers a line: "A. Apples"
        return capital and (after.lower() in STARTERS or not mark.string[:mark.start()].rpartition("\n")[2].strip())
    return not (re.fullmatch(r"[\d.,-]+", word) and after[:1].islower())


def sentence_count(text: str) -> int:
    """Sentences: between 。！ and ？ as soon as one character is Chinese, else as nltk's model or our rule finds them.

    >>> sentence_count("Dr. Mo is in. Is he? Yes, since 3.5 hours.")
    3
    """
    if re.search(CHINESE, text):
        return sum(bool(piece.strip()) for piece in re.split("[。！？]", text))
    if punkt():
        return len(punkt().sent_tokenize(text))
    return bool(text.strip()) + sum(map(ends_sentence, SENTENCE_MARK.finditer(text.strip())))


def word_count(text: str) -> int:
    """Words, or Chinese characters as soon as there is one."""
    return len(re.findall(CHINESE, text)) or len(re.findall(r"\w+", text))


def capital_words(text: str) -> int:
    """Words in capitals, cut up as the Penn Treebank does: "CAN'T STOP" has three, CA, N'T and STOP."""
    if punkt():
        return sum(word.isupper() for word in punkt().word_tokenize(text))
    pieces = re.split(r"""[\s;@#$%&*?!()\[\]{}<>"“”‘’„«»`]+|--+|\.{2,}|[:,](?!\d)""", CONTRACTION.sub(" ", text))
    return sum(piece.isupper() for piece in pieces)


@functools.lru_cache(maxsize=8192)     # the loose variants of an answer are often the same text
def language_of(text: str) -> str | None:
    """The text's language as langdetect names it (zh-cn, zh-tw), always the same; None where it finds none."""
    import langdetect                  # here: only the closed-ended suite needs it
    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


def is_json(text: str) -> bool:
    """JSON, with or without a fence around it."""
    fenced = re.fullmatch("(?:```json)?(?:```Json)?(?:```JSON)?(?:```)?(.*?)(?:```)?", text.strip(), re.S)
    try:
        json.loads(fenced[1].strip())
    except (ValueError, RecursionError):
        return False
    return True


def between(divider: str, text: str) -> list[str]:
    """The texts between dividers (a pattern); nothing if any is empty but the very first and last."""
    parts = [part.strip() for part in re.split(divider, text)]
    return [part for part in parts if part] if all(parts[1:-1]) else []


def two_responses(response: str) -> bool:
    """Two different texts with six asterisks between them."""
    parts = between(r"\*{6}", response)
    return len(parts) == 2 and parts[0] != parts[1]


def highlights(text: str) -> int:
    """Non-empty *sections* and **sections**; the latter count twice where a single asterisk also encloses text."""
    return (sum(bool(found.strip("*").strip()) for found in re.findall(r"\*[^\n*]*\*", text))
            + sum(bool(found[2:-2].strip()) for found in re.findall(r"\*\*[^\n*]*\*\*", text)))


def nth_paragraph_starts(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs stand between empty lines; of one with Chinese in it the first word is a prefix."""
    parts, word = [part.strip() for part in response.split("\n\n")], first_word.lower()
    if sum(map(bool, parts)) != num_paragraphs or not 0 < nth_paragraph <= num_paragraphs:
        return False
    if re.search(CHINESE, paragraph := parts[nth_paragraph - 1]) or not paragraph:
        return bool(paragraph) and paragraph.startswith(word)
    return re.split("[.,?!'\"。，？！‘“”]", paragraph.split()[0].lstrip("'").lstrip('"'))[0].lower() == word


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


CHECKS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation:
        compare(capital_words(text), capital_relation, capital_frequency),
    "change_case:english_capital": lambda text: text.isupper() and language_of(text) == "en",
    "change_case:english_lowercase": lambda text: text.islower() and language_of(text) == "en",
    "combination:repeat_prompt": lambda text, prompt_to_repeat:
        text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    "combination:two_responses": two_responses,
    "detectable_content:number_placeholders": lambda text, num_placeholders:
        len(re.findall(r"[\[【].*?[\]】]", text)) >= num_placeholders,
    "detectable_content:postscript": lambda text, postscript_marker:          # any postscript will do, or the marker
        bool(re.search(rf"\bps\b|\bp\.\s*s\.|\b{re.escape(postscript_marker.strip().lower())}\b", text.lower())),
    "detectable_format:constrained_response": lambda text: any(option in text for option in OPTIONS),
    "detectable_format:json_format": is_json,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections:
        len(re.split(rf"\s?{section_spliter}\s?\d+\s?", text)) > num_sections,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: num_bullets == sum(
        len(re.findall(pattern, text, re.M)) for pattern in (r"^\s*\*[^*].*$", r"^\s*-.*$")),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: highlights(text) >= num_highlights,
    "detectable_format:title": lambda text: any(title.lstrip("<").rstrip(">").strip() for title in
        re.findall(r"<<[^\n]+>>", text.replace("《", "<<").replace("》", ">>"))),
    "keywords:existence": lambda text, keywords: all(hits(word, text) for word in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words: not any(         # \b knows no Chinese words
        word in text or hits(rf"\b{re.escape(word)}\b", text) for word in forbidden_words),
    "keywords:frequency": lambda text, keyword, frequency, relation: compare(hits(keyword, text), relation, frequency),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation:
        compare(text.lower().count(letter.lower()), let_relation, let_frequency),
    "language:response_language": lambda text, language: language_of(text) in CODES.get(language, (language,)),
    "length_constraints:nth_paragraph_first_word": nth_paragraph_starts,
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: len(between(r"\*{3}", text)) == num_paragraphs,
    "length_constraints:number_sentences": lambda text, relation, num_sentences:
        compare(sentence_count(text), relation, num_sentences),
    "length_constraints:number_words": lambda text, relation, num_words: compare(word_count(text), relation, num_words),
    "punctuation:no_comma": lambda text: not re.search("[,，]", text),
    "startend:end_checker": lambda text, end_phrase: unmarked(text).endswith(unmarked(end_phrase)),
    "startend:quotation": lambda text: bool(re.fullmatch(r'\s*["“].*["”]\s*', text, re.S)),
}

# The official code passes text whose language cannot be told.
OFFICIAL = CHECKS | {
    "change_case:english_capital": lambda text: text.isupper() and language_of(text) in ("en", None),
    "change_case:english_lowercase": lambda text: text.islower() and language_of(text) in ("en", None),
    "language:response_language": lambda text, language: language_of(text) in (language, None),
}

TINY = CHECKS | {
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "startend:end_checker": lambda text, end_phrase: text.lower().strip(MARKS).endswith(end_phrase.lower().strip(MARKS)),
    "keywords:forbidden_words": lambda response, forbidden_words:
        not any(hits(rf"\b{re.escape(word)}\b", response) for word in forbidden_words),
    "length_constraints:number_sentences": lambda response, relation, num_sentences:
        compare(len(synth.sentences(response)), relation, num_sentences),
    "detectable_content:postscript": lambda response, postscript_marker:
        bool(re.search(r"\.\s?".join(re.findall(r"\w", postscript_marker.lower())), response.lower())),
    # The words of the kind's domain are exactly those expected, in order: naming all colours, or counting on, fails.
    "tiny:answer": lambda response, kind, words: named(response, domain(kind)) == words,
    "tiny:count": lambda response, group, count: len(set(named(response, synth.GROUPS[group]))) == count,
    "tiny:group": lambda response, group: [] != named(response, known_words()) == named(response, synth.GROUPS[group]),
    "tiny:different": lambda response, group:
        0 < len(named(response, synth.GROUPS[group])) == len(set(named(response, synth.GROUPS[group]))),
    "tiny:list": lambda response, group, count: TINY["tiny:count"](response, group, count)
        and TINY["tiny:group"](response, group) and TINY["tiny:different"](response, group),
    "tiny:two_facts": lambda response, about:
        sum(x == about and synth.FACTS[kind].get(x) == y for kind, x, y in facts(response)) >= 2,
    "tiny:true": lambda response, about: facts(response) != set() and all(
        x == about and synth.FACTS[kind].get(x, y) == y for kind, x, y in facts(response)),
    "tiny:facts": lambda response, about: TINY["tiny:two_facts"](response, about)
        and TINY["tiny:true"](response, about),
}


def given(arguments: dict, official: bool = False) -> dict:
    """Arguments without those that are null: the official files give every instruction all names, most of them null.

    Words that checks look for become patterns that match them as they stand; the official code takes them for patterns.
    """
    pattern = str if official else re.escape
    return {name: value if name not in ("keyword", "keywords", "section_spliter") else
            pattern(value.strip()) if isinstance(value, str) else [pattern(word) for word in value]
            for name, value in arguments.items() if value is not None}


def scorable(arguments: dict, official: bool) -> bool:
    """Whether an instruction with these arguments has a definite verdict.

    The official code drops arguments that are 0 or empty, and for these, as for negative numbers, for a letter outside
    a-z and for a paragraph beyond the last, it draws others at random; at a language it does not list it stops.
    """
    if not official:
        return arguments.get("language", "en") in (LANGUAGES + DETECTED).split()
    negative = [k for k, v in arguments.items() if isinstance(v, int) and v < 0 and k != "capital_frequency"]
    return (all(arguments.values()) and not negative and arguments.get("language", "en") in LANGUAGES.split()
            and re.fullmatch("[a-z]", arguments.get("letter", "a").lower()) is not None
            and arguments.get("nth_paragraph", 0) <= arguments.get("num_paragraphs", 0))


def verdict(texts: Iterable[str], name: str, arguments: dict, official: bool) -> bool | None:
    """Whether any of the texts follows the instruction, by OFFICIAL or by CHECKS; None where it cannot be scored."""
    check, arguments = (OFFICIAL if official else CHECKS)[name], given(arguments, official)
    try:
        return any(check(text, **arguments) for text in texts if text.strip()) if scorable(arguments, official) else None
    except re.error:                   # the official code stops at a keyword that is no regular expression
        return None


def closed_verdicts(row: dict, official: bool) -> dict:
    """A closed-ended row with `strict` and `loose`: True, False or None per instruction.

    Without a response nothing is followed; the official code leaves such a row out.
    """
    ids, response = row["instruction_id_list"], row.get("response")
    if response is None:
        return row | {how: [None if official else False] * len(ids) for how in ("strict", "loose")}
    response = re.sub(r"^<[123]>([\s\S]*)", lambda marked: marked[1].strip(), response)       # as the official code does
    texts = {"strict": [response], "loose": list(dict.fromkeys(loose_variants(response)))}
    return row | {how: [verdict(texts[how], name, arguments, official) for name, arguments in zip(ids, row["kwargs"])]
                  for how in texts}


def follows(response: str, ids: list[str], kwargs: list[dict]) -> list[bool]:
    """One verdict per instruction. Of two responses the content must be right in each.

    >>> follows("It is yellow.", ["change_case:english_capital", "tiny:answer"],
    ...         [{}, {"kind": "colour", "words": ["yellow"]}])
    [False, True]
    """
    pieces = [response]
    if "combination:two_responses" in ids:
        pieces = [piece for piece in response.split("******") if piece.strip()] or [response]
    return [bool(response.strip()) and all(TINY[name](piece, **given(arguments)) for piece in
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

def once(pairs: list[tuple[str, object]]) -> dict:
    """JSON object with every name once; json alone would keep the last and drop the others."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field is named twice")
    return dict(pairs)


def read_rows(path: Path, suite: str = "tiny") -> list[dict]:
    """Read and check rows. UserError names the file and the line of the first bad one."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a file of answered rows.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line.decode("utf-8"), object_pairs_hook=once))
            json.dumps(rows[-1], ensure_ascii=False).encode()         # half of a surrogate pair could not be written
        except (ValueError, RecursionError) as error:                 # JSON's and UTF-8's errors are ValueErrors
            raise UserError(f"{path} line {number} is not JSON in UTF-8 ({error}); mend or remove it.") from None
        check_row(rows[-1], f"{path} line {number}", suite)
    if not rows:
        raise UserError(f"{path} holds no rows; give a file with one JSON object per line.")
    if suite in ("open", "adjustment") and all(row.get("pred_score") is None for row in rows):
        raise UserError(f"{path} has no row with pred_score, the votes of a judge, by which suite={suite} is scored.")
    return rows


def check_row(row, where: str, suite: str = "tiny") -> None:
    """Refuse a row that cannot be scored."""
    for name, kind in SUITES[suite].items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise UserError(f"{where} has no {name} of type {kind.__name__}; every row needs {', '.join(SUITES[suite])}.")
    for name in ("response", "audio_path", "item", "kind", "constraint", "variant")[:None if suite == "tiny" else 1]:
        if not isinstance(row.get(name), str | None):
            raise UserError(f"{where}: {name} must be text, or null where there is none.")
    if suite != "tiny":
        return check_instructions(row, where, CHECKS) if suite == "closed" else None
    if row["suite"] not in NEEDS:
        raise UserError(f"{where} has the unknown suite {row['suite']!r}; valid ones are {', '.join(NEEDS)}.")
    if (need := NEEDS[row["suite"]]) and not isinstance(row.get(need), str if need == "reference" else dict):
        raise UserError(f"{where} has no {need}, which rows of {row['suite']} need; keep the fields of prompts.jsonl.")
    check_instructions(row, where)
    if need and need != "reference":
        check_instructions(row[need], f"{where}, {need}")


def check_instructions(checks: dict, where: str, table: dict[str, Callable] = TINY) -> None:
    """Ids that the table knows, one dict of arguments each, of the types that ARGUMENTS lists."""
    ids, kwargs = checks.get("instruction_id_list"), checks.get("kwargs")
    if not isinstance(ids, list) or not isinstance(kwargs, list) or len(ids) != len(kwargs) or not (ids or table is TINY):
        raise UserError(f"{where}: instruction_id_list and kwargs must be lists of the same length, and not empty.")
    for name, arguments in zip(ids, kwargs):
        if not isinstance(name, str) or name not in table:
            raise UserError(f"{where} has the unknown instruction {name!r}; {synth.nearest(name, table)}.")
        _, *wanted = inspect.signature(table[name]).parameters        # the first is the response
        if not isinstance(arguments, dict) or {k for k, v in arguments.items() if v is not None} != set(wanted):
            raise UserError(f"{where}: kwargs of {name} must be {{{', '.join(wanted)}}}, not {arguments!r}.")
        for key in wanted:
            synth.settle(ARGUMENTS[key], arguments[key], f"kwargs.{key} of {name}", where)
            if key.endswith("relation") and arguments[key] not in ("less than", "at least"):
                raise UserError(f"{where}: kwargs.{key} of {name} must be 'less than' or 'at least'.")


# --------------------------------------------------------------------------------------------------
# 3. Figures
#
# Every figure is a ratio of sums over rows, so one bootstrap over rows serves them all: draw n rows of n
# with replacement, some thousand times, and keep the middle 95 % of the ratios. The seed here is not the
# run's, so that the same answers give the same figures everywhere. Beside each figure stand three floors.
# --------------------------------------------------------------------------------------------------

CONDITIONS = ("standard", "background noise", "accent", "paralinguistic", "disfluency")
FLOORS = SILENCE, NEAREST = "floor: silence", "floor: nearest training prompt"


def mode(row: dict) -> str:
    return "floor" if row["condition"] in FLOORS else "spoken" if row.get("audio_path") else "typed"


@functools.lru_cache(maxsize=128)
def resamples_of(n: int, resamples: int) -> np.ndarray:
    """How often each of n rows was drawn in each resample: (resamples, n), float64 so that sums of counts are exact."""
    return np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def ratios_of(parts: list[tuple[float, float]], resamples: int) -> tuple[float | None, np.ndarray | None]:
    """Ratio of sums over all rows and in each resample: (resamples,), nan where the denominator is 0 there."""
    top, bottom = np.array(parts, float).reshape(-1, 2).T             # (rows,) each
    if not bottom.sum():
        return None, None
    weights = resamples_of(len(top), resamples)
    above, below = weights @ top, weights @ bottom
    return float(top.sum() / bottom.sum()), np.divide(above, below, out=np.full(resamples, np.nan), where=below > 0)


def middle(values: np.ndarray | None) -> list[float] | None:
    return None if values is None else np.percentile(values[~np.isnan(values)], [2.5, 97.5]).round(6).tolist()


def with_intervals(found: dict[str, tuple[float | None, list[float] | None]]) -> dict:
    """{"strict-prompt": 0.61, …, "interval": {"strict-prompt": [0.55, 0.66], …}} of figures, each with its interval."""
    return {name: value for name, (value, _) in found.items()} | {
        "interval": {name: interval for name, (_, interval) in found.items()}}


def estimate(parts: list[tuple[float, float]], resamples: int, digits: int = 6) -> tuple[float | None, list | None]:
    """Ratio of sums with its 95 % bootstrap interval, from one (numerator, denominator) per row.

    >>> estimate([(1, 1), (1, 1), (0, 1), (1, 1)], 2000)
    (0.75, [0.25, 1.0])
    """
    value, ratios = ratios_of(parts, resamples)
    return value if value is None else round(value, digits), middle(ratios)


def closed_parts(row: dict) -> dict[str, tuple[float, float]]:
    """Strict, loose and mean figures of a row. A verdict of None leaves the instructions, its row the prompts."""
    parts = {}
    for how in ("strict", "loose"):
        known = [verdict for verdict in row[how] if verdict is not None]
        parts[f"{how}-prompt"] = (all(known), 1) if len(known) == len(row[how]) else (0, 0)
        parts[f"{how}-instruction"] = sum(known), len(known)
    for level in ("prompt", "instruction"):
        (strict, count), (loose, _) = parts[f"strict-{level}"], parts[f"loose-{level}"]
        parts[f"mean-{level}"] = (strict + loose) / 2, count
    return parts


def row_parts(row: dict) -> dict[str, tuple[float, float]]:
    """What a scored row adds to each figure: metric -> (numerator, denominator)."""
    if row["suite"] == "transcription":
        heard, said = words_of(row.get("response") or ""), words_of(row["reference"])
        return {"WER": (torchaudio.functional.edit_distance(said, heard), len(said))}
    parts = closed_parts(row)
    if row["suite"] == "adjustment":   # IAR: follows the correction; ECR: what was taken back (lower is better)
        parts |= {"IAR": parts["strict-prompt"], "ECR": (all(row["withdrawn_strict"]), 1)}
    if row["suite"] == "open":
        parts["open-score"] = (sum(row["pred_score"]), len(row["pred_score"]))
    return parts


def figures(rows: list[dict], metrics: Iterable[str], resamples: int) -> dict:
    """{"count": 320, "strict-prompt": 0.61, …, "interval": {"strict-prompt": [0.55, 0.66], …}} of scored rows."""
    parts = [row_parts(row) for row in rows]
    return {"count": len(rows)} | with_intervals({m: estimate([p[m] for p in parts], resamples) for m in metrics})


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
    parts = {name: [(strict, 1) for row in rows for each, strict in zip(row["instruction_id_list"], row["strict"])
                    if each == name] for name in sorted({name for row in rows for name in row["instruction_id_list"]})}
    result["by instruction"] = {name: dict(zip(("count", "strict-instruction", "interval"), (
        len(found), *estimate(found, resamples)))) for name, found in parts.items()}
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


def score_file(c: synth.Settings) -> dict:
    """`score=FILE.jsonl`: write FILE.jsonl.scored.jsonl and FILE.jsonl.results.json, both after all is scored."""
    path = Path(c.score)
    scored, results = score_rows(read_rows(path), c.bench.bootstrap)
    write_scores(path, scored, results)
    return results


def write_scores(path: Path, scored: list[dict], results: dict) -> None:
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in scored]
    synth.write_whole(path.with_name(path.name + ".scored.jsonl"), *lines)
    synth.write_whole(path.with_name(path.name + ".results.json"), json.dumps(results, indent=1).encode())


# --------------------------------------------------------------------------------------------------
# 4. Any system's answers to the benchmark itself
#
# Closed-ended answers are scored by the checks above. Open-ended and adjustment rows carry the votes of a judge
# in `pred_score`: per question the majority counts, and beside each score stands the share of rows it covers.
# --------------------------------------------------------------------------------------------------


def parsed(value):
    """What a text says as JSON object, or as list in JSON or Python; None where it says nothing; no text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return (json.loads if value.strip().startswith("{") else ast.literal_eval)(value.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def vote_of(vote, suite: str) -> list[str] | None:
    """A judge's vote as one YES or NO per question, for adjustment rows per name in JUDGED; None where it is malformed.

    >>> vote_of("['YES', 'no']", "open")
    ['YES', 'NO']
    """
    vote = parsed(vote)
    if suite == "adjustment":
        vote = [vote.get(name) for name in JUDGED] if isinstance(vote, dict) else None
    vote = vote if isinstance(vote, list) else []
    words = ["YES" if word is True else "NO" if word is False else str(word).strip().upper() for word in vote]
    return words if words and set(words) <= {"YES", "NO"} else None


def judged_verdicts(row: dict, suite: str, official: bool) -> dict:
    """A judged row with `majority` (True or False per question, none without a vote), `votes`, `malformed` and `ties`.

    YES needs more than half of the well-formed votes, so a tie is NO; in the official code the first vote decides it. A
    vote of the wrong length is malformed; where the number of questions is not known, that of the longest vote is right.
    Without a response every question is NO; the official code leaves the row out.

    >>> votes = ["['YES', 'NO']", "['YES', 'YES']", "['NO', 'NO']", "I would say YES"]
    >>> row = judged_verdicts({"response": "a", "pred_score": votes}, "open", False)
    >>> row["majority"], row["malformed"]
    ([True, False], 1)
    """
    raw, questions = parsed(row.get("pred_score")), parsed(row.get("decomposed_questions"))
    raw = raw if isinstance(raw, list) and not vote_of(raw, suite) else [] if row.get("pred_score") is None else [raw]
    questions = JUDGED if suite == "adjustment" else questions if isinstance(questions, list) and not official else ()
    if row.get("response") is None:
        return row | dict(majority=[] if official else [False] * max(1, len(questions)), votes=0, malformed=0, ties=0)
    votes = [vote for vote in (vote_of(one, suite) for one in raw) if vote]
    votes = [vote for vote in votes if len(vote) == (len(questions) or max(map(len, votes)))]
    yes = [sum(word == "YES" for word in column) - len(votes) / 2 for column in zip(*votes)]
    return row | {"majority": [n > 0 or official and n == 0 and votes[0][i] == "YES" for i, n in enumerate(yes)],
                  "votes": len(raw), "malformed": len(raw) - len(votes), "ties": yes.count(0)}


def answer_parts(row: dict, suite: str) -> dict[str, tuple[float, float]]:
    """What a scored row adds to each figure, its own types of instruction among them: metric -> (numerator, denominator).

    IAR: the correction is followed and the content right; ECR: what was taken back is followed (lower is better).
    """
    if suite == "closed":
        parts = closed_parts(row)
        for name, how in itertools.product(set(row["instruction_id_list"]), ("strict", "loose")):
            found = [verdict for each, verdict in zip(row["instruction_id_list"], row[how]) if each == name]
            parts[f"{name} {how}"] = found.count(True), len(found) - found.count(None)
    elif not (majority := row["majority"]):
        parts = dict.fromkeys(METRICS[suite], (0, 0))
    elif suite == "open":
        parts = {"prompt": (all(majority), 1), "instruction": (sum(majority), len(majority))}
    else:
        parts = {"IAR": (all(majority[:2]), 1), "ECR": (majority[2], 1)}
    return parts | {"coverage": (parts[METRICS[suite][0]][1], 1)}


def score_answers(rows: list[dict], c: synth.Settings) -> tuple[list[dict], list[dict], dict]:
    """Score one system's rows: the rows with their verdicts, what each adds to the figures, and the figures."""
    closed = c.suite == "closed"
    scored = [closed_verdicts(row, c.official) if closed else judged_verdicts(row, c.suite, c.official) for row in rows]
    parts = [answer_parts(row, c.suite) for row in scored]
    types = sorted({name for row in rows if closed for name in row["instruction_id_list"]})
    names = [*METRICS[c.suite], "coverage", *(f"{name} {how}" for name in types for how in ("strict", "loose"))]
    columns = {name: [part.get(name, (0, 0)) for part in parts] for name in names}
    answered = [row for row in scored if row.get("response") is not None]
    unscored = [row["strict"].count(None) for row in answered if closed]
    counts = {name: sum(row[name] for row in scored) for name in ("votes", "malformed", "ties")} if not closed else {
        "unscored-instructions": sum(unscored), "unscored-rows": sum(map(bool, unscored)),
        "tokenizer": "nltk punkt_tab" if punkt() else "rule"}
    return scored, parts, {
        "suite": c.suite, "official": c.official, "rows": len(rows), "missing": len(rows) - len(answered), **counts,
        "bootstrap": c.bench.bootstrap, "count": {name: sum(n for _, n in column) for name, column in columns.items()},
        **with_intervals({name: estimate(column, c.bench.bootstrap, digits=17) for name, column in columns.items()})}


def numbered(rows: list[dict]) -> dict[tuple[str, int], int]:
    """(key as JSON, how many rows before have it) -> index of the row."""
    counts = collections.defaultdict(itertools.count)
    return {(key, next(counts[key])): i for i, key in enumerate(json.dumps(row.get("key")) for row in rows)}


def differences(paths: list[Path], systems: list[list[dict]], parts: list[list[dict]], resamples: int) -> dict:
    """The first system's figures minus the second's with the interval of paired resamples; rows pair by key and its
    n-th occurrence. UserError for a row without a partner."""
    keys, found = list(map(numbered, systems)), {}
    for i, j in ((0, 1), (1, 0)):
        if alone := [f"line {row + 1} (key {key})" for (key, n), row in keys[i].items()
                     if (key, n) not in keys[j] or key == "null"]:
            raise UserError(f"{paths[i]} {alone[0]} has no partner in {paths[j]}; rows pair by key and its n-th occurrence.")
    pairs = [(parts[0][row], parts[1][keys[1][key]]) for key, row in keys[0].items()]
    for name in dict.fromkeys(itertools.chain(*parts[0], *parts[1])):
        (a, many), (b, others) = (ratios_of([part.get(name, (0, 0)) for part in side], resamples) for side in zip(*pairs))
        found[name] = (None, None) if a is None or b is None else (a - b, middle(many - others))
    return {"to": str(paths[1]), "pairs": len(pairs)} | with_intervals(found)


def score_systems(c: synth.Settings) -> None:
    """`score=A.jsonl[,B.jsonl]`: write and print the figures of one system, or of two and their difference (in A's)."""
    paths = [Path(c.score)] if Path(c.score).is_file() else list(map(Path, c.score.split(",")))
    if len(paths) > 2 or c.bench.bootstrap < 100:
        raise UserError("score= takes one file, or two with a comma between them, and bench.bootstrap is at least 100.")
    systems = [read_rows(path, c.suite) for path in paths]
    scored, parts, results = zip(*(score_answers(rows, c) for rows in systems))
    if len(paths) == 2:
        results[0]["difference"] = differences(paths, systems, parts, c.bench.bootstrap)
    for path, found, figure in zip(paths[::-1], scored[::-1], results[::-1]):      # the first holds the difference
        write_scores(path, found, figure)
    print_scores(c, paths, results)


# --------------------------------------------------------------------------------------------------
# 5. The tiny suite's prompts
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


def row_of(item: str, suite: str, condition: str, task: dict, c: synth.Settings, spoken: bool, **extra) -> dict:
    """One row of prompts.jsonl; `extra` overrides."""
    key = f"{item}-{condition.replace(' ', '-')}-{'spoken' if spoken else 'typed'}"
    row = {"key": key, "suite": suite, "condition": condition, "lang": c.synth.lang, "prompt": task["prompt"],
           "audio_path": f"audio/{key}.flac" if spoken else None, "instruction_id_list": task["instruction_id_list"],
           "kwargs": task["kwargs"], "decomposed_questions": [], "reference": task["answer"],
           "item": item, "kind": task["kind"], "constraint": task["constraint"]}
    return row | ({"withdrawn": task["withdrawn"]} if "withdrawn" in task else {}) | extra


def draw_rows(c: synth.Settings) -> list[dict]:
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


def condition_rows(make: Callable, task: dict, n: int, c: synth.Settings, rng: random.Random) -> list[dict]:
    """One closed-ended instruction under the four conditions beside standard; noises, accents, styles in turn."""
    b, standard = c.bench, functools.partial(synth.draw_voice, rng, synth.candidates("test", c.synth), c.synth)
    noise, snr = noises(b)[n % len(noises(b))], b.snr[n // len(noises(b)) % len(b.snr)]
    accent, style = b.accents[n % len(b.accents)], list(STYLES)[n % len(STYLES)]
    abroad = synth.draw_voice(rng, synth.candidates("test", c.synth), synth.Settings(c.synth | {"accents": [accent]}))
    wording = task | {"prompt": synth.disfluent(task["prompt"], rng)}
    return [make("background noise", task=task, spoken=True, voice=standard(), noise={"kind": noise, "snr": snr},
                 variant=f"{Path(noise).stem} {snr:g} dB"),
            make("accent", task=task, spoken=True, voice=abroad, variant=accent),
            make("paralinguistic", task=task, spoken=True, voice=style_voice(style, c, rng), variant=style),
            make("disfluency", task=wording, spoken=True, voice=standard()),
            make("disfluency", task=wording, spoken=False)]


def style_voice(style: str, c: synth.Settings, rng: random.Random) -> dict:
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
# 6. Speaking the prompts
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


def noises(b: synth.Settings) -> list[str]:
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


def speak(c: synth.Settings, rows: list[dict], folder: Path) -> list[float]:
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


def speak_job(c: synth.Settings, rows: list[dict], folder: Path) -> list[float] | str:
    """`speak` in a process of its own; a UserError comes back as its sentence."""
    try:
        return speak(c, rows, folder)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{folder / 'audio'} could not be written ({error.strerror}); make room, then start again."


def make_prompts(c: synth.Settings, folder: Path) -> list[dict]:
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
# 7. Asking the model
#
# Answers are appended batch by batch, so an interrupted benchmark continues with the next batch. The
# floor "nearest training prompt" asks no model: it is what a table of the training dialogues would answer.
# --------------------------------------------------------------------------------------------------

def training_turns(c: synth.Settings) -> list[tuple[str, str]]:
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


def ask_rows(c: synth.Settings, folder: Path, rows: list[dict]) -> list[dict]:
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


def ask_batch(c: synth.Settings, folder: Path, batch: list[dict], model, tokenizer, turns: list) -> list[dict]:
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
# 8. The table and the page
# --------------------------------------------------------------------------------------------------

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


def print_aligned(rows: list[list[str]], left: int) -> None:
    """Rows of cells in columns, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join((str.ljust if i < left else str.rjust)(row[i], width) for i, width in enumerate(widths)))


def print_scores(c: synth.Settings, paths: list[Path], results: list[dict]) -> None:
    """Percent with 95 % intervals; closed-ended types of instruction one by one; published rows where asked for."""
    for path, found in zip(paths, results):
        print(", ".join(f"{name} {value}" for name, value in found.items() if isinstance(value, str | int)),
              f"\n{path}.results.json and {path}.scored.jsonl are written.")
    titles, columns = [path.name for path in paths], list(results)
    if "difference" in results[0]:
        titles, columns = [*titles, "difference"], [*columns, results[0]["difference"]]
    print_aligned([["percent", *titles], *([name, *(percent({name: None} | found, name) for found in columns)]
                                           for name in results[0]["count"] | results[-1]["count"])], 1)
    if c.published:
        header, at = PUBLISHED_COLUMNS.split(), slice(*PUBLISHED_SPAN[c.suite])
        print(f"Published, P for prompt-level, I for instruction-level; source: {PUBLISHED_SOURCE}")
        print_aligned([["", "", *header[at]], *(line.split()[:2] + line.split()[2:][at] for line in PUBLISHED)], 2)


def print_table(results: dict) -> None:
    print(results["warning"])
    print_aligned([list(COLUMNS), *table_rows(results)], 2)
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


def write_report(c: synth.Settings, folder: Path, scored: list[dict], results: dict) -> Path:
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
# 9. The command line
# --------------------------------------------------------------------------------------------------

SHAPING = ("lang", "accents", "rate", "pitch", "timbres", "special_timbres", "held_out")     # synth's: the voices


def check_settings(c: synth.Settings) -> Path:
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
    settings = {"bench": {k: v for k, v in b.items() if k not in ("batch", "bootstrap")}, "seed": c.seed,
                "synth": {k: v for k, v in c.synth.items() if k in SHAPING}, "model": digest.hexdigest()}
    remedy = "name another run with run=…, or benchmark anew with fresh=true"
    synth.same_settings(folder / "settings.json", settings, (), remedy)
    return folder


def benchmark(c: synth.Settings) -> dict:
    folder = check_settings(c)
    rows = ask_rows(c, folder, make_prompts(c, folder))
    scored, results = score_rows(rows, c.bench.bootstrap)
    synth.write_whole(folder / "results.json", json.dumps(results, indent=1).encode())
    write_report(c, folder, scored, results)
    return results


def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments)
    if c.suite not in SUITES:
        raise UserError(f"There is no suite {c.suite!r}; valid ones are {', '.join(SUITES)}.")
    if c.score is None and c.suite != "tiny" or c.suite == "tiny" and (c.official or c.published):
        raise UserError("suite=closed, open or adjustment needs score=FILE.jsonl; official and published need these suites.")
    if c.suite != "tiny":
        return score_systems(c)
    print_table(score_file(c) if c.score is not None else benchmark(c))
    print(f"{c.score}.results.json and {c.score}.scored.jsonl are written." if c.score is not None else
          f"runs/{c.run}/bench/report.html is written; open it in a browser to hear the prompts.")


# --------------------------------------------------------------------------------------------------
# Data: what the checks look up, published scores, the styles of the paralinguistic condition, and the page
# --------------------------------------------------------------------------------------------------

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.", "我的答案是是的。", "我的答案是不是。", "我的答案是可能。")

# What every row must have, and the types of all arguments of all checks
NEEDS = {"closed": None, "adjustment": "withdrawn", "open": "decomposed_checks", "transcription": "reference"}
CHECKED = {"prompt": str, "instruction_id_list": list, "kwargs": list}
SUITES = {"tiny": {"suite": str, "condition": str} | CHECKED, "closed": CHECKED, "open": {"prompt": str},
          "adjustment": {"prompt": str}}
ARGUMENTS = (dict.fromkeys("forbidden_words keywords words".split(), list[str]) | dict.fromkeys((
    "capital_frequency count frequency let_frequency nth_paragraph num_bullets num_highlights num_paragraphs "
    "num_placeholders num_sections num_sentences num_words").split(), int) | dict.fromkeys((
    "about capital_relation end_phrase first_word group keyword kind language let_relation letter postscript_marker "
    "prompt_to_repeat relation section_spliter").split(), str))

# The languages that the official code lists, and the others that langdetect tells apart, Chinese also as plain zh.
LANGUAGES = "en es pt ar hi fr ru de ja it bn uk th ur ta te bg ko pl he fa vi ne sw kn mr gu pa ml fi"
CODES = {"zh": ("zh-cn", "zh-tw")}
DETECTED = " zh zh-cn zh-tw af ca cs cy da el et hr hu id lt lv mk nl no ro sk sl so sq sv tl tr"

# The figures of each suite, and what a judge says of an adjustment row
METRICS = {"closed": [f"{how}-{level}" for how in ("strict", "loose", "mean") for level in ("prompt", "instruction")],
           "open": ["prompt", "instruction"], "adjustment": ["IAR", "ECR"]}
JUDGED = ("follow_after_adjust", "after_adjust_content_correct", "follow_before_adjust")

# For counting sentences without nltk's model. After an abbreviation a sentence ends only before a word that often
# starts one; "v" and "x" are rather numerals than initials.
ABBREVIATIONS = set("""al approx apr aug ca capt cf co col corp dec dept dr est etc feb fig ft gen gov hon inc jan jr lt ltd
    mr mrs ms mt no nov oct prof rep rev sen sept sgt sr st v vol vs x""".split())
STARTERS = set("""a after all also an and as at before but do during each every first for from he her here his how however i
    if in it its let my no now on once one our please remember she so some that the their then there these they this
    those to we what when where which while who why with yes you your""".split())

CHINESE = "[\u4e00-\u9fff]"
MARKS = string.punctuation + string.whitespace + "“”"

# A mark that may end a sentence: the word before it, the mark, closing marks (more may follow), the word after.
SENTENCE_MARK = re.compile(r"""([^\s"(\[{*]{0,40}?)(\.{2,}|[.?!])([.?!)\]}"']*)(?!["')\]}\s]*$)"""
                           r"""(?:\s+|(?=\*)|(?<=["')\]}])(?=[^\w\s]))(?=[^\w\s]*(\w*))""")

# Where a contraction is cut: can|'t is CA|N'T in capitals
CONTRACTION = re.compile(r"(?i)(?<=[^' ])(?=('[smd]|'ll|'re|'ve|n't)(?![\w']))|(?<=\bcan)(?=not\b)|(?<=\bgim|\blem)(?=me\b)"
                         r"|(?<=\bgon|\bwan)(?=na\b)|(?<=\bgot)(?=ta\b)")

# The tiny suite's table, and the figures it shows, the headline first
SHOWN = {"closed": ["strict-prompt"], "adjustment": ["IAR", "ECR"], "open": ["open-score", "strict-prompt"],
         "transcription": ["WER"]}
COLUMNS = ("condition", "figure", "rows", "typed %", "spoken %", "gap", "95 % of the gap", "other prompts", "silence",
           "nearest")
WARNING = ("Tiny-suite figures: made by a toy world and its rules, never to stand beside published "
           "SpeechInstructBench scores.")

# The leaderboard of the official repository, in percent: closed-ended prompt- and instruction-level accuracy under
# the five conditions, open-ended prompt- and instruction-level accuracy, adjustment IAR and ECR.
PUBLISHED_SOURCE = "README of github.com/dingdongwang/SpeechInstructBench, 2025"
PUBLISHED_COLUMNS = """standard-P standard-I background-P background-I accent-P accent-I paralinguistic-P paralinguistic-I
    disfluency-P disfluency-I open-P open-I IAR ECR"""
PUBLISHED_SPAN = {"closed": (0, 10), "open": (10, 12), "adjustment": (12, 14)}
PUBLISHED = """English BLSP         14.97 24.17  13.76 23.46  13.28 22.89  13.65 23.60  13.10 22.88  11.78 21.55  35.45 35.05
English GLM-4-Voice  18.28 29.39  17.29 27.89  20.37 31.11  20.04 31.75  18.83 30.18  28.17 52.05  77.91 24.89
English Mini-Omni2    7.04 16.52   7.26 16.52   7.80 16.91   6.16 15.59   7.92 16.30   3.23  6.84  12.80 21.20
English Mini-Omni     8.14 16.73   9.25 17.74   8.37 16.88   8.14 18.02   8.23 17.52   1.15  1.70   7.31 18.69
English Megrez       19.49 31.04  17.51 28.96  18.31 29.18  19.02 30.53  19.28 28.67  37.27 64.35  55.06 31.98
English DIVA         27.64 37.26  26.32 36.69  26.49 36.26  27.97 37.91  19.16 27.89  33.64 61.12  58.94 33.73
English Qwen2-Audio  19.82 30.18  18.17 28.82  18.59 28.81  20.70 31.33  15.19 24.67  31.40 58.14  48.60 37.45
English InSerter     39.75 51.35  37.56 49.87  37.34 48.24  35.79 46.85  36.38 47.28  40.87 67.33  80.72 23.28
Chinese GLM-4-Voice  18.31 26.72  16.58 23.99  12.64 20.86  17.28 25.76  14.51 22.87  39.03 56.52  81.27 13.15
Chinese Megrez       18.31 27.84  17.16 26.32  17.26 26.01  18.43 27.97  16.58 25.76  31.69 39.27  63.34 17.53
Chinese DIVA         15.86 26.43  17.05 25.92  11.71 21.18  15.55 24.87  14.97 24.31  10.62 31.10  25.94 13.39
Chinese Qwen2-Audio  19.23 28.97  18.89 28.49  17.99 26.99  18.77 26.48  18.77 26.48  40.64 64.37  64.00 23.20
Chinese InSerter     32.71 42.37  32.60 42.30  27.95 36.15  33.99 43.18  32.48 41.33  50.58 68.32  84.06 12.10""".splitlines()

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
