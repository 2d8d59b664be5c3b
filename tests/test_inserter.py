"""What the model is trained on: ids, labels, packs, rates; and what it answers.

The tests are meant to be read: the first section spells out the loss mask of every recipe.
"""
import base64
import copy
import doctest
import itertools
import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import SMALL
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.qwen2_audio.processing_qwen2_audio import Qwen2AudioProcessor

import inserter as M
import synth
from synth import Settings

CLIP = 2000                                  # samples: 13 frames, 7 convolution outputs, 3 positions
SIZES = [
    "model.encoder_layers=1",
    "model.encoder_width=16",
    "model.encoder_heads=2",
    "model.llm_layers=2",
    "model.llm_width=16",
    "model.llm_heads=2",
    "model.llm_kv_heads=1",
    "model.llm_ffn=24",
    "model.vocab=400"]
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
    flac = synth.flac_bytes(synth.to_int16(noise()))
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


# --------------------------------------------------------------------------------------------------
# 2. Dialogues are written by the LLM's own chat template; without one, by Qwen2-Audio's
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
QWEN2_AUDIOS = Qwen2AudioProcessor.__new__(Qwen2AudioProcessor).default_chat_template


@pytest.mark.parametrize("sample", DIALOGUES)
def test_without_a_template_it_is_qwen2_audios(sample, tok):
    assert M.encode(sample, CLIPS, tok).ids == rendered(sample, tok, False, QWEN2_AUDIOS)
    question = sample | {"messages": sample["messages"][:-1]}
    assert M.encode(question, CLIPS, tok, reply=True).ids == rendered(question, tok, True, QWEN2_AUDIOS)


# In the manner of Llama 3, of Qwen3 (which thinks in its last turn) and of a model that writes roles as words.
LLAMA = """{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}<|say|>

{{ m.content | trim }}<|over|>{% endfor %}{% if add_generation_prompt %}<|turn|>assistant<|say|>

{% endif %}"""
THINKING = """{% for m in messages %}<|turn|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|over|>
{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
WORDS = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}\
{{ m.role }}:
{{ m.content }}{{ ' <|over|>' if m.role == 'assistant' }}
{% endfor %}{% if add_generation_prompt %}assistant:
{% endif %}"""


def tokenizer_with(template: str, c: Settings) -> M.Tokenizer:
    """The tests' tokenizer with other special tokens and a chat template; <|start|> begins its documents."""
    hf = M.load_tokenizer(c).hf
    hf.add_special_tokens({"bos_token": "<|start|>", "extra_special_tokens": ["<|turn|>", "<|say|>", "<|over|>"]},
                          replace_extra_special_tokens=False)
    start = [("<|start|>", hf.bos_token_id)]
    hf.backend_tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=start)
    hf.chat_template = template
    return M.Tokenizer(hf)


@pytest.mark.parametrize("sample, template", [
    *itertools.product(DIALOGUES, [LLAMA, THINKING]),
    *itertools.product(DIALOGUES[:3], [WORDS])])
def test_dialogues_are_written_by_the_llms_own_template(c, sample, template):
    """So it is rendered by transformers, whole; and the targets are the answers with what ends them."""
    tok = tokenizer_with(template, c)
    encoded = M.encode(sample, CLIPS, tok)
    assert encoded.ids == rendered(sample, tok, False, tok.template)
    question = sample | {"messages": sample["messages"][:-1]}
    assert M.encode(question, CLIPS, tok, reply=True).ids == rendered(question, tok, True, tok.template)
    end = " <|over|>" if template is WORDS else "<|over|>"
    said = "".join(turn["content"][0]["text"] + end for turn in sample["messages"] if turn["role"] == "assistant")
    assert tok.decode([label for label in encoded.labels if label != M.IGNORE]) == said
    assert tok.stops == [tok.hf.convert_tokens_to_ids("<|over|>"), tok.end]


