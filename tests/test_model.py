"""The model against WhisperFeatureExtractor, Whisper's encoder and transformers' Qwen2-Audio."""
import copy
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.whisper.modeling_whisper import sinusoids

import inserter as M
import synth

ROOT = Path(__file__).parents[1]
AUDIO, BOS, EOS = 60, 61, 62
SPACE = 3                                    # whose row the new ones start from
TEXT = 60                                    # ids below are text
LENGTHS = (32000, 32001, 32160, 32161, 479840, 480000)

Document = tuple[Tensor, list[Tensor]]       # ids, clips


def config(**text: object) -> Qwen2AudioConfig:
    """Two small layers of each kind; `text` replaces sizes of the LLM."""
    audio = {
        "model_type": "qwen2_audio_encoder",
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "num_mel_bins": 80}
    sizes = {
        "model_type": "qwen2",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "tie_word_embeddings": True}
    return Qwen2AudioConfig(audio_config=audio, text_config=sizes | text, audio_token_index=AUDIO)


def loud(model: nn.Module) -> nn.Module:
    """Weights large enough that every layer and every bias shows in the logits."""
    g = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_table = "embed" in name or "lm_head" in name
            p.data *= 0.1 if is_table else 1     # or every token would predict itself
            p.data += 0.15 * torch.randn(p.shape, generator=g)
    return model


def clip(samples: int, seed: int = 0) -> Tensor:
    """A clip that starts and ends loud, so that both edges matter, with silence in between."""
    g = torch.Generator().manual_seed(seed + samples)
    waveform = 0.1 * torch.randn(samples, generator=g) * torch.linspace(1, 0.05, samples)
    waveform[samples // 3: samples // 2] = 0
    waveform[-300:] *= 10
    return waveform


def text(n: int, seed: int) -> Tensor:
    return torch.randint(0, TEXT, (n,), generator=torch.Generator().manual_seed(seed))


def spoken(samples: int) -> Tensor:
    return torch.tensor([BOS] + [AUDIO] * M.audio_positions(samples) + [EOS])


def document(plan: list[tuple[str, int]], seed: int = 0) -> Document:
    """[('text', n) or ('clip', samples), …] -> (ids, clips)."""
    ids, clips = [], []
    for i, (kind, n) in enumerate(plan):
        if kind == "text":
            ids.append(text(n, seed + i))
        else:
            ids.append(spoken(n))
            clips.append(clip(n, seed + i))
    return torch.cat(ids), clips


def pack(documents: list[Document]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Documents end to end: ids, position_ids, cu_seqlens, waveforms."""
    lengths = torch.tensor([len(ids) for ids, _ in documents])
    _, position_ids = M.ragged(lengths)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    ids = torch.cat([ids for ids, _ in documents])
    return ids, position_ids, cu_seqlens, [c for _, clips in documents for c in clips]


def logits(model: M.InSerter, documents: list[Document]) -> list[Tensor]:
    """Ours, as a list with one (n, V) per document."""
    ids, position_ids, cu_seqlens, clips = pack(documents)
    with torch.no_grad():
        out = model.language_model.lm_head(model.hidden(ids, position_ids, cu_seqlens, clips))
    return list(out.split(cu_seqlens.diff().tolist()))


def features(clips: np.ndarray | list[np.ndarray], n_mels: int = 80) -> dict:
    extract = WhisperFeatureExtractor(n_mels)
    return extract(clips, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")


def theirs(model: PreTrainedModel, documents: list[Document]) -> list[Tensor]:
    """transformers' logits, document by document padded to one batch; clips padded to 30 s as it demands."""
    longest = max(len(ids) for ids, _ in documents)
    padded = torch.zeros(len(documents), longest, dtype=torch.long)
    mask = torch.zeros(len(documents), longest, dtype=torch.long)
    for row, (ids, _) in enumerate(documents):
        padded[row, :len(ids)] = ids
        mask[row, :len(ids)] = 1
    clips = [c.numpy() for _, some in documents for c in some]
    audio = {}
    if clips:
        found = features(clips)
        audio = {"input_features": found.input_features, "feature_attention_mask": found.attention_mask}
    with torch.no_grad():
        out = model(input_ids=padded, attention_mask=mask, **audio).logits
    return [row[:len(ids)] for row, (ids, _) in zip(out, documents)]


def agree(ours: list[Tensor], peers: list[Tensor], tolerance: float = 1e-4) -> None:
    for x, y in zip(ours, peers, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=0)


def three_batches() -> list[list[Document]]:
    """Every length, several per batch, text alone and interleaved."""
    first = [
        document([("text", 3), ("clip", 32000), ("text", 4), ("clip", 32161), ("text", 2)], 1),
        document([("text", 9)]),
        document([("clip", 32160), ("clip", 32001)], 3)]
    second = [
        document([("clip", 479840), ("text", 5)], 4),
        document([("text", 2), ("clip", 32000), ("text", 3)], 5)]
    third = [document([("text", 6), ("clip", 480000), ("text", 5), ("clip", 32001)], 6)]
    fourth = [document([("text", 12)], 7), document([("text", 5)], 8)]
    return [first, second, third, fourth]


@pytest.fixture(scope="module")
def tiny():
    return loud(M.random_model(config(), 1)).eval()


# --------------------------------------------------------------------------------------------------
# 1. Features
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_is_whispers(n_mels):
    lengths = (1, 159, 160, 161, 481, 321, 32000, 32001, 32160, 32161, 479680, 479801, 479839, 479840, 479841,
               479999, 480000, 1600)
    clips = [*map(clip, lengths), torch.zeros(3200)]
    frames = [M.context_frames(len(c)) for c in clips]
    for c, mel in zip(clips, M.log_mel(clips, n_mels).split(frames)):
        want = features(c.numpy(), n_mels).input_features[0].T
        torch.testing.assert_close(mel, want[:len(mel)], atol=1e-4, rtol=0)
        left_out = want[len(mel):]
        assert len(mel) == 3000 or (left_out == want[-1]).all(), "what is not computed is silence"


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 320, 480001])
def test_too_short_or_too_long_is_one_sentence(samples, tiny):
    with pytest.raises(M.UserError, match="cannot be heard"):
        tiny.hear([torch.zeros(16000), torch.zeros(samples)])


