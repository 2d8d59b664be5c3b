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
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

import inserter as M
import synth

ROOT = Path(__file__).parents[1]
TEXT = 60                                    # ids below are text
AUDIO, BOS, EOS = 60, 61, 62
SPACE = 3                                    # near whose row the rows of the audio ids start
LENGTHS = (32000, 32001, 32160, 32161, 479840, 480000)


class Ids:
    """In place of a tokenizer: texts are numbers of tokens, and no token ends an answer unless so chosen."""
    audio, audio_bos, audio_eos = AUDIO, BOS, EOS

    def __init__(self, turn_end: int = 64, end: int = 65):
        self.turn_end = turn_end
        self.end = end

    def __call__(self, text: str) -> list[int]:
        return [SPACE]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


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
        if not name.endswith("embed_positions.weight"):
            is_table = "embed" in name or "lm_head" in name
            p.data *= 0.1 if is_table else 1     # or every token would predict itself
            p.data += 0.15 * torch.randn(p.shape, generator=g)
    return model


def clip(samples: int, seed: int = 0) -> np.ndarray:
    """A clip that starts and ends loud, so that both edges matter, with silence in between."""
    g = torch.Generator().manual_seed(seed + samples)
    waveform = 0.1 * torch.randn(samples, generator=g) * torch.linspace(1, 0.05, samples)
    waveform[samples // 3: samples // 2] = 0
    waveform[-300:] *= 10
    return waveform.numpy()


def text(n: int, seed: int) -> list[int]:
    return torch.randint(0, TEXT, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def encoded(ids: list[int], clips: list[np.ndarray], word_ids: list[list[int]] | None = None) -> M.Encoded:
    """A document without loss."""
    return M.Encoded("", ids, [M.IGNORE] * len(ids), clips, word_ids or [[]] * len(clips))


def document(plan: list[tuple[str, int]], seed: int = 0) -> M.Encoded:
    """[('text', n) or ('clip', samples), …] as ids and clips."""
    ids, clips = [], []
    for i, (kind, n) in enumerate(plan):
        if kind == "text":
            ids += text(n, seed + i)
        else:
            ids += [BOS, *[AUDIO] * M.audio_positions(n), EOS]
            clips.append(clip(n, seed + i))
    return encoded(ids, clips)


def hear(model: M.InSerter, clips: list[np.ndarray]) -> Tensor:
    batch = M.collate([encoded([], clips)], model.mels)
    return model.hear(batch["mel"], batch["frames"])


def hidden(model: M.InSerter, batch: dict[str, Tensor]) -> Tensor:
    return model.hidden(batch["ids"], batch["lengths"], batch["mel"], batch["frames"])


@torch.no_grad()
def logits(model: M.InSerter, documents: list[M.Encoded]) -> list[Tensor]:
    """Ours, as a list with one (n, V) per document."""
    batch = M.collate(documents, model.mels)
    return list(model.language_model.lm_head(hidden(model, batch)).split(batch["lengths"].tolist()))


def features(clips: np.ndarray | list[np.ndarray], mels: int = 80) -> dict:
    extract = WhisperFeatureExtractor(mels)
    return extract(clips, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")


@torch.no_grad()
def theirs(model: PreTrainedModel, documents: list[M.Encoded]) -> list[Tensor]:
    """transformers' logits, documents padded to one batch; clips padded to 30 s as it demands."""
    padded = nn.utils.rnn.pad_sequence([torch.tensor(one.ids) for one in documents], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(one.ids)) for one in documents], batch_first=True)
    clips = [c for one in documents for c in one.clips]
    audio = {}
    if clips:
        found = features(clips)
        frames = found.input_features.to(model.dtype)
        audio = {"input_features": frames, "feature_attention_mask": found.attention_mask}
    out = model(input_ids=padded, attention_mask=mask.long(), **audio).logits
    return [row[:len(one.ids)] for row, one in zip(out, documents)]


def agree(ours: list[Tensor], peers: list[Tensor], tolerance: float = 1e-4) -> None:
    for x, y in zip(ours, peers, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=0)


def four_batches() -> list[list[M.Encoded]]:
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


def test_a_stretch_moves_every_frequency():
    def loudest(hertz, stretch):
        waveform = torch.sin(torch.arange(16000) * 2 * np.pi * hertz / 16000)
        return int(M.log_mel(waveform, 80, stretch).mean(0).argmax())

    for hertz in (1000, 2000, 5000):
        for stretch in (0.88, 0.95, 1.12):
            assert loudest(hertz, stretch) == loudest(hertz * stretch, 1.0)
        assert loudest(hertz, 0.88) < loudest(hertz, 1.0) < loudest(hertz, 1.12)


def test_training_stretches_each_clip_by_a_factor_of_its_own():
    document = M.Encoded("a", [5], [M.IGNORE], [clip(3210), clip(3210)], [[1], [2]])
    plain = M.collate([document], 80)["mel"]
    assert torch.equal(M.collate([document], 80, 0.0, "a")["mel"], plain)
    first, again, second = (M.collate([document], 80, 0.12, seed)["mel"] for seed in "aab")
    assert torch.equal(first, again) and not torch.equal(first, second)
    one, other = first.chunk(2)
    assert not torch.equal(one, other) and torch.equal(*plain.chunk(2))


# --------------------------------------------------------------------------------------------------
# 1. Features and batches
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_is_whispers(mels):
    lengths = (1, 159, 160, 161, 481, 321, 32000, 32001, 32160, 32161, 479680, 479801, 479839, 479840, 479841,
               479999, 480000, 1600)
    for waveform in [*map(clip, lengths), np.zeros(3200, np.float32)]:
        mel = M.log_mel(torch.from_numpy(waveform), mels)
        assert len(mel) == min(math.ceil(len(waveform) / 160) + 2, 3000)
        want = features(waveform, mels).input_features[0].T
        torch.testing.assert_close(mel, want[:len(mel)], atol=1e-4, rtol=0)
        left_out = want[len(mel):]
        assert len(mel) == 3000 or (left_out == want[-1]).all(), "what is not computed is silence"


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 320, 480001])
def test_too_short_or_too_long_is_one_sentence(samples, tiny):
    with pytest.raises(M.UserError, match="cannot be heard"):
        hear(tiny, [clip(16000), np.zeros(samples, np.float32)])


