"""synth.py as specified: settings, tiny world, corpus, segments, recipes, shards, interruption."""
import contextlib
import doctest
import errno
import gzip
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
from conftest import SMALL

import synth
from synth import UserError

SCRIPT = Path(synth.__file__)
TWO_WORKERS = [*SMALL[:-1], "synth.workers=2"]
SETTINGS = SCRIPT.with_name("config.yaml").read_text()


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
    return [synth.read_sample(path, n) for n in range(synth.open_shard(path).count)]


def joined(parts):
    return "".join(part["text"] for part in parts)


def test_worked_examples():
    assert doctest.testmod(synth).failed == 0


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, sentence", [
    (["synth.shre=0.4"], r"Unknown key synth\.shre \(the command line\); the nearest valid key is synth\.share\."),
    (["trian.clip=1"], r"Unknown key trian\.clip .*nearest valid key is train\.clip"),
    (["synth.gate.min_rsm=1"], r"synth\.gate\.min_rsm .*nearest valid key is synth\.gate\.min_rms"),
    (["synth.share=much"], r"synth\.share in the command line must be float, not 'much'"),
    (["seed=1.5"], "seed in the command line must be int, not 1.5"),
    (["seed=010"], "seed in the command line must be int"),
    (["fresh=1"], "fresh in the command line must be bool, not 1"),
    (["fresh=no"], "fresh in the command line must be bool, not 'no'"),
    (["synth.accents=cmn"], "synth.accents in the command line must be list"),
    (["synth.rate=[a, b]"], "synth.rate in the command line must be int, not 'a'"),
    (["synth.rate=[1"], r"synth\.rate=\[1 is not valid YAML"),
    (["synth.share=0.1", "synth.share=0.2"], "synth.share is given twice"),
    (["preview"], "'preview' is not of the form key=value"),
    (["profile=qwne"], "Unknown profile 'qwne'; config.yaml has tiny, small, smol, qwen, paper"),
    (["config=none.yaml"], "no settings file none.yaml"),
    (["synth.shards.interleavd=3"], "Unknown recipe 'interleavd'.*nearest one is interleaved"),
    (["synth.share=1.5"], "synth.share is a share from 0 to 1"),
    (["synth.level=words"], "synth.level must be word or sentence, not 'words'"),
    (["train.precision=bf16"], "train.precision must be auto, float32 or bfloat16, not 'bf16'"),
    (["synth.min_words=12"], "synth.min_words must be at least 1 and at most synth.max_words"),
    (["synth.workers=0"], "synth.workers must be at least 1"),
    (["synth.max_document=0"], "synth.max_document must be at least 1, not 0"),
    (["preview=many"], "preview in the command line must be int, not 'many'"),
    (["train.stages.sft.tokens=many"], "train.stages.sft.tokens in the command line must be int, not 'many'"),
    (["synth.timbres=[3]"], "synth.timbres in the command line must be str, not 3"),
    (["synth.shards={text: many}"], "synth.shards.text in the command line must be int, not 'many'"),
    (["synth.shards=3"], "synth.shards in the command line is a section"),
    (["train.stages.sft.stepps=3"], r"sft\.stepps .*nearest valid key is train\.stages\.sft\.steps"),
    (["train.stages.sft.tokens=5"], "train.stages.sft needs either steps or tokens"),
    (["synth.rate=[200, 100]"], r"synth\.rate must be \[lowest, highest\]"),
    (["synth.tasks={sing: 1.0}"], "synth.tasks must give .* transcribe"),
    (["synth.facts={sung: 1}"], "synth.facts must give .* stated, louder, asked, cried"),
    (["synth.facts={stated: 1, cried: -1}"], "synth.facts must give .* above 0"),
    (["synth.held_out={test: 0.2}"], "synth.held_out needs the keys test and dev"),
    (["shard=2/2"], "shard must be i/n"),
    (["run=a/b"], "plain folder name"),
    (["model.from=a", "model.encoder=b", "model.llm=c"], "model.from and model.encoder exclude each other"),
    (["model.encoder=b"], "belong together"),
    (["train.keep_states=0"], "train.keep_states must be at least 1, not 0"),
    (["train.open_documents=0"], "train.open_documents must be at least 1, not 0"),
    (["train.stages.sft.steps=null", "train.stages.sft.tokens=0"], "train.stages.sft needs either steps or tokens"),
])
def test_a_wrong_setting_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        synth.load_config(arguments)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize("old, new, sentence", [
    ("seed: 1\n", "seed: 1\nseed: 2\n", r"'seed' stands twice in my\.yaml near line \d+"),
    ("  share: 0.3 ", "  share: 0.3\n  share: 0.4 ", "'share' stands twice"),
    ("seed: 1\n", "seeed: 1\n", "Unknown key seeed .my.yaml.; the nearest valid key is seed"),
    ("seed: 1\n", "", "The key seed is missing in my.yaml"),
    ("seed: 1\n", "seed: '1'\n", "seed in my.yaml must be int, not '1'"),
    ("fresh: false", "fresh: no", "fresh in my.yaml must be bool, not 'no'"),
    ("fresh: false", "fresh: [", "my.yaml is not valid YAML"),
    ("profile: tiny", "profile: tinny", "Unknown profile 'tinny'; my.yaml has tiny"),
    ("  tiny: {}", "  tiny: {sed: 2}", "Unknown key sed .my.yaml.; the nearest valid key is seed"),
    ("  tiny: {}", "  tiny: {synth: {shre: 0.2}}", r"Unknown key synth\.shre .my.yaml.; .*is synth\.share"),
    ("  tiny: {}", "  tiny: {model: {llm: 3}}", "model.llm in my.yaml must be str, not 3"),
    ("      ramp: 20", "      rampe: 20", r"Unknown key train\.stages\.sft\.rampe .my.yaml."),
    ("  gate: ", "  gate: 3\n  gaten: ", "nearest valid key is synth.gate|synth.gate in my.yaml is a section"),
])
def test_a_wrong_file_is_one_sentence(tmp_path, old, new, sentence):
    assert old in SETTINGS
    (tmp_path / "my.yaml").write_text(SETTINGS.replace(old, new, 1))
    with pytest.raises(UserError, match=sentence):
        synth.load_config([f"config={tmp_path / 'my.yaml'}"])


