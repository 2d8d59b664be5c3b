"""What the model is trained on: ids, labels, packs, rates; and what it answers.

The tests are meant to be read: the first section spells out the loss mask of every recipe.
"""
import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoTokenizer
from transformers.models.qwen2_audio.processing_qwen2_audio import Qwen2AudioProcessor

import inserter as M
import synth

CLIP = 2000                                             # samples: 13 frames, 7 convolution outputs, 3 positions
TINY = ["model.encoder_layers=1", "model.encoder_width=16", "model.encoder_heads=2", "model.llm_layers=2", "model.llm_width=16",
        "model.llm_heads=2", "model.llm_kv_heads=1", "model.llm_ffn=24", "model.vocab=400", "train.workers=0"]
STORY = "tom puts the ball in the old garden. the ball is in the garden. where is the ball? it is red, say yes"


def text(words, loss=True):
    return {"role": "text", "text": words, "loss": loss}


def speech(words, audio="00.flac"):
    return {"role": "speech", "text": words, "audio": audio, "seconds": CLIP / 16000, "voice": "v"}


def document(*parts, recipe="interleaved", name="d"):
    return {"id": name, "recipe": recipe, "lang": "en", "parts": list(parts), "messages": None}


def dialogue(*messages, recipe="chat", name="m"):
    return {"id": name, "recipe": recipe, "lang": "en", "parts": None,
            "messages": [{"role": role, "content": list(parts)} for role, *parts in messages]}


def noise(samples=CLIP, seed=0):
    return np.random.default_rng(seed).uniform(-0.3, 0.3, samples).astype(np.float32)


def write_recipe(c, name, samples, shards=2, clip=CLIP):
    """Shards of hand-made samples: each part that is spoken gets noise as its clip."""
    for shard in range(shards):
        mine = samples[shard::shards]
        clips = {s["id"]: {p["audio"]: synth.flac_bytes(synth.to_int16(noise(clip))) for parts in synth.parts_of(s)
                           for p in parts if p["role"] == "speech"} for s in mine}
        synth.write_shard(synth.shard_path(c, name, "train", shard), mine, clips, {"counts": {}})


@pytest.fixture(scope="module")
def c(tmp_path_factory):
    """Settings of a data folder of three recipes, 21 samples each, and a tokenizer on which every word of STORY is a token."""
    stage = ("{one: {warmup: false, ctc: false, steps: 9, tokens: null, mix: {text: 0.3, interleaved: 0.5, tasks: 0.2}, packs: 4, lr: 1.0e-3, "
             "muon_lr: 1.0e-2, parts: {encoder: 1.0, adapter: 1.0, llm: 1.0}, ramp: 4, floor: 0.1}}")
    c = synth.load_config([f"data={tmp_path_factory.mktemp('data')}", f"train.stages={stage}", "train.pack_length=40", *TINY])
    rng, words = random.Random(0), STORY.split()
    draw = lambda least, most: " ".join(rng.choices(words, k=rng.randint(least, most)))              # noqa: E731
    # the first shard of `text` trains the tokenizer
    write_recipe(c, "text", [document(text(f"{STORY} {STORY}"), recipe="text", name=f"text-{i}") if i % 2 == 0 and i < 4 else
                             document(text(draw(3, 12)), recipe="text", name=f"text-{i}") for i in range(21)])
    write_recipe(c, "interleaved", [document(text(draw(2, 6) + " "), speech(draw(3, 5)), text(" " + draw(1, 9)),
                                             name=f"interleaved-{i}") for i in range(21)])
    write_recipe(c, "tasks", [document(speech("x"), text("Transcript:", False), text(" " + draw(2, 4)), recipe="tasks",
                                       name=f"tasks-{i}") for i in range(21)])
    return c


@pytest.fixture(scope="module")
def tok(c):
    return M.load_tokenizer(c)


def shown(encoded, tok):
    """[(token, label)], label None without loss; runs of <|AUDIO|> as one."""
    pairs = [(tok.decode([i]), tok.decode([label]) if label != M.IGNORE else None) for i, label in zip(encoded.ids, encoded.labels)]
    return [pair for at, pair in enumerate(pairs) if not (pair[0] == "<|AUDIO|>" and pairs[at - 1] == pair)]