def test_positions_are_the_processors():
    for samples in (321, 480, 481, 960, 961, *LENGTHS):
        frames = int(features(torch.zeros(samples).numpy()).attention_mask.sum())
        convolved = (frames - 1) // 2 + 1
        assert M.convolved(samples) == convolved
        assert M.audio_positions(samples) == (convolved - 2) // 2 + 1


# --------------------------------------------------------------------------------------------------
# 2. Attention
# --------------------------------------------------------------------------------------------------

def naive(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    """The definition, document by document and head by head."""
    group = q.shape[1] // k.shape[1]
    documents = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        heads = []
        for h in range(q.shape[1]):
            scores = q[start:end, h] @ k[start:end, h // group].T / q.shape[2] ** 0.5
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(1) @ v[start:end, h // group])
        documents.append(torch.stack(heads, 1))
    return torch.cat(documents)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("attention", [M.plain_attention, M.bucketed_attention])
def test_attention_is_the_naive_loop(causal, heads, attention):
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 0, 1, 6, 6, 40, 77, 79, 142, 300, 300, 300], dtype=torch.int32)
    queries, keys = heads
    inputs = [torch.randn(300, h, 8, requires_grad=True) for h in (queries, keys, keys)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = attention(*inputs, cu_seqlens, causal)
    want = naive(*exact, cu_seqlens, causal)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=0)
    weight = torch.randn_like(out)
    out.backward(weight)
    want.backward(weight.double())
    for x, y in zip(inputs, exact):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_buckets_can_be_shared(causal):
    cu_seqlens = torch.tensor([0, 3, 3, 10, 12], dtype=torch.int32)
    q = torch.randn(12, 2, 4)
    buckets = M.length_buckets(cu_seqlens, causal, torch.device("cpu"))
    alone = M.bucketed_attention(q, q, q, cu_seqlens, causal)
    assert torch.equal(alone, M.bucketed_attention(q, q, q, cu_seqlens, causal, buckets))


def test_buckets_are_those_of_the_docstring():
    """Lengths 3, 0, 7, 2: three buckets, of one document each."""
    bounds = torch.tensor([0, 3, 3, 10, 12], dtype=torch.int32)
    rows, blocks, back = M.length_buckets(bounds, False, torch.device("cpu"))
    assert blocks == [(1, 3, None), (1, 7, None), (1, 2, None)]
    assert torch.equal(rows[back], torch.arange(12))


# --------------------------------------------------------------------------------------------------
# 3. The model against transformers
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tie", [True, False])
def test_ours_opens_in_transformers(tmp_path, tie):
    ours = loud(M.random_model(config(tie_word_embeddings=tie), 1))
    M.save_model(ours, tmp_path)
    model, report = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for documents in three_batches():
        agree(logits(ours, documents), theirs(model, documents))
    again = M.load_model(tmp_path)
    llm = again.language_model
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == tie
    for name, p in ours.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name
    frozen = [name for name, p in again.named_parameters() if not p.requires_grad]
    assert frozen == ["audio_tower.embed_positions.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_transformers_opens_in_ours(tmp_path, shard, dtype):
    """Saved whole or in several files, in float32 or bfloat16: ours is float32 with the same values."""
    torch.manual_seed(3)
    model = loud(Qwen2AudioForConditionalGeneration(config()).eval())    # says tied, holds two matrices
    for p in model.parameters():
        p.data = p.data.to(dtype).float()
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    several = shard == "20KB"
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == several
    assert (tmp_path / "model.safetensors.index.json").exists() == several
    ours = M.load_model(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert {p.device.type for p in ours.parameters()} == {"cpu"}
    for documents in three_batches():
        agree(logits(ours, documents), theirs(model, documents))


def test_rotary_positions_round_as_transformers_do(tiny, monkeypatch):
    """Another order of the same operations differs by 1e-4 radians at position 1000, and it shows."""
    seen = []

    def run_blocks(blocks, x, recompute, rope, attend):
        seen.append(rope)
        return x

    monkeypatch.setattr(M, "run_blocks", run_blocks)
    tiny.language_model(torch.zeros(1500, 24), torch.arange(1500), None, False)
    peers = Qwen2RotaryEmbedding(tiny.config.text_config)(torch.zeros(1), torch.arange(1500)[None])
    for ours, peer in zip(seen[0], peers, strict=True):
        assert torch.equal(ours[:, 0], peer[0, :, :ours.shape[-1]])


def small_whisper() -> WhisperForConditionalGeneration:
    sizes = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        vocab_size=70,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0)
    return loud(WhisperForConditionalGeneration(sizes).eval())


def small_qwen(tie: bool) -> Qwen2ForCausalLM:
    sizes = Qwen2Config(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        vocab_size=61,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    return loud(Qwen2ForCausalLM(sizes).eval()).bfloat16()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_whisper_and_qwen_joined(tmp_path, tie, shard):
    torch.manual_seed(4)
    whisper = small_whisper()
    qwen = small_qwen(tie)
    for model, name in ((whisper, "w"), (qwen, "q")):
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
    ours = M.join_models(tmp_path / "w", tmp_path / "q", [AUDIO, BOS, EOS], SPACE, 0)
    llm = ours.language_model
    assert llm.lm_head.weight.shape == (63, 24)
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == tie

    table = llm.model.embed_tokens.weight
    new, space = table[[AUDIO, BOS, EOS]], table[SPACE]                 # near the space's row, and apart
    spread = float(qwen.model.embed_tokens.weight.float().std())
    assert 0.05 * spread < float((new - space).std()) < 0.15 * spread and len(new.unique(dim=0)) == 3

    documents = [document([("text", 12)], 7), document([("text", 5)], 8)]
    want = [qwen.float()(input_ids=ids[None]).logits[0, :, :TEXT] for ids, _ in documents]
    agree([x[:, :TEXT] for x in logits(ours, documents)], want)

    seen = []                                # what goes into the last norm, ours pooled, Whisper's not
    encoder = whisper.model.encoder
    for norm in (ours.audio_tower.layer_norm, encoder.layer_norm):
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    waveform = clip(480000)
    with torch.no_grad():
        ours.audio_tower([waveform], False)
        encoder(features(waveform.numpy()).input_features)
    pooled = seen[1][0].unflatten(0, (-1, 2)).mean(1)
    torch.testing.assert_close(seen[0], pooled, atol=1e-4, rtol=0)

    M.save_model(ours, tmp_path / "out")
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    agree(logits(ours, three_batches()[0]), theirs(model, three_batches()[0]))


SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 61,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def small_llm(family):
    """A random LLM of a family, as transformers makes it; every weight shows."""
    plain = {"rope_type": "default", "rope_theta": 1e4}
    configs = {
        "qwen2": lambda: transformers.Qwen2Config(**SIZES, rope_parameters=plain),
        "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16, rope_parameters=plain),
        "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=plain),
        "llama 3": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3)}
    torch.manual_seed(4)
    return loud(transformers.AutoModelForCausalLM.from_config(configs[family]())).eval()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "llama 3"])
