"""What people bring: inputs that went wrong in neighbouring projects, each with two more of its kind.

The numbers are those of docs/cases.md.
"""
import gzip
import json
import re
import signal
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
import yaml

import bench
import inserter
import synth
from synth import Settings, UserError

ONE = ["synth.held_out_share=0", "synth.shards={interleaved: 1, tasks: 1, text: 1, chat: 1}", "synth.workers=1"]


def lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def settings_of(tmp_path, corpus, *more):
    return synth.load_config([*ONE, f"data={tmp_path / 'data'}", f"synth.corpus={corpus}", *more])


def corpus_of(tmp_path, *rows):
    """The documents that a corpus of these rows gives, and what is left out."""
    left_out = Counter()
    return list(synth.read_documents(str(lines(tmp_path / "a.jsonl", *rows)), left_out)), left_out


def spoken_of(tmp_path, rows, recipe="interleaved", *more):
    """The texts that a recipe wants to be spoken of these rows, and what is counted."""
    c = settings_of(tmp_path, lines(tmp_path / "a.jsonl", *rows), *more)
    synth.make_corpus(c)
    counts = Counter()
    samples = synth.plan_shard(c, recipe, "train", 0, counts)
    return [part["text"] for sample in samples for parts in synth.parts_of(sample) for part in parts
            if part["role"] == "speech"], counts


# --------------------------------------------------------------------------------------------------
# Sound: 1, 7, 8 (2 and 3: test_extras_recordings.py)
# --------------------------------------------------------------------------------------------------

def tone(seconds=1.0):
    return (0.3 * np.sin(np.arange(int(seconds * 16000)) * 0.12)).astype(np.float32)


def with_sample(value):
    clip = tone()
    clip[1000] = value
    return clip


@pytest.mark.parametrize("bad, reason", [
    (with_sample(np.inf), "not finite"), (with_sample(np.nan), "not finite"), (with_sample(1e30), "beyond full scale"),
    (tone() * 32768, "beyond full scale"), (np.stack([tone()] * 2), "too short"), (np.zeros(0, np.float32), "empty")])
def test_1_what_an_engine_returns_is_judged_and_spoils_no_other_clip(monkeypatch, bad, reason):
    c = synth.load_config(["synth.noise.share=1"]).synth
    good = [tone(1 + n / 10) for n in range(7)]
    monkeypatch.setattr(synth, "load_engine", lambda name: lambda texts, voices, seed: ([bad, *good], 16000))
    parts = [{"role": "speech", "text": "a ball in a garden", "loss": True, "voice": {"id": str(n)}} for n in range(8)]
    assert synth.speak(parts, c, c.noise, seed=1) == {f"rejected: {reason}": 1, "clips": 7}
    assert parts[0]["role"] == "text"
    for part in parts[1:]:
        clip = synth.decode_flac(part["flac"])
        assert np.isfinite(clip).all() and 0.01 < np.sqrt(np.mean(clip ** 2)) < 1


def test_1_a_row_or_column_of_samples_is_a_clip(monkeypatch):
    c = synth.load_config([]).synth
    for clip in (tone()[None], tone()[:, None], torch.from_numpy(tone())[None]):
        monkeypatch.setattr(synth, "load_engine", lambda name, clip=clip: lambda *asked: ([clip], 16000))
        parts = [{"role": "speech", "text": "a ball in a garden", "loss": True, "voice": {"id": "a"}}]
        assert synth.speak(parts, c, None, seed=1) == {"clips": 1} and parts[0]["seconds"] == 1.0


def test_1_a_clip_with_a_sample_that_is_no_number_is_not_heard():
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(UserError, match="every sample is a number"):
            inserter.slot_of(torch.from_numpy(with_sample(value)), 80)


