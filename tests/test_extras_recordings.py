"""extras/recordings.py: manifests become shards, and ask a run."""
import doctest
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1] / "extras"))
import inserter                                                       # noqa: E402
import recordings                                                     # noqa: E402
import synth                                                          # noqa: E402
from synth import UserError                                           # noqa: E402

SIZES = ["model.audio.d_model=32", "model.audio.encoder_layers=1", "model.audio.encoder_attention_heads=2",
         "model.audio.encoder_ffn_dim=48", "model.text.hidden_size=32", "model.text.num_hidden_layers=1",
         "model.text.num_attention_heads=2", "model.text.num_key_value_heads=1",
         "model.text.intermediate_size=48", "model.text.vocab_size=600"]


def test_examples_in_docstrings_hold():
    assert doctest.testmod(recordings) == (0, 4)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def sound(seconds: float, rate: int) -> np.ndarray:
    return 0.3 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 300 / rate)


GOOD = [{"audio_filepath": "stereo.wav", "text": "It is red.", "duration": 1.0, "lang": None, "speaker": 7},
        {"audio_filepath": "phone.flac", "text": "es ist rot", "task": "translate", "prompt": "German:",
         "lang": "de"},
        {"audio_filepath": "book.ogg", "text": "angry", "task": "emotion", "transcript": "go away"}]
