"""InSerter: a speech LLM (encoder, adapter, LLM) trained on text in which random segments are speech.

One interleaved sample becomes one sequence. `ids` is what the model reads; under each id stands its label,
the token to be predicted there, or - where there is no loss:

    parts    text "tom puts the "    speech, 1.62 s                                text ". it is red"
    ids      tom   puts  the         <|audio_bos|> <|AUDIO|> x 40 <|audio_eos|>    .   it  is   red  <end>
    labels   puts  the   -           -             -              .                it  is  red  <end>  -

Speech is conditioned on and never predicted; the text after it is, from its first token on. The label of that
token stands at <|audio_eos|>: to get it right, the model has to use what it has heard. That is the method.

Samples are packed end to end, without padding; attention stays inside a sample:

    log-mel frames ── Encoder ── Adapter ──┐ one vector per 40 ms, put in place of each <|AUDIO|>
    ids (T,) ──────── embeddings ──────────┴── LLM ── LM head at the labelled positions ── loss

A run is a few stages. Where encoder and LLM do not know each other yet, they first learn to hear: by CTC on
the clips' words, then by transcription. Then comes the pre-training above, then fine-tuning on dialogues.

    torchrun inserter.py                                  train: the stages that config.yaml lists
    torchrun --nproc-per-node=4 inserter.py profile=qwen  on four GPUs
    python inserter.py ask=assets/question.flac           answer a spoken question
    python inserter.py ask="what colour is the sun"       or a typed one

Legend  T positions of a pack   d width   Hq, Hkv query and key-value heads   D head size   V vocabulary
        N frames of a clip   L its convolution outputs   G packs of a step   B prompts being answered

Names: `c` is all settings, `stage` those of a stage, `tok` the Tokenizer, `sample` as
in synth.py, `clips` the waveforms {part's "audio": (samples,) float32 at 16 kHz}, `batch` as in section 2.
"""

import contextlib
import dataclasses
import datetime
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path
from random import Random

import numpy as np
import soundfile
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2AudioConfig
from transformers.audio_utils import mel_filter_bank

import synth
from synth import RATE, Settings, UserError

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:                          # it comes with torch on Linux; elsewhere attention is plain
    triton = None

ASSETS = Path(__file__).with_name("assets")
HOP = 160                                    # samples between log-mel frames: 10 ms
LONGEST = 30 * RATE                          # samples of the longest clip that Whisper's positions cover
MAX_FRAMES = LONGEST // HOP                  # 3000
IGNORE = -100                                # label of a position without loss, as in PyTorch's cross_entropy


# --------------------------------------------------------------------------------------------------
# 1. One sample: its ids and its labels
#
# The only place that knows special tokens, the markup of dialogues (ChatML, as Qwen and SmolLM2 have it) and
# the loss mask. Ids and labels are made together, so they cannot drift apart.
# --------------------------------------------------------------------------------------------------

AUDIO, AUDIO_BOS, AUDIO_EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"         # Qwen2-Audio's
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
END = "<|endoftext|>"                        # of a document
SYSTEM = {"role": "system", "content": [synth.text_part("You are a helpful assistant.", loss=False)]}


def convolved(frames):
    """L: the outputs of the encoder's two convolutions for a clip of N frames, one per 20 ms."""
    return (frames - 1) // 2 + 1


def audio_positions(samples):
    """Positions that a clip of so many samples takes in the LLM's sequence: one per 40 ms.

    Frames of 10 ms are halved by the encoder's second convolution, and again by pooling.

    >>> [audio_positions(n) for n in (160, 320, 321, 32000, 32161, 480000)]
    [0, 0, 1, 50, 50, 750]
    """
    return convolved(math.ceil(samples / HOP)) // 2


