"""Corpora as people have them: languages, what a model wrote, files of many kinds in one folder."""
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL

import inserter
import synth
from synth import UserError

sys.path.insert(0, str(Path(synth.__file__).parent / "experiments"))
from chinese import documents                                           # noqa: E402

ONE_SHARD = "synth.shards={interleaved: 1, tasks: 1, text: 1, chat: 1, continuation: 1}"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def settings_of(tmp_path, corpus, *more):
    return synth.load_config([*SMALL, f"data={tmp_path / 'data'}", f"synth.corpus={corpus}", "synth.held_out_share=0",
                              ONE_SHARD, *more])


def planned(tmp_path, rows, recipe, *more):
    """The samples that a recipe plans for a corpus of these rows."""
    write_lines(tmp_path / "a.jsonl", rows)
    c = settings_of(tmp_path, tmp_path / "a.jsonl", *more)
    synth.make_corpus(c)
    return synth.plan_shard(c, recipe, "train", 0, Counter())


def accents_of(sample):
    return {part["voice"]["accent"] for parts in synth.parts_of(sample) for part in parts if part["role"] == "speech"}


def made(c, recipe):
    """All samples of a recipe's first shard, with their files, and what its index counts."""
    path = synth.shard_path(c, recipe, "train", 0)
    index = synth.read_index(path)
    return [synth.read_sample(path, number) for number in range(index["count"])], Counter(index["counts"])


# --------------------------------------------------------------------------------------------------
# Languages
# --------------------------------------------------------------------------------------------------

CHINESE = "汤姆把红色的球放在老花园里。他用Python3写了一个程序,然后坐HTTP快车回家。安娜在厨房里喝了两杯热茶。"
ENGLISH = "tom puts the red ball in the old garden. anna drinks two cups of tea in the kitchen."


@pytest.mark.parametrize("recipe", ["interleaved", "tasks"])
def test_a_mixed_corpus_is_spoken_by_voices_of_each_language(tmp_path, recipe):
    rows = [{"text": CHINESE, "lang": "zh"}, {"text": ENGLISH, "lang": "en"}, {"text": ENGLISH, "lang": "en-GB"}] * 15
    found = {}
    for sample in planned(tmp_path, rows, recipe, "synth.accents={en: [en-us], zh: [cmn, yue]}", "synth.share=0.5"):
        found[sample["lang"]] = found.get(sample["lang"], set()) | accents_of(sample)
    assert found == {"zh": {"cmn", "yue"}, "en": {"en-us"}, "en-GB": {"en-us"}}


def test_chinese_segments_have_five_words_and_cut_no_latin_run():
    settings = synth.load_config(["synth.lang=zh", "synth.share=0.5"]).synth
    lengths, shares = [], []
    for seed in range(300):
        ranges = synth.segments(CHINESE, settings, synth.Random(seed))
        shares.append(sum(synth.count_words(CHINESE[start:end]) for start, end in ranges))
        for start, end in ranges:
            lengths.append(synth.count_words(CHINESE[start:end]))
            for edge in (start, end):
                assert not re.fullmatch("[A-Za-z0-9]{2}", CHINESE[edge - 1:edge + 1]), CHINESE[start:end]
    assert min(lengths) == 5
    assert np.mean(shares) / synth.count_words(CHINESE) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("more", [[], ["synth.accents={en: [en-us], fr: []}"]])
def test_a_language_without_a_voice_stays_text(tmp_path, more):
    french = "le ballon rouge est dans le grand jardin de ma tante."
    rows = [{"text": french, "lang": "fr"}, {"text": french}, {"text": french, "lang": ""}, {"text": french, "lang": None}]
    samples = planned(tmp_path, rows, "interleaved", "synth.share=1", *more)
    assert [bool(accents_of(sample)) for sample in samples] == [False, True, True, True]
    assert [sample["lang"] for sample in samples] == ["fr", "en", "en", "en"]
    assert all("".join(part["text"] for part in sample["parts"]) == french for sample in samples)


