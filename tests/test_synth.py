"""synth.py as specified: settings, tiny world, corpus, segments, recipes, shards, interruption."""
import contextlib
import doctest
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
import yaml
from conftest import SMALL

import synth
from synth import UserError

SCRIPT = Path(synth.__file__)
TWO_WORKERS = [*SMALL[:-1], "synth.workers=2"]


def command(*arguments, folder, **more):
    """Run `python synth.py …` as a user does; returns the finished process."""
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], cwd=folder, capture_output=True, text=True, timeout=120,
                          check=False, **more)


def refused(process):
    """The one sentence of a command that refused: exit status 2, nothing else on standard error, no traceback."""
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("\n") == 1 and process.stderr.endswith(".\n"), process.stderr
    return process.stderr.strip()


def contents(folder):
    """{relative path: bytes} of all finished shards and their indices, and of the corpus."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*"))
            if p.suffix in (".tar", ".json", ".jsonl") and not p.name.startswith(".") and "tokenizer" not in p.parts}


def folder_of(settings):
    return Path(synth.load_config(settings).data)


def samples_of(path):
    return [synth.read_sample(path, n) for n in range(synth.read_index(path)["count"])]


def joined(parts):
    return "".join(part["text"] for part in parts)


def test_worked_examples():
    assert doctest.testmod(synth).failed == 0


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, sentence", [
    (["synth.shre=0.4"], r"Unknown key synth\.shre \(the command line\); the nearest valid key is synth\.share\."),
    (["trian.clip=1"], r"Unknown key trian .*nearest valid key is train\."),
    (["synth.gate.min_rsm=1"], r"synth\.gate\.min_rsm .*nearest valid key is synth\.gate\.min_rms"),
    (["preview"], "Unknown key preview .the command line"),
    (["synth.share=much"], r"synth\.share \(the command line\) must be float, not 'much'"),
    (["seed=1.5"], "seed .the command line. must be int, not 1.5"),
    (["fresh=1"], "fresh .the command line. must be bool, not 1"),
    (["synth.timbres=f3"], "synth.timbres .the command line. must be list, not 'f3'"),
    (["profile=qwne"], "no profile 'qwne'; config.yaml has tiny, quick, small, smol, qwen"),
    (["synth.shards={interleavd: 3}"], "synth.shards has 'interleavd'; the nearest recipe is interleaved"),
    (["synth.shards=3"], "synth.shards .the command line. must be dict, not 3"),
    (["synth.share=1.5"], "synth.share must be from 0 to 1"),
    (["synth.min_words=12"], "synth.min_words must be from 1 to max_words"),
    (["synth.rate=[200, 100]"], r"synth\.rate must be \[lowest, highest\], not \[200, 100\]"),
    (["synth.noise.snr=[1, 2, 3]"], r"synth\.noise\.snr must be \[lowest, highest\]"),
    (["synth.pitch=[30, high]"], r"synth\.pitch must be \[lowest, highest\], not \[30, 'high'\]"),
    (["train.betas=[0.9]"], r"train\.betas two of them"),
    (["train.betas=[0.9, high]"], r"train\.betas two of them"),
    (["bench.snr=[20, loud]"], r"bench\.snr must be numbers"),
    (["train.stages.sft.stepps=3"], r"Unknown key train\.stage\.stepps \(stage sft\); .*is train\.stage\.steps"),
    (["train.stages.sft.steps=many"], r"train\.stage\.steps \(stage sft\) must be int, not 'many'"),
    (["train.stages.sft=3"], "train.stages.sft .the command line. must be dict, not 3"),
    (["shard=2/2"], "shard='2/2' must be i/n"), (["shard=one"], "must be i/n"), (["run=a/b"], "plain folder name"),
])
def test_a_wrong_setting_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        synth.load_config(arguments)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(UserError, match="key share stands twice in the settings, near line 2"):
        yaml.load("synth:\n  share: 0.3\n  share: 0.4\n", synth.StrictLoader)
    with pytest.raises(UserError, match="stands twice"):
        synth.load_config(["synth.shards={text: 3, text: 4}"])


def test_profiles_and_the_command_line_override():
    c = synth.load_config([])
    assert (c.synth.share, c.synth.accents, c.shard, c.synth.workers) == (0.3, {"en": ["en-us"], "zh": ["cmn"]}, "", 2)
    c = synth.load_config(["synth.share=1e-1", "synth.accents={zh: [yue]}", "run=1e-4", "ask=5", "shard=1/3", "train.clip=2"])
    assert (c.synth.share, c.synth.accents, c.run, c.ask, c.shard) == (0.1, {"zh": ["yue"]}, "1e-4", "5", "1/3")
    assert type(c.train.clip) is float
    c = synth.load_config(["profile=qwen", "train.stages.sft.steps=7"])
    assert (c.run, c.synth.workers, c.model.llm, c.train.stages["sft"].steps) == ("qwen", 16, "Qwen/Qwen2.5-0.5B", 7)
    assert c.synth.share == 0.3 and c.train.stages["sft"].mix["chat"] == 0.7            # the rest is inherited
    for profile in ("small", "smol"):
        synth.load_config([f"profile={profile}"])


def test_a_table_is_replaced_whole_and_a_section_key_by_key():
    c = synth.load_config(["profile=small", "synth.shards={text: 3}", "synth.gate.max_clipped=0.5"])
    assert c.synth.shards == {"text": 3}
    assert (c.synth.gate.max_clipped, c.synth.gate.max_seconds) == (0.5, 30.0)
    assert (c.synth.documents, c.synth.min_words, c.model.text.num_hidden_layers, c.model.text.hidden_size) == (80000, 5, 4, 160)
    small = synth.load_config(["profile=small"]).synth
    assert small.shards == {"interleaved": 30, "tasks": 30, "text": 40, "chat": 20}


def test_a_stage_has_the_template_where_it_says_nothing():
    c = synth.load_config(["train.stages.mine={tokens: 900, mix: {text: 1.0}}"])
    assert list(c.train.stages)[-1] == "mine" and c.train.stages.mine.keys() == c.train.stage.keys()
    assert c.train.stages.mine == c.train.stage | {"tokens": 900, "mix": {"text": 1.0}}
    c = synth.load_config(["train.stage.packs=7"])
    assert (c.train.stages.pretrain.packs, c.train.stages.warmup_text.packs) == (7, 6)
    c = synth.load_config(["train.stages={one: {steps: 3}}"])                         # in place of all others
    assert c.train.stages == {"one": c.train.stage | {"steps": 3}}
    with pytest.raises(UserError, match="no stage 'pretrian'"):
        synth.load_config(["train.stages.pretrian.steps=10"])


@pytest.mark.parametrize("argument", [
    "train.precision=bf16", "train.stage.optimizer=Muon", "synth.level=sentences", "synth.tasks={cuont: 1.0}",
    "synth.noise.recipes=[task]", "synth.rate=[200]"])
def test_what_is_none_of_a_few_values_is_refused(argument):
    with pytest.raises(UserError):
        synth.load_config([argument])


def test_an_extra_has_keys_of_its_own():
    c = synth.load_config(["to=12", "documents=5"], to="own.jsonl", documents=2000)
    assert (c.to, c.documents) == ("12", 5)
    with pytest.raises(UserError, match="documents .the command line. must be int"):
        synth.load_config(["documents=x"], documents=2000)


@pytest.mark.parametrize("value", ["1e-4", "no", "null", "true", "12", "1:30", "a: b", "", "中文"])
def test_kept_settings_are_read_back_as_they_were(tmp_path, value):
    path = tmp_path / "settings.yaml"
    now = {"text": value, "number": 1e-5, "more": {"list": [1, 2.0, True], "empty": []}}
    for _ in range(2):
        synth.same_settings(path, now, "remedy")
    assert yaml.safe_load(path.read_text()) == now


def test_settings_that_differ_are_named(tmp_path):
    path = tmp_path / "settings.yaml"
    synth.same_settings(path, synth.load_config([]), "mend it")
    synth.same_settings(path, synth.load_config([]), "mend it")
    now = synth.load_config(["seed=2", "synth.gate.min_rms=0.5"])
    with pytest.raises(UserError, match=r"was made with other settings \(seed, synth\.gate\.min_rms\); mend it\."):
        synth.same_settings(path, now, "mend it")
    synth.same_settings(path, now, "mend it", begun=False)
    synth.same_settings(path, synth.load_config([]) | {"seed": 2}, "mend it", shaping=lambda c: {"seed": c.seed})


def test_the_command_line_ends_with_status_2(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
    assert "nearest valid key is synth.share" in refused(command("synth.shre=1", folder=tmp_path))
    assert "no_such/*.txt' matches no file" in refused(command("synth.corpus=no_such/*.txt", folder=tmp_path))
    (tmp_path / "b.ndjson").write_text('{"text": \n')
    assert "no JSON object, or of another shape" in refused(command("synth.corpus=*.ndjson", folder=tmp_path))
    assert "no accent 'en-su'; nearest valid: en-us" in refused(command(*SMALL, "synth.accents={en: [en-su]}", folder=tmp_path))
    assert refused(command("synth.rate=[1", folder=tmp_path)).startswith("ParserError: ")
    assert "without shard" in refused(command("fresh=true", "shard=0/2", folder=tmp_path))
    assert command(*SMALL, "synth.shards={interleaved: 1}", folder=tmp_path).returncode == 0    # a slip locks no folder


ERRORS = """
import json, sys, yaml, synth
import soundfile
def main(arguments):
    {}
