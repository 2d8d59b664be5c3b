"""Everyday English out of two Debian packages, as a corpus for an open-vocabulary run (docs/real-models.md).

    apt-get download fortunes dict-gcide; for p in *.deb; do dpkg -x $p packages; done
    python experiments/english_text.py packages FOLDER [other text.jsonl]

Writes fortunes.txt and gcide.txt (the GNU Collaborative International Dictionary of English): documents of
plain sentences, blank lines between, of words that occur at least OFTEN times in all this text, the other
one's included. Of the dictionary an even choice, about DOCUMENTS documents.
"""
import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

OFTEN = 40                                   # occurrences of the rarest word of a sentence
DOCUMENTS = 14000                            # of the dictionary
SKIPPED = ("ascii-art", "perl", "translate-me", "zippy")     # fortune files that are no plain English
PLAIN = re.compile(r"[A-Z][A-Za-z',;: -]*[.?!]")
WORD = re.compile(r"[a-z']+")


def fortunes(folder: Path) -> Iterator[str]:
    """Texts of the fortune files, without who said them."""
    for path in sorted((folder / "usr/share/games/fortunes").glob("*")):
        if path.suffix == "" and path.name not in SKIPPED:
            for text in path.read_text("utf-8", "replace").split("\n%\n"):
                yield re.sub(r"\s+-- .*", "", text, flags=re.S)


def definitions(folder: Path) -> Iterator[str]:
    """Definitions of the dictionary and the sentences that it quotes, without numbers, sources and marks."""
    path = folder / "usr/share/dictd/gcide.dict.dz"
    text = gzip.open(path, "rt", encoding="utf-8", errors="replace").read()
    noise = re.compile(r"\[[^]]*\]|\([^)]*\)|--\s?[A-Z][\w. ()]*|[{}\"]|^\s*(?:\d+\.|\([a-z]\))")
    for entry in re.split(r"\n\n(?=\S)", text):
        _, _, body = entry.partition("\n")
        for part in re.split(r"\n\s*\n", body):
            part = noise.sub(" ", part).strip()
            yield part[:1].upper() + part[1:]


def plain_sentences(text: str) -> list[str]:
    """The plain sentences of a text: letters, commas and the like, 4 to 30 words."""
    pieces = re.split(r"(?<=[.?!])\s+", " ".join(text.split()))
    return [piece for piece in pieces if PLAIN.fullmatch(piece) and 4 <= len(piece.split()) <= 30]


def count_words(texts: list[list[str]], others: list[str]) -> Counter:
    """How often each word occurs in the sentences, counted once a text, and in the other files' dialogues."""
    counts = Counter()
    for path in others:
        for line in Path(path).read_text("utf-8").splitlines():
            turns = json.loads(line)["messages"]
            counts.update(WORD.findall(" ".join(turn["content"] for turn in turns).lower()))
    for sentences in texts:
        for sentence in set(sentences):
            counts.update(WORD.findall(sentence.lower()))
    return counts


def documents_of(texts: list[list[str]], counts: Counter) -> list[str]:
    """Documents of sentences whose words are all frequent; one ends with its text, or past 60 words."""
    seen = set()
    documents = []
    for sentences in texts:
        document = []
        for number, sentence in enumerate(sentences, 1):
            is_known = all(counts[word] >= OFTEN for word in WORD.findall(sentence.lower()))
            if is_known and sentence not in seen:
                seen.add(sentence)
                document.append(sentence)
            if document and (number == len(sentences) or len(" ".join(document).split()) > 60):
                documents.append(" ".join(document))
                document = []
    return documents[::max(1, len(documents) // DOCUMENTS)]


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    packages, out, *others = sys.argv[1:]
    sources = {"fortunes": fortunes(Path(packages)), "gcide": definitions(Path(packages))}
    texts = {name: [plain_sentences(text) for text in source] for name, source in sources.items()}
    counts = count_words([sentences for source in texts.values() for sentences in source], others)
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, source in texts.items():
        documents = documents_of(source, counts)
        Path(out, f"{name}.txt").write_text("\n\n".join(documents) + "\n", "utf-8")
        words = sum(len(document.split()) for document in documents)
        print(f"{out}/{name}.txt: {len(documents):,} documents, {words:,} words")
    print(f"{sum(n >= OFTEN for n in counts.values()):,} different words")


if __name__ == "__main__":
    main()