def test_yaml_is_read_as_it_looks():
    read = synth.read_yaml("[1e-4, 1E3, .5, no, yes, on, 1:30, 010, 12, -3, null, ~, true, 0x10, 2024-01-01]", "here")
    assert read == [1e-4, 1e3, 0.5, "no", "yes", "on", "1:30", 10.0, 12, -3, None, None, True, "0x10", "2024-01-01"]
    assert [type(x) for x in read[7:9]] == [float, int]


def test_profiles_and_the_command_line_override():
    c = synth.load_config([])
    assert (c.synth.share, c.synth.accents, c.shard, c.synth.workers) == (0.3, ["en-us"], None, 2)
    c = synth.load_config(["synth.share=1e-1", "synth.accents=[cmn, en-us]", "run=1e-4", "synth.corpus=null", "shard=1/3"])
    assert (c.synth.share, c.synth.accents, c.run, c.synth.corpus, c.shard) == (0.1, ["cmn", "en-us"], "1e-4", "null", "1/3")
    c = synth.load_config(["profile=qwen", "train.stages.sft.steps=7"])
    assert (c.run, c.synth.workers, c.model.llm, c.train.stages["sft"].steps) == ("qwen", 16, "Qwen/Qwen2.5-0.5B", 7)
    assert c.synth.share == 0.3 and c.train.stages["sft"].mix["chat"] == 0.7            # the rest is inherited
    synth.load_config(["profile=paper"])