class Tokenizer:
    """Text to ids, piece by piece. Special tokens that occur inside a text are read as plain text."""

    def __init__(self, hf):
        self.hf = hf
        self.backend = hf.backend_tokenizer
        self.backend.encode_special_tokens = True
        for name in (TURN, TURN_END, END):
            if name not in hf.get_vocab():
                raise UserError(f"The tokenizer of {hf.name_or_path} has no {name}, so it does not write "
                                "dialogues in ChatML; take a Qwen2, Qwen2.5, Qwen3 or SmolLM2.")
        names = [AUDIO, AUDIO_BOS, AUDIO_EOS, TURN, TURN_END, END]
        self.audio, self.audio_bos, self.audio_eos, self.turn, self.turn_end, self.end = (
            hf.convert_tokens_to_ids(names))
        hf.chat_template = (ASSETS / "chat_template.jinja").read_text("utf-8")      # for exports

    def __call__(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.backend.decode(ids, skip_special_tokens=False)


@dataclasses.dataclass
class Encoded:
    """One sample: ids and labels (n,), and its clips; labels[t] is the token after position t, or IGNORE."""
    name: str
    ids: list[int]
    labels: list[int]
    clips: list[np.ndarray]                  # (samples,) float32 at 16 kHz each
    word_ids: list[list[int]]                # the tokens of each clip's words: the targets of a CTC stage


def encode(sample, clips, tok, typed=False, reply=False):
    """Turn a sample (see synth.py) into ids and labels.

    clips: the waveform of each speech part's "audio", (samples,) at 16 kHz
    typed: read every speech part as its text instead (what the gap curve of section 9 is measured against)
    reply: end with the opening of the assistant's turn, for generation

    The text parts say whether they are targets. Of the markup two tokens are: the <|im_end|> of an
    assistant's turn, and the <|endoftext|> that ends a document. The audio tokens never are.

    {"parts": [text "hi ", speech of 2 positions, text " you"]}, loss on both texts, gives
        ids     hi  <|audio_bos|>  <|AUDIO|>  <|AUDIO|>  <|audio_eos|>   you           <|endoftext|>
        labels  -   -              -          -           you            <|endoftext|>  -
    """
    ids = []
    is_target = []
    spoken = []

    def put(tokens, loss=False):
        ids.extend(tokens)
        is_target.extend([loss] * len(tokens))

    def put_parts(parts, in_dialogue):
        for part, text in spaces_moved(parts):
            if part["role"] == "text":
                put(tok(text), part["loss"])
            elif typed:
                put(tok(text))
            else:
                spoken.append(part)
                positions = audio_positions(len(clips[part["audio"]]))
                speech = [tok.audio_bos, *[tok.audio] * positions, tok.audio_eos]
                if in_dialogue:              # Qwen2-Audio numbers the clips of a dialogue
                    speech = [*tok(f"Audio {len(spoken)}: "), *speech, *tok("\n")]
                put(speech)

    if sample["parts"]:
        put_parts(sample["parts"], in_dialogue=False)
        if not reply:
            put([tok.end], loss=not sample.get("endless"))
    else:
        messages = sample["messages"]
        if messages[0]["role"] != "system":
            messages = [SYSTEM, *messages]
        for message in messages:
            put([tok.turn, *tok(message["role"] + "\n")])
            put_parts(message["content"], in_dialogue=True)
            put([tok.turn_end], loss=message["role"] == "assistant")
            put(tok("\n"))
        if reply:
            put([tok.turn, *tok("assistant\n")])

    labels = [i if loss else IGNORE for i, loss in zip(ids[1:], is_target[1:])] + [IGNORE]
    return Encoded(
        name=sample.get("id", ""),
        ids=ids,
        labels=labels,
        clips=[clips[part["audio"]] for part in spoken],
        word_ids=[word_tokens(part["text"], tok) for part in spoken])


def word_tokens(text, tok):
    """The words of a clip as tokens, in lower case, without punctuation: what a CTC stage asks for."""
    words = synth.WORD.findall(text.lower())
    return [i for word in words for i in tok(word if "\u3400" <= word < "\ua000" else f" {word}")]


def spaces_moved(parts):
    """Each part with its text; spaces right before speech belong to the speech.

    A lone space before a clip is a token that no pretrained LLM has seen. So the space is tokenised only
    where the speech is read as text, and heard and typed sequences have the same targets.

    >>> text, speech = {"role": "text", "text": "tom puts the "}, {"role": "speech", "text": "ball"}
    >>> [moved for _, moved in spaces_moved([text, speech])]
    ['tom puts the', ' ball']
    """
    texts = [part["text"] for part in parts]
    for i, part in enumerate(parts[1:], 1):
        if part["role"] == "speech" and parts[i - 1]["role"] == "text":
            kept = texts[i - 1].rstrip(" ")
            texts[i] = texts[i - 1][len(kept):] + texts[i]
            texts[i - 1] = kept
    return list(zip(parts, texts))


def read_encoded(path, number, tok):
    """Sample `number` of a shard as ids, labels and clips."""
    sample, files = synth.read_sample(path, number)
    return encode(sample, decoded(files), tok)


def decoded(files):
    return {name: synth.decode_flac(data) for name, data in files.items()}


# --------------------------------------------------------------------------------------------------
# 2. From samples to a batch
#
# A batch is a dict of tensors; two batches are joined by concatenating each. Encoded samples, here called
# documents, and clips lie end to end, and say only how long they are. Whisper's log-mel frames are computed
# here, by the reading processes.
#
#     ids, labels   (T,)           all documents, end to end
#     lengths       (documents,)   T in all
#     mel           (rows, mels)   all clips, each in a slot of its own (see slot_of)
#     frames        (clips,)       N: 10 ms each
#     word_ids      (words,)       tokens of all clips' words, for a CTC stage
#     word_counts   (clips,)
# --------------------------------------------------------------------------------------------------

def collate(documents, mels, stretch=0.0, seed=""):
    """Join documents end to end, without padding.

    stretch: each clip's frequencies are multiplied by a factor drawn by the seed, up to this share off 1
    """
    rng = Random(seed)
    clips = [clip for document in documents for clip in document.clips]
    word_ids = [ids for document in documents for ids in document.word_ids]
    slots = [slot_of(torch.from_numpy(clip), mels, round(1 + rng.uniform(-stretch, stretch), 2))
             for clip in clips]
    return {
        "ids": torch.tensor([i for document in documents for i in document.ids]),
        "labels": torch.tensor([label for document in documents for label in document.labels]),
        "lengths": torch.tensor([len(document.ids) for document in documents]),
        "mel": torch.cat([torch.zeros(0, mels), *slots]),
        "frames": torch.tensor([math.ceil(len(clip) / HOP) for clip in clips], dtype=torch.int64),
        "word_ids": torch.tensor([i for ids in word_ids for i in ids], dtype=torch.int64),
        "word_counts": torch.tensor([len(ids) for ids in word_ids], dtype=torch.int64)}


def join(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def slot_of(waveform, mels, stretch=1.0):
    """A clip's log-mel frames as rows between zeros, so that clips can be convolved end to end.

        slot   0  m0 m1 m2 … m(N+1) 0     P rows, an even number

    waveform: (samples,) float32 at 16 kHz. UserError where the encoder cannot hear it -> (P, mels)
    """
    if not audio_positions(len(waveform)) or len(waveform) > LONGEST or not waveform.isfinite().all():
        raise UserError(f"A clip of {len(waveform) / RATE:.3f} s cannot be heard: clips last from 0.021 to "
                        "30 s, and every sample is a number; drop it, or cut it into shorter ones.")
    mel = log_mel(waveform, mels, stretch)
    rows = slot_rows(math.ceil(len(waveform) / HOP))
    return F.pad(mel, (0, 0, 1, rows - 1 - len(mel)))


def slot_rows(frames):
    """P, even and at least N + 3."""
    return (frames + 4) // 2 * 2


def log_mel(waveform, mels, stretch=1.0):
    """Log-mel frames of a clip: equal to WhisperFeatureExtractor's first N + 2, which are all that matter.

    Whisper pads a clip with zeros to 30 s; the frames past its end are the same known silence, and the
    encoder's convolutions see two of them. Values reach down to 80 dB below the clip's own loudest.

    stretch: all frequencies times this factor, as if the vocal tract were shorter by it: training hears each
    clip in another voice every time, and so learns to hear voices that it never met
    (samples,) float32 -> (min(N + 2, 3000), mels) float32
    """
    window, filters = mel_constants(mels, stretch)
    context = len(window) // 2 + 2 * HOP     # what the last frame that is kept sees behind the clip
    padded = F.pad(waveform, (0, min(context, LONGEST - len(waveform))))
    spectrum = torch.stft(padded, len(window), HOP, window=window, return_complex=True)     # (201, frames)
    count = min(math.ceil(len(waveform) / HOP) + 2, MAX_FRAMES)
    power = spectrum[:, :count].abs().square()
    mel = (power.T @ filters).clamp(min=1e-10).log10()
    return (torch.maximum(mel, mel.max() - 8) + 4) / 4


@functools.lru_cache
def mel_constants(mels, stretch):
    """WhisperFeatureExtractor's Hann window of 25 ms (400,) and Slaney mel filters (201, mels)."""
    with warnings.catch_warnings(action="ignore"):            # the highest filters may be empty
        filters = mel_filter_bank(201, mels, 0.0, RATE / 2, round(RATE * stretch), norm="slaney",
                                  mel_scale="slaney")
    return torch.hann_window(400), torch.from_numpy(filters).float()


# --------------------------------------------------------------------------------------------------
# 3. The model
#
# Whisper's encoder, one linear layer, and an LLM (Qwen2; or Qwen3, SmolLM2), all on packed sequences. Modules
# are named so that state_dict() is a Qwen2-Audio checkpoint, name by name: audio_tower (Encoder),
# multi_modal_projector (Adapter), language_model (LLM). Blocks get attention as a function, attend(q, k, v).
# No block knows its number, so that all of one kind are compiled as one.
# --------------------------------------------------------------------------------------------------

def plain_attention(q, k, v, cu_seqlens, causal):
    """Softmax attention of every position over its own document only (the positions before it, if `causal`).

    q           (T, Hq, D)
    k, v        (T, Hkv, D); query head h reads key-value head h // (Hq / Hkv)
    cu_seqlens  (documents + 1,) int32 from 0 to T, empty ones allowed: [0, 3, 10] is documents of 3 and 7
    -> (T, Hq, D)

    This is the meaning, and the CPU's way. On a GPU `fused_attention` (section 12) computes exactly this.
    """
    grouped = q.shape[1] != k.shape[1]
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        qkv = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]                   # each (1, H, L, D)
        out = F.scaled_dot_product_attention(*qkv, is_causal=causal, enable_gqa=grouped)
        outputs.append(out[0].transpose(0, 1))                                          # (L, Hq, D)
    return torch.cat(outputs)


def packed_attention(lengths, causal, x, head_size):
    """The function attend(q, k, v) of a pack x (T, d) whose documents have these lengths."""
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    if not uses_kernel(x.device, head_size):
        return functools.partial(plain_attention, cu_seqlens=cu_seqlens, causal=causal)
    cu_seqlens = to_device(cu_seqlens, x.device)
    tiles = fused_tiles(cu_seqlens, causal, len(x))                     # index work, once for all layers
    return functools.partial(fused_attention, cu_seqlens=cu_seqlens, causal=causal, tiles=tiles)


class EncoderBlock(nn.Module):
    """Whisper's block: attention, then GELU, each behind its layer norm. Keys carry no bias."""

    def __init__(self, config):
        super().__init__()
        d = config.d_model
        self.heads = config.encoder_attention_heads
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(d, d),
            "k_proj": nn.Linear(d, d, bias=False),
            "v_proj": nn.Linear(d, d),
            "out_proj": nn.Linear(d, d)})
        self.self_attn_layer_norm = nn.LayerNorm(d)
        self.final_layer_norm = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, d)

    def forward(self, x, attend):
        h = self.self_attn_layer_norm(x)                                                # (T, d)
        q, k, v = (self.self_attn[name](h).unflatten(1, (self.heads, -1))               # (T, H, D)
                   for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.self_attn.out_proj(attend(q, k, v).flatten(1))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Encoder(nn.Module):
    """Whisper's encoder on packed clips, pooled by 2 at its end: one vector per 40 ms of speech."""

    def __init__(self, config):
        super().__init__()
        self.head_size = config.d_model // config.encoder_attention_heads
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, 3, stride=2)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, mel, frames, recompute):
        """mel (rows, mels), frames (clips,) as in a batch -> (sum of audio positions, d), clips in order."""
        device = self.conv1.weight.device
        x = self.convolve(to_device(mel, device).to(self.conv1.weight.dtype), frames)   # (sum of L, d)
        lengths = convolved(frames)
        _, position = ragged(lengths)
        x = x + self.embed_positions(to_device(position, device))
        attend = packed_attention(lengths, False, x, self.head_size)
        x = run_blocks(self.layers, x, recompute, attend)
        owner, pair = ragged(lengths // 2)            # pooled inside each clip; an odd last output is dropped
        first = to_device((lengths.cumsum(0) - lengths)[owner] + 2 * pair, device)
        return self.layer_norm((x[first] + x[first + 1]) / 2)

    def convolve(self, mel, frames):
        """Both convolutions over all slots end to end: (rows, mels) -> (sum of L, d). No clip sees another.

            slot     0  m0 m1 m2 m3 …  0     the zeros are the padding of the first convolution
            first    ?  c0 c1 c2 c3 …        c(t) sees m(t-1), m(t), m(t+1); ? also sees the slot before, and
                                             is set to zero: it is the padding of the second convolution
            second   output s sees rows 2s, 2s+1 and 2s+2: ? c0 c1, then c1 c2 c3, …
        """
        rows = slot_rows(frames)
        starts = rows.cumsum(0) - rows
        x = F.gelu(self.conv1(mel.T))                                                   # (d, rows)
        x = x.index_fill(1, to_device(starts, mel.device), 0)
        x = F.gelu(self.conv2(F.pad(x, (0, 1)))).T                                      # (rows / 2, d)
        owner, output = ragged(convolved(frames))
        return x[to_device(starts[owner] // 2 + output, mel.device)]


def ragged(lengths):
    """Which piece each row of a packed tensor belongs to, and its place within the piece: (sum,) int64 each.

    >>> ragged(torch.tensor([2, 0, 3]))
    (tensor([0, 0, 2, 2, 2]), tensor([0, 1, 0, 1, 2]))
    """
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    first = lengths.cumsum(0) - lengths
    return owner, torch.arange(len(owner)) - first[owner]


def to_device(x, device):
    """x on the device. From pinned memory a GPU fetches it by itself, and nobody waits."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class Adapter(nn.Module):
    """From the encoder's width to the LLM's."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.audio_config.d_model, config.text_config.hidden_size)

    def forward(self, x):
        return self.linear(x)


class LLMBlock(nn.Module):
    """Grouped-query attention with rotary positions, then SwiGLU, each behind its RMS norm.

    So Qwen2, Qwen3 and SmolLM2 (Llama) are built, but for two details: Qwen2's queries, keys and values have
    biases, and Qwen3's queries and keys pass norms of their own, head by head.
    """

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.head_size = head_size_of(config)
        queries = config.num_attention_heads * self.head_size
        keys = config.num_key_value_heads * self.head_size
        has_bias = config.model_type == "qwen2"
        self.has_norms = config.model_type == "qwen3"
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(d, queries, bias=has_bias),
            "k_proj": nn.Linear(d, keys, bias=has_bias),
            "v_proj": nn.Linear(d, keys, bias=has_bias),
            "o_proj": nn.Linear(queries, d, bias=False)})
        if self.has_norms:
            self.self_attn["q_norm"] = nn.RMSNorm(self.head_size, config.rms_norm_eps)
            self.self_attn["k_norm"] = nn.RMSNorm(self.head_size, config.rms_norm_eps)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(d, config.intermediate_size, bias=False),
            "up_proj": nn.Linear(d, config.intermediate_size, bias=False),
            "down_proj": nn.Linear(config.intermediate_size, d, bias=False)})
        self.input_layernorm = nn.RMSNorm(d, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(d, config.rms_norm_eps)

    def forward(self, x, attend, rope):
        h = self.input_layernorm(x)                                                     # (T, d)
        q, k, v = (self.self_attn[name](h).unflatten(1, (-1, self.head_size))           # (T, Hq or Hkv, D)
                   for name in ("q_proj", "k_proj", "v_proj"))
        if self.has_norms:
            q = self.self_attn.q_norm(q)
            k = self.self_attn.k_norm(k)
        attended = attend(rotate(q, rope), rotate(k, rope), v)
        x = x + self.self_attn.o_proj(attended.flatten(1))
        h = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))


class LLM(nn.Module):
    """Its head is applied by whoever needs logits: the loss at a few positions, generation at one."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_size = head_size_of(config)
        layers = (LLMBlock(config) for _ in range(config.num_hidden_layers))
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(layers),
            "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x, position_ids, attend, recompute):
        """Embeddings (T, d) -> hidden states (T, d), ready for lm_head."""
        speed = rope_speed(self.config, self.head_size, x.device)
        angle = position_ids[:, None, None].float() * speed                             # (T, 1, D/2)
        x = run_blocks(self.model.layers, x, recompute, attend, (angle.cos(), angle.sin()))
        return self.model.norm(x)


def head_size_of(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_speed(config, head_size, device=None):
    """Radians by which each pair of a head turns from one position to the next: (D / 2,)."""
    # transformers' own rounding: a unit in the last place of a speed is 1e-4 radians at position 1000
    exponent = torch.arange(0, head_size, 2, device=device).float() / head_size
    return 1 / config.rope_parameters["rope_theta"] ** exponent


def rotate(x, rope):
    """Rotary positions: pairs (i, i + D/2) of x (T, H, D) turned by the angles of cosine and sine `rope`."""
    cos, sin = rope                                                                     # (T, 1, D/2) float32
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def run_blocks(blocks, x, recompute, *args):
    """Blocks in turn; with `recompute` each keeps only its input, and the backward pass computes it again."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = recomputed(block, x, *args)
        else:
            x = block(x, *args)
    return x