@pytest.mark.parametrize("row", [
    {"audio": {"path": "ok5.wav"}, "text": "tom puts the ball"}, {"audio_filepath": "a.wav", "text": "tom puts the ball"},
    {"audios": ["a.wav"], "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"wav": "a.wav", "text": "hello"}, {"Audio": {"bytes": "UklGRg=="}, "text": "hello"},
    {"image": "x.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]}])
def test_7_sound_beside_text_is_said(tmp_path, row, capsys):
    found, left_out = corpus_of(tmp_path, row, {"text": "it is red.", "audio": None, "audiobook": "Dracula"})
    assert found == [{"text": "it is red."}]
    assert left_out == {"it has sound or pictures; extras/recordings.py reads sound": 1}
    assert "a.jsonl, line 1, is left out: it has sound" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no text to train on .*1 lines left out: it has sound or pict.*extras/rec"):
        synth.make_corpus(settings_of(tmp_path, lines(tmp_path / "b.jsonl", row)))


@pytest.mark.parametrize("name", ["q.opus", "q.m4a", "q.aiff", "q.WAVE", "q.aac", "without ending"])
def test_8_a_file_that_is_asked_is_sound(tmp_path, monkeypatch, name):
    monkeypatch.setattr(inserter, "load_run", lambda c: (None, None))
    monkeypatch.setattr(inserter, "answer", lambda model, tok, questions, **more: [(questions[0], False)])
    path = tmp_path / name
    with pytest.raises(soundfile.LibsndfileError) if "." in name else pytest.MonkeyPatch.context():
        found = inserter.ask(Settings(ask=str(path)))                   # no such file
        assert found == str(path)
    kind = {"q.opus": ("OGG", "OPUS"), "q.aiff": ("AIFF", "PCM_16")}.get(name, ("WAV", "PCM_16"))
    soundfile.write(path, tone(), 16000, format=kind[0], subtype=kind[1])
    assert len(inserter.ask(Settings(ask=str(path)))) == 16000
    path.write_bytes(b"no sound at all")
    with pytest.raises(soundfile.LibsndfileError, match=re.escape(str(path))):
        inserter.ask(Settings(ask=str(path)))


# --------------------------------------------------------------------------------------------------
# Text: 4, 9, 11, 12, 19, 20, 22 (21: test_extras_aloud.py)
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("raw, kept", [
    ("vector<int> v; if a<b and c>d", "vector<int> v; if a<b and c>d"),
    ("<p>One.</p><p>Two.</p>", "One.\n\nTwo."), ("one\rtwo\x0cthree\x85four", "one\ntwo\nthree\nfour"),
    ("#include <stdio.h>\nstd::map<std::string, a> m;", "#include <stdio.h>\nstd::map<std::string, a> m;"),
    ("if (a<b && b>c) i--;", "if (a<b && b>c) i--;"), ("a --> b <-- c <!-- d", "a --> b <-- c <!-- d"),
    ("write to <tom@a.org> or <https://a.org/?x=1&copy=2>", "write to <tom@a.org> or <https://a.org/?x=1&copy=2>"),
    ("class Node<S> { Optional<U> m; Vec::<a>::new() }", "class Node<S> { Optional<U> m; Vec::<a>::new() }"),
    ("if x <b > y, type <title> here, useState<Form>()", "if x <b > y, type <title> here, useState<Form>()"),
    ('<!DOCTYPE html><td nowrap>one</td><img src="a" alt="a > b">two', "one\n\ntwo"),
    ("<user> hi <3 </user>", "<user> hi <3 </user>"), ("\\begin{a} x_1 < y & z \\\\ \\end{a}", "\\begin{a} x_1 < y & z \\\\ \\end{a}"),
    ("one<br/>two<BR>three<td>four</td><li>five", "one\ntwo\nthree\nfour\n\nfive"),
    ("    a = 1\n    b = 2", "    a = 1\n    b = 2"),
    ('a <a href="https://b.c" class=x>link</a>, <b>bold</b> H<sub>2</sub>O', "a link, bold H2O"),
    ("&lt;b&gt; &amp;amp; &#233; &eacute;", "<b> &amp; é é"), ("a<!-- <p>no</p> -->b <script>x<y</script>c", "ab c")])
def test_4_only_html_is_dropped_and_words_stay_apart(tmp_path, raw, kept):
    assert corpus_of(tmp_path, {"text": raw})[0] == [{"text": kept}]


def test_4_dialogues_and_code_stay_as_they_are(tmp_path):
    turns = [{"role": "user", "content": "Write <b>Hi</b> as a page"},
             {"role": "assistant", "content": "    <h1>Hi</h1><p>One.</p>\n\n\n\n vector<int> v; if a<b and c>d &amp;"}]
    assert corpus_of(tmp_path, {"messages": turns})[0] == [{"messages": turns}]


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.jsonl.GZ", "a.NDJSON"])
def test_9_endings_without_case(tmp_path, name):
    data = b'{"text": "it is red."}\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    assert list(synth.read_documents(str(tmp_path / name), Counter())) == [{"text": "it is red."}]


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.md", "a", "a.parquet", "a.jsonl.zip"])
def test_9_unknown_endings_are_refused(tmp_path, name):
    (tmp_path / name).write_text('{"text": "it is red."}\n')
    with pytest.raises(UserError, match=r"a.* is none of \*.txt, \*.jsonl and \*.ndjson"):
        synth.make_corpus(settings_of(tmp_path, tmp_path / name))


ENDLESS = ["Total" + " " * 300_000 + "12", "." * 300_000, "!?" * 150_000, "<!--" * 75_000, "<script" * 40_000, "<" * 300_000,
           "<p " * 100_000, "<p a=" * 60_000, "<a " + "b=c " * 70_000, "&" * 300_000, "a" * 300_000, "(" * 300_000,
           "a." * 150_000, "\n" * 300_000, "\u200d" * 300_000, "a-" * 150_000, '."' * 150_000, "\t \n" * 100_000, "@" * 300_000]


@pytest.fixture
def guard():
    """Ends a pattern that takes the square of its input: that would be many minutes, in proportion it is one second."""
    def stop(*_):
        raise AssertionError("more than 40 seconds of computing")
    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 40)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@pytest.mark.parametrize("text", [*ENDLESS, "-\n" * 150_000, "。\n" * 150_000, '."\n' * 100_000, "<a x='" * 60_000])
def test_11_reading_takes_time_in_proportion(guard, text):
    document = synth.document_of({"text": 3 * text})
    synth.document_of({"messages": [{"role": "user", "content": 3 * text + "a"}]})
    synth.cut_document(document, 120)
    synth.segments(document["text"], synth.load_config([]).synth, synth.Random(1))


@pytest.mark.parametrize("text", [*ENDLESS, "[" * 300_000, ". a" * 100_000, "* " * 150_000, "- - " * 75_000, "<<" * 150_000,
                                  '"' + " " * 300_000 + "x", "a. " * 30_000, ".*" * 150_000, "<think>" * 40_000])
def test_11_every_check_takes_time_in_proportion(guard, text):
    arguments = {
        "change_case:capital_word_frequency": (3, "less than"), "combination:repeat_prompt": ("a",),
        "detectable_content:number_placeholders": (1,), "detectable_content:postscript": ("P.S.",),
        "detectable_format:multiple_sections": ("Section", 2), "detectable_format:number_bullet_lists": (2,),
        "detectable_format:number_highlighted_sections": (2,), "keywords:existence": (["a"],),
        "keywords:forbidden_words": (["a"],), "keywords:frequency": ("a", 1, "less than"),
        "keywords:letter_frequency": ("a", 1, "less than"), "language:response_language": ("en",),
        "length_constraints:nth_paragraph_first_word": (1, 1, "a"), "length_constraints:number_paragraphs": (2,),
        "length_constraints:number_sentences": ("less than", 3), "length_constraints:number_words": ("less than", 3),
        "startend:end_checker": ("a",)}
    bench.vote_of(bench.without_thinking(text), 1)
    for name, check in bench.CHECKS.items():
        check(text, *arguments.get(name, ()))


@pytest.mark.parametrize("word", ["ab" * 400_000, "1" * 5000, "球" * 3000, "bla-" * 1000])
def test_12_words_without_end_are_not_spoken(tmp_path, word):
    for recipe in ("interleaved", "tasks"):
        found, _ = spoken_of(tmp_path, [{"text": f"{word}."}, {"text": "tom has a red ball."}], recipe, "synth.share=1")
        assert found and max(map(len, found)) < 1200


@pytest.mark.parametrize("text, words", [
    ("won\xadder\u200bful ball", 2), ("\u2060soft\ufeffly", 1), ("i\u200dt is\u200e red", 3), ("می\u200cخواهم", 1), ("क्\u200dष", 1), ("ขอ\u200bบคุณ", 2), ("a\u061cb", 1)])
def test_19_signs_that_are_not_seen_cut_no_word(tmp_path, text, words):
    (document,), _ = corpus_of(tmp_path, {"text": text})
    assert synth.count_words(document["text"]) == words
    if text.isascii() or re.search("[a-z]", text):
        assert document["text"].isascii()


@pytest.mark.parametrize("text", ["i love it 😂 so much", "it is 20° in © here", "go → there and 👩‍🚀 ok", "snow ☃️ is cold", "really‼ yes", "it is ５㎡", "￼ here", "١٢٣ birds", "20 ℃",
                                  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ", "see ftp://a.b", "in /etc/passwd", "open index.js",
                                  "if (a && b) return", "i++ and j", "9f86d081884c7d659a2feaa0c55ad015 is it"])
def test_20_symbols_stay_text(text):
    assert not synth.speakable(text, "en") and not synth.speakable(text, "zh")


def test_22_a_language_without_a_voice_is_counted(tmp_path, capsys):
    rows = [{"text": "it is red and so is the ball.", "lang": lang} for lang in ("English", "fr", "en")]
    c = settings_of(tmp_path, lines(tmp_path / "a.jsonl", *rows), "synth.share=1", "synth.shards={interleaved: 1, text: 1}")
    synth.make_shards(c)
    interleaved, text = capsys.readouterr().out.splitlines()[-2:]
    assert re.search(r"interleaved .* [1-3] rejected: no voice for English, [1-3] rejected: no voice for fr$", interleaved)
    assert text.endswith("no clip rejected")


def test_22_a_corpus_without_dev_is_said(tmp_path, capsys):
    c = settings_of(tmp_path, lines(tmp_path / "a.jsonl", {"text": "it is red."}, {"text": 3}, {"text": "it is blue."}))
    synth.make_corpus(c)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "corpus: 2 for train, 0 for dev, 0 for test; 1 lines left out: it has no text and no messages; without dev there is "
        "no gap curve")


def test_22_lines_that_are_no_utf8_and_texts_without_lang(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "b", "language": "de"}\n' + b"[" * 200_000)
    left_out = Counter()
    assert list(synth.read_documents(str(tmp_path / "a.jsonl"), left_out)) == [{"text": "a"}, {"text": "b", "lang": "de"}]
    assert left_out.total() == 2


def test_22_hard_wrapped_lines_are_one_sentence():
    assert len(synth.sentences("Он пошёл в\nшколу утром.")) == 1
    text = "The ball that tom has\nput in the old\ngarden is red.\nHe likes it\n\nand more"
    assert [text[a:b] for a, b in synth.sentences(text)] == [
        "The ball that tom has\nput in the old\ngarden is red.", "He likes it", "and more"]
    samples = synth.tasks({"text": "a ball\nis red"}, synth.load_config([]).synth, synth.Random(3), lambda words: {"id": "f3"})
    assert all("\n" not in part["text"] for sample in samples for part in sample["parts"])


def test_22_half_a_character_is_dropped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "say \\ud83d it", "lang": "en\\ud83d"}\n')
    assert list(synth.read_documents(str(tmp_path / "a.jsonl"), Counter())) == [{"text": "say  it", "lang": "en"}]


# --------------------------------------------------------------------------------------------------
# Dialogues: 10, 17
# --------------------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "what colour is it"}


@pytest.mark.parametrize("answer", ["", " \n", "\u200b\x00", None])
def test_10_answers_of_nothing_are_left_out(tmp_path, answer):
    found, left_out = corpus_of(tmp_path, {"messages": [ASKED, {"role": "assistant", "content": answer}]}, {"text": "red."})
    assert found == [{"text": "red."}] and left_out == {"a turn says nothing": 1}


@pytest.mark.parametrize("row, messages", [
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]},
                   {"role": "assistant", "content": "hello"}]}, [("user", "hi\nthere"), ("assistant", "hello")]),
    ({"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
     [("user", "hi"), ("assistant", "hello")]),
    ({"conversations": [{"from": "human", "value": "hi"}], "system": "Answer in French.", "tools": ""},
     [("system", "Answer in French."), ("user", "hi")]),
    ({"messages": [{"role": "developer", "content": "be short"}, {"role": "user", "content": "hi", "name": "tom"},
                   {"role": "assistant", "content": "hello", "tool_calls": None}]},
     [("system", "be short"), ("user", "hi"), ("assistant", "hello")])])
