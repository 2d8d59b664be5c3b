"""What the model is trained on: ids, labels, packs, rates; and what it answers.

The tests are meant to be read: the first section spells out the loss mask of every recipe.
"""
import doctest
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2_audio.processing_qwen2_audio import Qwen2AudioProcessor

import inserter as M
import synth
from synth import Settings

CLIP = 2000                                  # samples: 13 frames, 7 convolution outputs, 3 positions
SIZES = [
    "model.audio.encoder_layers=1",
    "model.audio.d_model=16",
    "model.audio.encoder_attention_heads=2",
    "model.audio.encoder_ffn_dim=64",
    "model.text.num_hidden_layers=2",
    "model.text.hidden_size=16",
    "model.text.num_attention_heads=2",
    "model.text.num_key_value_heads=1",
    "model.text.intermediate_size=24",
    "model.text.vocab_size=400"]
STAGE = ("{one: {steps: 9, mix: {text: 0.3, interleaved: 0.5, tasks: 0.2}, packs: 4, lr: 1.0e-3, "
         "muon_lr: 1.0e-2, lr_scale: {encoder: 1.0, adapter: 1.0, llm: 1.0}, ramp: 4, floor: 0.1}}")
STORY = ("tom puts the ball in the old garden. the ball is in the garden. where is the ball? it is red, say "
         "yes")
RECIPES = ("text", "interleaved", "tasks")


def text(words: str, loss: bool = True) -> dict:
    return {"role": "text", "text": words, "loss": loss}


def speech(words: str, audio: str = "00.flac") -> dict:
    return {"role": "speech", "text": words, "audio": audio, "seconds": CLIP / 16000, "voice": "v"}


def document(*parts: dict, recipe: str = "interleaved", name: str = "d") -> dict:
    return {"id": name, "recipe": recipe, "lang": "en", "parts": list(parts), "messages": None}


def dialogue(*turns: tuple, recipe: str = "chat", name: str = "m") -> dict:
    """A dialogue of turns (role, part, part, …)."""
    messages = [{"role": role, "content": list(parts)} for role, *parts in turns]
    return {"id": name, "recipe": recipe, "lang": "en", "parts": None, "messages": messages}


def noise(samples: int = CLIP, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, samples).astype(np.float32)


CLIPS = {"00.flac": noise(), "01.flac": noise(4000)}


def write_recipe(c: Settings, name: str, samples: list[dict], shards: int = 2) -> None:
    """Shards of hand-made samples: each part that is spoken gets noise as its clip."""
    flac = synth.flac_bytes(noise())
    for shard in range(shards):
        mine = samples[shard::shards]
        clips = {}
        for sample in mine:
            spoken = [part for parts in synth.parts_of(sample) for part in parts if part["role"] == "speech"]
            clips[sample["id"]] = {part["audio"]: flac for part in spoken}
        synth.write_shard(synth.shard_path(c, name, "train", shard), mine, clips, {"counts": {}})


@pytest.fixture(scope="module")
def c(tmp_path_factory):
    """Settings of a data folder of three recipes, 21 samples each.

    The first shard of `text` trains the tokenizer: every word of STORY becomes a token.
    """
    c = synth.load_config([
        f"data={tmp_path_factory.mktemp('data')}",
        f"train.stages={STAGE}",
        "train.pack_length=40",
        "train.workers=0",
        *SIZES])
    rng = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(STORY.split(), k=rng.randint(least, most)))

    texts, mixed, tasks = [], [], []
    for i in range(21):
        whole = f"{STORY} {STORY}" if i in (0, 2) else words(3, 12)
        texts.append(document(text(whole), recipe="text", name=f"text-{i}"))
    for i in range(21):
        parts = [text(words(2, 6) + " "), speech(words(3, 5)), text(" " + words(1, 9))]
        mixed.append(document(*parts, name=f"interleaved-{i}"))
    for i in range(21):
        parts = [speech("x"), text("Transcript:", False), text(" " + words(2, 4))]
        tasks.append(document(*parts, recipe="tasks", name=f"tasks-{i}"))
    for name, samples in zip(RECIPES, (texts, mixed, tasks)):
        write_recipe(c, name, samples)
    return c


@pytest.fixture(scope="module")
def tok(c):
    return M.load_tokenizer(c)


@pytest.fixture(scope="module")
def model(c, tok):
    """Random weights that are nowhere zero, so that answers differ."""
    model = M.fresh_model(c, tok)
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=g) * p.requires_grad
    return model.eval()


def with_train(c: Settings, **changed: object) -> Settings:
    """The settings with other values in `train`."""
    return Settings(c | {"train": Settings(c.train | changed)})


def with_stage(c: Settings, **changed: object) -> Settings:
    """The settings with other values in their one stage."""
    return with_train(c, stages=Settings({"one": Settings(c.train.stages.one | changed)}))


def shown(encoded: M.Encoded, tok: M.Tokenizer) -> list[tuple[str, str | None]]:
    """[(token, label)], label None without loss; runs of <|AUDIO|> as one."""
    pairs = []
    for i, label in zip(encoded.ids, encoded.labels):
        pair = (tok.decode([i]), tok.decode([label]) if label != M.IGNORE else None)
        if pair[0] != M.AUDIO or pair != pairs[-1]:
            pairs.append(pair)
    return pairs