def test_a_table_is_replaced_whole_and_a_section_key_by_key():
    c = synth.load_config(["profile=small", "synth.shards={text: 3}", "synth.gate.max_clipped=0.5"])
    assert c.synth.shards == {"text": 3}
    assert (c.synth.gate.max_clipped, c.synth.gate.max_seconds) == (0.5, 30.0)
    assert (c.synth.documents, c.synth.min_words, c.model.llm_layers, c.model.llm_width) == (80000, 5, 4, 160)
    small = synth.load_config(["profile=small"]).synth
    assert small.shards == {"interleaved": 30, "tasks": 30, "text": 40, "chat": 20}


def test_a_stage_has_the_template_where_it_says_nothing(tmp_path):
    path = tmp_path / "my.yaml"
    mine = "    mine:\n      tokens: 900\n      mix: {text: 1.0}\n"
    path.write_text(SETTINGS.replace("  stages:\n", f"  stages:\n{mine}", 1))
    c = synth.load_config([f"config={path}"])
    assert list(c.train.stages)[0] == "mine" and c.train.stages.mine.keys() == c.train.stage.keys()
    assert c.train.stages.mine == c.train.stage | {"tokens": 900, "mix": {"text": 1.0}}
    c = synth.load_config(["train.stage.packs=7"])
    assert (c.train.stages.pretrain.packs, c.train.stages.warmup_text.packs) == (7, 6)


def test_what_is_null_has_the_type_of_its_comment():
    c = synth.load_config(["model.from=3", "preview=8", "synth.timbres=[f2]", "ask=12", "score=null"])
    assert (c.model["from"], c.preview, c.synth.timbres, c.ask, c.score) == ("3", 8, ["f2"], "12", None)


@pytest.mark.parametrize("key, value", [("preview", "8"), ("ask", "what colour is the sun")])
def test_what_inserter_does_is_said_so(key, value):
    with pytest.raises(UserError, match=rf"{key} belongs to inserter\.py: run .* inserter\.py {key}={value}\."):
        synth.main([f"{key}={value}"])


@pytest.mark.parametrize("value", ["1e-4", "no", "null", "true", "12", "1:30", "a: b", "", "中文"])
def test_kept_settings_are_read_back_as_they_were(tmp_path, value):
    path = tmp_path / "settings.yaml"
    now = {"text": value, "number": 1e-5, "more": {"list": [1, 2.0, None, True], "empty": []}}
    for _ in range(2):
        synth.same_settings(path, now, (), "remedy")
    assert synth.read_yaml(path.read_text(), "") == now


def test_the_command_line_ends_with_status_2(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
    assert "nearest valid key is synth.share" in refused(command("synth.shre=1", folder=tmp_path))
    assert "no_such/*.txt' matches no file" in refused(command("synth.corpus=no_such/*.txt", folder=tmp_path))
    assert "a.jsonl line 2 is not JSON" in refused(command("synth.corpus=*.jsonl", folder=tmp_path))
    assert "no accent 'en-su'; nearest valid: en-us" in refused(command(*SMALL, "synth.accents=[en-su]", folder=tmp_path))
    assert command(*SMALL, "synth.shards={interleaved: 1}", folder=tmp_path).returncode == 0    # a slip locks no folder


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
    ("one<br/>two <!-- <b>no</b> --> three", "onetwo  three"),
    ("a<SCRIPT>var x = 1</script>b<style>p{}</style>", "ab"),
    ("tab\tkept\r\nline  \nnext\n\n\n\nfar", "tab\tkept\nline\nnext\n\nfar"),
    ("\ufeffa\x07b\x9fc\ufffd\ud800 \xa0d", "abc  d"),
    ("I <3 you, 3<4>2 and 球<好>", "I <3 you, 3<4>2 and 球<好>"),
])
def test_cleaning_keeps_text_and_drops_markup_and_control_characters(raw, kept):
    assert synth.clean(raw) == kept


