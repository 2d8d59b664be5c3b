"""Voices of transformers' VITS and MMS models: an engine for synth.py, and clips to hear.

Two environment variables choose them: VOICES_MODEL is a folder or a hub name, VOICES_FILE a file of voices:

    {"id": "vctk-p225", "timbre": "p225", "lang": "en", "gender": "f", "speaker": 0}
    {"id": "vctk-p226", "timbre": "p226", "lang": "en", "gender": "m", "speaker": 1}

Timbres are divided among training, dev and test; a single one serves all three. "lang" is the language of the
texts that a voice speaks. "speaker" is the number of the voice in a model that has many. Without "gender" no
sample asks who speaks.

    VOICES_MODEL=facebook/mms-tts-eng python extras/voices.py say="hello there" to=hello.wav
    VOICES_MODEL=kakao-enterprise/vits-vctk VOICES_FILE=voices.jsonl python extras/voices.py    all, in turn
    VOICES_MODEL=facebook/mms-tts-eng VOICES_FILE=voices.jsonl \\
        python synth.py data=data/mms synth.engine=python:extras.voices:speak

A data folder keeps the engine's name, not these variables: give each model and file a folder of its own.
Each of synth.workers processes holds the model, on the GPU where there is one. A model that reads phonemes,
as vits-vctk does, needs the package phonemizer and espeak-ng.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import functools
import json
import os

import numpy as np
import soundfile
import torch
from transformers import AutoConfig, VitsModel, VitsTokenizer

import synth
from synth import UserError


def read_voices(path: Path) -> list[dict]:
    """The voices of a JSONL file, as they are. UserError names a line that is none, or a file without any."""
    voices = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            if line.strip():
                voices.append(json.loads(line))
                if not all(isinstance(voices[-1][key], str) for key in ("id", "timbre", "lang")):
                    raise TypeError("no text")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f'{path}, line {number}, is no voice ({error!r}); each line needs the texts '
                            '"id", "timbre" and "lang".') from None
    if not voices:
        raise UserError(f'{path} holds no voice; write {{"id", "timbre", "lang"}} in each line.')
    return voices


@functools.cache
def load(model_name: str) -> tuple[VitsTokenizer, VitsModel]:
    """Tokenizer and model. UserError if it is a model of another kind."""
    if not model_name:
        raise UserError("No model speaks: name it, as in VOICES_MODEL=facebook/mms-tts-eng.")
    kind = AutoConfig.from_pretrained(model_name).model_type
    if kind != "vits":
        raise UserError(f"{model_name} is a model of the kind {kind}; VITS and MMS models can speak here.")
    tokenizer = VitsTokenizer.from_pretrained(model_name)
    model = VitsModel.from_pretrained(model_name)
    return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def can_read(tokenizer: VitsTokenizer, text: str) -> bool:
    """Whether the model knows all letters and digits of a text: the others would be dropped without a word.

    Most MMS models know no digits, for example. A model that reads phonemes gets those of any text.
    """
    if tokenizer.phonemize:
        return True
    known, _ = tokenizer.prepare_for_tokenization(text)
    return sum(map(str.isalnum, known)) >= sum(map(str.isalnum, text))


class Engine:
    """engine(texts, voices, seed) -> ([(n,) float32 each], sample rate), as synth.py wants it."""

    def __init__(self, model_name: str, voices_file: str) -> None:
        self.model_name = model_name
        self.voices_file = voices_file

    @functools.cached_property
    def voices(self) -> list[dict]:
        """What synth.py draws from."""
        if not self.voices_file:
            raise UserError("No file names the voices: write one, as in VOICES_FILE=voices.jsonl.")
        return read_voices(Path(self.voices_file))

    @torch.inference_mode()
    def __call__(self, texts: list[str], voices: list[dict], seed: int) -> tuple[list[np.ndarray], int]:
        """Speak the texts, one padded batch for each speaker. What the model cannot read gives an empty clip,
        which synth.py's gate turns into text again.
        """
        tokenizer, model = load(self.model_name)
        torch.manual_seed(seed)
        waveforms = [np.zeros(0, np.float32)] * len(texts)
        batches: dict[int | None, list[int]] = {}
        for i, (text, voice) in enumerate(zip(texts, voices, strict=True)):
            if can_read(tokenizer, text):
                batches.setdefault(voice.get("speaker"), []).append(i)
        for speaker, numbers in batches.items():
            batch = tokenizer([texts[i] for i in numbers], return_tensors="pt", padding=True).to(model.device)
            spoken = model(**batch, speaker_id=speaker)
            for i, waveform, samples in zip(numbers, spoken.waveform, spoken.sequence_lengths):
                waveforms[i] = waveform[:int(samples)].float().cpu().numpy()       # behind it is padding
        return waveforms, model.config.sampling_rate


speak = Engine(os.environ.get("VOICES_MODEL", ""), os.environ.get("VOICES_FILE", ""))


def main(arguments: list[str]) -> None:
    """Write one clip of each voice, half a second between them, and say what synth.py's gate would do."""
    c = synth.load_config(
        arguments,
        say="the old man has seven birds, and they all sing in the morning.",
        to="voices.wav")
    voices = speak.voices if speak.voices_file else [{"id": speak.model_name}]
    waveforms, rate = speak([c.say] * len(voices), voices, c.seed)
    pause = np.zeros(rate // 2, np.float32)
    pieces = []
    start = 0
    for voice, waveform in zip(voices, waveforms):
        reason = synth.gate(synth.to_16k(waveform, rate), c.say, c.synth.gate)
        verdict = f"rejected: {reason}" if reason else "fit"
        print(f"{start / rate:6.1f} s  {voice['id']}, {len(waveform) / rate:.1f} s long, {verdict}")
        pieces += [waveform, pause]
        start += len(waveform) + len(pause)
    soundfile.write(c.to, np.concatenate(pieces), rate)
    print(f"{c.to} is written, at {rate} Hz.")


if __name__ == "__main__":
    synth.run(main)