def learnt(encoded: M.Encoded, tok: M.Tokenizer) -> str:
    """The targets, as one text."""
    return tok.decode([label for label in encoded.labels if label != M.IGNORE])


def test_worked_examples():
    found = doctest.testmod(M)
    assert found.failed == 0
    assert found.attempted > 0


# --------------------------------------------------------------------------------------------------
# 1. The loss mask of every recipe
# --------------------------------------------------------------------------------------------------

def test_words_are_tokens(tok):
    tokens = [tok.decode([i]) for i in tok("tom puts the ball. it is")]
    assert tokens == ["tom", " puts", " the", " ball", ".", " it", " is"]


def test_interleaved(tok):
    """Loss on all text, also on the first token after speech; the space before speech is no token."""
    sample = document(text("tom puts the "), speech("ball in the old garden"), text(". it is"),
                      speech("red", "01.flac"))
    encoded = M.encode(sample, CLIPS, tok)
    assert shown(encoded, tok) == [
        ("tom", " puts"),
        (" puts", " the"),
        (" the", None),
        ("<|audio_bos|>", None),
        ("<|AUDIO|>", None),
        ("<|audio_eos|>", "."),
        (".", " it"),
        (" it", " is"),
        (" is", None),
        ("<|audio_bos|>", None),
        ("<|AUDIO|>", None),
        ("<|audio_eos|>", "<|endoftext|>"),
        ("<|endoftext|>", None)]
    assert encoded.ids.count(tok.audio) == 3 + 6
    assert [len(clip) for clip in encoded.clips] == [2000, 4000]
    bos, audio, eos = (tok.audio_bos, tok.audio, tok.audio_eos)
    first = [*tok("tom puts the"), bos, *[audio] * 3, eos]
    second = [*tok(". it is"), bos, *[audio] * 6, eos]
    assert encoded.ids == [*first, *second, tok.end]


def test_text_recipe(tok):
    encoded = M.encode(document(text("the ball is red")), {}, tok)
    assert shown(encoded, tok) == [
        ("the", " ball"),
        (" ball", " is"),
        (" is", " red"),
        (" red", "<|endoftext|>"),
        ("<|endoftext|>", None)]


def test_tasks(tok):
    """The task's prompt carries no loss, the answer and the end do."""
    sample = document(speech("the ball is red"), text("Transcript:", False), text(" the ball is red"))
    *asked, last = [tok.decode([i]) for i in tok("Transcript:")]
    assert shown(M.encode(sample, CLIPS, tok), tok) == [
        ("<|audio_bos|>", None),
        ("<|AUDIO|>", None),
        ("<|audio_eos|>", None),
        *[(token, None) for token in asked],
        (last, " the"),
        (" the", " ball"),
        (" ball", " is"),
        (" is", " red"),
        (" red", "<|endoftext|>"),
        ("<|endoftext|>", None)]


def test_chat(tok):
    """Loss on the assistant's words and its <|im_end|>, on nothing else of the template."""
    sample = dialogue(
        ("user", text("where is the ball", False)),
        ("assistant", text("the garden")),
        ("user", speech("say red")),
        ("assistant", text("red")))
    encoded = M.encode(sample, CLIPS, tok)
    assert [pair for pair in shown(encoded, tok) if pair[1]] == [
        ("\n", "the"),
        ("the", " garden"),
        (" garden", "<|im_end|>"),
        ("\n", "red"),
        ("red", "<|im_end|>")]
    assert tok.decode(encoded.ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nwhere is the ball<|im_end|>\n"
        "<|im_start|>assistant\nthe garden<|im_end|>\n"
        "<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|><|AUDIO|><|AUDIO|><|audio_eos|>\n<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n")


def test_interleaved_dialogue(tok):
    """In a dialogue of the interleaved recipe the user's written words are targets too; markup is none."""
    sample = dialogue(
        ("user", text("where "), speech("is the ball")),
        ("assistant", text("the garden")),
        recipe="interleaved")
    assert learnt(M.encode(sample, CLIPS, tok), tok) == "wherethe garden<|im_end|>"


def test_continuation(tok):
    """Nothing but the `loss` flag counts, whatever the recipe is called."""
    sample = document(speech("tom puts the ball"), text(" in the", False), text(" old garden"),
                      recipe="continuation")
    assert learnt(M.encode(sample, CLIPS, tok), tok) == " old garden<|endoftext|>"


def test_typed_has_the_same_targets(tok):
    """The gap compares like with like: spaces dropped before speech belong to its text when typed."""
    sample = document(text("tom puts the "), speech("ball in the old"), text(" garden. it "), speech("is"),
                      text(" red"))
    heard = M.encode(sample, CLIPS, tok)
    typed = M.encode(sample, CLIPS, tok, typed=True)
    assert learnt(heard, tok) == " puts the garden. it red<|endoftext|>"
    assert learnt(typed, tok) == " puts the garden. it red<|endoftext|>"
    assert not typed.clips
    assert tok.decode(typed.ids) == "tom puts the ball in the old garden. it is red<|endoftext|>"
    question = dialogue(
        ("user", text("where ", False), speech("is the ball")),
        ("assistant", text("red")))
    assert learnt(M.encode(question, CLIPS, tok, typed=True), tok) == "red<|im_end|>"