BAD = {"long.wav": "too long", "silent.wav": "silent", "empty.wav": "unreadable", "broken.flac": "unreadable",
       "piped.wav": "too short", "pipe.wav": "no such file", "none.wav": "no such file",
       "/dev/zero": "no such file", "half.wav": "cut short", "half.mp3": "cut short", "loud.wav": "clipped",
       "nan.wav": "not finite", "quiet.wav": "silent", "huge.wav": "beyond full scale", "one.wav": "not finite"}


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """Recordings of many kinds, good and bad, and a manifest beside them; the folder that one works in."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "clips"
    folder.mkdir()
    soundfile.write(folder / "stereo.wav", np.stack([sound(1, 44100)] * 2, 1), 44100)
    soundfile.write(folder / "phone.flac", sound(2, 8000), 8000)
    soundfile.write(folder / "book.ogg", sound(1.5, 24000), 24000)
    soundfile.write(folder / "long.wav", sound(30.2, 8000), 8000)
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "quiet.wav", sound(1, 16000) * 0.01, 16000)
    soundfile.write(folder / "loud.wav", np.sign(sound(1, 16000)), 16000, subtype="FLOAT")
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    for name, value in (("huge.wav", 1e30), ("one.wav", np.inf)):
        soundfile.write(folder / name, np.append(sound(1, 44100), value), 44100, subtype="FLOAT")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "broken.flac").write_bytes((folder / "phone.flac").read_bytes()[:40])
    for name in ("half.wav", "half.mp3"):                               # their headers say two seconds
        soundfile.write(folder / name, sound(2, 16000), 16000)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:len(data) // 2])
    head = (folder / "silent.wav").read_bytes()[:44]
    (folder / "piped.wav").write_bytes(head[:40] + b"\xff\xff\xff\x7f" + b"\1" * 64)       # 2 GB, it says
    os.mkfifo(folder / "pipe.wav")
    write_lines(folder / "train.json", GOOD + [{"audio_filepath": name, "text": "lost"} for name in BAD])
    return folder / "train.json"


def made(number: int = 0) -> tuple[list[tuple[dict, dict]], dict]:
    """The samples of a shard with their files, and what its index counts."""
    path = Path(f"data/recordings/train-{number:06d}.tar").resolve()    # open shards are cached by their path
    index = synth.read_index(path)
    return [synth.read_sample(path, place) for place in range(index["count"])], index["counts"]


def rejected(counts: dict) -> dict[str, int]:
    return {key.removeprefix("rejected: "): n for key, n in counts.items() if key.startswith("rejected: ")}


def test_a_manifest_becomes_a_shard(manifest, capsys):
    recordings.main([f"manifest={manifest}"])
    found, counts = made()
    assert rejected(counts) == Counter(BAD.values())
    answers = {sample["parts"][-1]["text"]: (sample, files) for sample, files in found}
    assert list(answers) == [" It is red.", " es ist rot", " angry"]
    assert [sample["id"] for sample, _ in found] == [f"recordings-train-{number:06d}" for number in range(3)]
    assert [(sample["recipe"], sample["lang"]) for sample, _ in found] == [
        ("tasks", "en"), ("tasks", "de"), ("tasks", "en")]
    parts = answers[" es ist rot"][0]["parts"]
    assert [(part["role"], part["text"]) for part in parts] == [
        ("speech", ""), ("text", "German:"), ("text", " es ist rot")]
    assert [part.get("loss") for part in parts] == [None, False, True]
    assert [part["text"] for part in answers[" It is red."][0]["parts"]] == [
        "It is red.", "Transcript:", " It is red."]
    assert [part["text"] for part in answers[" angry"][0]["parts"]] == ["go away", "Emotion:", " angry"]
    for text, seconds in ((" It is red.", 1), (" es ist rot", 2), (" angry", 1.5)):
        sample, files = answers[text]
        clip = synth.decode_flac(files["00.flac"])
        assert len(clip) / synth.RATE == pytest.approx(seconds, abs=0.01)
        speech = sample["parts"][0]
        assert (speech["audio"], speech["voice"], speech["seconds"]) == (
            "00.flac", "recorded", pytest.approx(seconds, abs=0.01))
        spectrum = np.abs(np.fft.rfft(clip))
        assert np.fft.rfftfreq(len(clip), 1 / synth.RATE)[spectrum.argmax()] == pytest.approx(300, abs=1)
    out = capsys.readouterr().out
    assert out.startswith("data/recordings holds 3 of 18 recordings, 0.00 hours; left out: ")
    assert "no such file 3" in out and "cut short 2" in out


def test_parts_of_a_long_recording(tmp_path, monkeypatch):
    """NeMo's offset and duration; the file may be longer than any clip."""
    monkeypatch.chdir(tmp_path)
    track = np.concatenate([sound(1, 8000) * loud for loud in np.linspace(0.1, 1, 40)])
    soundfile.write("long.wav", track, 8000)
    places = [{"offset": 3, "duration": 2.0}, {"offset": "38.5"}, {"offset": 1, "duration": -1},
              {"offset": 50.0}, {"offset": -5},
              {"offset": 1e300}, {"offset": float("nan")}, {"offset": 2}, {"duration": 2},
              {"offset": 39, "duration": 1.08}, {"offset": 39, "duration": 1.2}, {"duration": 41}]
    write_lines(Path("a.json"), [{"audio_filepath": "long.wav", "text": f"part {n}"} | place
                                 for n, place in enumerate(places)])
    recordings.main(["manifest=a.json"])
    found, counts = made()
    clips = {sample["parts"][0]["text"]: synth.decode_flac(files["00.flac"]) for sample, files in found}
    assert {text: len(clip) / synth.RATE for text, clip in clips.items()} == {
        "part 0": 2, "part 1": 1.5, "part 9": 1}
    assert np.abs(clips["part 0"]).max() == pytest.approx(np.abs(track[24000:40000]).max(), rel=0.03)
    assert rejected(counts) == {"empty": 1, "unreadable": 4, "too long": 3, "cut short": 1}