def recomputed(function, *args):
    """function(*args), whose intermediate tensors are dropped and computed again in the backward pass.

    Nothing here is random (no dropout), so the random state, for which one would wait for a GPU, is let be.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class InSerter(nn.Module):
    """Encoder, Adapter and LLM over one packed sequence. `config` is a transformers Qwen2AudioConfig.

    A batch may lie on the CPU while the model is on a GPU; then everything that has to be counted is counted
    there, and the GPU is never waited for.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False               # train.checkpointing
        self.audio_tower = Encoder(config.audio_config)
        self.multi_modal_projector = Adapter(config)
        self.language_model = LLM(config.text_config)

    @property
    def mels(self):
        return self.config.audio_config.num_mel_bins

    def hear(self, mel, frames):
        """Clips of a batch -> (sum of audio positions, d) in the LLM's space.

        Where there is none, a padding clip takes its place, so that every parameter has a gradient on every
        rank; `embed` drops its output.
        """
        if not len(frames):
            frames = torch.tensor([4])
            mel = torch.zeros(slot_rows(4), self.mels)
        return self.multi_modal_projector(self.audio_tower(mel, frames, self.recompute))

    def embed(self, ids, mel, frames):
        """Embeddings of a batch: ids (T,), each <|AUDIO|> replaced in order by one vector heard -> (T, d)."""
        table = self.language_model.model.embed_tokens
        x = table(to_device(ids, table.weight.device))
        heard = self.hear(mel, frames).to(x.dtype)
        if not len(frames):
            return x + 0 * heard.sum()
        rows = (ids == self.config.audio_token_index).nonzero()[:, 0]
        return x.index_copy(0, to_device(rows, x.device), heard)

    def hidden(self, ids, lengths, mel, frames):
        """Hidden states of packed documents, ready for lm_head: (T, d). Arguments as in a batch."""
        x = self.embed(ids, mel, frames)
        attend = packed_attention(lengths, True, x, self.language_model.head_size)
        _, position = ragged(lengths)
        return self.language_model(x, to_device(position, x.device), attend, self.recompute)

    def forward(self, batch, chunk, classes=None):
        """Sum of a batch's loss in nats (section 4), a float32 scalar; with `classes` that of CTC."""
        if classes is not None:
            return word_loss(self, batch, classes)
        return next_token_losses(self, batch, chunk).sum()


# --------------------------------------------------------------------------------------------------
# 4. The loss
#
# Cross-entropy at the labelled positions, and nowhere else: the LM head, the most expensive matrix of a
# small LLM, is not even applied to the others. A stage that first teaches the encoder to hear uses CTC.
# --------------------------------------------------------------------------------------------------

def next_token_losses(model, batch, chunk):
    """Nats of every labelled position, in order: (number of labels that are not IGNORE,) float32.

    Logits exist for `chunk` positions at a time, in the forward pass and again in the backward pass: for 8192
    positions and 151,936 tokens at once they would take 5 GB in float32.
    """
    hidden = model.hidden(batch["ids"], batch["lengths"], batch["mel"], batch["frames"])        # (T, d)
    labelled = (batch["labels"] != IGNORE).nonzero()[:, 0]                              # (T',)
    targets = to_device(batch["labels"][labelled], hidden.device)
    hidden = hidden.index_select(0, to_device(labelled, hidden.device))                 # (T', d)
    head = model.language_model.lm_head.weight                                          # (V, d)

    def losses(h, t):
        return F.cross_entropy(F.linear(h, head).float(), t, reduction="none")

    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([recomputed(losses, h, t) for h, t in chunks])


def word_loss(model, batch, classes):
    """Summed nats of each clip's words (their tokens) by CTC (Graves et al. 2006). <|AUDIO|> is the blank.

    Encoder, adapter and the LLM without its blocks say, vector by vector, which token they hear: the one
    whose embedding fits best, so a word heard comes to lie near the same word read. A clip with more tokens
    than vectors adds nothing, nor does one without words.

    classes: (n,) ids of frequent tokens, which compete with the tokens of all these clips' words. The whole
    vocabulary would take two thirds of a step.
    """
    heard = model.language_model.model.norm(model.hear(batch["mel"], batch["frames"]).float())
    lengths = convolved(batch["frames"]) // 2
    table = model.language_model.model.embed_tokens.weight
    blank = torch.tensor([model.config.audio_token_index])
    classes = torch.cat([classes, batch["word_ids"], blank]).unique()
    targets = torch.searchsorted(classes, batch["word_ids"])            # the ids' places among the classes
    logits = F.linear(heard, table[to_device(classes, table.device)])                   # (positions, classes)
    if not len(lengths):
        return 0 * logits.sum()
    logits = logits.float().log_softmax(1).split(lengths.tolist())
    logits = nn.utils.rnn.pad_sequence(logits).to(heard.device)                         # (longest, clips, …)
    losses = F.ctc_loss(logits, targets.to(heard.device), lengths, batch["word_counts"],
                        blank=int(torch.searchsorted(classes, blank)), reduction="none", zero_infinity=True)
    return losses[to_device(batch["word_counts"] > 0, losses.device)].sum()


# --------------------------------------------------------------------------------------------------
# 5. Training: the loop
#
# A run is a few stages, each on its own mix of recipes; `train` (section 10) calls `train_stage` for each in
# turn. `feed` reads the packs (6), `evaluate` gives a point of the gap curve (9), `save_run` writes the state
# from which a stopped run continues (10), `Log` the log (11).
# --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Progress:
    """Where a run stands: `step` counts over all stages, the others inside the stage."""
    stage: str
    step: int = 0
    stage_step: int = 0
    targets: float = 0.0                     # supervised tokens of the stage so far
    cursors: dict = dataclasses.field(default_factory=dict)       # of every lane, by its number (section 6)

    def share(self, stage):
        """How much of the stage is done: at 1 it is over."""
        if stage.steps:
            return self.stage_step / stage.steps
        return self.targets / stage.tokens


def lr_factor(stage, step, share):
    """What the stage's rates are multiplied by: linear over `ramp` steps, a cosine to `floor` at its end."""
    ramp = min(1.0, (step + 1) / max(stage.ramp, 1))
    cosine = (1 + math.cos(math.pi * min(share, 1))) / 2
    return ramp * (stage.floor + (1 - stage.floor) * cosine)


def train_stage(c, model, tok, progress, state, stopping):
    """Train one stage from where it stands. True: it is done. False: a signal stopped it; the state is saved.

    state: a saved one to continue from, or empty; stopping: not empty after a signal
    """
    stage = c.train.stages[progress.stage]
    rank, world = rank_and_world()
    trained = freeze(model, stage)
    optimizers = make_optimizers(c, model, stage)
    if state:
        model.load_state_dict(state["weights"])
        for optimizer, slots in zip(optimizers, state["slots"]):
            optimizer.load_state_dict(slots)
        state.clear()                        # later stages begin anew, and it may fill the memory
    if progress.share(stage) >= 1:           # stopped between two stages
        return True
    network = model
    if world > 1:                            # gives all ranks the weights of rank 0
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    lanes = list(range(rank, stage.packs, world))
    packs_of_steps = feed(c, tok, model.mels, progress, lanes)
    classes = frequent_tokens(c, tok, stage) if stage.ctc else None
    log = Log(c, progress)
    stop = False
    if progress.step == 0 and not stage.from_scratch:                   # what the given weights can do
        log.point(evaluate(c, model, tok))
    while progress.share(stage) < 1 and not stop:
        # 1. The rank's next packs, and what those of all ranks hold together. A signal to one rank comes to
        #    all with these sums.
        begun = time.perf_counter()
        packs = next(packs_of_steps)
        waited = time.perf_counter() - begun
        progress.cursors |= {lane: pack.cursor for lane, pack in zip(lanes, packs)}
        totals = Counter(waited=waited, stop=len(stopping))
        for pack in packs:
            totals.update(pack.counts)
        totals = sum_over_ranks(totals)
        stop = totals["stop"] > 0            # after this step: its packs are taken, so they are trained on

        # 2. Forward and backward.
        loss = add_gradients(c, network, packs, totals["targets"], classes)

        # 3. Clip the gradient. A norm that is not finite is the same on all ranks, and stops them before the
        #    weights change.
        norm = float(nn.utils.clip_grad_norm_(trained, c.train.clip))
        if not math.isfinite(norm):
            names = gather([name for pack in packs for name in pack.names])
            raise UserError(f"The loss or its gradient is not finite at step {progress.step + 1}; nothing "
                            f"was changed by it. Samples: {', '.join(sum(names, []))}.")

        # 4. Step.
        factor = lr_factor(stage, progress.stage_step, progress.share(stage))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.stage_step += 1
        progress.targets += totals["targets"]

        # From here on nothing is training: log, evaluate, save. An LLM that has read no text yet has no gap,
        # nor has one amid CTC, which lets norms grow.
        log.step(float(loss), factor, norm, totals)
        done = progress.share(stage) >= 1
        if done and stage.ctc and not stage.lr_scale["llm"]:
            match_norms(c, model, tok, stage)
        reads_text = not stage.from_scratch or set(stage.mix) != {"tasks"}
        evaluates = done or (is_due(c.train.eval_every, progress.step) and not stage.ctc)
        if reads_text and evaluates:
            log.point(evaluate(c, model, tok))
        if done or stop or is_due(c.train.save_every, progress.step):
            save_run(c, model, tok, optimizers, progress)
    return progress.share(stage) >= 1


def add_gradients(c, network, packs, targets, classes):
    """Forward and backward passes over a rank's packs of a step; returns the sum of their loss.

    The gradient is that of the mean over all ranks' targets. DDP averages over ranks, so each divides its own
    sum by targets / world: of sums 6 and 4 over 5 targets it makes (6 * 2/5 + 4 * 2/5) / 2 = 10/5. Ranks meet
    in the last pass only.
    """
    _, world = rank_and_world()
    loss_sum = torch.zeros((), device=device_here())
    at_once = c.train.packs_at_once
    for first in range(0, len(packs), at_once):
        batch = join([pack.batch for pack in packs[first:first + at_once]])
        meets = world == 1 or first + at_once >= len(packs)
        with contextlib.nullcontext() if meets else network.no_sync():
            with mixed_precision(c):
                loss = network(batch, c.train.loss_chunk, classes)
            (loss * (world / max(targets, 1))).backward()
        loss_sum += loss.detach()            # read once a step: nothing in between waits for a GPU
    return loss_sum


def is_due(every, step):
    """Every so many steps; 0 is never."""
    return every > 0 and step % every == 0