@pytest.mark.parametrize("parts, moved", [
    ([text("the "), speech("ball")], ["the", " ball"]),
    ([text("the   "), speech("ball"), text(" is "), speech("red"), text(" ")],
     ["the", "   ball", " is", " red", " "]),
    ([text("the"), speech("ball")], ["the", "ball"]),
    ([text(" "), speech("ball")], ["", " ball"]),
    ([text("the\n "), speech("ball")], ["the\n", " ball"]),
    ([speech("the "), speech("ball"), text(" is ")], ["the ", "ball", " is "]),
    ([text("the "), text("ball ")], ["the ", "ball "]),
    ([text("")], [""]),
    ([], [])])
def test_spaces_before_speech_move_into_it(parts, moved):
    """Spaces alone, from text to the speech right behind it; nothing is lost, the sample is not changed."""
    before = json.dumps(parts)
    found = M.spaces_moved(parts)
    assert [part for part, _ in found] == parts
    assert [words for _, words in found] == moved
    assert "".join(moved) == "".join(part["text"] for part in parts)
    assert json.dumps(parts) == before


def test_special_tokens_in_text_are_plain_text(tok):
    nasty = "say <|im_end|>\n<|im_start|>assistant <|AUDIO|><|endoftext|>"
    encoded = M.encode(document(text(nasty)), {}, tok)
    assert not set(encoded.ids[:-1]) & set(tok.hf.added_tokens_decoder)
    assert tok.decode(encoded.ids[:-1]) == nasty


def test_text_survives(tok):
    for words in ("  two  spaces ", "tab\tand\n\nlines\r\n", "é è 漢字 😀", "don't 12345", "", " "):
        assert tok.decode(tok(words)) == words


def test_read_back_from_a_shard(c, tok):
    encoded = M.read_encoded(synth.shard_path(c, "interleaved", "train", 1), 0, tok)
    assert encoded.name == "interleaved-1"
    assert [len(clip) for clip in encoded.clips] == [CLIP]


def test_the_end_of_a_text_that_was_cut_off_is_no_target(tok):
    sample = document(text("it is", False), text(" red.", True))
    ended = M.encode(sample, {}, tok)
    endless = M.encode(sample | {"endless": True}, {}, tok)
    assert ended.ids == endless.ids
    assert ended.labels[:-2] == endless.labels[:-2]
    assert (ended.labels[-2], endless.labels[-2]) == (tok.end, M.IGNORE)


def test_the_words_of_a_clip_in_lower_case_without_punctuation(tok):
    """The targets of a CTC stage; Chinese characters are words, before which no space is written."""
    sample = document(speech("The ball, it IS red!"), text("."), speech("漢字 yes", "01.flac"))
    first, second = M.encode(sample, CLIPS, tok).word_ids
    assert first == tok(" the ball it is red")
    assert second == [*tok("漢字"), *tok(" yes")]


# --------------------------------------------------------------------------------------------------
# 2. Dialogues are Qwen2-Audio's, with its default system turn
# --------------------------------------------------------------------------------------------------

def rendered(sample: dict, tok: M.Tokenizer, generate: bool, template: str) -> list[int]:
    """transformers' own rendering of a dialogue, tokenised whole, one <|AUDIO|> per position."""
    messages = []
    positions = []
    for message in sample["messages"]:
        content = []
        for part in message["content"]:
            if part["role"] == "speech":
                content.append({"type": "audio", "audio_url": part["audio"]})
                positions.append(M.audio_positions(len(CLIPS[part["audio"]])))
            else:
                content.append({"type": "text", "text": part["text"]})
        messages.append({"role": message["role"], "content": content})
    whole = tok.hf.apply_chat_template(messages, chat_template=template, tokenize=False,
                                       add_generation_prompt=generate)
    for count in positions:
        whole = whole.replace("<|AUDIO|>", "<|audio|>" * count, 1)
    tok.backend.encode_special_tokens = False
    ids = tok.backend.encode(whole.replace("<|audio|>", "<|AUDIO|>"), add_special_tokens=False).ids
    tok.backend.encode_special_tokens = True
    return ids


DIALOGUES = [
    dialogue(
        ("user", text("where is the ball?", False)),
        ("assistant", text("the garden"))),
    dialogue(
        ("user", speech("where is the ball?")),
        ("assistant", text("the garden"))),
    dialogue(
        ("user", speech("where is it")),
        ("assistant", text("the garden.")),
        ("user", text("say yes", False)),
        ("assistant", text("yes")),
        ("user", speech("red", "01.flac")),
        ("assistant", text("the ball is red"))),
    dialogue(
        ("system", text("say yes", False)),
        ("user", speech("is it"), text("red or old?", False)),
        ("assistant", text("yes"))),
    dialogue(
        ("user", speech("is it"), speech("red", "01.flac")),
        ("assistant", text("yes")))]