def write_corpus_files(folder):
    (folder / "a.txt").write_text("First line\nsecond line.\n\n \nNext document.\n")
    (folder / "b.jsonl").write_text('\ufeff{"text": "Third &amp; last."}\n\n'
                                    '{"messages": [{"role": "user", "content": "Hi <b>you</b>"}]}\n')
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "压缩的文件。"}\n')
    (folder / "d.jsonl").mkdir()


def corpus(tmp_path, *arguments):
    c = synth.load_config([f"synth.corpus={tmp_path}/*.*", f"data={tmp_path / 'data'}", "synth.held_out_share=0", *arguments])
    return synth.make_corpus(c), [json.loads(line) for p in sorted((tmp_path / "data" / "corpus").glob("train-*.jsonl"))
                                  for line in p.read_bytes().splitlines()]


def test_a_users_corpus_is_streamed_into_shards(tmp_path):
    write_corpus_files(tmp_path)
    shards, documents = corpus(tmp_path, "synth.shard_documents=2")
    assert shards == {"train": 3}
    assert documents == [{"text": "First line\nsecond line."}, {"text": "Next document."}, {"text": "Third & last."},
                         {"messages": [{"role": "user", "content": "Hi you"}]}, {"text": "压缩的文件。"}]


@pytest.mark.parametrize("name, data, sentence", [
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl line 2 is not JSON, of which each line is one document; mend or remove"),
    ("a.jsonl", b'["text"]\n', 'line 1 has neither "text" nor "messages"'),
    ("a.jsonl", b'{"title": "a"}\n', 'line 1 has neither "text" nor "messages"'),
    ("a.jsonl", b'{"text": 3}\n', 'line 1 has neither'),
    ("a.jsonl", b'{"messages": [{"role": "robot", "content": "a"}]}\n', "line 1 has neither.*user, assistant"),
    ("a.jsonl", b'{"messages": "hello"}\n', "line 1 has neither"),
    ("a.txt", b"caf\xe9\n", r"a\.txt cannot be read as UTF-8"),
    ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], r"a\.jsonl\.gz cannot be read"),
    ("a.txt", b" \n<p></p>\n", "holds no text"),
])
def test_a_bad_corpus_file_is_named(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        corpus(tmp_path)
    (tmp_path / name).write_bytes(b"")                            # nothing half-made stands in the way afterwards
    good = tmp_path / "good.txt"
    good.write_text("It is mended.")
    assert corpus(tmp_path)[1] == [{"text": "It is mended."}]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UserError, match=r"data/corpus cannot be written .*choose another folder with data="):
        synth.make_corpus(synth.load_config([f"data={tmp_path / 'data'}"]))


def test_the_split_of_a_document_does_not_depend_on_its_place(tmp_path):
    texts = [f"Document number {n} speaks of {n * n}." for n in range(2000)]
    found = []
    for order in (texts, texts[::-1]):
        (tmp_path / "a.txt").write_text("\n\n".join(order))
        c = synth.load_config([f"synth.corpus={tmp_path}/a.txt", "synth.held_out_share=0.1"])
        found.append({document["text"]: split for split, document in synth.split_documents(c)})
    assert found[0] == found[1] and len(found[0]) == 2000
    counts = Counter(found[0].values())
    assert 150 < counts["dev"] < 250 and 150 < counts["test"] < 250