def test_positions_are_the_processors():
    for samples in (321, 480, 481, 960, 961, *LENGTHS):
        frames = int(features(np.zeros(samples)).attention_mask.sum())
        outputs = (frames - 1) // 2 + 1
        assert M.convolved(math.ceil(samples / 160)) == outputs
        assert M.audio_positions(samples) == (outputs - 2) // 2 + 1


def test_a_batch_is_documents_end_to_end():
    first = M.Encoded("a", [5, 6, 7], [M.IGNORE, 7, M.IGNORE], [clip(321), clip(32161)], [[1, 2], []])
    second = M.Encoded("b", [8], [9], [clip(480)], [[3]])
    silent = M.Encoded("c", [4, 4], [4, M.IGNORE], [], [])
    batch = M.collate([first, silent, second], 80)
    assert batch["ids"].tolist() == [5, 6, 7, 4, 4, 8]
    assert batch["labels"].tolist() == [M.IGNORE, 7, M.IGNORE, 4, M.IGNORE, 9]
    assert batch["lengths"].tolist() == [3, 2, 1]
    assert batch["frames"].tolist() == [3, 202, 3]
    assert batch["word_ids"].tolist() == [1, 2, 3]
    assert batch["word_counts"].tolist() == [2, 0, 1]
    slots = [M.slot_of(torch.from_numpy(c), 80) for c in [*first.clips, *second.clips]]
    assert torch.equal(batch["mel"], torch.cat(slots))
    for slot, frames in zip(slots, (3, 202, 3)):
        assert len(slot) % 2 == 0
        assert not slot[[0, *range(frames + 3, len(slot))]].any(), "zeros stand around the frames"
        assert slot[1: frames + 3].any(1).all()

    joined = M.join([M.collate([one], 80) for one in (first, silent, second)])
    assert batch.keys() == joined.keys()
    for name, tensor in batch.items():
        assert torch.equal(tensor, joined[name])
        assert tensor.dtype == (torch.float32 if name == "mel" else torch.int64), name


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
def test_attention_is_the_naive_loop(causal, heads):
    torch.manual_seed(0)
    lengths = torch.tensor([0, 1, 5, 0, 34, 37, 2, 63, 158, 0, 0])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    queries, keys = heads
    inputs = [torch.randn(300, h, 8, requires_grad=True) for h in (queries, keys, keys)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = M.plain_attention(*inputs, cu_seqlens, causal)
    want = naive(*exact, cu_seqlens, causal)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=0)
    assert torch.equal(out, M.packed_attention(lengths, causal, torch.zeros(300, 8), 8)(*inputs))
    weight = torch.randn_like(out)
    out.backward(weight)
    want.backward(weight.double())
    for x, y in zip(inputs, exact):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-5, rtol=0)


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
    for documents in four_batches():
        agree(logits(ours, documents), theirs(model, documents))
    again = M.load_model(tmp_path)
    llm = again.language_model
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == tie
    for name, p in ours.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name


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
    for documents in four_batches():
        agree(logits(ours, documents), theirs(model, documents))