def test_17_dialogues_as_servers_write_them(tmp_path, row, messages):
    found, left_out = corpus_of(tmp_path, row)
    assert found == [{"messages": [{"role": role, "content": content} for role, content in messages]}] and not left_out


@pytest.mark.parametrize("turns, reason", [
    ([ASKED, {"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "x"},
      {"role": "assistant", "content": "red"}], "a turn says nothing"), ([ASKED, {"role": "tool", "content": "x"}], "a turn is neither"),
    ([ASKED, {"role": "function", "name": "f", "content": "3"}], "a turn is neither the system's"),
    ([ASKED, {"role": "assistant", "content": "red", "tool_calls": [{"id": 1}]}], "a turn is neither the system's"),
    ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}], "of another shape"),
    ([{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "what is it"}]}], "of another shape"),
    (["hi", "hello"], "of another shape"), ("hello", "of another shape"), ([{"from": "bing", "value": "a"}], "a turn is neither")])
def test_17_what_cannot_be_learned_from_is_left_out_and_counted(tmp_path, turns, reason):
    found, left_out = corpus_of(tmp_path, {"messages": turns}, {"text": "it is red."}, {"messages": turns})
    (said, count), = left_out.items()
    assert found == [{"text": "it is red."}] and count == 2 and reason in said


def test_17_one_line_never_refuses_a_corpus(tmp_path):
    """Lines of a pretty-printed array, half a line, rows without text: left out; the place of the first of a kind is said."""
    path = tmp_path / "a.jsonl"
    path.write_text('[\n {"text": "one"},\n {"text": "two"}\n]\n{"text": "thr\n["text"]\n{"title": 3}\n\n{"text": "four."}\n')
    left_out = Counter()
    assert list(synth.read_documents(str(path), left_out)) == [{"text": "two"}, {"text": "four."}]
    assert left_out == {"no UTF-8, no JSON object, or of another shape": 5, "it has no text and no messages": 1}