def freeze(model, stage):
    """Let a stage train the modules whose lr_scale is above 0; returns their parameters."""
    beside_ctc = ("language_model.model.layers", "language_model.lm_head")
    for name, p in model.named_parameters():
        is_table = name.endswith("embed_positions.weight")              # sinusoids, never trained
        is_unused = stage.ctc and name.startswith(beside_ctc)
        p.requires_grad_(stage.lr_scale[module_of(name)] > 0 and not is_table and not is_unused)
    return [p for p in model.parameters() if p.requires_grad]


def module_of(name):
    """encoder, adapter or llm: where a parameter belongs, by its name."""
    return {"audio_tower": "encoder", "multi_modal_projector": "adapter"}.get(name.split(".")[0], "llm")


def make_optimizers(c, model, stage):
    """AdamW, and Muon where so set: every trained parameter in one group, of its own learning rate.

    Muon orthogonalises the update of a matrix, which suits those inside the blocks and the adapter;
    embeddings, the LM head, convolutions and vectors are AdamW's. Vectors do not decay.
    """
    groups = {}                        # by (is Muon's, module, decays)
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_inner = p.ndim == 2 and "embed" not in name and "lm_head" not in name
            by_muon = stage.optimizer == "muon" and is_inner
            groups.setdefault((by_muon, module_of(name), p.ndim > 1), []).append(p)
    found = {False: [], True: []}
    for (by_muon, module, decays), parameters in groups.items():
        lr = (stage.muon_lr if by_muon else stage.lr) * stage.lr_scale[module]
        decay = c.train.weight_decay if decays else 0.0
        found[by_muon].append({"params": parameters, "lr": 0.0, "base_lr": lr, "weight_decay": decay})
    optimizers = []
    if found[False]:
        optimizers.append(torch.optim.AdamW(found[False], betas=tuple(c.train.betas), fused=True))
    if found[True]:
        optimizers.append(torch.optim.Muon(found[True], momentum=c.train.muon_momentum))
    return optimizers


def first_samples(c, stage):
    """Every sample, with its files, in the first training shard of each of the stage's recipes."""
    for name in recipe_names(stage):
        path = Recipe(c, name).paths[0]
        for number in range(synth.sample_count(path)):
            yield synth.read_sample(path, number)


def frequent_tokens(c, tok, stage):
    """The stage.ctc_classes most frequent tokens of what is spoken in the first shards: (n,) int64.

    Without ctc_classes the whole vocabulary.
    """
    if not stage.ctc_classes:
        return torch.arange(len(tok.hf))
    found = Counter()
    for sample, _ in first_samples(c, stage):
        for part in itertools.chain(*synth.parts_of(sample)):
            if part["role"] == "speech":
                found.update(word_tokens(part["text"], tok))
    return torch.tensor([i for i, _ in found.most_common(stage.ctc_classes)])


@torch.no_grad()
def match_norms(c, model, tok, stage):
    """Scale the adapter: what is heard becomes as long as the LLM's embeddings, on average over 64 samples.

    CTC looks at directions alone, so nothing holds the vectors' length meanwhile: it grows tenfold, and would
    drown all else in the first blocks of an LLM that is left as it was.
    """
    samples = itertools.islice(first_samples(c, stage), 64)
    batch = collate([encode(sample, decoded(files), tok) for sample, files in samples], model.mels)
    with mixed_precision(c):
        heard = model.hear(batch["mel"], batch["frames"]).float()
    table = model.language_model.model.embed_tokens.weight
    factor = table.norm(dim=1).mean() / heard.norm(dim=1).mean()
    for p in model.multi_modal_projector.parameters():
        p *= factor


# --------------------------------------------------------------------------------------------------
# 6. Packing: from shards to packs
#
# A step trains on G packs, one from each of G lanes. A lane is an endless stream of packs that depends on
# (seed, stage, lane) alone; rank r serves the lanes r, r + world, …. So packs are the same for any number of
# ranks and reading processes, and a run resumes from one small cursor a lane. A document is here one encoded
# sample, be it a text or a dialogue.
# --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Pack:
    """Whole documents end to end: at most pack_length positions, and no padding."""
    batch: dict[str, Tensor]
    names: list[str]                         # ids of the documents
    counts: dict[str, int]                   # for the log
    cursor: dict[str, list[int]]             # where the lane stands after it, see `packs_of_lane`