def test_a_document_begins_as_the_tokenizer_begins_it(c):
    tok = tokenizer_with(LLAMA, c)
    encoded = M.encode({"parts": [text("the ball")], "messages": None}, {}, tok)
    assert encoded.ids == [*tok.hf("the ball").input_ids, tok.end]
    assert encoded.labels == [*tok("the ball"), tok.end, M.IGNORE]
    assert tok.decode(encoded.ids[:1]) == "<|start|>"


def test_a_dialogue_that_the_template_refuses_is_named(c):
    with pytest.raises(synth.UserError, match="no dialogue of the turns system, user, assistant .no system turns"):
        M.encode(DIALOGUES[3], CLIPS, tokenizer_with(WORDS, c))
    with pytest.raises(synth.UserError, match="ends the assistant's turn by no special token"):
        tokenizer_with("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", c)
    for turns in ("messages[1:]", "messages | reverse", "messages + messages[:1]"):
        with pytest.raises(synth.UserError, match="does not write the turns of a dialogue .user, assistant. once"):
            tokenizer_with(f"{{% for m in {turns} %}}<|turn|>{{{{ m.content }}}}<|over|>{{% endfor %}}", c)
    aloud = LLAMA.replace("assistant<|say|>\n\n{% endif", "assistant<|say|>\n\n<think>{% endif")
    with pytest.raises(synth.UserError, match="asks for an answer otherwise than it writes one"):
        tokenizer_with(aloud, c)


def test_of_several_templates_the_default_one_counts(c, tmp_path):
    tok = tokenizer_with({"default": LLAMA, "tool_use": WORDS}, c)
    assert M.encode(DIALOGUES[0], CLIPS, tok).ids == M.encode(DIALOGUES[0], CLIPS, tokenizer_with(LLAMA, c)).ids
    M.save_processor(M.fresh_model(c, tok).config, tok, tmp_path)
    again = M.Tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    assert again.template == tok.template == AutoProcessor.from_pretrained(tmp_path).chat_template
    assert M.encode(DIALOGUES[0], CLIPS, again).ids == M.encode(DIALOGUES[0], CLIPS, tok).ids


def test_a_tokenizer_that_puts_spaces_before_pieces_is_refused(c):
    hf = M.load_tokenizer(c).hf
    hf.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    with pytest.raises(synth.UserError, match="puts a space before every piece of text"):
        M.Tokenizer(hf)


def test_special_tokens_in_a_text_stay_text_whatever_transformers_did_before(c):
    tok = tokenizer_with(LLAMA, c)
    before = tok("say <|over|>")
    tok.hf.backend_tokenizer.encode_special_tokens = True
    tok.markup(("user", "system", "user"), True)
    assert tok("say <|over|>") == before and tok.turn_end not in before


def test_the_tokenizer_opens_in_transformers(c, tok):
    hf = AutoTokenizer.from_pretrained(Path(c.data) / "tokenizer")
    assert hf.eos_token == "<|im_end|>"
    assert hf.pad_token == "<|endoftext|>"
    assert len(hf) <= c.model.vocab
    assert hf("the ball<|im_end|>").input_ids == [*tok("the ball"), tok.turn_end]
    assert hf.decode(tok("where is the ball?")) == "where is the ball?"
    assert M.load_tokenizer(c).digest == tok.digest


# --------------------------------------------------------------------------------------------------
# 3. Packing
# --------------------------------------------------------------------------------------------------

def other_data(c: Settings, folder: Path, **mix: float) -> Settings:
    """The same settings with another folder, and a single lane of this mix of recipes."""
    if mix:
        c = with_stage(c, mix=mix, packs=1)
    return Settings(c | {"data": str(folder)})


def lane(c: Settings, tok: M.Tokenizer, number: int = 0, cursor: dict | None = None) -> M.Lane:
    return M.Lane(c, tok, "one", M.recipes_of(c, "one"), number, cursor)