def test_an_engines_voices_speak_their_language(tmp_path, monkeypatch):
    (tmp_path / "two_tongues.py").write_text(
        "def speak(texts, voices, seed): pass\n"
        "speak.voices = [{'id': f'{lang}-{n}', 'timbre': 'one', 'lang': lang} for lang in ('zh-CN', 'en-GB') for n in range(3)]\n")
    monkeypatch.chdir(tmp_path)
    rows = [{"text": CHINESE, "lang": "cmn"}, {"text": ENGLISH}, {"text": "le ballon est rouge", "lang": "fr"}] * 10
    for sample in planned(tmp_path, rows, "interleaved", "synth.engine=python:two_tongues:speak", "synth.share=1"):
        voices = {part["voice"]["lang"] for part in sample["parts"] if part["role"] == "speech"}
        assert voices == {"cmn": {"zh-CN"}, "en": {"en-GB"}, "fr": set()}[sample["lang"]]


def test_a_language_that_names_an_accent_gets_it(tmp_path):
    rows = [{"text": CHINESE, "lang": lang} for lang in ("yue", "cmn", "zh")] * 9
    accents = {"yue": set(), "cmn": set(), "zh": set()}
    for sample in planned(tmp_path, rows, "interleaved", "synth.accents={zh: [cmn, yue]}", "synth.share=1"):
        accents[sample["lang"]] |= accents_of(sample)
    assert accents == {"yue": {"yue"}, "cmn": {"cmn"}, "zh": {"cmn", "yue"}}


def test_signs_above_and_below_letters_break_no_word():
    assert synth.WORD.findall("हिन्दी में cafe\u0301 ferme\u0301, it's น้ำ") == ["हिन्दी", "में", "cafe\u0301", "ferme\u0301", "it's", "น้ำ"]


def test_a_tokenizer_from_scratch_cuts_chinese_where_speech_may_begin(tmp_path):
    """Text before and after a spoken segment has the tokens that the whole text has."""
    write_lines(tmp_path / "zh.jsonl", documents(60, synth.Random(1)))
    c = settings_of(tmp_path, tmp_path / "zh.jsonl", "synth.lang=zh", "synth.shards={text: 1}")
    synth.make_shards(c)
    tok = inserter.load_tokenizer(c)
    ids = tok(CHINESE)
    for start, end in synth.segments(CHINESE, c.synth, synth.Random(3)):
        assert tok(CHINESE[:start]) + tok(CHINESE[start:end]) + tok(CHINESE[end:]) == ids
    assert tok("it's tom's ball") == [i for text in ("it", "'s", " tom", "'s", " ball") for i in tok(text)]


def test_chinese_shards_are_spoken_in_mandarin(tmp_path):
    """A Chinese world by rule: every recipe that speaks has Chinese clips, of at least five words in a text."""
    write_lines(tmp_path / "zh.jsonl", documents(60, synth.Random(1)))
    c = settings_of(tmp_path, tmp_path / "zh.jsonl", "synth.lang=zh", "synth.shards={interleaved: 1, tasks: 1, chat: 1}")
    synth.make_shards(c)
    for recipe in c.synth.shards:
        samples, counts = made(c, recipe)
        parts = [part for sample, _ in samples for parts in synth.parts_of(sample) for part in parts]
        spoken = [part for part in parts if part["role"] == "speech"]
        assert {sample["lang"] for sample, _ in samples} == {"zh"} and counts["clips"] == len(spoken) > 5
        assert all(part["voice"].startswith("cmn+") for part in spoken)
        if recipe == "interleaved":
            own = [part for sample, _ in samples for part in sample["parts"] or [] if part["role"] == "speech"]
            assert own and all(synth.count_words(part["text"]) >= 5 for part in own)


# --------------------------------------------------------------------------------------------------
# What a model wrote
# --------------------------------------------------------------------------------------------------

def test_continuations_speak_what_was_read(tmp_path):
    rows = [{"number": 0, "text": "tom has a ball. it is red.", "spoken": [0, 15]},
            {"number": 1, "messages": [{"role": "user", "content": "Go on: anna sits in the garden."},
                                       {"role": "assistant", "content": "she reads."}], "spoken": [7, 31]},
            {"text": "nobody was given this."}]
    write_lines(tmp_path / "own.jsonl", rows)
    c = settings_of(tmp_path, tmp_path / "own.jsonl", "synth.max_document=5")
    synth.make_shards(c)
    found = [[(part["role"], part["text"], part.get("loss")) for parts in synth.parts_of(sample) for part in parts]
             for sample, _ in made(c, "continuation")[0]]
    assert found == [
        [("speech", "tom has a ball.", None), ("text", " it is red.", True)],
        [("text", "Go on: ", False), ("speech", "anna sits in the garden.", None), ("text", "she reads.", True)]]
    assert len(made(c, "text")[0]) == 3                                # an ordinary corpus for the others