class Recipe:
    """The training samples of one recipe, in an order of their own in every epoch.

    Shards are shuffled, and samples inside each, so that whoever reads on has few files open.
    """

    def __init__(self, c, name, salt=""):
        self.name = name
        self.salt = f"{c.seed} {salt} {name}"
        self.paths = sorted((Path(c.data) / name).glob("train-*.tar"))
        self.counts = [synth.sample_count(path) for path in self.paths]
        self.total = sum(self.counts)
        if not self.total:
            raise UserError(f"{Path(c.data) / name} has no sample, which the stage's mix asks for; set its "
                            "share to 0, or give a corpus that has what it is made of (chat: dialogues).")

    def locate(self, epoch, index):
        """Shard and number of the index-th sample of an epoch."""
        for shard in shuffled(f"{self.salt} {epoch}", len(self.paths)):
            if index < self.counts[shard]:
                break
            index -= self.counts[shard]
        return self.paths[shard], int(shuffled(f"{self.salt} {epoch} {shard}", self.counts[shard])[index])

    def read(self, nth, lane, lanes, tok):
        """The nth sample of a lane.

        Each lane reads on in a stretch of its own, so that a step sees samples from all over the corpus: of
        21 samples four lanes read 0 to 4, 5 to 9, 10 to 14 and 15 to 20, then the same of the next epoch.
        """
        first, end = (number * self.total // lanes for number in (lane, lane + 1))
        epoch, offset = divmod(nth, max(end - first, 1))
        path, number = self.locate(epoch, first + offset)
        return read_encoded(path, number, tok)


@functools.lru_cache(maxsize=64)
def shuffled(seed, count):
    """0 to count - 1 in an order that the seed alone decides."""
    return np.random.default_rng(zlib.crc32(seed.encode())).permutation(count)


def recipe_names(stage):
    return [name for name, share in stage.mix.items() if share > 0]


def packs_of_lane(c, tok, mels, stage_name, lane, cursor):
    """An endless stream of packs. The next document is that of the recipe that is furthest below its share;
    where that does not fit any more, another recipe's.

    cursor: of each recipe, documents read and positions packed, {"tasks": [12, 3402], …}; a document that
    waits for the next pack is not counted, and read again by whoever continues.
    """
    stage = c.train.stages[stage_name]
    recipes = {name: Recipe(c, name, stage_name) for name in recipe_names(stage)}
    cursor = cursor or {name: [0, 0] for name in recipes}
    waiting = {}
    while True:
        documents = []
        room = c.train.pack_length
        skipped = 0
        while True:
            for name in recipes.keys() - waiting.keys():
                waiting[name] = recipes[name].read(cursor[name][0], lane, stage.packs, tok)
                while len(waiting[name].ids) > c.train.pack_length:     # left out, and counted
                    skipped += 1
                    cursor[name][0] += 1
                    if skipped > recipes[name].total:
                        raise UserError(f"Every sample of {name} is longer than a pack; raise "
                                        f"train.pack_length={c.train.pack_length}.")
                    waiting[name] = recipes[name].read(cursor[name][0], lane, stage.packs, tok)
            hungriest = sorted(recipes, key=lambda name: cursor[name][1] / stage.mix[name])
            name = next((name for name in hungriest if len(waiting[name].ids) <= room), None)
            if name is None:
                break
            documents.append(waiting.pop(name))
            room -= len(documents[-1].ids)
            cursor[name][0] += 1
            cursor[name][1] += len(documents[-1].ids)
        batch = collate(documents, mels, c.train.stretch, f"{c.seed} {stage_name} {lane} {cursor}")
        targets = batch["word_ids"] if stage.ctc else batch["labels"][batch["labels"] != IGNORE]
        counts = {
            "targets": len(targets),
            "positions": len(batch["ids"]),
            "waste": room,                   # positions left over, since no further document fitted
            "skipped": skipped,
            "audio samples": sum(len(clip) for document in documents for clip in document.clips),
            "batch": zlib.crc32(batch["ids"].numpy())}                  # a checksum
        names = [document.name for document in documents]
        yield Pack(batch, names, counts, cursor={name: list(place) for name, place in cursor.items()})


class Lanes(IterableDataset):
    """The packs of some lanes in turn; each reading process serves its share of them."""

    def __init__(self, c, tok, mels, progress, lanes):
        self.c = c
        self.hf = tok.hf                     # a Tokenizer itself cannot travel to another process
        self.mels = mels
        self.stage_name = progress.stage
        self.cursors = {lane: progress.cursors.get(lane) for lane in lanes}

    def __iter__(self):
        lanes = list(self.cursors)
        if worker := get_worker_info():
            lanes = lanes[worker.id::worker.num_workers]
            os.setpgrp()                 # away from torchrun's SIGTERM, which goes to whole process groups:
                                         # a rank reads on until all stop at one step
            synth.end_with_parent()
            torch.set_num_threads(1)
        tok = Tokenizer(self.hf)
        streams = [packs_of_lane(self.c, tok, self.mels, self.stage_name, lane, self.cursors[lane])
                   for lane in lanes]
        return map(next, itertools.cycle(streams))


def feed(c, tok, mels, progress, lanes):
    """One rank's packs, step by step, in the order of its lanes; read by at most train.workers processes.

    DataLoader takes from its processes in turn, which is the order of the lanes if they divide evenly.
    """
    workers = max(n for n in range(c.train.workers + 1) if n == 0 or len(lanes) % n == 0)
    options = {}
    if workers:
        options = {"prefetch_factor": len(lanes) // workers + 1,        # a step's packs, and one more
                   "multiprocessing_context": fork_server()}
    dataset = Lanes(c, tok, mels, progress, lanes)
    packs = iter(DataLoader(dataset, batch_size=None, num_workers=workers, **options))
    while True:
        try:
            yield list(itertools.islice(packs, len(lanes)))
        except UserError as error:           # PyTorch puts a reading process's traceback before the sentence
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
        except (ConnectionError, RuntimeError) as error:
            if not workers or "Caught" in str(error):                   # raised where somebody reads on
                raise
            raise UserError("A process that read samples was killed, perhaps for want of memory; start "
                            "again, if need be with fewer train.workers.") from None


def fork_server():
    """Readers come from a server that was started before torch's threads: forking after them can hang."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inserter"])
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)            # the server inherits this: it outlives
    forkserver.ensure_running()                                         # torchrun's signal
    signal.signal(signal.SIGTERM, handler)
    return context


# --------------------------------------------------------------------------------------------------
# 7. Weights and tokenizers: from nothing, from two checkpoints, from one; and back to disk
#
# A checkpoint is a folder or hub name that transformers reads, by its own classes. Qwen2-Audio ignores tied
# embeddings: both matrices are always written, and ours are one again after loading if the config asks for it
# and they are equal.
# --------------------------------------------------------------------------------------------------

LLM_FAMILIES = ("qwen2", "qwen3", "llama")   # Qwen2.5 is called qwen2, and SmolLM2 llama


def fresh_model(c, tok):
    """The model a run starts from: a Qwen2-Audio checkpoint, a Whisper and an LLM, or random weights."""
    m = c.model
    if m["from"]:
        return load_model(m["from"])
    if m.encoder:
        return join_models(m.encoder, m.llm, tok, c.seed)
    config = Qwen2AudioConfig(audio_config=dict(m.audio), text_config=dict(m.text),
                              audio_token_index=tok.audio)
    return random_model(config, c.seed)


def random_model(config, seed):
    """InSerter from nothing but sizes: the same weights for the same config and seed, on any machine.

    In the LLM's first block head h starts by looking b = 1 + h // 2 tokens back: its biases alone make q·k
    the sum of 16 cos((distance - b) speed) over all pairs, which is largest at that distance. To copy, a
    model must know what stood before each token; so it learns to repeat, and to hear, in fewer steps. What
    the adapter says is as long as an embedding, or the LLM's blocks could add little to it.
    """
    with torch.device("meta"):
        model = InSerter(config)
    tensors = {name: initial_value(name, tuple(p.shape), seed) for name, p in model.state_dict().items()}
    text = config.text_config
    head_size = model.language_model.head_size
    back = 1 + torch.arange(text.num_attention_heads) // 2
    turn = back[:, None] * rope_speed(text, head_size)                                  # (Hq, D/2)
    first_half = torch.arange(text.num_key_value_heads * head_size) % head_size < head_size // 2
    attention = "language_model.model.layers.0.self_attn"
    tensors[f"{attention}.q_proj.bias"] = 4 * torch.cat([turn.cos(), -turn.sin()], 1).flatten()
    tensors[f"{attention}.k_proj.bias"] = 4.0 * first_half
    tensors["multi_modal_projector.linear.weight"] /= math.sqrt(text.hidden_size / 3)
    return build(config, tensors)


def initial_value(name, shape, seed):
    """A parameter's first value, from the seed and its own name alone: other parameters never change it.

    Matrices are normal with standard deviation 1 / sqrt(3 inputs); those that write to the residual stream
    start at zero, so that every block is the identity at first and a token's embedding is not drowned;
    embeddings have 1 / sqrt(width); norms start as the identity and biases at zero. Three things let an
    encoder hear sooner: a convolution's filters sum to zero, for log-mel frames differ little from each other
    beside what they share; positions are half as loud as Whisper's; its keys start as twice its queries, so
    that a frame looks at its neighbours.
    """
    if name.endswith("embed_positions.weight"):
        return sinusoids(*shape) / 2
    if name.endswith(("bias", "out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    normal = torch.randn(shape, generator=generator)
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return normal / math.sqrt(shape[1])
    if ".conv" in name:
        return 3 * (normal - normal.mean((1, 2), keepdim=True)) / math.sqrt(math.prod(shape[1:]))
    if name.startswith("audio_tower") and "k_proj" in name:
        return 2 * initial_value(name.replace("k_proj", "q_proj"), shape, seed)
    return normal / math.sqrt(3 * math.prod(shape[1:]))


def sinusoids(positions, width):
    """Whisper's positions (positions, width): sines, then cosines, of wavelengths from 2 pi to 20000 pi."""
    speed = torch.exp(-math.log(10000) / (width // 2 - 1) * torch.arange(width // 2))
    angle = torch.arange(positions)[:, None] * speed
    return torch.cat([angle.sin(), angle.cos()], 1)


def load_model(source):
    """InSerter from a Qwen2-Audio checkpoint: ours, transformers' or the hub's; float32, on the CPU."""
    config, theirs = pretrained(source, transformers.AutoModelForSeq2SeqLM)
    tensors = {}
    for name, tensor in theirs.items():
        name = re.sub("^model.language_model.", "language_model.model.", name)
        name = re.sub("^lm_head.", "language_model.lm_head.", name)
        tensors[name.removeprefix("model.")] = tensor
    if config.text_config.tie_word_embeddings:
        config.text_config.tie_word_embeddings = torch.equal(
            tensors["language_model.lm_head.weight"], tensors["language_model.model.embed_tokens.weight"])
    return build(config, tensors)


def join_models(whisper, llm, tok, seed):
    """InSerter from a Whisper and an LLM of LLM_FAMILIES; adapter and audio rows are fresh.

    The tokenizer's three audio tokens take rows of the embeddings that no text uses (Qwen's matrices are
    padded), or new ones. Nothing ever trained these rows. They start near that of a space: <|AUDIO|> is what
    CTC hears between words, and LLMs read over spaces.
    """
    hears, audio = pretrained(whisper, transformers.AutoModelForSpeechSeq2Seq)
    reads, text = pretrained(llm, transformers.AutoModelForCausalLM)
    sizes = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins",
             "max_source_positions")
    audio_config = {"model_type": "qwen2_audio_encoder"} | {name: getattr(hears, name) for name in sizes}
    config = Qwen2AudioConfig(audio_config=audio_config, text_config=reads.to_dict(),
                              audio_token_index=tok.audio)
    tensors = {f"language_model.{name}": tensor for name, tensor in text.items()}
    for name, tensor in audio.items():
        if name.startswith("model.encoder."):
            tensors[name.replace("model.encoder", "audio_tower")] = tensor
    ids = [tok.audio, tok.audio_bos, tok.audio_eos]
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        matrix = tensors[name]                                                          # (V, d)
        noise = matrix.std() * math.sqrt(matrix.shape[1]) * initial_value(name, (3, matrix.shape[1]), seed)
        matrix = F.pad(matrix, (0, 0, 0, max(0, max(ids) + 1 - len(matrix))))
        matrix[ids] = matrix[tok(" ")[-1]] + 0.1 * noise
        tensors[name] = matrix
    config.text_config.vocab_size = len(matrix)
    with torch.device("meta"):
        adapter = Adapter(config).state_dict(prefix="multi_modal_projector.")
    tensors |= {name: initial_value(name, tuple(t.shape), seed) for name, t in adapter.items()}
    return build(config, tensors)


def pretrained(source, model_class):
    """(config, {name: float32 tensor}) of a checkpoint. UserError where its files do not hold such a model.

    model_class: one of transformers' Auto classes, which look at config.json before anything else
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{source} does not open by transformers' {model_class.__name__}: "
                        f"{str(error).strip().splitlines()[0]}") from None
    if wrong := sorted(report["missing_keys"] | report["unexpected_keys"]):
        raise UserError(f"{source}: its config.json and its weights disagree at {wrong[0]}; give another "
                        "checkpoint, or fetch it again.")
    return model.config, model.state_dict()


def build(config, tensors):
    """InSerter with these tensors (by name) as its weights. UserError: a model that ours cannot compute."""
    text = config.text_config
    is_plain = text.rope_parameters["rope_type"] == "default" and text.hidden_act == "silu"
    if text.model_type not in LLM_FAMILIES or not is_plain:
        raise UserError(f"The LLM is a {text.model_type} with rope parameters {text.rope_parameters}; take a "
                        "Qwen2, Qwen2.5, Qwen3 or SmolLM2.")
    with torch.device("meta"):
        model = InSerter(config)
    model.load_state_dict(tensors, assign=True)
    if text.tie_word_embeddings:             # one matrix as embedding and head
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    return model


def save_model(model, folder):
    """Write config.json and weights: transformers' Qwen2AudioForConditionalGeneration opens them."""
    tensors = model.state_dict()
    if model.config.text_config.tie_word_embeddings:                    # safetensors holds no shared memory
        tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"].clone()
    model.config.architectures = ["Qwen2AudioForConditionalGeneration"]
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_processor(model, tok, folder):
    """Write what transformers' AutoProcessor and generate() need beside the model, the tokenizer included."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=model.mels)
    template = tok.hf.chat_template
    transformers.Qwen2AudioProcessor(extractor, tok.hf, chat_template=template).save_pretrained(folder)
    transformers.GenerationConfig(
        eos_token_id=[tok.turn_end, tok.end],
        pad_token_id=tok.end,
        suppress_tokens=[tok.audio, tok.audio_bos, tok.audio_eos],
        max_new_tokens=256).save_pretrained(folder)


def load_tokenizer(c):
    """The tokenizer of the given weights; from scratch data/tokenizer-<vocab>, trained when
    it is first needed."""
    if source := c.model["from"] or c.model.llm:
        hf = AutoTokenizer.from_pretrained(source)
        audio_tokens = {"extra_special_tokens": [AUDIO, AUDIO_BOS, AUDIO_EOS]}      # Qwen2-Audio's order
        hf.add_special_tokens(audio_tokens, replace_extra_special_tokens=False)
        return Tokenizer(hf)
    folder = Path(c.data) / f"tokenizer-{c.model.text.vocab_size}"
    if not folder.is_dir():
        train_tokenizer(c, folder)
    return open_tokenizer(folder)


def open_tokenizer(folder):
    return Tokenizer(AutoTokenizer.from_pretrained(folder))


# Qwen2's word splitting, but each Chinese character is a word: or a small corpus would make whole clauses
# tokens, and a segment that is cut inside a clause would look like nothing that the LLM has read.
WORD_SPLITS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{Han}|[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})\p{L})+|\p{N}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def train_tokenizer(c, folder):
    """Byte-level BPE, trained on the first `text` shard; a folder for AutoTokenizer."""
    texts = [SYSTEM["content"][0]["text"], "system\nuser\nassistant\n", "Audio 1: "]
    texts += [task["ask"] for task in synth.TASKS.values()]
    path = Recipe(c, "text").paths[0]
    for number in range(synth.sample_count(path)):
        sample, _ = synth.read_sample(path, number)
        texts += [part["text"] for part in itertools.chain(*synth.parts_of(sample))]
    bpe = tokenizers.ByteLevelBPETokenizer(unicode_normalizer="nfc")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORD_SPLITS), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, vocab_size=c.model.text.vocab_size, min_frequency=0, show_progress=False,
                            special_tokens=[END, TURN, TURN_END, AUDIO_BOS, AUDIO, AUDIO_EOS])
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(bpe.to_str()),
                                 eos_token=TURN_END, pad_token=END,
                                 extra_special_tokens=[TURN, AUDIO_BOS, AUDIO, AUDIO_EOS])
    with replacing(folder) as aside:
        hf.save_pretrained(aside)


@contextlib.contextmanager
def replacing(folder):
    """A new folder to write into, which then takes the place of `folder`: that is whole, old or absent."""
    aside = folder.with_name(f".new.{folder.name}")
    old = folder.with_name(f".old.{folder.name}")
    for left in (aside, old):                # by a killed process
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    for path in aside.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# 8. Questions and answers
#
# transformers generates; encoder and adapter are ours, so no clip is padded to 30 s.
# --------------------------------------------------------------------------------------------------

@torch.no_grad()
def complete(model, tok, prompts, max_tokens, batch):
    """Greedy continuations of prompts, `batch` at a time.

    -> (text, truncated: it did not end within max_tokens) of each
    """
    llm = their_llm(model)
    stops = [tok.turn_end, tok.end]
    done = []
    for first in range(0, len(prompts), batch):
        chosen = collate(prompts[first:first + batch], model.mels)
        with torch.autocast(llm.device.type, torch.bfloat16, enabled=is_recent_gpu(llm.device)):
            x = model.embed(chosen["ids"], chosen["mel"], chosen["frames"])             # (T, d)
            documents = x.split(chosen["lengths"].tolist())
            answers = llm.generate(
                inputs_embeds=left_padded(documents),
                attention_mask=left_padded([x.new_ones(len(document)) for document in documents]),
                do_sample=False, max_new_tokens=max_tokens, eos_token_id=stops, pad_token_id=tok.end,
                suppress_tokens=[tok.audio, tok.audio_bos, tok.audio_eos])              # (B, new tokens)
        for ids in answers.tolist():
            ends = [i for i, token in enumerate(ids) if token in stops]
            done.append((tok.decode(ids[:ends[0]] if ends else ids), not ends))
    return done


def left_padded(pieces):
    return nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_side="left")


def their_llm(model):
    """transformers' model of the LLM, which shares our weights: it generates, with a cache."""
    weights = model.language_model.state_dict()
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(model.config.text_config)
    theirs.load_state_dict(weights, assign=True)
    with next(iter(weights.values())).device:
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(model.config.text_config)
    return theirs.eval()


def spoken_part(audio):
    """A clip whose words nobody wrote down."""
    return {"role": "speech", "text": "", "audio": audio}


def answer(model, tok, questions, max_tokens, batch):
    """Greedy answers to questions, which are texts, clips or lists of clips: (text, truncated) each."""
    prompts = []
    for question in questions:
        clips = {}
        parts = [synth.text_part(question, loss=False)] if isinstance(question, str) else []
        if not parts:
            clips = dict(enumerate(question if isinstance(question, list) else [question]))
            parts = [spoken_part(number) for number in clips]
        sample = {"parts": None, "messages": [{"role": "user", "content": parts}]}
        prompts.append(encode(sample, clips, tok, reply=True))
    return complete(model, tok, prompts, max_tokens, batch)


def transcribe(model, tok, waveforms, max_tokens, batch, ask=synth.TASKS["transcribe"]["ask"]):
    """What the model hears in clips at 16 kHz, or says of them: asked as in a speech task."""
    sample = {"parts": [spoken_part(0), synth.text_part(ask, loss=False)], "messages": None}
    prompts = [encode(sample, {0: waveform}, tok, reply=True) for waveform in waveforms]
    return [text.strip() for text, _ in complete(model, tok, prompts, max_tokens, batch)]


def load_audio(path):
    """A sound file of any rate and channel count as (samples,) float32 at 16 kHz."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return synth.to_16k(samples.mean(1), rate)


def load_run(c):
    """The exported model of run c.run, on this process's device. UserError if there is none.

    Before run tiny has one, the tiny model that comes with the code answers questions.
    """
    folder = run_folder(c) / "model"
    given = ASSETS / c.run
    if c.ask and given.is_dir() and not folder.is_dir():
        folder = given
        print(f"Run {c.run} has no model yet; {given} answers.", file=sys.stderr)
    if not folder.is_dir():
        raise UserError(f"There is no model in {folder}; train it first: torchrun inserter.py run={c.run}.")
    return load_model(folder).to(device_here()).eval(), open_tokenizer(folder)


def ask(c):
    """The answer to a sound file, or to a text that is the name of none."""
    sound = r".*\.(wave?|flac|ogg|opus|mp3|m4a|aac|aiff?|webm)"
    is_sound = os.path.isfile(c.ask) or re.fullmatch(sound, c.ask, re.I)
    model, tok = load_run(c)
    question = load_audio(c.ask) if is_sound else c.ask
    (text, _), = answer(model, tok, [question], max_tokens=1000, batch=1)
    return text


# --------------------------------------------------------------------------------------------------
# 9. The gap curve
#
# What the method is about, on dev samples that training never sees: how much worse does the model continue
# a text after *hearing* a segment than after *reading* it? In nats per character, so that any corpus and
# tokenizer can be compared. Obedience stands beside it where the corpus has dialogues.
# --------------------------------------------------------------------------------------------------

@torch.compiler.set_stance("force_eager")    # else generation's many shapes would use up the compilations
@torch.no_grad()
def evaluate(c, model, tok):
    """A point of the gap curve, by all ranks together. The loss on text beside it shows what is forgotten."""
    sums = Counter()
    for sample, clips in dev_samples(c, "interleaved"):
        continued, characters = after_speech(sample)
        sums["characters"] += characters
        for how in ("heard", "typed"):
            sums[how] += nats(c, model, encode(continued, clips, tok, typed=how == "typed"))
    for sample, clips in dev_samples(c, "text"):
        sums["text characters"] += sum(len(part["text"]) for part in itertools.chain(*synth.parts_of(sample)))
        sums["text"] += nats(c, model, encode(sample, clips, tok))
    asked = [(*first_exchange(sample), clips) for sample, clips in dev_samples(c, "chat")]
    asked = [(opening, right, clips) for opening, right, clips in asked if right and has_speech(opening)]
    sums["questions"] += len(asked)
    for how in ("spoken", "typed"):
        prompts = [encode(opening, clips, tok, typed=how == "typed", reply=True)
                   for opening, _, clips in asked]
        replies = complete(model, tok, prompts, c.bench.max_tokens, c.bench.batch)
        sums[f"obeys {how}"] += sum(reply == right for (reply, _), (_, right, _) in zip(replies, asked))
    counted = {"heard": "characters", "typed": "characters", "text": "text characters",
               "obeys spoken": "questions", "obeys typed": "questions"}
    total = sum_over_ranks({name: sums[name] for name in [*counted, *counted.values()]})
    point = {name: total[name] / total[unit] for name, unit in counted.items() if total[unit]}
    if "heard" in point:
        point["gap"] = point["heard"] - point["typed"]
    return point


def dev_samples(c, recipe):
    """This rank's share of the first dev samples of a recipe, with their clips; none where there is none."""
    rank, world = rank_and_world()
    path = synth.shard_path(c, recipe, "dev", 0)
    count = synth.sample_count(path) if path.is_file() else 0
    for number in range(rank, min(count, c.train.eval_samples), world):
        sample, files = synth.read_sample(path, number)
        yield sample, decoded(files)


def nats(c, model, encoded):
    """Sum of the losses of a sample; 0 if none of it is a target."""
    with mixed_precision(c):
        return float(model(collate([encoded], model.mels), c.train.loss_chunk))


def after_speech(sample):
    """The sample with loss on the text after its first speech only, and the characters of that text.

    (Markup keeps its loss: a few tokens, the same heard and typed.)
    """
    kept = json.loads(json.dumps(sample))
    seen = False
    characters = 0
    for part in itertools.chain(*synth.parts_of(kept)):
        seen = seen or part["role"] == "speech"
        if part["role"] == "text":
            part["loss"] = part["loss"] and seen
            characters += len(part["text"]) if part["loss"] else 0
    return kept, characters


def first_exchange(sample):
    """A dialogue up to its first answer, and that answer; the empty text where there is none.

    >>> said = [("user", "hi"), ("assistant", "hello"), ("user", "bye")]
    >>> turns = [{"role": role, "content": [synth.text_part(text, False)]} for role, text in said]
    >>> opening, reply = first_exchange({"messages": turns})
    >>> len(opening["messages"]), reply
    (1, 'hello')
    """
    roles = [message["role"] for message in sample["messages"]]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    opening = {"parts": None, "messages": sample["messages"][:first]}
    answers = sample["messages"][first:first + 1]
    return opening, "".join(part["text"] for message in answers for part in message["content"])


def has_speech(sample):
    return any(part["role"] == "speech" for part in itertools.chain(*synth.parts_of(sample)))


# --------------------------------------------------------------------------------------------------
# 10. A run: start, save, continue
#
# runs/<run>/state/<step>.pt holds weights, the optimizers' slots and where every lane stands. It is written
# aside, flushed and renamed, so it is whole or absent. A run that starts again continues from the newest.
# Rank 0 alone reads it, and tells the others.
# --------------------------------------------------------------------------------------------------

def train(c):
    """Run the stages from the start or from the newest state."""
    rank, world = rank_and_world()
    stages = stages_of(c)
    if not stages:
        raise UserError("No stage has a length; give one, as train.stages.pretrain.steps=1000.")
    for name in stages:
        if c.train.stages[name].packs % world:
            raise UserError(f"train.stages.{name}.packs={c.train.stages[name].packs} is no multiple of the "
                            f"{world} processes; choose one that is.")
    start_group()
    state = open_run(c, stages) if rank == 0 else None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:                       # once on every machine
        if c.train.workers:
            fork_server()                    # before synth.py starts one that torchrun's signal would end
        synth.make_shards(Settings(c | {"fresh": False}))
        load_tokenizer(c)                    # which may have to be trained
    gather(None)
    state = from_rank_0(state)
    begun = bool(state)
    progress = Progress(**state["progress"]) if begun else Progress(stages[0])
    folder = run_folder(c) / "model"
    tok = open_tokenizer(folder) if begun and folder.is_dir() else load_tokenizer(c)
    model = fresh_model(c, tok)
    model.recompute = c.train.checkpointing
    if c.train.compile:
        for block in [*model.audio_tower.layers, *model.language_model.model.layers]:
            block.compile()
    model.to(device_here())
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    if begun:
        say(f"continuing run {c.run} in stage {progress.stage} after step {progress.step}")
    say(describe(model))
    for name in stages[stages.index(progress.stage):]:
        if name != progress.stage:
            progress = Progress(name, progress.step)
        if not train_stage(c, model, tok, progress, state, stopping):
            say(f"stopped by a signal after step {progress.step}; the same command continues")
            sys.exit(128 + signal.SIGTERM)
    if rank == 0:
        draw_curves(run_folder(c))
    say(f"run {c.run} is finished: {folder} and curves.png; next: python bench.py")
    if world > 1:
        dist.destroy_process_group()


def stages_of(c):
    """The stages to run: those that have a length, and no stand-ins for weights that are given."""
    given = c["model"]["from"] or c["model"]["encoder"]
    return [name for name, stage in c["train"]["stages"].items()
            if (stage["steps"] or stage["tokens"]) and not (given and stage["from_scratch"])]


def run_folder(c):
    return Path("runs") / c.run


def open_run(c, stages):
    """Make the run's folder, or check that it was begun with these settings: its config.yaml keeps them.

    -> its newest state; {} at its beginning
    """
    folder = run_folder(c)
    if c.fresh and folder.exists():
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder} has no config.yaml, so it may hold something else than a run; remove "
                            "it yourself, or choose another name with run=….")
        shutil.rmtree(folder)
    state = load_state(folder / "state")
    progress = Progress(**state["progress"]) if state else Progress(stages[0])
    over = stages[:stages.index(progress.stage)] if progress.stage in stages else []
    synth.same_settings(
        folder / "config.yaml", c,
        remedy="choose another name with run=…, or start it anew with fresh=true",
        shaping=functools.partial(shaping, over=over),
        begun=bool(state) or (folder / "model").is_dir())
    path = folder / "metrics.jsonl"          # forget what a killed process wrote after its last state
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    known = [line for line in lines
             if state and line.endswith("\n") and json.loads(line)["step"] <= progress.step]
    synth.write_whole(path, "".join(known).encode())
    return state