def documents_of(pack: M.Pack) -> list[tuple[str, list[int], list[int]]]:
    """[(name, ids, labels)] of a pack's documents."""
    spans = zip(pack.names, pack.cu_seqlens, pack.cu_seqlens[1:])
    return [(name, pack.ids[a:b].tolist(), pack.labels[a:b].tolist()) for name, a, b in spans]


def all_samples(c: Settings, tok: M.Tokenizer) -> dict[str, M.Encoded]:
    """Every training sample, by name."""
    samples = {}
    for path in Path(c.data).glob("*/train-*.tar"):
        for number in range(synth.open_shard(path).count):
            encoded = M.read_encoded(path, number, tok)
            samples[encoded.name] = encoded
    return samples


def test_a_pack_is_whole_documents_and_no_padding(c, tok):
    samples = all_samples(c, tok)
    one = lane(c, tok)
    for _ in range(30):
        pack = one.pack()
        documents = documents_of(pack)
        assert len(pack.ids) == len(pack.labels) == len(pack.position_ids) == pack.cu_seqlens[-1]
        assert len(pack.ids) == 40 - pack.waste
        assert pack.waste == 40 - sum(len(ids) for _, ids, _ in documents)
        for name, ids, labels in documents:
            assert (ids, labels) == (samples[name].ids, samples[name].labels)
        for start, end in zip(pack.cu_seqlens, pack.cu_seqlens[1:]):
            assert pack.position_ids[start:end].tolist() == list(range(end - start))
        assert pack.supervised == (pack.labels != M.IGNORE).sum() > 0
        assert len(pack.cu_seqlens) == 1 + len(pack.names)
        assert sum(pack.clip_samples) == len(pack.audio)
        assert len(pack.clip_samples) == sum("text" not in name for name in pack.names)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_epoch_gives_every_sample_once(c, tok, recipe, monkeypatch):
    """Four lanes share a recipe's 21 samples (5, 5, 5, 6), and share them out anew in the next epoch.

    What is read is packed, or left out as longer than a pack (two of `text` are), but for the documents that
    are open at the end.
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
        used = Counter()
        while used.total() < 2 * mine:
            pack = one.pack()
            used.update(name for name in pack.names + pack.skipped if name.startswith(recipe))
        assert used <= Counter(read)
        assert len(read) - used.total() <= c.train.get("open_documents", 1)
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
        for one in lanes:
            for name, ids, _ in documents_of(one.pack()):
                fed[name.split("-")[0]] += len(ids)
    for name, share in c.train.stages.one.mix.items():
        assert abs(fed[name] / fed.total() - share) < 0.02, fed
    assert fed.total() == sum(recipe["fed"] for one in lanes for recipe in one.cursor["recipes"].values())


def test_a_cursor_is_all_that_a_lane_needs(c, tok):
    """From the cursor of every pack the same packs follow as without interruption."""
    one = lane(c, tok, 1)
    packs = [one.pack() for _ in range(12)]
    for i in range(11):
        again = lane(c, tok, 1, json.loads(json.dumps(packs[i].cursor)))
        for want in packs[i + 1:i + 4]:
            got = again.pack()
            for name in ("ids", "labels", "audio"):
                assert getattr(got, name).tolist() == getattr(want, name).tolist()
            assert got.cursor == want.cursor
            assert got.names == want.names
            assert got.skipped == want.skipped


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
    packs = [one.pack() for _ in range(3)]
    assert {name for pack in packs for name in pack.names} == {"short-1", "short-2"}
    assert {name for pack in packs for name in pack.skipped} == {"long"}
    skipped = sum(len(pack.skipped) for pack in packs)
    assert packs[-1].cursor["recipes"][recipe]["epoch"] >= skipped - 1

    none = other_data(c, tmp_path / "none", **{recipe: 1.0})
    write_recipe(none, recipe, [long], shards=1)
    sentence = f"Every sample of the recipe {recipe} is longer than a pack .*train.pack_length"
    with pytest.raises(M.UserError, match=sentence):
        lane(none, tok).pack()


def test_a_damaged_shard_stops_the_feed_with_its_name(c, tok, tmp_path):
    other = other_data(c, tmp_path)
    for name in RECIPES:
        write_recipe(other, name, [document(text(STORY), name=f"{name}-{i}") for i in range(8)], shards=1)
    path = synth.shard_path(other, "text", "train", 0)
    data = bytearray(path.read_bytes())
    data[700:] = bytes(len(data) - 700)
    path.write_bytes(data)
    feed = M.Feed(other, tok, M.Progress("one"), lanes=[0, 1, 2, 3])
    problem = ""
    for _ in range(20):
        if not problem:
            packs, problem = feed.next_packs()
    assert packs == []
    assert "damaged" in problem
    assert str(path) in problem
    assert problem.count("\n") == 0


@pytest.mark.parametrize("count", [1, 3, 60])
def test_one_batch_of_packs(c, tok, count):
    """The documents of all packs, end to end, and nothing else; of bounds there is a multiple of 64."""
    lanes = [lane(c, tok, number) for number in range(4)]
    packs = [lanes[i % 4].pack() for i in range(count)]
    batch = M.batch_of(packs)
    documents = [document for pack in packs for document in documents_of(pack)]
    bounds = batch["cu_seqlens"].tolist()
    ends = np.cumsum([len(ids) for _, ids, _ in documents])
    assert batch["cu_seqlens"].dtype == torch.int32
    assert len(bounds) % 64 == 0
    assert len(bounds) - len(documents) in range(1, 65)
    assert bounds[:len(documents) + 1] == [0, *ends]
    assert set(bounds[len(documents):]) == {len(batch["ids"])}
    assert count == 1 or sum(pack.waste for pack in packs) > 0
    assert batch["ids"].tolist() == [i for _, ids, _ in documents for i in ids]
    assert batch["labels"].tolist() == [label for _, _, labels in documents for label in labels]
    assert batch["position_ids"].tolist() == [t for _, ids, _ in documents for t in range(len(ids))]
    assert len(batch["waveforms"]) == sum(len(pack.clip_samples) for pack in packs)
    heard = sum(M.audio_positions(len(waveform)) for waveform in batch["waveforms"])
    assert int((batch["ids"] == tok.audio).sum()) == heard


@pytest.mark.parametrize("count, length", [(1, 64), (62, 64), (63, 64), (64, 128), (127, 128), (128, 192)])
def test_bounds_of_so_many_documents(count, length):
    """n documents have n + 1 bounds, and as many empty documents behind them as make a multiple of 64."""
    one = M.Encoded("d", ids=[5, 6], labels=[6, M.IGNORE], clips=[], word_ids=[])
    pack = M.packed([one] * count, ctc=False, waste=0, skipped=[], cursor={})
    bounds = M.batch_of([pack])["cu_seqlens"].tolist()
    assert bounds == [*range(0, 2 * count + 1, 2), *[2 * count] * (length - count - 1)]
    assert len(bounds) == length


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
    by_tokens = with_stage(c, steps=None, tokens=2000).train.stages.one
    assert M.Progress("one", step=7, stage_step=30).share(by_steps) == 0.3
    assert M.Progress("one", step=7, stage_step=30, targets=500.0).share(by_tokens) == 0.25


class GivenPacks(M.Feed):
    """A feed that has these packs for a step."""

    def __init__(self, packs: list[M.Pack]):
        self.lanes = list(range(len(packs)))
        self.packs = packs
        self.waited = 0.0

    def next_packs(self) -> tuple[list[M.Pack], str]:
        return self.packs, ""


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
        monkeypatch.setattr(M, "Feed", lambda *_, **__: GivenPacks(packs))
        log = M.run_folder(c) / "metrics.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        model.zero_grad()
        assert M.train_stage(c, model, tok, M.Progress("one"), {}, [])
        row = next(row for row in map(json.loads, log.read_text().splitlines()) if "loss" in row)
        assert row["targets"] == sum(pack.supervised for pack in packs)
        return row["loss"], recorder.gradients

    return run


def test_gradients_are_of_the_mean_over_targets(c, tok, model, one_step):
    """However the packs are split over passes: the gradient is that of the mean over all targets."""
    packs = [lane(c, tok, number).pack() for number in range(4)]
    model.zero_grad()
    mean = M.next_token_losses(model, **M.batch_of(packs), chunk=64).mean()
    mean.backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for at_once in (1, 3, 4):
        loss, gradients = one_step(with_train(c, packs_at_once=at_once), packs)
        assert loss == pytest.approx(mean.item(), rel=1e-5)
        assert gradients.keys() == want.keys()
        name = "multi_modal_projector.linear.weight"
        torch.testing.assert_close(gradients[name], want[name], rtol=1e-3, atol=1e-6)


def test_a_ctc_stage_asks_for_the_words_heard(c, tok, model, one_step):
    """Targets are the words of every clip, in lower case; encoder and adapter learn, the LLM is not run."""
    c = with_stage(c, ctc=True, mix={"interleaved": 1.0})
    spoken = {}                                  # the words of each sample's clips
    for path in sorted(Path(c.data).glob("interleaved/train-*.tar")):
        for number in range(synth.open_shard(path).count):
            sample, _ = synth.read_sample(path, number)
            spoken[sample["id"]] = [re.findall(r"\w+", part["text"].lower()) for part in sample["parts"]
                                    if part["role"] == "speech"]
    packs = [lane(c, tok, number).pack() for number in range(2)]
    for pack in packs:
        asked = [tok.decode(ids).split() for ids in pack.word_ids]
        assert asked == [words for name in pack.names for words in spoken[name]]
        assert len(pack.word_ids) == len(pack.clip_samples)
        assert pack.supervised == sum(len(ids) for ids in pack.word_ids) > 0
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
        noise(700, 3)]
    alone = [M.answer(model, tok, [question], 8, 1)[0] for question in questions]
    assert M.answer(model, tok, questions, 8, 4) == alone
    assert len({reply for reply, _ in alone}) > 2
    for reply, _ in alone:
        assert isinstance(reply, str)
        assert "<|" not in reply.replace("<|endoftext|>", "").replace("<|im_start|>", "")
    heard = [question for question in questions if not isinstance(question, str)]
    one_by_one = [M.transcribe(model, tok, [waveform], 8, 1)[0] for waveform in heard]
    assert M.transcribe(model, tok, heard, 8, 4) == one_by_one


def test_the_model_cards_code_answers_as_we_do(c, tok, model, tmp_path, monkeypatch, capsys):
    """The export needs nothing but transformers: its own README's code, run as it stands, on a spoken question."""
    monkeypatch.chdir(tmp_path)
    M.export(c, model, tok, M.whole_tensors(model, []))
    folder = M.run_folder(c) / "model"
    soundfile.write("question.wav", noise(16000), 16000, subtype="FLOAT")
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "random weights" in card
    code = card.split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(code.replace("FOLDER", str(folder)), {})
    (ours, _), = M.answer(model, tok, [noise(16000)], 256, 1)
    for name in map(str, tok.hf.added_tokens_decoder.values()):
        ours = ours.replace(name, "")
    assert capsys.readouterr().out == ours + "\n"