def learnt(encoded, tok):
    """The targets, as one text."""
    return tok.decode([label for label in encoded.labels if label != M.IGNORE])


CLIPS = {"00.flac": noise(), "01.flac": noise(4000)}

# ---- 1. the loss mask of every recipe ----


def test_words_are_tokens(tok):
    assert [tok.decode([i]) for i in tok("tom puts the ball. it is")] == ["tom", " puts", " the", " ball", ".", " it", " is"]


def test_interleaved(tok):
    """Loss on all text, also on the first token after speech; none on the speech. The space before speech is no token."""
    sample = document(text("tom puts the "), speech("ball in the old garden"), text(". it is"), speech("red", "01.flac"))
    encoded = M.encode(sample, CLIPS, tok)
    assert shown(encoded, tok) == [
        ("tom", " puts"), (" puts", " the"), (" the", None),
        ("<|audio_bos|>", None), ("<|AUDIO|>", None), ("<|audio_eos|>", "."),
        (".", " it"), (" it", " is"), (" is", None),
        ("<|audio_bos|>", None), ("<|AUDIO|>", None), ("<|audio_eos|>", "<|endoftext|>"), ("<|endoftext|>", None)]
    assert encoded.ids.count(tok.special["<|AUDIO|>"]) == 3 + 6 and [len(clip) for clip in encoded.clips] == [2000, 4000]
    one, two = tok("tom puts the"), tok(". it is")
    bos, audio, eos = (tok.special[name] for name in ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"))
    assert encoded.ids == [*one, bos, *[audio] * 3, eos, *two, bos, *[audio] * 6, eos, tok.special["<|endoftext|>"]]


def test_text_recipe(tok):
    encoded = M.encode(document(text("the ball is red")), {}, tok)
    assert shown(encoded, tok) == [("the", " ball"), (" ball", " is"), (" is", " red"), (" red", "<|endoftext|>"), ("<|endoftext|>", None)]


def test_tasks(tok):
    """The task's prompt carries no loss, the answer and the end do."""
    sample = document(speech("the ball is red"), text("Transcript:", False), text(" the ball is red"))
    assert shown(M.encode(sample, CLIPS, tok), tok) == [
        ("<|audio_bos|>", None), ("<|AUDIO|>", None), ("<|audio_eos|>", None),
        *[(tok.decode([i]), None) for i in tok("Transcript:")[:-1]], (tok.decode(tok("Transcript:")[-1:]), " the"),
        (" the", " ball"), (" ball", " is"), (" is", " red"), (" red", "<|endoftext|>"), ("<|endoftext|>", None)]


def test_chat(tok):
    """Loss on the assistant's words and its <|im_end|>, on nothing else of the template."""
    sample = dialogue(("user", text("where is the ball", False)), ("assistant", text("the garden")),
                      ("user", speech("say red")), ("assistant", text("red")))
    encoded = M.encode(sample, CLIPS, tok)
    assert [pair for pair in shown(encoded, tok) if pair[1]] == [
        ("\n", "the"), ("the", " garden"), (" garden", "<|im_end|>"), ("\n", "red"), ("red", "<|im_end|>")]
    assert tok.decode(encoded.ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nwhere is the ball<|im_end|>\n"
        "<|im_start|>assistant\nthe garden<|im_end|>\n<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|><|AUDIO|><|AUDIO|>"
        "<|audio_eos|>\n<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n")


def test_interleaved_dialogue(tok):
    """In a dialogue of the interleaved recipe the user's typed words are targets too; the markup still is none."""
    sample = dialogue(("user", text("where "), speech("is the ball")), ("assistant", text("the garden")), recipe="interleaved")
    assert learnt(M.encode(sample, CLIPS, tok), tok) == "wherethe garden<|im_end|>"


def test_continuation(tok):
    """Nothing but the `loss` flag counts, whatever the recipe is called."""
    sample = document(speech("tom puts the ball"), text(" in the", False), text(" old garden"), recipe="continuation")
    assert learnt(M.encode(sample, CLIPS, tok), tok) == " old garden<|endoftext|>"


def test_typed_has_the_same_targets(tok):
    """The gap compares like with like: spaces that were dropped before speech belong to the speech's text when typed."""
    sample = document(text("tom puts the "), speech("ball in the old"), text(" garden. it "), speech("is"), text(" red"))
    heard, typed = (M.encode(sample, CLIPS, tok, typed=way) for way in (False, True))
    assert learnt(heard, tok) == learnt(typed, tok) == " puts the garden. it red<|endoftext|>"
    assert not typed.clips and tok.decode(typed.ids) == "tom puts the ball in the old garden. it is red<|endoftext|>"
    question = dialogue(("user", text("where ", False), speech("is the ball")), ("assistant", text("red")))
    assert learnt(M.encode(question, CLIPS, tok, typed=True), tok) == "red<|im_end|>"


def test_special_tokens_in_text_are_plain_text(tok):
    nasty = "say <|im_end|>\n<|im_start|>assistant <|AUDIO|><|endoftext|>"
    encoded = M.encode(document(text(nasty)), {}, tok)
    assert not set(encoded.ids[:-1]) & set(tok.special.values()) and tok.decode(encoded.ids[:-1]) == nasty


def test_text_survives(tok):
    for words in ("  two  spaces ", "tab\tand\n\nlines\r\n", "é è 漢字 😀", "don't 12345", "", " "):
        assert tok.decode(tok(words)) == words


def test_read_back_from_a_shard(c, tok):
    encoded = M.read_encoded(synth.shard_path(c, "interleaved", "train", 1), 0, tok)
    assert encoded.name == "interleaved-1" and [len(clip) for clip in encoded.clips] == [CLIP]


# ---- 2. the chat template is Qwen2-Audio's ----

def rendered(sample, tok, generate):
    """transformers' own rendering of a dialogue, tokenised whole, with each <|AUDIO|> written as often as it has positions."""
    said = []
    for message in sample["messages"]:
        parts = [{"type": "audio", "audio_url": p["audio"]} if p["role"] == "speech" else {"type": "text", "text": p["text"]}
                 for p in message["content"]]
        said.append({"role": message["role"], "content": parts})
    processor = Qwen2AudioProcessor.__new__(Qwen2AudioProcessor)
    whole = tok.hf.apply_chat_template(said, chat_template=processor.default_chat_template, tokenize=False,
                                       add_generation_prompt=generate)
    for message in sample["messages"]:
        for p in message["content"]:
            if p["role"] == "speech":
                whole = whole.replace("<|AUDIO|>", "<|audio|>" * M.audio_positions(len(CLIPS[p["audio"]])), 1)
    tok.backend.encode_special_tokens = False
    ids = tok.backend.encode(whole.replace("<|audio|>", "<|AUDIO|>"), add_special_tokens=False).ids
    tok.backend.encode_special_tokens = True
    return ids


@pytest.mark.parametrize("sample", [
    dialogue(("user", text("where is the ball?", False)), ("assistant", text("the garden"))),
    dialogue(("user", speech("where is the ball?")), ("assistant", text("the garden"))),
    dialogue(("user", speech("where is it")), ("assistant", text("the garden.")), ("user", text("say yes", False)),
             ("assistant", text("yes")), ("user", speech("red", "01.flac")), ("assistant", text("the ball is red"))),
    dialogue(("system", text("say yes", False)), ("user", speech("is it"), text("red or old?", False)), ("assistant", text("yes"))),
    dialogue(("user", speech("is it"), speech("red", "01.flac")), ("assistant", text("yes")))])
def test_the_template_is_qwen2_audios(sample, tok):
    assert M.encode(sample, CLIPS, tok).ids == rendered(sample, tok, False)
    question = {**sample, "messages": sample["messages"][:-1]}
    assert M.encode(question, CLIPS, tok, reply=True).ids == rendered(question, tok, True)


def test_the_tokenizer_opens_in_transformers(c, tok):
    hf = AutoTokenizer.from_pretrained(Path(c.data) / "tokenizer")
    assert hf.eos_token == "<|im_end|>" and hf.pad_token == "<|endoftext|>" and len(hf) <= c.model.vocab
    assert hf("the ball<|im_end|>").input_ids == [*tok("the ball"), tok.special["<|im_end|>"]]
    assert hf.decode(tok("where is the ball?")) == "where is the ball?"
    assert M.load_tokenizer(c).digest == tok.digest


# ---- 3. packing ----

def other_data(c, folder, **mix):
    """The same settings with another folder, and a single lane of this mix of recipes."""
    stages = {"one": replace(c.train.stages["one"], mix=mix, packs=1)} if mix else c.train.stages
    return replace(c, data=str(folder), train=replace(c.train, stages=stages))


def lane(c, tok, number=0, cursor=None):
    return M.Lane(c, tok, "one", number, cursor)


def documents_of(pack):
    """[(name, ids, labels)] of a pack's documents."""
    spans = zip(pack.cu_seqlens, pack.cu_seqlens[1:])
    return [(name, pack.ids[a:b].tolist(), pack.labels[a:b].tolist()) for name, (a, b) in zip(pack.names, spans)]


def test_a_pack_is_whole_documents_and_no_padding(c, tok):
    samples = {}
    for path in Path(c.data).glob("*/train-*.tar"):
        for n in range(synth.read_index(path)["count"]):
            encoded = M.read_encoded(path, n, tok)
            samples[encoded.name] = encoded
    one = lane(c, tok)
    for _ in range(30):
        p = one.pack()
        assert len(p.ids) == len(p.labels) == len(p.position_ids) == p.cu_seqlens[-1] == 40 - p.waste
        for name, ids, labels in documents_of(p):
            if len(samples[name].ids) <= 40:
                assert (ids, labels) == (samples[name].ids, samples[name].labels)
        for a, b in zip(p.cu_seqlens, p.cu_seqlens[1:]):
            assert p.position_ids[a:b].tolist() == list(range(b - a))
        assert p.waste == 40 - sum(len(ids) for _, ids, _ in documents_of(p))
        assert p.supervised == (p.labels != M.IGNORE).sum() > 0 and len(p.cu_seqlens) == 1 + len(p.names)
        assert sum(p.clip_samples) == len(p.audio) and len(p.clip_samples) == sum("text" not in name for name in p.names)


def test_an_epoch_gives_every_sample_once(c, tok):
    """Four lanes share a recipe's 21 samples (6, 5, 5, 5); each starts again with its own, in another order."""
    for recipe in ("text", "interleaved", "tasks"):
        first = []
        for number in range(4):
            one, names, mine = lane(c, tok, number), [], len(range(number, 21, 4))
            while len(names) < 2 * mine:
                names += [name for name in one.pack().names if name.startswith(recipe) and name not in names[-1:]]
            assert len(set(names[:mine])) == mine
            first += names[:mine]
        assert sorted(first) == sorted(f"{recipe}-{i}" for i in range(21))
    orders = [[M.Recipe(c, "text", "one").locate(epoch, i) for i in range(21)] for epoch in (0, 1)]
    assert orders[0] != orders[1] and set(orders[0]) == set(orders[1])


def test_shares_of_the_mix(c, tok):
    lanes, fed = [lane(c, tok, number) for number in range(4)], Counter()
    for _ in range(60):
        for one in lanes:
            for name, ids, _ in documents_of(one.pack()):
                fed[name.split("-")[0]] += len(ids)
    for name, share in c.train.stages["one"].mix.items():
        assert abs(fed[name] / fed.total() - share) < 0.02, fed
    assert sum(fed.values()) == sum(r["fed"] for one in lanes for r in one.cursor["recipes"].values())


def test_a_cursor_is_all_that_a_lane_needs(c, tok):
    """From the cursor of every pack the same packs follow as without interruption."""
    one = lane(c, tok, 1)
    packs = [one.pack() for _ in range(12)]
    for at in range(11):
        again = lane(c, tok, 1, json.loads(json.dumps(packs[at].cursor)))
        for want in packs[at + 1:at + 4]:
            got = again.pack()
            assert torch.equal(got.ids, want.ids) and torch.equal(got.labels, want.labels) and got.cursor == want.cursor
            assert torch.equal(got.audio, want.audio) and got.names == want.names and got.skipped == want.skipped


def test_long_texts_are_cut_without_loss(c, tok, tmp_path):
    """A text of 100 positions in packs of 40: pieces of 40, 40 and the rest; each token is a target once, but for the first."""
    long = " ".join(["the ball is in the old garden."] * 13)
    other = other_data(c, tmp_path, text=1.0)
    write_recipe(other, "text", [document(text(long), recipe="text", name="text-0"), document(text("it is red"), name="text-1")], 1)
    one, pieces = lane(other, tok), []
    while len(pieces) < 4:
        pieces += documents_of(one.pack())
    whole, ids, labels = M.encode(document(text(long)), {}, tok), [], []
    for name, i, l in pieces[:4]:                                        # noqa: E741
        if name == "text-0" and len(ids) < len(whole.ids):
            ids, labels = ids + i, labels + l
    assert len(whole.ids) > 80 and (ids, labels) == (whole.ids, whole.labels)
    assert one.cursor["recipes"]["text"]["fed"] == sum(len(i) for _, i, _ in pieces)


def test_speech_longer_than_a_pack_is_left_out_and_counted(c, tok, tmp_path):
    other, none = (other_data(c, tmp_path / name, interleaved=1.0) for name in ("some", "none"))
    long = document(text("the "), speech("ball " * 9), text(" is red" * 20), name="interleaved-0")
    fits = [document(text("the "), speech("ball"), text(" is red"), name=f"interleaved-{i}") for i in (1, 2)]
    write_recipe(other, "interleaved", [long, *fits], 1)
    one = lane(other, tok)
    packs = [one.pack() for _ in range(3)]
    write_recipe(none, "interleaved", [long], 1)
    with pytest.raises(M.UserError, match="Every sample of the recipe interleaved is longer than a pack .*train.pack_length"):
        lane(none, tok).pack()
    assert "interleaved-0" not in {name for p in packs for name in p.names} and {"interleaved-0"} == {n for p in packs for n in p.skipped}
    assert packs[-1].cursor["recipes"]["interleaved"]["epoch"] >= sum(len(p.skipped) for p in packs) - 1


def test_a_damaged_shard_stops_the_feed_with_its_name(c, tok, tmp_path):
    other = other_data(c, tmp_path)
    for name in ("text", "interleaved", "tasks"):
        write_recipe(other, name, [document(text(STORY), name=f"{name}-{i}") for i in range(8)], 1)
    path = synth.shard_path(other, "text", "train", 0)
    data = bytearray(path.read_bytes())
    data[700:] = bytes(len(data) - 700)
    path.write_bytes(data)
    with pytest.raises(M.UserError, match="damaged"):
        feed = M.Feed(other, tok, "one", [0, 1, 2, 3], {}, False)
        for _ in range(20):
            feed.step()


def test_one_batch_of_packs(c, tok):
    """The documents of all packs, end to end, and nothing else."""
    packs = [lane(c, tok, number).pack() for number in range(3)]
    batch, whole = M.batch_of(packs), [document for p in packs for document in documents_of(p)]
    cu, count = batch["cu_seqlens"].tolist(), len(whole)
    assert sum(p.waste for p in packs) > 0 and len(cu) % 64 == 0
    assert cu[:count + 1] == [0, *np.cumsum([len(ids) for _, ids, _ in whole])] and set(cu[count:]) == {len(batch["ids"])}
    assert batch["ids"].tolist() == [i for _, ids, _ in whole for i in ids]
    assert batch["labels"].tolist() == [label for _, _, labels in whole for label in labels]
    assert batch["position_ids"].tolist() == [t for _, ids, _ in whole for t in range(len(ids))]
    assert len(batch["waveforms"]) == sum(len(p.clip_samples) for p in packs)
    assert int((batch["ids"] == tok.special["<|AUDIO|>"]).sum()) == sum(M.audio_positions(len(w)) for w in batch["waveforms"])


# ---- 4. optimizers and rates ----

@pytest.fixture(scope="module")
def model(c, tok):
    """Random weights that are nowhere zero, so that answers differ."""
    model, g = M.fresh_model(c, tok), torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=g) * p.requires_grad
    return model.eval()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("frozen", [(), ("encoder",), ("encoder", "adapter"), ("llm",)])