# --------------------------------------------------------------------------------------------------
# Scoring: 5, 6, 18
# --------------------------------------------------------------------------------------------------

def verdict(name, kwargs, response, tmp_path):
    """The strict verdict of a file of one row, as bench.py scores it."""
    path = lines(tmp_path / "rows.jsonl", {"key": 1, "prompt": "p", "instruction_id_list": [name], "kwargs": [kwargs],
                                           "response": response})
    row, = bench.read_rows(path, suite="closed", condition="standard", lang="en")
    return bench.verdicts(row)["strict"][0]


THOUGHT = "<think>\nWell, let me see, it is short.\n</think>\n\n"


@pytest.mark.parametrize("response, said", [
    ("The tags are <think> and </think>.", "The tags are <think> and </think>."), ("\ufeff<think>hm", None),
    ("<think>hm</think>Paris, as </think> says.", "Paris, as </think> says."),
    ("<|channel|>analysis<|message|>a, b<|end|><|start|>assistant<|channel|>final<|message|>Paris.<|return|>", "Paris."),
    ("<seed:think>a, b</seed:think>Paris.", "Paris."), ("<think>\n\n</think>\n\nParis.", "Paris."),
    (THOUGHT + "Paris is old.", "Paris is old."), ("Well, it is\n</think>\nParis.", "Paris."), ("<think>Well, it", None),
    ("<THINKING>a</THINKING> Paris.", "Paris."), ("[THINK]a, b[/THINK]Paris.", "Paris."), ("◁think▷a, b◁/think▷Paris.", "Paris."),
    ("<think>a</think><think>b</think>Paris.", "Paris."), ("<think>a</think>\n <think>b", None), ("I think. <b>", "I think. <b>"),
    ("Say <think> to think.", "Say <think> to think.")])