sys.argv = ["x", *sys.argv[1:]]
synth.run(main)
"""


@pytest.mark.parametrize("statement, sentence", [
    ("open('no_such.txt')", r"FileNotFoundError: .*no_such\.txt'\."), ("json.loads('{')", "JSONDecodeError: "),
    ("yaml.safe_load('[')", "ParserError: "), ("soundfile.read('pyproject.none')", "LibsndfileError: .*pyproject.none"),
    ("raise synth.UserError('It is wrong.')", r"It is wrong\.")])
def test_errors_of_libraries_are_one_sentence(tmp_path, statement, sentence):
    arguments = [sys.executable, "-c", ERRORS.format(statement)]
    kept = {"cwd": tmp_path, "capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": str(SCRIPT.parent)}}
    assert re.fullmatch(sentence + ".*", refused(subprocess.run(arguments, **kept)))
    assert "Traceback" in subprocess.run([*arguments, "debug=true"], **kept).stderr


def test_our_own_mistakes_show_their_traceback(tmp_path):
    process = subprocess.run([sys.executable, "-c", ERRORS.format("1 / 0")], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" in process.stderr and "ZeroDivisionError" in process.stderr


# --------------------------------------------------------------------------------------------------
# The tiny world
# --------------------------------------------------------------------------------------------------

TOLD = {"stated": 1, "louder": 1}


def test_the_tiny_world_is_a_function_of_its_arguments():
    first = list(synth.tiny_world(1, "train", 40, TOLD))
    assert first == list(synth.tiny_world(1, "train", 80, TOLD))[:40]
    assert first != list(synth.tiny_world(2, "train", 40, TOLD)) and first != list(synth.tiny_world(1, "dev", 40, TOLD))
    assert first != list(synth.tiny_world(1, "train", 40, TOLD | {"asked": 1}))
    assert sum("text" in document for document in first) == 20


def test_the_words_are_consistent():
    """What assets/tiny_world.yaml repeats agrees with itself."""
    facts, groups = synth.FACTS, synth.GROUPS
    assert groups["animals"] == sorted(facts["baby"].keys() | facts["sound"].keys())
    assert groups["colours"] == sorted(facts["colour"].values()) and groups["workers"] == sorted(facts["worker"].values())
    assert groups["numbers"] == synth.NUMBERS[1:] and groups["names"] == synth.NAMES and groups["places"] == synth.PLACES
    for table, names in (("day", groups["days"]), ("month", groups["months"])):
        following = dict(zip(names, [*names[1:], names[0]]))
        assert facts[table] == {f"after {a}": b for a, b in following.items()} | {f"before {b}": a for a, b in following.items()}
    assert all(facts["opposite"][y] == x for x, y in facts["opposite"].items())
    for name, table in facts.items():
        assert len(set(table.values())) == len(table) / (2 if name in ("day", "month") else 1)   # no answer serves two
    for rule in synth.CONSTRAINTS.values():
        for value, kwargs in rule["values"].items():
            words = str(value).split()
            if "frequency" in kwargs:
                assert words == [kwargs["keyword"], synth.NUMBERS[kwargs["frequency"]]]
            for key in kwargs.keys() & {"num_words", "num_sentences"}:
                assert value == synth.NUMBERS[kwargs[key]]
            assert kwargs.get("keywords", words) == words and kwargs.get("end_phrase", value) == value


DIGESTS = {"train": "cf526d055ede1f9c", "dev": "2557bbaa5dcb4122", "test": "6d284a304da1aee6"}


@pytest.mark.parametrize("split", DIGESTS)
def test_the_tiny_world_stays_as_it_was(split):
    """Documents and prompts by their digests: figures in results/ belong to them."""
    rng = random.Random(split)
    made = [*synth.tiny_world(1, split, 200, {"stated": 1, "louder": 1, "asked": 2, "cried": 4}),
            *(synth.draw_instruction(rng, split, list(synth.KINDS)) for _ in range(500)),
            *(synth.draw_adjustment(rng, split, synth.CLOSED) for _ in range(200))]
    assert hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16] == DIGESTS[split]


def test_kinds_and_constraints():
    rng = random.Random(0)
    drawn = [synth.draw_instruction(rng, "train", list(synth.KINDS)) for _ in range(3000)]
    assert len(synth.KINDS) >= 10 and {d["kind"] for d in drawn} == set(synth.KINDS)
    assert {d["constraint"] for d in drawn} == set(synth.CONSTRAINTS) and len(synth.CONSTRAINTS) >= 12
    wanted = {"keywords:existence", "keywords:frequency", "keywords:forbidden_words", "length_constraints:number_words",
              "length_constraints:number_sentences", "change_case:english_capital", "change_case:english_lowercase",
              "startend:end_checker", "startend:quotation", "punctuation:no_comma", "combination:two_responses",
              "detectable_format:number_bullet_lists"}
    assert wanted <= {name for d in drawn for name in d["instruction_id_list"]}


@pytest.mark.parametrize("kind, x, words, constraint, value, answer", [
    ("colour", "sun", ["yellow"], "capitals", None, "IT IS YELLOW."),
    ("colour", "sun", ["yellow"], "end", "thank you", "It is yellow. Thank you."),
    ("colour", "sun", ["yellow"], "quotation", None, '"It is yellow."'),
    ("count", "two to four", ["two", "three", "four"], "bullets", None, "* two\n* three\n* four"),
    ("count", "two to four", ["two", "three", "four"], "no_comma", None, "Here: two three four."),
    ("tell", "dog", ["puppy", "woof"], "lowercase", None, "the baby of a dog is a puppy. the dog says woof."),
    ("colour", "sun", ["yellow"], "frequency", "party three", "It is yellow. party party party."),
    ("colour", "sun", ["yellow"], "sentences", "three", "It is yellow. I am sure. You can trust me."),
    ("colour", "sun", ["yellow"], "two_responses", None, "It is yellow.\n******\nAgain: it is yellow."),
])
def test_reference_answers(kind, x, words, constraint, value, answer):
    task = synth.instruction(kind=kind, x=x, words=words, constraint=constraint, value=value,
                             rng=random.Random(0))
    assert task["answer"] == answer and x in task["prompt"]


def test_splits_hold_out_triples_and_where_answers_are_computed_whole_arguments():
    seen = {split: set() for split in ("train", "dev", "test")}
    for split in seen:
        rng = random.Random(split)
        for _ in range(4000):
            task = synth.draw_instruction(rng, split, list(synth.KINDS))
            x = " ".join(sorted(task["x"].split())) if task["kind"] == "sum" else task["x"]
            seen[split].add((task["kind"], x, "" if task["kind"] in synth.COMPUTED else task["constraint"]))
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["dev"] and not seen["dev"] & seen["test"]
    assert min(map(len, seen.values())) > 100


def test_an_adjustment_takes_back_what_was_said():
    rng = random.Random(3)
    for _ in range(200):
        task = synth.draw_adjustment(rng, "train", synth.CLOSED)
        repair = next(r for r in synth.REPAIRS if f", {r}, " in task["prompt"])
        assert task["x"] in task["prompt"].split(f", {repair}, ")[1]
        assert task["withdrawn"]["kwargs"][-1] != task["kwargs"][-1]


def test_disfluency_adds_words_and_loses_none():
    rng = random.Random(0)
    for _ in range(200):
        said = synth.disfluent("what colour is the sun", rng).split()
        rest = iter(said)
        assert len(said) > 5 and all(word in rest for word in "what colour is the sun".split())
        assert set(said) - set("what colour is the sun".split()) <= set(synth.FILLERS)


def test_later_sentences_of_a_story_need_earlier_ones():
    needing, total = 0, 0
    for n in range(400):
        text = synth.story(random.Random(n), TOLD)
        total += 1
        moves = list(re.finditer(r"now the (\w+) is in the (\w+)\.", text))
        for m in moves:
            assert re.search(rf"\w+ takes the {m[1]} to the {m[2]}\.", text[:m.start()]), text
        sums = list(re.finditer(r"now (\w+) has (\w+) apples", text))
        for m in sums:
            a, b = re.search(rf".*\b{m[1]} has (\w+) apples and gets (\w+) more", text[:m.start()]).groups()
            assert synth.NUMBERS.index(a) + synth.NUMBERS.index(b) == synth.NUMBERS.index(m[2])
        sentences, said = iter(text.rstrip(".").split(". ")), 0
        for sentence in sentences:
            if " counts from " in sentence:
                next(sentences)                                       # the numbers, heard or cried
            elif m := re.fullmatch(r"(?!the )\w+ (?:says|cries) ((?:\w+ ){2,5}\w+)(?<! times)", sentence):
                how, again = re.fullmatch(r"(\w+ says|\w+ cries|backwards it is) ([\w ]+)", next(sentences)).groups()
                words = again.lower().removesuffix(" too").split()
                assert m[1].lower().split() == (words[::-1] if how == "backwards it is" else words), text
                said += 1
        needing += bool(moves or sums or said)
    assert needing / total > 0.6


def test_facts_that_are_asked_for_in_a_story_get_the_right_reply():
    counts = {}
    for n in range(400):
        text = synth.story(random.Random(n), {"asked": 1, "cried": 2})
        for m in re.finditer(r"(\w+) asks the (\w+), ([^.]+)\. (\w+) (says it is|cries IT IS) (\w+)\.", text):
            asker, kind, again, other, how, reply = m.groups()
            table = synth.FACTS.get(kind) or {f"{a} and {b}": synth.NUMBERS[synth.NUMBERS.index(a) + synth.NUMBERS.index(b)]
                                              for a in synth.NUMBERS[1:11] for b in synth.NUMBERS[1:11]}
            right, = (y for x, y in table.items() if synth.KINDS[kind]["again"].format(x=x) == again)
            assert asker != other and reply == (right if how == "says it is" else right.upper()), text
            counts[how] = counts.get(how, 0) + 1
        assert text.count(" asks ") == len(re.findall(r" asks the \w+, [^.]+\. \w+ (?:says it is|cries IT IS) ", text))
    assert 1.5 < counts["cries IT IS"] / counts["says it is"] < 2.5 and sum(counts.values()) > 400


# --------------------------------------------------------------------------------------------------
# The corpus
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("raw, kept", [
    ("<p>5 &lt; 7,\x00 a < b &amp; c</p>", "5 < 7, a < b & c"),
    ("one<br/>two <!-- <b>no</b> --> three", "one\ntwo  three"),
    ("a<SCRIPT>var x = 1</script>b<style>p{}</style>", "ab"),
    ("tab\tkept\r\nline  \nnext\n\n\n\nfar", "tab\tkept\nline\nnext\n\nfar"),
    ("\ufeffa\x07b\x9fc\ufffd\ud800 \xa0d", "abc  d"),
    ("I <3 you, 3<4>2 and 球<好>", "I <3 you, 3<4>2 and 球<好>"),
])
def test_cleaning_keeps_text_and_drops_markup_and_control_characters(raw, kept):
    assert synth.document_of({"text": raw}) == {"text": kept}


def write_corpus_files(folder):
    (folder / "a.txt").write_text("First line\nsecond line.\n\n \nNext document.\n")
    (folder / "b.jsonl").write_text('\ufeff{"text": "Third &amp; last."}\n\n'
                                    '{"messages": [{"role": "user", "content": "Hi <b>you</b>"}]}\n')
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "压缩的文件。"}\n')


def corpus(tmp_path, *arguments):
    c = synth.load_config([f"synth.corpus={tmp_path}/*.*", f"data={tmp_path / 'data'}", "synth.held_out_share=0", *arguments])
    return synth.make_corpus(c), [json.loads(line) for p in sorted((tmp_path / "data" / "corpus").glob("train-*.jsonl"))
                                  for line in p.read_bytes().splitlines()]


def test_a_users_corpus_is_streamed_into_shards(tmp_path):
    write_corpus_files(tmp_path)
    shards, documents = corpus(tmp_path, "synth.shard_documents=2")
    assert shards == {"train": 3}
    assert documents == [{"text": "First line\nsecond line."}, {"text": "Next document."}, {"text": "Third & last."},
                         {"messages": [{"role": "user", "content": "Hi <b>you</b>"}]}, {"text": "压缩的文件。"}]


@pytest.mark.parametrize("name, data, sentence", [
    ("a.jsonl", b'{"text": \n', r"holds no text to train on .*1 lines left out: no UTF-8, no JSON object"),
    ("a.jsonl", b'["text"]\n', "1 lines left out: no UTF-8, no JSON object, or of another shape"),
    ("a.jsonl", b'{"title": "a"}\n', "1 lines left out: it has no text and no messages"),
    ("a.jsonl", b'\n\n{"text": 3}\n', "1 lines left out: it has no text"),
    ("a.jsonl", b'{"messages": [{"role": "robot", "content": "a"}]}\n', "left out: a turn is neither the system's"),
    ("a.jsonl", b'{"messages": "hello"}\n', "1 lines left out"),
    ("a.jsonl", b'{"text": "a ball", "spoken": [3, 3]}\n', "left out: spoken is no range of characters"),
    ("a.jsonl", b'{"text": "a ball", "spoken": "all"}\n', "1 lines left out"),
    ("a.txt", b"caf\xe9\n", r"1 lines left out: no UTF-8"),
    ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read to its end"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], r"a\.jsonl\.gz cannot be read to its end"),
    ("a.txt", b" \n<p></p>\n", "holds no text"),
])
def test_a_bad_corpus_file_is_named(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        corpus(tmp_path)
    (tmp_path / name).unlink()                                    # nothing half-made stands in the way afterwards
    good = tmp_path / "good.txt"
    good.write_text("It is mended.")
    assert corpus(tmp_path)[1] == [{"text": "It is mended."}]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "data").write_text("a file")
    assert "data/corpus" in refused(command(f"data={tmp_path / 'data'}", folder=tmp_path))


def test_a_users_files_are_not_touched(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mine.txt").write_text("mine")
    for more in ([], ["fresh=true"]):
        with pytest.raises(UserError, match=r"text holds files that synth.py did not make; choose another folder"):
            synth.main([*SMALL, f"data={tmp_path}", "synth.shards={text: 1}", *more])
    assert (tmp_path / "text" / "mine.txt").read_text() == "mine"


def test_the_split_of_a_document_does_not_depend_on_its_place(tmp_path):
    texts = [f"Document number {n} speaks of {n * n}." for n in range(2000)]
    found = []
    for order in (texts, texts[::-1]):
        (tmp_path / "a.txt").write_text("\n\n".join(order))
        c = synth.load_config([f"synth.corpus={tmp_path}/a.txt", "synth.held_out_share=0.1"])
        found.append({document["text"]: split for split, document in synth.split_documents(c, Counter())})
    assert found[0] == found[1] and len(found[0]) == 2000
    counts = Counter(found[0].values())
    assert 150 < counts["dev"] < 250 and 150 < counts["test"] < 250


def test_corpora_are_read_one_after_the_other(tmp_path):
    for name, count in (("a", 20), ("b", 5)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {n}." for n in range(count)))
    both = synth.load_config([f"synth.corpus={tmp_path}/b.txt, {tmp_path}/a.txt", "synth.held_out_share=0"])
    texts = [document["text"] for _, document in synth.split_documents(both, Counter())]
    assert texts == [*(f"b {n}." for n in range(5)), *(f"a {n}." for n in range(20))]
    mixed = synth.load_config([f"synth.corpus=tiny,{tmp_path}/b.txt", "synth.documents=100",
                               "synth.held_out_documents=10", "synth.held_out_share=0"])
    splits = Counter(split for split, _ in synth.split_documents(mixed, Counter()))
    assert splits == {"train": 105, "dev": 10}
    with pytest.raises(UserError, match="nowhere.txt' matches no file"):
        list(synth.split_documents(synth.load_config(["synth.corpus=tiny,nowhere.txt"]), Counter()))


@pytest.mark.parametrize("text, most, pieces", [
    ("One two. Three four. Five six.", 4, ["One two. Three four. ", "Five six."]),
    ("One two. Three four. Five six.", 6, ["One two. Three four. Five six."]),
    ("One two. Three four. Five six.", 3, ["One two. ", "Three four. ", "Five six."]),
    ("One two three. Four.\n\nFive", 4, ["One two three. Four.\n\n", "Five"]),
    ("one two three four five six seven", 3, ["one two three ", "four five six ", "seven"]),
    ("One two three four. Five. Six.", 3, ["One two three ", "four. Five. Six."]),
    ("今天很好。你好吗？我们去公园。", 7, ["今天很好。你好吗？", "我们去公园。"]),
    ("今天很好我们去公园", 4, ["今天很好", "我们去公", "园"]),
    ("... !", 1, ["... !"]), ("It's 3.50. \"Go!\" he said.", 2, ["It's 3.50. ", "\"Go!\" ", "he said."]),
])
def test_a_long_text_is_cut_at_sentence_ends(text, most, pieces):
    assert synth.cut_text(text, most) == pieces


def test_cutting_loses_nothing_and_keeps_the_limit():
    rng = random.Random(0)
    some = ["one", "two,", "球是红的", "it's", "3.50", "(well-known)", "...", "\n\n", "end."]
    for _ in range(500):
        words = rng.choices(some, k=60)
        text = synth.clean("".join(word + rng.choice([" ", " ", ". ", "! ", "。", "\n"]) for word in words))
        most = rng.randint(1, 30)
        pieces = synth.cut_text(text, most)
        assert "".join(pieces) == text and all(pieces)
        assert sum(map(synth.WORD.findall, pieces), []) == synth.WORD.findall(text)      # no word is cut
        assert max(map(synth.count_words, pieces)) <= most
        whole = [text[a:b] for a, b in synth.sentences(text)]
        for piece, following in zip(pieces, pieces[1:]):              # no piece is shorter than it need be
            a, b = synth.sentences(following)[0]
            if following[a:b] in whole:
                assert synth.count_words(piece) + synth.count_words(following[a:b]) > most
        if max(map(synth.count_words, whole)) <= most:                # then no sentence is cut
            assert [piece[a:b] for piece in pieces for a, b in synth.sentences(piece)] == whole


def turns(*roles):
    """A dialogue of these roles' initials: a user's turn has four words, an answer three, a system's two."""
    said = {"s": ("system", "be kind"), "u": ("user", "what colour is it"), "a": ("assistant", "it is red")}
    return [{"role": said[role][0], "content": said[role][1]} for role in roles]


