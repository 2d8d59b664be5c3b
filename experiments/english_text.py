"""Everyday English out of two Debian packages, as a corpus for an open-vocabulary run (docs/real-models.md).

    apt-get download fortunes dict-gcide; for p in *.deb; do dpkg -x $p packages; done
    python tests/english_text.py packages FOLDER [other text.jsonl]

Writes fortunes.txt and gcide.txt (the GNU Collaborative International Dictionary of English): documents of plain
sentences, blank lines between, of words that occur at least OFTEN times in all this text, the other one's included. Of
the dictionary an even choice, about DOCUMENTS documents.
"""
import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

OFTEN = 40                                              # occurrences of the rarest word of a sentence
DOCUMENTS = 14000                                       # of the dictionary
PLAIN = re.compile(r"[A-Z][A-Za-z',;: -]*[.?!]")
WORD = re.compile(r"[a-z']+")


def fortunes(folder):
    """Texts of the fortune files, without who said them."""
    for path in sorted((folder / "usr/share/games/fortunes").glob("*")):
        if path.suffix == "" and path.name not in ("ascii-art", "perl", "translate-me", "zippy"):
            for text in path.read_text("utf-8", "replace").split("\n%\n"):
                yield re.sub(r"\s+-- .*", "", text, flags=re.S)


def definitions(folder):
    """Definitions of the dictionary and the sentences that it quotes, without numbers, sources and marks."""
    text = gzip.open(folder / "usr/share/dictd/gcide.dict.dz", "rt", encoding="utf-8", errors="replace").read()
    for entry in re.split(r"\n\n(?=\S)", text):
        entry = entry.partition("\n")[2]
        for part in re.split(r"\n\s*\n", entry):
            part = re.sub(r"\[[^]]*\]|\([^)]*\)|--\s?[A-Z][\w. ()]*|[{}\"]|^\s*(?:\d+\.|\([a-z]\))", " ", part)
            yield part.strip()[:1].upper() + part.strip()[1:]


def sentences(text):
    """The plain sentences of a text: letters, commas and the like, 4 to 30 words."""
    pieces = re.split(r"(?<=[.?!])\s+", " ".join(text.split()))
    return [s for s in pieces if PLAIN.fullmatch(s) and 4 <= len(s.split()) <= 30]


def main(folder, out, *others):
    """Both files, of sentences whose words are all frequent; a document ends where it has passed 60 words."""
    sources = {"fortunes": [sentences(t) for t in fortunes(Path(folder))],
               "gcide": [sentences(t) for t in definitions(Path(folder))]}
    counts = Counter()
    for path in others:
        for line in open(path, encoding="utf-8"):
            row = json.loads(line)
            counts.update(WORD.findall(" ".join(m["content"] for m in row["messages"]).lower()))
    for texts in sources.values():
        counts.update(w for text in texts for s in set(text) for w in WORD.findall(s.lower()))
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, texts in sources.items():
        seen, documents = set(), []
        for text in texts:
            document = []
            for s in text:
                if s not in seen and all(counts[w] >= OFTEN for w in WORD.findall(s.lower())):
                    seen.add(s)
                    document.append(s)
                if document and (s is text[-1] or len(" ".join(document).split()) > 60):
                    documents.append(" ".join(document))
                    document = []
        documents = documents[::max(1, len(documents) // DOCUMENTS)]
        Path(out, f"{name}.txt").write_text("\n\n".join(documents) + "\n", "utf-8")
        print(f"{out}/{name}.txt: {len(documents):,} documents, {sum(len(d.split()) for d in documents):,} words")
    print(f"{sum(n >= OFTEN for n in counts.values()):,} different words")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