def shaping(c, over):
    """What of a run's settings (a dict, for they may be read from a file) shapes its weights and batches.

    over: the stages that have ended, so that their length may not change any more
    """
    stages = {}
    for name in stages_of(c):
        stage = c["train"]["stages"][name]
        lengths = () if name in over else ("steps", "tokens")
        stages[name] = {key: value for key, value in stage.items() if key not in lengths}
    model = {key: os.path.abspath(value) if os.path.exists(str(value)) else value
             for key, value in c["model"].items()}
    data = {key: value for key, value in c["synth"].items() if key not in ("workers", "corpus")}
    shaped = ("pack_length", "stretch", "betas", "muon_momentum", "weight_decay", "clip")
    train = {key: c["train"][key] for key in shaped} | {"stages": stages}
    return {"seed": c["seed"], "synth": data, "model": model, "train": train}


def load_state(folder):
    """The newest state that loads; one that does not is named, and the one before it taken. {}: none yet."""
    paths = sorted(folder.glob("*.pt"), reverse=True)
    for path in paths:
        if zipfile.is_zipfile(path) and not zipfile.ZipFile(path).testzip():            # every CRC is right
            return torch.load(path, map_location="cpu", weights_only=True)
        say(f"{path} is damaged; the state before it is taken.")
    if paths:
        raise UserError(f"No state in {folder} is whole; start the run again with fresh=true.")
    return {}


