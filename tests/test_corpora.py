"""Corpora as people have them: languages, recordings, what a model wrote, parquet, data sets of the hub."""
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
from chinese import documents, prompts
from conftest import SMALL

import bench
import inserter
import synth
from synth import UserError

ROOT = Path(synth.__file__).parent
ONE_SHARD = "synth.shards={interleaved: 1, tasks: 1, text: 1, chat: 1, continuation: 1}"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def settings_of(tmp_path, corpus, *more):
    given = [*SMALL, f"data={tmp_path / 'data'}", f"synth.corpus={corpus}", "synth.held_out_share=0", ONE_SHARD, *more]
    return synth.load_config(list({argument.partition("=")[0]: argument for argument in given}.values()))


def made(c, recipe):
    """All samples of a recipe's first shard, with their files, and what its index counts."""
    path = synth.shard_path(c, recipe, "train", 0)
    shard = synth.Shard(path)
    return [shard.read(number) for number in range(shard.count)], Counter(synth.read_index(path)["counts"])


# --------------------------------------------------------------------------------------------------
# Languages
# --------------------------------------------------------------------------------------------------

CHINESE = "汤姆把红色的球放在老花园里。他用Python3写了一个程序,然后坐HTTP快车回家。安娜在厨房里喝了两杯热茶。"
ENGLISH = "tom puts the red ball in the old garden. anna drinks two cups of tea in the kitchen."