def test_5_what_follows_the_thinking_is_scored(tmp_path, response, said):
    path = lines(tmp_path / "a.jsonl", {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}],
                                        "response": response})
    row, = bench.read_rows(path, suite="closed", condition="standard", lang="en")
    assert row["response"] == said and row["thought"] == (said != response)
    bench.score_files(synth.load_config([f"score={path}"]))
    results = json.loads((tmp_path / "a.jsonl.results.json").read_text())
    assert results["after thinking"] == (said != response)


N, PARIS = "length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "it"}
WORDS = "length_constraints:number_words"
RIGHT = [
    (N, PARIS, "Paris is big.\n\n\n\nIt is old."), (N, PARIS, "\n\nParis is big.\n\nIt is old."),
    (N, PARIS, "Paris is big.\r\n\r\nIt is old."), (N, PARIS, "Paris is big.\n \t\nIt is old.\n\n"),
    (N, PARIS | {"first_word": "don't"}, "Paris.\n\nDon’t go."),
    ("keywords:forbidden_words", {"forbidden_words": ["rain", "so"]}, "The train also stops."),
    ("keywords:forbidden_words", {"forbidden_words": ["he", "été"]}, "The étés there."),
    ("keywords:forbidden_words", {"forbidden_words": ["rain"]}, "It is raining."),
    ("change_case:english_capital", {}, "DANCING FOR FUN IS GOOD FOR YOUR HEALTH AND YOUR MIND."),
    ("language:response_language", {"language": "en"}, "DANCING FOR FUN IS GOOD FOR YOUR HEALTH AND YOUR MIND."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "Fruit\n---\n- apple\n- pear"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "**Fruit**\n* apple\n  - pear\n-5 degrees\n*so*"),
    ("startend:end_checker", {"end_phrase": "Any more questions?"}, "Sure. Any more questions ?"),
    ("startend:end_checker", {"end_phrase": "Don't ask."}, "No. Don’t\xa0ask."),
    ("startend:end_checker", {"end_phrase": "!!!"}, "Yes !!!"),
    ("keywords:existence", {"keywords": ["don't"]}, "I don’t know."),
    ("keywords:existence", {"keywords": ["new york"]}, "In New\xa0York."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "What's  new?"}, "What’s new? Not much."),
    (WORDS, {"num_words": 10, "relation": "at least"}, "Hello is 你好 in Chinese and a billion people say it every day."),
    (WORDS, {"num_words": 5, "relation": "at least"}, "我喜欢苹果 and tea"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "Hello is 你好 there. It is nice."),
    (WORDS, {"num_words": 1.0, "relation": "at least", "num_bullets": float("nan")}, "Yes."),
    (WORDS, {"num_words": "1", "relation": "at least", "num_bullets": None}, "Yes."),
    ("language:response_language", {"language": "zh"}, "Python是一种编程语言。"), ("language:response_language", {"language": "zh"}, "謝謝您的幫助！"),
    ("language:response_language", {"language": "EN"}, "This is the answer to what you have asked me."),
    ("keywords:forbidden_words", {"forbidden_words": ["кот"]}, "Мальчик, который спит."),
    ("keywords:existence", {"keywords": ["ice-cream", "café"]}, "Ice\u2011cream in a cafe\u0301."),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, "他说：“你好。我很好。”"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "He said “Go.” She went."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* * *\n* a\n* b\n- - -"),
    ("detectable_content:postscript", {"postscript_marker": "附言："}, "再见。\n附言： 保重"),
    ("keywords:letter_frequency", {"letter": "“", "let_frequency": 1, "let_relation": "at least"}, "“Yes.”"),
    (N, PARIS | {"first_word": "周末"}, "一\n\n「周末」很好。")]