def test_corpora_are_mixed_evenly(tmp_path):
    """Of three corpora each tenth of the documents has a tenth of each one; a corpus alone keeps its order."""
    for name, count in (("a", 200), ("b", 50), ("c", 10)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {n}." for n in range(count)))
    names = ", ".join(f"{tmp_path}/{name}.txt" for name in "abc")
    c = synth.load_config([f"synth.corpus={names}", "synth.held_out_share=0"])
    texts = [document["text"] for _, document in synth.split_documents(c)]
    for start in range(0, 260, 26):
        counts = Counter(text[0] for text in texts[start:start + 26])
        assert counts["c"] == 1 and abs(counts["b"] - 5) <= 1 and abs(counts["a"] - 20) <= 1
    for name, count in (("a", 200), ("b", 50), ("c", 10)):
        assert [text for text in texts if text[0] == name] == [f"{name} {n}." for n in range(count)]
    mixed = synth.load_config([f"synth.corpus=tiny,{tmp_path}/b.txt", "synth.documents=100",
                               "synth.held_out_documents=10", "synth.held_out_share=0"])
    splits = Counter(split for split, _ in synth.split_documents(mixed))
    assert splits == {"train": 150, "dev": 10}
    with pytest.raises(UserError, match="'nowhere.txt' matches no file"):
        list(synth.split_documents(synth.load_config(["synth.corpus=tiny,nowhere.txt"])))


def test_many_files_are_made_ready_by_many_processes(tmp_path):
    """The same shards, byte for byte, as one process makes; a bad file is named, and nothing is left behind."""
    for n in range(7):
        texts = [f"<p>File {n} speaks &amp; says {m}.</p>" for m in range(20 * n)] + ["<p></p>"] * (n % 2)
        (tmp_path / f"{n}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = []
    for workers in (1, 3):
        c = synth.load_config([f"synth.corpus={tmp_path}/*.jsonl", f"data={tmp_path}/{workers}", "synth.shard_documents=50",
                               f"synth.workers={workers}"])
        synth.make_corpus(c)
        found.append(contents(c.data))
    assert found[0] == found[1] and json.loads(found[0]["corpus/index.json"])["empty_documents"] == 3
    (tmp_path / "3.jsonl").write_text("no json\n")
    c = synth.load_config([f"synth.corpus={tmp_path}/*.jsonl", f"data={tmp_path}/bad", "synth.workers=3"])
    with pytest.raises(UserError, match="3.jsonl line 1 is not JSON"):
        synth.make_corpus(c)
    assert not list((tmp_path / "bad" / "corpus").glob(".ready*"))


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


@pytest.mark.parametrize("dialogue, most, pieces", [
    ("uauaua", 14, ["uaua", "ua"]), ("uauaua", 13, ["ua", "ua", "ua"]), ("uauaua", 21, ["uauaua"]),
    ("suauaua", 16, ["suaua", "sua"]), ("suaua", 15, ["sua", "sua"]),    # the system's turn in every piece
    ("uaua", 1, ["ua", "ua"]), ("suaaua", 5, ["suaa", "sua"]),               # an exchange stays whole
    ("auua", 7, ["au", "ua"]), ("s", 1, ["s"]), ("ussa", 4, ["ussa"]),
])
def test_a_long_dialogue_is_cut_before_a_user(dialogue, most, pieces):
    found = synth.cut_document({"messages": turns(*dialogue)}, most)
    assert found == [{"messages": turns(*piece)} for piece in pieces]


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
                    assert {"Transcript:": answer == " " + parts[0]["text"], "Speaker:": answer in (" man", " woman"),
                            "Speed:": answer in (" slow", " normal", " fast")}[ask]
                    seen[ask] += 1
                else:
                    assert set(losses) <= {recipe != "chat" or who == "assistant"}
                seen[recipe, who, parts[0]["role"]] += 1
    assert seen["Transcript:"] > 100 and seen["Speed:"] and seen["Speaker:"]
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
    samples = synth.plan_shard(c, "interleaved", "train", 0)
    assert [[p["role"] for p in s["parts"]] for s in samples] == [["text"], ["text"], ["speech"]]
    assert samples[0]["parts"] == [{"role": "text", "text": "See https://a.b/c for more of it.", "loss": True}]
    for sample in synth.plan_shard(c, "tasks", "train", 0)[4:8]:                      # the sample stays
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
    alone = [{"waveform": clean[0]}, {"waveform": np.zeros(0, np.float32)}]           # nobody to babble; nothing said
    synth.lay_noise(alone, synth.Settings(settings | {"share": 1.0}), rng)
    assert alone[0]["noise"].startswith("coloured") and "noise" not in alone[1]


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
        samples = [synth.read_sample(path, i)[0] for i in range(synth.open_shard(path).count)]
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
        return np.sin(np.arange(n) / 9) * (20 if "and" in text.split() else 0.3)
    return [np.clip(wave(t, v), -1, 1) for t, v in zip(texts, voices)], 24000
"""


@pytest.fixture(scope="module")
def own_voices(tmp_path_factory):
    """Shards spoken by a user's own module, which is silent at "the" and clips at "and"; made by the real command."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_tts.py").write_text(TTS)
    (folder / "espeakng_loader.py").write_text("raise ModuleNotFoundError('not needed here')")
    (folder / "voices.jsonl").write_text("".join(
        json.dumps({"id": f"speaker {n}", "timbre": f"t{n}", "lang": "en", "wav": f"{n}.wav"}) + "\n" for n in range(40)))
    arguments = [*TWO_WORKERS, "synth.engine=python:my_tts:speak", "synth.voices=voices.jsonl", "data=data"]
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


@pytest.mark.parametrize("engine, voices, asked", [("espeak", "null", "Speed:"), ("python:a:b", "v.jsonl", "Speed:"),
                                                   ("python:a:b", "null", "Transcript:")])
def test_what_an_engine_may_not_follow_is_not_asked(engine, voices, asked):
    """espeak's voices have a rate; whether another engine speaks at it nobody knows."""
    settings = synth.load_config([f"synth.engine={engine}", f"synth.voices={voices}", "synth.tasks={speed: 1}"]).synth
    found = synth.tasks({"text": "it is red."}, settings, synth.Random(1), lambda words: {"id": "v", "rate": 190})
    assert {sample["parts"][1]["text"] for sample in found} == {asked}


def test_speech_that_fails_the_gate_becomes_text_again_and_is_counted(own_voices):
    folder, _, process = own_voices
    counted, reasons = Counter(), Counter()
    for shard in sorted((folder / "data" / "interleaved").glob("*.tar")):
        counted += Counter(synth.read_index(shard)["counts"])
        lines = (folder / "data" / "corpus" / shard.with_suffix(".jsonl").name).read_bytes().splitlines()
        for (sample, files), line in zip(samples_of(shard), lines, strict=True):     # no sample is lost
            assert [joined(parts) for parts in synth.parts_of(sample)] == synth.texts_of(json.loads(line))
            for parts in synth.parts_of(sample):
                assert not any({"the", "and"} & set(p["text"].split()) for p in parts if p["role"] == "speech")
                assert all(p["loss"] for p in parts if p["role"] == "text")
                assert not any(a["role"] == b["role"] == "text" for a, b in zip(parts, parts[1:]))
            assert len(files) == sum(p["role"] == "speech" for parts in synth.parts_of(sample) for p in parts)
            reasons["clips"] += len(files)
    assert counted["rejected: silent"] > 20 and counted["rejected: clipped"] > 5 and counted["clips"] == reasons["clips"] > 5
    by_voice = sum(n for key, n in counted.items() if key.startswith("rejected voice: t"))
    assert by_voice == counted["rejected: silent"] + counted["rejected: clipped"]
    assert re.search(r"became text again, or were left out: silent \d+, clipped \d+; most often of (t\d+ \d+(, |\n)){10}", process.stdout)


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
        name, offset, length, _ = rows[number]
        at = offset + rng.randrange(length)
        shard.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:])
        synth.open_shard.cache_clear()
        with pytest.raises(UserError, match=rf"Sample {name} in .*train-000001.tar is damaged.*remove the shard's two files"):
            synth.read_sample(shard, number)
        synth.read_sample(shard, (number + 1) % len(rows))               # the others are still there