def test_a_mixed_corpus_is_spoken_by_voices_of_each_language(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": CHINESE, "lang": "zh"}, {"text": ENGLISH, "lang": "en"}] * 15)
    c = settings_of(tmp_path, tmp_path / "a.jsonl", "synth.accents=[en-us, cmn, yue]", "synth.share=0.5")
    synth.make_corpus(c)
    accents = {"zh": Counter(), "en": Counter()}
    for recipe in ("interleaved", "tasks"):
        for sample in synth.plan_shard(c, recipe, "train", 0):
            for part in sample["parts"]:
                if part["role"] == "speech":
                    accents[sample["lang"]][part["voice"]["accent"]] += 1
    assert set(accents["en"]) == {"en-us"} and set(accents["zh"]) == {"cmn", "yue"}


def test_chinese_segments_have_five_words_and_cut_no_latin_run(tmp_path):
    settings = synth.load_config(["synth.lang=zh", "synth.accents=[cmn]", "synth.share=0.5"]).synth
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


@pytest.mark.parametrize("pool", [False, True])
def test_a_language_without_a_voice_stays_text(tmp_path, pool):
    """One that a document says; where none speaks synth.lang, which one may have forgotten to set, all voices do."""
    french = "le ballon rouge est dans le grand jardin de ma tante."
    write_lines(tmp_path / "a.jsonl", [{"text": french, "lang": "fr"}, {"text": french}, {"text": french, "lang": ""}])
    write_lines(tmp_path / "voices.jsonl", [{"id": "v", "timbre": "one", "lang": "de_DE"}])
    voices = f"synth.voices={tmp_path / 'voices.jsonl'}" if pool else "synth.accents=[de]"
    c = settings_of(tmp_path, tmp_path / "a.jsonl", "synth.share=1", voices)
    synth.make_corpus(c)
    samples = synth.plan_shard(c, "interleaved", "train", 0)
    assert [any(part["role"] == "speech" for part in sample["parts"]) for sample in samples] == [False, True, True]
    assert [sample["lang"] for sample in samples] == ["fr", "en", "en"]


def test_voices_of_a_file_speak_their_language(tmp_path):
    write_lines(tmp_path / "voices.jsonl", [{"id": f"{lang}-{n}", "timbre": "one", "lang": lang}
                                            for lang in ("zh-CN", "en-GB") for n in range(3)])
    write_lines(tmp_path / "a.jsonl", [{"text": CHINESE, "lang": "cmn"}, {"text": ENGLISH}] * 10)
    c = settings_of(tmp_path, tmp_path / "a.jsonl", f"synth.voices={tmp_path / 'voices.jsonl'}", "synth.share=1")
    synth.make_corpus(c)
    for sample in synth.plan_shard(c, "interleaved", "train", 0):
        voices = {part["voice"]["lang"] for part in sample["parts"] if part["role"] == "speech"}
        assert voices == ({"zh-CN"} if sample["lang"] == "cmn" else {"en-GB"})


@pytest.mark.parametrize("accent, lang, read", [("hak", "hak", 0), ("ja", "ja", 0), ("cmn", "zh", 1), ("yue", "yue", 1)])
def test_voices_that_cannot_read_characters_do_not(tmp_path, accent, lang, read):
    """espeak's Hakka and Japanese say "Chinese letter" in place of each."""
    write_lines(tmp_path / "a.jsonl", [{"text": "山水天地人", "lang": lang}] * 4)
    c = settings_of(tmp_path, tmp_path / "a.jsonl", f"synth.accents=[{accent}]", "synth.share=1")
    synth.make_corpus(c)
    for sample in synth.plan_shard(c, "interleaved", "train", 0):
        assert sum(part["role"] == "speech" for part in sample["parts"]) == read


def test_a_language_that_names_an_accent_gets_it(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": CHINESE, "lang": lang} for lang in ("yue", "cmn", "zh")] * 9)
    c = settings_of(tmp_path, tmp_path / "a.jsonl", "synth.accents=[cmn, yue]", "synth.share=1")
    synth.make_corpus(c)
    accents = {"yue": set(), "cmn": set(), "zh": set()}
    for sample in synth.plan_shard(c, "interleaved", "train", 0):
        accents[sample["lang"]] |= {part["voice"]["accent"] for part in sample["parts"] if part["role"] == "speech"}
    assert accents == {"yue": {"yue"}, "cmn": {"cmn"}, "zh": {"cmn", "yue"}}


def test_signs_above_and_below_letters_break_no_word():
    assert synth.WORD.findall("हिन्दी में cafe\u0301 ferme\u0301, it's น้ำ") == ["हिन्दी", "में", "cafe\u0301", "ferme\u0301", "it's", "น้ำ"]
    found = bench.compared({"text": "वह पीती है", "response": "वह पाता है"})
    assert found["WER"] == (1, 3) and found["exact"] == (0, 1)


def test_a_tokenizer_from_scratch_cuts_chinese_where_speech_may_begin(tmp_path):
    """Text before and after a spoken segment has the tokens that the whole text has."""
    write_lines(tmp_path / "zh.jsonl", documents(60, synth.Random(1)))
    c = settings_of(tmp_path, tmp_path / "zh.jsonl", "synth.lang=zh", "synth.accents=[cmn]", "model.vocab=2048")
    synth.make_shards(c)
    tok = inserter.load_tokenizer(c)
    ids = tok(CHINESE)
    for start, end in synth.segments(CHINESE, c.synth, synth.Random(3)):
        assert tok(CHINESE[:start]) + tok(CHINESE[start:end]) + tok(CHINESE[end:]) == ids
    assert tok("it's tom's ball") == [i for text in ("it", "'s", " tom", "'s", " ball") for i in tok(text)]


def test_han_characters_are_single_words_for_ctc():
    class Spelled:
        def __call__(self, text):
            return [text]
    assert inserter.word_tokens({"text": "It's 红色 한국어"}, Spelled()) == [" it's", "红", "色", " 한국어"]


# --------------------------------------------------------------------------------------------------
# Recordings
# --------------------------------------------------------------------------------------------------

def sound(seconds, rate):
    return 0.3 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 300 / rate)


@pytest.fixture
def manifest(tmp_path):
    """Recordings of many kinds, good and bad, and a manifest beside them."""
    folder = tmp_path / "clips"
    folder.mkdir()
    soundfile.write(folder / "stereo.wav", np.stack([sound(1, 44100)] * 2, 1), 44100)
    soundfile.write(folder / "phone.flac", sound(2, 8000), 8000)
    soundfile.write(folder / "book.ogg", sound(1.5, 24000), 24000)
    soundfile.write(folder / "long.wav", sound(30.2, 8000), 8000)
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "broken.flac").write_bytes((folder / "phone.flac").read_bytes()[:40])
    head = (folder / "silent.wav").read_bytes()[:44]
    (folder / "endless.wav").write_bytes(head[:40] + b"\xff\xff\xff\x7f" + b"\1" * 64)      # its head says 19 hours
    os.mkfifo(folder / "pipe.wav")
    rows = [{"audio_filepath": "stereo.wav", "text": "It is red.", "duration": 1.0},
            {"audio_filepath": "phone.flac", "text": "es ist rot", "task": "translate", "prompt": "German:", "lang": "en"},
            {"audio_filepath": "book.ogg", "text": "angry", "task": "emotion", "transcript": "go away"}]
    rows += [{"audio_filepath": name, "text": "lost"} for name in
             ("long.wav", "silent.wav", "empty.wav", "broken.flac", "endless.wav", "pipe.wav", "none.wav", "/dev/zero")]
    write_lines(folder / "train.json", rows)
    return folder / "train.json"