WRONG = [
    ("startend:end_checker", {"end_phrase": "!!!"}, "Nothing of the kind."), ("startend:end_checker", {"end_phrase": "..."}, "No!"),
    ("startend:end_checker", {"end_phrase": "。"}, "好！"), ("keywords:forbidden_words", {"forbidden_words": ["C++"]}, "I like c++ a lot."),
    ("keywords:forbidden_words", {"forbidden_words": ["$5"]}, "It costs $5."), ("keywords:forbidden_words", {"forbidden_words": ["雨"]}, "下雨了。"),
    ("keywords:forbidden_words", {"forbidden_words": ["don't"]}, "I don’t know."),
    ("detectable_format:json_format", {}, '{"a": NaN}'), ("detectable_format:json_format", {}, "[-Infinity]"),
    ("detectable_format:json_format", {}, "```json\nInfinity\n```"),
    ("keywords:frequency", {"keyword": "don't", "frequency": 1, "relation": "less than"}, "I don’t know."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "Fruit\n---\n- apple\n- pear"),
    (WORDS, {"num_words": 5, "relation": "at least"}, "我喜欢苹 tea"),
    ("language:response_language", {"language": "ko"}, "謝謝您的幫助！"),
    ("startend:end_checker", {"end_phrase": "the end"}, "ok bathe end"), ("startend:end_checker", {"end_phrase": "any more"}, "Too many more"),
    ("keywords:forbidden_words", {"forbidden_words": ["ice-cream"]}, "ice\u2011cream"),
    (N, PARIS | {"first_word": "кот"}, "a\n\nКоторый")]


@pytest.mark.parametrize("name, kwargs, response", RIGHT)
def test_6_right_answers_pass(tmp_path, name, kwargs, response):
    assert verdict(name, kwargs, response, tmp_path) is True


