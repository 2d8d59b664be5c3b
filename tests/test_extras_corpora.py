"""extras/corpora.py: other people's files and data sets as a corpus."""
import doctest
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets")
import pyarrow                                                        # noqa: E402
from pyarrow import parquet                                           # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "extras"))
import corpora                                                        # noqa: E402
import synth                                                          # noqa: E402
from synth import UserError                                           # noqa: E402

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "is it red"},
            {"role": "assistant", "content": "yes."}]
SHARED = [{"from": "human", "value": "is it blue"}, {"from": "gpt", "value": "no."}]
TURNS = [{"role": "user", "content": "is it blue"}, {"role": "assistant", "content": "no."}]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder that one works in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def converted(source: str, *more: str) -> list[dict]:
    """What is written for a source."""
    corpora.main([f"from={source}", "to=out.jsonl", *more])
    return [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]


def test_examples_in_docstrings_hold():
    assert doctest.testmod(corpora) == (0, 1)


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, document", [
    ({"text": "it is red.", "messages": None, "url": "a"}, {"text": "it is red."}),
    ({"text": "it is red.", "messages": []}, {"text": "it is red."}),
    ({"text": "es ist rot.", "lang": "de"}, {"text": "es ist rot.", "lang": "de"}),
    ({"text": "it is red.", "lang": None}, {"text": "it is red."}),
    ({"text": None, "messages": MESSAGES}, {"messages": MESSAGES}),
    ({"text": "### is it red", "conversations": SHARED, "lang": "en"},
     {"text": "### is it red", "conversations": SHARED, "lang": "en"}),
    ({"messages": None, "conversations": SHARED}, {"conversations": SHARED}),
    *((row, None) for row in (
        {}, {"body": "it is red."}, {"text": ""}, {"text": " \n"}, {"text": 5}, {"text": None},
        "it is red.", None, [1], {"messages": "is it red"}, {"messages": [None]}, {"messages": ["is it red"]},
        {"messages": [{"role": "tool", "content": "7"}]},
        {"messages": [*MESSAGES, {"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"conversations": [{"from": "bing", "value": "a"}]}, {"conversations": [{"value": "a"}]},
        {"text": "it is red.", "conversations": [{"from": "human"}]}))])
def test_documents_of_rows(row, document):
    assert corpora.document_of(row) == document


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

def test_parquet_with_text_messages_or_conversations(folder, capsys):
    parquet.write_table(pyarrow.table({"messages": [MESSAGES], "score": [3]}), folder / "a.parquet")
    parquet.write_table(pyarrow.table({"conversations": [SHARED, []], "id": [1, 2]}), folder / "b.parquet")
    texts = {"text": ["it is red.", None, "it is blue."], "lang": ["en", "en", None]}
    parquet.write_table(pyarrow.table(texts), folder / "c.parquet")
    wanted = [{"messages": MESSAGES}, {"messages": TURNS}, {"text": "it is red.", "lang": "en"},
              {"text": "it is blue."}]
    assert converted("*.parquet") == [wanted[0], {"conversations": SHARED}, *wanted[2:]]
    assert capsys.readouterr().out == ("4 documents are written to out.jsonl, 2 other rows are left out; use "
                                       "them with synth.corpus=out.jsonl.\n")
    assert list(synth.read_documents("out.jsonl", Counter())) == wanted
    assert not list(folder.glob("*.part"))


def test_an_export_is_an_array_whose_turns_differ(folder):
    rows = [{"id": "a", "conversations": [SHARED[0], {**SHARED[1], "markdown": None}]},
            {"id": 7, "text": "球\ud83d"},             # half a surrogate pair is no character
            {"id": "c", "conversations": []}]
    (folder / "share.json").write_text("\ufeff\n " + json.dumps(rows, indent=2), encoding="utf-8")
    assert converted("share.json") == [{"conversations": rows[0]["conversations"]}, {"text": "球"}]
    assert next(synth.read_documents("out.jsonl", Counter())) == {"messages": TURNS}


def test_lines_plain_and_compressed(folder):
    rows = [{"text": "it is red."}, {"messages": MESSAGES}, {"text": 5}]
    write_lines(folder / "a.jsonl", rows)
    (folder / "b.json.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes() + b"\n \n"))
    assert converted("[ab].*") == [{"text": "it is red."}, {"messages": MESSAGES}] * 2


def test_tables(folder):
    (folder / "a.csv").write_text('text,lang\n"it, is ""red"".",en\nNA,en\n12,\n', "utf-8")
    (folder / "b.tsv").write_text("id\ttext\n1\tdie Tür, rot\n2\t\n", "utf-8")
    assert converted("*.?sv") == [{"text": 'it, is "red".', "lang": "en"}, {"text": "NA", "lang": "en"},
                                  {"text": "12"}, {"text": "die Tür, rot"}]


def test_a_data_set_by_split_and_configuration(folder):
    """A folder stands for the hub."""
    data = folder / "words"
    (data / "other").mkdir(parents=True)
    write_lines(data / "train.jsonl", [{"text": "the ball is red."}] * 3)
    write_lines(data / "test.jsonl", [{"text": "the ball is blue."}])
    write_lines(data / "other/train.jsonl", [{"text": "the ball is grey."}])
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "  - {split: test, path: test.jsonl}\n- config_name: other\n  data_files: other/train.jsonl\n---\n")
    assert converted("hf:words") == converted("hf:words:train") == [{"text": "the ball is red."}] * 3
    assert converted("hf:words:test") == [{"text": "the ball is blue."}]
    assert converted("hf:words:other:train") == [{"text": "the ball is grey."}]
    with pytest.raises(UserError, match="Bad split: dev. Available splits: .*train.*test"):
        converted("hf:words:dev")
    with pytest.raises(FileNotFoundError, match="nothing"):
        converted(f"hf:{folder}/nothing")
    (data / "words.py").write_text("raise SystemExit('ran')")          # as old data sets have it
    with pytest.raises(UserError, match="hf:words, row 1, .*Dataset scripts are no longer supported"):
        converted("hf:words")


# --------------------------------------------------------------------------------------------------
# Large and wrong sources
# --------------------------------------------------------------------------------------------------

LARGE = """
import sys
import pyarrow
sys.path.insert(0, sys.argv[1])
import corpora
corpora.main(["from=large.parquet", "to=large.jsonl"])
print(pyarrow.default_memory_pool().max_memory())
"""


def test_rows_are_streamed(folder):
    """A file with 100 MB of text never takes all of that; in a process of its own, for Arrow counts it."""
    texts = [f"{number} " + f"the ball {number} is in the old garden. " * 27 for number in range(100_000)]
    parquet.write_table(pyarrow.table({"text": texts}), folder / "large.parquet", row_group_size=10_000)
    done = subprocess.run([sys.executable, "-c", LARGE, Path(corpora.__file__).parent], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("100000 documents are written to large.jsonl, 0 other rows")
    assert (folder / "large.jsonl").stat().st_size > 100_000_000
    assert int(done.stdout.splitlines()[-1]) < 75_000_000


def test_as_many_documents_as_wanted(folder):
    """The program also ends well while Arrow still reads ahead."""
    texts = {"text": [None, *(f"{number} the ball is red." for number in range(100_000))]}
    parquet.write_table(pyarrow.table(texts), folder / "a.parquet", row_group_size=5000)
    done = subprocess.run([sys.executable, corpora.__file__, "from=a.parquet", "documents=7"],
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("7 documents are written to corpus.jsonl, 1 other rows")
    assert [document["text"][0] for document in synth.read_documents("corpus.jsonl", Counter())] == list("0123456")


@pytest.mark.parametrize("name, content, sentence", [
    ("a.parquet", b"PAR1 no", "a.parquet, row 1, cannot be read"),
    ("a.jsonl", b'{"text": "a"}\n{"text":', "a.jsonl, row 2, cannot be read"),
    ("a.json", b'[{"text": "a"}, {', "a.json, row 1, cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], "a.jsonl.gz, row 1, cannot be read"),
    ("a.jsonl", b'{"text": "\xff"}', "a.jsonl, row 1, cannot be read"),
    ("a.csv", b'text,lang\na,b,c,d\ne,f\n"', "a.csv, row 1, cannot be read"),
    ("a.jsonl", b'{"body": "a"}\n' * 3, "None of 3 rows of a.* has text, messages or conversations"),
    ("a.txt", b"it is red.", "a.txt is none of .* in synth.corpus as they are"),
    ("b.txt", b"it is red.", "matches no file; give a glob such as 'chats/")])
def test_what_cannot_be_read_is_named(folder, name, content, sentence):
    (folder / name).write_bytes(content)
    write_lines(folder / "out.jsonl", [{"text": "of a run before"}])
    with pytest.raises(UserError, match=sentence):
        converted("a.*")
    assert list(synth.read_documents("out.jsonl", Counter())) == [{"text": "of a run before"}]


def test_without_the_package_json_files_are_read(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    write_lines(folder / "a.jsonl", [{"text": "it is red."}])
    assert converted("a.jsonl") == [{"text": "it is red."}]
    (folder / "a.csv").write_text("text\nit is red.\n")
    with pytest.raises(UserError, match="needs the package datasets: pip install datasets"):
        converted("a.csv")