@pytest.mark.parametrize("row", [
    *({"text": "tom has a ball.", "spoken": spoken} for spoken in ([3, 3], [-1, 4], [0], 7, "all day")),
    {"text": 3}, {"messages": [{"role": "user"}]}, {"messages": [{"role": "robot", "content": "a"}]}, {"audio_filepath": "a.wav"}])
def test_lines_that_are_no_document(tmp_path, capsys, row):
    write_lines(tmp_path / "own.jsonl", [{"text": "one"}, row])
    left_out = Counter()
    assert list(synth.read_documents(str(tmp_path / "own.jsonl"), left_out)) == [{"text": "one"}]
    assert left_out.total() == 1 and "own.jsonl, line 2, is left out: " in capsys.readouterr().out


def test_empty_columns_hide_no_others(tmp_path):
    turns = [{"role": "user", "content": "is it red"}]
    write_lines(tmp_path / "a.jsonl", [
        {"text": "it is red.", "messages": None}, {"text": "it is red.", "messages": []}, {"text": None, "messages": turns},
        {"text": "it is red.", "lang": None, "spoken": None, "endless": False}])
    found = list(synth.read_documents(str(tmp_path / "a.jsonl"), Counter()))
    assert found == [{"text": "it is red."}] * 2 + [{"messages": turns}] + [{"text": "it is red."}]


def test_the_end_of_what_was_cut_off_is_a_target_of_no_recipe(tmp_path):
    rows = [{"text": ENGLISH, "spoken": [0, 41], "endless": True}, {"text": ENGLISH}]
    for recipe, found in (("text", [True, None]), ("interleaved", [True, None]), ("continuation", [True]),
                          ("tasks", [None] * 8)):
        folder = tmp_path / recipe
        folder.mkdir()
        assert [sample.get("endless") for sample in planned(folder, rows, recipe)] == found
    whole = synth.cut_document({"text": ENGLISH, "endless": True}, 5)
    assert whole == [{"text": ENGLISH, "endless": True}]


def test_what_a_model_wrote_is_kept_to_the_letter(tmp_path):
    """`spoken` counts its characters, which cleaning would change."""
    write_lines(tmp_path / "own.jsonl", [{"text": "Tom &amp; Anna sit. They read.", "spoken": [0, 19]}])
    found, = synth.read_documents(str(tmp_path / "own.jsonl"), Counter())
    assert found == {"text": "Tom &amp; Anna sit. They read.", "spoken": [0, 19]}


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

def test_a_corpus_is_read_once(tmp_path):
    """Who has the shards can do without its files; a relative path is no other corpus than the absolute one."""
    (tmp_path / "a.txt").write_text("It is red.\n\nIt is blue.\n")
    c = settings_of(tmp_path, f"{tmp_path}/*.txt", "synth.shards={text: 1}")
    synth.make_shards(c)
    (tmp_path / "a.txt").unlink()
    synth.make_shards(settings_of(tmp_path, os.path.relpath(tmp_path) + "/*.txt", "synth.shards={text: 1}"))
    with pytest.raises(UserError, match=r"corpus was made with other settings \(corpus\)"):
        synth.make_shards(settings_of(tmp_path, f"{tmp_path}/*.jsonl", "synth.shards={text: 1}"))


def test_what_is_made_is_no_part_of_the_corpus(tmp_path, monkeypatch):
    """A glob may cover the folder of what is made of it."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", [{"text": "it is red."}])
    c = settings_of(tmp_path, "*.jsonl", "synth.shards={text: 1}")
    synth.make_shards(c)
    write_lines(tmp_path / "data/written.jsonl", [{"text": "it is blue."}])
    c.synth["corpus"] = "**/*.jsonl"
    assert [document["text"] for _, document in synth.split_documents(c, Counter())] == ["it is red.", "it is blue."]
    c.synth["corpus"] = "data/*/*.json*"
    with pytest.raises(UserError, match="matches no file"):
        list(synth.split_documents(c, Counter()))
