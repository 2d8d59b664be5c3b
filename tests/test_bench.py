"""bench.py as specified: known answers, the tiny suite's splits and balance, figures, floors, bad input."""
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench                                                          # noqa: E402
import synth                                                          # noqa: E402

CONFIG = str(Path(__file__).parents[1] / "config.yaml")
SMALL = [f"config={CONFIG}", "synth.documents=400", "synth.shard_documents=100", "bench.rows=18",
         "bench.adjustment_rows=6",
         "bench.open_rows=4", "bench.batch=5", "bench.bootstrap=200"]
LIST = "tiny:list", {"group": "animals", "count": 2}
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
     ["Winter winter", "winter " * 3],
     ["winter"]),
    ("keywords:frequency", {"keyword": "winter", "frequency": 2, "relation": "less than"}, ["winter", "red"],
     ["winter winter"]),
    ("keywords:forbidden_words", {"forbidden_words": ["it", "is"]}, ["White kitten."],
     ["It was white.", "white, is."]),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 3}, ["It is", "Red."],
     ["It is red."]),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, ["It is red."],
     ["Red it."]),
    ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2}, ["Red. I am sure."],
     ["Red, sure."]),
    ("combination:two_responses", {}, ["Red.\n******\nIt is red.", "a******b"],
     ["Red.", "Red.******Red.", "a******b******c", "a******", "a************b"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n- b"],
     ["* a", "a\nb", "* a\n* b\n* c"]),
    ("detectable_format:title", {}, ["<<Answer>>\nRed."], ["<Answer>", "<<>>", "<< >> red"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     ["Red.\nP.S. Thanks.", "red p. s. thanks"], ["Red.", "PS red"]),
    (*COLOUR, ["It is yellow.", '"YELLOW"', "The answer to your question is yellow."],
     ["It is red.", "yellow red blue", "yellow yellow", "", "It is yellowish."]),
    ("tiny:answer", {"kind": "count", "words": ["two", "three"]}, ["Two, three.", "* two\n* three"],
     ["two, three, four", "three, two", "two"]),
    ("tiny:answer", {"kind": "backwards", "words": ["stone", "apple"]}, ["Stone, apple."], ["apple, stone"]),
    ("tiny:count", LIST[1], ["dog, cat", "dog cat dog"], ["dog", "dog, cat, cow"]),
    ("tiny:group", {"group": "animals"}, ["A dog, thank you."], ["dog and monday", "thank you"]),
    ("tiny:different", {"group": "animals"}, ["dog, cat"], ["dog, dog", "thank you"]),
    (*LIST, ["Dog, cat."], ["dog", "dog, dog", "dog, cat, cow", "dog, monday", "dog, cat, monday"]),
    ("tiny:two_facts", {"about": "dog"}, ["The baby of a dog is a puppy. The dog says woof."],
     ["The dog says woof.", "The dog says woof. The dog says woof.",
      "The dog says moo. The baby of a dog is a calf."]),
    ("tiny:true", {"about": "dog"}, ["THE DOG SAYS WOOF."],
     ["The dog says woof. The cow says moo.", "The dog says moo.", "Hm."]),
    ("tiny:facts", {"about": "dog"}, ["The baby of a dog is a puppy, the dog lives in the kennel."],
     ["The dog says woof.", "The baby of a dog is a puppy. The dog says woof. The dog eats hay."]),
])
def test_check(name, kwargs, right, wrong):
    checks = {"instruction_id_list": [name], "kwargs": [kwargs]}
    for response in right:
        assert bench.follows(response, checks) == [True], response
    for response in wrong:
        assert bench.follows(response, checks) == [False], response


def test_every_check_is_tested_and_typed():
    tested = {mark.args[1][i][0] for mark in test_check.pytestmark for i in range(len(mark.args[1]))}
    assert tested >= {name for name in bench.TINY if bench.TINY[name] is not bench.CHECKS.get(name)}
    bench.check_instructions({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["a"]}]},
                             "here")


def test_two_responses_must_both_be_right():
    name, kwargs = COLOUR
    two = {"instruction_id_list": ["combination:two_responses", name], "kwargs": [{}, kwargs]}
    one = {"instruction_id_list": [name], "kwargs": [kwargs]}
    assert bench.follows("Yellow.\n******\nIt is yellow.", two) == [True, True]
    assert bench.follows("Yellow.\n******\nIt is red.", two) == [True, False]
    assert bench.follows("Yellow. It is yellow.", two) == [False, False]
    assert bench.follows("Yellow.******It is yellow.", one) == [False]          # two were not asked for