def test_a_manifest_becomes_tasks(manifest, tmp_path):
    c = settings_of(tmp_path, manifest)
    synth.make_shards(c)
    found, counts = made(c, "tasks")
    said = {sample["parts"][-1]["text"]: (sample, files) for sample, files in found}
    assert set(said) == {" It is red.", " es ist rot", " angry"} and counts["samples"] == counts["clips"] == 3
    assert {key: n for key, n in counts.items() if key.startswith("rejected: ")} == {
        "rejected: no such file": 3, "rejected: too long": 1, "rejected: silent": 1, "rejected: unreadable": 2,
        "rejected: too short": 1}
    parts = said[" es ist rot"][0]["parts"]
    assert [(part["role"], part["text"]) for part in parts] == [("speech", ""), ("text", "German:"), ("text", " es ist rot")]
    assert [part.get("loss") for part in parts] == [None, False, True]
    assert said[" It is red."][0]["parts"][0]["text"] == "It is red."
    assert [part["text"] for part in said[" angry"][0]["parts"]] == ["go away", "Emotion:", " angry"]
    for text, seconds in ((" It is red.", 1), (" es ist rot", 2), (" angry", 1.5)):
        sample, files = said[text]
        clip = synth.decode_flac(files["00.flac"])
        assert len(clip) / synth.RATE == pytest.approx(seconds, abs=0.01) and sample["parts"][0]["voice"] == "recorded"
        spectrum = np.abs(np.fft.rfft(clip))
        assert np.fft.rfftfreq(len(clip), 1 / synth.RATE)[spectrum.argmax()] == pytest.approx(300, abs=1)
    for recipe in ("interleaved", "text", "chat", "continuation"):     # a recording is no text to be spoken
        assert made(c, recipe)[0] == []


def test_parts_of_a_long_recording(tmp_path):
    """NeMo's offset and duration; the file may be longer than any clip."""
    track = np.concatenate([sound(1, 8000) * loud for loud in np.linspace(0.1, 1, 40)])
    soundfile.write(tmp_path / "long.wav", track, 8000)
    places = [{"offset": 3, "duration": 2.0}, {"offset": 38.5}, {"offset": 1, "duration": -1}, {"offset": 50.0},
              {"offset": -5}, {"offset": 1e300}, {"offset": float("nan")}, {"offset": 2}, {"duration": 2}]
    write_lines(tmp_path / "a.json", [{"audio_filepath": "long.wav", "text": f"part {n}"} | place
                                      for n, place in enumerate(places)])
    c = settings_of(tmp_path, tmp_path / "a.json", "synth.shards={tasks: 1}")
    synth.make_shards(c)
    found, counts = made(c, "tasks")
    clips = {sample["parts"][0]["text"]: synth.decode_flac(files["00.flac"]) for sample, files in found}
    assert {text: len(clip) / synth.RATE for text, clip in clips.items()} == {"part 0": 2, "part 1": 1.5}
    assert np.abs(clips["part 0"]).max() == pytest.approx(np.abs(track[24000:40000]).max(), rel=0.03)
    assert {key: n for key, n in counts.items() if key.startswith("rejected: ")} == {
        "rejected: empty": 1, "rejected: unreadable": 4, "rejected: too long": 2}


def test_a_rate_without_common_factor_costs_no_memory(tmp_path):
    soundfile.write(tmp_path / "odd.wav", sound(1, 44101), 44101)
    clip, reason = synth.read_recorded({"audio_filepath": str(tmp_path / "odd.wav")}, 30)
    assert reason is None and len(clip) == pytest.approx(16000, abs=2)
    assert np.abs(np.fft.rfft(clip)).argmax() in (300, 301)