def test_a_long_dialogue_stays_whole():
    document = {"messages": turns(*"suauaua")}
    assert synth.cut_document(document, 5) == [document]


def test_the_pieces_of_a_document_stand_in_order_in_its_split(tmp_path):
    texts = [f"Document {n} has a first sentence. The second of {n} is longer. End {n}." for n in range(300)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    found = {}
    for most in (1000, 7):
        folder = tmp_path / str(most)
        c = synth.load_config([f"synth.corpus={tmp_path}/a.txt", f"data={folder}", "synth.held_out_share=0.1",
                               f"synth.max_document={most}", "synth.shard_documents=50"])
        shards = synth.make_corpus(c)
        for split, count in shards.items():
            paths = [folder / "corpus" / f"{split}-{number:06d}.jsonl" for number in range(count)]
            lines = b"".join(path.read_bytes() for path in paths).splitlines()
            found[most, split] = [json.loads(line)["text"] for line in lines]
    for split in ("train", "dev", "test"):
        whole = found[1000, split]
        pieces = found[7, split]
        assert len(pieces) == 3 * len(whole) > 50
        assert ["".join(pieces[n:n + 3]) for n in range(0, len(pieces), 3)] == whole


def test_no_document_of_the_tiny_world_is_cut():
    settings = synth.load_config([]).synth
    for split in ("train", "dev"):
        for document in synth.tiny_world(1, split, 3000, settings.facts):
            assert synth.cut_document(document, settings.max_document) == [document]


# --------------------------------------------------------------------------------------------------
# Segments
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [8, 20, 40, 400])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
def test_the_share_of_speech_is_met_for_documents_of_any_length(words, share):
    rng, spoken, documents = random.Random(f"{words} {share}"), 0, 10_000
    for _ in range(documents):
        spans = synth.choose_spans(words, share, 5, 9, rng)
        assert all(b - a >= 5 for a, b in spans)                              # at least five words
        assert all(b < a for (_, b), (a, _) in zip(spans, spans[1:]))         # in order, a word of text between
        assert not spans or 0 <= spans[0][0] and spans[-1][1] <= words
        spoken += sum(b - a for a, b in spans)
    assert abs(spoken / documents / words - share) < 0.01


