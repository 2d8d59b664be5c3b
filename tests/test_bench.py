"""bench.py as specified: known answers, the tiny suite's splits and balance, figures, floors, bad input."""
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

import bench
import synth

SMALL = ["bench.rows=18", "bench.adjustment_rows=6", "bench.batch=5", "bench.bootstrap=200"]
COLOUR = "tiny:answer", {"kind": "colour", "words": ["yellow"]}
VERBATIM = ("repeat", "say")                  # kinds whose answer stands in the prompt


@pytest.mark.parametrize("name, kwargs, right, wrong", [
    ("change_case:english_capital", {}, ["IT IS RED."], ["It is RED.", "123", ""]),
    ("change_case:english_lowercase", {}, ["it is red."], ["It is red.", "123", ""]),
    ("startend:end_checker", {"end_phrase": "thank you"}, ["Red. Thank you.", '"red THANK YOU!"'],
     ["Thank you. Red.", "thank"]),
    ("startend:quotation", {}, ['"Red."', ' "a\nb" '], ['"Red.', 'Red."', '"', "'Red'"]),
    ("punctuation:no_comma", {}, ["one two"], ["one, two"]),
    ("keywords:existence", {"keywords": ["winter"]}, ["Red. I like the Winter."],
     ["Red.", "I like the wint er"]),
    ("keywords:frequency", {"keyword": "winter", "frequency": 2, "relation": "at least"},
     ["Winter winter", "winter " * 3], ["winter"]),
    ("keywords:frequency", {"keyword": "winter", "frequency": 2, "relation": "less than"}, ["winter", "red"],
     ["winter winter"]),
    ("keywords:forbidden_words", {"forbidden_words": ["it", "is"]}, ["White kitten."],
     ["It was white.", "white, is."]),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 3}, ["It is", "Red."],
     ["It is red."]),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, ["It is red."], ["Red it."]),
    ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2}, ["Red. I am sure."],
     ["Red, sure."]),
    ("combination:two_responses", {}, ["Red.\n******\nIt is red.", "a******b"],
     ["Red.", "Red.******Red.", "a******b******c", "a******", "a************b"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n- b"],
     ["* a", "a\nb", "* a\n* b\n* c"]),
    ("detectable_format:title", {}, ["<<Answer>>\nRed."], ["<Answer>", "<<>>", "<< >> red"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Red.\nP.S. Thanks.", "red p. s. thanks"],
     ["Red.", "Caps red"]),
    (*COLOUR, ["It is yellow.", '"YELLOW"', "The answer to your question is yellow."],
     ["It is red.", "yellow red blue", "yellow yellow", "", "It is yellowish."]),
    ("tiny:answer", {"kind": "count", "words": ["two", "three"]}, ["Two, three.", "* two\n* three"],
     ["two, three, four", "three, two", "two"]),
    ("tiny:answer", {"kind": "backwards", "words": ["stone", "apple"]}, ["Stone, apple."], ["apple, stone"]),
])
def test_check_of_the_tiny_suite(name, kwargs, right, wrong):
    content = "tiny:answer", {"kind": "colour", "words": []}         # a row of the tiny suite has one
    names, arguments = ([name], [kwargs]) if name.startswith("tiny:") else ([name, content[0]], [kwargs, content[1]])
    checks = {"instruction_id_list": names, "kwargs": arguments}
    for response in right:
        assert bench.follows(response, checks)[0] is True, response
    for response in wrong:
        assert bench.follows(response, checks)[0] is False, response


def test_every_check_that_is_the_tiny_suites_own_is_tested():
    tested = {case[0] for mark in test_check_of_the_tiny_suite.pytestmark for case in mark.args[1]}
    assert tested >= {name for name in bench.TINY if bench.TINY[name] is not bench.CHECKS.get(name)}


def test_two_responses_must_both_be_right():
    name, kwargs = COLOUR
    two = {"instruction_id_list": ["combination:two_responses", name], "kwargs": [{}, kwargs]}
    one = {"instruction_id_list": [name], "kwargs": [kwargs]}
    assert bench.follows("Yellow.\n******\nIt is yellow.", two) == [True, True]
    assert bench.follows("Yellow.\n******\nIt is red.", two) == [True, False]
    assert bench.follows("Yellow. It is yellow.", two) == [False, False]
    assert bench.follows("Yellow.******It is yellow.", one) == [False]          # two were not asked for


