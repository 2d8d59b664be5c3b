"""Typed prompts, spoken under SpeechInstructBench's five conditions: a folder that bench.py asks.

The prompts stand in a file of IFEval's form. Each is spoken as the tiny suite's are: by espeak's voices that
training never hears, plainly, in noise, with an accent, in a style, and disfluently; in English or Chinese,
whichever script prevails. What nobody would say is worded for speech by rule:

    {"key": 7, "prompt": "Write 300+ words on https://a.org without *any* comma.",
     "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

    spoken  Write 300 or more words on a dot org without asterisk any asterisk comma.

The folder has a file for each condition and language, closed_accent_en.jsonl, and the clips in audio/. Its
rows keep the written prompt, by which the answer is judged and which bench.py asks typed, and have the spoken
one beside it. Nothing is too long: bench.py gives a clip of more than 30 s to the model in pieces.

    python extras/aloud.py make=ifeval.jsonl to=ifeval-aloud       with the profile of the run to be asked
    python bench.py prompts=ifeval-aloud bench.max_tokens=1024
    python extras/systems.py prompts=ifeval-aloud system=…         other systems

IFEval's own file is instruction_following_eval/data/input_data.jsonl of google-research. Voices and prompts
are not SpeechInstructBench's, so these figures never stand beside published ones.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import re
import shutil
from random import Random

import soundfile

import bench
import inserter
import synth
from synth import Settings, UserError

# What stands in a row of the folder.
FIELDS = """key suite condition lang prompt spoken instruction_id_list kwargs audio_path voice
    variant""".split()


# --------------------------------------------------------------------------------------------------
# 1. From writing to speech
# --------------------------------------------------------------------------------------------------

# How the signs of an address are said, and those of other text.
ADDRESS = {
    "en": {".": "dot", "/": "slash", "_": "underscore", "#": "hash", "?": "question mark", "=": "equals",
           "&": "and", "-": "dash"},
    "zh": {".": "点", "/": "斜杠", "_": "下划线", "#": "井号", "?": "问号", "=": "等于", "&": "和", "-": "横线"},
}
SIGNS = {
    "en": {"<<": "two angle brackets", ">>": "two closing angle brackets", "<": "angle bracket",
           ">": "closing angle bracket", "{": "curly bracket", "}": "closing curly bracket",
           "******": "six asterisks", "***": "three asterisks", "**": "two asterisks", "*": "asterisk",
           "```": "three backticks", "#": "hash", "_": "underscore", "&": "and", "@": "at", "+": "plus",
           "=": "equals", "~": "tilde", "%": "percent", "e.g.": "for example", "i.e.": "that is"},
    "zh": {"<<": "双尖括号", ">>": "右双尖括号", "《》": "书名号", "{": "花括号", "}": "右花括号",
           "******": "六个星号", "***": "三个星号", "**": "两个星号", "*": "星号", "```": "三个反引号",
           "#": "井号", "_": "下划线", "&": "和", "@": "艾特", "+": "加", "=": "等于", "%": "百分号"},
}
IN_BRACKETS = {"en": r"\1 in square brackets", "zh": r"方括号中的\1"}
OR_MORE = {"en": "or more", "zh": "以上"}
OR = {"en": " or ", "zh": "或"}
PER = {"en": " per ", "zh": "每"}
UNITS = (r"(?:[kcm]?m²?|mi|[km]?g|m?[lL]|dL|[kMG]i?[bB]|k?Wh|s|h|min|[dD]ays?|[wW]eeks?|months?|years?|hours?"
         r"|minutes?|seconds?|miles?|words?|times?|twice|once|千?米|公里|升|克|秒|小时|分钟?|天|次)\b")
FILLERS = ["嗯，", "呃，", "那个，"]


def worded(text: str, lang: str) -> str:
    """A written prompt worded for speech: signs that a voice would skip are named.

    >>> worded("Write a 300+ word summary of https://a.org/b_c.", "en")
    'Write a 300 or more word summary of a dot org slash b underscore c.'
    >>> worded("Use *bold* and [name].", "en")
    'Use asterisk bold asterisk and name in square brackets.'
    """
    def spelled(address: re.Match) -> str:
        bare = re.sub(r"^(https?://)?(www\.)?", "", address[0])
        return re.sub(r"[./_#?=&-]", lambda sign: f" {ADDRESS[lang][sign[0]]} ", bare).strip()

    text = re.sub(r"\[([^][]{1,60})\]", IN_BRACKETS[lang], text)
    text = re.sub(r"(\d)\+(?!\d)", rf"\1 {OR_MORE[lang]}", text)
    text = re.sub(r"(?:https?://|www\.)[^\s\"'<>)\]]*[^\s\"'<>)\].,;:!?]", spelled, text)
    text = re.sub(r"\b(and|和)/(?=or|或)", r"\1 ", text)
    amount = rf"(?<![\w/])((?:\d+\s?)?(?:{UNITS}))/(?={UNITS})(?![^\s/]*/)"              # 5 km/h
    text = re.sub(amount, rf"\1{PER[lang]}", text)
    word = rf"(?:[^\W\d_]{{2,}}|{bench.CHINESE})"
    text = re.sub(rf"(?<![\w/.]){word}(?:/{word})+(?![\w/]|\.\w)",          # the voice reads other slashes
                  lambda words: words[0].replace("/", OR[lang]), text)
    signs = sorted(SIGNS[lang], key=len, reverse=True)      # "***" before "*"
    text = re.sub("|".join(map(re.escape, signs)), lambda sign: f" {SIGNS[lang][sign[0]]} ", text)
    text = re.sub(r"[\"“”`^|\\]", " ", text)
    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split()))


def chinese_disfluent(prompt: str, rng: Random) -> str:
    """A Chinese prompt as people speak: with fillers, and two characters said twice.

    >>> chinese_disfluent("请写一首诗", Random(2))
    '嗯，请写，嗯，请写一首诗'
    """
    amid = re.finditer(f"(?<={bench.CHINESE}{{2}})(?={bench.CHINESE}{{2}})", prompt)
    places = [match.start() for match in amid]
    if places:
        place = rng.choice(places)
        prompt = f"{prompt[:place]}，{rng.choice(FILLERS)}{prompt[place - 2:place]}{prompt[place:]}"
    if not places or rng.random() < 0.5:
        prompt = rng.choice(FILLERS) + prompt
    return prompt


# --------------------------------------------------------------------------------------------------
# 2. From a prompt to five clips
# --------------------------------------------------------------------------------------------------

def in_language(c: Settings, lang: str) -> Settings:
    """Settings in which this language's accents stand as English ones, for bench.py draws those alone."""
    return Settings(c | {section: Settings(c[section] | {"accents": {"en": c[section].accents[lang]}})
                         for section in ("synth", "bench")})


