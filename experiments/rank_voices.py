"""Which of espeak's timbres does a Whisper understand? Word error rate of each on a corpus's held-out text.

    python tests/rank_voices.py model.encoder=openai/whisper-tiny.en [synth.rate=[160,220] …]

Every timbre but the special ones says the same pieces of twelve words, at rates and pitches drawn as for training;
Whisper writes down what it hears, greedily; both sides pass Whisper's own normalizer, for it writes 14 where the text
says fourteen. Prints the ranking and writes results/voices.json; `synth.timbres` takes the best of them.
"""
import json
import sys
from pathlib import Path
from random import Random

import torch
import torchaudio.functional
import transformers
from tqdm import tqdm
from transformers import AutoProcessor, WhisperForConditionalGeneration
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import inserter                                         # noqa: E402
import synth                                            # noqa: E402

PIECES, WORDS, BATCH = 10, 12, 16


def pieces(c):
    """The first PIECES runs of WORDS words of the held-out documents of the settings' corpus."""
    words = []
    for split, document in synth.split_documents(c):
        if split == "dev":
            words += " ".join(synth.texts_of(document)).split()
        if len(words) >= PIECES * WORDS:
            return [" ".join(words[i * WORDS:(i + 1) * WORDS]) for i in range(PIECES)]
    raise synth.UserError(f"The corpus has only {len(words)} held-out words of {PIECES * WORDS}; give a larger one.")


def main(arguments):
    c = synth.load_config(arguments)
    texts = pieces(c)
    transformers.logging.set_verbosity_error()
    folder = inserter.find_checkpoint(c.model.encoder)
    processor = AutoProcessor.from_pretrained(folder)
    whisper = WhisperForConditionalGeneration.from_pretrained(folder)
    normalized = EnglishTextNormalizer({})
    engine = synth.Espeak()
    rng = Random(c.seed)
    names = sorted(synth.timbres().keys() - set(c.synth.special_timbres))
    jobs = [(synth.draw_voice(rng, [name], c.synth), text) for name in names for text in texts]
    errors, words = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for batch in tqdm(list(inserter.batches(jobs, BATCH))):
        voices, said = zip(*batch)
        clips = synth.to_16k(*engine(said, voices, c.seed))
        features = processor(list(clips), sampling_rate=synth.RATE, return_tensors="pt").input_features
        with torch.no_grad():
            ids = whisper.generate(features, max_new_tokens=60, do_sample=False)
        for voice, text, heard in zip(voices, said, processor.batch_decode(ids, skip_special_tokens=True)):
            wanted = normalized(text).split()
            errors[voice["timbre"]] += torchaudio.functional.edit_distance(wanted, normalized(heard).split())
            words[voice["timbre"]] += len(wanted)
    rates = {name: errors[name] / words[name] for name in sorted(names, key=lambda name: errors[name] / words[name])}
    for name, rate in rates.items():
        print(f"{name:16}{rate:6.1%}  {synth.timbre_split(name, c.synth.held_out)}")
    result = {"command": "python tests/rank_voices.py " + " ".join(arguments), "words each": words[names[0]],
              "texts": texts, "rate": c.synth.rate, "pitch": c.synth.pitch, "word error rate": rates}
    synth.write_whole(ROOT / "results" / "voices.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    synth.run(main)
