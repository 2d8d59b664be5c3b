"""Which of espeak's timbres does a Whisper understand? Word error rate of each on a corpus's held-out text.

    python experiments/rank_voices.py model.encoder=openai/whisper-tiny.en [synth.rate=[160,220] …]

Every timbre but the special ones says the same pieces of twelve words, at rates and pitches drawn as for
training; Whisper writes down what it hears, greedily; both sides pass Whisper's own normalizer, for it writes
14 where the text says fourteen. Prints the ranking and writes results/voices.json; `synth.timbres` takes the
best of them.
"""
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch                                 # noqa: E402
import torchaudio.functional                 # noqa: E402
import transformers                          # noqa: E402
from tqdm import tqdm                        # noqa: E402
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer    # noqa: E402

import synth                                 # noqa: E402
from synth import Settings, UserError        # noqa: E402

PIECES = 10
WORDS = 12                                   # of a piece
BATCH = 16


def draw_pieces(c: Settings) -> list[str]:
    """The first PIECES runs of WORDS words of the held-out documents of the settings' corpus."""
    words = []
    for split, document in synth.split_documents(c, Counter()):
        if split == "dev":
            words += " ".join(synth.texts_of(document)).split()
        if len(words) >= PIECES * WORDS:
            return [" ".join(words[i * WORDS:(i + 1) * WORDS]) for i in range(PIECES)]
    raise UserError(f"The corpus has {len(words)} held-out words of {PIECES * WORDS}; give a larger one.")


def error_rates(c: Settings, texts: list[str]) -> dict[str, float]:
    """{timbre: share of words misheard}, the best understood first."""
    processor = transformers.AutoProcessor.from_pretrained(c.model.encoder)
    whisper = transformers.WhisperForConditionalGeneration.from_pretrained(c.model.encoder)
    normalized = EnglishTextNormalizer({})
    engine = synth.load_engine("espeak")
    rng = Random(c.seed)
    names = sorted(synth.timbres().keys() - set(c.synth.special_timbres))
    jobs = [(synth.draw_voice(rng, [name], c.synth), text) for name in names for text in texts]
    errors = Counter()
    words = Counter()
    for first in tqdm(range(0, len(jobs), BATCH)):
        voices, said = zip(*jobs[first:first + BATCH])
        waveforms, rate = engine(said, voices, c.seed)
        clips = [synth.to_16k(waveform, rate) for waveform in waveforms]
        features = processor(clips, sampling_rate=synth.RATE, return_tensors="pt").input_features
        with torch.no_grad():
            ids = whisper.generate(features, max_new_tokens=60, do_sample=False)
        for voice, text, heard in zip(voices, said, processor.batch_decode(ids, skip_special_tokens=True)):
            wanted = normalized(text).split()
            errors[voice["timbre"]] += torchaudio.functional.edit_distance(wanted, normalized(heard).split())
            words[voice["timbre"]] += len(wanted)
    rates = {name: errors[name] / words[name] for name in names}
    return dict(sorted(rates.items(), key=lambda item: item[1]))


def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments)
    if not c.model.encoder:
        raise UserError("Give the Whisper that shall listen: model.encoder=openai/whisper-tiny.en.")
    transformers.logging.set_verbosity_error()
    texts = draw_pieces(c)
    rates = error_rates(c, texts)
    for name, rate in rates.items():
        print(f"{name:16}{rate:6.1%}  {synth.timbre_split(name, c.synth.held_out)}")
    result = {
        "command": "python experiments/rank_voices.py " + " ".join(arguments),
        "texts": texts,
        "rate": c.synth.rate,
        "pitch": c.synth.pitch,
        "word error rate": rates}
    synth.write_whole(ROOT / "results" / "voices.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    synth.run(main)