def test_a_shard_cut_short_is_refused(shard):
    rng, data = random.Random(1), shard.read_bytes()
    for size in [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))]:
        shard.write_bytes(data[:size])
        synth.open_shard.cache_clear()
        with pytest.raises(UserError, match=rf"train-000001.tar has {size} bytes where its index says {len(data)}; remove"):
            synth.read_index(shard)


@pytest.mark.parametrize("suffix, data, sentence", [
    (".json", None, r"train-000001.json is missing; remove the shard's two files and run synth.py again"),
    (".tar", None, r"train-000001.tar is missing; remove"), (".json", b"", r"train-000001.json is damaged; remove"),
    (".json", b'{"count": 3, "samples": [["a", 0', r"train-000001.json is damaged"), (".json", b"\xff\xfe", "is damaged")])
def test_a_missing_or_broken_half_is_named(shard, suffix, data, sentence):
    shard.with_suffix(suffix).unlink() if data is None else shard.with_suffix(suffix).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        synth.read_index(shard)


def test_a_damaged_shard_is_made_again_once_removed(small_data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(folder_of(small_data), folder)
    shard = folder / "interleaved" / "train-000002.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    sentence = refused(command(*SMALL, f"data={folder}", folder=tmp_path))
    assert "train-000002.tar has 5000 bytes" in sentence and "remove the shard's two files" in sentence
    shard.unlink(), shard.with_suffix(".json").unlink()
    synth.open_shard.cache_clear()
    synth.main([*SMALL, f"data={folder}"])
    assert contents(folder) == contents(folder_of(small_data))


def test_changed_settings_are_refused_by_name(small_data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(folder_of(small_data), folder)
    before = contents(folder)
    for arguments, keys in (([*SMALL, "synth.share=0.4", "synth.rate=[150, 160]"], r"interleaved was made .*\(rate, share\); choose"),
                            ([*SMALL, "seed=2"], r"corpus was made with other settings \(seed\)"),
                            ([*SMALL[1:], "synth.documents=60"], r"corpus was made .*\(documents\).*fresh=true"),
                            ([*SMALL, "synth.max_document=99"], r"corpus was made .*\(max_document\)")):
        with pytest.raises(UserError, match=keys):
            synth.main([*arguments, f"data={folder}"])
    assert contents(folder) == before
    synth.main([*TWO_WORKERS, f"data={folder}", "run=other"])            # these shape no shard
    assert contents(folder) == before
    (folder / "tokenizer").mkdir()
    synth.main([*SMALL, f"data={folder}", "synth.share=0.4", "synth.shards={interleaved: 1, text: 1}", "fresh=true"])
    assert not (folder / "tokenizer").exists()                           # it was trained on the text that is gone
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
    synth.make_shard(c, ("text", "train", 1))


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
    synth.make_shard(c, ("text", "train", 1))
    expected = contents(folder_of(small_data))
    assert {name: data for name, data in contents(c.data).items() if name.startswith("text")} == {
        name: expected[name] for name in ("text/train-000001.json", "text/train-000001.tar")}


def test_a_full_disk_keeps_what_is_finished(small_data, tmp_path):
    """The system refuses any file above 200 kB: text shards are smaller, shards with speech are not."""
    arguments = [*SMALL, "synth.shards={text: 4, interleaved: 4}", "data=data"]
    sentence = refused(command(*arguments, folder=tmp_path, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (200_000, 200_000))))
    assert re.match(r"data/interleaved/train-00000\d\.tar could not be written \(File too large\); make room", sentence)
    expected = contents(folder_of(small_data))
    got = contents(tmp_path / "data")
    assert sum(name.startswith("text/") and name.endswith(".tar") for name in got) == 5
    assert not list((tmp_path / "data" / "interleaved").glob("*train*.tar*"))           # not even a temporary one
    assert all(expected[name] == data for name, data in got.items())
    assert command(*arguments, folder=tmp_path).returncode == 0
    assert contents(tmp_path / "data") == {name: data for name, data in expected.items() if name[:4] in ("corp", "text", "inte")}


def test_a_file_that_cannot_be_flushed_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    synth.write_whole(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.json could not be written \(No space left on device\); make room"):
        synth.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]