def test_noise_hides_nothing_from_the_gate(tmp_path):
    soundfile.write(tmp_path / "quiet.wav", sound(1, 16000) * 0.01, 16000)
    soundfile.write(tmp_path / "loud.wav", np.sign(sound(1, 16000)), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "broken.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "good.wav", sound(1, 16000), 16000)
    names = ["quiet", "loud", "broken", "good"] * 7
    write_lines(tmp_path / "a.json", [{"audio_filepath": f"{name}.wav", "text": f"{name} {n}"} for n, name in enumerate(names)])
    c = settings_of(tmp_path, tmp_path / "a.json", "synth.shards={tasks: 1}", "synth.noise.share=1")
    synth.make_shards(c)
    found, counts = made(c, "tasks")
    assert [sample["parts"][0]["text"].split()[0] for sample, _ in found] == ["good"] * 7
    assert all(sample["parts"][0]["noise"] for sample, _ in found)
    assert (counts["rejected: silent"], counts["rejected: clipped"]) == (14, 7)


def test_recordings_that_are_all_elsewhere(manifest, tmp_path):
    """A folder that is not mounted: no shard is finished without its clips."""
    write_lines(manifest, [{"audio_filepath": f"{n}.wav", "text": "lost"} for n in range(3)])
    c = settings_of(tmp_path, manifest, "synth.shards={tasks: 1}")
    with pytest.raises(UserError, match="None of the 3 recordings of a shard is there"):
        synth.make_shards(c)
    assert not list((tmp_path / "data").rglob("*.tar"))


def test_a_plan_with_recordings_whose_words_are_unknown(manifest, tmp_path, capsys):
    write_lines(manifest, [{"audio_filepath": "stereo.wav", "text": "angry", "task": "emotion"}] * 3)
    synth.plan(settings_of(tmp_path, manifest, "plan=true", "synth.shards={tasks: 1}"))
    assert re.search(r"tasks\s+1\s+3\s+0\.00", capsys.readouterr().out)


def test_a_sentence_that_many_say_is_in_one_split(tmp_path):
    rows = [{"audio_filepath": f"{n}.wav", "text": "it is red"} for n in range(20)]
    rows += [{"audio_filepath": f"{n}.wav", "text": "angry", "task": "emotion"} for n in range(20)]
    write_lines(tmp_path / "a.jsonl", rows)
    c = synth.load_config([f"data={tmp_path / 'data'}", "synth.held_out_share=0.25"])
    splits = [split for split, _ in synth.split_corpus(c, str(tmp_path / "a.jsonl"))]
    assert len(set(splits[:20])) == 1 and len(set(splits[20:])) == 3


def test_a_ctc_stage_asks_for_no_unknown_words(manifest, tmp_path):
    """Of a recording whose words nobody wrote down it would learn that nothing was said."""
    documents = [inserter.Encoded("a", [1, 2], [2, -100], [np.ones(800, np.float32)], [[5, 6]]),
                 inserter.Encoded("b", [1, 2], [2, -100], [np.ones(640, np.float32)], [[]])]
    pack = inserter.packed(documents, ctc=True, waste=0, skipped=[], cursor={})
    assert (pack.clip_samples, pack.word_ids, len(pack.audio)) == ([800], [[5, 6]], 800)
    assert inserter.packed(documents, ctc=False, waste=0, skipped=[], cursor={}).clip_samples == [800, 640]


def test_a_ctc_stage_without_a_known_word_ends(manifest, tmp_path):
    """It would train on silence, step by step."""
    from test_training import COMMON, TINY
    write_lines(manifest, [{"audio_filepath": "stereo.wav", "text": f"angry {n}", "task": "emotion"} for n in range(50)])
    write_lines(tmp_path / "unread.jsonl", [{"text": "le ballon est rouge.", "lang": "fr"}] * 50)
    given = [*SMALL, *TINY, "data=data", f"synth.corpus={manifest}, unread.jsonl", "synth.held_out_share=0", ONE_SHARD,
             f"train.stages={{hear: {{steps: 3, ctc: true, mix: {{tasks: 1.0}}, {COMMON}}}}}"]
    given = list({argument.partition("=")[0]: argument for argument in given}.values())
    script("synth.py", tmp_path, *given)
    process = subprocess.run([sys.executable, ROOT / "inserter.py", *given], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and "No clip of the stage hear has words that are known" in process.stderr


# --------------------------------------------------------------------------------------------------
# What a model wrote
# --------------------------------------------------------------------------------------------------

def test_continuations_speak_what_was_given(tmp_path):
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
    *({"text": "tom has a ball.", "spoken": spoken} for spoken in ([3, 3], [-1, 4], [0, 99], [0], [0.0, 3.0])),
    {"messages": [{"role": "assistant", "content": "hello"}], "spoken": [0, 5]}, {"audio_filepath": "a.wav"},
    {"audio_filepath": "a.wav", "text": "a", "conversations": [{"from": "human", "value": "a"}]}])