def test_a_span_may_lie_anywhere():
    rng = random.Random(0)
    starts = Counter(a for _ in range(3000) for a, _ in synth.choose_spans(8, 0.6, 5, 5, rng))
    assert set(starts) == {0, 1, 2, 3} and min(starts.values()) > 0.8 * max(starts.values())


@pytest.mark.parametrize("words", [0, 1, 4])
def test_a_document_too_short_for_a_span_stays_text(words):
    assert all(synth.choose_spans(words, 0.7, 5, 9, random.Random(n)) == [] for n in range(100))


@pytest.mark.parametrize("lengths", [[7], [6, 4, 9, 5], [3, 30, 3], [5] * 40, [8, 0, 1, 12]])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_the_share_of_spoken_sentences_is_met(lengths, share):
    rng, spoken, documents = random.Random(f"{lengths} {share}"), 0, 10_000
    for _ in range(documents):
        chosen = synth.choose_sentences(lengths, share, rng)
        assert chosen == sorted(set(chosen)) and all(lengths[i] for i in chosen)
        spoken += sum(lengths[i] for i in chosen)
    assert abs(spoken / documents / sum(lengths) - share) < 0.01 + 0.005 * (len(lengths) == 1)


@pytest.mark.parametrize("text, pieces", [
    ("One two. Three?\nFour", ["One two.", "Three?", "Four"]),
    ('He said "go!" It costs 3.50 now.', ['He said "go!"', "It costs 3.50 now."]),
    ("今天很好。你好吗？“好！”他说", ["今天很好。", "你好吗？", "“好！”", "他说"]), ("  \n ", []), ("no end", ["no end"])])
