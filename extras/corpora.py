"""Other people's files and data sets become a corpus that synth.py reads: one JSONL file.

A row's "text", "messages" [{"role", "content"}], "conversations" [{"from", "value"}] (as in ShareGPT's
exports), "lang" and the like are kept as they are. Rows in which synth.py finds no document are left out and
counted.

    from=                    rows of
    'chats/*.parquet'        Parquet files; also *.csv and *.tsv, whose first line names the columns
    share.json               JSON files, one array or a row in each line; also *.jsonl, *.json.gz, *.jsonl.gz
    hf:NAME:SPLIT            a data set of the hub, or a folder; hf:NAME is its split train, and one of many
                             configurations is hf:NAME:CONFIGURATION:SPLIT

    python extras/corpora.py 'from=chats/*.parquet' to=chats.jsonl
    python extras/corpora.py from=hf:allenai/c4:en:train to=c4.jsonl documents=100000
    python synth.py data=data/mine synth.corpus=chats.jsonl,c4.jsonl

Rows are streamed, so they need not fit into memory or on the disk; only a JSON array is held in memory.
All but JSON files needs the package datasets (pip install datasets). No code of a data set is run.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gc
import glob
import gzip
import json
import os
from collections.abc import Iterable, Iterator

from tqdm import tqdm

import synth
from synth import UserError

KEPT = ("text", "messages", "conversations", "system", "lang", "language", "spoken", "endless")
# The builder of the package datasets for each kind of table. It reads more than a hundred batches of Parquet
# ahead: small ones, or files would be held whole. "NA" and "null" are words, no missing values.
TABLES = {"parquet": ("parquet", {"batch_size": 100}),
          "csv": ("csv", {"keep_default_na": False}),
          "tsv": ("csv", {"keep_default_na": False, "delimiter": "\t"})}


def document_of(row: object) -> dict | None:
    """What of a row synth.py reads, as it stands there; None if that finds no document in it.

    >>> document_of({"text": "es ist rot.", "messages": [], "lang": "de", "url": "a.b"})
    {'text': 'es ist rot.', 'lang': 'de'}
    """
    try:
        document = synth.document_of(row)
    except (AttributeError, TypeError, ValueError):
        return None
    return {key: row[key] for key in KEPT if row.get(key)} if any(synth.texts_of(document)) else None


def json_rows(path: str) -> Iterator[object]:
    """The rows of one array, or of lines; an array is read whole.

    The package datasets does not serve here: where the items of an array have different keys, as the turns of
    ShareGPT's have, it gives them as JSON text.
    """
    opener = gzip.open if path.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        is_array = file.read(64).lstrip().startswith("[")
        file.seek(0)
        if is_array:
            yield from json.load(file)
        else:
            yield from (json.loads(line) for line in file if line.strip())


def open_source(source: str) -> Iterable[object]:
    """The rows of a file or a data set. UserError if its kind is not known."""
    kind = source.lower().removesuffix(".gz").rpartition(".")[2]
    if source.startswith("hf:"):
        _, name, *rest = source.split(":")
        *configuration, split = rest or ["train"]
        names = [name, *configuration]
        options = {"split": split}
    elif kind in ("json", "jsonl", "ndjson"):
        return json_rows(source)
    elif kind in TABLES:
        builder, options = TABLES[kind]
        names = [builder]
        options = options | {"data_files": source, "split": "train"}
    else:
        raise UserError(f"{source} is none of *.parquet, *.csv, *.tsv, *.json, *.jsonl; convert it, or name "
                        "*.txt files in synth.corpus as they are.")
    try:
        import datasets                # here: it may be missing
    except ModuleNotFoundError:
        raise UserError("All but JSON files needs the package datasets: pip install datasets.") from None
    return datasets.load_dataset(*names, streaming=True, **options)


def rows_of(source: str) -> Iterator[object]:
    """Stream the rows of a file or a data set. UserError says which one cannot be read."""
    number = 0
    try:
        for number, row in enumerate(open_source(source), 1):
            yield row
    # of a file cut short; of a data set that is a program; of wrong JSON, CSV or Parquet, and a wrong split
    except (EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{source}, row {number + 1}, cannot be read ({error}).") from None


def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments, **{"from": "", "to": "corpus.jsonl", "documents": 0})    # 0: all of them
    sources = [c["from"]]
    if not c["from"].startswith("hf:"):
        sources = sorted(glob.glob(c["from"], recursive=True))
    if not c.to.endswith((".jsonl", ".ndjson")) or c.to in sources:
        raise UserError(f"to={c.to} must end with .jsonl, and be another file than those of from=.")
    if not sources:
        raise UserError(f"from={c['from']!r} matches no file; give a glob such as 'chats/*.parquet', or "
                        "hf:NAME:SPLIT.")
    rows = (row for source in sources for row in rows_of(source))
    kept = 0
    left_out = 0
    aside = Path(f"{c.to}.part")                   # becomes `to` when it is whole
    with open(aside, "w", encoding="utf-8", errors="ignore") as file:          # ignored: lone surrogates
        for row in tqdm(rows, unit=" rows", disable=None):
            document = document_of(row)
            if document is None:
                left_out += 1
                continue
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
            kept += 1
            if kept == c.documents:
                break
    rows.close()
    gc.collect()                  # or Python may hang or abort at its end: Arrow's threads still read ahead
    if not kept:
        raise UserError(f"None of {left_out} rows of {c['from']} has text, messages or conversations; rename "
                        "the column that has them.")
    os.replace(aside, c.to)
    print(f"{kept} documents are written to {c.to}, {left_out} other rows are left out; use them with "
          f"synth.corpus={c.to}.")


if __name__ == "__main__":
    synth.run(main)