def spoken_rows(c: Settings, timbres: list[str], n: int, row: dict) -> list[dict]:
    """The n-th row under every condition, as bench.speak takes it: its prompt is the one to be spoken."""
    letters = len(re.findall("[a-zA-Z]", row["prompt"]))
    lang = "zh" if 2 * len(re.findall(bench.CHINESE, row["prompt"])) > letters else "en"
    task = {"suite": "closed", "item": f"{n:05d}", "lang": lang, "prompt": worded(row["prompt"], lang)}
    task |= {field: row[field] for field in ("instruction_id_list", "kwargs")}
    if not synth.count_words(task["prompt"]):
        raise UserError(f"{c.make} line {n}: nothing in the prompt can be spoken; remove it.")
    rng = Random(f"{c.seed} aloud {n}")
    c = in_language(c, lang)
    plain = bench.row_of(task, "standard", voice=bench.draw_voice(c, timbres, rng))
    rows = [plain, *bench.condition_rows(task, n, c, timbres, rng)]
    rows = [each for each in rows if each["audio_path"]]
    for each in rows:
        if lang == "zh" and each["condition"] == "disfluency":
            each["prompt"] = chinese_disfluent(task["prompt"], rng)
        each |= {"key": row.get("key"), "written": row["prompt"]}
    return rows


def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments, make="", to="")
    folder = Path(c.to)
    if not c.make or not c.to:
        raise UserError("make=FILE.jsonl and to=FOLDER are missing: the prompts, and where they shall stand.")
    if folder.exists():
        raise UserError(f"{folder} is there already; name another with to=, or remove it yourself.")
    timbres = synth.candidates("test", Settings(c.synth | {"engine": "espeak"}))
    known = {"suite": "closed", "condition": "standard", "lang": "en"}
    rows = []
    # From 1 on: so the first prompt has pink noise. Its babble would need other prompts' clips.
    for n, row in enumerate(bench.read_rows(Path(c.make), **known), 1):
        rows += spoken_rows(c, timbres, n, row)
    bench.check_unheard(c, rows)
    rows.sort(key=lambda row: row["condition"] != "standard")         # its clips are the others' babble
    aside = folder.with_name(f".new.{folder.name}")        # a folder of the name itself is whole
    shutil.rmtree(aside, ignore_errors=True)
    bench.speak(c, rows, aside)        # in this process, which is fresh: so the clips' bytes repeat
    for row in rows:
        row |= {"spoken": row["prompt"], "prompt": row["written"], "voice": row["voice"]["id"]}
    for (condition, lang), group in bench.grouped(rows, "condition", "lang").items():
        lines = [{field: row[field] for field in FIELDS if field in row} for row in group]
        name = f"closed_{condition.replace(' ', '_')}_{lang}.jsonl"
        synth.write_whole(aside / name, bench.jsonl(lines))
    aside.rename(folder)
    seconds = [soundfile.info(folder / row["audio_path"]).duration for row in rows]
    long = sum(length > inserter.LONGEST / synth.RATE for length in seconds)
    print(f"{len(rows)} clips of {sum(seconds) / 3600:.2f} hours stand in {folder}, {long} of them longer "
          "than 30 s.")


if __name__ == "__main__":
    synth.run(main)
