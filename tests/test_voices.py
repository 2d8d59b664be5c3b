"""Voices, engines, and the way from waveform to file: section 5 of synth.py."""
import hashlib
import io
import json
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

import synth as V

SETTINGS = V.load_config([]).synth
GATE = SETTINGS.gate
SPECIAL = SETTINGS.special_timbres
HELD_OUT = SETTINGS.held_out
SENTENCE = "tom likes apples"


def in_fresh_process(function, *arguments):
    """As shards are made: a child of a forkserver that has torch, and no espeak yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchaudio", "soundfile", "synth"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(function, arguments)


def digests(voices, reseed):
    """One digest per voice over SENTENCE; `reseed`: the seed is set again before each clip."""
    engine, found = V.load_engine("espeak"), []
    if not reseed:
        return [hashlib.sha256(w).hexdigest() for w in engine([SENTENCE] * len(voices), voices, 7)[0]]
    for voice in voices:
        found.append(hashlib.sha256(engine([SENTENCE], [voice], 7)[0][0]).hexdigest())
    return found


def draw(n, split="train", **settings):
    rng = random.Random(0)
    settings = V.Settings(SETTINGS | settings)
    chosen_from = V.candidates(split, settings)
    return [V.draw_voice(rng, chosen_from, settings) for _ in range(n)]


@pytest.fixture(scope="module")
def espeak():
    return V.load_engine("espeak")


# --------------------------------------------------------------------------------------------------
# 1. espeak's voices
# --------------------------------------------------------------------------------------------------

def test_ten_thousand_voices_sound_different():
    voices = list({v["id"]: v for v in draw(12000)}.values())[:10000]    # draws repeat: one of each
    assert len(voices) == 10000
    found = in_fresh_process(digests, voices, True)
    assert len(set(found)) == 10000


def test_a_fixed_order_repeats_in_fresh_processes():
    voices = draw(40, timbres=sorted(V.timbres())[::3])
    assert in_fresh_process(digests, voices, False) == in_fresh_process(digests, voices, False)


def test_accents_and_mandarin_are_each_their_own():                # but en-shaw, which speaks as en-gb does
    codes = [a for a in V.accents() if a.startswith("en") and a != "en-shaw"] + ["cmn"]
    assert len(codes) == 9 and {"en-gb", "en-gb-scotland", "en-029", "en-us-nyc"} < set(codes)
    found = [in_fresh_process(digests, [V.espeak_voice(a, "m3")], True)[0] for a in codes]
    assert len(set(found)) == len(codes)


def test_a_timbre_changes_the_voice():
    names = sorted(V.timbres())[::5]
    found = {t: in_fresh_process(digests, [V.espeak_voice("en-us", t)], True)[0] for t in names}
    assert len(set(found.values())) == len(found) == 21


def test_mandarin_speaks(espeak):
    (wave,), rate = espeak(["今天天气很好"], [V.espeak_voice("cmn", "f3")], 0)
    assert rate == 22050 and wave.dtype == np.float32
    assert V.gate(V.to_16k([wave], rate)[0], "今天天气很好", GATE) is None


TWO = """
import gc
import synth
voice = synth.espeak_voice("en-us", "f3", rate=180, pitch=50)
one = synth.Espeak()
samples = len(one.speak("hello there", voice))
synth.Espeak().speak("hello", voice)
gc.collect()
assert len(one.speak("hello there", voice)) == samples > 10000
"""


def test_an_object_speaks_when_another_is_gone():
    """espeak has one callback: that of an object that is gone would end the process."""
    subprocess.run([sys.executable, "-c", TWO], cwd=Path(V.__file__).parent, check=True)


def test_parameters_do_not_survive_their_clip(espeak):
    plain = V.espeak_voice("en-us", "klatt6")
    loud = V.espeak_voice("en-us", "klatt6", volume=200, pitch=90, range=99)
    first, other, again = espeak([SENTENCE] * 3, [plain, loud, plain], 0)[0]
    assert np.array_equal(first, again) and np.std(other) > 1.2 * np.std(first)


@pytest.mark.parametrize("accent, timbre, hint",
                         [("en-su", "f3", "en-us"), ("en-us", "F3", "f3"), ("gmw/en-US", "f3", "en-us")])
def test_an_unknown_name_is_refused(espeak, accent, timbre, hint):
    with pytest.raises(V.UserError, match=hint):
        V.espeak_voice(accent, timbre)
    with pytest.raises(V.UserError, match=hint):
        espeak(["hello"], [{"id": "x", "accent": accent, "timbre": timbre}], 0)


def test_a_parameter_out_of_range_is_refused():
    with pytest.raises(V.UserError, match="rate goes from 80 to 450, not 60"):
        V.espeak_voice("en-us", "f3", rate=60)


def test_splits_share_no_throat():
    splits = {split: V.candidates(split, SETTINGS) for split in ("train", "dev", "test")}
    throats = [{V.timbres()[t]["throat"] for t in names} for names in splits.values()]
    assert not throats[0] & throats[1] and not throats[0] & throats[2] and not throats[1] & throats[2]
    assert sorted(sum(splits.values(), SPECIAL)) == sorted(V.timbres()) and len(V.timbres()) == 104
    assert len(splits["test"]) >= 10 and len(splits["dev"]) >= 3 and len(splits["train"]) >= 40
    for pair in (("Gene", "Gene2"), ("f2", "f5"), ("iven", "iven4"), ("klatt", "adam"), ("aunty", "f4")):
        assert len({V.timbre_split(t, HELD_OUT) for t in pair}) == 1
    for split, names in splits.items():
        assert {v["timbre"] for v in draw(2000, split)} == set(names)


def test_a_list_of_timbres_is_divided_by_throat_too():
    """Training never hears a listed voice that test hears; one timbre alone, a special one too, serves all splits."""
    listed = ["edward", "Hugo", "pablo", "m4", "Gene", "whisper"]
    found = {split: {v["timbre"] for v in draw(100, split, timbres=listed)} for split in ("train", "dev", "test")}
    assert found == {"train": {"edward", "Hugo", "whisper"}, "dev": {"Gene"}, "test": {"m4", "pablo"}}
    assert all(V.candidates(split, V.Settings(SETTINGS | {"timbres": ["whisper"]})) == ["whisper"] for split in found)


def test_voices_from_a_file(tmp_path):
    path = tmp_path / "voices.jsonl"
    lines = [f'{{"id": "v{i}", "timbre": "t{i}", "lang": "en", "wav": "{i}.wav"}}\n' for i in range(40)]
    path.write_text("".join(lines))
    pool = V.read_voices(path)
    assert pool[3] == {"id": "v3", "timbre": "t3", "lang": "en", "wav": "3.wav"}
    train, test = V.candidates("train", SETTINGS, pool), V.candidates("test", SETTINGS, pool)
    dev = V.candidates("dev", SETTINGS, pool)
    assert train and test and sorted(v["id"] for v in train + dev + test) == sorted(v["id"] for v in pool)
    assert V.draw_voice(random.Random(0), test, SETTINGS) in test
    assert V.candidates("test", SETTINGS, pool[:1]) == V.candidates("train", SETTINGS, pool[:1]) == pool[:1]


def test_a_split_without_voices_is_refused():
    with pytest.raises(V.UserError, match="left for test at synth.held_out="):
        V.candidates("test", V.Settings(SETTINGS | {"held_out": {"test": 0.0, "dev": 0.1}}))
    with pytest.raises(V.UserError, match="'wisper'; nearest valid: whisper"):
        V.candidates("train", V.Settings(SETTINGS | {"special_timbres": ["wisper"]}))
    with pytest.raises(V.UserError, match="'Edward'; nearest valid: edward"):
        V.candidates("train", V.Settings(SETTINGS | {"timbres": ["Edward"]}))


@pytest.mark.parametrize("text, where", [
    ('{"id": "a"', "line 1"), ('\n{"id": "a", "lang": "en"}', "line 2"), ("[1]", "line 1"),
    ('{"id": 3, "timbre": "a", "lang": "en"}', "line 1"), ("", "holds no voice")])
def test_a_bad_voice_file_is_named(tmp_path, text, where):
    path = tmp_path / "voices.jsonl"
    path.write_text(text)
    with pytest.raises(V.UserError, match=f"voices.jsonl.*{where}"):
        V.read_voices(path)
    with pytest.raises(V.UserError, match="cannot be read"):
        V.read_voices(tmp_path / "none.jsonl")


# --------------------------------------------------------------------------------------------------
# 2. Engines
# --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    """A tiny random VITS with two speakers, saved as the hub holds one."""
    from transformers import VitsConfig, VitsModel, VitsTokenizer
    folder = tmp_path_factory.mktemp("vits")
    vocabulary = {c: i for i, c in enumerate("_ abcdefghijklmnopqrstuvwxyz")}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = VitsTokenizer(str(folder / "vocab.json"), pad_token="_", phonemize=False, is_uroman=False)
    torch.manual_seed(0)
    model = VitsModel(VitsConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
        flow_size=16, spectrogram_bins=9, upsample_initial_channel=32, upsample_rates=[8, 8, 2, 2],
        num_speakers=2, speaker_embedding_size=4, wavenet_dilation_rate=1,
        posterior_encoder_num_wavenet_layers=1,
        prior_encoder_num_wavenet_layers=1, prior_encoder_num_flows=1, duration_predictor_num_flows=2))
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return str(folder)


def test_hf_engine_speaks_in_batches(vits):
    engine = V.load_engine(f"hf:{vits}")
    texts = [SENTENCE, "no", SENTENCE]
    voices = [{"id": "a", "speaker": 0}, {"id": "a", "speaker": 0}, {"id": "b", "speaker": 1}]
    waves, rate = engine(texts, voices, 5)
    assert rate == 16000 and all(w.ndim == 1 and w.dtype == np.float32 for w in waves)
    assert 0 < len(waves[1]) < len(waves[0])                       # trimmed, not padded to the longest
    assert all(np.array_equal(a, b) for a, b in zip(waves, engine(texts, voices, 5)[0]))
    assert not np.array_equal(waves[0], engine(texts, voices, 6)[0][0])


def test_hf_engine_that_is_none(tmp_path):
    with pytest.raises(V.UserError, match="text-to-waveform"):
        V.load_engine(f"hf:{tmp_path}")


def test_python_engine(tmp_path, monkeypatch):
    returned = {"speak": "[np.zeros(9) for _ in texts], 24000",
                "stereo": "[np.zeros((2, 9)) for _ in texts], 24000",
                "short": "[np.zeros(9)], 24000", "bare": "3"}
    (tmp_path / "my_tts.py").write_text("import numpy as np\n" + "".join(
        f"def {name}(texts, voices, seed): return {what}\n" for name, what in returned.items()))
    (tmp_path / "needs_more.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    waves, rate = V.load_engine("python:my_tts:speak")(["a", "b"], [{}, {}], 0)
    assert rate == 24000 and len(waves) == 2 and waves[0].dtype == np.float32
    for name in ("stereo", "short", "bare"):
        with pytest.raises(V.UserError, match="must return"):
            V.load_engine(f"python:my_tts:{name}")(["a", "b"], [{}, {}], 0)
    for name in ("my_tts:nothing", "no_such_module:speak", "my_tts"):
        with pytest.raises(V.UserError, match=name.split(":")[0]):
            V.load_engine(f"python:{name}")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        V.load_engine("python:needs_more:speak")


@pytest.mark.parametrize("name", ["espeek", "espeak:x", "hf:", "python:", ""])
def test_an_unknown_engine_is_refused(name):
    with pytest.raises(V.UserError, match="espeak, hf:<model>"):
        V.load_engine(name)


# --------------------------------------------------------------------------------------------------
# 3. From waveform to file
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate", [22050, 24000, 44100, 8000, 16000])
def test_resampling_together_is_resampling_alone(rate):
    rng = np.random.default_rng(0)
    clips = [rng.standard_normal(n).astype(np.float32) for n in (1, 440, 441, 442, 5000, 22050, 7)]
    for clip, got in zip(clips, V.to_16k(clips, rate), strict=True):
        alone = torchaudio.transforms.Resample(rate, 16000, lowpass_filter_width=16)(torch.from_numpy(clip))
        assert len(got) == len(alone) and np.abs(got - alone.numpy()).max() < 3e-6


def test_resampling_keeps_speech_and_drops_what_would_fold():
    time = np.arange(22050 * 2) / 22050
    tone = lambda hz: np.sin(2 * np.pi * hz * time).astype(np.float32)
    low, high = (V.to_16k([tone(hz)], 22050)[0][4000:-4000] for hz in (7000, 9000))
    assert abs(np.std(low) * 2 ** 0.5 - 1) < 0.01 and np.std(high) < 0.005


def test_the_gate():
    tone = (0.3 * np.sin(np.arange(32000) / 9)).astype(np.float32)
    text = "a sentence that takes two seconds"
    for wave, words, reason in [
            (tone, text, None), (tone[:0], text, "empty"), (tone, "... !", "empty"),
            (tone[:479], "a", "too short"), (tone[:480], "a", None), (tone * 0, text, "silent"),
            (tone * np.float32("nan"), text, "silent"),
            (np.clip(tone * 9, -1, 1), text, "clipped"),
            (tone, text * 3, "too fast"), (tone, "ab", "too slow"),
            (np.tile(tone, 15), text * 15, None), (np.tile(tone, 16), text * 15, "too long")]:
        assert V.gate(wave, words, GATE) == reason, (reason, words)


def test_espeak_never_clips_and_passes_the_gate(espeak):
    shouts = [V.espeak_voice("en-us", v["timbre"], rate=v["rate"], volume=300, range=99, pitch=99) for v in draw(100, "test")]
    for voices in (draw(100), draw(100, "test"), shouts):
        waves, rate = espeak([SENTENCE] * 100, voices, 0)
        assert max(np.abs(w).max() for w in waves) <= np.float32(0.8)
        assert [V.gate(w, SENTENCE, GATE) for w in V.to_16k(waves, rate)] == [None] * 100


def test_flac_gives_the_samples_back():
    samples = V.to_int16(np.array([0, 0.5, -0.5, 1, -1, 2, -2] * 100, np.float32))
    assert samples[:7].tolist() == [0, 16384, -16384, 32767, -32767, 32767, -32768]
    data = V.flac_bytes(samples)
    back, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate == 16000 and np.array_equal(back, samples) and data == V.flac_bytes(samples)
    assert soundfile.info(io.BytesIO(data)).subtype == "PCM_16"


@pytest.mark.parametrize("text, lang, can", [
    ("the ball is red, and it costs $5 or 3.50!", "en-us", True), ("Café – naïve “quotes”", "en-gb", True),
    ("see https://a.b/c now", "en-us", False), ("write to tom@house.org", "en-us", False),
    ("www.house.org", "en", False), ("x = f(y)", "en", False), ("<b>bold</b>", "en", False),
    ("call run() now", "en", False), ("a [link] here", "en", False), ("球是红的", "en-us", False),
    ("球是红的", "cmn", True), ("我喜欢 jazz 音乐", "zh", True), ("мяч красный", "cmn", False),
    ("мяч красный", "en", False), ("мяч красный", "ru", True), ("... !", "en", False), ("", "en", False),
    ("either and/or both", "en", True), ("it was late--too late", "en", True)])
def test_what_can_be_spoken(text, lang, can):
    assert V.speakable(text, lang) is can