def test_sentences(text, pieces):
    assert [text[a:b] for a, b in synth.sentences(text)] == pieces


@pytest.mark.parametrize("text, words", [
    ("It's 3.50, isn’t it?", ["It's", "3.50", "isn’t", "it"]),
    ("球是red的。", ["球", "是", "red", "的"]), ("... --", []),
    ("a well-known fact", ["a", "well-known", "fact"])])
def test_words(text, words):
    assert synth.WORD.findall(text) == words


@pytest.mark.parametrize("level", ["word", "sentence"])
def test_segments_are_whole_words_or_whole_sentences(level):
    s, text = synth.load_config([f"synth.level={level}"]).synth, "One, two three four five six. Seven! 今天很好，我们去公园。"
    for n in range(300):
        for a, b in synth.segments(text, s, random.Random(n)):
            if level == "sentence":
                assert text[a:b] in ("One, two three four five six.", "Seven!", "今天很好，我们去公园。")
            else:
                assert len(synth.WORD.findall(text[a:b])) >= 5 and synth.WORD.match(text, a) and text[b - 1].isalnum()


def test_splicing_loses_no_character():
    rng = random.Random(0)
    for n in range(300):
        text = "".join(rng.choices("ab c.\n 球", k=30))
        cuts = sorted(rng.sample(range(31), 4))
        ranges = [(cuts[0], cuts[1]), (cuts[2], cuts[3])]
        parts = synth.splice(text, ranges, n % 2 == 0, lambda words: {"id": "v"})
        spoken = [p["text"] for p in parts if p["role"] == "speech"]
        assert joined(parts) == text and spoken == [text[cuts[0]:cuts[1]], text[cuts[2]:cuts[3]]]
        assert all(p["loss"] is (n % 2 == 0) for p in parts if p["role"] == "text")


# --------------------------------------------------------------------------------------------------
# Recipes, read back from shards
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", ["interleaved", "text"])
def test_parts_join_back_to_the_document(small_data, recipe):
    folder, heard = folder_of(small_data), 0
    for shard in sorted((folder / recipe).glob("*.tar")):
        lines = (folder / "corpus" / shard.with_suffix(".jsonl").name).read_bytes().splitlines()
        for (sample, _), line in zip(samples_of(shard), lines, strict=True):
            document = json.loads(line)
            if "text" in document:
                assert sample["messages"] is None and joined(sample["parts"]) == document["text"]
            else:
                assert sample["parts"] is None
                assert [{"role": m["role"], "content": joined(m["content"])} for m in sample["messages"]] == document["messages"]
            heard += sum(p["role"] == "speech" for parts in synth.parts_of(sample) for p in parts)
    assert heard == 0 if recipe == "text" else heard > 100