def test_loose_forgives_first_and_last_line_and_asterisks():
    def judge(response, name, kwargs):
        row = bench.verdicts({"instruction_id_list": [name], "kwargs": [kwargs], "response": response})
        return row["strict"] + row["loose"]
    assert len(bench.loose_variants("a")) == 8
    assert judge("Sure, here:\nit is red.", "change_case:english_lowercase", {}) == [False, True]
    assert judge("it is red.\nEnjoy", "change_case:english_lowercase", {}) == [False, True]
    assert judge('*"red"*', "startend:quotation", {}) == [False, True]
    assert judge("It is red.", "change_case:english_lowercase", {}) == [False, False]
    assert judge(None, "punctuation:no_comma", {}) == [False, False]


def draw(suite, count, seed="test"):
    function = synth.draw_adjustment if suite == "adjustment" else synth.draw_instruction
    kinds = list(synth.OPEN) if suite == "open" else synth.CLOSED
    return bench.draw_tasks(function, kinds, count, random.Random(seed))


def as_row(suite, task):
    row = {name: task[name] for name in ("prompt", "instruction_id_list", "kwargs")}
    row |= {"suite": suite, "condition": "standard", "response": task["answer"]}
    if suite == "adjustment":
        row["withdrawn"] = task["withdrawn"]
    if suite == "open":
        row |= bench.decompose(task)
    return row


@pytest.mark.parametrize("suite, count", [("closed", 1400), ("adjustment", 450), ("open", 150)])
def test_references_follow_their_own_instructions(suite, count):
    rows = [as_row(suite, task) for task in draw(suite, count)]
    for row in rows:
        bench.check_row(row, "here")
        scored = bench.verdicts(row)
        assert all(scored["strict"]) and all(scored["loose"]), row
        if suite == "open":
            assert all(scored["pred_score"])
            assert len(scored["pred_score"]) == len(row["decomposed_questions"])
    if suite == "adjustment":
        # "six and two, no wait, five and three": now and then both answers are the same
        assert np.mean([all(bench.verdicts(row)["withdrawn_strict"]) for row in rows]) < 0.03


@pytest.fixture(scope="module")
def training():
    """Texts enough of the training corpus."""
    return list(synth.tiny_world(1, "train", 16000, synth.load_config([f"config={CONFIG}"]).synth.facts))


def test_no_test_prompt_is_a_training_prompt(training):
    turns = {" ".join(bench.words_of(m["content"])) for d in training for m in d.get("messages", [])
             if m["role"] == "user"}
    rows = bench.draw_rows(synth.load_config([f"config={CONFIG}"]))
    assert len(rows) == 320 * 7 + 120 * 2 + 60 * 2
    prompts = {" ".join(bench.words_of(row["prompt"])) for row in rows}
    assert not turns & prompts
    stories = "\n".join(" ".join(bench.words_of(d["text"])) for d in training if "text" in d)
    assert not [prompt for prompt in prompts if prompt in stories]


def test_every_fact_is_stated_in_training(training):
    text = "\n".join(" ".join(bench.words_of(text)) for d in training for text in synth.texts_of(d))
    for kind, table in synth.FACTS.items():
        for x, y in table.items():
            fact = " ".join(bench.words_of(synth.KINDS[kind]["fact"].format(x=x, y=y)))
            asked = any(f"{' '.join(bench.words_of(ask.format(x=x)))}" in text
                        for ask in synth.KINDS[kind]["ask"])
            assert fact in text or asked, (kind, x)


def test_the_floor_of_the_nearest_training_prompt_is_low(training):
    turns = list({(a["content"], b["content"]): None for d in training if "messages" in d
                  for a, b in zip(d["messages"][::2], d["messages"][1::2])})
    for suite, count in (("closed", 700), ("adjustment", 280), ("open", 100)):
        tasks = draw(suite, count, "nearest")
        nearest = bench.nearest_prompts([task["prompt"] for task in tasks],
                                        [question for question, _ in turns])
        right = [all(bench.follows(turns[i][1], task)) for i, task in zip(nearest, tasks)]
        assert np.mean(right) <= 0.05, suite


def test_nearest_prompt():
    questions = ["count from two to five", "what colour is the sun", "the sun what colour is",
                 "what colour is the moon"]
    assert bench.nearest_prompts(["What colour is the sun?", "colour is", "count to five from two now"],
                                 questions) == [1, 1, 0]