def test_loose_forgives_first_and_last_line_and_asterisks():
    def judge(response, name):
        row = bench.verdicts({"suite": "closed", "instruction_id_list": [name, COLOUR[0]], "kwargs": [{}, COLOUR[1]],
                              "response": response})
        return row["strict"][:1] + row["loose"][:1]
    assert len(bench.loose_variants("a")) == 8
    assert judge("Sure, here:\nit is red.", "change_case:english_lowercase") == [False, True]
    assert judge("it is red.\nEnjoy", "change_case:english_lowercase") == [False, True]
    assert judge('*"red"*', "startend:quotation") == [False, True]
    assert judge("It is red.", "change_case:english_lowercase") == [False, False]
    assert judge(None, "punctuation:no_comma") == [False, False]


def draw(suite, count, seed="test"):
    function = synth.draw_adjustment if suite == "adjustment" else synth.draw_instruction
    return bench.draw_tasks(function, count, random.Random(seed))


def test_a_ratio_to_rare_successes_has_a_finite_interval():
    """Resamples without any success of the other are left out."""
    value, low, high = bench.estimate([(1, 1), (1, 0), *[(0, 0)] * 18], 2000)
    assert value == 2 and np.isfinite([low, high]).all() and low <= value <= high
    assert bench.estimate([(1, 0), (0, 0)], 2000) is None


@pytest.mark.parametrize("suite, count", [("closed", 1400), ("adjustment", 450)])
def test_references_follow_their_own_instructions(suite, count):
    rows = [task | {"suite": suite, "condition": "standard", "response": task["answer"]} for task in draw(suite, count)]
    for row in rows:
        bench.check_row(row, "here")
        scored = bench.verdicts(row)
        assert all(scored["strict"]) and all(scored["loose"]), row
    if suite == "adjustment":
        # "six and two, no wait, five and three": now and then both answers are the same
        assert np.mean([all(bench.verdicts(row)["withdrawn_strict"]) for row in rows]) < 0.03


@pytest.fixture(scope="module")
def training():
    """Texts enough of the training corpus."""
    return list(synth.tiny_world(1, "train", 16000, synth.load_config([]).synth.facts))


@pytest.fixture(scope="module")
def rows():
    return bench.draw_rows(synth.load_config([]))


def test_no_test_prompt_is_a_training_prompt(training, rows):
    turns = {" ".join(bench.words_of(m["content"])) for d in training for m in d.get("messages", [])
             if m["role"] == "user"}
    assert len(rows) == 320 * 7 + 120 * 2
    prompts = {" ".join(bench.words_of(row["prompt"])) for row in rows}
    assert not turns & prompts
    stories = "\n".join(" ".join(bench.words_of(d["text"])) for d in training if "text" in d)
    assert not [prompt for prompt in prompts if prompt in stories]


def test_every_fact_is_stated_in_training(training):
    text = "\n".join(" ".join(bench.words_of(text)) for d in training for text in synth.texts_of(d))
    for kind, table in synth.FACTS.items():
        for x, y in table.items():
            fact = " ".join(bench.words_of(synth.KINDS[kind]["fact"].format(x=x, y=y)))
            asked = any(f"{' '.join(bench.words_of(ask.format(x=x)))}" in text for ask in synth.KINDS[kind]["ask"])
            assert fact in text or asked, (kind, x)


def test_balance():
    tasks = draw("closed", 320)
    kinds = Counter(task["kind"] for task in tasks)
    assert max(kinds.values()) <= 0.15 * 320 and sum(kinds[k] for k in VERBATIM) <= 0.2 * 320
    assert len({" ".join(bench.words_of(task["prompt"])) for task in tasks}) == 320


def test_conditions_noises_accents_and_styles_come_in_turn(rows):
    c = synth.load_config([])
    spoken = [row for row in rows if row["audio_path"] and row["suite"] == "closed"]
    assert Counter(row["condition"] for row in spoken) == dict.fromkeys(bench.CONDITIONS, 320)
    noise = Counter((row["noise"]["kind"], row["noise"]["snr"]) for row in spoken if "noise" in row)
    assert len(noise) == 9 and min(noise.values()) >= 35
    accents = Counter(row["variant"] for row in spoken if row["condition"] == "accent")
    assert accents.keys() == set(c.bench.accents["en"]) and min(accents.values()) >= 45
    styles = Counter(row["variant"] for row in spoken if row["condition"] == "paralinguistic")
    assert set(styles) == {"whisper", "shout", "child", "old", "fast", "slow"} and min(styles.values()) >= 53
    assert len({row["key"] for row in rows}) == len(rows)


