"""One training sample on its way through the code: parts, ids, labels, shapes. The README shows this output.

    python tests/trace.py [sample=interleaved-train-000055] [key=value …]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch                                 # noqa: E402

import inserter                              # noqa: E402
import synth                                 # noqa: E402
from synth import Settings                   # noqa: E402

DEFAULT = "interleaved-train-000055"
WIDTH = 104                                  # columns of the ids


def find(c: Settings, wanted: str) -> tuple[Path, int]:
    """Shard and number of a sample, by its id. UserError if no shard has it."""
    recipe, split, _ = wanted.split("-")
    for path in sorted((Path(c.data) / recipe).glob(f"{split}-*.tar")):
        for number, row in enumerate(synth.read_index(path)["samples"]):
            if row[0] == wanted:
                return path, number
    raise synth.UserError(f"No shard in {c.data} has the sample {wanted}; run synth.py first.")


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
    encoder = model.audio_tower
    clips = [torch.from_numpy(clip) for clip in encoded.clips]
    samples = [len(clip) for clip in clips]
    mel = inserter.log_mel(clips, encoder.config.num_mel_bins)
    ids = torch.tensor(encoded.ids)
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    pooled = encoder(clips, False)
    hidden = model.hidden(ids, torch.arange(len(ids)), bounds, clips)
    targets = sum(label != inserter.IGNORE for label in encoded.labels)
    logits = (targets, model.config.text_config.vocab_size)
    print(f"  waveforms                {samples} samples at 16 kHz")
    print(f"  log-mel frames           {tuple(mel.shape)}   100 a second, two more per clip as context")
    print(f"  after both convolutions  {tuple(encoder.convolutions(mel, samples).shape)}   50 a second")
    print(f"  encoder, pooled by 2     {tuple(pooled.shape)}   25 a second: one per <|AUDIO|>")
    print(f"  adapter                  {tuple(model.hear(clips).shape)}")
    print(f"  LLM                      {tuple(hidden.shape)}   one per position")
    print(f"  logits                   {logits}   at the labelled positions only")


def main(arguments: list[str]) -> None:
    named = [argument for argument in arguments if argument.startswith("sample=")]
    c = synth.load_config([argument for argument in arguments if argument not in named])
    wanted = named[0].removeprefix("sample=") if named else DEFAULT
    path, number = find(c, wanted)
    sample, files = synth.read_sample(path, number)
    tok = inserter.load_tokenizer(c)
    encoded = inserter.encode(sample, {name: synth.decode_flac(data) for name, data in files.items()}, tok)
    print(f"{wanted} in {path}")
    show_parts(sample)
    show_ids(encoded, tok)
    show_shapes(inserter.fresh_model(c, tok), encoded)


if __name__ == "__main__":
    synth.run(main)
