"""The verdicts of SpeechInstructBench's own evaluator, with its faults, and its sentence model.

bench.py judges by what an instruction says. The official evaluator differs where it is at fault:

- It drops arguments that are 0 or empty and draws others at random; so it does for negative numbers, for a
  letter outside a-z, and for a paragraph beyond the last. Here these have no verdict.
- It stops at a language that it does not list, "zh" for one, and at a keyword that is no regular expression:
  no verdict.
- A text whose language cannot be told follows every instruction about its language.
- Keywords and the names of sections are patterns: "d.y" is found in "day", "so" in "also".
- One Chinese character makes a text Chinese, "---" is a bullet, NaN is JSON, two empty lines make an empty
  paragraph, and an end phrase of marks alone is found everywhere.
- A row without an answer is left out, and is no failure.
- Where a judge's votes are divided evenly, the first one decides.

Its sentences and words in capitals are those of nltk, whose model is a download of its own:
python -m nltk.downloader punkt_tab. Where it is missing, bench.py's rule stands in, and that is said.

    python extras/official.py score=A.jsonl suite=closed            to stand beside published scores
    python extras/official.py score=A.jsonl,B.jsonl suite=closed
    python extras/official.py prompts=FOLDER judge=ADDRESS,MODEL    ask the run, and score it so
    python extras/official.py conformance=closed.jsonl.gz           compare with the evaluator's own verdicts
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import collections                                                    # noqa: E402
import functools                                                      # noqa: E402
import gzip                                                           # noqa: E402
import json                                                           # noqa: E402
import re                                                             # noqa: E402
import string                                                         # noqa: E402
from collections.abc import Callable                                  # noqa: E402
from types import ModuleType                                          # noqa: E402

import bench                                                          # noqa: E402
import synth                                                          # noqa: E402

# The languages that the official code lists.
LANGUAGES = set("""en es pt ar hi fr ru de ja it bn uk th ur ta te bg ko pl he fa vi ne sw kn mr gu pa ml
    fi""".split())


# --------------------------------------------------------------------------------------------------
# 1. Sentences and words
# --------------------------------------------------------------------------------------------------

@functools.cache
def punkt() -> ModuleType | None:
    """The package nltk where it stands with its English sentence model, else None."""
    try:
        import nltk                    # here: it may be missing
        return nltk if nltk.sent_tokenize(".") else None
    except (ImportError, LookupError):
        return None


def sentence_count(text: str) -> int:
    """Sentences: of a text with Chinese in it between 。！ and ？, else by nltk's model."""
    if re.search(bench.CHINESE, text):
        return sum(piece.strip() != "" for piece in re.split("[。！？]", text))
    return bench.sentence_count(text) if punkt() is None else len(punkt().sent_tokenize(text))


def capital_words(text: str) -> int:
    """Words in capitals, cut up by nltk: "CAN'T STOP" has three, CA, N'T and STOP."""
    if punkt() is None:
        return bench.capital_words(text)
    return sum(word.isupper() for word in punkt().word_tokenize(text))


# --------------------------------------------------------------------------------------------------
# 2. Checks
# --------------------------------------------------------------------------------------------------

def matches(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.I))


def is_language(text: str, languages: tuple[str, ...]) -> bool:
    """A text whose language cannot be told is of every language."""
    return bench.language_of(text) in (*languages, None)


def is_json(text: str) -> bool:
    fenced = re.fullmatch("(?:```json)?(?:```Json)?(?:```JSON)?(?:```)?(.*?)(?:```)?", text.strip(), re.S)
    try:
        json.loads(fenced[1].strip())
    except (ValueError, RecursionError):
        return False
    return True


def bullets(text: str) -> int:
    """Lines that start with a single asterisk or a dash."""
    return len(re.findall(r"^\s*\*[^*].*$", text, re.M)) + len(re.findall(r"^\s*-.*$", text, re.M))