def test_llm_families(tmp_path, family):
    """Joined, the LLM says what it said; the export keeps the family and opens in transformers."""
    llm = small_llm(family)
    llm.save_pretrained(tmp_path / "llm")
    small_whisper().save_pretrained(tmp_path / "w")
    ours = M.join_models(tmp_path / "w", tmp_path / "llm", [AUDIO, BOS, EOS], SPACE, 0)
    documents = [document([("text", 200)], 7), document([("text", 5)], 8)]
    want = [llm(input_ids=ids[None]).logits[0, :, :TEXT] for ids, _ in documents]
    agree([x[:, :TEXT] for x in logits(ours, documents)], want)
    M.save_model(ours, tmp_path / "out")
    model, report = Qwen2AudioForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.text_config.model_type == llm.config.model_type
    again = M.load_model(tmp_path / "out")
    for batch in three_batches():
        agree(logits(ours, batch), theirs(model, batch))
        agree(logits(again, batch), logits(ours, batch), tolerance=0)


@pytest.mark.parametrize("family, change, says", [
    ("qwen3", {"attention_bias": True}, "biases in the LLM's attention"),
    ("llama", {"mlp_bias": True}, "biases in the LLM's feed-forward"),
    ("llama", {"hidden_act": "gelu"}, "the activation gelu in the LLM"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "the type yarn"),
    ("llama", {"model_type": "mistral"}, "a mistral model where qwen2 or qwen3 or llama is needed")])