@pytest.fixture
def writer(c, tok, model, tmp_path):
    """Settings with which a loud random model, whose turns end by and by, writes."""
    ending = copy.deepcopy(model)
    head = ending.language_model.lm_head.weight.data
    head[tok.turn_end] *= 4
    M.save_model(ending, tmp_path / "model")
    M.save_processor(model.config, tok, tmp_path / "model")
    base = Settings(c.model | {"from": str(tmp_path / "model")})
    return Settings(with_writing(c, documents=12, tokens=[300, 300], temperature=20.0)
                    | {"model": base, "write": str(tmp_path / "own.jsonl")})


def with_writing(c: Settings, **changed: object) -> Settings:
    return Settings(c | {"writing": Settings(c.writing | changed)})


def test_an_llm_writes_dialogues_and_a_stopped_run_goes_on(writer, tmp_path):
    """The same lines whether in one go, in two, or in other batches; the lines are a corpus."""
    said = M.write(writer)
    whole = Path(writer.write).read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert 3 < len(rows) <= 12 and said.startswith(f"{len(rows)} documents of 12 tried")
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
    again = Settings(writer | {"write": str(tmp_path / "again.jsonl"), "bench": Settings(writer.bench | {"batch": 5})})
    M.write(with_writing(again, documents=6))
    part = Path(again.write).read_text()
    with open(again.write, "a") as file:                                # a kill in the middle of a line
        file.write('{"number": 6, "mess')
    M.write(again)
    assert Path(again.write).read_text() == whole and whole.startswith(part) and part != whole
    assert [document["messages"] for document in synth.read_documents(writer.write)] == [row["messages"] for row in rows]