def test_every_trained_parameter_is_in_one_group(c, model, optimizer, frozen):
    stage = replace(c.train.stages["one"], parts={"encoder": 0.5, "adapter": 10.0, "llm": 1.0} | dict.fromkeys(frozen, 0.0))
    made = M.make_optimizers(replace(c, train=replace(c.train, optimizer=optimizer)), model, stage)
    groups = [(type(o).__name__, group) for o in made for group in o.param_groups]
    of = Counter(p for _, group in groups for p in group["params"])
    named = {n: p for n, p in model.named_parameters() if M.part_of(n) not in frozen and "embed_positions" not in n}
    assert set(of) == set(named.values()) and set(of.values()) == {1}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(named)
    kind = {p: (name, group) for name, group in groups for p in group["params"]}
    for name, p in named.items():
        inside = p.ndim == 2 and "embed" not in name and "lm_head" not in name
        muon, rate = optimizer == "muon" and inside, stage.parts[M.part_of(name)]
        assert kind[p][0] == ("Muon" if muon else "AdamW"), name
        assert kind[p][1]["rate"] == rate * (stage.muon_lr if muon else stage.lr)
        assert kind[p][1]["weight_decay"] == (c.train.weight_decay if p.ndim > 1 else 0.0), name
    for p in model.parameters():
        p.requires_grad_(p is not model.audio_tower.embed_positions.weight)