def test_rotary_positions_round_as_transformers_do(monkeypatch):
    """Another order of the same operations differs by 1e-4 radians at position 1000, and it shows."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = M.random_model(config(hidden_size=256, rope_parameters=rope), 1)         # heads of 64
    seen = []

    def run_blocks(blocks, x, recompute, attend, rope):
        seen.append(rope)
        return x

    monkeypatch.setattr(M, "run_blocks", run_blocks)
    model.language_model(torch.zeros(1500, 256), torch.arange(1500), None, False)
    peers = Qwen2RotaryEmbedding(model.config.text_config)(torch.zeros(1), torch.arange(1500)[None])
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


SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 61,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}


def small_llm(family: str, theta: float = 1e4, **settings: object) -> PreTrainedModel:
    """A random LLM of a family, as transformers makes it; every weight shows."""
    settings = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}} | settings
    if family == "qwen3":
        settings["head_dim"] = 16
    torch.manual_seed(4)
    sizes = transformers.AutoConfig.for_model(family, **settings)
    return loud(transformers.AutoModelForCausalLM.from_config(sizes)).eval()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_whisper_and_qwen_joined(tmp_path, tie, shard):
    whisper = small_whisper()
    qwen = small_llm("qwen2", 1e6, tie_word_embeddings=tie).bfloat16()
    for model, name in ((whisper, "w"), (qwen, "q")):
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
    ours = M.join_models(f"{tmp_path}/w", f"{tmp_path}/q", Ids(), 0)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    llm = ours.language_model
    assert llm.lm_head.weight.shape == (63, 24)
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == tie

    qwen.float()
    for table, given in ((llm.model.embed_tokens, qwen.model.embed_tokens), (llm.lm_head, qwen.lm_head)):
        spread = given.weight.std().item()                              # near the space's row, and apart
        apart = table.weight[[AUDIO, BOS, EOS]] - table.weight[SPACE]
        assert 0.05 * spread < apart.std().item() < 0.15 * spread
        assert len(apart.unique(dim=0)) == 3

    documents = [document([("text", 12)], 7), document([("text", 5)], 8)]
    want = [qwen(input_ids=torch.tensor([one.ids])).logits[0, :, :TEXT] for one in documents]
    agree([x[:, :TEXT] for x in logits(ours, documents)], want)

    seen = []                                # what goes into the last norm, ours pooled, Whisper's not
    encoder = whisper.model.encoder
    for norm in (ours.audio_tower.layer_norm, encoder.layer_norm):
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        hear(ours, [clip(480000)])
        encoder(features(clip(480000)).input_features)
    pooled = seen[1][0].unflatten(0, (-1, 2)).mean(1)
    torch.testing.assert_close(seen[0], pooled, atol=1e-4, rtol=0)

    M.save_model(ours, tmp_path)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    agree(logits(ours, four_batches()[0]), theirs(model, four_batches()[0]))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_llm_families(tmp_path, family):
    """Joined, the LLM says what it said; the export keeps the family and opens in transformers."""
    llm = small_llm(family, tie_word_embeddings=family == "llama")
    llm.save_pretrained(tmp_path / "llm")
    small_whisper().save_pretrained(tmp_path / "w")
    ours = M.join_models(f"{tmp_path}/w", f"{tmp_path}/llm", Ids(), 0)
    documents = [document([("text", 200)], 7), document([("text", 5)], 8)]
    want = [llm(input_ids=torch.tensor([one.ids])).logits[0, :, :TEXT] for one in documents]
    agree([x[:, :TEXT] for x in logits(ours, documents)], want)
    M.save_model(ours, tmp_path)
    model, report = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.text_config.model_type == llm.config.model_type
    again = M.load_model(tmp_path)
    for batch in four_batches():
        agree(logits(ours, batch), theirs(model, batch))
        agree(logits(again, batch), logits(ours, batch), tolerance=0)
    answers = M.complete(again, Ids(), prompts(), 5, batch=5)
    assert answers == [reread(again, prompt, 5, Ids()) for prompt in prompts()]


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("family, settings, says", [
    ("llama", {"rope_parameters": YARN}, "yarn"),
    ("llama", {"hidden_act": "gelu"}, "The LLM is a llama"),
    ("mistral", {}, "The LLM is a mistral")])
def test_an_llm_that_ours_cannot_compute_is_named(tmp_path, family, settings, says):
    small_llm(family, **settings).save_pretrained(tmp_path / "llm")
    small_whisper().save_pretrained(tmp_path / "w")
    with pytest.raises(M.UserError, match=says):
        M.join_models(f"{tmp_path}/w", f"{tmp_path}/llm", Ids(), 0)


def test_a_model_that_is_bfloat16_itself_hears():
    """Without autocast: what float32 says, to bfloat16's two digits."""
    ours = loud(M.random_model(config(), 1)).eval()
    documents = [
        document([("text", 5), ("clip", 4000), ("text", 3)]),
        document([("clip", 32161), ("text", 2)], 9)]
    want = torch.cat(logits(ours, documents))
    found = torch.cat(logits(ours.to(torch.bfloat16), documents))
    assert found.dtype == torch.bfloat16
    assert (found.float() - want).norm() < 0.05 * want.norm()