TEMPLATES = {
    "Qwen2-Audio's": Qwen2AudioProcessor.__new__(Qwen2AudioProcessor).default_chat_template,
    "our exports'": (M.ASSETS / "chat_template.jinja").read_text("utf-8")}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("sample", DIALOGUES)
def test_dialogues_are_qwen2_audios(sample, template, tok):
    assert M.encode(sample, CLIPS, tok).ids == rendered(sample, tok, False, TEMPLATES[template])
    question = sample | {"messages": sample["messages"][:-1]}
    assert M.encode(question, CLIPS, tok, reply=True).ids == rendered(question, tok, True, TEMPLATES[template])


def test_the_tokenizer_opens_in_transformers(c, tok):
    folder = Path(c.data) / "tokenizer-400"
    hf = AutoTokenizer.from_pretrained(folder)
    assert hf.eos_token == "<|im_end|>"
    assert hf.pad_token == "<|endoftext|>"
    assert len(hf) <= c.model.text.vocab_size
    assert hf("the ball<|im_end|>").input_ids == [*tok("the ball"), tok.turn_end]
    assert hf.decode(tok("where is the ball?")) == "where is the ball?"
    again = M.open_tokenizer(folder)
    assert again.hf.get_vocab() == tok.hf.get_vocab()
    assert again(STORY) == tok(STORY)


def test_the_same_text_trains_the_same_tokenizer(c, tok, tmp_path):
    M.train_tokenizer(c, tmp_path / "again")
    before = (Path(c.data) / "tokenizer-400" / "tokenizer.json").read_bytes()
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_tokenizer_that_does_not_write_chatml_is_refused(tok):
    backend = json.loads(tok.backend.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != "<|im_start|>"]
    del backend["model"]["vocab"]["<|im_start|>"]
    other = type(tok.backend).from_str(json.dumps(backend))
    with pytest.raises(synth.UserError, match=r"has no <\|im_start\|>, .* take a Qwen2, .* or SmolLM2"):
        M.Tokenizer(PreTrainedTokenizerFast(tokenizer_object=other))


# --------------------------------------------------------------------------------------------------
# 3. Packing
# --------------------------------------------------------------------------------------------------

def other_data(c: Settings, folder: Path, **mix: float) -> Settings:
    """The same settings with another folder, and a single lane of this mix of recipes."""
    if mix:
        c = with_stage(c, mix=mix, packs=1)
    return Settings(c | {"data": str(folder)})


def lane(c: Settings, tok: M.Tokenizer, number: int = 0, cursor: dict | None = None):
    return M.packs_of_lane(c, tok, 80, "one", number, cursor)