def test_lines_that_are_no_document(tmp_path, row):
    write_lines(tmp_path / "own.jsonl", [row])
    with pytest.raises(UserError, match="own.jsonl line 1 has neither"):
        list(synth.read_documents(str(tmp_path / "own.jsonl")))


def test_empty_columns_hide_no_others(tmp_path):
    turns = [{"role": "user", "content": "is it red"}]
    shared = [{"from": "human", "value": "is it red"}]
    write_lines(tmp_path / "a.jsonl", [
        {"text": "it is red.", "messages": None}, {"text": "it is red.", "messages": []}, {"text": None, "messages": turns},
        {"conversations": shared, "messages": None, "lang": None}, {"text": "no", "conversations": shared}])
    found = list(synth.read_documents(str(tmp_path / "a.jsonl")))
    assert found == [{"text": "it is red."}] * 2 + [{"messages": turns}] * 3


def test_the_end_of_what_was_cut_off_is_a_target_of_no_recipe(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": ENGLISH, "spoken": [0, 41], "endless": True}, {"text": ENGLISH}])
    c = settings_of(tmp_path, tmp_path / "a.jsonl")
    synth.make_corpus(c)
    for recipe, found in (("text", [True, None]), ("interleaved", [True, None]), ("continuation", [True]),
                          ("tasks", [None] * 8)):
        assert [sample.get("endless") for sample in synth.plan_shard(c, recipe, "train", 0)] == found


def test_a_range_counts_no_characters_that_cleaning_changes(tmp_path):
    rows = [{"text": "Tom &amp; Anna sit. They read.", "spoken": [0, 19]}, {"text": "it is red", "spoken": "all day"}]
    write_lines(tmp_path / "own.jsonl", rows)
    c = settings_of(tmp_path, tmp_path / "own.jsonl")
    assert [document for _, document in synth.split_corpus(c, str(tmp_path / "own.jsonl"))] == [
        {"text": "Tom & Anna sit. They read."}, {"text": "it is red"}]


# --------------------------------------------------------------------------------------------------
# Files of other people
# --------------------------------------------------------------------------------------------------

def test_parquet_with_text_messages_or_conversations(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "is it red"},
            {"role": "assistant", "content": "yes."}]
    shared = [{"from": "human", "value": "is it blue"}, {"from": "gpt", "value": "no."}]
    for name, table in (("text", {"text": ["it is red.", "it is blue."], "url": ["a", "b"]}),
                        ("chat", {"messages": [said], "score": [3]}), ("shared", {"conversations": [shared]})):
        parquet.write_table(pyarrow.table(table), tmp_path / f"{name}.parquet")
    documents = [document for path in sorted(tmp_path.glob("*.parquet")) for document in synth.read_documents(str(path))]
    assert documents == [
        {"messages": said},
        {"messages": [{"role": "user", "content": "is it blue"}, {"role": "assistant", "content": "no."}]},
        {"text": "it is red."}, {"text": "it is blue."}]
    c = settings_of(tmp_path, f"{tmp_path}/*.parquet")
    synth.make_shards(c)
    assert [len(made(c, recipe)[0]) for recipe in ("text", "chat")] == [4, 2]


@pytest.mark.parametrize("table, sentence", [
    ({"body": ["it is red."]}, "a.parquet row 1 has neither \"text\" nor \"messages\""), (None, "cannot be read as parquet")])
def test_parquet_without_documents(tmp_path, table, sentence):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    if table:
        parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    c = settings_of(tmp_path, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=sentence):
        synth.make_shards(c)
    assert not list((tmp_path / "data").rglob("*.tar"))