REAL = os.environ.get("REAL_WEIGHTS")


@pytest.mark.skipif(REAL is None, reason="REAL_WEIGHTS names no folder of real checkpoints")
def test_real_weights(tmp_path):
    """Whisper tiny.en and SmolLM2: the LLM says what it said, and transformers opens the export.

    That counts in float64: of logits up to 30, transformers' own in float32 are 1.1e-4 away from it.
    """
    folders = {"encoder": f"{REAL}/whisper-tiny.en", "llm": f"{REAL}/smollm2-135m-instruct"}
    c = synth.load_config([f"model.{key}={folder}" for key, folder in folders.items()])
    tok = M.load_tokenizer(c)
    ours = M.fresh_model(c, tok).eval()
    llm = transformers.AutoModelForCausalLM.from_pretrained(c.model.llm, dtype=torch.float32).eval()
    typed = encoded(tok("The capital of France is Paris, and that of Spain is Madrid."), [])
    with torch.no_grad():
        want = llm(input_ids=torch.tensor([typed.ids])).logits[0]
    agree([logits(ours, [typed])[0][:, :llm.config.vocab_size]], [want])
    (reply,) = M.answer(ours, tok, ["What is the capital of France?"], max_tokens=20, batch=1)
    assert reply == ("The capital of France is Paris.", False)
    M.save_model(ours, tmp_path)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path).double()
    waveform = clip(32161)
    speech = [tok.audio_bos, *[tok.audio] * M.audio_positions(len(waveform)), tok.audio_eos]
    batch = [encoded([*tok("Say "), *speech, *tok(" again.")], [waveform]), typed]
    for x, y in zip(logits(ours, batch), theirs(model, batch)):
        torch.testing.assert_close(x.double(), y, atol=1e-4, rtol=1e-5)


LOAD = """
import sys
import inserter
import test_model
folder = sys.argv[1]
tok = test_model.Ids(turn_end=1, end=2)
model = inserter.load_model(f"{folder}/audio")
inserter.complete(model, tok, test_model.prompts(), 8, 2)
inserter.join_models(f"{folder}/w", f"{folder}/llm", tok, 0)
try:
    inserter.load_model(f"{folder}/lacking")
except inserter.UserError:
    sys.exit(9)
"""