def save_run(c, model, tok, optimizers, progress):
    """Export, then state, by rank 0; every lane's cursor comes from the rank that serves it."""
    rank, world = rank_and_world()
    everywhere = gather(progress.cursors)
    progress.cursors = {lane: everywhere[lane % world][lane] for cursors in everywhere for lane in cursors}
    state = {
        "weights": model.state_dict(),
        "slots": [optimizer.state_dict() for optimizer in optimizers],
        "progress": dataclasses.asdict(progress)}
    if rank == 0:
        with replacing(run_folder(c) / "model") as folder:
            save_model(model, folder)
            save_processor(model, tok, folder)
            shutil.copy(run_folder(c) / "config.yaml", folder / "config.yaml")
            card = (ASSETS / "model_card.md").read_text("utf-8").replace("RUN", c.run)
            (folder / "README.md").write_text(card, "utf-8")
        path = run_folder(c) / "state" / f"{progress.step:08d}.pt"
        for left in path.parent.glob(".*"):  # by a process that was killed while it wrote
            left.unlink()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        synth.write_whole(path, buffer.getbuffer())
        states = sorted(path.parent.glob("*.pt"))
        until_now = [one for one in states if one <= path]              # later ones are damaged
        for old in set(states) - set(until_now[-c.train.keep_states:]):
            old.unlink()
    gather(None)                             # the others wait, or would run into a time-out