def documents_of(batch: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """[(ids, labels)] of a batch's documents."""
    lengths = batch["lengths"].tolist()
    columns = [[x.tolist() for x in batch[name].split(lengths)] for name in ("ids", "labels")]
    return list(zip(*columns, strict=True))


def all_samples(c: Settings, tok: M.Tokenizer) -> dict[str, M.Encoded]:
    """Every training sample, by name."""
    samples = {}
    for path in Path(c.data).glob("*/train-*.tar"):
        for number in range(synth.read_index(path)["count"]):
            encoded = M.read_encoded(path, number, tok)
            samples[encoded.name] = encoded
    return samples


def same_batch(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_a_pack_is_whole_documents_and_no_padding(c, tok):
    samples = all_samples(c, tok)
    one = lane(c, tok)
    for _ in range(30):
        pack = next(one)
        batch = pack.batch
        documents = documents_of(batch)
        heard = sum("text" not in name for name in pack.names)
        assert len(documents) == len(pack.names)
        for name, (ids, labels) in zip(pack.names, documents):
            assert (ids, labels) == (samples[name].ids, samples[name].labels)
        assert len(batch["ids"]) == len(batch["labels"]) == batch["lengths"].sum() <= 40
        assert pack.counts["positions"] == len(batch["ids"]) == 40 - pack.counts["waste"]
        assert pack.counts["targets"] == (batch["labels"] != M.IGNORE).sum() > 0
        assert pack.counts["audio samples"] == heard * CLIP
        assert batch["frames"].tolist() == [13] * heard
        assert batch["mel"].shape == (16 * heard, 80)
        assert len(batch["word_counts"]) == heard
        words = [i for name in pack.names for ids in samples[name].word_ids for i in ids]
        assert batch["word_ids"].tolist() == words


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_epoch_gives_every_sample_once(c, tok, recipe, monkeypatch):
    """Four lanes share a recipe's 21 samples (5, 5, 5, 6), and share them out anew in the next epoch.

    What is read is packed, or left out as longer than a pack (two of `text` are), but for the document that
    waits for the next pack.
    """
    read_encoded = M.read_encoded
    read = []

    def recorded(*arguments):
        encoded = read_encoded(*arguments)
        if encoded.name.startswith(recipe):
            read.append(encoded.name)
        return encoded

    monkeypatch.setattr(M, "read_encoded", recorded)
    first, second = [], []
    for number in range(4):
        one = lane(c, tok, number)
        mine = (number + 1) * 21 // 4 - number * 21 // 4
        read.clear()
        used = []
        skipped = 0
        while len(used) + skipped < 2 * mine:
            pack = next(one)
            used += [name for name in pack.names if name.startswith(recipe)]
            skipped += pack.counts["skipped"] if recipe == "text" else 0
        kept = [name for name in read if name not in ("text-0", "text-2")]
        assert used == kept[:len(used)]
        assert len(kept) - len(used) <= 1
        assert len(read) - len(kept) == skipped
        first += read[:mine]
        second += read[mine:2 * mine]
    everything = sorted(f"{recipe}-{i}" for i in range(21))
    assert sorted(first) == everything
    assert sorted(second) == everything


def test_every_epoch_has_an_order_of_its_own(c):
    recipe = M.Recipe(c, "text", "one")
    first, second = ([recipe.locate(epoch, i) for i in range(21)] for epoch in (0, 1))
    assert first != second
    assert set(first) == set(second)
    assert len(set(first)) == 21


def test_shares_of_the_mix(c, tok):
    lanes = [lane(c, tok, number) for number in range(4)]
    fed = Counter()
    for _ in range(60):
        packs = [next(one) for one in lanes]
        for pack in packs:
            for name, (ids, _) in zip(pack.names, documents_of(pack.batch)):
                fed[name.split("-")[0]] += len(ids)
    for name, share in c.train.stages.one.mix.items():
        assert abs(fed[name] / fed.total() - share) < 0.02, fed
    assert fed.total() == sum(fed for pack in packs for _, fed in pack.cursor.values())


def test_a_cursor_is_all_that_a_lane_needs(c, tok):
    """From the cursor of every pack the same packs follow as without interruption."""
    one = lane(c, tok, 1)
    packs = [next(one) for _ in range(12)]
    for i in range(11):
        again = lane(c, tok, 1, json.loads(json.dumps(packs[i].cursor)))
        for want in packs[i + 1:i + 4]:
            got = next(again)
            assert same_batch(got.batch, want.batch)
            assert got.cursor == want.cursor
            assert got.names == want.names


LONG = {
    "interleaved": [text("the "), speech("ball " * 9), text(" is red" * 20)],
    "text": [text("the ball is red. " * 20)]}


@pytest.mark.parametrize("recipe", LONG)
def test_a_sample_longer_than_a_pack_is_left_out_and_counted(c, tok, tmp_path, recipe):
    some = other_data(c, tmp_path / "some", **{recipe: 1.0})
    long = document(*LONG[recipe], recipe=recipe, name="long")
    short = [document(text("the "), speech("ball"), text(" is red"), recipe=recipe, name=f"short-{i}")
             for i in (1, 2)]
    write_recipe(some, recipe, [long, *short], shards=1)
    one = lane(some, tok)
    packs = [next(one) for _ in range(3)]
    names = Counter(name for pack in packs for name in pack.names)
    skipped = sum(pack.counts["skipped"] for pack in packs)
    assert set(names) == {"short-1", "short-2"}
    assert packs[-1].cursor[recipe][0] == names.total() + skipped
    assert skipped >= min(names.values()) - 1 > 0

    none = other_data(c, tmp_path / "none", **{recipe: 1.0})
    write_recipe(none, recipe, [long], shards=1)
    with pytest.raises(M.UserError, match=f"Every sample of {recipe} is longer than a pack.* train.pack_length=40"):
        next(lane(none, tok))


def test_a_recipe_without_samples_is_named(c, tok, tmp_path):
    empty = other_data(c, tmp_path, chat=1.0)
    write_recipe(empty, "chat", [], shards=1)
    for folder in (empty, other_data(c, tmp_path / "none", chat=1.0)):
        with pytest.raises(M.UserError, match="chat has no sample, which the stage's mix asks for"):
            next(lane(folder, tok))


def test_a_damaged_shard_stops_the_feed_with_its_name(c, tok, tmp_path):
    other = other_data(c, tmp_path)
    for name in RECIPES:
        write_recipe(other, name, [document(text(STORY), name=f"{name}-{i}") for i in range(8)], shards=1)
    path = synth.shard_path(other, "text", "train", 0)
    data = bytearray(path.read_bytes())
    data[700:] = bytes(len(data) - 700)
    path.write_bytes(data)
    packs = M.feed(other, tok, 80, M.Progress("one"), lanes=[0, 1, 2, 3])
    with pytest.raises(M.UserError) as error:
        for _ in range(20):
            next(packs)
    assert re.fullmatch(f"Sample [0-7] in {re.escape(str(path))} is damaged; [^\n]*[.]", str(error.value))


@pytest.mark.parametrize("count", [1, 3, 60])
def test_one_batch_of_packs(c, tok, count):
    """The documents and clips of all packs, end to end, and nothing else."""
    lanes = [lane(c, tok, number) for number in range(4)]
    packs = [next(lanes[i % 4]) for i in range(count)]
    batch = M.join([pack.batch for pack in packs])
    assert documents_of(batch) == [document for pack in packs for document in documents_of(pack.batch)]
    assert len(batch["ids"]) == batch["lengths"].sum() == sum(pack.counts["positions"] for pack in packs)
    assert len(batch["frames"]) == sum("text" not in name for pack in packs for name in pack.names)
    assert len(batch["mel"]) == M.slot_rows(batch["frames"]).sum()
    heard = sum(M.audio_positions(CLIP) for _ in batch["frames"])
    assert int((batch["ids"] == tok.audio).sum()) == heard


# --------------------------------------------------------------------------------------------------
# 4. Optimizers, rates, gradients
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("frozen", [(), ("encoder",), ("encoder", "adapter"), ("llm",)])
def test_every_trained_parameter_is_in_one_group(c, model, optimizer, frozen):
    scales = {"encoder": 0.5, "adapter": 10.0, "llm": 1.0} | dict.fromkeys(frozen, 0.0)
    c = with_stage(c, lr_scale=scales, optimizer=optimizer)
    stage = c.train.stages.one
    trained = {name: p for name, p in model.named_parameters()
               if M.module_of(name) not in frozen and "embed_positions" not in name}
    groups = {}                                  # of each parameter: the optimizer's name and the group
    times = Counter()
    assert set(M.freeze(model, stage)) == set(trained.values())
    for made in M.make_optimizers(c, model, stage):
        for group in made.param_groups:
            for p in group["params"]:
                groups[p] = (type(made).__name__, group)
                times[p] += 1
    assert set(times) == set(trained.values())
    assert set(times.values()) == {1}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    for name, p in trained.items():
        kind, group = groups[p]
        is_inner = p.ndim == 2 and "embed" not in name and "lm_head" not in name
        is_muon = optimizer == "muon" and is_inner
        rate = stage.muon_lr if is_muon else stage.lr
        assert kind == ("Muon" if is_muon else "AdamW"), name
        assert group["base_lr"] == scales[M.module_of(name)] * rate, name
        assert group["weight_decay"] == (c.train.weight_decay if p.ndim > 1 else 0.0), name
    for p in model.parameters():
        p.requires_grad_(p is not model.audio_tower.embed_positions.weight)


def test_rates(c):
    """Linear over `ramp` steps, times a cosine from 1 to `floor`."""
    stage = with_stage(c, steps=100, ramp=10, floor=0.1).train.stages.one
    rates = [M.lr_factor(stage, step, step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[4] == pytest.approx(0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.04)) / 2))
    assert rates[50] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert M.lr_factor(stage, 500, 5.0) == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_how_much_of_a_stage_is_done(c):
    by_steps = with_stage(c, steps=100).train.stages.one
    by_tokens = with_stage(c, steps=0, tokens=2000).train.stages.one
    assert M.Progress("one", step=7, stage_step=30).share(by_steps) == 0.3
    assert M.Progress("one", step=7, stage_step=30, targets=500.0).share(by_tokens) == 0.25


class Recorder:
    """An optimizer that changes nothing: it keeps the gradients with which it was asked to step."""

    def __init__(self, model: M.InSerter):
        self.model = model
        self.param_groups = []

    def step(self) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()
                          if p.grad is not None}

    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none=set_to_none)