def test_a_long_recording_is_rejected_without_decoding(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.wav", sound(31, 8000), 8000)
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    clip, unfit = recordings.read_clip({"audio_filepath": str(tmp_path / "long.wav")}, 30)
    assert unfit == "too long" and not len(clip)


def test_a_rate_without_common_factor(tmp_path):
    soundfile.write(tmp_path / "odd.wav", sound(1, 44101), 44101)
    clip, unfit = recordings.read_clip({"audio_filepath": str(tmp_path / "odd.wav")}, 30)
    assert unfit is None and len(clip) == pytest.approx(16000, abs=2)
    assert np.abs(np.fft.rfft(clip)).argmax() in (300, 301)


def test_people_speak_at_any_pace(manifest):
    texts = ["a", "many words " * 30]
    write_lines(manifest, [{"audio_filepath": "stereo.wav", "text": text} for text in texts])
    recordings.main([f"manifest={manifest}"])
    assert len(made()[0]) == 2


def test_what_a_file_of_unknown_length_holds_is_taken(manifest):
    """A program that writes a WAV to a pipe says 2 or 4 GB in its header; the data are whole."""
    data = (manifest.parent / "stereo.wav").read_bytes()
    for size in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"):
        (manifest.parent / "piped.wav").write_bytes(data[:40] + size + data[44:])
        clip, unfit = recordings.read_clip({"audio_filepath": str(manifest.parent / "piped.wav")}, 30)
        assert (len(clip), unfit) == (16000, None)


@pytest.mark.parametrize("row", [
    {"offset": "soon"}, {"duration": [1]}, {"text": 5}, {"text": None}, {"audio_filepath": 3}, {"prompt": 1}])
def test_a_line_that_is_no_recording_is_one_sentence(manifest, row):
    write_lines(manifest, [GOOD[0], GOOD[0] | row])
    with pytest.raises(UserError, match=r"train.json, line 2: no recording .*seconds\.$") as error:
        recordings.main([f"manifest={manifest}"])
    assert "\n" not in str(error.value)
    assert not list(Path("data").rglob("*.tar"))


@pytest.mark.parametrize("line", ["no JSON", "[]", '"text"', "{}"])
def test_a_line_of_another_kind_is_one_sentence(manifest, line):
    manifest.write_text(f"\n{line}\n")
    with pytest.raises(UserError, match="train.json, line 2: no recording"):
        recordings.main([f"manifest={manifest}"])


def test_recordings_that_are_all_elsewhere(manifest):
    """A folder that is not mounted: no shard is finished without its clips."""
    write_lines(manifest, [{"audio_filepath": f"{n}.wav", "text": "lost"} for n in range(3)])
    with pytest.raises(UserError, match="None of 3 recordings from .*0.wav on is there"):
        recordings.main([f"manifest={manifest}"])
    assert not list(Path("data").rglob("*.tar"))


def test_missing_shards_are_made_and_others_kept(manifest):
    few = [f"manifest={manifest}", "synth.shard_documents=4"]
    recordings.main(few)
    shards = sorted(Path("data/recordings").glob("*.tar"))
    assert [len(made(number)[0]) for number in range(len(shards))] == [3, 0, 0, 0, 0]
    before = {path: path.read_bytes() for path in shards}
    times = [path.stat().st_mtime_ns for path in shards]
    shards[1].unlink()
    recordings.main(few)
    assert {path: path.read_bytes() for path in shards} == before
    assert [path.stat().st_mtime_ns == time for path, time in zip(shards, times)] == [True, False, True, True, True]
    with pytest.raises(UserError, match=r"made with other settings \(shard_documents\)"):
        recordings.main([f"manifest={manifest}"])
    write_lines(manifest, GOOD)
    with pytest.raises(UserError, match=r"made with other settings \(manifest\)"):
        recordings.main(few)
    recordings.main([*few, "fresh=true"])
    assert len(list(Path("data/recordings").glob("*.tar"))) == 1


def test_inserter_trains_on_them(manifest):
    """A stage's mix names the folder."""
    recordings.main([f"manifest={manifest}"])
    c = synth.load_config([f"data={Path('data').resolve()}", "train.stages.pretrain.mix={recordings: 1.0}"])
    pack = next(inserter.packs_of_lane(c, Letters(), 80, "pretrain", 0, None))
    assert set(pack.names) <= {f"recordings-train-{number:06d}" for number in range(3)}
    assert pack.counts["targets"] and pack.counts["audio samples"]


class Letters:
    """In place of a tokenizer: letters are tokens."""
    audio, audio_bos, audio_eos, turn, turn_end, end = range(6)

    def __call__(self, text: str) -> list[int]:
        return [6 + ord(letter) % 100 for letter in text]


# --------------------------------------------------------------------------------------------------
# What a run hears
# --------------------------------------------------------------------------------------------------

def test_answers_are_compared_by_words_and_letters():
    for text, response, words, letters, exact in (
            ("It is red.", " it is red", (0, 3), (0, 7), (1, 1)),
            ("汤姆有球", "汤母有球", (1, 4), (1, 4), (0, 1)),
            ("a cat", None, (2, 2), (4, 4), (0, 1))):
        assert recordings.compared({"text": text, "response": response}) == {
            "WER": words, "CER": letters, "exact": exact}


@pytest.fixture
def run(manifest):
    """A run's export with random weights, and a manifest beside it."""
    texts = [{"id": f"text-{n}", "parts": [synth.text_part("it is red and blue", True)], "messages": None}
             for n in range(3)]
    synth.write_shard(Path("data/text/train-000000.tar"), texts, {text["id"]: {} for text in texts}, {})
    c = synth.load_config(SIZES)
    tok = inserter.load_tokenizer(c)
    model = inserter.fresh_model(c, tok)
    folder = inserter.run_folder(c) / "model"
    folder.mkdir(parents=True)
    inserter.save_model(model, folder)
    inserter.save_processor(model, tok, folder)
    return [f"manifest={manifest}", "score=true", "max_tokens=8", "bench.batch=2"]


def test_a_run_is_asked_and_its_answers_are_kept(run, capsys, monkeypatch):
    recordings.main(run)
    first = capsys.readouterr().out
    path = Path("runs/tiny/recordings/train.jsonl")
    assert first.endswith(f"{path} has the answers.\n")
    rows = [line.split() for line in first.splitlines()]
    assert rows[0] == "task lang count unfit WER % CER % exact %".split()
    assert [row[:4] for row in rows[1:-1]] == [
        ["emotion", "en", "1", "0"], ["transcribe", "en", "16", "11"], ["translate", "de", "1", "0"]]
    answers = path.read_bytes()
    kept = [json.loads(line) for line in answers.splitlines()]
    assert [row["number"] for row in kept] == [0, 1, 2, 4, 13, 15, 16]          # the clips that are whole
    assert all(isinstance(row["response"], str) for row in kept)

    asked = []
    complete = inserter.complete
    monkeypatch.setattr(inserter, "complete", lambda model, tok, prompts, *limits: (
        asked.extend(prompts) or complete(model, tok, prompts, *limits)))
    recordings.main(run)
    assert not asked and capsys.readouterr().out == first               # nothing is asked again
    path.write_bytes(b"".join(answers.splitlines(keepends=True)[:5]))
    recordings.main(run)
    assert len(asked) == 2 and path.read_bytes() == answers             # a stopped run goes on
    with pytest.raises(UserError, match=r"made with other settings \(max_tokens\)"):
        recordings.main([*run, "max_tokens=9"])
    recordings.main([*run, "fresh=true"])
    assert len(asked) == 9


def test_right_answers_are_a_hundred_per_cent(run, capsys, monkeypatch, manifest):
    """And a prompt is a training sample up to its answer."""
    cut = {"audio_filepath": "half.wav", "text": "it is cut"}
    write_lines(manifest, [*GOOD, GOOD[0] | {"text": "It is blue."}, cut])
    said = []

    def right(model, tok, prompts, max_tokens, batch):
        said.extend(prompts)
        numbers = (0, 1, 2, 0)[len(said) - len(prompts):len(said)]
        return [(f"{GOOD[number]['text'].upper()}!", False) for number in numbers]

    monkeypatch.setattr(inserter, "complete", right)
    recordings.main(run)
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert table[0] == "emotion en 1 0 0.0 [0, 0] 0.0 [0, 0] 100.0 [100, 100]".split()
    assert table[2] == "translate de 1 0 0.0 [0, 0] 0.0 [0, 0] 100.0 [100, 100]".split()
    assert table[1][:4] == "transcribe en 3 1".split()
    assert table[1][4] == "44.4"                  # one word of nine is wrong, three are missing
    assert table[1][10] == "33.3"

    tok = inserter.load_tokenizer(synth.load_config(SIZES))
    write_lines(manifest, GOOD)
    recordings.main([f"manifest={manifest}"])
    for number, prompt in enumerate(said[:3]):
        trained = inserter.read_encoded(Path("data/recordings/train-000000.tar").resolve(), number, tok)
        assert trained.ids[:len(prompt.ids)] == prompt.ids
        assert set(trained.labels[:len(prompt.ids) - 1]) == {inserter.IGNORE}
        assert trained.labels[len(prompt.ids) - 1] == trained.ids[len(prompt.ids)]


def test_without_manifest_recordings_or_run(manifest):
    with pytest.raises(UserError, match="manifest=FILE.json is missing"):
        recordings.main(["score=true"])
    with pytest.raises(UserError, match="There is no model in runs/none/model"):
        recordings.main([f"manifest={manifest}", "score=true", "run=none"])
    manifest.write_text("\n")
    with pytest.raises(UserError, match="train.json names no recording"):
        recordings.main([f"manifest={manifest}", "score=true"])