def test_voices_and_accents_are_never_trained_on(rows):
    c = synth.load_config([])
    trained = set(synth.candidates("train", c.synth))
    for row in rows:
        if row["audio_path"]:
            assert row["voice"]["timbre"] not in trained
            assert (row["voice"]["accent"] in c.synth.accents["en"]) == (row["condition"] != "accent")


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------

def closed(item, followed, mode="spoken", **more):
    return {"suite": "closed", "lang": "en", "condition": "standard", "mode": mode, "prompt": f"prompt {item}",
            "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "response": "a" if followed else "a, b",
            "strict": [followed], "loose": [followed]} | more


def test_estimate():
    assert bench.estimate([(1, 1), (1, 1), (0, 1), (1, 1)], 2000) == [0.75, 0.25, 1.0]
    assert bench.estimate([(1, 2), (0, 3)], 500)[0] == 0.2
    assert bench.estimate([], 10) is bench.estimate([(0, 0)], 10) is None
    _, low, high = bench.estimate([(1, 1)] * 50 + [(0, 1)] * 50, 4000)
    # 0.5 ± 1.96 · 0.05
    assert low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)


def test_gap_is_of_the_prompts_that_are_typed_and_spoken():
    typed = [closed(i, followed, "typed") for i, followed in enumerate([True, True, False, True])]
    spoken = [closed(i, followed) for i, followed in enumerate([False, True, False])] + [closed(9, True)]
    line = next(bench.results(typed + spoken, 500))
    assert (line["rows"], line["typed"][0], line["spoken"][0]) == (4, 2 / 3, 1 / 2)
    assert line["gap"][0] == 1 / 3 and line["gap"][1] <= 1 / 3 <= line["gap"][2]
    assert line["silence"] is None and line["other prompts"][0] == 1 / 2


def test_the_floor_of_other_prompts_gives_every_answer_to_another_prompt():
    rows = [closed(i, True, response=f"keyword{i}", instruction_id_list=["keywords:existence"],
                   kwargs=[{"keywords": [f"keyword{i}"]}]) for i in range(5)]
    exchanged = bench.other_prompts(rows)
    assert [row["strict"] for row in exchanged] == [[False]] * 5
    assert Counter(row["response"] for row in exchanged) == Counter(row["response"] for row in rows)
    assert bench.other_prompts(rows[:1]) == []


# --------------------------------------------------------------------------------------------------
# The whole way, with a model that is a table of the right answers
# --------------------------------------------------------------------------------------------------

def load_table(c):
    """The "model": question -> row, read when it is first asked."""
    return {}, Path("runs") / c.run / "bench"


def fill(table, folder):
    for line in (folder / "prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["suite"] == "transcription" or row["condition"] == bench.SILENCE:
            continue                   # the same clips once more
        if row["audio_path"]:
            table[soundfile.read(folder / row["audio_path"], dtype="float32")[0].tobytes()] = row
        else:
            table[row.get("asked") or row["prompt"]] = row


def table_answers(table, folder, questions, max_tokens, batch):
    """The right answer, but one in four is withheld when it is spoken."""
    if not table:
        fill(table, folder)
    answers = []
    for question in questions:
        row = table.get(question if isinstance(question, str) else question[0].tobytes())
        if row is None:
            answers.append(("what?", False))
        elif row["audio_path"] and int(row["item"][-1]) % 4 == 3:
            answers.append(("", True))
        else:
            answers.append((row["reference"], False))
    return answers


def table_transcripts(table, folder, clips, max_tokens, batch):
    if not table:
        fill(table, folder)
    return [table[clip.tobytes()]["prompt"].replace(",", " ").upper() + " indeed" for clip in clips]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a benchmark of a trained run will stand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.inserter, "load_run", load_table)
    monkeypatch.setattr(bench.inserter, "answer", table_answers)
    monkeypatch.setattr(bench.inserter, "transcribe", table_transcripts)
    (tmp_path / "runs/tiny/model").mkdir(parents=True)
    (tmp_path / "runs/tiny/model/model.safetensors").write_bytes(b"weights")
    return tmp_path / "runs/tiny/bench"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "bench"


@pytest.fixture
def finished(folder, kept):
    """The same folder after a benchmark, which is run once."""
    if kept.is_dir():
        shutil.copytree(kept, folder)
    else:
        bench.main(SMALL)
        shutil.copytree(folder, kept)
    return folder


