"""extras/aloud.py: typed prompts become a folder of spoken ones, which bench.py asks."""
import doctest
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "extras"))
import aloud                                                          # noqa: E402
import bench                                                          # noqa: E402
import synth                                                          # noqa: E402
from synth import UserError                                           # noqa: E402

NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}
LONG = " ".join(f"Tell me about town number {n} and its river." for n in range(24))
CHINESE = "请写一首关于茶的诗。不要用逗号，用《》标出题目。"
PROMPTS = ["Write 300+ words on https://a.org without *any* comma.", LONG, CHINESE]


def write_prompts(path, prompts):
    rows = [{"key": 1000 + n, "prompt": prompt} | NO_COMMA for n, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def speak_in_a_fresh_process(folder, name):
    command = [sys.executable, str(ROOT / "extras/aloud.py"), "make=mine.jsonl", f"to={name}"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_prompts(folder / "mine.jsonl", PROMPTS)
    said = speak_in_a_fresh_process(folder, "mine-aloud")
    assert re.fullmatch(r"15 clips of 0\.\d\d hours stand in mine-aloud, 5 of them longer than 30 s\.\n", said)
    return folder / "mine-aloud"


@pytest.fixture
def rows(made):
    """All rows of the folder's files, in order."""
    return [row for path in sorted(made.glob("*.jsonl")) for row in bench.read_jsonl(path)]


def clip_of(made, row):
    waveform, rate = soundfile.read(made / row["audio_path"])
    assert rate == synth.RATE and waveform.ndim == 1
    return waveform


def test_examples_in_docstrings_hold():
    assert doctest.testmod(aloud) == (0, 3)


@pytest.mark.parametrize("text, lang, spoken", [
    ("Title it <<here>>, i.e. in brackets.", "en",
     "Title it two angle brackets here two closing angle brackets, that is in brackets."),
    ("Divide by ****** and\n\n*** or *", "en", "Divide by six asterisks and three asterisks or asterisk"),
    ("At www.a.org/b?c=1&d, 50% off\\ `x` ^", "en",
     "At a dot org slash b question mark c equals 1 and d, 50 percent off x"),
    ('Say "no" \u201ctwice\u201d | now', "en", "Say no twice now"),
    ("写300+字，用[名字]和**粗体**，1/2。", "zh",
     "写300 以上字，用方括号中的名字和 两个星号 粗体 两个星号 ，1/2。"),
    ("Meet on 01/02/2023, 24/7, and/or at 5 km/h.", "en", "Meet on 01/02/2023, 24/7, and or at 5 km per h."),
    ("yes/no, he/she, 1/2 cup, 100 m/s", "en", "yes or no, he or she, 1/2 cup, 100 m per s"),
    ("3 yes/no questions, 5 pros/cons: N/A or twice/day in src/main.py.", "en",
     "3 yes or no questions, 5 pros or cons: N/A or twice per day in src/main.py."),
    ("苹果/梨，和/或 5米/秒", "zh", "苹果或梨，和 或 5米每秒"),
    ("用《》标出题目", "zh", "用 书名号 标出题目")])
def test_what_nobody_would_say_is_worded(text, lang, spoken):
    assert aloud.worded(text, lang) == spoken


def test_prompts_are_spoken_under_five_conditions(made, rows):
    names = sorted(path.name for path in made.glob("*.jsonl"))
    conditions = ("accent", "background_noise", "disfluency", "paralinguistic", "standard")
    assert names == [f"closed_{condition}_{lang}.jsonl" for condition in conditions for lang in ("en", "zh")]
    assert Counter((row["condition"], row["lang"]) for row in rows) == {
        (condition, lang): count for condition in bench.CONDITIONS for lang, count in (("en", 2), ("zh", 1))}
    for row in rows:
        assert row["prompt"] == PROMPTS[row["key"] - 1000]           # the written one, by which answers are judged
        assert {key: row[key] for key in NO_COMMA} == NO_COMMA
    spoken = {(row["key"], row["condition"]): row["spoken"] for row in rows}
    plain = "Write 300 or more words on a dot org without asterisk any asterisk comma."
    for condition in bench.CONDITIONS[:-1]:
        assert spoken[1000, condition] == plain
        assert spoken[1001, condition] == LONG
    for key in (1000, 1001, 1002):
        assert len(spoken[key, "disfluency"]) > len(spoken[key, "standard"])
    assert any(filler in spoken[1002, "disfluency"] for filler in aloud.FILLERS)


def test_voices_are_unheard_and_of_the_prompts_language(rows):
    c = synth.load_config([])
    heard = synth.candidates("train", c.synth)
    for row in rows:
        accent, timbre = row["voice"].split("/")[0].split("+")
        assert timbre not in heard
        table = c.bench.accents if row["condition"] == "accent" else c.synth.accents
        assert accent in table[row["lang"]]
    assert {row["variant"] for row in rows if row["condition"] == "background noise"} == {
        "white 20 dB", "babble 20 dB", "pink 10 dB"}
    assert {row["variant"] for row in rows if row["condition"] == "paralinguistic"} <= {"shout", "child", "old"}


def test_clips_are_speech_and_noise_is_noise(made, rows):
    for row in rows:
        clip = clip_of(made, row)
        words = synth.count_words(row["spoken"])
        assert 0.12 < len(clip) / synth.RATE / words < 0.8, row["voice"]
        assert 0.01 < np.sqrt(np.mean(clip ** 2)) and np.abs(clip).max() <= 1
        frames = np.sqrt(np.mean(clip[:len(clip) // 320 * 320].reshape(-1, 320) ** 2, 1))
        quiet = np.percentile(frames, 2) / np.percentile(frames, 90)   # pauses, against loud vowels
        assert (quiet > 0.02) == (row["condition"] == "background noise"), (row["variant"], quiet)


def test_the_same_prompts_give_the_same_bytes(made):
    speak_in_a_fresh_process(made.parent, "again")
    for path in made.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (made.parent / "again" / path.relative_to(made)).read_bytes()


def test_bench_asks_the_folder(made, tmp_path, monkeypatch, capsys):
    """Each prompt typed once and under each condition; figures of both languages and all conditions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tiny/model").mkdir(parents=True)
    (tmp_path / "runs/tiny/model/model.safetensors").write_bytes(b"weights")
    asked = []

    def answer(model, tok, questions, *limits):
        asked.extend(questions)
        return [("yes" if isinstance(question, str) else "no, never", False) for question in questions]

    monkeypatch.setattr(bench.inserter, "load_run", lambda c: (None, None))
    monkeypatch.setattr(bench.inserter, "answer", answer)
    bench.main([f"prompts={made}", "bench.bootstrap=50"])
    typed = [question for question in asked if isinstance(question, str)]
    assert set(PROMPTS) < set(typed) and len(typed) == 2 * len(PROMPTS)         # the written wording
    assert "write 300 or more words on a dot org without asterisk any asterisk comma" in typed         # and the spoken one
    pieces = Counter(len(question) for question in asked if not isinstance(question, str))
    assert pieces[1] == 10 and pieces.total() == 15                  # the long prompt's clips are longer than 30 s
    figures = json.loads(Path("runs/tiny/bench-mine-aloud/results.json").read_text())["figures"]
    strict = [line for line in figures if line["figure"] == "strict-prompt"]
    assert {(line["condition"], line["lang"]) for line in strict} == {
        (condition, lang) for condition in bench.CONDITIONS for lang in ("en", "zh")}
    assert all((line["typed"][0], line["spoken"][0], line["gap"][0]) == (1, 0, 1) for line in strict)


def test_a_single_prompt(tmp_path, monkeypatch, capsys):
    """It has no others whose babble could be its noise. What a killed process left does not stay."""
    monkeypatch.chdir(tmp_path)
    write_prompts(Path("one.jsonl"), ["Tea."])
    Path(".new.one-aloud").mkdir()
    Path(".new.one-aloud/closed_left_over_en.jsonl").write_text("{")
    aloud.main(["make=one.jsonl", "to=one-aloud"])
    assert len(bench.read_folder(Path("one-aloud"))) == 6
    assert sorted(os.listdir()) == ["one-aloud", "one.jsonl"]


def test_wrong_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_prompts(Path("one.jsonl"), ["Tea.", '"'])
    with pytest.raises(UserError, match="make=FILE.jsonl and to=FOLDER are missing"):
        aloud.main(["make=one.jsonl"])
    with pytest.raises(UserError, match="one.jsonl line 2: nothing in the prompt can be spoken"):
        aloud.main(["make=one.jsonl", "to=new"])
    Path("other").mkdir()
    Path("other/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="other is there already"):
        aloud.main(["make=one.jsonl", "to=other"])
    unknown = {"key": 1, "prompt": "Tea.", "instruction_id_list": ["no:such"], "kwargs": [{}]}
    Path("unknown.jsonl").write_text(json.dumps(unknown))
    with pytest.raises(UserError, match="unknown.jsonl row 1 cannot be scored"):
        aloud.main(["make=unknown.jsonl", "to=new"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["one.jsonl", "other", "thesis.txt", "unknown.jsonl"]


def test_a_voice_that_the_run_heard_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_prompts(Path("one.jsonl"), ["Tea."])
    trained = synth.load_config(["synth.held_out={test: 0.01, dev: 0.01}"])
    synth.write_whole(Path("runs/tiny/config.yaml"), json.dumps(trained).encode())
    with pytest.raises(UserError, match="runs/tiny was trained with en-us"):
        aloud.main(["make=one.jsonl", "to=new"])
    assert not Path("new").exists()