def offline(tmp_path, corpus):
    """synth.py in a process that has the hub's cache and no network."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, ROOT / "synth.py", *SMALL, f"synth.corpus={corpus}", "synth.held_out_share=0",
                           "data=data", ONE_SHARD], cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_a_data_set_of_the_hub(tmp_path):
    """Its files by kind or by glob, out of the cache as the hub's client lays it out; none of its code is run."""
    folder = tmp_path / "hub/hub/datasets--me--words"
    snapshot = folder / "snapshots/abc123/data"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc123")
    write_lines(snapshot / "train.jsonl", [{"text": "the ball is red."}])
    write_lines(snapshot / "other.jsonl", [{"text": "the ball is blue."}] * 2)
    (snapshot.parent / "words.py").write_text("raise SystemExit('ran')")
    for corpus, lines in (("hf:me/words", 3), ("hf:me/words:data/train.jsonl", 1)):
        process = offline(tmp_path, corpus)
        assert process.returncode == 0, process.stderr
        assert len((tmp_path / "data/corpus/train-000000.jsonl").read_text().splitlines()) == lines
        subprocess.run(["rm", "-r", tmp_path / "data"], check=True)
    process = offline(tmp_path, "hf:me/nothing")
    assert process.returncode == 2 and "hf:me/nothing cannot be fetched" in process.stderr
    assert process.stderr.count("\n") == 1


def test_a_corpus_that_changed_is_noticed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("It is red.\n\nIt is blue.\n")
    c = settings_of(tmp_path, f"{tmp_path}/*.txt")
    synth.make_shards(c)
    synth.make_shards(c)
    before = path.stat()
    path.write_text("It is red.\n\nIt is grey.\n")                    # as long as before
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"have changed since .*corpus was made \(.*a.txt\)"):
        synth.make_shards(c)
    path.write_text("It is red.\n\nIt is blue.\n")                   # a copy with another time
    synth.make_shards(c)
    (tmp_path / "b.txt").write_text("It is new.\n")
    with pytest.raises(UserError, match="b.txt"):
        synth.make_shards(c)
    for name in ("a.txt", "b.txt"):                                    # who has the shards can do without
        (tmp_path / name).unlink()
    synth.make_shards(c)