def nth_paragraph_starts(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Of a paragraph with Chinese in it the first word is a prefix."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    if sum(map(bool, paragraphs)) != num_paragraphs or not 0 < nth_paragraph <= num_paragraphs:
        return False
    paragraph = paragraphs[nth_paragraph - 1]
    if re.search(bench.CHINESE, paragraph) or not paragraph:
        return paragraph != "" and paragraph.startswith(first_word.lower())
    word = paragraph.split()[0].lstrip("'").lstrip('"')
    return re.split("[.,?!'\"。，？！‘“”]", word)[0].lower() == first_word.lower()


def unmarked(text: str) -> str:
    """Lower-cased, without any punctuation mark, English or Chinese."""
    return text.strip().lower().translate(dict.fromkeys(map(ord, string.punctuation + bench.CHINESE_MARKS)))


DIFFERENT = {
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation:
        bench.compare(capital_words(text), capital_relation, capital_frequency),
    "change_case:english_capital": lambda text: text.isupper() and is_language(text, ("en",)),
    "change_case:english_lowercase": lambda text: text.islower() and is_language(text, ("en",)),
    "combination:repeat_prompt": lambda text, prompt_to_repeat:
        text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    "detectable_format:json_format": is_json,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: bullets(text) == num_bullets,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections:
        len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) - 1 >= num_sections,
    "keywords:existence": lambda text, keywords: all(matches(word, text) for word in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words:
        not any(word in text or matches(rf"\b{re.escape(word)}\b", text) for word in forbidden_words),
    "keywords:frequency": lambda text, keyword, frequency, relation:
        bench.compare(matches(keyword.strip(), text), relation, frequency),
    "language:response_language": lambda text, language: is_language(text, (language,)),
    "length_constraints:number_sentences": lambda text, relation, num_sentences:
        bench.compare(sentence_count(text), relation, num_sentences),
    "length_constraints:number_words": lambda text, relation, num_words:
        bench.compare(matches(bench.CHINESE, text) or matches(r"\w+", text), relation, num_words),
    "length_constraints:nth_paragraph_first_word": nth_paragraph_starts,
    "startend:end_checker": lambda text, end_phrase: unmarked(text).endswith(unmarked(end_phrase)),
}


def is_definite(arguments: dict) -> bool:
    """Whether the evaluator has a verdict of its own on these arguments, and draws no others at random."""
    negative = {name for name, value in arguments.items() if isinstance(value, int) and value < 0}
    letter = arguments.get("letter", "a").lower()
    return (all(arguments.values())
            and negative <= {"capital_frequency"}
            and arguments.get("language", "en") in LANGUAGES
            and re.fullmatch("[a-z]", letter) is not None
            and arguments.get("nth_paragraph", 0) <= arguments.get("num_paragraphs", 0))


def with_faults(check: Callable[..., bool | None]) -> Callable[..., bool | None]:
    """A check that gives no verdict where the evaluator leaves it to chance, or stops."""
    @functools.wraps(check)
    def judged(text: str, **arguments: object) -> bool | None:
        if not is_definite(arguments):
            return None
        if not text.strip():
            return False
        try:
            return check(text, **arguments)
        except re.error:               # a keyword that is no regular expression
            return None
    return judged


# --------------------------------------------------------------------------------------------------
# 3. Rows
# --------------------------------------------------------------------------------------------------

def without_missing(verdicts: Callable[[dict], dict]) -> Callable[[dict], dict]:
    """bench.verdicts, but that a row without an answer has none: so it is left out of the figures."""
    def judged(row: dict) -> dict:
        scored = verdicts(row)
        if row.get("response") is None:
            for name in ("strict", "loose", "withdrawn_strict"):
                scored[name] = [None] * len(scored.get(name, []))
        return scored
    return judged


def majority(row: dict) -> dict:
    """bench.majority, but that the first vote decides a tie, and the longest vote has the right length.

    >>> row = {"suite": "open", "response": "a", "decomposed_questions": ["?", "?"]}
    >>> majority(row | {"pred_score": ['["YES", "NO"]', '["NO", "NO"]']})["strict"]
    [True, False]
    """
    replies = row.get("pred_score") or []
    lengths = [length for length in range(1, 100) if any(bench.vote_of(reply, length) for reply in replies)]
    count = max(lengths, default=0) if row["suite"] == "open" else len(bench.questions_of(row))
    votes = [vote for vote in (bench.vote_of(reply, count) for reply in replies) if vote]
    decided = []
    for on_one in zip(*votes):         # the votes on one question
        balance = 2 * sum(on_one) - len(votes)
        decided.append(on_one[0] if balance == 0 else balance > 0)
    end = 2 if row["suite"] == "adjustment" else count
    malformed = len(replies) - len(votes)
    return {"strict": decided[:end], "withdrawn_strict": decided[end:], "malformed": malformed}


def install() -> None:
    """Let bench.py judge as the official evaluator does; the tiny suite is judged as before."""
    for name, check in (bench.CHECKS | DIFFERENT).items():
        bench.CHECKS[name] = with_faults(check)
    bench.majority = majority
    bench.verdicts = without_missing(bench.verdicts)
    if punkt() is None:
        print("nltk's sentence model is missing (python -m nltk.downloader punkt_tab): sentences and words "
              "in capitals are counted by bench.py's rule, which seldom differs.")


# --------------------------------------------------------------------------------------------------
# 4. Conformance
#
# A file of rows with the verdicts that the evaluator itself gave.
# --------------------------------------------------------------------------------------------------

def compare(path: Path) -> tuple[collections.Counter, collections.Counter]:
    """(verdicts, verdicts that differ) by type of instruction."""
    count = collections.Counter()
    differ = collections.Counter()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            ours = bench.verdicts(row | {"suite": "closed"})
            for how in ("strict", "loose"):
                for name, own, theirs in zip(row["instruction_id_list"], ours[how], row[how], strict=True):
                    count[name] += 1
                    differ[name] += own is not theirs
    return count, +differ


def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments, conformance="")
    install()
    if c.conformance:
        count, differ = compare(Path(c.conformance))
        print(f"{differ.total()} of {count.total()} verdicts differ {dict(differ)}")
    elif c.score:
        bench.score_files(c)
    else:
        bench.benchmark(c)


if __name__ == "__main__":
    synth.run(main)