def test_loading_and_answering_say_nothing(tmp_path):
    """No progress bar, no report of tensors that are new or of another size: on no stream a word."""
    model = Qwen2AudioForConditionalGeneration(config())
    model.save_pretrained(tmp_path / "audio", max_shard_size="20KB")
    small_whisper().save_pretrained(tmp_path / "w")
    small_llm("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path / "llm")
    (tmp_path / "lacking").mkdir()
    M.save_model(M.random_model(config(), 1), tmp_path / "lacking")
    damage(tmp_path / "lacking", "other sizes")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
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
    whispers = transformers.models.whisper.modeling_whisper.sinusoids(1500, 16)
    torch.testing.assert_close(first["audio_tower.embed_positions.weight"], whispers / 2)
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
    batch = M.collate([document([("text", 40)], 3)], fresh.mels)
    with torch.no_grad():
        x = fresh.embed(batch["ids"], batch["mel"], batch["frames"])
        fresh.language_model(x, positions, attend, False)
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
        heard = hear(fresh, [clip(16000, 1)])
    read = fresh.language_model.model.embed_tokens.weight.detach()
    for vectors in (heard, read):
        assert float(vectors.norm(dim=1).mean()) == pytest.approx(1, rel=0.2)


# --------------------------------------------------------------------------------------------------
# 4. Damaged checkpoints: an error that synth.run turns into one sentence
# --------------------------------------------------------------------------------------------------

EXPECTED = (M.UserError, OSError, SafetensorError)


def damage(folder: Path, how: str) -> None:
    """Damage a checkpoint in one way."""
    weights = sorted(folder.glob("*.safetensors"))[-1]                  # of several files the last
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "no weights":
            weights.unlink()
        case "cut index":
            index = folder / "model.safetensors.index.json"
            index.write_text(index.read_text()[:-20])
        case "other sizes":
            settings["text_config"]["intermediate_size"] = 41
        case "more layers":
            settings["audio_config"]["encoder_layers"] = 3
        case "fewer layers":
            settings["audio_config"]["encoder_layers"] = 1
        case "fewer LLM layers":
            settings["text_config"] |= {"num_hidden_layers": 1, "layer_types": None}
    path.write_text(json.dumps(settings)[:-1 if how == "not json" else None])
    if how == "no config":
        path.unlink()


@pytest.mark.parametrize("shard, how, says", [
    ("5GB", "truncated", None),
    ("20KB", "truncated", None),
    ("20KB", "cut index", "does not open"),
    ("5GB", "no weights", "safetensors"),
    ("20KB", "no weights", "safetensors"),
    ("5GB", "no config", "config.json"),
    ("5GB", "not json", "config.json"),
    ("5GB", "other sizes", "does not open"),
    ("5GB", "more layers", r"disagree at .*audio_tower.*\.2\."),
    ("5GB", "fewer layers", r"disagree at .*audio_tower.*\.1\."),
    ("5GB", "fewer LLM layers", r"disagree at .*language_model.*\.1\.")])
def test_damaged_checkpoints_are_expected(tmp_path, shard, how, says):
    Qwen2AudioForConditionalGeneration(config()).save_pretrained(tmp_path, max_shard_size=shard)
    damage(tmp_path, how)
    with pytest.raises(EXPECTED, match=says) as error:
        M.load_model(tmp_path)
    assert str(error.value).splitlines()[0].strip()


def test_checkpoints_of_another_kind_are_expected(tmp_path):
    """They are refused by their config.json, before anything is loaded."""
    small_whisper().save_pretrained(tmp_path / "w")
    small_llm("qwen2").save_pretrained(tmp_path / "llm")
    for kind in ("w", "llm"):
        with pytest.raises(EXPECTED, match=f"{kind} does not open .*configuration class"):
            M.load_model(tmp_path / kind)
    with pytest.raises(EXPECTED, match="llm does not open .*configuration class"):
        M.join_models(f"{tmp_path}/llm", f"{tmp_path}/llm", Ids(), 0)
    with pytest.raises(EXPECTED, match="/w: its config.json and its weights disagree"):
        M.join_models(f"{tmp_path}/w", f"{tmp_path}/w", Ids(), 0)


@pytest.mark.parametrize("which", ["w", "llm"])
def test_surplus_weights_of_joined_models_are_expected(tmp_path, which):
    small_whisper().save_pretrained(tmp_path / "w")
    small_llm("qwen2").save_pretrained(tmp_path / "llm")
    path = tmp_path / which / "config.json"
    fewer = {"encoder_layers": 1} if which == "w" else {"num_hidden_layers": 1, "layer_types": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | fewer))
    with pytest.raises(EXPECTED, match=r"disagree at .*layers\.1\."):
        M.join_models(f"{tmp_path}/w", f"{tmp_path}/llm", Ids(), 0)