def test_what_is_made_is_no_part_of_the_corpus(tmp_path, monkeypatch):
    """A glob may cover the folder of what is made of it."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", [{"text": "it is red."}])
    (tmp_path / "runs").mkdir()
    c = synth.load_config([*SMALL, "data=data", "synth.corpus=*.jsonl", "synth.held_out_share=0", ONE_SHARD])
    synth.make_shards(c)
    write_lines(tmp_path / "data/written.jsonl", [{"text": "it is red."}])
    for pattern, found in (("**/*.jsonl", {"a.jsonl", "data/written.jsonl"}), ("**/*.json", set())):
        c["synth"]["corpus"] = pattern
        assert set(synth.corpus_files(c)) == found == set(synth.files_of(c, pattern))


def test_a_stage_that_is_new_changes_no_run(tmp_path):
    stage = {"steps": 3, "lr": 0.1}
    synth.same_settings(tmp_path / "s.yaml", {"train": {"stages": {"one": stage}}}, (), "mend")
    more = {"one": stage, "new": stage | {"steps": 0}}
    synth.same_settings(tmp_path / "s.yaml", {"train": {"stages": more}}, (), "mend")
    with pytest.raises(UserError, match="train.stages.new.lr, train.stages.new.steps"):
        synth.same_settings(tmp_path / "s.yaml", {"train": {"stages": more | {"new": stage}}}, (), "mend")


def test_answers_about_recordings_are_compared_by_words_and_letters():
    assert bench.compared({"text": "It is red.", "response": " it is red"}) == {"WER": (0, 3), "CER": (0, 7), "exact": (1, 1)}
    assert bench.compared({"text": "汤姆有球", "response": "汤母有球"}) == {"WER": (1, 4), "CER": (1, 4), "exact": (0, 1)}
    assert bench.compared({"text": "a cat", "response": None}) == {"WER": (2, 2), "CER": (4, 4), "exact": (0, 1)}


# --------------------------------------------------------------------------------------------------
# The whole path: Chinese by rule, and recordings
# --------------------------------------------------------------------------------------------------

def script(name, folder, *arguments):
    process = subprocess.run([sys.executable, ROOT / name, *arguments], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_chinese_and_recordings_through_synthesis_training_and_scoring(tmp_path):
    """300 documents by rule and eight recordings: every recipe has Chinese clips, a model is trained, asked aloud under
    the five conditions, and scored on recordings that it has not heard."""
    from test_training import COMMON, TINY
    write_lines(tmp_path / "zh.jsonl", documents(300, synth.Random(1)))
    espeak = synth.load_engine("espeak")
    rows = []
    for n, document in enumerate(documents(20, synth.Random(2))):
        if "text" in document:
            voice = synth.espeak_voice("cmn", "f3", rate=180, pitch=50)
            soundfile.write(tmp_path / f"{n}.wav", espeak.speak(document["text"], voice), espeak.rate)
            rows.append({"audio_filepath": f"{n}.wav", "text": document["text"], "lang": "zh"})
    write_lines(tmp_path / "train.json", rows[:8])
    write_lines(tmp_path / "dev.json", [*rows[8:], {"audio_filepath": "none.wav", "text": "好", "lang": "zh"},
                                        rows[9] | {"task": "speaker", "text": "woman"}])
    mix = "{interleaved: 0.3, tasks: 0.3, text: 0.2, chat: 0.2}"
    small = [*SMALL, *TINY, "synth.corpus=zh.jsonl, train.json", "synth.lang=zh", "synth.accents=[cmn]",
             "synth.held_out_share=0.05", "train.pack_length=512", "bench.long_answers=8",
             f"train.stages={{pretrain: {{steps: 3, mix: {mix}, {COMMON}}}}}"]
    small = list({argument.partition("=")[0]: argument for argument in small}.values())
    script("synth.py", tmp_path, *small)
    recorded = 0
    for recipe in ("interleaved", "tasks", "text", "chat"):
        shards = sorted((tmp_path / "data" / recipe).glob("train-*.tar"))
        samples = [synth.Shard(path).read(n)[0] for path in shards for n in range(synth.Shard(path).count)]
        parts = [part for sample in samples for parts in synth.parts_of(sample) for part in parts]
        spoken = [part for part in parts if part["role"] == "speech"]
        recorded += sum(part["voice"] == "recorded" for part in spoken)
        assert {sample["lang"] for sample in samples} == {"zh"}
        assert all(part["voice"].startswith(("cmn+", "recorded")) for part in spoken)
        if recipe == "interleaved":
            own = [part for sample in samples if sample["parts"] for part in sample["parts"] if part["role"] == "speech"]
            assert own and all(synth.count_words(part["text"]) >= 5 for part in own)
    assert recorded >= 6                                                # some may be held out
    script("inserter.py", tmp_path, *small)
    write_lines(tmp_path / "ask.jsonl", prompts(2, synth.Random(3)))
    script("bench.py", tmp_path, "make=ask.jsonl", "prompts=aloud")
    out = script("bench.py", tmp_path, *small, "prompts=aloud", "system=run:t")
    assert re.search(r"Chinese\s+typed", out) and re.search(r"Chinese\s+spoken", out)
    out = script("bench.py", tmp_path, *small, "manifest=dev.json")
    folder = tmp_path / "runs/t/recordings/dev.json"
    found = json.loads((folder / "results.json").read_text())["tasks"]
    cells = [(row["task"], row["lang"], row["count"], row["unread"], row["exact"]) for row in found]
    assert cells == [("speaker", "zh", 1, 0, 0.0), ("transcribe", "zh", 3, 1, 0.0)]
    assert all(0 < row["WER"] and row["interval"]["CER"] for row in found) and "transcribe" in out
    answers = (folder / "answers.jsonl").read_bytes()
    (folder / "answers.jsonl").write_bytes(answers[:answers.index(b"\n") + 9])       # killed in the second line
    script("bench.py", tmp_path, *small, "manifest=dev.json")
    assert (folder / "answers.jsonl").read_bytes() == answers
    write_lines(tmp_path / "dev.json", [rows[9] | {"task": "speed"}])
    with pytest.raises(AssertionError, match="was made with other settings"):
        script("bench.py", tmp_path, *small, "manifest=dev.json")


def test_bad_manifests_of_the_benchmark(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "no recording"}])
    process = subprocess.run([sys.executable, ROOT / "bench.py", f"manifest={tmp_path}/a.jsonl"], cwd=tmp_path,
                             capture_output=True, text=True)
    assert process.returncode == 2 and "a.jsonl names no recording" in process.stderr