def test_another_model_continues_nobodys_file(writer, model, tmp_path, monkeypatch):
    M.write(with_writing(writer, documents=6))
    before = Path(writer.write).read_bytes()
    with pytest.raises(synth.UserError, match=r"own.jsonl was made with other settings \(writing.temperature\)"):
        M.write(with_writing(writer, temperature=1.0))
    with torch.no_grad():
        model = copy.deepcopy(M.load_model(writer.model["from"]))
        model.language_model.lm_head.weight[0] += 1
    M.save_model(model, tmp_path / "model")
    with pytest.raises(synth.UserError, match=r"own.jsonl was made with other settings \(model\)"):
        M.write(writer)
    assert Path(writer.write).read_bytes() == before
    M.write(Settings(writer | {"fresh": True}))
    assert json.loads(Path(writer.write).read_bytes().splitlines()[0])["number"] < 6
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(synth.UserError, match="write= is done by one process"):
        M.write(writer)


def test_white_space_before_a_reply_is_as_a_corpus_keeps_it(tmp_path):
    """Else cleaning would change the text, and its range would count other characters."""
    for reply in (" \n\n\n\nIt is red. So.", " It is red.", "It", "\u00a0It is red."):
        document = M.with_reply({"text": "Tom has a ball.", "spoken": [0, 15]}, reply, False)
        assert document["text"] == synth.clean(document["text"]) and document["text"].startswith("Tom has a ball.")