def test_balance():
    tasks = draw("closed", 320)
    kinds = Counter(task["kind"] for task in tasks)
    assert max(kinds.values()) <= 0.15 * 320 and sum(kinds[k] for k in VERBATIM) <= 0.2 * 320
    assert len({" ".join(bench.words_of(task["prompt"])) for task in tasks}) == 320


def test_voices_and_accents_are_never_trained_on():
    c = synth.load_config([f"config={CONFIG}"])
    trained = set(synth.candidates("train", c.synth))
    for row in bench.draw_rows(c):
        if row["audio_path"]:
            assert row["voice"]["timbre"] not in trained
            assert (row["voice"]["accent"] in c.synth.accents) == (row["condition"] != "accent")


@pytest.mark.parametrize("kind, slope", [("white", 0), ("pink", -1)])
def test_noise_spectrum(kind, slope):
    noise = synth.noise_of(kind, 1 << 16, [], np.random.default_rng(0))
    power = np.abs(np.fft.rfft(noise)) ** 2
    low, high = power[500:1000].mean(), power[8000:16000].mean()
    assert noise.dtype == np.float32 and abs(np.log2(high / low) - slope * 4) < 0.3       # four octaves apart


def test_estimate_and_gap():
    assert bench.estimate([(1, 1), (1, 1), (0, 1), (1, 1)], 2000) == (0.75, [0.25, 1.0])
    assert bench.estimate([(1, 2), (0, 3)], 500)[0] == 0.2
    assert bench.estimate([], 10) == bench.estimate([(0, 0)], 10) == (None, None)
    rows = [{"suite": "closed", "item": i, "strict": [followed], "loose": [followed]}
            for i, followed in enumerate([True, True, False, True])]
    other = [row | {"strict": [False]} if row["item"] == 0 else row for row in rows][:3]
    gap = bench.gap_of(rows, other, "strict-prompt", 2000, bench.OURS)
    assert gap["difference"] == pytest.approx(1 / 3, abs=1e-6) and gap["pairs"] == 3
    _, (low, high) = bench.estimate([(1, 1)] * 50 + [(0, 1)] * 50, 4000)
    # 0.5 ± 1.96 · 0.05
    assert low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)


# --- The whole way, with a model that is a table of the right answers ---

def key_of(question):
    return question if isinstance(question, str) else question.tobytes()


