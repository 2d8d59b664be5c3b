"""extras/voices.py: VITS models as an engine."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import SMALL
from transformers import VitsConfig, VitsModel, VitsTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "extras"))
import synth                                                          # noqa: E402
import voices                                                         # noqa: E402
from synth import UserError                                           # noqa: E402

ROOT = Path(synth.__file__).parent
SENTENCE = "tom likes apples"
FIRST = {"id": "a", "timbre": "one", "lang": "en", "gender": "f", "speaker": 0}
SECOND = {"id": "b", "timbre": "one", "lang": "en", "gender": "m", "speaker": 1}


def save_vits(folder: Path) -> str:
    """A small random VITS with two speakers, saved as the hub holds one; it knows no digits."""
    alphabet = "_ abcdefghijklmnopqrstuvwxyz'"
    (folder / "vocab.json").write_text(json.dumps({char: i for i, char in enumerate(alphabet)}))
    tokenizer = VitsTokenizer(str(folder / "vocab.json"), pad_token="_", phonemize=False, is_uroman=False)
    torch.manual_seed(0)
    model = VitsModel(VitsConfig(
        vocab_size=len(alphabet), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
        flow_size=16, spectrogram_bins=9, upsample_initial_channel=32, upsample_rates=[8, 8],
        upsample_kernel_sizes=[16, 16], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], num_speakers=2, speaker_embedding_size=4, wavenet_dilation_rate=1,
        posterior_encoder_num_wavenet_layers=1, prior_encoder_num_wavenet_layers=1,
        prior_encoder_num_flows=1, duration_predictor_num_flows=2))
    model.decoder.conv_post.weight.data *= 0.1           # as it is, clips stand at full scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    return save_vits(tmp_path_factory.mktemp("vits"))


def voices_file(folder: Path, rows: list[dict]) -> Path:
    path = folder / "voices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------------------------------
# The engine
# --------------------------------------------------------------------------------------------------

def test_clips_repeat_by_seed_and_are_trimmed(vits):
    engine = voices.Engine(vits, "")
    texts = [SENTENCE, "no", SENTENCE]
    clips, rate = engine(texts, [FIRST, FIRST, SECOND], 5)
    again, _ = engine(texts, [FIRST, FIRST, SECOND], 5)
    others, _ = engine(texts, [FIRST, FIRST, SECOND], 6)
    assert rate == 16000
    assert all(clip.ndim == 1 and clip.dtype == np.float32 for clip in clips)
    assert 0 < len(clips[1]) < len(clips[0]) / 2
    assert all(map(np.array_equal, clips, again))
    assert not np.array_equal(clips[0], others[0])


def test_a_batch_says_what_each_text_says_alone(vits, monkeypatch):
    """Without its noise the model gives the same clip in a batch, but at the end, where it sees the padding."""
    _, model = voices.load(vits)
    monkeypatch.setattr(model, "noise_scale", 0.0)
    monkeypatch.setattr(model, "noise_scale_duration", 0.0)
    engine = voices.Engine(vits, "")
    texts = ["no", SENTENCE, "anna sits in the garden", "yes"]
    speakers = [FIRST, SECOND, FIRST, SECOND]
    together, _ = engine(texts, speakers, 0)
    alone = [engine([text], [voice], 0)[0][0] for text, voice in zip(texts, speakers)]
    swapped = engine([SENTENCE], [FIRST], 0)[0][0]
    assert [len(clip) for clip in together] == [len(clip) for clip in alone]
    for clip, single in zip(together, alone):
        kept = len(single) * 2 // 3
        assert np.abs(clip - single)[:kept].max() < 1e-5 < 0.01 < np.abs(single).max()
    shared = min(len(swapped), len(alone[1])) * 2 // 3
    assert np.abs(swapped[:shared] - alone[1][:shared]).max() > 0.01          # the speaker is heard


def test_every_speaker_is_one_batch(vits, monkeypatch):
    _, model = voices.load(vits)
    sizes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **more: (
        sizes.append((more["speaker_id"], len(input_ids))), forward(input_ids, **more))[1])
    voices.Engine(vits, "")([SENTENCE] * 5, [FIRST, SECOND, FIRST, {"id": "c"}, FIRST], 0)
    assert sizes == [(0, 3), (1, 1), (None, 1)]


def test_what_the_model_cannot_read_is_an_empty_clip(vits):
    """The tokenizer drops it without a word: the clip would say less than the text."""
    texts = ["Tom's 3 apples", "Tom's apples!", "ça va", "..."]
    clips, rate = voices.Engine(vits, "")(texts, [FIRST] * 4, 0)
    assert [len(clip) > 0 for clip in clips] == [False, True, False, True]
    assert synth.gate(synth.to_16k(clips[0], rate), texts[0], synth.load_config([]).synth.gate) == "empty"


def test_a_model_that_is_none(tmp_path):
    with pytest.raises(UserError, match="VOICES_MODEL=facebook/mms-tts-eng"):
        voices.load("")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="is a model of the kind qwen2"):
        voices.load(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# Files of voices
# --------------------------------------------------------------------------------------------------

def test_voices_of_a_file(tmp_path):
    path = voices_file(tmp_path, [FIRST, SECOND | {"style": "calm"}])
    assert voices.Engine("", str(path)).voices == [FIRST, SECOND | {"style": "calm"}]
    with pytest.raises(UserError, match="VOICES_FILE=voices.jsonl"):
        voices.Engine("", "").voices


@pytest.mark.parametrize("text, where", [
    ('{"id": "a"', "line 1"), ('\n{"id": "a", "lang": "en"}', "line 2"), ("[1]", "line 1"), ("7", "line 1"),
    ('{"id": 3, "timbre": "a", "lang": "en"}', "line 1"), ("\n", "holds no voice")])
def test_a_bad_file_is_named(tmp_path, text, where):
    path = tmp_path / "voices.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=f"voices.jsonl.*{where}"):
        voices.read_voices(path)


def test_voices_are_divided_by_timbre_and_drawn_by_language(tmp_path, monkeypatch):
    rows = [{"id": f"{lang} {n}", "timbre": f"t{n}", "lang": lang} for lang in ("en-GB", "zh-CN") for n in range(40)]
    monkeypatch.setattr(voices, "speak", voices.Engine("", str(voices_file(tmp_path, rows))))
    settings = synth.load_config(["synth.engine=python:voices:speak"]).synth
    synth.load_engine.cache_clear()                     # it may know the engine of another test
    choices = {split: synth.candidates(split, settings) for split in ("train", "dev", "test")}
    timbres = {split: {voice["timbre"] for voice in found} for split, found in choices.items()}
    assert sorted(voice["id"] for found in choices.values() for voice in found) == sorted(row["id"] for row in rows)
    assert len(timbres["train"] | timbres["dev"] | timbres["test"]) == sum(map(len, timbres.values())) == 40
    drawn = [synth.draw_voice(synth.Random(seed), choices["train"], settings, "cmn") for seed in range(30)]
    assert {voice["lang"] for voice in drawn} == {"zh-CN"}
    assert synth.draw_voice(synth.Random(0), choices["train"], settings, "de") is None


# --------------------------------------------------------------------------------------------------
# As a person uses it
# --------------------------------------------------------------------------------------------------

def command(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=folder, env=os.environ | environment,
                          capture_output=True, text=True)


def test_clips_to_hear(vits, tmp_path):
    file = voices_file(tmp_path, [FIRST, SECOND])
    for chosen, count in (([], 1), ([f"voices={file}"], 2)):
        done = command(tmp_path, str(ROOT / "extras/voices.py"), f"model={vits}", "say=hello there", "to=a.wav", *chosen)
        assert done.returncode == 0, done.stderr
        waveform, rate = soundfile.read(tmp_path / "a.wav")
        assert rate == 16000
        assert len(done.stdout.splitlines()) == count + 1
        assert done.stdout.count(" s long, ") == count
        assert np.abs(waveform).max() > 0.003
        assert np.all(waveform[-8000:] == 0)            # the pause behind the last
        if count == 2:
            start = float(done.stdout.splitlines()[1].split()[0])
            assert np.all(waveform[int(start * rate) - 7000:int(start * rate) - 1000] == 0)


def test_synthesis_by_the_hook(vits, tmp_path):
    """In the project's folder and in another one, in processes of their own; all clips are these voices'."""
    file = voices_file(tmp_path, [FIRST, SECOND])
    contents = []
    for folder, name in ((ROOT, "one"), (tmp_path, "two")):
        done = command(
            folder, str(ROOT / "synth.py"), *SMALL, f"data={tmp_path / name}", "synth.engine=python:extras.voices:speak",
            "synth.shards={tasks: 1}", "synth.noise.share=0", "synth.tasks={speaker: 1.0}",
            "synth.gate.chars_per_second=[0.1, 1000.0]",
            VOICES_MODEL=vits, VOICES_FILE=str(file))
        assert done.returncode == 0, done.stderr
        contents.append((tmp_path / name / "tasks/train-000000.tar").read_bytes())
    assert contents[0] == contents[1]
    path = tmp_path / "one/tasks/train-000000.tar"
    asked = {"a": set(), "b": set()}
    for number in range(synth.read_index(path)["count"]):
        sample, files = synth.read_sample(path, number)
        spoken, question, answer = sample["parts"] if len(sample["parts"]) == 3 else (None, None, None)
        if spoken and spoken["role"] == "speech":
            asked[spoken["voice"]].add((question["text"], answer["text"]))
            clip = synth.decode_flac(files[spoken["audio"]])
            assert len(clip) == pytest.approx(spoken["seconds"] * synth.RATE, abs=8)
    assert asked == {"a": {("Speaker:", " woman")}, "b": {("Speaker:", " man")}}


def test_a_missing_variable_is_one_sentence(tmp_path):
    done = command(tmp_path, str(ROOT / "synth.py"), *SMALL, "synth.engine=python:extras.voices:speak", "data=d",
                   VOICES_MODEL="", VOICES_FILE="")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "No file names the voices: write one, as in VOICES_FILE=voices.jsonl."