def test_loss_flags_of_each_recipe(small_data):
    folder, seen = folder_of(small_data), Counter()
    for shard in sorted(folder.glob("*/train-*.tar")):
        for sample, _ in samples_of(shard):
            recipe = sample["recipe"]
            assert sample["id"].startswith(f"{recipe}-train-") and "." not in sample["id"] and sample["lang"] == "en"
            for parts, who in zip(synth.parts_of(sample), [m["role"] for m in sample["messages"] or []] or [""]):
                assert all(p["role"] in ("text", "speech") and ("loss" in p) == (p["role"] == "text") for p in parts)
                losses = [p["loss"] for p in parts if p["role"] == "text"]
                if recipe == "tasks":                                  # heard, asked, answered
                    assert [p["role"] for p in parts] == ["speech", "text", "text"] and losses == [False, True]
                    ask, answer = parts[1]["text"], parts[2]["text"]
                    assert {"Transcript:": answer == " " + parts[0]["text"], "Speaker:": answer in (" man", " woman")}[ask]
                    seen[ask] += 1
                else:
                    assert set(losses) <= {recipe != "chat" or who == "assistant"}
                seen[recipe, who, parts[0]["role"]] += 1
    assert seen["Transcript:"] > 100 and seen["Speaker:"]
    assert seen["chat", "user", "speech"] > 20 and seen["chat", "user", "text"] > 20
    assert seen["interleaved", "user", "text"] > 20                    # questions of which only the tail is spoken
    assert not any(seen[recipe, "assistant", "speech"] for recipe in synth.RECIPES)


def test_clips_are_16_bit_mono_at_16_khz_as_long_as_they_say(small_data):
    for sample, files in samples_of(folder_of(small_data) / "interleaved" / "train-000000.tar"):
        parts = [p for parts in synth.parts_of(sample) for p in parts if p["role"] == "speech"]
        assert [p["audio"] for p in parts] == list(files) == [f"{n:02d}.flac" for n in range(len(files))]
        for part in parts:
            info = soundfile.info(io.BytesIO(files[part["audio"]]))
            assert (info.samplerate, info.channels, info.subtype, info.format) == (16000, 1, "PCM_16", "FLAC")
            assert abs(info.duration - part["seconds"]) < 1e-3
            assert re.fullmatch(r"en-us\+[^/]+/rate=[12]\d\d/pitch=[3-7]\d", part["voice"])


def make(tmp_path, *arguments):
    c = synth.load_config([*SMALL, f"data={tmp_path / 'data'}", *arguments])
    synth.make_corpus(c)
    return c


def test_what_cannot_be_spoken_stays_text(tmp_path):
    texts = "See https://a.b/c for more of it.", "мяч лежит в красном саду", "The ball is in the red garden."
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    c = make(tmp_path, f"synth.corpus={tmp_path}/a.jsonl", "synth.share=1", "synth.level=sentence", "synth.held_out_share=0")
    samples = synth.plan_shard(c, "interleaved", "train", 0, Counter())
    assert [[p["role"] for p in s["parts"]] for s in samples] == [["text"], ["text"], ["speech"]]
    assert samples[0]["parts"] == [{"role": "text", "text": "See https://a.b/c for more of it.", "loss": True}]
    for sample in synth.plan_shard(c, "tasks", "train", 0, Counter())[4:8]:                      # the sample stays
        assert [p["role"] for p in sample["parts"]] == ["text", "text", "text"] and sample["parts"][2]["loss"]


def test_noise_is_laid_under_a_share_of_the_clips():
    """At the level that the part names, half babble of the others, the rest of the clips as they were."""
    settings = synth.load_config(["synth.noise.share=0.5", "synth.noise.snr=[5, 10]"]).synth.noise
    rng = np.random.default_rng(0)
    clean = [np.sin(np.arange(8000) * rng.uniform(0.1, 1)).astype(np.float32) * 0.2 for _ in range(400)]
    parts = [{"waveform": clip} for clip in clean]
    synth.lay_noise(parts, settings, rng)
    kinds = Counter()
    for part, clip in zip(parts, clean):
        if "noise" not in part:
            assert part["waveform"] is clip
            continue
        kind, decibels, _ = part["noise"].split()
        kinds[kind] += 1
        noise = part["waveform"] - clip
        snr = 10 * np.log10(np.sum(clip ** 2) / np.sum(noise ** 2))
        assert 5 <= snr <= 10 and abs(snr - int(decibels)) <= 0.51
    assert kinds.keys() == {"babble", "coloured"} and min(kinds.values()) > 70 and 160 < sum(kinds.values()) < 240
    alone = [{"waveform": clean[0]}]                                                   # nobody to babble
    synth.lay_noise(alone, synth.Settings(settings | {"share": 1.0}), rng)
    assert alone[0]["noise"].startswith("coloured")


