"""Samples to hear and see: clips in place, what carries loss, and every token with its loss flag.

    python extras/preview.py 8                   preview.html: 8 samples, of the recipes in data/ in turn
    python extras/preview.py 20 data=data/mine   of another data folder; add profile=… for its tokenizer

The page needs nothing but a browser; assets/preview.html is its template.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import base64

import jinja2

import inserter
import synth
from inserter import IGNORE, Encoded, Tokenizer
from synth import Settings, UserError

TEMPLATE = Path(inserter.__file__).with_name("assets") / "preview.html"


def first_shards(c: Settings) -> list[Path]:
    """The first training shard of each recipe, in the order of synth.RECIPES; then those of other folders."""
    folders = {path.parent.name for path in Path(c.data).glob("*/train-*.tar")}
    names = [name for name in synth.RECIPES if name in folders]
    names += sorted(folders - set(names))
    return [min((Path(c.data) / name).glob("train-*.tar")) for name in names]


def tokens_of(encoded: Encoded, tok: Tokenizer) -> list[list]:
    """The tokens as [text, is it a target, how many times].

    A clip's positions are one entry, and so are the tokens that only together make a character.
    """
    tokens: list[list] = []
    waiting: list[int] = []
    for i, label in zip(encoded.ids, [IGNORE, *encoded.labels]):        # labels stand one position ahead
        waiting.append(i)
        text = tok.decode(waiting)
        if "\ufffd" in text and len(waiting) < 4:           # a character has four bytes at most
            continue
        waiting.clear()
        if tokens and text == tokens[-1][0] == inserter.AUDIO:
            tokens[-1][2] += 1
        else:
            tokens.append([text, label != IGNORE, 1])
    return tokens


def shown(sample: dict, files: dict[str, bytes], tok: Tokenizer) -> dict:
    """What the page shows of a sample."""
    roles = [message["role"] for message in sample["messages"] or []] or [""]
    encoded = inserter.encode(sample, inserter.decoded(files), tok)
    return {
        "id": sample["id"],
        "turns": list(zip(roles, synth.parts_of(sample))),
        "audio": {name: base64.b64encode(data).decode() for name, data in files.items()},
        "tokens": tokens_of(encoded, tok),
        "positions": len(encoded.ids),
        "targets": sum(label != IGNORE for label in encoded.labels)}


def main(arguments: list[str]) -> None:
    arguments = [f"samples={argument}" if argument.isdigit() else argument for argument in arguments]
    c = synth.load_config(arguments, samples=8)
    shards = first_shards(c)
    if not shards:
        raise UserError(f"There are no shards in {c.data} to preview; run synth.py first.")
    tok = inserter.load_tokenizer(c)
    samples = []
    for i in range(c.samples):
        number, place = divmod(i, len(shards))
        if number < synth.read_index(shards[place])["count"]:
            samples.append(shown(*synth.read_sample(shards[place], number), tok))
    page = jinja2.Template(TEMPLATE.read_text("utf-8"), autoescape=True).render(samples=samples)
    synth.write_whole(Path("preview.html"), page.encode())
    print("preview.html is written; open it in a browser.")


if __name__ == "__main__":
    synth.run(main)