def test_unknown_names_are_expected(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("runs/no/such/model", "openai/no-such-whisper"):
        with pytest.raises(EXPECTED) as error:
            M.load_model(name)
        assert str(error.value).splitlines()[0].strip()


# --------------------------------------------------------------------------------------------------
# 5. Isolation
# --------------------------------------------------------------------------------------------------

def test_clips_do_not_leak(tiny):
    clips = [clip(n, 1) for n in (32000, 8000, 400, 40001, 33000)]
    counts = [M.audio_positions(len(c)) for c in clips]
    with torch.no_grad():
        before = hear(tiny, clips).split(counts)
        for i in range(len(clips)):
            changed = [10 * c if j == i else c for j, c in enumerate(clips)]
            after = hear(tiny, changed).split(counts)
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert same == [j != i for j in range(len(clips))]


def test_documents_do_not_leak(tiny):
    documents = [
        document([("text", 7)], 0),
        document([("clip", 9000), ("text", 3)], 1),
        document([("text", 30)], 2),
        document([("text", 2), ("clip", 32000), ("text", 9)], 3)]
    before = logits(tiny, documents)
    for i, one in enumerate(documents):
        other = encoded([(t + 1) % TEXT if t < TEXT else t for t in one.ids], one.clips)
        after = logits(tiny, [*documents[:i], other, *documents[i + 1:]])
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [j != i for j in range(len(documents))]


def test_nothing_depends_on_the_future(tiny):
    one = document([("text", 5), ("clip", 9000), ("text", 6)])
    other = encoded([*one.ids[:-1], (one.ids[-1] + 1) % TEXT], one.clips)
    (before,) = logits(tiny, [one])
    (after,) = logits(tiny, [other])
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def test_audio_positions_without_a_vector_are_an_error(tiny):
    one = document([("text", 5), ("clip", 9000)])
    with pytest.raises(IndexError, match=r"indices \(15\) .* \(14\)"):
        logits(tiny, [encoded([*one.ids, AUDIO], one.clips)])


# --------------------------------------------------------------------------------------------------
# 6. The loss
# --------------------------------------------------------------------------------------------------

def labelled_batch() -> dict[str, Tensor]:
    """A third of the positions carry loss."""
    batch = M.collate(four_batches()[0], 80)
    n = len(batch["ids"])
    batch["labels"] = torch.where(torch.tensor(text(n, 11)) < 40, M.IGNORE, torch.tensor(text(n, 12)))
    return batch


def gradients(model: M.InSerter, chunk: int, with_clips: bool = True,
              recompute: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, {parameter: gradient}) of the batch."""
    batch = labelled_batch()
    if not with_clips:
        nothing = M.collate([document([("text", 5)])], 80)
        batch |= {"ids": batch["ids"] % TEXT, "mel": nothing["mel"], "frames": nothing["frames"]}
    model.zero_grad()
    model.recompute = recompute
    loss = model(batch, chunk)
    loss.backward()
    model.recompute = False
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_is_cross_entropy(tiny):
    batch = labelled_batch()
    labels = batch["labels"]
    every = tiny.language_model.lm_head(hidden(tiny, batch))
    want = F.cross_entropy(every, labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(tiny(batch, 7), want)
    one_by_one = F.cross_entropy(every, labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(M.next_token_losses(tiny, batch, 7), one_by_one[labels != -100])
    nothing = tiny(batch | {"labels": torch.full_like(labels, -100)}, 7)
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
    want = tiny(labelled_batch(), 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiny(labelled_batch(), 16)
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


WHOLE_VOCABULARY = tuple(range(64))


@torch.no_grad()
@pytest.mark.parametrize("given, competing", [
    (WHOLE_VOCABULARY, WHOLE_VOCABULARY),
    ((20, 9, 33), (5, 7, 9, 20, 33, AUDIO)),             # the batch's own tokens and the blank compete, too
    ((), (5, 7, 9, AUDIO))])
def test_word_loss_is_the_sum_over_all_alignments(given, competing):
    """CTC against its definition: what is heard, without the LLM's blocks."""
    model = loud(M.random_model(config(), 1))
    clips = [clip(2400, 1), clip(1600, 2), clip(3000, 3), clip(1700, 4)]
    words = [[5, 5], [7], [], [9, 5, 9, 9]]              # the last has more words than vectors
    llm = model.language_model
    nats = 0.0
    for waveform, said in zip(clips[:2], words):
        scores = llm.lm_head(llm.model.norm(hear(model, [waveform]))).double()
        odds = torch.zeros_like(scores)
        odds[:, competing] = scores[:, competing].softmax(1)
        nats -= math.log(probability_of(said, odds))
    batch = M.collate([encoded([], clips, words)], 80)
    classes = torch.tensor(given, dtype=torch.int64)
    assert float(M.word_loss(model, batch, classes)) == pytest.approx(nats, rel=1e-5)
    assert torch.equal(model(batch, 64, classes), M.word_loss(model, batch, classes))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("plan", [[("text", 5)], [("clip", 2400)]])
def test_word_loss_without_clips_or_words_is_zero(tie, plan):
    """Still everything that a CTC stage trains has a gradient, for the other ranks wait for it."""
    model = loud(M.random_model(config(tie_word_embeddings=tie), 1))
    trained = M.freeze(model, synth.Settings({"ctc": True, "lr_scale": {"encoder": 1.0, "adapter": 1.0, "llm": 1.0}}))
    loss = model(M.collate([document(plan)], 80), 64, torch.arange(64))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in trained)


