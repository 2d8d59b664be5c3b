"""Voices, engines, and the way from waveform to file: sections 2 and 3 of synth.py."""
import hashlib
import io
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import synth as V

SETTINGS = V.load_config([]).synth
GATE = SETTINGS.gate
SPECIAL = SETTINGS.special_timbres
HELD_OUT = SETTINGS.held_out
SENTENCE = "tom likes apples"


def in_fresh_process(function, *arguments):
    """As shards are made: a child of a forkserver that has no espeak yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soundfile", "synth"])
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
    assert V.gate(V.to_16k(wave, rate), "今天天气很好", GATE) is None


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
                         [("en-su", "f3", "en-us"), ("en-us", "Edward", "edward"), ("gmw/en-US", "f3", "en-us")])
def test_an_unknown_name_is_refused(accent, timbre, hint):
    with pytest.raises(V.UserError, match=hint):
        V.espeak_voice(accent, timbre)


def test_splits_share_no_vocal_tract():
    splits = {split: V.candidates(split, SETTINGS) for split in ("train", "dev", "test")}
    tracts = [{V.timbres()[t]["vocal_tract"] for t in names} for names in splits.values()]
    assert not tracts[0] & tracts[1] and not tracts[0] & tracts[2] and not tracts[1] & tracts[2]
    assert sorted(sum(splits.values(), SPECIAL)) == sorted(V.timbres()) and len(V.timbres()) == 104
    assert len(splits["test"]) >= 10 and len(splits["dev"]) >= 3 and len(splits["train"]) >= 40
    for pair in (("Gene", "Gene2"), ("f2", "f5"), ("iven", "iven4"), ("klatt", "adam"), ("aunty", "f4")):
        assert len({V.timbre_split(t, HELD_OUT) for t in pair}) == 1
    for split, names in splits.items():
        assert {v["timbre"] for v in draw(2000, split)} == set(names)


def test_a_list_of_timbres_is_divided_by_vocal_tract_too():
    """Training never hears a listed voice that test hears; one timbre alone, a special one too, serves all splits."""
    listed = ["edward", "Hugo", "pablo", "m4", "Gene", "whisper"]
    found = {split: {v["timbre"] for v in draw(100, split, timbres=listed)} for split in ("train", "dev", "test")}
    assert found == {"train": {"edward", "Hugo", "whisper"}, "dev": {"Gene"}, "test": {"m4", "pablo"}}
    assert all(V.candidates(split, V.Settings(SETTINGS | {"timbres": ["whisper"]})) == ["whisper"] for split in found)


def test_an_engines_own_voices(tmp_path, monkeypatch):
    lines = [f'{{"id": "v{i}", "timbre": "t{i}", "lang": "en", "wav": "{i}.wav"}}' for i in range(40)]
    (tmp_path / "own_voices.py").write_text(f"def many(texts, voices, seed): pass\nmany.voices = [{', '.join(lines)}]\n"
                                            "def one(texts, voices, seed): pass\none.voices = many.voices[:1]\n")
    monkeypatch.chdir(tmp_path)
    many = V.Settings(SETTINGS | {"engine": "python:own_voices:many"})
    voices = V.load_engine(many.engine).voices
    assert voices[3] == {"id": "v3", "timbre": "t3", "lang": "en", "wav": "3.wav"}
    train, dev, test = (V.candidates(split, many) for split in ("train", "dev", "test"))
    assert train and test and sorted(v["id"] for v in train + dev + test) == sorted(v["id"] for v in voices)
    assert V.draw_voice(random.Random(0), test, many, "en-GB") in test
    assert V.draw_voice(random.Random(0), test, many, "zh") is None
    one = V.Settings(SETTINGS | {"engine": "python:own_voices:one"})
    assert V.candidates("test", one) == V.candidates("train", one) == voices[:1]


def test_a_split_without_voices_is_refused():
    with pytest.raises(V.UserError, match="left for test at synth.held_out="):
        V.candidates("test", V.Settings(SETTINGS | {"held_out": {"test": 0.0, "dev": 0.1}}))
    with pytest.raises(V.UserError, match="'Edward'; nearest valid: edward"):
        draw(1, timbres=["Edward"])


# --------------------------------------------------------------------------------------------------
# 2. Engines
# --------------------------------------------------------------------------------------------------

def test_python_engine(tmp_path, monkeypatch):
    (tmp_path / "my_tts.py").write_text("import numpy as np\ndef speak(texts, voices, seed):\n"
                                        "    return [np.zeros(9) for _ in texts], 24000\n")
    (tmp_path / "needs_more.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    waves, rate = V.load_engine("python:my_tts:speak")(["a", "b"], [{}, {}], 0)
    assert rate == 24000 and len(waves) == 2
    for name, missing in (("my_tts:nothing", "nothing"), ("no_such_module:speak", "no_such_module"), ("my_tts", "attribute"),
                          ("needs_more:speak", "no_such_package")):
        with pytest.raises(V.UserError, match=f"python:{name} .*{missing}"):
            V.load_engine(f"python:{name}")


@pytest.mark.parametrize("name", ["espeek", "espeak:x", "hf:a", "python:", ""])
def test_an_unknown_engine_is_refused(name):
    with pytest.raises(V.UserError, match="neither espeak nor a python:<module>:<function>"):
        V.load_engine(name)


# --------------------------------------------------------------------------------------------------
# 3. From waveform to file
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate", [22050, 24000, 44100, 48000, 8000, 16000, 44101, 11025])
def test_resampling_keeps_length_and_waveform(rate):
    """Every length, also none; a tone that starts and ends softly is the same tone at 16 kHz, at the same place."""
    for n in (0, 1, 7, 440, 441, 442, 5000, 22050):
        got = V.to_16k(np.ones(n, np.float32), rate)
        assert len(got) == -(-n * 16000 // rate) and got.dtype == np.float32

    def tone(at):
        seconds = np.arange(at) / at
        return (np.sin(np.pi * seconds) ** 2 * np.sin(2 * np.pi * 1234 * seconds)).astype(np.float32)
    assert np.abs(V.to_16k(tone(rate), rate) - tone(16000)).max() < 2e-3


def test_resampling_keeps_speech_and_drops_what_would_fold():
    time = np.arange(22050 * 2) / 22050
    tone = lambda hz: np.sin(2 * np.pi * hz * time).astype(np.float32)
    low, high = (V.to_16k(tone(hz), 22050)[4000:-4000] for hz in (7000, 9000))
    assert abs(np.std(low) * 2 ** 0.5 - 1) < 0.01 and np.std(high) < 0.005


def test_noise_has_the_level_that_is_asked():
    rng = np.random.default_rng(0)
    speech = (0.1 * rng.standard_normal(8000)).astype(np.float32)
    for kind in ("white", "pink", "coloured", "babble"):
        noise = V.noise_of(kind, 8000, [speech[:3000], speech[3000:]], rng)
        mixed = V.mix(speech, noise, 5.0)
        assert noise.shape == mixed.shape == (8000,) and mixed.dtype == np.float32 and np.abs(mixed).max() <= 1
        assert 10 * np.log10(np.sum(speech ** 2) / np.sum((mixed - speech) ** 2)) == pytest.approx(5, abs=0.01)
    assert np.abs(V.mix(speech * 20, noise, 0.0)).max() == pytest.approx(1)


def test_the_gate():
    tone = (0.3 * np.sin(np.arange(32000) / 9)).astype(np.float32)
    text = "a sentence that takes two seconds"
    for wave, words, reason in [
            (tone, text, None), (tone[:0], text, "empty"), (tone, "... !", "empty"),
            (tone[:479], "a", "too short"), (tone[:480], "a", None), (tone * 0, text, "silent"),
            (tone * np.float32("nan"), text, "not finite"), (np.append(tone, np.float32("inf")), text, "not finite"),
            (np.clip(tone * 9, -1, 1), text, "clipped"),
            (tone, text * 3, "too fast"), (tone, "ab", "too slow"),
            (np.tile(tone, 15), text * 15, None), (np.tile(tone, 16), text * 15, "too long")]:
        assert V.gate(wave, words, GATE) == reason, (reason, words)


def test_espeak_never_clips_and_passes_the_gate(espeak):
    shouts = [V.espeak_voice("en-us", v["timbre"], rate=v["rate"], volume=300, range=99, pitch=99) for v in draw(100, "test")]
    for voices in (draw(100), draw(100, "test"), shouts):
        waves, rate = espeak([SENTENCE] * 100, voices, 0)
        assert max(np.abs(w).max() for w in waves) <= np.float32(0.8)
        assert [V.gate(V.to_16k(w, rate), SENTENCE, GATE) for w in waves] == [None] * 100


def test_flac_gives_the_samples_back():
    waveform = np.array([0, 0.5, -0.5, 1, -1, 2, -2] * 100, np.float32)
    data = V.flac_bytes(waveform)
    back, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate == 16000 and back[:7].tolist() == [0, 16384, -16384, 32767, -32768, 32767, -32768] and len(back) == 700
    assert data == V.flac_bytes(waveform) == V.flac_bytes(V.decode_flac(data))
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
