"""extras/preview.py: one page that needs nothing else, with every clip, token and loss flag."""
import base64
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import SMALL

sys.path.insert(0, str(Path(__file__).parents[1] / "extras"))
import preview                                                        # noqa: E402
import synth                                                          # noqa: E402
from inserter import AUDIO                                            # noqa: E402


@pytest.fixture
def folder(small_data, tmp_path, monkeypatch):
    """A copy of the small data folder, for a tokenizer will be trained in it; the page goes to tmp_path."""
    shutil.copytree(synth.load_config(small_data).data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def sample(folder: Path, recipe: str, number: int) -> tuple[dict, dict[str, bytes]]:
    return synth.read_sample(folder / recipe / "train-000000.tar", number)


def test_the_page_needs_nothing_else(folder, capsys):
    shutil.copytree(folder / "tasks", folder / "recordings")            # a folder that no recipe made
    preview.main(["10", f"data={folder}", *SMALL])
    assert capsys.readouterr().out == "preview.html is written; open it in a browser.\n"
    page = Path("preview.html").read_text("utf-8")
    assert "http" not in page
    assert "\\" not in page
    assert not re.search(r'src="(?!data:audio/flac;base64,)', page)
    recipes = ("interleaved", "tasks", "text", "chat", "recordings")
    wanted = [sample(folder, recipe, number) for number in (0, 1) for recipe in recipes]
    assert re.findall("<h2>(.*?)</h2>", page) == [shown["id"] for shown, _ in wanted]
    clips = [data for _, files in wanted for data in files.values()]
    assert len(clips) >= 4
    assert [base64.b64decode(data, validate=True) for data in re.findall('base64,([^"]*)', page)] == clips


def test_tokens_and_targets_are_shown(folder):
    """Of a speech task: what is heard, what is asked, what is to be answered."""
    preview.main(["2", f"data={folder}", *SMALL])
    page = Path("preview.html").read_text("utf-8")
    shown, files = sample(folder, "tasks", 0)
    section = page.split(f"<h2>{shown['id']}</h2>")[1].split("</section>")[0]
    tokens = re.findall(r'<code class="(loss)?">(.*?)</code>(?:× (\d+))?', section)
    samples = len(synth.decode_flac(files["00.flac"]))
    positions = ((-(-samples // 160) - 1) // 2 + 1) // 2
    heard = [words for _, words, _ in tokens[:3]]
    assert heard == ["&lt;|audio_bos|&gt;", "&lt;|AUDIO|&gt;", "&lt;|audio_eos|&gt;"]
    assert int(tokens[1][2]) == positions
    assert not any(loss for loss, _, _ in tokens[:4])
    targets = [words for loss, words, _ in tokens if loss]
    assert "".join(targets) == shown["parts"][2]["text"] + "&lt;|endoftext|&gt;"
    assert f"{len(tokens) - 1 + positions} positions, {len(targets)} targets" in section


def test_loss_of_parts_is_underlined_and_noise_is_named(folder):
    preview.main(["40", f"data={folder}", *SMALL])
    page = Path("preview.html").read_text("utf-8")
    for number in range(10):
        for recipe in ("interleaved", "tasks", "text", "chat"):
            shown, _ = sample(folder, recipe, number)
            section = page.split(f"<h2>{shown['id']}</h2>")[1].split("<details>")[0].replace("&#34;", '"')
            for part in (part for parts in synth.parts_of(shown) for part in parts):
                if part["role"] == "speech":
                    noise = f", {part['noise']}" if "noise" in part else ""
                    assert f"<small>{part['voice']}, {part['seconds']} s{noise}</small>" in section
                else:
                    text = part["text"].replace("<", "&lt;").replace(">", "&gt;")
                    assert f'<span class="{"loss" if part["loss"] else "text"}">{text}</span>' in section
    assert re.search(r" s, (babble|coloured) \d+ dB</small>", page)


class Bytes:
    """A tokenizer whose tokens are bytes; 256 is <|AUDIO|>."""

    def decode(self, ids: list[int]) -> str:
        return AUDIO if ids == [256] else bytes(ids).decode("utf-8", "replace")


def test_pieces_of_a_character_are_shown_together():
    ids = [97, *"球".encode(), 256, 256, 98]
    labels = [*ids[1:4], preview.IGNORE, preview.IGNORE, 98, preview.IGNORE]
    encoded = preview.Encoded("", ids, labels, [], [])
    tokens = preview.tokens_of(encoded, Bytes())
    assert tokens == [["a", False, 1], ["球", True, 1], [AUDIO, False, 2], ["b", True, 1]]


def test_without_shards_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(synth.UserError, match="no shards in data to preview; run synth.py first"):
        preview.main(["8"])