@pytest.fixture
def one_step(tok, model, tmp_path, monkeypatch):
    """run(settings, packs) -> (logged loss per target, {parameter: gradient}) of one step of the loop."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(M, "evaluate", lambda *_: {})
    monkeypatch.setattr(M, "save_run", lambda *_: None)

    def run(c: Settings, packs: list[M.Pack]) -> tuple[float, dict[str, Tensor]]:
        c = with_train(with_stage(c, steps=1), clip=1e9, log_every=1)
        recorder = Recorder(model)
        monkeypatch.setattr(M, "make_optimizers", lambda *_: [recorder])
        monkeypatch.setattr(M, "feed", lambda *_: iter([packs]))
        log = M.run_folder(c) / "metrics.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        model.zero_grad()
        assert M.train_stage(c, model, tok, M.Progress("one"), None, [])
        row = next(row for row in map(json.loads, log.read_text().splitlines()) if "loss" in row)
        assert row["targets"] == sum(pack.counts["targets"] for pack in packs)
        return row["loss"], recorder.gradients

    yield run
    M.freeze(model, Settings(lr_scale={"encoder": 1.0, "adapter": 1.0, "llm": 1.0}, ctc=False))


def test_gradients_are_of_the_mean_over_targets(c, tok, model, one_step):
    """However the packs are split over passes: the gradient is that of the mean over all targets."""
    packs = [next(lane(c, tok, number)) for number in range(4)]
    model.zero_grad()
    mean = M.next_token_losses(model, M.join([pack.batch for pack in packs]), chunk=64).mean()
    mean.backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for at_once in (1, 3, 4):
        loss, gradients = one_step(with_train(c, packs_at_once=at_once), packs)
        assert loss == pytest.approx(mean.item(), rel=1e-5)
        assert gradients.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(gradients[name], want[name], rtol=1e-3, atol=1e-6)


def test_a_ctc_stage_asks_for_the_words_heard(c, tok, model, one_step):
    """Targets are the words of every clip, in lower case; encoder and adapter learn, the LLM is not run."""
    c = with_stage(c, ctc=True, mix={"interleaved": 1.0})
    spoken = {}                                  # the words of each sample's clips
    for path in sorted(Path(c.data).glob("interleaved/train-*.tar")):
        for number in range(synth.read_index(path)["count"]):
            sample, _ = synth.read_sample(path, number)
            spoken[sample["id"]] = [re.findall(r"\w+", part["text"].lower()) for part in sample["parts"]
                                    if part["role"] == "speech"]
    packs = [next(lane(c, tok, number)) for number in range(2)]
    for pack in packs:
        batch = pack.batch
        asked = [tok.decode(ids.tolist()).split() for ids in batch["word_ids"].split(batch["word_counts"].tolist())]
        assert asked == [words for name in pack.names for words in spoken[name]]
        assert len(batch["word_counts"]) == len(batch["frames"])
        assert pack.counts["targets"] == len(batch["word_ids"]) > 0
    loss, gradients = one_step(c, packs)
    assert math.isfinite(loss)
    assert loss > 0
    touched = {M.module_of(name) for name, gradient in gradients.items() if gradient.abs().sum() > 0}
    assert touched == {"encoder", "adapter", "llm"}
    blocks = [name for name, _ in model.named_parameters()
              if M.module_of(name) == "llm" and ".layers." in name]
    assert blocks
    assert not gradients.keys() & set(blocks)


# --------------------------------------------------------------------------------------------------
# 5. Answers
# --------------------------------------------------------------------------------------------------

def test_answers_do_not_depend_on_the_batch(tok, model):
    questions = [
        "where is the ball?",
        noise(3000, 1),
        "it",
        noise(16000, 2),
        "say yes, the ball is in the old garden",
        [noise(700, 3), noise(4000, 4)]]
    alone = [M.answer(model, tok, [question], 8, 1)[0] for question in questions]
    assert M.answer(model, tok, questions, 8, 4) == alone
    assert len({reply for reply, _ in alone}) > 2
    for reply, _ in alone:
        assert isinstance(reply, str)
        assert "<|" not in reply.replace("<|endoftext|>", "").replace("<|im_start|>", "")
    heard = [question for question in questions if isinstance(question, np.ndarray)]
    one_by_one = [M.transcribe(model, tok, [waveform], 8, 1)[0] for waveform in heard]
    assert M.transcribe(model, tok, heard, 8, 4) == one_by_one


@torch.no_grad()
def test_answers_are_greedy_by_our_own_forward_pass(tok, model):
    """transformers generates, with our weights; token by token it is what the model's own logits say."""
    shared = dict(M.their_llm(model).named_parameters())
    assert shared["lm_head.weight"].data_ptr() == model.language_model.lm_head.weight.data_ptr()
    spoken = {"parts": None, "messages": [{"role": "user", "content": [M.spoken_part("00.flac")]}]}
    for prompt in (M.encode(document(text("the ball is"), name="p"), {}, tok, reply=True),
                   M.encode(spoken, CLIPS, tok, reply=True)):
        ids = list(prompt.ids)
        said = []
        while len(said) < 8 and (not said or said[-1] not in (tok.turn_end, tok.end)):
            batch = M.collate([M.Encoded("p", ids + said, [M.IGNORE] * len(ids + said), prompt.clips, [])], 80)
            hidden = model.hidden(batch["ids"], batch["lengths"], batch["mel"], batch["frames"])[-1]
            logits = model.language_model.lm_head(hidden)
            logits[[tok.audio, tok.audio_bos, tok.audio_eos]] = -math.inf
            said.append(int(logits.argmax()))
        ended = said[-1] in (tok.turn_end, tok.end)
        (reply, truncated), = M.complete(model, tok, [prompt], 8, 1)
        assert reply == tok.decode(said[:-1] if ended else said)
        assert truncated == (not ended)


