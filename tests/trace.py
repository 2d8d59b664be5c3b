"""One training sample on its way through the code: parts, ids, labels, shapes. The README's trace is this output.

    python tests/trace.py [sample=interleaved-train-000001] [key=value …]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import inserter
import synth


def main(arguments: list[str]) -> None:
    wanted = next((a.removeprefix("sample=") for a in arguments if a.startswith("sample=")), "interleaved-train-000001")
    c = synth.load_config([a for a in arguments if not a.startswith("sample=")])
    recipe, split, _ = wanted.split("-")
    path, number = next((path, i) for path in sorted((Path(c.data) / recipe).glob(f"{split}-*.tar"))
                        for i, row in enumerate(synth.read_index(path)["samples"]) if row[0] == wanted)
    sample, files = synth.read_sample(path, number)
    tok = inserter.load_tokenizer(c)
    encoded = inserter.encode(sample, {name: synth.decode_flac(data) for name, data in files.items()}, tok)
    print(f"{wanted} in {path}")
    for parts in synth.parts_of(sample):
        for part in parts:
            extra = f"{part['audio']}, {part['seconds']} s, {part['voice']}" if part["role"] == "speech" else f"loss: {part['loss']}"
            print(f"  {part['role']:<7} {part['text']!r}  ({extra})")
    print(f"\n{'position':>8}  {'id':>5}  {'token':<18} label (the next token, where it carries loss)")
    skipped = 0
    for t, (i, label) in enumerate(zip(encoded.ids, encoded.labels)):
        audio = tok.special[inserter.AUDIO]
        if i == audio and t > 0 and encoded.ids[t - 1] == audio and encoded.ids[t + 1] == audio:
            skipped += 1
            continue
        if skipped:
            print(f"{'…':>8}  {audio:>5}  {skipped} more <|AUDIO|>")
            skipped = 0
        print(f"{t:>8}  {i:>5}  {tok.decode([i])!r:<18} {'-' if label < 0 else f'{label} {tok.decode([label])!r}'}")
    model = inserter.fresh_model(c, tok)
    tower, clips = model.audio_tower, [torch.from_numpy(clip) for clip in encoded.clips]
    samples = [len(clip) for clip in clips]
    mel = inserter.log_mel(clips, c.model.mels)
    ids = torch.tensor(encoded.ids)
    bounds, places = torch.tensor([0, len(ids)], dtype=torch.int32), torch.arange(len(ids))
    print("\nshapes, all clips of the sample end to end")
    print(f"  waveforms                 {samples} samples at 16 kHz")
    print(f"  log-mel frames            {tuple(mel.shape)}   100 a second, two more per clip as context")
    print(f"  after both convolutions   {tuple(tower.convolutions(mel, samples).shape)}   50 a second")
    print(f"  encoder, pooled by 2      {tuple(tower(clips, False).shape)}   25 a second: one per <|AUDIO|>")
    print(f"  adapter                   {tuple(model.hear(clips).shape)}")
    print(f"  LLM hidden states         {tuple(model.hidden(ids, places, bounds, clips).shape)}   one per position")
    print(f"  logits                    ({sum(label >= 0 for label in encoded.labels)}, {c.model.vocab})   at the labelled positions only")


if __name__ == "__main__":
    synth.run(main)