@pytest.mark.parametrize("text", ['{"text": "a line of somebody else"}\n', "no newline at the end"])
def test_a_file_of_somebody_else_is_not_continued(writer, text):
    Path(writer.write).write_text(text)
    with pytest.raises(synth.UserError, match="own.jsonl was not begun by write="):
        M.write(writer)
    assert Path(writer.write).read_text() == text


def test_an_llm_answers_the_user_turns_of_a_corpus(writer, tok, tmp_path, monkeypatch):
    """At temperature 0 its answers are those that it gives when asked."""
    monkeypatch.setattr(synth, "clean", str.strip)                      # a random model says little but control characters
    model = M.load_model(writer.model["from"]).eval()
    questions = [f"{ask} the {thing}?" for ask in ("where is", "who has", "is it", "say") for thing in ("ball", "cat")]
    turns = [{"messages": [{"role": role, "content": said} for role, said in
                           (("system", "be brief"), ("user", question), ("assistant", "no"))]}
             for question in questions]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    M.write(with_writing(writer, to=str(tmp_path / "asked.jsonl"), temperature=0.0))
    want = [(question, text.strip()) for question, (text, cut_off)
            in zip(questions, M.answer(model, tok, questions, 300, 8)) if text.strip() and not cut_off]
    assert want
    rows = [json.loads(line)["messages"] for line in Path(writer.write).read_text().splitlines()]
    assert [(row[0]["content"], row[1]["content"]) for row in rows] == want