def test_what_an_llm_has_and_we_lack_is_named(tmp_path, family, change, says):
    small_llm(family).save_pretrained(tmp_path / "llm")
    small_whisper().save_pretrained(tmp_path / "w")
    path = tmp_path / "llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(M.UserError, match=says):
        M.join_models(tmp_path / "w", tmp_path / "llm", [AUDIO, BOS, EOS], SPACE, 0)


def test_a_model_that_is_bfloat16_itself_hears():
    """As bench.precision makes it, without autocast: what float32 says, to bfloat16's two digits."""
    ours = loud(M.random_model(config(), 1)).eval()
    documents = [document([("text", 5), ("clip", 4000), ("text", 3)]), document([("clip", 32161), ("text", 2)], 9)]
    want = torch.cat(logits(ours, documents))
    found = torch.cat(logits(ours.to(torch.bfloat16), documents))
    assert found.dtype == torch.bfloat16
    assert (found.float() - want).norm() < 0.05 * want.norm()


REAL = os.environ.get("REAL_WEIGHTS")


@pytest.mark.skipif(REAL is None, reason="REAL_WEIGHTS names no folder of real checkpoints")
def test_real_weights(tmp_path):
    """Whisper tiny.en and SmolLM2: the LLM says what it said, and transformers opens the export."""
    folders = {"encoder": f"{REAL}/whisper-tiny.en", "llm": f"{REAL}/smollm2-135m-instruct"}
    c = synth.load_config([f"model.{key}={folder}" for key, folder in folders.items()])
    tok = M.load_tokenizer(c)
    ours = M.fresh_model(c, tok).eval()
    llm = transformers.AutoModelForCausalLM.from_pretrained(c.model.llm, dtype=torch.float32).eval()
    known = llm.config.vocab_size
    ids = torch.tensor(tok("The capital of France is Paris, and that of Spain is Madrid."))
    with torch.no_grad():
        want = llm(input_ids=ids[None]).logits[0]
    agree([logits(ours, [(ids, [])])[0][:, :known]], [want])
    M.save_model(ours, tmp_path)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path)
    waveform = clip(32161)
    heard = [tok.audio] * M.audio_positions(len(waveform))
    speech = [tok.audio_bos, *heard, tok.audio_eos]
    spoken = torch.tensor([*tok("Say "), *speech, *tok(" again.")])
    batch = [(spoken, [waveform]), (ids, [])]
    for x, y in zip(logits(ours, batch), theirs(model, batch)):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-5)          # of logits up to 30: float32 has no more


