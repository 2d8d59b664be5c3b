"""extras/voices.py: VITS models as an engine."""
import json
import os
import subprocess
import sys
from collections import Counter
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
        upsample_kernel_sizes=[16, 16], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
        num_speakers=2, speaker_embedding_size=4, wavenet_dilation_rate=1,
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
    """Without noise a clip is the same alone and in a batch, but at its end, where the model sees padding."""
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
    rows = [{"id": f"{lang} {n}", "timbre": f"t{n}", "lang": lang}
            for lang in ("en-GB", "zh-CN") for n in range(40)]
    monkeypatch.setattr(voices, "speak", voices.Engine("", str(voices_file(tmp_path, rows))))
    settings = synth.load_config(["synth.engine=python:voices:speak"]).synth
    synth.load_engine.cache_clear()                     # it may know the engine of another test
    choices = {split: synth.candidates(split, settings) for split in ("train", "dev", "test")}
    timbres = {split: {voice["timbre"] for voice in found} for split, found in choices.items()}
    ids = [voice["id"] for found in choices.values() for voice in found]
    assert sorted(ids) == sorted(row["id"] for row in rows)
    assert len(timbres["train"] | timbres["dev"] | timbres["test"]) == sum(map(len, timbres.values())) == 40
    drawn = [synth.draw_voice(synth.Random(seed), choices["train"], settings, "cmn") for seed in range(30)]
    assert {voice["lang"] for voice in drawn} == {"zh-CN"}
    assert synth.draw_voice(synth.Random(0), choices["train"], settings, "de") is None


# --------------------------------------------------------------------------------------------------
# As a person uses it
# --------------------------------------------------------------------------------------------------

def test_clips_to_hear(vits, tmp_path, monkeypatch, capsys):
    """One after the other, half a second between them, with the gate's verdict on each."""
    file = voices_file(tmp_path, [FIRST, SECOND])
    arguments = [f"to={tmp_path / 'a.wav'}", "synth.gate.chars_per_second=[1.0, 1000.0]"]
    for known, said, ids in ("", "hello there", [vits]), (str(file), "i have 3", ["a", "b"]):
        monkeypatch.setattr(voices, "speak", voices.Engine(vits, known))
        voices.main([*arguments, f"say={said}"])
        waveform, rate = soundfile.read(tmp_path / "a.wav")
        *lines, last = capsys.readouterr().out.splitlines()
        assert last == f"{tmp_path / 'a.wav'} is written, at 16000 Hz."
        assert [line.split(" s  ")[1].split(",")[0] for line in lines] == ids
        assert rate == 16000
        assert np.all(waveform[-8000:] == 0)            # the pause behind the last clip
        if len(ids) == 1:
            assert lines[0].startswith("   0.0 s  ") and lines[0].endswith(" s long, fit")
            assert np.abs(waveform[:-8000]).max() > 0.003
        else:                                           # it knows no digits
            assert [line.split("long, ")[1] for line in lines] == ["rejected: empty"] * 2
            assert len(waveform) == 16000
            assert lines[1].startswith("   0.5 s  ")


def test_synthesis_by_the_hook(vits, tmp_path):
    """By the command of the docstring, in the project's folder; all clips are these voices'."""
    file = voices_file(tmp_path, [FIRST, SECOND])
    done = subprocess.run(
        [sys.executable, "synth.py", *SMALL, f"data={tmp_path / 'data'}", "synth.shards={tasks: 1}",
         "synth.engine=python:extras.voices:speak", "synth.noise.share=0", "synth.tasks={speaker: 1.0}"],
        cwd=ROOT, env=os.environ | {"VOICES_MODEL": vits, "VOICES_FILE": str(file)},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "data/tasks/train-000000.tar"
    index = synth.read_index(path)
    asked = {"a": Counter(), "b": Counter()}
    for number in range(index["count"]):
        sample, files = synth.read_sample(path, number)
        spoken = sample["parts"][0]
        if spoken["role"] == "speech":                  # else its clip has failed the gate
            question, answer = sample["parts"][1:]
            asked[spoken["voice"]][question["text"] + answer["text"]] += 1
            assert len(synth.decode_flac(files[spoken["audio"]])) == round(spoken["seconds"] * synth.RATE)
    assert asked["a"].keys() == {"Speaker: woman"}
    assert asked["b"].keys() == {"Speaker: man"}
    assert index["counts"]["clips"] == asked["a"].total() + asked["b"].total() > 20