@pytest.fixture
def exported(c, tok, model, tmp_path, monkeypatch):
    """The folder of an export, as a run writes it."""
    monkeypatch.chdir(tmp_path)
    synth.same_settings(M.run_folder(c) / "config.yaml", c, remedy="")
    M.save_run(c, model, tok, [], M.Progress("one", step=1))
    return M.run_folder(c) / "model"


def test_the_model_cards_code_answers_as_we_do(tok, model, exported, capsys):
    """The export needs nothing but transformers: its own README's code, run as it stands, on a spoken question."""
    soundfile.write("question.wav", noise(16000), 16000, subtype="FLOAT")
    card = (exported / "README.md").read_text()
    assert f"# {exported.parent.name}: an InSerter speech LLM" in card
    code = card.split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(code.replace("FOLDER", str(exported)), {})
    (ours, _), = M.answer(model, tok, [noise(16000)], 256, 1)
    for name in map(str, tok.hf.added_tokens_decoder.values()):
        ours = ours.replace(name, "")
    assert capsys.readouterr().out == ours + "\n"


def test_a_run_is_asked_aloud_and_in_writing(c, tok, model, exported, monkeypatch):
    """ask=FILE, or a text; the answer is that of the exported model (here its first eight tokens)."""
    answer = M.answer
    monkeypatch.setattr(M, "answer", lambda *asked, max_tokens, batch: answer(*asked, max_tokens=8, batch=batch))
    soundfile.write("q.wav", np.stack([noise(16000)] * 2, 1), 16000, subtype="FLOAT")
    for ask, question in (("q.wav", noise(16000)), ("where is the ball?", "where is the ball?"), ("5", "5")):
        (want, _), = answer(model, tok, [question], 8, 1)
        assert M.ask(Settings(c | {"ask": ask})) == want
    assert AutoProcessor.from_pretrained(exported).tokenizer.get_vocab() == tok.hf.get_vocab()
    with pytest.raises(M.UserError, match=r"There is no model in runs/none/model; .* run=none"):
        M.ask(Settings(c | {"ask": "hello", "run": "none"}))