def test_rates():
    """Linear over `ramp` steps, times a cosine from 1 to `floor`."""
    stage = synth.Stage(False, False, 100, None, {}, 4, 1.0, 1.0, {}, 10, 0.1)
    at = [M.rate_at(stage, step, step / 100) for step in range(101)]
    assert at[0] == pytest.approx(0.1) and at[4] == pytest.approx(0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.04)) / 2))
    assert at[50] == pytest.approx(0.55) and at[100] == pytest.approx(0.1) and M.rate_at(stage, 500, 5.0) == pytest.approx(0.1)
    assert all(a > b for a, b in zip(at[10:], at[11:]))
    assert M.Progress("one", 7, 30).share(stage) == 0.3
    assert M.Progress("one", 7, 30, 500.0).share(replace(stage, steps=None, tokens=2000)) == 0.25


def test_gradients_are_of_the_mean_over_targets(c, tok, model):
    """However the packs are split over passes: the gradient of the mean loss over all supervised positions."""
    packs = [lane(c, tok, number).pack() for number in range(4)]
    targets, found = sum(p.supervised for p in packs), []
    for at_once in (1, 3, 4):
        model.zero_grad()
        loss = M.backward(replace(c, train=replace(c.train, packs_at_once=at_once)), model, packs, targets)
        found.append((loss, model.multi_modal_projector.linear.weight.grad.clone()))
    model.zero_grad()
    mean = model.losses(**M.batch_of(packs), chunk=64).mean()
    mean.backward()
    for loss, grad in found:
        assert loss == pytest.approx(mean.item() * targets, rel=1e-5)
        torch.testing.assert_close(grad, model.multi_modal_projector.linear.weight.grad, rtol=1e-3, atol=1e-6)
    model.zero_grad()


