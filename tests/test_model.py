"""The model against WhisperFeatureExtractor, Whisper's encoder and transformers' Qwen2-Audio."""
import itertools
import json
import math

import pytest
import torch
from transformers import (Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM,
                          WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration)
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

import inserter as M

torch.set_num_threads(1)
AUDIO, BOS, EOS = 60, 61, 62
TEXT = 60                                                       # ids below are text
LENGTHS = (32000, 32001, 32160, 32161, 479840, 480000)


def config(**text):
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": True, **text}
    return Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 2,
                      "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 80},
        text_config={"model_type": "qwen2", **sizes}, audio_token_index=AUDIO)


def loud(model):
    """Weights large enough that every layer and every bias shows in the logits."""
    g = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data *= 0.1 if "embed" in name or "lm_head" in name else 1      # or every token would predict itself
            p.data += 0.15 * torch.randn(p.shape, generator=g)
    return model


def clip(samples, seed=0):
    """A clip that starts and ends loud, so that both edges matter, with silence in between."""
    g = torch.Generator().manual_seed(seed + samples)
    w = 0.1 * torch.randn(samples, generator=g) * torch.linspace(1, 0.05, samples)
    w[samples // 3: samples // 2] = 0
    w[-300:] *= 10
    return w


def text(n, seed):
    return torch.randint(0, TEXT, (n,), generator=torch.Generator().manual_seed(seed))


def spoken(samples):
    return torch.tensor([BOS] + [AUDIO] * M.audio_positions(samples) + [EOS])


def document(plan, seed=0):
    """[('text', n) or ('clip', samples), …] -> (ids, clips)."""
    pieces = [(text(n, seed + i), None) if kind == "text" else (spoken(n), clip(n, seed + i))
              for i, (kind, n) in enumerate(plan)]
    return torch.cat([p for p, _ in pieces]), [c for _, c in pieces if c is not None]


def pack(documents):
    lengths = torch.tensor([len(ids) for ids, _ in documents])
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return (torch.cat([ids for ids, _ in documents]), M.ragged(lengths)[1], cu,
            [c for _, clips in documents for c in clips])


def logits(model, documents):
    """Ours, as a list with one (n, V) per document."""
    ids, positions, cu, clips = pack(documents)
    with torch.no_grad():
        out = model.language_model.lm_head(model.hidden(ids, positions, cu, clips))
    return list(out.split(cu.diff().tolist()))


def features(clips, n_mels=80):
    return WhisperFeatureExtractor(n_mels)(clips, sampling_rate=16000, return_attention_mask=True,
                                           return_tensors="pt")


def theirs(model, documents):
    """transformers' logits, document by document padded to one batch; clips padded to 30 s as it demands."""
    longest = max(len(ids) for ids, _ in documents)
    ids, mask = torch.zeros(len(documents), longest, dtype=torch.long), torch.zeros(len(documents), longest)
    for row, (d, _) in enumerate(documents):
        ids[row, :len(d)], mask[row, :len(d)] = d, 1
    clips = [c.numpy() for _, cs in documents for c in cs]
    audio = {}
    if clips:
        f = features(clips)
        audio = {"input_features": f.input_features, "feature_attention_mask": f.attention_mask}
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask.long(), **audio).logits
    return [row[:len(d)] for row, (d, _) in zip(out, documents)]


def agree(a, b, tolerance=1e-4):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=0)


def three_batches():
    """Every length, several per batch, typed and interleaved."""
    return [
        [document([("text", 3), ("clip", 32000), ("text", 4), ("clip", 32161), ("text", 2)], 1),
         document([("text", 9)]), document([("clip", 32160), ("clip", 32001)], 3)],
        [document([("clip", 479840), ("text", 5)], 4),
         document([("text", 2), ("clip", 32000), ("text", 3)], 5)],
        [document([("text", 6), ("clip", 480000), ("text", 5), ("clip", 32001)], 6)],
        [document([("text", 12)], 7), document([("text", 5)], 8)],
    ]


@pytest.fixture(scope="module")
def tiny():
    return loud(M.random_model(config(), 1)).eval()


# ---- features ----