TALE = "has a ball. it is red. he puts it in the garden. anna sees it there."


@pytest.mark.parametrize("ask", [None, "Go on in under 40 words:"])
def test_an_llm_continues_the_texts_of_a_corpus(writer, tmp_path, ask):
    """Openings end with a sentence and are marked as what is to be spoken; the corpus reads them back."""
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": f"tom{n} {TALE}"}) + "\n" for n in range(12)))
    M.write(with_writing(writer, to=str(tmp_path / "stories.jsonl"), given=8, ask=ask))
    documents = list(synth.read_documents(writer.write))
    assert len(documents) > 3
    seen = set()
    for document in documents:
        start, end = document["spoken"]
        said = document["messages"][0]["content"] if ask else document["text"]
        opening = said[start:end]
        opening = re.sub(r"^tom\d+ ", "", opening)
        assert opening in ("has a ball.", "has a ball. it is red.")
        assert said[:start] == (f"{ask} " if ask else "")
        seen.add(opening)
        assert document["messages"][1]["content"] if ask else document["text"][end:].strip()
    assert len(seen) > 1


def test_the_end_of_a_text_that_was_cut_off_is_no_target(tok):
    sample = {"parts": [synth.text_part("it is", False), synth.text_part(" red.", True)], "messages": None}
    ended, endless = M.encode(sample, {}, tok), M.encode(sample | {"endless": True}, {}, tok)
    assert ended.ids == endless.ids and ended.labels[:-2] == endless.labels[:-2]
    assert (ended.labels[-2], endless.labels[-2]) == (tok.end, M.IGNORE)


def test_a_model_that_writes_nothing(writer, tmp_path):
    with pytest.raises(synth.UserError, match="None of 12 tries had words and an end"):
        M.write(with_writing(writer, tokens=[1, 1]))
    assert not Path(writer.write).read_text()


def test_drawn_tokens_follow_softmax():
    """20,000 draws of one token: frequencies within four standard deviations of the probabilities."""
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(20000, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(len(logits))]
    counts = torch.bincount(M.drawn(logits, generators), minlength=4) / len(logits)
    want = logits[0].softmax(0)
    assert ((counts - want).abs() < 4 * (want * (1 - want) / len(logits)).sqrt()).all()