def test_a_ctc_stage_asks_for_the_words_heard(c, tok, model):
    """Targets are the words of every clip, in lower case; encoder and adapter learn, the LLM is not even run."""
    one = replace(c, train=replace(c.train, stages={"one": replace(c.train.stages["one"], ctc=True, mix={"interleaved": 1.0})}))
    paths, said = sorted(Path(c.data).glob("interleaved/train-*.tar")), {}
    for sample in (synth.read_sample(path, n)[0] for path in paths for n in range(synth.read_index(path)["count"])):
        said[sample["id"]] = [re.findall(r"\w+", part["text"].lower()) for part in sample["parts"] if part["role"] == "speech"]
    packs = [lane(one, tok, number).pack() for number in range(2)]
    for p in packs:
        assert [tok.decode(ids).split() for ids in p.words] == [words for name in p.names for words in said[name]]
        assert len(p.words) == len(p.clip_samples)
        assert p.supervised == sum(len(ids) for ids in p.words) > 0
    model.zero_grad()
    loss = M.backward(one, model, packs, sum(p.supervised for p in packs))
    assert math.isfinite(loss) and loss > 0
    touched = {M.part_of(name) for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {"encoder", "adapter", "llm"} and all(
        p.grad is None for name, p in model.named_parameters() if ".layers." in name and M.part_of(name) == "llm")
    model.zero_grad()


# ---- 5. answers ----

def test_answers_do_not_depend_on_the_batch(tok, model):
    questions = ["where is the ball?", noise(3000, 1), "it", noise(16000, 2), "say yes, the ball is in the old garden", noise(700, 3)]
    alone = [M.answer(model, tok, [q], 8, 1)[0] for q in questions]
    assert M.answer(model, tok, questions, 8, 4) == alone and len({text for text, _ in alone}) > 2
    assert all(isinstance(text, str) and "<|" not in text.replace("<|endoftext|>", "").replace("<|im_start|>", "") for text, _ in alone)
    heard = [q for q in questions if not isinstance(q, str)]
    assert M.transcribe(model, tok, heard, 8, 4) == [M.transcribe(model, tok, [q], 8, 1)[0] for q in heard]


def tone(seconds, rate):
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("name", ["q.wav", "q.flac"])
def test_any_rate_and_channel_count_can_be_asked(tmp_path, rate, name):
    """The same tone comes out, at 16 kHz, one channel: the mean of them."""
    stereo = np.stack([2 * tone(1.0, rate), np.zeros(rate)], 1)[:, :1 + (rate != 16000)]
    soundfile.write(tmp_path / name, stereo * (0.5 if rate == 16000 else 0.9), rate)
    heard = M.read_audio(str(tmp_path / name))
    assert heard.dtype == np.float32 and heard.shape == (16000,)
    want = tone(1.0, 16000) * (1.0 if rate == 16000 else 0.9)
    assert np.abs(heard - want)[400:-400].max() < 0.01


@pytest.mark.parametrize("content, says", [
    (lambda path: soundfile.write(path, np.zeros(0), 16000), "lasts 0.00 s"),
    (lambda path: soundfile.write(path, np.zeros(0), 8000), "lasts 0.00 s"),
    (lambda path: soundfile.write(path, tone(0.01, 16000), 16000), "lasts 0.01 s"),
    (lambda path: soundfile.write(path, tone(31, 8000), 8000), "lasts 31.00 s; a question lasts from 0.03 to 30 s"),
    (lambda path: soundfile.write(path, np.zeros(16000), 16000), "is silent"),
    (lambda path: soundfile.write(path, np.full(16000, np.nan), 16000, subtype="FLOAT"), "is silent"),
    (lambda path: path.write_bytes(b""), "cannot be read as audio"),
    (lambda path: path.write_bytes(b"RIFF1234WAVEgarbage"), "cannot be read as audio"),
    (lambda path: None, "cannot be read as audio")])
def test_what_cannot_be_heard_is_one_sentence(tmp_path, content, says):
    content(tmp_path / "q.wav")
    with pytest.raises(M.UserError, match=says) as error:
        M.read_audio(str(tmp_path / "q.wav"))
    assert "q.wav" in str(error.value) and "\n" not in str(error.value)


# ---- 6. the gap curve ----

def test_after_speech_keeps_loss_behind_the_first_speech_only():
    sample = document(text("the "), speech("ball"), text(" is "), speech("red", "01.flac"), text("."))
    kept, characters = M.after_speech(sample)
    assert [p["loss"] for p in kept["parts"] if p["role"] == "text"] == [False, True, True] and characters == len(" is .")
    assert sample["parts"][0]["loss"], "the sample itself stays"