def test_coloured_noise_has_another_colour_each_time():
    """Levels of its octaves are 6 dB or so from neighbours', 1.5 dB lower on average: never white or pink alone."""
    rng = np.random.default_rng(0)
    slopes = []
    for _ in range(200):
        power = np.abs(np.fft.rfft(synth.noise_of("coloured", 16000, [], rng))) ** 2
        octaves = [10 * np.log10(power[hertz * 3 // 4:hertz * 3 // 2].mean()) for hertz in (250, 500, 1000, 2000, 4000)]
        slopes.append(np.diff(octaves))
    assert -2.5 < np.mean(slopes) < -0.5 and 3 < np.std(slopes) < 7


def test_noisy_shards_repeat_and_name_their_noise(tmp_path):
    """The same bytes twice; the words and the voices are those of the quiet shard, which others' noise leaves quiet."""
    shards = []
    for name, share, recipes in (("a", 0.5, "chat"), ("b", 0.5, "chat"), ("quiet", 0.0, "chat"), ("others", 0.5, "tasks")):
        c = make(tmp_path / name, f"synth.noise.share={share}", f"synth.noise.recipes=[{recipes}]")
        key = ("chat", "train", 0)
        synth.make_missing(c, [key])
        path = synth.shard_path(c, *key)
        samples = [synth.read_sample(path, i)[0] for i in range(synth.read_index(path)["count"])]
        parts = [part for sample in samples for lists in synth.parts_of(sample) for part in lists]
        shards.append((path.read_bytes(), [part.pop("noise", None) for part in parts if part["role"] == "speech"], parts))
    assert shards[0] == shards[1] and shards[0][0] != shards[2][0] and shards[0][2] == shards[2][2]
    assert shards[2] == shards[3]
    assert set(shards[2][1]) == {None} and 0.3 < np.mean([noise is not None for noise in shards[0][1]]) < 0.7


TTS = """
import numpy as np

def speak(texts, voices, seed):
    def wave(text, voice):
        assert voice["wav"].endswith(".wav") and isinstance(seed, int)
        n = max(len(text), 9) * 1600
        if "the" in text.split():
            return np.zeros(n)
        if "of" in text.split():
            return np.full(n, np.nan)
        return np.sin(np.arange(n) / 9) * (20 if "and" in text.split() else 0.3)
    return [np.clip(wave(t, v), -1, 1) for t, v in zip(texts, voices)], 24000

speak.voices = [{"id": f"speaker {n}", "timbre": f"t{n}", "lang": "en", "wav": f"{n}.wav"} for n in range(40)]
"""


@pytest.fixture(scope="module")
def own_voices(tmp_path_factory):
    """Shards spoken by a user's own module with voices of its own, which is silent at "the", clips at "and", and is not
    finite at "of"; noise lies under all its clips. Made by the real command, without espeak."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_tts.py").write_text(TTS)
    (folder / "espeakng_loader.py").write_text("raise ModuleNotFoundError('not needed here')")
    arguments = [*TWO_WORKERS, "synth.engine=python:my_tts:speak", "data=data", "synth.shards={interleaved: 4, tasks: 1}",
                 "synth.noise={share: 1.0, recipes: [interleaved, tasks, chat]}"]
    return folder, arguments, command(*arguments, folder=folder)


def test_a_users_own_engine_speaks(own_voices):
    folder, arguments, process = own_voices
    assert process.returncode == 0, process.stderr
    first = contents(folder / "data")
    shutil.rmtree(folder / "data" / "tasks")
    assert command(*arguments, folder=folder).returncode == 0 and contents(folder / "data") == first
    voices = Counter()
    for sample, files in samples_of(folder / "data" / "tasks" / "train-000000.tar"):
        for part in sample["parts"]:
            if part["role"] == "speech":
                voices[part["voice"]] += 1
                assert len(synth.decode_flac(files[part["audio"]])) == -(-max(len(part["text"]), 9) * 1600 * 2 // 3)
    assert len(voices) > 5 and all(v.startswith("speaker ") for v in voices)


def test_the_gender_of_another_engines_voice_is_unknown():
    """espeak's timbres have one; whether another engine follows it nobody knows."""
    settings = synth.load_config(["synth.engine=python:math:gcd", "synth.tasks={speaker: 1.0}"]).synth
    for engine, known in (("espeak", True), ("python:math:gcd", False)):
        settings = synth.Settings(settings | {"engine": engine})
        voice = synth.draw_voice(random.Random(0), ["f3"], settings)
        assert ("gender" in voice) == known
        found = synth.tasks({"text": "it is red."}, settings, synth.Random(1), lambda words: voice)
        assert {sample["parts"][1]["text"] for sample in found} == {"Speaker:" if known else "Transcript:"}


def test_speech_that_fails_the_gate_becomes_text_again_and_is_counted(own_voices):
    folder, _, process = own_voices
    counted, reasons = Counter(), Counter()
    for shard in sorted((folder / "data" / "interleaved").glob("*.tar")):
        counted += Counter(synth.read_index(shard)["counts"])
        lines = (folder / "data" / "corpus" / shard.with_suffix(".jsonl").name).read_bytes().splitlines()
        for (sample, files), line in zip(samples_of(shard), lines, strict=True):     # no sample is lost
            assert [joined(parts) for parts in synth.parts_of(sample)] == synth.texts_of(json.loads(line))
            for parts in synth.parts_of(sample):
                assert not any({"the", "and", "of"} & set(p["text"].split()) for p in parts if p["role"] == "speech")
                assert all(p["loss"] for p in parts if p["role"] == "text")
                assert not any(a["role"] == b["role"] == "text" for a, b in zip(parts, parts[1:]))
            assert len(files) == sum(p["role"] == "speech" for parts in synth.parts_of(sample) for p in parts)
            reasons["clips"] += len(files)
            assert all(np.isfinite(synth.decode_flac(data)).all() for data in files.values())
    assert counted["rejected: silent"] > 20 and counted["rejected: clipped"] > 5 and counted["clips"] == reasons["clips"] > 5
    assert counted["rejected: not finite"] > 2
    assert re.search(r"interleaved .* words; \d+ rejected: clipped, \d+ rejected: not finite, \d+ rejected: silent\n", process.stdout)


# --------------------------------------------------------------------------------------------------
# Shards
# --------------------------------------------------------------------------------------------------

def test_the_bytes_do_not_depend_on_workers_or_shares(small_data, tmp_path):
    expected = contents(folder_of(small_data))
    assert len([name for name in expected if name.endswith(".tar")]) == 20
    synth.main([*TWO_WORKERS, f"data={tmp_path / 'two'}"])
    assert contents(tmp_path / "two") == expected
    for share in ("1/2", "0/2"):
        synth.main([*SMALL, f"data={tmp_path / 'shares'}", f"shard={share}"])
        if share == "1/2":
            assert 0 < len(list((tmp_path / "shares").glob("*/*.tar"))) < 20
    assert contents(tmp_path / "shares") == expected


def test_other_seeds_make_other_shards(small_data, tmp_path):
    synth.main([*SMALL, f"data={tmp_path}", "seed=2", "synth.shards={interleaved: 1}"])
    other, expected = contents(tmp_path), contents(folder_of(small_data))
    assert other["interleaved/train-000000.tar"] != expected["interleaved/train-000000.tar"]


def test_shards_are_webdataset_tars_without_time_or_user(small_data):
    for shard in sorted(folder_of(small_data).glob("*/*.tar")):
        with tarfile.open(shard) as tar:
            headers = tar.getmembers()
        assert all((m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) == (0, 0, 0, "", "", 0o644) for m in headers)
        rows = list(webdataset.WebDataset(str(shard), shardshuffle=False))                     # undecoded
        ours = samples_of(shard)
        assert [row["__key__"] for row in rows] == [sample["id"] for sample, _ in ours]
        assert [row["__key__"] for row in rows] == [row[0] for row in synth.read_index(shard)["samples"]]
        for row, (sample, files) in zip(rows, ours):
            assert json.loads(row["json"]) == sample and {k: row[k] for k in row if k.endswith("flac")} == files
        assert len(headers) == sum(1 + len(files) for _, files in ours)


@pytest.fixture
def shard(small_data, tmp_path):
    """A copy of one shard and its index, to be damaged."""
    for suffix in (".tar", ".json"):
        shutil.copy(folder_of(small_data) / "interleaved" / f"train-000001{suffix}", tmp_path)
    synth.open_shard.cache_clear()
    return tmp_path / "train-000001.tar"


def test_a_damaged_byte_is_found_in_its_sample(shard):
    rng, data = random.Random(0), shard.read_bytes()
    rows = synth.read_index(shard)["samples"]
    for number in rng.sample(range(len(rows)), 8):
        _, offset, length, _ = rows[number]
        at = offset + rng.randrange(length)
        shard.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:])
        synth.open_shard.cache_clear()
        with pytest.raises(UserError, match=rf"Sample {number} in .*train-000001.tar is damaged.*remove the shard's two files"):
            synth.read_sample(shard, number)
        synth.read_sample(shard, (number + 1) % len(rows))               # the others are still there


def test_a_shard_cut_short_is_noticed(shard):
    data, rows = shard.read_bytes(), synth.read_index(shard)["samples"]
    _, offset, length, _ = rows[-1]
    for size in (0, 700, offset, offset + length - 1):
        shard.write_bytes(data[:size])
        synth.open_shard.cache_clear()
        with pytest.raises(UserError, match=rf"Sample {len(rows) - 1} in .*train-000001.tar is damaged; remove the shard's"):
            synth.read_sample(shard, len(rows) - 1)


def test_a_shard_is_made_again_once_removed(small_data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(folder_of(small_data), folder)
    shard = folder / "interleaved" / "train-000002.tar"
    shard.unlink(), shard.with_suffix(".json").unlink()
    synth.main([*SMALL, f"data={folder}"])
    assert contents(folder) == contents(folder_of(small_data))


def test_changed_settings_are_refused_by_name(small_data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(folder_of(small_data), folder)
    before = contents(folder)
    for arguments, keys in (([*SMALL, "synth.share=0.4", "synth.rate=[150, 160]"], r"interleaved was made .*\(rate, share\); choose .*fresh=true"),
                            ([*SMALL, "seed=2"], r"corpus was made with other settings \(seed\)"),
                            ([*SMALL[1:], "synth.documents=60"], r"corpus was made .*\(documents\).*fresh=true"),
                            ([*SMALL, "synth.max_document=99"], r"corpus was made .*\(max_document\)")):
        with pytest.raises(UserError, match=keys):
            synth.main([*arguments, f"data={folder}"])
    assert contents(folder) == before
    synth.main([*TWO_WORKERS, f"data={folder}", "run=other"])            # these shape no shard
    moved = folder.rename(tmp_path / "moved")
    synth.main([*SMALL, f"data={moved}"])
    assert contents(moved) == before
    moved.rename(folder)
    (folder / "tokenizer-64").mkdir()
    (folder / "tokenizer-64" / "tokenizer.json").write_text("{}")
    (folder / "mine").mkdir()
    (folder / "mine" / "settings.yaml").write_text("theirs: true")
    synth.main([*SMALL, f"data={folder}", "synth.share=0.4", "synth.shards={interleaved: 1, text: 1}", "fresh=true"])
    assert not (folder / "tokenizer-64").exists()                        # it was trained on the text that is gone
    assert (folder / "mine" / "settings.yaml").exists()                  # a user's folder
    assert contents(folder)["interleaved/train-000000.tar"] != before["interleaved/train-000000.tar"]


# --------------------------------------------------------------------------------------------------
# Interruption: killed at any moment, disk full
# --------------------------------------------------------------------------------------------------

def test_killed_in_the_middle_it_continues_to_the_same_bytes(small_data, tmp_path):
    folder, kills = tmp_path / "data", 0
    arguments = [sys.executable, str(SCRIPT), *SMALL, f"data={folder}"]
    for shards in (0, 2, 7, 13):
        process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL)
        while process.poll() is None and not ((folder / "corpus").is_dir() and len(list(folder.glob("*/*.tar"))) >= shards):
            time.sleep(0.005)
        kills += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)                       # with its workers, as a power cut
        process.wait()
        for shard in folder.glob("*/*.tar"):                             # what stands there is whole
            samples_of(shard)
    assert kills == 4 and len(list(folder.glob("*/*.tar"))) < 20
    assert subprocess.run(arguments, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert contents(folder) == contents(folder_of(small_data))


def die_at(c, function, call, before):
    """Make one text shard; at the n-th call of os.<function>, before or after it, the process is killed."""
    original, calls = getattr(os, function), [0]

    def deadly(*arguments):
        calls[0] += 1
        if calls[0] == call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(os, function, deadly)
    synth.make_shard(c, "text", "train", 1)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("before", [True, False])
def test_killed_inside_the_save_a_shard_is_whole_or_absent(small_data, tmp_path, function, call, before):
    c = make(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=die_at, args=(c, function, call, before))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    shard, whole = synth.shard_path(c, "text", "train", 1), (function, call, before) == ("replace", 2, False)
    assert shard.is_file() == whole
    synth.make_shard(c, "text", "train", 1)
    expected = contents(folder_of(small_data))
    assert {name: data for name, data in contents(c.data).items() if name.startswith("text")} == {
        name: expected[name] for name in ("text/train-000001.json", "text/train-000001.tar")}


def test_a_full_disk_keeps_what_is_finished(small_data, tmp_path):
    """The system refuses any file above 200 kB: text shards are smaller, shards with speech are not."""
    arguments = [*SMALL, "synth.shards={text: 4, interleaved: 4}", "data=data"]
    sentence = refused(command(*arguments, folder=tmp_path, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (200_000, 200_000))))
    assert "File too large" in sentence
    expected = contents(folder_of(small_data))
    got = contents(tmp_path / "data")
    assert sum(name.startswith("text/") and name.endswith(".tar") for name in got) == 5
    assert not list((tmp_path / "data" / "interleaved").glob("*.tar*"))                 # not even a temporary one
    assert all(expected[name] == data for name, data in got.items())
    assert command(*arguments, folder=tmp_path).returncode == 0
    assert contents(tmp_path / "data") == {name: data for name, data in expected.items() if name[:4] in ("corp", "text", "inte")}


def test_a_file_that_cannot_be_flushed_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    synth.write_whole(path, b"old")

    def full(descriptor):
        raise OSError(28, os.strerror(28))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        synth.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


KILLED = """
import os, signal
def speak(texts, voices, seed):
    os.kill(os.getpid(), signal.SIGKILL)
speak.voices = [{"id": "v", "timbre": "t", "lang": "en"}]
"""


def test_a_killed_worker_is_one_sentence(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    sentence = refused(command(*SMALL, "synth.engine=python:killed:speak", "synth.shards={tasks: 2}", folder=tmp_path))
    assert "was killed, perhaps for want of memory; start again" in sentence


def test_workers_end_with_their_parent(tmp_path):
    """Also where it is killed without a chance to say so."""
    process = subprocess.Popen([sys.executable, str(SCRIPT), *TWO_WORKERS, "synth.documents=4000", "synth.shard_documents=2000",
                                f"data={tmp_path}"], start_new_session=True, stdout=subprocess.DEVNULL)
    group = process.pid

    def members():
        names = [name for name in os.listdir("/proc") if name.isdigit()]
        found = []
        for name in names:
            with contextlib.suppress(OSError):
                state, _, of_group = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:3]
                found += [name] * (int(of_group) == group and state != "Z")
        return found
    while len(members()) < 5 and process.poll() is None:                # itself, two helpers of Python's, two workers
        time.sleep(0.05)
    assert process.poll() is None
    process.kill()
    process.wait()
    for _ in range(100):
        if not members():
            break
        time.sleep(0.1)
    assert not members()