def tone(seconds: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("name", ["q.wav", "q.flac"])
def test_any_rate_and_channel_count_can_be_asked(tmp_path, rate, name):
    """The same tone comes out, at 16 kHz, one channel: the mean of them."""
    is_mono = rate == 16000
    channels = [tone(1.0, rate)] if is_mono else [0.9 * 2 * tone(1.0, rate), np.zeros(rate)]
    soundfile.write(tmp_path / name, np.stack(channels, 1), rate)
    heard = M.read_audio(str(tmp_path / name))
    assert heard.dtype == np.float32
    assert heard.shape == (16000,)
    want = tone(1.0, 16000) * (1.0 if is_mono else 0.9)
    assert np.abs(heard - want)[400:-400].max() < 0.01


@pytest.mark.parametrize("content, says", [
    (lambda path: soundfile.write(path, np.zeros(0), 16000), "lasts 0.00 s"),
    (lambda path: soundfile.write(path, np.zeros(0), 8000), "lasts 0.00 s"),
    (lambda path: soundfile.write(path, tone(0.01, 16000), 16000), "lasts 0.01 s"),
    (lambda path: soundfile.write(path, tone(31, 8000), 8000),
     "lasts 31.00 s; a question lasts from 0.03 to 30 s"),
    (lambda path: soundfile.write(path, np.zeros(16000), 16000), "is silent"),
    (lambda path: soundfile.write(path, np.full(16000, np.nan), 16000, subtype="FLOAT"), "is silent"),
    (lambda path: path.write_bytes(b""), "cannot be read as audio"),
    (lambda path: path.write_bytes(b"RIFF1234WAVEgarbage"), "cannot be read as audio"),
    (lambda path: None, "cannot be read as audio")])
def test_what_cannot_be_heard_is_one_sentence(tmp_path, content, says):
    content(tmp_path / "q.wav")
    with pytest.raises(M.UserError, match=says) as error:
        M.read_audio(str(tmp_path / "q.wav"))
    assert "q.wav" in str(error.value)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# 6. The gap curve
# --------------------------------------------------------------------------------------------------

def test_after_speech_keeps_loss_behind_the_first_speech_only():
    sample = document(text("the "), speech("ball"), text(" is "), speech("red", "01.flac"), text("."))
    kept, characters = M.after_speech(sample)
    assert [part["loss"] for part in kept["parts"] if part["role"] == "text"] == [False, True, True]
    assert characters == len(" is .")
    assert sample["parts"][0]["loss"], "the sample itself stays"


# --------------------------------------------------------------------------------------------------
# 7. Preview
# --------------------------------------------------------------------------------------------------

def test_preview_is_one_page_that_needs_nothing_else(small_data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    shutil.copytree(synth.load_config(small_data).data, folder)
    monkeypatch.chdir(tmp_path)
    M.main([*SMALL, f"data={folder}", "preview=8"])
    assert capsys.readouterr().out == "preview.html is written; open it in a browser.\n"
    page = (tmp_path / "preview.html").read_text()
    assert "http" not in page
    assert "\\" not in page
    assert not re.search(r'src="(?!data:audio/flac;base64,)', page)
    wanted = [(recipe, number) for number in (0, 1) for recipe in ("interleaved", "tasks", "text", "chat")]
    assert re.findall("<h2>(.*?)</h2>", page) == [f"{recipe}-train-00000{n}" for recipe, n in wanted]
    clips = []
    for recipe, number in wanted:
        _, files = synth.read_sample(folder / recipe / "train-000000.tar", number)
        clips += files.values()
    assert [base64.b64decode(data, validate=True) for data in re.findall("base64,([^\"]*)", page)] == clips


def test_preview_shows_tokens_and_targets(small_data, tmp_path, monkeypatch):
    """Of a speech task: what is heard, what is asked, what is to be answered."""
    folder = tmp_path / "data"
    shutil.copytree(synth.load_config(small_data).data, folder)
    monkeypatch.chdir(tmp_path)
    M.preview(synth.load_config([*SMALL, f"data={folder}", "preview=2"]))
    page = (tmp_path / "preview.html").read_text()
    section = page.split("<h2>tasks-train-000000</h2>")[1].split("</section>")[0]
    tokens = re.findall(r'<code class="(loss)?">(.*?)</code>(?:× (\d+))?', section)
    sample, files = synth.read_sample(folder / "tasks" / "train-000000.tar", 0)
    samples = len(synth.decode_flac(files["00.flac"]))
    positions = ((-(-samples // 160) - 1) // 2 + 1) // 2
    heard = [words for _, words, _ in tokens[:3]]
    assert heard == ["&lt;|audio_bos|&gt;", "&lt;|AUDIO|&gt;", "&lt;|audio_eos|&gt;"]
    assert int(tokens[1][2]) == positions
    assert not any(loss for loss, _, _ in tokens[:4])
    targets = [words for loss, words, _ in tokens if loss]
    assert "".join(targets) == sample["parts"][2]["text"] + "&lt;|endoftext|&gt;"
    assert f"{len(tokens) - 1 + positions} positions, {len(targets)} targets" in section


def test_preview_without_shards_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(M.UserError, match="no shards in data to preview; run synth.py first"):
        M.main([*SMALL, "data=data", "preview=8"])