def load_table(c):
    """The "model": question -> row, but one right answer in four is withheld when it is spoken."""
    folder, table = Path("runs") / c.run / "bench", {}
    for line in (folder / "prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["suite"] == "transcription":
            continue                   # the same clips once more
        if row["audio_path"]:
            table[soundfile.read(folder / row["audio_path"], dtype="float32")[0].tobytes()] = row
        elif row["condition"] not in bench.FLOORS:
            table[row["prompt"]] = row
    return table, None


def table_answers(model, tokenizer, questions, max_tokens, batch):
    answers = []
    for row in [model.get(key_of(question)) for question in questions]:
        if row is None:
            answers.append(("what?", False))
        elif row["audio_path"] and int(row["item"][-1]) % 4 == 3:
            answers.append(("", True))
        else:
            answers.append((row["reference"], False))
    return answers


def table_transcripts(model, tokenizer, clips, max_tokens, batch):
    return [model[key_of(clip)]["prompt"].replace(",", " ").upper() + " indeed" for clip in clips]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, function in (("load_run", load_table), ("answer", table_answers),
                           ("transcribe", table_transcripts)):
        monkeypatch.setattr(bench.inserter, name, function, raising=False)
    (tmp_path / "runs/tiny/model").mkdir(parents=True)
    (tmp_path / "runs/tiny/model/config.json").write_text("{}")
    synth.make_corpus(synth.load_config(SMALL))
    return tmp_path / "runs/tiny/bench"


def test_benchmark_from_prompts_to_page(folder, capsys):
    bench.main(SMALL)
    results = json.loads((folder / "results.json").read_text())
    rows = bench.read_rows(folder / "answers.jsonl")
    assert set(results["closed"]) == {*bench.CONDITIONS, *bench.FLOORS} and results["missing"] == 0
    assert results["decoding"] == [{"method": "greedy", "max_tokens": 48}]
    for condition in bench.CONDITIONS:
        spoken = results["closed"][condition]["spoken"]
        gap = results["closed"][condition]["gap"]
        assert spoken["count"] == 18 and spoken["strict-prompt"] == round(14 / 18, 6)
        assert spoken["truncated"] == 4 and gap["strict-prompt"]["difference"] == round(4 / 18, 6)
        assert results["transcription"][condition]["spoken"]["WER"] > 0      # one word too many each
        assert max(figure["strict-prompt"] for figure in spoken["floors"].values()) <= 0.2
    standard = results["closed"]["standard"]
    assert standard["typed"]["strict-prompt"] == 1.0
    assert sum(f["count"] for f in standard["typed"]["by kind"].values()) == 18
    adjustment = results["adjustment"]["standard"]["typed"]
    assert adjustment["IAR"] == 1.0 > adjustment["ECR"]
    assert results["open"]["standard"]["typed"]["open-score"] == 1.0
    said = [row for row in rows if row["suite"] == "transcription" and row["condition"] == "standard"]
    words = sum(len(bench.words_of(row["prompt"])) for row in said)
    assert results["transcription"]["standard"]["spoken"]["WER"] == round(18 / words, 6)

    bench.main([*SMALL, f"score={folder / 'answers.jsonl'}", "suite=tiny"])
    assert (folder / "answers.jsonl.results.json").read_bytes() == (folder / "results.json").read_bytes()
    scored = [json.loads(line) for line in (folder / "answers.jsonl.scored.jsonl").read_text().splitlines()]
    assert len(scored) == len(rows)
    assert all(len(row["strict"]) == len(row["instruction_id_list"]) for row in scored)

    page = (folder / "report.html").read_text()
    assert "://" not in page and len(page) < 15e6 and "<<Answer" not in page
    assert "never to stand beside published" in page
    assert "never to stand beside published" in capsys.readouterr().out


def test_answers_of_others_and_missing_ones(folder):
    bench.main(SMALL)
    rows = bench.read_rows(folder / "answers.jsonl")
    closed = [row for row in rows
              if row["suite"] == "closed" and row["condition"] == "standard" and not row["audio_path"]]
    _, before = bench.score_rows(closed, "tiny", official=False, resamples=100)
    closed[0] = {k: v for k, v in closed[0].items() if k != "response"}
    closed[1] = closed[1] | {"response": None}
    _, after = bench.score_rows(closed, "tiny", official=False, resamples=100)
    assert before["closed"]["standard"]["typed"]["strict-prompt"] == 1.0
    assert after["closed"]["standard"]["typed"]["strict-prompt"] == round(16 / 18, 6)
    assert after["missing"] == 2


def test_an_interrupted_benchmark_continues(folder, monkeypatch):
    bench.main(SMALL)
    whole, results = (folder / "answers.jsonl").read_bytes(), (folder / "results.json").read_bytes()
    asked = []

    def note_and_answer(model, tokenizer, questions, max_tokens, batch):
        asked.extend(questions)
        return table_answers(model, tokenizer, questions, max_tokens, batch)

    monkeypatch.setattr(bench.inserter, "answer", note_and_answer)
    for length in (0, 17, len(whole) // 3, len(whole) - 1):
        (folder / "answers.jsonl").write_bytes(whole[:length])
        bench.main(SMALL)
        assert (folder / "answers.jsonl").read_bytes() == whole
        assert (folder / "results.json").read_bytes() == results
    asked.clear()
    bench.main(SMALL)
    assert not asked


def test_prompts_are_repeatable_and_settings_are_kept(folder):
    bench.main(SMALL)
    before = {path.name: path.read_bytes() for path in [folder / "prompts.jsonl", *folder.glob("audio/*")]}
    bench.main([*SMALL, "fresh=true"])
    after = {path.name: path.read_bytes() for path in [folder / "prompts.jsonl", *folder.glob("audio/*")]}
    assert before == after
    with pytest.raises(synth.UserError, match="bench.snr.*fresh=true"):
        bench.main([*SMALL, "bench.snr=[0.0]"])
    (Path("runs/tiny/model/config.json")).write_text("{} ")
    with pytest.raises(synth.UserError, match="model.*fresh=true"):
        bench.main(SMALL)


def test_own_noise(folder):
    Path("noise").mkdir()
    soundfile.write("noise/street.wav", np.random.default_rng(0).uniform(-0.1, 0.1, (4000, 2)), 8000)
    bench.main([*SMALL, "bench.noise=noise"])
    results = json.loads((folder / "results.json").read_text())
    by_variant = results["closed"]["background noise"]["spoken"]["by variant"]
    assert set(by_variant) == {"street 20 dB", "street 10 dB", "street 5 dB"}
    soundfile.write("noise/silent.wav", np.zeros(100), 8000)
    synth.read_recording.cache_clear()
    with pytest.raises(synth.UserError, match="silent.wav is empty or silent"):
        bench.main([*SMALL, "bench.noise=noise", "fresh=true"])


@pytest.mark.parametrize("trained, tested, sentence", [
    ("synth.noise.folder=street", "bench.noise=./street", "bench.noise=./street lay under clips of runs/{}'s training"),
    ("synth.held_out={test: 0.5, dev: 0.1}", "bench.votes=4", "runs/{} was trained with synth.held_out=.*0.5"),
    ("synth.accents=[en-us, en-gb]", "bench.votes=4", "en-gb: runs/{} may have heard"),
    ("synth.timbres=[m1, whisper, zac]", "bench.votes=4", "whisper, zac: runs/{} may have heard"),
    ("synth.special_timbres=[whisper, whisperf, caleb, grandma, grandpa, zac, belinda]", "bench.votes=4",
     "croak: runs/{} may have heard")])
def test_what_the_run_was_trained_with_is_not_tested_with(folder, trained, tested, sentence):
    """By the settings of the run itself, and of the run that it started from."""
    c = synth.load_config([f"config={CONFIG}", trained])
    synth.same_settings(folder.parent / "config.yaml", c, (), "")
    with pytest.raises(synth.UserError, match=sentence.format("tiny")):
        bench.main([*SMALL, tested])
    (folder.parent / "config.yaml").rename("base.yaml")
    Path("runs/base").mkdir()
    Path("base.yaml").rename("runs/base/config.yaml")
    c = synth.load_config([f"config={CONFIG}", "model.from=runs/base/model"])
    synth.same_settings(folder.parent / "config.yaml", c, (), "")
    with pytest.raises(synth.UserError, match=sentence.format("base")):
        bench.main([*SMALL, tested])
    assert not folder.exists()


GOOD = {"suite": "closed", "condition": "standard", "prompt": "what colour is the sun",
        "response": "It is yellow.",
        "instruction_id_list": ["tiny:answer"], "kwargs": [COLOUR[1]]}


@pytest.mark.parametrize("line, sentence", [
    (b"{", "line 2 is not JSON"), (b"\xff\xfe", "line 2 is not JSON in UTF-8"),
    (b"[1]", "line 2 has no suite"), (b"", "line 2 is not JSON"),
    (b'{"suite": "closed", "suite": "closed"}', "named twice"),
    *[(json.dumps(GOOD | change).encode(), sentence) for change, sentence in [
        ({"prompt": 1}, "has no prompt"), ({"instruction_id_list": None}, "has no instruction_id_list"),
        ({"kwargs": {}}, "has no kwargs"),
        ({"instruction_id_list": [[]]}, "unknown instruction"), ({"kind": 3}, "kind must be text"),
        ({"instruction_id_list": ["tiny:anser"]},
         "unknown instruction 'tiny:anser'; nearest valid: tiny:answer"),
        ({"kwargs": [{"kind": 1, "words": []}]}, "kwargs.kind of tiny:answer in .* must be str"),
        ({"kwargs": [{"kind": "colour", "words": [1]}]}, "kwargs.words"),
        ({"kwargs": [{}]}, "must be {kind, words}"),
        ({"kwargs": []}, "same length"), ({"response": 3}, "response must be text"),
        ({"suite": "shut"}, "unknown suite 'shut'"),
        ({"suite": "open"}, "has no decomposed_checks"),
        ({"suite": "adjustment", "withdrawn": {}}, "withdrawn: .*same length"),
        ({"suite": "transcription"}, "has no reference")]]])
def test_bad_rows_are_named_and_nothing_is_written(tmp_path, line, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(synth.UserError, match=sentence) as error:
        bench.main([f"config={CONFIG}", f"score={path}"])
    assert str(path) in str(error.value) and "line 2" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("arguments, sentence", [
    (["score=missing.jsonl"], "missing.jsonl cannot be read"),
    (["suite=shut", "score=x"], "no suite 'shut'; valid ones are tiny, closed"),
    (["run=other"], "There is no model in runs/other/model"), (["bench.rows=1"], "at least 2"),
    (["bench.accents=[en-us]"], "take en-us out"), (["bench.accents=[en-su]"], "no accent 'en-su'"),
    (["bench.noise=nowhere"], "bench.noise=nowhere holds no"),
    (["bench.rows=100000"], "does not have 100000")])
def test_wrong_use(folder, arguments, sentence):
    with pytest.raises(synth.UserError, match=sentence):
        bench.main([*(a for a in SMALL if a.split("=")[0] != arguments[0].split("=")[0]), *arguments])