def start_group():
    """Join the other ranks: on GPUs NCCL sums gradients; gloo does on CPUs, and carries what is no tensor."""
    here = device_here()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if rank_and_world()[1] > 1:
        # with patience: another's long save is no failure, and torchrun ends all ranks if one dies
        patience = datetime.timedelta(days=1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo", timeout=patience)


def describe(model):
    """What is trained, where and by which attention."""
    ways = ["fused" if uses_kernel(device_here(), module.head_size) else "plain"
            for module in (model.audio_tower, model.language_model)]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return (f"{millions:.1f} M parameters on {rank_and_world()[1]} x {device_here().type}; attention: "
            f"{ways[0]} in the encoder, {ways[1]} in the LLM")


def rank_and_world():
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device_here():
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def mixed_precision(c):
    """Context in which matrix products are bfloat16, where train.precision wants that here."""
    device = device_here()
    half = c.train.precision == "bfloat16" or (c.train.precision == "auto" and is_recent_gpu(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def sum_over_ranks(values):
    """Each value summed over the ranks; float64 keeps counts and checksums exact."""
    total = torch.tensor(list(map(float, values.values())), dtype=torch.float64, device=device_here())
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def gather(thing):
    """The thing of every rank, on every rank; who comes first waits for the others, however long."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def from_rank_0(thing):
    things = [thing]
    if dist.is_initialized():
        dist.broadcast_object_list(things)
    return things[0]


def say(line):
    """Print a line on rank 0."""
    if rank_and_world()[0] == 0:
        print(line, flush=True)


# --------------------------------------------------------------------------------------------------
# 11. The log: console, metrics.jsonl, curves
#
# Every log_every steps a row of metrics.jsonl says what happened since: loss, gradient norm, speed, waste.
# Points of the gap curve stand between them, {"eval": {…}}; curves.png is drawn from both when the run ends.
# --------------------------------------------------------------------------------------------------

class Log:
    """One line per log step, and metrics.jsonl."""

    def __init__(self, c, progress):
        self.c = c
        self.progress = progress
        self.stage = c.train.stages[progress.stage]
        self.first_share = progress.share(self.stage)
        self.begun = self.since = time.perf_counter()
        self.sums = Counter()

    def step(self, loss, factor, norm, totals):
        """Count a step; every log_every steps write what happened since."""
        self.sums.update(totals | sum_over_ranks({"loss": loss}))
        if not is_due(self.c.train.log_every, self.progress.step):
            return
        n = self.sums
        now = time.perf_counter()
        seconds = now - self.since
        row = {
            "loss": n["loss"] / max(n["targets"], 1),
            "lr": factor * self.stage.lr,
            "grad norm": norm,
            "tokens/s": n["positions"] / seconds,
            "audio s/s": n["audio samples"] / RATE / seconds,
            "waste": n["waste"] / (n["positions"] + n["waste"]),
            "waiting": n["waited"] / seconds / rank_and_world()[1],
            "skipped": n["skipped"],
            "GB": torch.cuda.max_memory_allocated() / 1e9}
        self.write(row | {"targets": self.progress.targets, "batch": n["batch"]})
        share = self.progress.share(self.stage)
        left = (now - self.begun) * (1 - share) / max(share - self.first_share, 1e-9)
        cells = " | ".join(f"{name} {value:,.4g}" for name, value in row.items() if value)
        say(f"{self.progress.step:>7} | {cells} | {self.progress.stage}: {left / 60:.1f} min left")
        self.since = now
        self.sums = Counter()

    def point(self, point):
        """Keep a point of the gap curve."""
        self.write({"eval": point})
        cells = " | ".join(f"{name} {value:.3f}" for name, value in point.items())
        say(f"{self.progress.step:>7} | dev | {cells}")
        self.since = time.perf_counter()     # evaluating is no training

    def write(self, row):
        if rank_and_world()[0] == 0:
            line = json.dumps({"step": self.progress.step, "stage": self.progress.stage} | row) + "\n"
            with open(run_folder(self.c) / "metrics.jsonl", "a") as file:
                file.write(line)


def draw_curves(folder):
    """curves.png of a run's folder: the training loss, the gap curve and obedience on dev, by step."""
    from matplotlib.figure import Figure     # half a second that only this needs

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    panels = {
        "training loss, nats per target": ["loss"],
        "dev: text after speech, nats per character": ["heard", "typed", "gap", "text"],
        "dev: share of answers equal to the reference": ["obeys spoken", "obeys typed"]}
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, 3), panels.items()):
        for name in names:
            points = [(row["step"], values[name]) for row in rows if name in (values := row.get("eval", row))]
            axis.plot(*np.array(points).reshape(-1, 2).T, label=name, marker=None if name == "loss" else "o")
        for stage, start in {row["stage"]: row["step"] for row in reversed(rows)}.items():
            axis.axvline(start, color="0.8", zorder=0)
            axis.text(start, 0.98, stage, transform=axis.get_xaxis_transform(), va="top", rotation=90)
        axis.set(title=title, xlabel="step", yscale="log" if "loss" in names and points else "linear")
        axis.legend()
    figure.savefig(folder / "curves.png", dpi=110)


# --------------------------------------------------------------------------------------------------
# 12. The fused kernel: computes exactly `plain_attention`; skip on first reading
#
# Flash attention: a program holds a tile of query rows of one document and head, walks over the keys they may
# see, and keeps a running maximum and sum, so scores never reach memory; `lse`, the logarithm of every row's
# sum, is all the backward pass needs to make them again. That is two kernels without atomics, so the same
# bits come out every time: `query_gradient` holds queries and walks over keys, `key_gradient` holds keys and
# walks over queries. Work is the sum of squared document lengths; no program looks past its own. Tensors
# reach a kernel as (pointer, stride of a position, stride of a head); rows count from a document's start.
# --------------------------------------------------------------------------------------------------

HEAD_SIZES = (16, 32, 64, 128)               # others take plain_attention
TILE = 128                                   # rows of an entry of the table of tiles
compiled = triton.jit if triton else lambda function: function


def uses_kernel(device, head_size):
    """Whether such heads are attended by `fused_attention`: on a GPU, or by Triton's interpreter."""
    if triton is None or head_size not in HEAD_SIZES:
        return False
    return is_recent_gpu(device) or os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache
def is_recent_gpu(device):
    """Whether it computes in bfloat16 and has what the kernel needs: Ampere (A100, RTX 30) or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def fused_attention(q, k, v, cu_seqlens, causal, tiles=None):
    """Arguments and result are those of `plain_attention`; tiles: fused_tiles' result, shared by layers.

    D is one of HEAD_SIZES; bfloat16 and float16 are added up in float32, and float32 is computed as such. The
    last dimension is contiguous, or copied; positions and heads may lie at any strides.
    """
    if torch.is_autocast_enabled(q.device.type):                    # which does not know operators of our own
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if tiles is None:
        tiles = fused_tiles(to_device(cu_seqlens, q.device), causal, len(q))
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out, _ = attention_op(q, k, v, tiles, causal)
    return out


def fused_tiles(cu_seqlens, causal, positions):
    """The kernels' table of tiles (n, 4) int32, the most work first, made without waiting for the device.

    A row is: first position and length of a document, the number of a tile in it, and that of the tile's
    mirror image. A causal tile has as many keys to walk over as its mirror image has queries, so one order
    serves all kernels. n is the most tiles there can be; surplus rows name a tile past their document's end,
    where programs leave at once.

    >>> fused_tiles(torch.tensor([0, 300, 300, 310]), True, 310)[:4].tolist()
    [[0, 300, 2, 0], [0, 300, 1, 1], [0, 300, 0, 2], [300, 10, 0, 0]]
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    counts = (lengths + TILE - 1) // TILE                                             # tiles of each document
    ends = counts.cumsum(0)
    number = torch.arange(positions // TILE + len(lengths), device=cu_seqlens.device)   # (n,)
    document = torch.searchsorted(ends, number, right=True).clamp(max=len(lengths) - 1)
    count = counts[document]
    index = torch.minimum(number - (ends - counts)[document], count)
    is_real = index < count
    mirror = torch.where(is_real, count - 1 - index, count)
    work = torch.where(is_real, index + 1 if causal else count, 0)
    table = torch.stack([starts[document], lengths[document], index, mirror], 1).int()
    return table[work.argsort(descending=True, stable=True)]


@compiled
def tile_of(tiles, column: constexpr, ROWS: constexpr):
    """The program's document (first position, length) and first row there. Column 2: tile, 3: mirror."""
    entry = tiles + tl.program_id(1) * ROWS // 128 * 4        # several programs share a TILE larger than ROWS
    first = tl.load(entry + column) * 128 + tl.program_id(1) * ROWS % 128
    return tl.load(entry).to(tl.int64), tl.load(entry + 1), first


@compiled
def cells(x, start, head, rows, D: constexpr):
    """Pointers to rows of one head of a document: (rows, D)."""
    return x[0] + start * x[1] + head * x[2] + rows[:, None] * x[1] + tl.arange(0, D)[None, :]


@compiled
def read(x, start, head, rows, length, D: constexpr):
    """Rows of one head of a document, zeros past its end: (rows, D)."""
    return tl.load(cells(x, start, head, rows, D), mask=rows[:, None] < length, other=0.0)


@compiled
def dot(a, b, total=None):
    return tl.dot(a, b, total, input_precision="ieee")                # or float32 would be rounded to 10 bits


@compiled
def scores(products, query, key, length, edge: constexpr, causal: constexpr, D: constexpr):
    """A tile's logits from products of queries and keys: scaled, in bits (2 ** x is cheaper than e ** x), and
    on an edge -inf where a query may not look. Queries past the document's end are read by nobody."""
    if edge:
        products = tl.where(key <= query if causal else key < length, products, float("-inf"))
    return products * (1.4426950408889634 * D ** -0.5)


@compiled
def row_products(a, b, ROWS: constexpr):
    """Sum of a * b along each row. In float32 it is summed as `dot` sums, for in a query that sees one key it
    has to cancel against such a sum exactly: its gradient is zero."""
    if a.dtype == tl.float32:
        diagonal = tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :]
        result = tl.sum(tl.where(diagonal, dot(a, b.T), 0.0), 1)
    else:
        result = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    return result


@compiled
def forward_kernel(q, k, v, out, lse, T, tiles, causal: constexpr, group: constexpr, D: constexpr,
                   ROWS: constexpr, COLS: constexpr):
    start, length, first = tile_of(tiles, 2, ROWS)
    if first >= length:
        return
    head = tl.program_id(0)
    rows = first + tl.arange(0, ROWS)
    queries = read(q, start, head, rows, length, D)
    mean = tl.zeros([ROWS, D], tl.float32)                              # not yet divided by `total`
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)                    # the largest score so far
    last = tl.minimum(first + ROWS, length) if causal else length
    full = first if causal else length // COLS * COLS        # every query sees the keys before: no mask there
    for edge in tl.static_range(2):
        for col in range(full if edge else 0, last if edge else full, COLS):
            cols = col + tl.arange(0, COLS)
            keys = read(k, start, head // group, cols, length, D)
            s = scores(dot(queries, keys.T), rows[:, None], cols[None, :], length, edge, causal, D)
            higher = tl.maximum(top, tl.max(s, 1))             # finite: every row sees the first key it meets
            p = tl.exp2(s - higher[:, None])
            shrink = tl.exp2(top - higher)
            values = read(v, start, head // group, cols, length, D)
            total = total * shrink + tl.sum(p, 1)
            mean = dot(p.to(values.dtype), values, mean * shrink[:, None])
            top = higher
    tl.store(cells(out, start, head, rows, D), mean / total[:, None], mask=rows[:, None] < length)
    tl.store(lse + head * T + start + rows, top + tl.log2(total), mask=rows < length)


@compiled
def query_gradient(q, k, v, out, dout, dq, lse, delta, T, tiles, causal: constexpr, group: constexpr,
                   D: constexpr, ROWS: constexpr, COLS: constexpr):
    """Also writes delta = sum(out * dout) of each row, which `key_gradient` reads afterwards."""
    start, length, first = tile_of(tiles, 2, ROWS)
    if first >= length:
        return
    head = tl.program_id(0)
    rows = first + tl.arange(0, ROWS)
    queries = read(q, start, head, rows, length, D)
    dmean = read(dout, start, head, rows, length, D)
    inner = row_products(dmean, read(out, start, head, rows, length, D), ROWS)
    tl.store(delta + head * T + start + rows, inner, mask=rows < length)
    size = tl.load(lse + head * T + start + rows, mask=rows < length, other=0.0)
    gradient = tl.zeros([ROWS, D], tl.float32)
    for col in range(0, tl.minimum(first + ROWS, length) if causal else length, COLS):
        cols = col + tl.arange(0, COLS)
        keys = read(k, start, head // group, cols, length, D)
        values = read(v, start, head // group, cols, length, D)
        s = scores(dot(queries, keys.T), rows[:, None], cols[None, :], length, True, causal, D)
        ds = tl.exp2(s - size[:, None]) * (dot(dmean, values.T) - inner[:, None])
        gradient = dot(ds.to(keys.dtype), keys, gradient)
    tl.store(cells(dq, start, head, rows, D), gradient * D ** -0.5, mask=rows[:, None] < length)


@compiled
def key_gradient(q, k, v, dout, dk, dv, lse, delta, T, tiles, causal: constexpr, group: constexpr,
                 D: constexpr, ROWS: constexpr, COLS: constexpr):
    """Tiles stand on their side: rows are keys, columns queries. The query heads of a key's head add up."""
    start, length, first = tile_of(tiles, 3, ROWS)
    if first >= length:
        return
    home = tl.program_id(0)
    rows = first + tl.arange(0, ROWS)
    keys = read(k, start, home, rows, length, D)
    values = read(v, start, home, rows, length, D)
    dkeys = tl.zeros([ROWS, D], tl.float32)
    dvalues = tl.zeros([ROWS, D], tl.float32)
    for head in range(home * group, (home + 1) * group):
        for col in range(first if causal else 0, length, COLS):
            cols = col + tl.arange(0, COLS)
            queries = read(q, start, head, cols, length, D)
            dmean = read(dout, start, head, cols, length, D)
            size = tl.load(lse + head * T + start + cols, mask=cols < length, other=0.0)
            inner = tl.load(delta + head * T + start + cols, mask=cols < length, other=0.0)
            s = scores(dot(keys, queries.T), cols[None, :], rows[:, None], length, causal, causal, D)
            p = tl.exp2(s - size[None, :])
            dvalues = dot(p.to(dmean.dtype), dmean, dvalues)
            ds = p * (dot(values, dmean.T) - inner[None, :])
            dkeys = dot(ds.to(queries.dtype), queries, dkeys)
    tl.store(cells(dk, start, home, rows, D), dkeys * D ** -0.5, mask=rows[:, None] < length)
    tl.store(cells(dv, start, home, rows, D), dvalues, mask=rows[:, None] < length)


def tile_shape(kernel, D, dtype):
    """(rows, columns, warps, loads in flight) of a kernel's tiles: as large as its warps' registers hold."""
    if dtype == torch.float32:               # no tensor cores; a dot's operands take registers too
        shapes = {
            forward_kernel: (32, 32, 8, 1),
            query_gradient: (16, 16, 8, 1),
            key_gradient: (32, 16, 4, 1)}
        return shapes[kernel]
    if kernel is forward_kernel:
        return TILE, 64, 4 if D < 128 else 8, 3               # four warps wait less for each other than eight
    if kernel is query_gradient:
        return TILE, 64, 8, 2                                           # holds a second tile of scores
    return TILE, 64 if D < 128 else 32, 8, 2                            # and two gradients


def launch(kernel, tiles, causal, q, k, *others):
    """Programs for every tile and head; the heads of one tile stand together, so the longest come first."""
    positions, heads, D = q.shape
    rows, cols, warps, stages = tile_shape(kernel, D, q.dtype)
    tensors = [(x, x.stride(0), x.stride(1)) if x.dim() == 3 else x for x in (q, k, *others)]
    programs = k.shape[1] if kernel is key_gradient else heads
    grid = (programs, len(tiles) * (TILE // rows))
    group = heads // k.shape[1]
    kernel[grid](*tensors, positions, tiles, causal, group, D, rows, cols, num_warps=warps, num_stages=stages)


@torch.library.custom_op("inserter::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = empty_output(q, k, v, tiles, causal)
    launch(forward_kernel, tiles, causal, q, k, v, out, lse)
    return out, lse


@attention_op.register_fake
def empty_output(q, k, v, tiles, causal):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("inserter::attention_backward", mutates_args=())
def gradient_op(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, tiles: Tensor,
                causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = empty_gradients(q, k, v)
    delta = torch.empty_like(lse)
    launch(query_gradient, tiles, causal, q, k, v, out, dout, dq, lse, delta)
    launch(key_gradient, tiles, causal, q, k, v, dout, dk, dv, lse, delta)
    return dq, dk, dv


@gradient_op.register_fake
def empty_gradients(q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep_for_backward(ctx, inputs, output):
    q, k, v, tiles, ctx.causal = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, tiles)


def run_backward(ctx, dout, _):
    q, k, v, out, lse, tiles = ctx.saved_tensors
    dq, dk, dv = gradient_op(q, k, v, out, lse, dout.contiguous(), tiles, ctx.causal)
    return dq, dk, dv, None, None


attention_op.register_autograd(run_backward, setup_context=keep_for_backward)


# --------------------------------------------------------------------------------------------------
# 13. The command line
# --------------------------------------------------------------------------------------------------

def main(arguments):
    c = synth.load_config(arguments)
    if c.ask:
        print(ask(c))
    else:
        train(c)


if __name__ == "__main__":
    synth.run(main)