def figures_of(path):
    """{(suite, condition, figure): line}"""
    lines = json.loads(path.read_text())["figures"]
    return {(line["suite"], line["condition"], line["figure"]): line for line in lines}


def test_benchmark_from_prompts_to_page(folder, capsys):
    bench.main(SMALL)
    results = json.loads((folder / "results.json").read_text())
    figures = figures_of(folder / "results.json")
    rows = bench.read_rows(folder / "answers.jsonl")
    assert len(rows) == 18 * 9 + 6 * 3 + 24 + 18 * 5
    assert (results["missing"], results["truncated"], results["decoding"]) == (0, 4 * 5 + 1, "greedy")
    assert results["bench"]["max_tokens"] == 48 and results["device"] and results["torch"]
    for condition in bench.CONDITIONS:
        line = figures["closed", condition, "strict-prompt"]
        assert line["rows"] == 18 and line["spoken"][0] == 14 / 18 and line["typed"][0] == 1
        assert line["as spoken"][0] == 1 and line["spoken / typed"][0] == line["spoken / as spoken"][0] == 14 / 18
        assert line["spoken / typed"][1:] == line["spoken"][1:]                     # of what is always followed
        assert line["gap"][0] == pytest.approx(4 / 18) and line["gap"][1] <= line["gap"][0] <= line["gap"][2]
        assert line["other prompts"][0] <= 0.2 and line["silence"][0] <= 0.2
        assert figures["transcription", condition, "WER"]["spoken"][0] > 0          # one word too many each
    adjustment = figures["adjustment", "standard", "IAR"]
    assert adjustment["typed"][0] == 1.0 > figures["adjustment", "standard", "ECR"]["typed"][0]
    words = {row["key"].removesuffix("-as-spoken"): row for row in rows if row["mode"] == "as spoken"}
    assert set(words) == {row["key"] for row in rows if row["mode"] == "typed"}
    assert all(re.fullmatch("[a-z']+( [a-z']+)*", row["asked"]) for row in words.values())
    said = [row for row in rows if row["suite"] == "transcription" and row["condition"] == "standard"]
    words = sum(len(bench.words_of(row["prompt"])) for row in said)
    assert figures["transcription", "standard", "WER"]["spoken"][0] == 18 / words

    bench.main([*SMALL, f"score={folder / 'answers.jsonl'}"])
    assert figures_of(folder / "answers.jsonl.results.json") == figures
    scored = [json.loads(line) for line in (folder / "answers.jsonl.scored.jsonl").read_text().splitlines()]
    assert len(scored) == len(rows)
    assert all(len(row["strict"]) == len(row["instruction_id_list"]) for row in scored)

    page = (folder / "report.html").read_text()
    assert "://" not in page and "<<Answer" not in page and "{{" not in page
    assert page.count("<svg") == 1 and page.count('class="whisker"') == 10
    assert page.count("<section") == 18 * 9 + 6 * 3 + 24
    clip = page.split('src="')[1].split('"')[0]
    assert (folder / clip).is_file()
    assert "never to stand beside published" in page
    shown = capsys.readouterr().out
    assert "never to stand beside published" in shown and "77.8 [" in shown and "truncated: 21" in shown


def test_answers_of_others_and_missing_ones(finished):
    rows = bench.read_rows(finished / "answers.jsonl")
    rows = [row for row in rows if (row["suite"], row["condition"], row["mode"]) == ("closed", "standard", "typed")]
    before = next(bench.results(list(map(bench.verdicts, rows)), 100))
    rows[0] = {k: v for k, v in rows[0].items() if k != "response"}
    rows[1] = rows[1] | {"response": None}
    after = next(bench.results(list(map(bench.verdicts, rows)), 100))
    assert (before["typed"][0], after["typed"][0], after["spoken"]) == (1.0, 16 / 18, None)