LOAD = """
import sys
import inserter
folder, lacking = sys.argv[1:]
inserter.load_model(f"{folder}/audio")
inserter.join_models(f"{folder}/w", f"{folder}/q", [60, 61, 62], 5, 0)
try:
    inserter.load_model(lacking)
except inserter.UserError:
    sys.exit(9)
"""


def test_loading_says_nothing(tmp_path):
    """No progress bar, no report of tensors that are new, surplus or of another size: on no stream a word."""
    model = Qwen2AudioForConditionalGeneration(config())
    model.save_pretrained(tmp_path / "audio", max_shard_size="20KB")
    small_whisper().save_pretrained(tmp_path / "w")
    small_qwen(tie=True).save_pretrained(tmp_path / "q")
    M.save_model(M.random_model(config(), 1), tmp_path / "lacking")
    damage(tmp_path / "lacking", "other sizes")
    command = [sys.executable, "-c", LOAD, str(tmp_path), str(tmp_path / "lacking")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (9, "", "")


def test_random_weights_depend_on_the_seed_alone():
    first = M.random_model(config(), 1).state_dict()
    torch.manual_seed(9)
    again = M.random_model(config(), 1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "audio_tower.conv1.weight"
    wider = M.random_model(config(vocab_size=128), 1).state_dict()
    other = M.random_model(config(), 2).state_dict()
    assert torch.equal(first[name], wider[name])
    assert not torch.equal(first[name], other[name])
    torch.testing.assert_close(first["audio_tower.embed_positions.weight"], sinusoids(1500, 16) / 2)
    assert first[name].sum((1, 2)).abs().max() < 1e-5 < first[name].abs().min()
    attention = "audio_tower.layers.0.self_attn"
    queries = first[f"{attention}.q_proj.weight"]
    assert torch.equal(first[f"{attention}.k_proj.weight"], 2 * queries)
    assert queries.std() > 0.1


@pytest.mark.parametrize("theta", [100.0, 10000.0])
def test_first_heads_start_by_looking_back(theta):
    """Head h of the first layer gives the token h // 2 + 1 positions back half of its attention, on average.

    If theta is small, it gives it the most.
    """
    fresh = M.random_model(config(hidden_size=160, num_attention_heads=5, num_key_value_heads=5,
                                  rope_parameters={"rope_type": "default", "rope_theta": theta}), 1)
    seen = []

    def attend(q, k, v):
        seen.append(torch.einsum("qhd,khd->hqk", q, k) / 32 ** 0.5)
        return v

    positions = torch.arange(40)
    with torch.no_grad():
        fresh.language_model(fresh.embed(text(40, 3), []), positions, attend, False)
    is_future = positions[None] > positions[:, None]
    for head, scores in enumerate(seen[0]):
        late = scores.masked_fill(is_future, -torch.inf)[10:]
        there = positions[10:, None] - 1 - head // 2
        assert late.softmax(1).gather(1, there).mean() > 0.5, head
        most = (late.argmax(1, keepdim=True) == there).float().mean()
        assert theta > 100 or most > 0.6, head


def test_what_is_heard_starts_as_long_as_an_embedding():
    fresh = M.random_model(config(hidden_size=160), 1)
    with torch.no_grad():
        heard = fresh.hear([clip(16000, 1)])
    read = fresh.language_model.model.embed_tokens.weight.detach()
    for vectors in (heard, read):
        assert float(vectors.norm(dim=1).mean()) == pytest.approx(1, rel=0.2)


# --------------------------------------------------------------------------------------------------
# 4. Damaged checkpoints
# --------------------------------------------------------------------------------------------------

def damage(folder: Path, how: str) -> None:
    """Damage a checkpoint in one way."""
    weights = folder / "model.safetensors"
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    text = settings["text_config"]
    audio = settings["audio_config"]
    cut = None
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "no weights":
            weights.unlink()
        case "not json":
            cut = -1
        case "other sizes":
            text["intermediate_size"] = 41
        case "other model":
            settings["model_type"] = "llama"
        case "yarn":
            text["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
        case "more layers":
            audio["encoder_layers"] = 3
        case "fewer layers":
            audio["encoder_layers"] = 1
        case "fewer LLM layers":
            text["num_hidden_layers"] = 1
            text.pop("layer_types", None)
    path.write_text(json.dumps(settings)[:cut])
    if how == "no config":
        path.unlink()


@pytest.mark.parametrize("how, says", [
    ("truncated", "model.safetensors is missing or damaged"),
    ("no weights", "model.safetensors is missing or damaged"),
    ("no config", "config.json is missing or damaged"),
    ("not json", "config.json is missing or damaged"),
    ("other model", "describes a llama model"),
    ("yarn", "rotary positions of the type yarn"),
    ("other sizes", "disagree at .*mlp"),
    ("more layers", "disagree at audio_tower.layers.2"),
    ("fewer layers", r"disagree at .*layers\.1\."),
    ("fewer LLM layers", r"disagree at .*layers\.1\.")])
def test_damaged_checkpoints_are_one_sentence(tmp_path, how, says, tiny):
    M.save_model(tiny, tmp_path)
    damage(tmp_path, how)
    with pytest.raises(M.UserError, match=says) as error:
        M.load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how, says", [
    ("truncated", "missing or damaged"),
    ("no weights", "missing or damaged"),
    ("cut index", "missing or damaged")])
def test_damage_to_one_file_of_several_is_one_sentence(tmp_path, how, says):
    Qwen2AudioForConditionalGeneration(config()).save_pretrained(tmp_path, max_shard_size="20KB")
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    index = tmp_path / "model.safetensors.index.json"
    if how == "truncated":
        second.write_bytes(second.read_bytes()[:-10])
    elif how == "no weights":
        second.unlink()
    else:
        index.write_text(index.read_text()[:-20])
    with pytest.raises(M.UserError, match=says) as error:
        M.load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("which", ["w", "q"])
def test_surplus_weights_of_joined_models_are_one_sentence(tmp_path, which):
    small_whisper().save_pretrained(tmp_path / "w")
    small_qwen(tie=True).save_pretrained(tmp_path / "q")
    path = tmp_path / which / "config.json"
    settings = json.loads(path.read_text())
    settings["encoder_layers" if which == "w" else "num_hidden_layers"] = 1
    settings.pop("layer_types", None)
    path.write_text(json.dumps(settings))
    with pytest.raises(M.UserError, match=r"disagree at .*layers\.1\."):
        M.join_models(tmp_path / "w", tmp_path / "q", [AUDIO, BOS, EOS], SPACE, 0)


def test_unknown_names_are_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("runs/no/such/model", "openai/no-such-whisper"):
        with pytest.raises(M.UserError, match="is not a folder here"):
            M.load_model(name)


# --------------------------------------------------------------------------------------------------
# 5. Isolation
# --------------------------------------------------------------------------------------------------

def test_clips_do_not_leak(tiny):
    clips = [clip(n, 1) for n in (32000, 8000, 400, 40001, 33000)]
    counts = [M.audio_positions(len(c)) for c in clips]
    with torch.no_grad():
        before = tiny.hear(clips).split(counts)
        for i in range(len(clips)):
            changed = [10 * c if j == i else c for j, c in enumerate(clips)]
            after = tiny.hear(changed).split(counts)
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert same == [j != i for j in range(len(clips))]


def test_documents_do_not_leak(tiny):
    documents = [
        document([("text", 7)], 0),
        document([("clip", 9000), ("text", 3)], 1),
        document([("text", 30)], 2),
        document([("text", 2), ("clip", 32000), ("text", 9)], 3)]
    before = logits(tiny, documents)
    for i, (ids, clips) in enumerate(documents):
        other = (torch.where(ids < TEXT, (ids + 1) % TEXT, ids), clips)
        after = logits(tiny, [*documents[:i], other, *documents[i + 1:]])
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [j != i for j in range(len(documents))]


def test_nothing_depends_on_the_future(tiny):
    ids, clips = document([("text", 5), ("clip", 9000), ("text", 6)])
    other = ids.clone()
    other[-1] = (ids[-1] + 1) % TEXT
    (before,) = logits(tiny, [(ids, clips)])
    (after,) = logits(tiny, [(other, clips)])
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def test_too_many_audio_positions(tiny):
    ids, clips = document([("text", 5), ("clip", 9000)])
    with pytest.raises(ValueError, match="hold 15 .* give 14"):
        tiny.embed(torch.cat([ids, torch.tensor([AUDIO])]), clips)


# --------------------------------------------------------------------------------------------------
# 6. The loss
# --------------------------------------------------------------------------------------------------

def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    ids, position_ids, cu_seqlens, clips = pack(three_batches()[0])
    labels = torch.where(text(len(ids), 11) < 40, M.IGNORE, text(len(ids), 12))
    return ids, labels, position_ids, cu_seqlens, clips


def gradients(model: M.InSerter, chunk: int, with_clips: bool = True,
              recompute: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, {parameter: gradient}) of the batch."""
    ids, labels, position_ids, cu_seqlens, clips = batch()
    if not with_clips:
        ids = ids % TEXT
        clips = []
    model.zero_grad()
    model.recompute = recompute
    loss = model(ids, labels, position_ids, cu_seqlens, clips, chunk)
    loss.backward()
    model.recompute = False
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), {name: p.grad.clone() for name, p in trained.items()}


def test_loss_is_cross_entropy(tiny):
    ids, labels, position_ids, cu_seqlens, clips = batch()
    every = tiny.language_model.lm_head(tiny.hidden(ids, position_ids, cu_seqlens, clips))
    want = F.cross_entropy(every, labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(tiny(ids, labels, position_ids, cu_seqlens, clips, 7), want)
    losses = M.next_token_losses(tiny, ids, labels, position_ids, cu_seqlens, clips, 7)
    one_by_one = F.cross_entropy(every, labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses, one_by_one[labels != -100])
    nothing = tiny(ids, torch.full_like(ids, -100), position_ids, cu_seqlens, clips, 7)
    nothing.backward()
    assert nothing == 0


@pytest.mark.parametrize("chunk, recompute", [(1, False), (7, False), (50, True)])
def test_chunks_and_recomputation_change_nothing(tiny, chunk, recompute):
    loss, wanted = gradients(tiny, 10 ** 9)
    other, found = gradients(tiny, chunk, recompute=recompute)
    torch.testing.assert_close(loss, other)
    for name in wanted:
        torch.testing.assert_close(wanted[name], found[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("with_clips", [True, False])
def test_every_parameter_takes_part(tie, with_clips):
    model = loud(M.random_model(config(tie_word_embeddings=tie), 1))
    _, found = gradients(model, 16, with_clips)          # .grad of None would raise
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    silent = {name for name, gradient in found.items() if not gradient.abs().max() > 0}
    hearing = {name for name in found if name.startswith(("audio_tower", "multi_modal"))}
    assert silent == (set() if with_clips else hearing)


def test_bfloat16_is_close(tiny):
    ids, labels, position_ids, cu_seqlens, clips = batch()
    want = tiny(ids, labels, position_ids, cu_seqlens, clips, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiny(ids, labels, position_ids, cu_seqlens, clips, 16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=0.02, atol=0)


def probability_of(words: list[int], odds: Tensor) -> float:
    """Of all ways together in which the words can lie on a clip's vectors; odds (vectors, V)."""
    total = 0.0
    for path in itertools.product(sorted({AUDIO, *words}), repeat=len(odds)):
        said = [token for token, _ in itertools.groupby(path) if token != AUDIO]
        if said == words:
            total += math.prod(float(odds[t, token]) for t, token in enumerate(path))
    return total


def test_word_loss_is_the_sum_over_all_alignments():
    """CTC against its definition: what is heard, without the LLM's blocks."""
    model = loud(M.random_model(config(), 1))
    clips = [clip(2400, 1), clip(1600, 2), clip(3000, 3)]
    words = [[5, 5], [7], []]
    llm = model.language_model
    with torch.no_grad():
        nats = 0.0
        for waveform, said in zip(clips, words):
            odds = llm.lm_head(llm.model.norm(model.hear([waveform]))).double().softmax(1)
            nats -= math.log(probability_of(said, odds))
        assert float(M.word_loss(model, clips, words)) == pytest.approx(nats, rel=1e-5)
        too_many = [[5] * 40]                # more words than vectors: left out
        assert float(M.word_loss(model, clips[:1], too_many)) == 0
        no_clips = model(*[None] * 4, waveforms=[], chunk=64, word_ids=[])
        assert math.isfinite(float(no_clips))


def test_word_loss_over_sampled_classes_is_the_loss_over_these_tokens():
    """The batch's own tokens, the blank and the given ones compete; over the whole vocabulary it is the plain loss."""
    model = loud(M.random_model(config(), 1))
    clips, words, given = [clip(2400, 1), clip(1600, 2)], [[9, 5], [7]], [20, 9, 33]
    llm = model.language_model
    classes = sorted({*given, 9, 5, 7, AUDIO})
    with torch.no_grad():
        nats = 0.0
        for waveform, said in zip(clips, words):
            scores = llm.lm_head(llm.model.norm(model.hear([waveform]))).double()
            odds = torch.zeros_like(scores)
            odds[:, classes] = scores[:, classes].softmax(1)
            nats -= math.log(probability_of(said, odds))
        assert float(M.word_loss(model, clips, words, torch.tensor(given))) == pytest.approx(nats, rel=1e-5)
        whole = M.word_loss(model, clips, words, torch.arange(len(llm.lm_head.weight)))
        torch.testing.assert_close(whole, M.word_loss(model, clips, words), rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------------
# 7. Generation
# --------------------------------------------------------------------------------------------------

def prompts() -> list[Document]:
    plans = [
        [("text", 3)],
        [("text", 2), ("clip", 9000), ("text", 4)],
        [("text", 40)],
        [("text", 1)],
        [("clip", 32161), ("text", 1), ("clip", 3000)]]
    return [document(plan, i) for i, plan in enumerate(plans)]


def reread(model: M.InSerter, prompt: Document, steps: int, stops: list[int],
           banned: list[int]) -> tuple[list[int], bool]:
    """Generation as it is defined: after every token all of the text is read again."""
    ids, clips = prompt
    answer = []
    for _ in range(steps):
        (all_logits,) = logits(model, [(ids, clips)])
        last = all_logits[-1]
        last[banned] = -torch.inf
        token = int(last.argmax())
        if token in stops:
            return answer, False
        answer.append(token)
        ids = torch.cat([ids, torch.tensor([token])])
    return answer, True


def test_generation_is_rereading(tiny):
    banned = [AUDIO, BOS, EOS]
    free = M.generate(tiny, prompts(), 12, [], banned[1:])
    assert free == [reread(tiny, prompt, 12, [], banned) for prompt in prompts()]
    answers = [answer for answer, _ in free]
    assert len(set(map(tuple, answers))) > 2
    stops = [answers[0][2], answers[2][5], answers[4][0]]                # rows finish at different steps
    stopped = M.generate(tiny, prompts(), 12, stops, banned[1:])
    assert stopped == [reread(tiny, prompt, 12, stops, banned) for prompt in prompts()]
    assert len({len(answer) for answer, _ in stopped}) > 2
    for one, prompt in zip(stopped, prompts()):
        assert M.generate(tiny, [prompt], 12, stops, banned[1:]) == [one]


def test_one_that_has_stopped_stays_stopped_while_many_go_on(tiny):
    """The finished leave the cache in groups: one of eight is still computed, and must not speak again."""
    many = [document([("text", 3 + i)], 30 + i) for i in range(8)]
    free = [answer for answer, _ in M.generate(tiny, many, 10, [], [])]
    early = [[i, token] for i, answer in enumerate(free) for token in answer[:3]
             if sum(token in other for other in free) == 1 and len(set(answer)) > 2]
    assert early, "no prompt has a token of its own among its first three"
    for i, token in early:
        stopped = M.generate(tiny, many, 10, [token], [])
        assert stopped[i] == (free[i][:free[i].index(token)], False)
        assert all(stopped[j] == (free[j], True) for j in range(8) if j != i)


def test_audio_ids_are_never_chosen():
    model = M.random_model(config(tie_word_embeddings=False), 1)
    model.language_model.lm_head.weight.data[[AUDIO, BOS, EOS]] *= 100
    for answer, truncated in M.generate(model, prompts(), 6, [], [BOS, EOS]):
        assert truncated
        assert not {AUDIO, BOS, EOS} & set(answer)