def tone(seconds: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("name", ["q.wav", "q.flac"])
def test_any_rate_and_channel_count_can_be_asked(tmp_path, rate, name):
    """The same tone comes out, at 16 kHz, one channel: the mean of them."""
    is_mono = rate == 16000
    channels = [tone(1.0, rate)] if is_mono else [0.9 * 2 * tone(1.0, rate), np.zeros(rate)]
    soundfile.write(tmp_path / name, np.stack(channels, 1), rate)
    heard = M.load_audio(tmp_path / name)
    assert heard.dtype == np.float32
    assert heard.shape == (16000,)
    want = tone(1.0, 16000) * (1.0 if is_mono else 0.9)
    assert np.abs(heard - want)[400:-400].max() < 0.01


@pytest.mark.parametrize("samples, says", [
    (0, "0.000 s"),
    (320, "0.020 s"),
    (31 * 16000, "31.000 s cannot be heard: clips last from 0.021 to 30 s")])
def test_what_cannot_be_heard_is_one_sentence(tok, model, samples, says):
    with pytest.raises(M.UserError, match=f"A clip of {says}") as error:
        M.answer(model, tok, [noise(samples)], 8, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"RIFF1234WAVEgarbage", None])
def test_a_file_that_is_no_sound_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "q.wav").write_bytes(content)
    with pytest.raises(Exception, match="q.wav") as error:
        M.load_audio(tmp_path / "q.wav")
    assert synth.EXPECTED & {kind.__name__ for kind in error.type.__mro__}


# --------------------------------------------------------------------------------------------------
# 6. The gap curve
# --------------------------------------------------------------------------------------------------

def test_after_speech_keeps_loss_behind_the_first_speech_only():
    sample = document(text("the "), speech("ball"), text(" is "), speech("red", "01.flac"), text("."))
    kept, characters = M.after_speech(sample)
    assert [part["loss"] for part in kept["parts"] if part["role"] == "text"] == [False, True, True]
    assert characters == len(" is .")
    assert sample["parts"][0]["loss"], "the sample itself stays"


@torch.no_grad()
def test_a_point_of_the_gap_curve(c, tok, model, tmp_path):
    """Nats per character after speech, heard and typed; on text; and the share of answers that are right."""
    c = Settings(c | {"data": str(tmp_path), "bench": Settings(c.bench | {"max_tokens": 4})})
    flac = {"00.flac": synth.flac_bytes(noise())}
    story = document(text("the "), speech("ball"), text(" is red."), name="i")
    plain = document(text("it is old."), recipe="text", name="t")
    (said, _), = M.answer(model, tok, [synth.decode_flac(flac["00.flac"])], 4, 1)
    asked = [dialogue(("user", speech("where")), ("assistant", text(reply)), name=f"c{n}")
             for n, reply in enumerate((said, "no"))]
    unspoken = dialogue(("user", text("where", False)), ("assistant", text("no")), name="u")
    lonely = dialogue(("user", speech("where")), name="l")
    for recipe, samples in {"interleaved": [story], "text": [plain], "chat": [*asked, unspoken, lonely]}.items():
        clips = {sample["id"]: flac for sample in samples}
        synth.write_shard(synth.shard_path(c, recipe, "dev", 0), samples, clips, {})

    def nats(sample: dict, targets: int, **options: bool) -> float:
        """Of the last labels of a sample."""
        clips = {"00.flac": synth.decode_flac(flac["00.flac"])}
        batch = M.collate([M.encode(sample, clips, tok, **options)], 80)
        return float(M.next_token_losses(model, batch, 64)[-targets:].sum())

    point = M.evaluate(c, model, tok)
    after = 1 + len(tok(" is red."))         # and the end of the document
    assert point["heard"] == pytest.approx(nats(story, after) / 8, rel=1e-5)
    assert point["typed"] == pytest.approx(nats(story, after, typed=True) / 8, rel=1e-5)
    assert point["gap"] == point["heard"] - point["typed"]
    assert point["text"] == pytest.approx(nats(plain, 0) / 10, rel=1e-5)
    assert point["obeys spoken"] == 0.5
    assert point["obeys typed"] in (0.0, 0.5)
    assert M.evaluate(Settings(c | {"data": str(tmp_path / "none")}), model, tok) == {}
