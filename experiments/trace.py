"""One training sample on its way through the code: parts, ids, labels, shapes. The README shows this output.

    python experiments/trace.py [sample=interleaved-train-000000-000055] [key=value …]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch                                 # noqa: E402

import inserter                              # noqa: E402
import synth                                 # noqa: E402
from synth import Settings, UserError        # noqa: E402

DEFAULT = "interleaved-train-000000-000055"
WIDTH = 104                                  # columns of the ids


def find(c: Settings) -> tuple[Path, int]:
    """Shard and number of the sample c.sample. UserError if no shard has it."""
    recipe = c.sample.partition("-")[0]
    for path in sorted((Path(c.data) / recipe).glob("*.tar")):
        for number, row in enumerate(synth.read_index(path)["samples"]):
            if row[0] == c.sample:
                return path, number
    raise UserError(f"No shard in {c.data} has the sample {c.sample}; run synth.py first.")


def show_parts(sample: dict) -> None:
    for parts in synth.parts_of(sample):
        for part in parts:
            if part["role"] == "speech":
                about = f"{part['audio']}, {part['seconds']} s, {part['voice']}"
            else:
                about = f"loss: {part['loss']}"
            print(f"  {part['role']:<7} {part['text']!r}  ({about})")


def show_ids(encoded: inserter.Encoded, tok: inserter.Tokenizer) -> None:
    """Under each id its label, - for none; a clip's <|AUDIO|> in one column."""
    columns: list[list[str]] = []
    for i, label in zip(encoded.ids, encoded.labels):
        token = tok.decode([i]).strip() or "⏎"
        target = "-" if label == inserter.IGNORE else tok.decode([label]).strip() or "⏎"
        if columns and token == inserter.AUDIO and columns[-1][0].startswith(token):
            columns[-1][2] += 1
        else:
            columns.append([token, target, 1])
    cells = [(f"{token} x {times}" if times > 1 else token, target) for token, target, times in columns]
    lines = [["ids   ", "labels"]]
    for token, target in cells:
        width = max(len(token), len(target))
        if len(lines[-1][0]) + 1 + width > WIDTH:
            lines.append(["      ", "      "])
        lines[-1][0] += " " + token.ljust(width)
        lines[-1][1] += " " + target.ljust(width)
    for ids, labels in lines:
        print(f"  {ids.rstrip()}\n  {labels.rstrip()}")


def show_shapes(model: inserter.InSerter, encoded: inserter.Encoded) -> None:
    batch = inserter.collate([encoded], model.mels)
    mel = batch["mel"]
    frames = batch["frames"]
    encoder = model.audio_tower
    log_mels = [inserter.log_mel(torch.from_numpy(clip), model.mels) for clip in encoded.clips]
    pooled = encoder(mel, frames, recompute=False)
    hidden = model.hidden(batch["ids"], batch["lengths"], mel, frames)
    targets = sum(label != inserter.IGNORE for label in encoded.labels)
    logits = (targets, model.config.text_config.vocab_size)
    print(f"  waveforms                {[len(clip) for clip in encoded.clips]} samples at 16 kHz")
    print(f"  log-mel frames           {[tuple(x.shape) for x in log_mels]}   100 a second, two of context")
    print(f"  after both convolutions  {tuple(encoder.convolve(mel, frames).shape)}   50 a second")
    print(f"  encoder, pooled by 2     {tuple(pooled.shape)}   25 a second: one per <|AUDIO|>")
    print(f"  adapter                  {tuple(model.hear(mel, frames).shape)}")
    print(f"  LLM                      {tuple(hidden.shape)}   one per position")
    print(f"  logits                   {logits}   at the labelled positions only")


@torch.no_grad()
def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments, sample=DEFAULT)
    path, number = find(c)
    sample, files = synth.read_sample(path, number)
    tok = inserter.load_tokenizer(c)
    encoded = inserter.encode(sample, inserter.decoded(files), tok)
    print(f"{c.sample} in {path}")
    show_parts(sample)
    show_ids(encoded, tok)
    show_shapes(inserter.fresh_model(c, tok), encoded)


if __name__ == "__main__":
    synth.run(main)