@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_is_whispers(n_mels):
    lengths = (1, 159, 160, 161, 481, 321, 32000, 32001, 32160, 32161, 479680, 479801, 479839, 479840, 479841,
               479999, 480000, 1600)
    clips = [clip(n) for n in lengths] + [torch.zeros(3200)]
    ours = M.log_mel(clips, n_mels).split([M.context_frames(len(c)) for c in clips])
    for c, mel in zip(clips, ours):
        want = features(c.numpy(), n_mels).input_features[0].T
        torch.testing.assert_close(mel, want[:len(mel)], atol=1e-4, rtol=0)
        assert len(mel) == 3000 or (want[len(mel):] == want[-1]).all()    # what was not computed is silence


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 320, 480001])
def test_too_short_or_too_long_is_one_sentence(samples, tiny):
    with pytest.raises(M.UserError, match="cannot be heard"):
        tiny.hear([torch.zeros(16000), torch.zeros(samples)])


def test_positions_are_the_processors():
    for samples in (321, 480, 481, 960, 961, *LENGTHS):
        mask = int(features(torch.zeros(samples).numpy()).attention_mask.sum())
        assert M.audio_positions(samples) == (((mask - 1) // 2 + 1) - 2) // 2 + 1


# ---- attention ----

def naive(q, k, v, cu, causal):
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, group = [], q.shape[1] // k.shape[1]
    for a, b in zip(cu.tolist(), cu.tolist()[1:]):
        for h in range(q.shape[1]):
            s = q[a:b, h] @ k[a:b, h // group].T / q.shape[2] ** 0.5
            s = s.masked_fill(torch.ones_like(s).triu(1).bool(), -torch.inf) if causal else s
            out.append(s.softmax(1) @ v[a:b, h // group])
    heads = [out[i:i + q.shape[1]] for i in range(0, len(out), q.shape[1])]
    return torch.cat([torch.stack(h, 1) for h in heads]), (q, k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_is_the_naive_loop(causal, heads):
    torch.manual_seed(0)
    cu = torch.tensor([0, 0, 1, 6, 6, 40, 77, 79, 142, 300, 300, 300], dtype=torch.int32)
    q, k, v = (torch.randn(300, h, 8, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    out = M.attention(q, k, v, cu, causal)
    want, exact = naive(q, k, v, cu, causal)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=0)
    weight = torch.randn_like(out)
    out.backward(weight)
    want.backward(weight.double())
    for x, y in zip((q, k, v), exact):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-5, rtol=0)


def test_tiles_can_be_shared():
    cu = torch.tensor([0, 3, 3, 10, 12], dtype=torch.int32)
    q = torch.randn(12, 2, 4)
    tiles = M.make_tiles(cu, False, "cpu")
    assert torch.equal(M.attention(q, q, q, cu, False), M.attention(q, q, q, cu, False, tiles))


# ---- the model against transformers ----

@pytest.mark.parametrize("tie", [True, False])
def test_ours_opens_in_transformers(tmp_path, tie):
    ours = loud(M.random_model(config(tie_word_embeddings=tie), 1))
    M.save_model(ours, tmp_path)
    model, info = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for documents in three_batches():
        agree(logits(ours, documents), theirs(model, documents))
    again = M.load_model(tmp_path)
    assert (again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight) == tie
    for name, p in ours.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name
    frozen = [n for n, p in again.named_parameters() if not p.requires_grad]
    assert frozen == ["audio_tower.embed_positions.weight"]


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_transformers_opens_in_ours(tmp_path, shard):
    torch.manual_seed(3)
    model = loud(Qwen2AudioForConditionalGeneration(config()).eval())          # says tied, holds two matrices
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours = M.load_model(tmp_path)
    for documents in three_batches():
        agree(logits(ours, documents), theirs(model, documents))


def test_rotary_positions_round_as_transformers_do(tiny, monkeypatch):
    """Another order of the same operations differs by 1e-4 radians at position 1000, and a trained model shows it."""
    seen = []
    monkeypatch.setattr(M, "run_blocks", lambda blocks, x, recompute, rope, attend: seen.append(rope) or x)
    tiny.language_model(torch.zeros(1500, 24), torch.arange(1500), None, False)
    theirs = Qwen2RotaryEmbedding(tiny.config.text_config)(torch.zeros(1), torch.arange(1500)[None])
    for ours, peer in zip(seen[0], theirs):
        assert torch.equal(ours[:, 0], peer[0, :, :ours.shape[-1]])


@pytest.mark.parametrize("tie", [True, False])
def test_whisper_and_qwen_joined(tmp_path, tie):
    torch.manual_seed(4)
    whisper = WhisperForConditionalGeneration(WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=70, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=0)).eval()
    qwen = Qwen2ForCausalLM(Qwen2Config(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, vocab_size=61, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6})).eval()
    loud(whisper).save_pretrained(tmp_path / "w")
    loud(qwen).bfloat16().save_pretrained(tmp_path / "q")
    ours = M.join_models(tmp_path / "w", tmp_path / "q", (AUDIO, BOS, EOS), 0)
    assert ours.language_model.lm_head.weight.shape == (63, 24)
    assert (ours.language_model.lm_head.weight is ours.language_model.model.embed_tokens.weight) == tie

    typed = [document([("text", 12)], 7), document([("text", 5)], 8)]
    want = [qwen.float()(input_ids=ids[None]).logits[0, :, :TEXT] for ids, _ in typed]
    agree([x[:, :TEXT] for x in logits(ours, typed)], want)

    encoder, seen = whisper.model.encoder, []
    ours.audio_tower.layer_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder.layer_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    c = clip(480000)
    with torch.no_grad():
        ours.audio_tower([c], False)
        encoder(features(c.numpy()).input_features)
    torch.testing.assert_close(seen[0], seen[1][0].unflatten(0, (-1, 2)).mean(1), atol=1e-4, rtol=0)

    M.save_model(ours, tmp_path / "out")
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    agree(logits(ours, three_batches()[0]), theirs(model, three_batches()[0]))


def test_random_weights_depend_on_the_seed_alone():
    a = M.random_model(config(), 1).state_dict()
    torch.manual_seed(9)
    b = M.random_model(config(), 1).state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    name = "audio_tower.conv1.weight"
    assert torch.equal(a[name], M.random_model(config(vocab_size=128), 1).state_dict()[name])
    assert not torch.equal(a[name], M.random_model(config(), 2).state_dict()[name])
    from transformers.models.whisper.modeling_whisper import sinusoids
    torch.testing.assert_close(a["audio_tower.embed_positions.weight"], sinusoids(1500, 16) / 2)
    assert a["audio_tower.conv1.weight"].sum((1, 2)).abs().max() < 1e-5 < a["audio_tower.conv1.weight"].abs().min()
    heads = {name: a[f"audio_tower.layers.0.self_attn.{name}_proj.weight"] for name in "qk"}
    assert torch.equal(heads["k"], 2 * heads["q"]) and heads["q"].std() > 0.1


@pytest.mark.parametrize("theta", [100.0, 10000.0])
def test_first_heads_start_by_looking_back(theta):
    """Head h of the first layer gives the token h // 2 + 1 positions back half of its attention, on average; most to it, if theta is small."""
    fresh = M.random_model(config(hidden_size=160, num_attention_heads=5, num_key_value_heads=5,
                                  rope_parameters={"rope_type": "default", "rope_theta": theta}), 1)
    seen = {}

    def attend(q, k, v, layer):
        seen.setdefault(layer, torch.einsum("qhd,khd->hqk", q, k) / 32 ** 0.5)
        return v
    with torch.no_grad():
        positions = torch.arange(40)
        fresh.language_model(fresh.embed(text(40, 3), []), positions, attend, False)
    for head, scores in enumerate(seen[0]):
        late = scores.masked_fill(positions[None] > positions[:, None], -torch.inf)[10:]
        there = positions[10:, None] - 1 - head // 2
        assert late.softmax(1).gather(1, there).mean() > 0.5, head
        assert theta > 100 or (late.argmax(1, keepdim=True) == there).float().mean() > 0.6, head


def test_what_is_heard_starts_as_long_as_an_embedding():
    fresh = M.random_model(config(hidden_size=160), 1)
    with torch.no_grad():
        heard, read = fresh.hear([clip(16000, 1)]), fresh.language_model.model.embed_tokens.weight.detach()
    assert float(heard.norm(dim=1).mean()) == pytest.approx(1, rel=0.2) and float(read.norm(dim=1).mean()) == pytest.approx(1, rel=0.2)


def broken(folder, damage):
    path = folder / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "no weights":
        path.unlink()
    elif damage == "no config":
        (folder / "config.json").unlink()
    else:
        c = json.loads((folder / "config.json").read_text())
        if damage == "other sizes":
            c["text_config"]["intermediate_size"] = 41
        elif damage == "other model":
            c["model_type"] = "llama"
        elif damage == "yarn":
            c["text_config"]["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
        elif damage == "more layers":
            c["audio_config"]["encoder_layers"] = 3
        (folder / "config.json").write_text(json.dumps(c)[:-1 if damage == "not json" else None])


@pytest.mark.parametrize("damage, says", [
    ("truncated", "model.safetensors is missing or damaged"), ("yarn", "plain layers"),
    ("no weights", "model.safetensors is missing or damaged"), ("other model", "describes a llama model"),
    ("no config", "config.json is missing or damaged"), ("not json", "config.json is missing or damaged"),
    ("other sizes", "disagree at .*mlp"), ("more layers", "disagree at audio_tower.layers.2")])
def test_damaged_checkpoints_are_one_sentence(tmp_path, damage, says, tiny):
    M.save_model(tiny, tmp_path)
    broken(tmp_path, damage)
    with pytest.raises(M.UserError, match=says):
        M.load_model(tmp_path)


def test_unknown_names_are_one_sentence(monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("runs/no/such/model", "openai/no-such-whisper"):
        with pytest.raises(M.UserError, match="is not a folder here"):
            M.load_model(name)


# ---- isolation ----

def test_clips_do_not_leak(tiny):
    clips = [clip(n, 1) for n in (32000, 8000, 400, 40001, 33000)]
    counts = [M.audio_positions(len(c)) for c in clips]
    with torch.no_grad():
        before = tiny.hear(clips).split(counts)
        for i in range(len(clips)):
            changed = [10 * c if j == i else c for j, c in enumerate(clips)]
            for j, (a, b) in enumerate(zip(before, tiny.hear(changed).split(counts))):
                assert torch.equal(a, b) == (i != j)


def test_documents_do_not_leak(tiny):
    plans = [[("text", 7)], [("clip", 9000), ("text", 3)], [("text", 30)],
             [("text", 2), ("clip", 32000), ("text", 9)]]
    documents = [document(p, i) for i, p in enumerate(plans)]
    before = logits(tiny, documents)
    for i, (ids, clips) in enumerate(documents):
        other = (torch.where(ids < TEXT, (ids + 1) % TEXT, ids), clips)
        after = logits(tiny, documents[:i] + [other] + documents[i + 1:])
        assert [torch.equal(a, b) for a, b in zip(before, after)] == [j != i for j in range(len(plans))]


def test_nothing_depends_on_the_future(tiny):
    ids, clips = document([("text", 5), ("clip", 9000), ("text", 6)])
    other = ids.clone()
    other[-1] = (ids[-1] + 1) % TEXT
    (a,), (b,) = logits(tiny, [(ids, clips)]), logits(tiny, [(other, clips)])
    assert torch.equal(a[:-1], b[:-1]) and not torch.equal(a[-1], b[-1])


def test_too_many_audio_positions(tiny):
    ids, clips = document([("text", 5), ("clip", 9000)])
    with pytest.raises(ValueError, match="hold 15 .* give 14"):
        tiny.embed(torch.cat([ids, torch.tensor([AUDIO])]), clips)


# ---- loss ----

def batch():
    ids, positions, cu, clips = pack(three_batches()[0])
    labels = torch.where(text(len(ids), 11) < 40, -100, text(len(ids), 12))
    return ids, labels, positions, cu, clips


def gradients(model, chunk, clips=True, recompute=False):
    ids, labels, positions, cu, waveforms = batch()
    if not clips:
        ids, waveforms = ids % TEXT, []
    model.zero_grad()
    model.checkpoint_blocks = recompute
    loss = model(ids, labels, positions, cu, waveforms, chunk)
    loss.backward()
    model.checkpoint_blocks = False
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_loss_is_cross_entropy(tiny):
    ids, labels, positions, cu, clips = batch()
    every = tiny.language_model.lm_head(tiny.hidden(ids, positions, cu, clips))
    want = torch.nn.functional.cross_entropy(every, labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(tiny(ids, labels, positions, cu, clips, 7), want)
    assert len(tiny.losses(ids, labels, positions, cu, clips, 7)) == (labels != -100).sum()
    nothing = tiny(ids, torch.full_like(ids, -100), positions, cu, clips, 7)
    nothing.backward()
    assert nothing == 0


@pytest.mark.parametrize("chunk, recompute", [(1, False), (7, False), (50, True)])
def test_chunks_and_recomputation_change_nothing(tiny, chunk, recompute):
    loss, grads = gradients(tiny, 10 ** 9)
    other, others = gradients(tiny, chunk, recompute=recompute)
    torch.testing.assert_close(loss, other)
    for name in grads:
        torch.testing.assert_close(grads[name], others[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("clips", [True, False])
def test_every_parameter_takes_part(tie, clips):
    model = loud(M.random_model(config(tie_word_embeddings=tie), 1))
    _, grads = gradients(model, 16, clips)                           # .grad of None would raise
    assert all(torch.isfinite(g).all() for g in grads.values())
    silent = {n for n, g in grads.items() if not g.abs().max() > 0}
    assert silent == (set() if clips else {n for n in grads if n.startswith(("audio_tower", "multi_modal"))})


def test_bfloat16_is_close(tiny):
    ids, labels, positions, cu, clips = batch()
    want = tiny(ids, labels, positions, cu, clips, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiny(ids, labels, positions, cu, clips, 16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=0.02, atol=0)


# ---- generation ----

def prompts():
    plans = [[("text", 3)], [("text", 2), ("clip", 9000), ("text", 4)], [("text", 40)], [("text", 1)],
             [("clip", 32161), ("text", 1), ("clip", 3000)]]
    return [document(p, i) for i, p in enumerate(plans)]


def reread(model, ids, clips, steps, stops, banned):
    answer = []
    for _ in range(steps):
        (last,) = logits(model, [(ids, clips)])
        last[-1, banned] = -torch.inf
        token = int(last[-1].argmax())
        if token in stops:
            return answer, False
        answer.append(token)
        ids = torch.cat([ids, torch.tensor([token])])
    return answer, True


def test_generation_is_rereading(tiny):
    banned = [AUDIO, BOS, EOS]
    free = M.generate(tiny, prompts(), 12, [], banned[1:])
    assert free == [reread(tiny, *p, 12, [], banned) for p in prompts()]
    assert len({tuple(a) for a, _ in free}) > 2
    stops = [free[0][0][2], free[2][0][5], free[4][0][0]]                 # rows finish at different steps
    stopped = M.generate(tiny, prompts(), 12, stops, banned[1:])
    assert stopped == [reread(tiny, *p, 12, stops, banned) for p in prompts()]
    assert len({len(a) for a, _ in stopped}) > 2
    for one, p in zip(stopped, prompts()):
        assert M.generate(tiny, [p], 12, stops, banned[1:]) == [one]


def test_audio_ids_are_never_chosen():
    model = M.random_model(config(tie_word_embeddings=False), 1)
    model.language_model.lm_head.weight.data[[AUDIO, BOS, EOS]] *= 100
    for answer, truncated in M.generate(model, prompts(), 6, [], [BOS, EOS]):
        assert truncated and max(answer) != AUDIO and not {AUDIO, BOS, EOS} & set(answer)


# ---- CTC: what is heard, without the LLM ----

def test_word_loss_is_the_sum_over_all_alignments():
    """Against the definition: the probability of a clip's words is that of every way to lay them on its vectors."""
    model, clips, words = loud(M.random_model(config(), 1)), [clip(2400, 1), clip(1600, 2), clip(3000, 3)], [[5, 5], [7], []]
    total = 0.0
    with torch.no_grad():
        for w, ids in zip(clips, words):
            odds = model.language_model.lm_head(model.language_model.model.norm(model.hear([w]))).double().softmax(1)        # (vectors, V)
            kept = sorted({AUDIO, *ids})
            paths = [path for path in itertools.product(kept, repeat=len(odds))
                     if [i for i, _ in itertools.groupby(path) if i != AUDIO] == ids]
            total -= math.log(sum(math.prod(float(odds[t, i]) for t, i in enumerate(path)) for path in paths))
        assert float(model.word_loss(clips, words)) == pytest.approx(total, rel=1e-5)
        assert float(model.word_loss(clips[:1], [[5] * 40])) == 0                      # more words than vectors: left out
        assert math.isfinite(float(model(*[None] * 4, [], 64, [])))                    # a pack without clips