@pytest.mark.parametrize("name, kwargs, response", WRONG)
def test_6_wrong_answers_fail(tmp_path, name, kwargs, response):
    assert verdict(name, kwargs, response, tmp_path) is False


ROW = {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "response": "Yes."}


def test_18_null_and_nan_are_nothing(tmp_path):
    """As tables write the fields that a row lacks; half a character is no error either."""
    nothing = {"asked": None, "audio_path": float("nan"), "withdrawn": None, "truncated": float("nan"), "lang": None}
    path = lines(tmp_path / "a.jsonl", ROW | nothing, ROW | nothing | {"response": float("nan")})
    rows = bench.read_rows(path, suite="closed", condition="standard", lang="en")
    assert [(row["mode"], row["lang"], row.get("response")) for row in rows] == [("typed", "en", "Yes."), ("typed", "en", None)]
    assert bench.jsonl([{"response": "a\ud83d"}]) == b'{"response": "a?"}\n'


@pytest.mark.parametrize("change", [
    {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "paris"}]},
    {"instruction_id_list": [WORDS], "kwargs": [{"num_words": float("inf"), "relation": "at least"}]},
    {"suite": "open", "decomposed_questions": ["a"], "pred_score": '["YES"]'}])
def test_18_what_cannot_be_meant_is_a_sentence(tmp_path, change):
    with pytest.raises(UserError, match="row 1 cannot be scored"):
        bench.read_rows(lines(tmp_path / "a.jsonl", ROW | change), suite="closed", condition="standard", lang="en")


@pytest.mark.parametrize("data", [
    json.dumps(ROW) + "\n\n", "\ufeff" + json.dumps(ROW), "\n \n" + json.dumps(ROW) + "\r\n\r\n" + json.dumps(ROW) + "\n"])
def test_18_answer_files_as_tools_write_them(tmp_path, data):
    (tmp_path / "a.jsonl").write_bytes(data.encode())
    found = bench.read_rows(tmp_path / "a.jsonl", suite="closed", condition="standard", lang="en")
    assert [row["response"] for row in found] == ["Yes."] * data.count("prompt")


@pytest.mark.parametrize("field", ["output", "answer", "Response"])
def test_18_a_file_without_any_response_is_refused(tmp_path, field):
    row = {name: value for name, value in ROW.items() if name != "response"} | {field: "Yes."}
    with pytest.raises(UserError, match="No row of .* has a response; rename"):
        bench.score_files(synth.load_config([f"score={lines(tmp_path / 'a.jsonl', row)}"]))


@pytest.mark.parametrize("reply, vote", [
    ('Sure! Here is my verdict:\n["YES", "NO"]', [True, False]), ('<think>["NO", "NO"]?</think>["YES", "NO"]', [True, False]),
    ('```json\n["YES", "NO"]\n```\nLet me know.', [True, False]), ("First [NO, NO], on reflection [YES, NO].", [True, False]),
    ('["YES", "NO"]\n\nNote: see [A]. [END] []', [True, False]), ("[“Yes”, “No.”]", [True, False]),
    ('<think>["YES", "NO"]', None), ('["YES"]', None), ("YES, NO", None), ('["YES", "MAYBE"]', None)])
def test_22_judges_that_think_or_greet(reply, vote):
    assert bench.vote_of(reply, 2) == vote


# --------------------------------------------------------------------------------------------------
# Folders and numbers: 13 to 16
# --------------------------------------------------------------------------------------------------

def test_13_nothing_is_written_where_all_is_made(tmp_path, monkeypatch, capsys):
    c = settings_of(tmp_path, lines(tmp_path / "a.jsonl", {"text": "it is red and so is the ball."}), "synth.shards={text: 1}")
    synth.make_shards(c)
    said = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(synth, "write_whole", lambda *written: pytest.fail(f"{written[0]} is written"))
    synth.make_shards(c)
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_14_the_score_is_printed_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    path = lines(tmp_path / "a.jsonl", ROW)

    def refuse(path, *contents):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(synth, "write_whole", refuse)
    monkeypatch.setattr(bench.synth.sys, "argv", ["bench.py", f"score={path}"])
    with pytest.raises(SystemExit) as ended:
        synth.run(bench.main)
    out, error = capsys.readouterr()
    assert ended.value.code == 2 and "strict-prompt" in out and "100.0 [100, 100]" in out
    assert error.count("\n") == 1 and "a.jsonl.scored.jsonl" in error