def test_an_interrupted_benchmark_continues(finished, monkeypatch):
    whole, results = (finished / "answers.jsonl").read_bytes(), (finished / "results.json").read_bytes()
    asked = []

    def note_and_answer(table, folder, questions, max_tokens, batch):
        asked.extend(questions)
        return table_answers(table, folder, questions, max_tokens, batch)

    monkeypatch.setattr(bench.inserter, "answer", note_and_answer)
    for length in (0, 17, len(whole) // 3, len(whole) - 1):
        (finished / "answers.jsonl").write_bytes(whole[:length])
        bench.main(SMALL)
        assert (finished / "answers.jsonl").read_bytes() == whole
        assert (finished / "results.json").read_bytes() == results
    asked.clear()
    bench.main(SMALL)
    assert not asked


def test_prompts_are_repeatable_and_settings_are_kept(finished):
    before = {path.name: path.read_bytes() for path in [finished / "prompts.jsonl", *finished.glob("audio/*")]}
    bench.main([*SMALL, "fresh=true"])
    after = {path.name: path.read_bytes() for path in [finished / "prompts.jsonl", *finished.glob("audio/*")]}
    assert before == after
    bench.main([*SMALL, "bench.bootstrap=300", "bench.batch=7"])     # what shapes no answer may change
    with pytest.raises(synth.UserError, match="bench.snr.*fresh=true"):
        bench.main([*SMALL, "bench.snr=[0.0]"])
    Path("runs/tiny/model/model.safetensors").write_bytes(b"other weights")
    with pytest.raises(synth.UserError, match="model.*fresh=true"):
        bench.main(SMALL)


@pytest.mark.parametrize("trained", [
    "synth.held_out={test: 0.04, dev: 0.04}", "synth.accents={en: [en-us, en-gb]}", "synth.timbres=[m1, m2, whisper, zac]",
    "synth.special_timbres=[whisper, whisperf, caleb, grandma, grandpa, zac, belinda]"])
def test_what_the_run_was_trained_with_is_not_tested_with(folder, trained):
    c = synth.load_config([trained])
    synth.same_settings(folder.parent / "config.yaml", c, "")
    with pytest.raises(synth.UserError, match="runs/tiny was trained with .*, in which the test speaks"):
        bench.main(["bench.rows=60", "bench.adjustment_rows=2"])
    assert not list(folder.glob("audio/*"))


def test_the_runs_own_settings_are_no_hindrance(folder):
    synth.same_settings(folder.parent / "config.yaml", synth.load_config([]), "")
    bench.main(["bench.rows=3", "bench.adjustment_rows=2", "bench.bootstrap=100"])
    assert (folder / "report.html").is_file()


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

GOOD = {"suite": "closed", "condition": "standard", "prompt": "what colour is the sun", "response": "It is yellow.",
        "instruction_id_list": ["tiny:answer"], "kwargs": [COLOUR[1]]}


@pytest.mark.parametrize("line, sentence", [
    (b"{", "line 2 is not JSON"), (b"\xff\xfe", "line 2 is not JSON"),
    (b"[1]", "row 2 is a row without prompt"),
    *[(json.dumps(GOOD | change).encode(), sentence) for change, sentence in [
        ({"prompt": 1}, "is a row without prompt"), ({"response": 3}, "response must be text"),
        ({"instruction_id_list": None}, "cannot be scored"), ({"instruction_id_list": [[]]}, "cannot be scored"),
        ({"instruction_id_list": ["tiny:anser"]}, "cannot be scored .*tiny:anser"),
        ({"kwargs": {}}, "cannot be scored"), ({"kwargs": [{}]}, "cannot be scored"), ({"kwargs": []}, "cannot be scored"),
        ({"suite": "shut"}, "has the suite 'shut'; valid are closed, open"),
        ({"condition": "underwater"}, "has the condition 'underwater'; valid are standard"),
        ({"suite": "open"}, "cannot be scored .*decomposed_questions"),
        ({"suite": "adjustment", "withdrawn": {}}, "cannot be scored .*instruction_id_list"),
        ({"suite": "transcription"}, "cannot be scored .*reference")]]])
def test_bad_rows_are_named_and_nothing_is_written(tmp_path, line, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(synth.UserError, match=sentence) as error:
        bench.main([f"score={path}"])
    assert str(path) in str(error.value) and re.search("(line|row) 2", str(error.value))
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("arguments, sentence", [
    (["bench.accents={en: [en-su]}"], "en-su"), (["bench.rows=100000"], "does not have 100000"),
    (["prompts=nowhere"], "prompts=nowhere is no folder")])
def test_wrong_use(folder, arguments, sentence):
    with pytest.raises(synth.UserError, match=sentence):
        bench.main([*(a for a in SMALL if a.split("=")[0] != arguments[0].split("=")[0]), *arguments])


def test_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(synth.UserError, match="no model in runs/other/model"):
        bench.main(["run=other"])