# --------------------------------------------------------------------------------------------------
# 7. Generation
# --------------------------------------------------------------------------------------------------

def prompts() -> list[M.Encoded]:
    plans = [
        [("text", 3)],
        [("text", 2), ("clip", 9000), ("text", 4)],
        [("text", 40)],
        [("text", 1)],
        [("clip", 32161), ("text", 1), ("clip", 3000)]]
    return [document(plan, i) for i, plan in enumerate(plans)]


def reread(model: M.InSerter, prompt: M.Encoded, steps: int, tok: Ids) -> tuple[str, bool]:
    """Generation as it is defined: after every token all of the text is read again."""
    answer = []
    for _ in range(steps):
        (all_logits,) = logits(model, [encoded(prompt.ids + answer, prompt.clips)])
        last = all_logits[-1]
        last[[AUDIO, BOS, EOS]] = -torch.inf
        token = int(last.argmax())
        if token in (tok.turn_end, tok.end):
            return tok.decode(answer), False
        answer.append(token)
    return tok.decode(answer), True


def test_generation_is_rereading(tiny):
    free = M.complete(tiny, Ids(), prompts(), 12, batch=5)
    assert free == [reread(tiny, prompt, 12, Ids()) for prompt in prompts()]
    answers = [[int(i) for i in answer.split()] for answer, _ in free]
    assert len(set(map(tuple, answers))) > 2
    tok = Ids(turn_end=answers[0][2], end=answers[2][5])                # rows finish at different steps
    stopped = M.complete(tiny, tok, prompts(), 12, batch=5)
    assert stopped == [reread(tiny, prompt, 12, tok) for prompt in prompts()]
    assert len({len(answer.split()) for answer, _ in stopped}) > 2
    for batch in (1, 2):
        assert M.complete(tiny, tok, prompts(), 12, batch) == stopped
    assert M.complete(tiny, tok, [], 12, batch=5) == []


def test_one_that_has_stopped_stays_stopped_while_many_go_on(tiny):
    many = [document([("text", 3 + i)], 30 + i) for i in range(8)]
    free = [answer.split() for answer, _ in M.complete(tiny, Ids(), many, 10, batch=8)]
    early = [[i, token] for i, answer in enumerate(free) for token in answer[:3]
             if sum(token in other for other in free) == 1 and len(set(answer)) > 2]
    assert early, "no prompt has a token of its own among its first three"
    for i, token in early:
        stopped = M.complete(tiny, Ids(int(token), int(token)), many, 10, batch=8)
        assert stopped[i] == (" ".join(free[i][:free[i].index(token)]), False)
        assert all(stopped[j] == (" ".join(free[j]), True) for j in range(8) if j != i)


def test_generation_shares_the_models_weights(tiny):
    llm = M.their_llm(tiny)
    own = {p.data_ptr() for p in tiny.language_model.parameters()}
    assert {p.data_ptr() for p in llm.parameters()} == own


def test_audio_ids_are_never_chosen():
    model = M.random_model(config(tie_word_embeddings=False), 1)
    model.language_model.lm_head.weight.data[[AUDIO, BOS, EOS]] *= 100
    for answer, truncated in M.complete(model, Ids(), prompts(), 6, batch=5):
        assert truncated
        assert not {"60", "61", "62"} & set(answer.split())