def test_15_data_that_moved(tmp_path, monkeypatch):
    """The folder of everything moves, the corpus is named by a relative path, then by the absolute one."""
    before = tmp_path / "before"
    before.mkdir()
    lines(before / "a.jsonl", {"text": "it is red and so is the ball."})
    monkeypatch.chdir(before)
    arguments = [*ONE, "synth.shards={text: 1}"]
    synth.make_shards(synth.load_config([*arguments, "synth.corpus=a.jsonl"]))
    before.rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path / "after")
    synth.make_shards(synth.load_config([*arguments, "synth.corpus=a.jsonl"]))
    synth.make_shards(synth.load_config([*arguments, f"synth.corpus={tmp_path}/after/a.jsonl"]))
    (tmp_path / "after/data").rename(tmp_path / "after/moved")
    synth.make_shards(synth.load_config([*arguments, "synth.corpus=./a.jsonl", "data=moved"]))


def test_15_a_run_goes_on_whatever_its_folders_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c = synth.load_config(["run=a", "data=data", "synth.corpus=a.jsonl", "train.stages.sft.steps=2"])
    inserter.open_run(c, ["sft"])
    torch.save({"progress": {"stage": "sft", "step": 1}}, (tmp_path / "runs/a/state").mkdir() or "runs/a/state/00000001.pt")
    for same in (["data=moved"], [f"data={tmp_path}/data"], ["train.stages.sft.steps=9"], ["train.workers=0"], ["bench.rows=9"]):
        c = synth.load_config(["run=a", "data=data", "synth.corpus=a.jsonl", "train.stages.sft.steps=2", *same])
        assert inserter.open_run(c, ["sft"])["progress"]["step"] == 1
    with pytest.raises(UserError, match=r"made with other settings \(seed\)"):
        inserter.open_run(synth.load_config(["run=a", "seed=2", "train.stages.sft.steps=2"]), ["sft"])


@pytest.mark.parametrize("argument, sentence", [
    ("train.stages.sft.packs=0", "packs=0 must be above 0"), ("train.stages.pretrain.steps=-5", "steps=-5 must be 0 or more"),
    ("train.pack_length=0", "pack_length=0 must be above 0"), ("bench.batch=-1", "batch=-1 must be above 0"),
    ("train.clip=0", "clip=0.0 must be above 0"), ("train.stage.lr=-1e-3", "lr=-0.001 must be 0 or more"),
    ("train.stage.lr=.nan", "lr=nan must be 0 or more"), ("synth.rate=[-5, 3]", "must be 0 or more"),
    ("model.text.num_attention_heads=0", "num_attention_heads=0 must be above 0"), ("synth.share=2", "share must be from 0 to 1"),
    ("model.text.hidden_size=161", "hidden_size must be a multiple"), ("model.text.num_attention_heads=32", "hidden_size must be"),
    ("model.text.num_key_value_heads=2", "must be a multiple of num_key_value_heads"), ("model.audio.d_model=161", "d_model must be"),
    ("model.audio.max_source_positions=500", "must be 1500 or more"), ("model.text.vocab_size=200", "must be 262 or more"),
    ("synth.gate.max_seconds=60", "at most 30"), ("train.stages.sft.mix={chat: 0}", "mix gives no recipe a share"),
    ("synth.workers=0", "workers=0 must be above 0"), ("train.stages.sft.lr_scale={encoder: 0, adapter: 0, lm: 0}", "lr_scale has encoder"),
    ("synth.tasks={transcribe: 0}", "synth.tasks gives shares to")])
def test_16_numbers_that_mean_nothing_or_contradict(argument, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        synth.load_config([argument])


def test_16_zero_is_never():
    train = synth.load_config(["train.eval_every=0", "train.save_every=0", "train.log_every=0"]).train
    assert not any(inserter.is_due(train[f"{every}_every"], step) for every in ("eval", "save", "log") for step in range(99))
    c = synth.load_config(["bench.rows=0", "bench.adjustment_rows=2", "bench.snr=[-5.0]"])
    assert {row["suite"] for row in bench.draw_rows(c)} == {"adjustment"}


def test_every_profile_passes_its_own_checks():
    for profile in yaml.safe_load((synth.Path(synth.__file__).parent / "config.yaml").read_text("utf-8"))["profiles"]:
        synth.load_config([f"profile={profile}"])
