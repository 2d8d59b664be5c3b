"""InSerter: a speech LLM (encoder, adapter, LLM) trained on text in which random segments are speech.

One interleaved sample becomes one sequence. `ids` is what the model reads; under each id stands its label,
the token to be predicted there, or - where the loss does not look:

    parts    text "tom puts the "    speech, 1.62 s                                text ". it is red"
    ids      tom   puts  the         <|audio_bos|> <|AUDIO|> x 40 <|audio_eos|>    .   it  is   red  <end>
    labels   puts  the   -           -             -              .                it  is  red  <end>  -

Speech is conditioned on and never predicted; the text after it is, from its first token on. The label of that
token stands at <|audio_eos|>: to get it right, the model has to use what it has heard. That is the method.

Samples are packed end to end, without padding; attention stays inside a sample by its bounds, `cu_seqlens`:

    waveforms ── log-mel ── Encoder ── Adapter ──┐ one vector per 40 ms, put in place of each <|AUDIO|>
    ids (T,) ────────────── embeddings ──────────┴── LLM ── LM head at the labelled positions ── loss

    torchrun inserter.py                                  train: the stages that config.yaml lists
    torchrun --nproc-per-node=4 inserter.py profile=qwen  on four GPUs
    python inserter.py preview=8                          preview.html: hear samples, see ids and labels
    python inserter.py ask=question.wav                   answer a spoken question
    python inserter.py ask="what colour is the sun"       or a typed one
    python inserter.py write=own.jsonl                    let the LLM write: a corpus for synth.py

Legend  T positions of a pack   d width   Hq, Hkv query and key-value heads   D head size   V vocabulary
        N, F, L  frames of a clip, frames computed of it (N and two of context), convolution outputs
        G packs of a step   B prompts being answered
"""
from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from functools import lru_cache
from hashlib import file_digest, sha256
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Callable, Iterator

import jinja2
import numpy as np
import soundfile
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2AudioConfig
from transformers.audio_utils import mel_filter_bank
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import synth
from synth import Settings, UserError

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:                          # it comes with torch on Linux; elsewhere attention is plain
    triton = None

RATE = synth.RATE                            # samples per second
HOP = 160                                    # samples between log-mel frames: 10 ms
LONGEST = 30 * RATE                          # samples of the longest clip that Whisper's positions cover
MAX_FRAMES = LONGEST // HOP                  # 3000
IGNORE = -100                                # label of a position without loss, as in PyTorch's cross_entropy


# --------------------------------------------------------------------------------------------------
# 1. One sample: its ids and its labels
#
# The only place that knows special tokens, the markup of dialogues and the loss mask. Ids and labels are made
# together, so they cannot drift apart. Dialogues are written as the LLM's own chat template writes them.
# --------------------------------------------------------------------------------------------------

AUDIO, AUDIO_BOS, AUDIO_EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"         # Qwen2-Audio's
TURN, TURN_END = "<|im_start|>", "<|im_end|>"                           # ChatML's, as in Qwen and SmolLM2
END, LLAMA_END = "<|endoftext|>", "<|end_of_text|>"                     # of a document; no template has it


def audio_positions(samples: int) -> int:
    """Positions that a clip of so many samples takes in the LLM's sequence: one per 40 ms.

    Frames of 10 ms are halved by the encoder's second convolution, and again by pooling (section 2).

    >>> [audio_positions(n) for n in (160, 320, 321, 32000, 32161, 480000)]
    [0, 0, 1, 50, 50, 750]
    """
    return convolved(samples) // 2


def convolved(samples: int) -> int:
    """L: the outputs of the encoder's two convolutions for a clip, one per 20 ms."""
    return (math.ceil(samples / HOP) - 1) // 2 + 1


class Tokenizer:
    """Text to ids, piece by piece. Special tokens that occur inside a text are read as plain text.

    audio, audio_bos, audio_eos   ids of the audio tokens
    opening                       ids that begin a text that is no dialogue: <|begin_of_text|> in Llama 3
    end, turn_end                 ids that end a document, and the assistant's turn; `stops` are both
    template                      the chat template by which dialogues are written, clips included
    trims                         whether it drops a line break at a turn's end (Llama 3)
    digest                        of all that turns text into ids
    """

    def __init__(self, hf: PreTrainedTokenizerFast):
        self.hf = hf
        self.backend = hf.backend_tokenizer
        self.backend.encode_special_tokens = True
        self.digest = sha256(self.backend.to_str().encode()).hexdigest()
        if self.decode(self("a") + self("b")) != "ab":
            raise UserError(f"The tokenizer of {hf.name_or_path} puts a space before every piece of text, so "
                            "speech cannot be put between pieces; take an LLM with byte-level BPE (Qwen, "
                            "SmolLM2, Llama 3).")
        self.audio, self.audio_bos, self.audio_eos = hf.convert_tokens_to_ids([AUDIO, AUDIO_BOS, AUDIO_EOS])
        self.opening = self.backend.encode("").ids
        template = hf.get_chat_template() if hf.chat_template else CHATML          # of several, the default
        self.template = template if template.startswith(NUMBERED_CLIPS) else NUMBERED_CLIPS + template
        hf.chat_template = self.template     # an export's tokenizer and processor share one file of it
        special = [i for i, token in hf.added_tokens_decoder.items() if token.special]
        *_, before_answer, after_answer = self.markup(("user", "assistant"), False)
        self.turn_end = next((i for i in after_answer if i in special), None)
        if self.turn_end is None:
            raise UserError(f"The chat template of {hf.name_or_path} ends the assistant's turn by no special "
                            "token, so nothing says when to stop; take a model whose template does.")
        if self.markup(("user",), True)[-1] != before_answer:
            raise UserError(f"The chat template of {hf.name_or_path} asks for an answer otherwise than it "
                            "writes one (does the model think aloud?); take a model whose template does not.")
        ends = [name for name in (END, LLAMA_END) if name in hf.get_vocab()]
        self.end = hf.convert_tokens_to_ids(ends[0]) if ends else self.turn_end
        self.stops = [self.turn_end, self.end]
        self.trims = "\x02\n" not in self.rendered([{"role": "user", "content": "\x02\n"}], False)
        self.markup = lru_cache(maxsize=1000)(self.markup)              # dialogues have few forms

    def __call__(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def markup(self, roles: tuple[str, ...], reply: bool) -> list[list[int]]:
        """Ids of what the chat template writes before, between and after a dialogue's messages.

        roles: of the messages; reply: end with the opening of the assistant's turn
        -> len(roles) + 1 lists. In ChatML, which puts a system turn before a dialogue that has none,
           markup(("user", "assistant", "user"), True) is
               <|im_start|>system … <|im_start|>user\\n
               <|im_end|>\\n<|im_start|>assistant\\n
               <|im_end|>\\n<|im_start|>user\\n          of which the assistant's end is a target, no more
               <|im_end|>\\n<|im_start|>assistant\\n
        """
        messages = [{"role": role, "content": f"\x02{i}\x03"} for i, role in enumerate(roles)]
        pieces = re.split("\x02(\\d+)\x03", self.rendered(messages, reply))                # markup, number, …
        if pieces[1::2] != [str(i) for i in range(len(roles))]:
            raise UserError(f"The chat template of {self.hf.name_or_path} does not write the turns of a "
                            f"dialogue ({', '.join(roles)}) once each and in order; change or drop those.")
        self.backend.encode_special_tokens = False
        ids = [self(piece) for piece in pieces[::2]]
        self.backend.encode_special_tokens = True
        return ids

    def rendered(self, messages: list[dict], reply: bool) -> str:
        """A dialogue as the chat template writes it."""
        try:
            return self.hf.apply_chat_template(messages, chat_template=self.template, tokenize=False,
                                               add_generation_prompt=reply)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"The chat template of {self.hf.name_or_path} takes no dialogue of the turns "
                            f"{roles} ({error}); change or drop those dialogues.") from None


@dataclasses.dataclass
class Encoded:
    """One sample: ids and labels (n,), and its clips; labels[t] is the token after position t, or IGNORE."""
    name: str
    ids: list[int]
    labels: list[int]
    clips: list[np.ndarray]
    word_ids: list[list[int]]                # the tokens of each clip's words, which a CTC stage asks for


def encode(sample: dict, clips: dict[str, np.ndarray], tok: Tokenizer, typed: bool = False,
           reply: bool = False) -> Encoded:
    """Turn a sample (see synth.py) into ids and labels.

    clips: the waveform of each speech part's "audio", (samples,) at 16 kHz
    typed: read every speech part as its text instead (the ceiling that the gap is measured against)
    reply: end with the opening of the assistant's turn, for generation

    Every text part says whether it carries loss. Markup does so twice: what ends an assistant's turn
    (<|im_end|>), and the <|endoftext|> that ends a document. The audio tokens never do.

    {"parts": [text "hi ", speech of 2 positions, text " you"]}, loss on both texts, gives
        ids     hi  <|audio_bos|>  <|AUDIO|>  <|AUDIO|>  <|audio_eos|>   you           <|endoftext|>
        labels  -   -              -          -           you            <|endoftext|>  -
    """
    encoded = Encoded(sample.get("id", ""), [], [], [], [])
    is_target: list[bool] = []

    def put(tokens: list[int], loss: bool) -> None:
        encoded.ids.extend(tokens)
        is_target.extend([loss] * len(tokens))

    def put_speech(part: dict, in_dialogue: bool) -> None:
        clip = clips[part["audio"]]
        encoded.clips.append(clip)
        encoded.word_ids.append(word_tokens(part, tok))
        if in_dialogue:                      # the template numbers the clips of a dialogue
            put(tok(f"Audio {len(encoded.clips)}: "), False)
        heard = [tok.audio] * audio_positions(len(clip))
        put([tok.audio_bos, *heard, tok.audio_eos], False)

    def put_parts(parts: list[dict], in_dialogue: bool) -> None:
        for part, text in spaces_moved(parts):
            if part["role"] == "text":
                put(tok(text), part["loss"])
            elif typed:
                put(tok(text), False)
            else:
                put_speech(part, in_dialogue)
                cut_off = tok.trims and part is parts[-1]               # so transformers would write it
                if in_dialogue and not cut_off:
                    put(tok("\n"), False)

    if sample["parts"]:
        put(tok.opening, False)
        put_parts(sample["parts"], in_dialogue=False)
        if not reply:
            put([tok.end], not sample.get("endless"))
    else:
        messages = sample["messages"]
        markup = tok.markup(tuple(message["role"] for message in messages), reply)
        put(markup[0], False)
        for message, after in zip(messages, markup[1:]):
            put_parts(message["content"], in_dialogue=True)
            ends = message["role"] == "assistant" and tok.turn_end in after
            targets = after.index(tok.turn_end) + 1 if ends else 0
            put(after[:targets], True)
            put(after[targets:], False)

    following = zip(encoded.ids[1:], is_target[1:])
    encoded.labels = [i if loss else IGNORE for i, loss in following] + [IGNORE]
    return encoded


def word_tokens(part: dict, tok: Tokenizer) -> list[int]:
    """The words of a speech part as tokens, in lower case, without punctuation: what a CTC stage asks for."""
    words = synth.WORD.findall(part["text"].lower())
    return [i for word in words for i in tok(word if "\u3400" <= word < "\ua000" else f" {word}")]


def spaces_moved(parts: list[dict]) -> list[tuple[dict, str]]:
    """Each part with its text; spaces right before speech belong to the speech.

    So they are tokenised only where speech is read as text: a lone space is a token that no pretrained LLM
    has seen, and so heard and typed sequences have the same targets.

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


def read_encoded(path: Path, number: int, tok: Tokenizer) -> Encoded:
    """Read sample `number` of a shard, verified, as ids, labels and clips."""
    sample, files = synth.read_sample(path, number)
    return encode(sample, decoded(files), tok)


def decoded(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    return {name: synth.decode_flac(data) for name, data in files.items()}


# --------------------------------------------------------------------------------------------------
# 2. The model
#
# Whisper's encoder, one linear layer, and an LLM (Qwen2; or Qwen3, Llama), all on packed sequences. Modules
# are named so that state_dict() is a Qwen2-Audio checkpoint, name by name: audio_tower (Encoder),
# multi_modal_projector (Adapter), language_model (LLM). Blocks get attention as a function,
# attend(q, k, v): packed for training, with a cache for generation; so each block is written once. No block
# knows its number, so that all of one kind are compiled as one.
# --------------------------------------------------------------------------------------------------

def plain_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    """Softmax attention of every position over its own document only (the positions before it, if `causal`).

    q           (T, Hq, D)
    k, v        (T, Hkv, D); query head h reads key-value head h // (Hq / Hkv)
    cu_seqlens  (documents + 1,) int32 from 0 to T, empty ones allowed: [0, 3, 10] is documents of 3 and 7
    -> (T, Hq, D)

    This is the meaning. Two faster ways compute exactly this, many documents at once: `bucketed_attention` on
    a CPU and `fused_attention` on a GPU (sections 12 and 13). `packed_attention` chooses.
    """
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        qkv = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]                   # each (1, H, L, D)
        out = F.scaled_dot_product_attention(*qkv, is_causal=causal, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))                                          # (L, Hq, D)
    return torch.cat(outputs)


class EncoderBlock(nn.Module):
    """Whisper's block: attention, then GELU, each behind its layer norm. Keys carry no bias."""

    def __init__(self, config: Any):
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

    def forward(self, x: Tensor, attend: Callable) -> Tensor:
        h = self.self_attn_layer_norm(x)                                                # (T, d)
        q, k, v = (self.self_attn[name](h).unflatten(1, (self.heads, -1))               # (T, H, D)
                   for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.self_attn.out_proj(attend(q, k, v).flatten(1))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Encoder(nn.Module):
    """Whisper's encoder on packed clips, pooled by 2 at its end: one vector per 40 ms of speech."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.head_size = config.d_model // config.encoder_attention_heads
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, 3)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, 3)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.embed_positions.requires_grad_(False)                                  # sinusoids, never trained
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, waveforms: list[Tensor], recompute: bool) -> Tensor:
        """List of 1-D waveforms -> (sum of audio_positions, d), clips in order."""
        device = self.conv1.weight.device
        samples = [len(w) for w in waveforms]
        mel = log_mel(waveforms, self.config.num_mel_bins, device)                      # (sum of F, mels)
        mel = mel.to(self.conv1.weight.dtype)         # a model that is bfloat16 itself, without autocast
        x = self.convolutions(mel, samples)                                             # (sum of L, d)
        lengths = torch.tensor([convolved(n) for n in samples])
        _, position = ragged(lengths)
        x = x + self.embed_positions(sent(position, device))
        starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        x = F.pad(x, (0, 0, 0, -len(x) % 16))             # one more clip, heard by nobody: see batch_of
        attend = packed_attention(F.pad(starts, (0, 1), value=len(x)), False, x, self.head_size)
        x = run_blocks(self.layers, x, recompute, attend)
        owner, pair = ragged(lengths // 2)            # pooled inside each clip; an odd last output is dropped
        first = sent(starts[owner] + 2 * pair, device)
        pooled = (x.index_select(0, first) + x.index_select(0, first + 1)) / 2
        return self.layer_norm(pooled)

    def convolutions(self, mel: Tensor, samples: list[int]) -> Tensor:
        """Both convolutions on packed frames: (sum of F, mels) -> (sum of L, d). No clip sees another.

        Each clip gets a slot of even length P >= N + 3:

            slot      0  m0 m1 m2 m3 … m(F-1) 0    zeros: the padding of the first convolution
            c1        ?  c0 c1 c2 c3 …             c(t) is centred on frame t; ? belongs to the slot before
            c2          └ ?c0c1 ┘ └ c1c2c3 ┘ …     ? has to be the second's padding: it is set to zero
        """
        device = mel.device
        slots = torch.tensor([(math.ceil(n / HOP) + 4) // 2 * 2 for n in samples])      # P
        starts = slots.cumsum(0) - slots
        owner, frame = ragged([context_frames(n) for n in samples])
        rows = sent(starts[owner] + 1 + frame, device)
        x = mel.new_zeros(int(slots.sum()) + 2, mel.shape[1]).index_copy(0, rows, mel)
        x = F.gelu(convolve(x, self.conv1, stride=1))                                   # (sum of P, d)
        x = F.pad(x, (0, 0, 1, 1)).index_fill(0, sent(starts, device), 0)
        x = F.gelu(convolve(x, self.conv2, stride=2))
        owner, output = ragged([convolved(n) for n in samples])
        return x[sent(starts[owner] // 2 + output, device)]


def convolve(x: Tensor, conv: nn.Conv1d, stride: int) -> Tensor:
    """Convolution of width 3 over packed rows (T, in) without padding -> ((T - 3) // stride + 1, out).

    Three shifted views joined and one matrix product: as fast as conv1d, and no transposed copies.
    """
    taps = torch.cat([x[i:len(x) - 2 + i:stride] for i in range(3)], 1)                 # (rows, 3 in)
    return F.linear(taps, conv.weight.transpose(1, 2).flatten(1), conv.bias)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. A GPU fetches it from pinned memory by itself; for any other one would wait."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def ragged(lengths: list[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Which piece each row of a packed tensor belongs to, and its place within the piece: (sum,) int64 each.

    >>> ragged([2, 0, 3])
    (tensor([0, 0, 2, 2, 2]), tensor([0, 1, 0, 1, 2]))
    """
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    first = lengths.cumsum(0) - lengths
    return owner, torch.arange(len(owner)) - first[owner]


class Adapter(nn.Module):
    """From the encoder's width to the LLM's."""

    def __init__(self, config: Qwen2AudioConfig):
        super().__init__()
        self.linear = nn.Linear(config.audio_config.d_model, config.text_config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class LLMBlock(nn.Module):
    """Grouped-query attention with rotary positions, then SwiGLU, each behind its RMS norm.

    So Qwen2, Qwen3 and Llama are built, but for two details: Qwen2's queries, keys and values have biases,
    and Qwen3's queries and keys pass norms of their own, head by head.
    """

    def __init__(self, config: Any):
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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
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

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.head_size = head_size_of(config)
        layers = (LLMBlock(config) for _ in range(config.num_hidden_layers))
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(layers),
            "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor, attend: Callable, recompute: bool) -> Tensor:
        """Embeddings (T, d) -> hidden states (T, d), ready for lm_head."""
        speed = rope_speed(self.config, self.head_size, x.device)
        angle = position_ids[:, None, None].float() * speed                             # (T, 1, D/2)
        x = run_blocks(self.model.layers, x, recompute, (angle.cos(), angle.sin()), attend)
        return self.model.norm(x)


def head_size_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_speed(config: Any, head_size: int, device: torch.device | None = None) -> Tensor:
    """Radians by which each pair of a head turns from one position to the next: (D / 2,)."""
    kind = config.rope_parameters["rope_type"]
    if kind != "default":                # Llama 3 turns slow pairs slower still, by transformers' own table
        speed, _ = ROPE_INIT_FUNCTIONS[kind](config, device)
        return speed
    # transformers' own rounding: a unit in the last place of a speed is 1e-4 radians at position 1000
    exponent = torch.arange(0, head_size, 2, device=device).float() / head_size
    return 1 / config.rope_parameters["rope_theta"] ** exponent


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: pairs (i, i + D/2) of x (T, H, D) turned by the angles of cosine and sine `rope`."""
    cos, sin = rope                                                                     # (T, 1, D/2) float32
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def run_blocks(blocks: nn.ModuleList, x: Tensor, recompute: bool, *args: Any) -> Tensor:
    """Blocks in turn; with `recompute` each keeps only its input, and the backward pass computes it again."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = computed_again(block, x, *args)
        else:
            x = block(x, *args)
    return x


def computed_again(function: Callable, *args: Any) -> Tensor:
    """function(*args), whose intermediate tensors are dropped and computed again in the backward pass.

    Nothing here is random (no dropout), so the random state, for which one would wait for a GPU, is let be.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class InSerter(nn.Module):
    """Encoder, Adapter and LLM over one packed sequence. `config` is a transformers Qwen2AudioConfig.

    Ids, labels, cu_seqlens and waveforms may lie on the CPU while the model is on a GPU; then everything that
    has to be counted is counted there, and the GPU is never waited for.
    """

    def __init__(self, config: Qwen2AudioConfig):
        super().__init__()
        self.config = config
        self.recompute = False               # train.checkpointing
        self.sharded = False                 # train.shard
        self.audio_tower = Encoder(config.audio_config)
        self.multi_modal_projector = Adapter(config)
        self.language_model = LLM(config.text_config)
        self.tie()

    def tie(self) -> None:
        """One matrix as embedding and head, where the config says so."""
        if self.config.text_config.tie_word_embeddings:
            self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight

    def hear(self, waveforms: list[Tensor]) -> Tensor:
        """Waveforms -> (sum of audio_positions, d) in the LLM's space. UserError: too short or long."""
        for waveform in waveforms:
            if not audio_positions(len(waveform)) or len(waveform) > LONGEST:
                raise UserError(f"A clip of {len(waveform) / RATE:.3f} s cannot be heard: clips last from "
                                "0.021 to 30 s; drop it, or cut it into shorter ones.")
        return self.multi_modal_projector(self.audio_tower(waveforms, self.recompute))

    def embed(self, ids: Tensor, waveforms: list[Tensor]) -> Tensor:
        """Embeddings of a pack: ids (T,), each <|AUDIO|> replaced in order by one vector heard -> (T, d)."""
        table = self.language_model.model.embed_tokens
        count = sum(audio_positions(len(w)) for w in waveforms)
        is_audio = ids == self.config.audio_token_index
        if ids.is_cuda:                      # told late, by the device, but without waiting for it
            torch._assert_async(is_audio.sum() == count, "the <|AUDIO|> positions do not match the clips")
        elif (found := int(is_audio.sum())) != count:
            raise ValueError(f"The ids hold {found} <|AUDIO|> positions, but the {len(waveforms)} clips "
                             f"give {count}; count them with audio_positions(samples).")
        x = table(sent(ids, table.weight.device))
        if waveforms:
            rows = sent(torch.nonzero_static(is_audio, size=count)[:, 0], x.device)
            return x.index_copy(0, rows, self.hear(waveforms).to(x.dtype))
        if torch.is_grad_enabled() or self.sharded:                     # no rank may leave one out
            x = x + 0 * self.hear([torch.zeros(4 * HOP)]).sum()
        return x

    def hidden(self, ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
               waveforms: list[Tensor]) -> Tensor:
        """Hidden states of packed documents, ready for lm_head.

        ids, position_ids: (T,) int64, positions restart with each document; cu_seqlens: (documents + 1,)
        int32 from 0 to T; waveforms: the clips of the whole pack in order.  -> (T, d)
        """
        x = self.embed(ids, waveforms)
        attend = packed_attention(cu_seqlens, True, x, self.language_model.head_size)
        position_ids = sent(position_ids, x.device)
        return self.language_model(x, position_ids, attend, self.recompute)

    def forward(self, ids: Tensor, labels: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
                waveforms: list[Tensor], chunk: int, word_ids: list[list[int]] | None = None,
                classes: Tensor | None = None) -> Tensor:
        """Sum of the loss in nats (section 3), a float32 scalar. Every parameter takes part (not by CTC).

        labels[t] (T,) int64 is the token that should FOLLOW position t, or IGNORE where none is asked for;
        `chunk` positions at a time go through the head; the other arguments are those of `hidden`. With
        `word_ids` the loss is `word_loss` alone, over `classes` and the batch's own tokens.
        """
        if word_ids is None:
            return next_token_losses(self, ids, labels, position_ids, cu_seqlens, waveforms, chunk).sum()
        if not word_ids:                                                # no clip whose words are known
            return 0 * word_loss(self, [torch.zeros(4 * HOP)], [[]], classes)
        return word_loss(self, waveforms, word_ids, classes)


# --------------------------------------------------------------------------------------------------
# 3. The loss
#
# Cross-entropy at the labelled positions, and nowhere else: the LM head, the most expensive matrix of a
# small LLM, is not even applied to the others. A stage that first teaches the encoder to hear uses CTC.
# --------------------------------------------------------------------------------------------------

def next_token_losses(model: InSerter, ids: Tensor, labels: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
                      waveforms: list[Tensor], chunk: int) -> Tensor:
    """Nats of every labelled position, in order: (number of labels that are not IGNORE,) float32.

    Logits exist for `chunk` positions at a time, in the forward pass and again in the backward pass: for 8192
    positions and 151,936 tokens at once they would take 5 GB in float32.
    """
    hidden = model.hidden(ids, position_ids, cu_seqlens, waveforms)                     # (T, d)
    labelled = (labels != IGNORE).nonzero()[:, 0]                                       # (T',)
    targets = sent(labels[labelled], hidden.device)
    hidden = hidden.index_select(0, sent(labelled, hidden.device))                      # (T', d)
    head = model.language_model.lm_head.weight                                          # (V, d)

    def losses(h: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, head).float(), t, reduction="none")

    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([computed_again(losses, h, t) for h, t in chunks])


def word_loss(model: InSerter, waveforms: list[Tensor], word_ids: list[list[int]],
              classes: Tensor | None = None) -> Tensor:
    """Summed nats of each clip's words (their tokens) by CTC (Graves et al. 2006). <|AUDIO|> is the blank.

    Encoder, adapter and the LLM without its blocks say, vector by vector, which token they hear: the one
    whose embedding fits best, so a word heard comes to lie near the same word read. A clip with more tokens
    than vectors adds nothing.

    classes: (n,) ids that compete with the tokens of all these clips' words; so the loss depends a little on
    what else is in the pass. None: the whole vocabulary, which for an LLM's takes two thirds of the time
    """
    heard = model.language_model.model.norm(model.hear(waveforms).float())              # (positions, d)
    lengths = [audio_positions(len(w)) for w in waveforms]
    targets = torch.tensor([i for ids in word_ids for i in ids], dtype=torch.int64)
    blank = torch.tensor([model.config.audio_token_index])
    table = model.language_model.model.embed_tokens.weight
    if classes is not None:
        classes = torch.cat([classes.cpu(), targets, blank]).unique()   # FSDP2 moves what it is given
        table = table[classes.to(table.device)]
        targets = torch.searchsorted(classes, targets)                  # the ids' places among the classes
        blank = torch.searchsorted(classes, blank)
    logits = F.linear(heard, table).float().log_softmax(1).split(lengths)
    logits = nn.utils.rnn.pad_sequence(logits, batch_first=True).transpose(0, 1)        # (longest, clips, V)
    return F.ctc_loss(logits, targets.to(heard.device), lengths, list(map(len, word_ids)), blank=int(blank),
                      reduction="sum", zero_infinity=True)


# --------------------------------------------------------------------------------------------------
# 4. Training: the loop
#
# A run is a few stages, each on its own mix of recipes; `train` (section 10) calls `train_stage` for each in
# turn. `Feed` reads the packs (5), `evaluate` gives a point of the gap curve (9), `save_run` writes the state
# from which a stopped run continues (10), `Log` the log (11).
# --------------------------------------------------------------------------------------------------

WITHOUT_WORDS = 20                           # steps of a CTC stage in which no clip's words are known end it


@dataclasses.dataclass
class Progress:
    """Where a run stands: `step` counts over all stages, the others inside the stage."""
    stage: str
    step: int = 0
    stage_step: int = 0
    targets: float = 0.0                     # supervised tokens of the stage so far
    cursors: dict = dataclasses.field(default_factory=dict)       # of every lane, by its number (section 5)

    def share(self, stage: Settings) -> float:
        """How much of the stage is done, from 0 to 1."""
        if stage.steps is not None:
            return self.stage_step / stage.steps
        return self.targets / stage.tokens


def lr_factor(stage: Settings, step: int, share: float) -> float:
    """Of the stage's learning rates: linear over `ramp` steps, then a cosine to `floor` at its end."""
    ramp = min(1.0, (step + 1) / max(stage.ramp, 1))
    cosine = (1 + math.cos(math.pi * min(share, 1))) / 2
    return ramp * (stage.floor + (1 - stage.floor) * cosine)


def train_stage(c: Settings, model: InSerter, tok: Tokenizer, progress: Progress, saved: dict[str, Tensor],
                stopping: list[int]) -> bool:
    """Train one stage from where it stands. True: it is done. False: a signal stopped it; the state is saved.

    saved: the optimizers' tensors, none at a stage's beginning; stopping: not empty after a signal
    """
    stage = c.train.stages[progress.stage]
    rank, world = rank_and_world()
    trained = freeze(model, stage)
    optimizers = make_optimizers(c, model, stage)
    restore_optimizers(model, optimizers, saved)
    saved.clear()
    network = model
    if world > 1 and not model.sharded:
        network = DistributedDataParallel(model, find_unused_parameters=stage.ctc,
                                          gradient_as_bucket_view=True)
    feed = Feed(c, tok, progress, lanes=list(range(rank, stage.packs, world)))
    classes = frequent_tokens(c, tok, stage) if stage.ctc and stage.ctc_classes else None
    log = Log(c, progress, stage)
    stop = False
    if progress.step == 0 and not stage.from_scratch:                   # what the given weights can do
        log.point(evaluate(c, model, tok))
    while progress.share(stage) < 1 and not stop:
        # 1. The rank's next packs, and what those of all ranks hold together. A signal to one rank, or a
        #    shard that it cannot read, comes to all with these sums.
        packs, problem = feed.next_packs()
        counts = feed.counts(packs, model) | {"stop": len(stopping), "problems": bool(problem)}
        totals = sum_over_ranks(counts)
        if totals["problems"]:
            raise UserError(next(filter(None, gather(problem))))
        stop = totals["stop"] > 0            # after this step: its packs are taken, so they are trained on

        # 2. Forward and backward. The gradient is that of the mean over all ranks' targets. DDP averages over
        #    ranks, so each divides its own sum by targets / world: of sums 6 and 4 over 5 targets it makes
        #    (6 * 2/5 + 4 * 2/5) / 2 = 10/5. Ranks meet in the last pass only.
        loss_sum = torch.zeros((), device=device_here())
        micro_batches = list(batches(packs, c.train.packs_at_once))
        for micro_batch in micro_batches:
            is_last = micro_batch is micro_batches[-1]
            with gradients_kept(network) if not is_last else contextlib.nullcontext():
                with mixed_precision(c):
                    loss = network(**batch_of(micro_batch), chunk=c.train.loss_chunk, classes=classes)
                (loss * (world / max(totals["targets"], 1))).backward()
            loss_sum += loss.detach()        # read once a step: nothing in between waits for a GPU

        # 3. Clip. A norm that is not finite is the same on all ranks, and stops them before the weights
        #    change.
        norm = float(whole(nn.utils.clip_grad_norm_(trained, c.train.clip)))
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

        # From here on nothing is training: log, evaluate (but no gap of an LLM that has read no text yet, or
        # amid CTC, which lets norms grow), save.
        log.step(float(loss_sum), factor, norm, totals)
        done = progress.share(stage) >= 1
        if stage.ctc and progress.targets == 0 and (done or progress.stage_step == WITHOUT_WORDS):
            raise UserError(f"No clip of the stage {progress.stage} has words that are known, so it teaches "
                            "nothing; give recordings their transcript, or leave it out (steps=0).")
        if done and stage.ctc and not stage.lr_scale.get("llm", 1.0):
            match_norms(c, model, tok, stage)
        reads_text = not stage.from_scratch or set(stage.mix) != {"tasks"}
        if reads_text and (done or progress.step % c.train.eval_every == 0 and not stage.ctc):
            log.point(evaluate(c, model, tok))
        if done or stop or progress.step % c.train.save_every == 0:
            save_run(c, model, tok, optimizers, progress, feed)
    log.bar.close()
    return progress.share(stage) >= 1


def freeze(model: InSerter, stage: Settings) -> list[nn.Parameter]:
    """Let a stage train the modules whose lr_scale is above 0; returns their parameters."""
    for name, p in model.named_parameters():
        is_table = name.endswith("embed_positions.weight")              # sinusoids, never trained
        p.requires_grad_(stage.lr_scale.get(module_of(name), 1.0) > 0 and not is_table)
    return [p for p in model.parameters() if p.requires_grad]


def first_samples(c: Settings, stage: Settings) -> Iterator[tuple[Path, int]]:
    """(shard, number) of every sample in the first training shard of each of the stage's recipes."""
    for name, share in stage.mix.items():
        if share > 0:
            path = Recipe(c, name, salt="").path(0)
            yield from ((path, number) for number in range(synth.open_shard(path).count))


def frequent_tokens(c: Settings, tok: Tokenizer, stage: Settings) -> Tensor:
    """The stage.ctc_classes most frequent tokens of what is spoken in the first shards: (n,) int64."""
    counts: Counter = Counter()
    for path, number in first_samples(c, stage):
        sample, _ = synth.read_sample(path, number)
        for parts in synth.parts_of(sample):
            for part in parts:
                if part["role"] == "speech":
                    counts.update(word_tokens(part, tok))
    return torch.tensor([i for i, _ in counts.most_common(stage.ctc_classes)], dtype=torch.int64)


@torch.no_grad()
def match_norms(c: Settings, model: InSerter, tok: Tokenizer, stage: Settings) -> None:
    """Scale the adapter: what is heard becomes as long as the LLM's embeddings, on average over 64 clips.

    CTC looks at directions alone, so nothing holds the vectors' length meanwhile: it grows tenfold, and would
    drown all else in the LLM's first blocks.
    """
    clips: list[np.ndarray] = []
    for path, number in first_samples(c, stage):
        clips += read_encoded(path, number, tok).clips
        if len(clips) >= 64:
            break
    if model.sharded:
        model.unshard()
    with mixed_precision(c):
        heard = model.hear([torch.from_numpy(clip) for clip in clips]).float()
    table = model.language_model.model.embed_tokens.weight
    factor = table.norm(dim=1).mean() / heard.norm(dim=1).mean()
    if model.sharded:
        model.reshard()
    for p in model.multi_modal_projector.parameters():
        p *= factor


def make_optimizers(c: Settings, model: InSerter, stage: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon where so set: every trained parameter in one group, of its own learning rate.

    Muon orthogonalises the update of a matrix, which suits those inside the blocks and the adapter;
    embeddings, the LM head, convolutions and vectors are AdamW's. Vectors do not decay.
    """
    muon: list[dict] = []
    adamw: list[dict] = []

    def add(groups: list[dict], parameters: list[nn.Parameter], base_lr: float, decay: float) -> None:
        if parameters:
            groups.append({"params": parameters, "lr": 0.0, "base_lr": base_lr, "weight_decay": decay})

    for module in ("encoder", "adapter", "llm"):
        scale = stage.lr_scale.get(module, 1.0)
        named = [(name, p) for name, p in model.named_parameters()
                 if module_of(name) == module and p.requires_grad]
        orthogonal = {name for name, p in named if stage.optimizer == "muon" and p.ndim == 2
                      and "embed" not in name and "lm_head" not in name}
        others = [p for name, p in named if name not in orthogonal]
        decay = c.train.weight_decay
        add(muon, [p for name, p in named if name in orthogonal], stage.muon_lr * scale, decay)
        add(adamw, [p for p in others if p.ndim > 1], stage.lr * scale, decay)
        add(adamw, [p for p in others if p.ndim == 1], stage.lr * scale, 0.0)
    optimizers = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=tuple(c.train.betas), fused=True))
    if muon:
        optimizers.append(torch.optim.Muon(muon, momentum=c.train.muon_momentum))
    return optimizers


def module_of(name: str) -> str:
    """encoder, adapter or llm: where a parameter belongs, by its name."""
    return {"audio_tower": "encoder", "multi_modal_projector": "adapter"}.get(name.split(".")[0], "llm")


# --------------------------------------------------------------------------------------------------
# 5. Packing: from shards to batches
#
# A step trains on G packs, one from each of G lanes. A lane is an endless stream of packs that depends on
# (seed, stage, lane) alone; rank r serves the lanes r, r + world, …. So batches are the same for any number
# of ranks and reading processes, and a run resumes from one small cursor per lane. A document is here one
# encoded sample, be it a text or a dialogue.
# --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Pack:
    """Whole documents end to end, bounded by `cu_seqlens`: at most pack_length positions, and no padding."""
    ids: np.ndarray                          # (P,) int64, P = pack_length - waste
    labels: np.ndarray                       # (P,) int64
    position_ids: np.ndarray                 # (P,) int64, from 0 in every document
    cu_seqlens: list[int]                    # documents + 1
    audio: Tensor                            # (audio samples,) int16 as in the shards, clips end to end; a
                                             # tensor, for those travel in shared memory
    clip_samples: list[int]                  # audio samples of each clip
    word_ids: list[list[int]] | None         # in a CTC stage the tokens of each clip's words: its targets
    names: list[str]                         # ids of the documents
    supervised: int                          # targets: labels that are not IGNORE, or words
    waste: int                               # positions left over, since no further document fitted
    skipped: list[str]                       # ids of those longer than a pack, left out since the pack before
    cursor: dict                             # where the lane stands after this pack


def packed(documents: list[Encoded], ctc: bool, waste: int, skipped: list[str], cursor: dict) -> Pack:
    """Join documents end to end."""
    lengths = [len(document.ids) for document in documents]
    labels = np.array([label for document in documents for label in document.labels], np.int64)
    clips = [clip for document in documents for clip in document.clips]
    word_ids = [ids for document in documents for ids in document.word_ids]
    if ctc:                                  # of a recording whose words nobody wrote down nothing is asked
        clips = [clip for clip, ids in zip(clips, word_ids) if ids]
        word_ids = [ids for ids in word_ids if ids]
    silence = np.zeros(0, np.float32)        # where there is no clip
    return Pack(
        ids=np.array([i for document in documents for i in document.ids], np.int64),
        labels=labels,
        position_ids=np.concatenate([np.arange(length) for length in lengths]),
        cu_seqlens=[0, *np.cumsum(lengths).tolist()],
        audio=torch.from_numpy(np.rint(np.concatenate([silence, *clips]) * 32768).astype(np.int16)),
        clip_samples=[len(clip) for clip in clips],
        word_ids=word_ids if ctc else None,
        names=[document.name for document in documents],
        supervised=sum(map(len, word_ids)) if ctc else int((labels != IGNORE).sum()),
        waste=waste,
        skipped=skipped,
        cursor=json.loads(json.dumps(cursor)))                          # a copy: the lane goes on


def batch_of(packs: list[Pack]) -> dict[str, Any]:
    """Join packs end to end into the model's arguments: documents stay apart by cu_seqlens."""
    bounds = [0]
    for pack in packs:
        bounds += [bounds[-1] + bound for bound in pack.cu_seqlens[1:]]
    # Empty documents round their number up, for on a GPU a tensor of a new shape costs time and memory.
    bounds += bounds[-1:] * (63 - (len(bounds) - 1) % 64)
    audio = sent(torch.cat([pack.audio for pack in packs]), device_here())
    clip_samples = [samples for pack in packs for samples in pack.clip_samples]
    batch = {name: torch.from_numpy(np.concatenate([getattr(pack, name) for pack in packs]))
             for name in ("ids", "labels", "position_ids")}
    batch |= {
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "waveforms": list((audio.float() / 32768).split(clip_samples))}
    if packs[0].word_ids is not None:
        batch["word_ids"] = [ids for pack in packs for ids in pack.word_ids]
    return batch


class Recipe:
    """The shards of one recipe as one long list per epoch: shards shuffled, samples shuffled inside each."""

    def __init__(self, c: Settings, name: str, salt: str):
        self.c = c
        self.name = name
        self.salt = f"{c.seed} {salt} {name}"
        finished = synth.finished_shards(Path(c.data) / name, "train")
        self.numbers = synth.chosen_shards(finished, c.synth.shards.get(name, 0))
        self.counts = [synth.read_head(self.path(nth))["count"] for nth in range(len(self.numbers))]
        self.total = sum(self.counts)
        self.epoch = None                    # the epoch whose order is known
        if not self.total:
            raise UserError(f"{c.data} has no sample of the recipe {name}, which the stage's mix asks for; "
                            "set its share to 0 or give a corpus that has dialogues.")

    def path(self, nth: int) -> Path:
        return synth.shard_path(self.c, self.name, "train", self.numbers[nth])

    def locate(self, epoch: int, index: int) -> tuple[Path, int]:
        """Shard and number of the index-th sample of an epoch."""
        if epoch != self.epoch:
            self.shards = shuffled(f"{self.salt} {epoch}", len(self.counts))
            self.ends = np.cumsum([self.counts[shard] for shard in self.shards])
            self.epoch = epoch
        nth = int(np.searchsorted(self.ends, index, side="right"))
        shard = self.shards[nth]
        first = int(self.ends[nth]) - self.counts[shard]
        return self.path(shard), shuffled(f"{self.salt} {epoch} {shard}", self.counts[shard])[index - first]


def recipes_of(c: Settings, stage_name: str) -> dict[str, Recipe]:
    """The recipes of a stage's mix."""
    mix = c.train.stages[stage_name].mix
    return {name: Recipe(c, name, salt=stage_name) for name, share in mix.items() if share > 0}


@lru_cache(maxsize=64)
def shuffled(seed: str, count: int) -> list[int]:
    """0 to count - 1 in an order that the seed alone decides."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


class Reader:
    """One lane's way through a recipe. `open` are the documents that wait to be packed, the oldest first.

    Its cursor {"epoch": 0, "index": 12, "open": [[0, 9], [0, 11]], "fed": 3402} says: of the lane's samples
    twelve have been read in the first epoch, the tenth and the twelfth wait (open_documents is 2 here), and
    3,402 positions have been packed.
    """

    def __init__(self, c: Settings, tok: Tokenizer, recipe: Recipe, lane: int, lane_count: int, cursor: dict):
        self.tok = tok
        self.recipe = recipe
        self.first, end = (number * recipe.total // lane_count for number in (lane, lane + 1))
        self.stretch = max(end - self.first, 1)
        self.length = c.train.pack_length
        self.most_open = c.train.open_documents
        self.cursor = cursor
        self.open = [self.read(epoch, index) for epoch, index in cursor["open"]]

    def read(self, epoch: int, index: int) -> Encoded:
        """The lane's index-th sample of an epoch.

        Each lane reads on in a stretch of its own, so that a step sees samples from all over the corpus: of
        21 samples four lanes read 0 to 4, 5 to 9, 10 to 14 and 15 to 20. Where there are more lanes than
        samples, some share one.
        """
        path, number = self.recipe.locate(epoch, self.first + index)
        return read_encoded(path, number, self.tok)

    def open_more(self) -> list[str]:
        """Read on until enough documents are open. Those longer than a pack are left out: their names."""
        skipped = []
        in_a_row = 0
        while len(self.open) < self.most_open:
            epoch, index = self.cursor["epoch"], self.cursor["index"]
            document = self.read(epoch, index)
            self.cursor["index"] += 1
            if index + 1 >= self.stretch:
                self.cursor |= {"epoch": epoch + 1, "index": 0}
            if len(document.ids) <= self.length:
                self.open.append(document)
                self.cursor["open"].append([epoch, index])
                in_a_row = 0
                continue
            skipped.append(document.name)
            in_a_row += 1
            if in_a_row > self.recipe.total:
                raise UserError(f"Every sample of the recipe {self.recipe.name} is longer than a pack "
                                f"({self.length} positions, {document.name} has {len(document.ids)}); "
                                "raise train.pack_length.")
        return skipped

    def take(self, number: int) -> Encoded:
        """One of the open documents, to be packed."""
        self.cursor["open"].pop(number)
        document = self.open.pop(number)
        self.cursor["fed"] += len(document.ids)
        return document


class Lane:
    """An endless stream of packs. Its cursor, made of its readers', is all that it needs to go on."""

    def __init__(self, c: Settings, tok: Tokenizer, stage_name: str, recipes: dict[str, Recipe], lane: int,
                 cursor: dict | None):
        stage = c.train.stages[stage_name]
        self.length = c.train.pack_length
        self.ctc = stage.ctc
        self.mix = {name: stage.mix[name] for name in recipes}
        start = {name: {"epoch": 0, "index": 0, "open": [], "fed": 0} for name in self.mix}
        self.cursor = cursor or {"pack": 0, "recipes": start}
        self.readers = {}
        for name, recipe in recipes.items():
            self.readers[name] = Reader(c, tok, recipe, lane, stage.packs, self.cursor["recipes"][name])

    def pack(self) -> Pack:
        """Fill a pack with documents until none of the open ones fits into what is left of it."""
        documents: list[Encoded] = []
        skipped: list[str] = []
        room = self.length
        while True:
            for reader in self.readers.values():
                skipped += reader.open_more()
            chosen = self.choose(room)
            if chosen is None:
                break
            name, number = chosen
            documents.append(self.readers[name].take(number))
            room -= len(documents[-1].ids)
        self.cursor["pack"] += 1
        return packed(documents, self.ctc, waste=room, skipped=skipped, cursor=self.cursor)

    def choose(self, room: int) -> tuple[str, int] | None:
        """The next document as (recipe, number among its open ones): the oldest of the hungriest recipe, or,
        where that does not fit any more, the longest one that does."""
        hungriest = self.hungriest()
        if len(self.readers[hungriest].open[0].ids) <= room:
            return hungriest, 0
        lengths = {(name, number): len(document.ids) for name, reader in self.readers.items()
                   for number, document in enumerate(reader.open)}
        fitting = [which for which, length in lengths.items() if length <= room]
        return max(fitting, key=lengths.get, default=None)

    def hungriest(self) -> str:
        """The recipe that is furthest below its share of positions."""
        fed = {name: reader.cursor["fed"] for name, reader in self.readers.items()}
        total = sum(fed.values())
        shares = sum(self.mix.values())
        return max(self.mix, key=lambda name: self.mix[name] / shares * total - fed[name])


class Lanes(IterableDataset):
    """The packs of some lanes, in turn, for a reading process. An error comes through as the item itself."""

    def __init__(self, c: Settings, tok: Tokenizer, stage_name: str, lanes: list[int],
                 cursors: dict[str, dict]):
        self.c = c
        self.hf = tok.hf                     # a Tokenizer itself cannot travel to another process
        self.stage_name = stage_name
        self.lanes = lanes
        self.cursors = cursors

    def __iter__(self) -> Iterator[Pack | UserError]:
        if get_worker_info():
            torch.set_num_threads(1)
            synth.end_with_parent()
            os.setpgrp()                 # away from torchrun's SIGTERM, which goes to whole process groups:
                                         # the rank reads on until all ranks stop at one step
        try:
            tok = Tokenizer(self.hf)
            recipes = recipes_of(self.c, self.stage_name)
            served = [Lane(self.c, tok, self.stage_name, recipes, lane, self.cursors.get(str(lane)))
                      for lane in self.lanes]
            while True:
                for lane in served:
                    yield lane.pack()
        except UserError as error:
            yield error


class Feed:
    """One rank's packs, step by step: `workers` reading processes, each with its share of the lanes."""

    def __init__(self, c: Settings, tok: Tokenizer, progress: Progress, lanes: list[int]):
        self.lanes = lanes
        self.cursors: dict[str, dict] = {}   # of the rank's own lanes: it knows nothing new of the others
        workers = min(c.train.workers, len(lanes))
        shares = [lanes[worker::workers] for worker in range(workers)] or [lanes]
        options = {}
        if workers:
            options = {
                "num_workers": 1,
                "prefetch_factor": len(shares[0]) + 1,                  # a step's packs, and one more
                "multiprocessing_context": fork_server()}
        self.loaders = []
        for share in shares:
            packs = Lanes(c, tok, progress.stage, share, progress.cursors)
            self.loaders.append(iter(DataLoader(packs, batch_size=None, **options)))

    def next_packs(self) -> tuple[list[Pack], str]:
        """The rank's next packs in the order of its lanes; or none, and a failed reader's sentence."""
        begun = time.perf_counter()
        try:
            packs = [next(self.loaders[i % len(self.loaders)], None) for i in range(len(self.lanes))]
        except RuntimeError as error:        # so PyTorch says that one has died
            return [], ("A process that read samples was killed, perhaps for want of memory (train.workers); "
                        f"start the same command again: it continues from the last state. ({error})")
        self.waited = time.perf_counter() - begun
        for error in packs:
            if isinstance(error, UserError):
                return [], str(error)
        self.cursors |= {str(lane): pack.cursor for lane, pack in zip(self.lanes, packs)}
        return packs, ""

    def counts(self, packs: list[Pack], model: InSerter) -> dict[str, float]:
        """What a rank's packs hold, to be summed over the ranks; `batch` is a checksum of all their ids."""
        checksums = [zlib.crc32(pack.ids.tobytes(), pack.cursor["pack"] + (lane << 16))
                     for lane, pack in zip(self.lanes, packs)]
        return {
            "targets": sum(pack.supervised for pack in packs),
            "positions": sum(len(pack.ids) for pack in packs),
            "audio samples": sum(sum(pack.clip_samples) for pack in packs),
            "waste": sum(pack.waste for pack in packs),
            "skipped": sum(len(pack.skipped) for pack in packs),
            "waited": self.waited,
            "flops": sum(step_flops(model, pack) for pack in packs),
            "batch": sum(checksums)}


def fork_server() -> Any:
    """Readers come from a server that was started before torch's threads: forking after them can hang."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inserter"])
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)            # the server inherits this: it outlives
    forkserver.ensure_running()                                         # torchrun's signal
    signal.signal(signal.SIGTERM, handler)
    return context


# --------------------------------------------------------------------------------------------------
# 6. Features: waveforms to log-mel frames
#
# Whisper pads every clip with zeros to 30 s and then computes 3000 frames. All frames past the clip's end
# are the same known silence, so only N = ceil(samples / 160) frames are computed, and two more that the
# convolutions see beyond the end. One buffer holds all clips at multiples of the hop: one FFT serves all.
# --------------------------------------------------------------------------------------------------

WINDOW = 400                                 # samples under one frame: 25 ms
EDGE = WINDOW // 2                    # frame t is centred on sample 160 t: frame 0 starts 200 before the clip


def context_frames(samples: int) -> int:
    """F: frames kept of a clip, its own N and two of context for the convolutions, at most Whisper's 3000."""
    return min(math.ceil(samples / HOP) + 2, MAX_FRAMES)


def log_mel(waveforms: list[Tensor], n_mels: int, device: torch.device | str | None = None) -> Tensor:
    """Log-mel frames of 16 kHz clips, packed; equal to WhisperFeatureExtractor's first F frames of each clip.

    waveforms: list of 1-D float32 tensors, 1 to 480000 samples each. They may lie on the CPU while `device`
    is a GPU: they travel in one copy.
    -> (sum of F, n_mels) float32 on `device` (theirs by default)
    """
    device = torch.device(device or waveforms[0].device)
    buffer, first_frames = lay_out(waveforms, device)
    window, filters = mel_constants(n_mels, device)
    frames = ragged([context_frames(len(w)) for w in waveforms])
    owner, frame = (sent(x, device) for x in frames)
    first_frames = sent(torch.tensor(first_frames), device)
    with torch.autocast(device.type, enabled=False):                               # bfloat16 costs two digits
        spectrum = torch.fft.rfft(buffer.unfold(0, WINDOW, HOP) * window)              # (frames, 201) complex
        power = torch.view_as_real(spectrum).square().flatten(1)                        # (frames, 402)
        mel = (power @ filters).clamp_(min=1e-10).log10_()
        mel = mel[first_frames[owner] + frame]                                          # (sum of F, n_mels)
    peak = mel.new_full((len(waveforms),), -10.0).scatter_reduce(0, owner, mel.amax(1), "amax")
    return (torch.maximum(mel, peak[owner, None] - 8) + 4) / 4                         # each clip's own 80 dB


def lay_out(waveforms: list[Tensor], device: torch.device) -> tuple[Tensor, list[int]]:
    """All clips in one buffer, each with its edges mirrored as Whisper's STFT does.

    A clip's slot is |200 samples mirrored | clip | zeros| and 160 (F + 3) samples long: frames that straddle
    two slots are computed and dropped, three per clip. Right of the clip lie the zeros of Whisper's padding;
    the mirror at 480000 samples shows only to a clip that reaches there.
    -> buffer (samples,), the first frame of each clip's slot
    """
    zeros = waveforms[0].new_zeros(WINDOW + 5 * HOP)
    pieces = [zeros[:EDGE]]
    mirrors = []                                                                # (centre, which side is made)
    starts, end = [], 0
    for waveform in waveforms:
        starts.append(end)
        size = HOP * (context_frames(len(waveform)) + 3)
        pieces += [waveform, zeros[:size - len(waveform)]]
        mirrors.append((EDGE + end, -1))
        if len(waveform) > LONGEST - WINDOW:
            mirrors.append((EDGE + end + LONGEST - 1, 1))
        end += size
    pieces.append(zeros[:EDGE])
    if device.type == "cuda":                # few lengths: cuFFT plans one for longer than it transforms it
        pieces.append(zeros.new_zeros(-end % (1024 * HOP)))
    buffer = sent(torch.cat(pieces), device).float()
    centre, side = sent(torch.tensor(mirrors).T[:, :, None], device)
    reach = side * torch.arange(1, EDGE + 1, device=device)                             # (mirrors, 200)
    buffer[centre + reach] = buffer[centre - reach]
    return buffer, [start // HOP for start in starts]


@lru_cache
def mel_constants(n_mels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """WhisperFeatureExtractor's Hann window (400,) and Slaney mel filters (402, n_mels).

    Each row of filters stands twice: the same weight for the squares of a frequency's real and imaginary
    part, which stand side by side.
    """
    filters = mel_filter_bank(EDGE + 1, n_mels, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    filters = torch.from_numpy(filters).float().repeat_interleave(2, 0)
    return torch.hann_window(WINDOW, device=device), filters.to(device)


# --------------------------------------------------------------------------------------------------
# 7. Weights and tokenizers: from nothing, from two checkpoints, from one; and back to disk
#
# A checkpoint is a folder that transformers reads and writes. Qwen2-Audio ignores tied embeddings: both
# matrices are always written, and ours are one again after loading if the config asks for it and they are
# equal. A tied config with two different matrices is read as untied.
# --------------------------------------------------------------------------------------------------

REMEDY = "fetch or export the checkpoint again"
LLM_FAMILIES = ("qwen2", "qwen3", "llama")   # Qwen2.5 is called qwen2, SmolLM2 and Llama 3 are called llama


def fresh_model(c: Settings, tok: Tokenizer) -> InSerter:
    """The model a run starts from: a Qwen2-Audio checkpoint, a Whisper and an LLM, or random weights."""
    m = c.model
    if m["from"]:
        return load_model(m["from"])
    if m.encoder:
        audio_ids = [tok.audio, tok.audio_bos, tok.audio_eos]
        return join_models(m.encoder, m.llm, audio_ids, tok(" ")[-1], c.seed)
    audio = {
        "num_mel_bins": m.mels,
        "d_model": m.encoder_width,
        "encoder_layers": m.encoder_layers,
        "encoder_attention_heads": m.encoder_heads,
        "encoder_ffn_dim": 4 * m.encoder_width,
        "max_source_positions": MAX_FRAMES // 2}
    text = {
        "vocab_size": m.vocab,
        "hidden_size": m.llm_width,
        "num_hidden_layers": m.llm_layers,
        "num_attention_heads": m.llm_heads,
        "num_key_value_heads": m.llm_kv_heads,
        "intermediate_size": m.llm_ffn,
        "tie_word_embeddings": m.tie,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "max_position_embeddings": 32768}
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=tok.audio)
    return random_model(config, c.seed)


def random_model(config: Qwen2AudioConfig, seed: int) -> InSerter:
    """InSerter from nothing but sizes: the same weights for the same config and seed, on any machine.

    The LLM's first heads start by looking one, one, two, two, … tokens back, by their biases, which rotary
    positions turn. To copy, a model must know what stood before each token; so it learns to repeat, and to
    hear, in fewer steps. What the adapter says is as long as an embedding, or the LLM's blocks could add
    little to it.
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
    return build(config, tensors, "random model")


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
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


def sinusoids(positions: int, width: int) -> Tensor:
    """Whisper's positions (positions, width): sines, then cosines, of wavelengths from 2 pi to 20000 pi."""
    speed = torch.exp(-math.log(10000) / (width // 2 - 1) * torch.arange(width // 2))
    angle = torch.arange(positions)[:, None] * speed
    return torch.cat([angle.sin(), angle.cos()], 1)


def load_model(source: str | Path) -> InSerter:
    """InSerter from a Qwen2-Audio checkpoint: ours, transformers' or the hub's; float32, on the CPU."""
    their_class = transformers.Qwen2AudioForConditionalGeneration
    config, tensors, folder = read_checkpoint(source, ("qwen2_audio",), their_class)
    tensors = renamed(tensors, {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.": ""})
    head = "language_model.lm_head.weight"
    table = "language_model.model.embed_tokens.weight"
    if config.text_config.tie_word_embeddings and table in tensors:
        is_one = torch.equal(tensors.setdefault(head, tensors[table]), tensors[table])
        config.text_config.tie_word_embeddings = is_one
    return build(config, tensors, folder)


def join_models(whisper: str | Path, llm: str | Path, audio_ids: list[int], model_id: int,
                seed: int) -> InSerter:
    """InSerter from a Whisper and an LLM of LLM_FAMILIES; adapter and audio rows are fresh.

    audio_ids: those of <|AUDIO|>, <|audio_bos|>, <|audio_eos|>, as the tokenizer gives them once the three
    are added to it as special tokens, in that order: 151646 to 151648 for Qwen2, as in Qwen2-Audio, but
    151665 to 151667 for Qwen2.5, which calls the former <|object_ref_start|> and so on. Their matrices are
    padded (151936 rows in the 0.5B), so the ids fall on rows that no text uses; past the end, rows are added.
    Nothing ever trained the three rows. They start near the row `model_id`, which is best that of a space:
    <|AUDIO|> is what CTC hears between words, and LLMs read over spaces (of text with five fillers between
    words SmolLM2 understands most if they are spaces or commas, less if they are random rows).
    """
    hears, audio, _ = read_checkpoint(whisper, ("whisper",), transformers.WhisperModel)
    reads, text, folder = read_checkpoint(llm, LLM_FAMILIES, transformers.AutoModelForCausalLM)
    sizes = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins",
             "max_source_positions", "activation_function")
    audio_config = {"model_type": "qwen2_audio_encoder"} | {name: getattr(hears, name) for name in sizes}
    config = Qwen2AudioConfig(audio_config=audio_config, text_config=reads.to_dict(),
                              audio_token_index=audio_ids[0])
    encoder = {name: tensor for name, tensor in audio.items() if name.startswith("encoder.")}
    tensors = renamed(encoder, {"encoder.": "audio_tower."}) | renamed(text, {"": "language_model."})
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors:
            tensors[name] = with_new_rows(tensors[name], audio_ids, model_id, name, seed)
            config.text_config.vocab_size = len(tensors[name])
    with torch.device("meta"):
        adapter = Adapter(config).state_dict(prefix="multi_modal_projector.")
    tensors |= {name: initial_value(name, tuple(t.shape), seed) for name, t in adapter.items()}
    return build(config, tensors, folder)


def with_new_rows(matrix: Tensor, ids: list[int], model_id: int, name: str, seed: int) -> Tensor:
    """The matrix (V, d), longer if an id lies past its end, with rows at `ids` near that of `model_id`."""
    rows = max(len(matrix), max(ids) + 1)
    width = matrix.shape[1]
    noise = initial_value(name, (len(ids), width), seed) * math.sqrt(width) * matrix.std()
    matrix = torch.cat([matrix, matrix.new_zeros(rows - len(matrix), width)])
    matrix[ids] = matrix[model_id] + 0.1 * noise
    return matrix


def renamed(tensors: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """Tensors under other names: the first prefix that fits is replaced."""
    result = {}
    for name, tensor in tensors.items():
        old = next((old for old in prefixes if name.startswith(old)), None)
        result[name if old is None else prefixes[old] + name[len(old):]] = tensor
    return result


def read_checkpoint(source: str | Path, model_types: tuple[str, ...],
                    model_class: Any) -> tuple[Any, dict[str, Tensor], Path]:
    """(config, {transformers' name in memory: float32 tensor}, folder), read by transformers itself.

    A tensor that the files lack is left out. UserError where a file is missing or damaged, or of another
    model.
    """
    folder = find_checkpoint(source)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text("utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({type(error).__name__}); {REMEDY}.") from None
    if found not in model_types:
        raise UserError(f"{path} describes a {found} model where {' or '.join(model_types)} is needed; give "
                        "another folder.")
    try:
        model, report = model_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=True,
                                                    output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: model.safetensors is missing or damaged ({type(error).__name__}), or one "
                        f"of its index's files; {REMEDY}.") from None
    for name in sorted(report["unexpected_keys"] - {"proj_out.weight"}):     # which is a Whisper's own head
        raise UserError(f"{folder}: its config.json and its weights disagree at {name}, for which the model "
                        f"has no place; {REMEDY}.")
    lacking = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in lacking}
    return model.config, tensors, folder


def find_checkpoint(source: str | Path) -> Path:
    """Folder of a checkpoint: the folder itself, or the local copy of a model on the Hugging Face hub."""
    if Path(source).is_dir():
        return Path(source)
    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]            # weights and tokenizer, no pickle
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except (OSError, ValueError) as error:   # no network, no such model, or not even a possible name
        raise UserError(f"{source} is not a folder here and could not be had from the Hugging Face hub "
                        f"({type(error).__name__}); check the name, or give the folder of a copy.") from None


def build(config: Qwen2AudioConfig, tensors: dict[str, Tensor], source: str | Path) -> InSerter:
    """InSerter with these tensors (by name) as its float32 weights; UserError says what does not fit."""
    lacking = unsupported(config)
    if lacking:
        raise UserError(f"{source}: its config wants {lacking}, which this model does not have; use another.")
    with torch.device("meta"):
        model = InSerter(config)
    for name, wanted in model.state_dict().items():
        if name not in tensors or tensors[name].shape != wanted.shape:
            raise UserError(f"{source}: its config.json and its weights disagree at {name}, which should "
                            f"have the shape {tuple(wanted.shape)}; {REMEDY}.")
    model.load_state_dict(tensors, assign=True)
    model.tie()
    return model


def unsupported(config: Qwen2AudioConfig) -> str:
    """What a config wants beyond the plain layers of section 2, in words; the empty text if nothing."""
    text = config.text_config
    audio = config.audio_config
    rope = text.rope_parameters["rope_type"]
    layer_types = getattr(text, "layer_types", None) or []              # Llama's config says nothing of them
    wants = {
        f"an LLM of the family {text.model_type}": text.model_type not in LLM_FAMILIES,
        f"rotary positions of the type {rope}": rope not in ("default", "linear", "llama3"),
        f"the activation {text.hidden_act} in the LLM": text.hidden_act != "silu",
        "attention windows": any(kind != "full_attention" for kind in layer_types),
        "biases in the LLM's attention": getattr(text, "attention_bias", False),
        "biases in the LLM's feed-forward layers": getattr(text, "mlp_bias", False),
        f"the activation {audio.activation_function} in the encoder": audio.activation_function != "gelu",
        f"{audio.max_source_positions} audio positions": audio.max_source_positions != MAX_FRAMES // 2}
    return " and ".join(want for want, is_wanted in wants.items() if is_wanted)


def save_model(model: InSerter, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write config.json and weights: transformers' Qwen2AudioForConditionalGeneration opens them.

    weights: {name: tensor}, where the model itself has only its rank's share of them
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights or dict(model.named_parameters())
    tensors = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
    if model.config.text_config.tie_word_embeddings:                    # safetensors holds no shared memory
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    model.config.architectures = ["Qwen2AudioForConditionalGeneration"]
    model.config.dtype = next(model.parameters()).dtype
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_processor(config: Qwen2AudioConfig, tok: Tokenizer, folder: Path) -> None:
    """Write what transformers' AutoProcessor and generate() need beside the model, the tokenizer included."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins)
    transformers.Qwen2AudioProcessor(extractor, tok.hf, chat_template=tok.template).save_pretrained(folder)
    transformers.GenerationConfig(
        eos_token_id=tok.stops,
        pad_token_id=tok.end,
        suppress_tokens=[tok.audio, tok.audio_bos, tok.audio_eos],
        max_new_tokens=256).save_pretrained(folder)


def model_card(c: Settings) -> str:
    """README.md of an export: what it was made from and how, its last point on dev, how to use it."""
    bases = [name for name in (c.model["from"], c.model.encoder, c.model.llm) if name]
    rows = [
        ("made from", " and ".join(bases) or "random weights"),
        ("text", "the built-in tiny world" if c.synth.corpus == "tiny" else c.synth.corpus),
        ("spoken", f"{c.synth.share:.0%} of the words, at {c.synth.level} level, by {c.synth.engine}")]
    for name in stages_of(c):
        stage = c.train.stages[name]
        length = f"{stage.tokens} targets" if stage.steps is None else f"{stage.steps} steps"
        mix = ", ".join(f"{recipe} {share:g}" for recipe, share in stage.mix.items())
        rows.append((f"stage {name}", f"{length} of {stage.packs} x {c.train.pack_length} positions: {mix}"))
    metrics = run_folder(c) / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    points = [row["eval"] for row in map(json.loads, lines) if "eval" in row]
    for name, value in (points[-1] if points else {}).items():
        rows.append((f"dev: {name}", f"{value:.3f}"))
    return jinja2.Template(CARD).render(c=c, bases=bases, rows=rows)


def load_tokenizer(c: Settings) -> Tokenizer:
    """The tokenizer of the given weights; from scratch data/tokenizer, trained when it is first needed."""
    if source := c.model["from"] or c.model.llm:
        hf = AutoTokenizer.from_pretrained(find_checkpoint(source))
        if not hf.chat_template and TURN not in hf.get_vocab():
            raise UserError(f"The tokenizer of {source} has neither a chat template nor {TURN}, by which "
                            "dialogues could be written; take an instruct model that has them.")
        audio_tokens = {"extra_special_tokens": [AUDIO, AUDIO_BOS, AUDIO_EOS]}      # Qwen2-Audio's order
        hf.add_special_tokens(audio_tokens, replace_extra_special_tokens=False)
        return Tokenizer(hf)
    folder = Path(c.data) / "tokenizer"
    if not folder.is_dir():
        train_tokenizer(c, folder)
    tok = open_tokenizer(folder)
    if len(tok.hf) > c.model.vocab:
        raise UserError(f"{folder} has {len(tok.hf)} tokens, more than model.vocab={c.model.vocab}; raise "
                        "that, or remove the folder so that it is trained again.")
    return tok


def open_tokenizer(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; remove the folder and start again.")
    return Tokenizer(AutoTokenizer.from_pretrained(folder))


def train_tokenizer(c: Settings, folder: Path) -> None:
    """Byte-level BPE with Qwen2's word splitting, trained on the first `text` shard, for AutoTokenizer."""
    texts = ["You are a helpful assistant.", "system\nuser\nassistant\n", "Audio 1: "]
    texts += [task["ask"] for task in synth.TASKS.values()]
    path = Recipe(c, "text", salt="").path(0)
    for number in range(synth.open_shard(path).count):
        sample, _ = synth.read_sample(path, number)
        texts += [part["text"] for parts in synth.parts_of(sample) for part in parts]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORD_SPLITS), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=c.model.vocab, show_progress=False,
        special_tokens=[END, TURN, TURN_END, AUDIO_BOS, AUDIO, AUDIO_EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    hf = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=TURN_END, pad_token=END,
                                 extra_special_tokens=[TURN, AUDIO_BOS, AUDIO, AUDIO_EOS])
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    hf.save_pretrained(aside)
    try:
        aside.rename(folder)
    except OSError:                          # another rank was faster
        shutil.rmtree(aside)


# Qwen2's, but each Chinese character is a word: else a small corpus makes clauses tokens, and text next to
# speech, which is cut amid them, looks like no text that the LLM has read.
WORD_SPLITS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{Han}|[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})\p{L})+|\p{N}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


# --------------------------------------------------------------------------------------------------
# 8. Generation, questions, preview
#
# Prompts of any lengths are read once, packed like training documents; their keys and values go to a padded
# cache (B, Hkv, longest, D), the one padded tensor here. Then every step feeds one token per prompt. Query
# heads that share a key-value head stand as rows of one small query, so keys are never repeated.
# --------------------------------------------------------------------------------------------------

Prompt = tuple[Tensor, list[Tensor]]     # ids (n,) int64 with their <|AUDIO|> positions, n >= 1; waveforms


@torch.no_grad()
def generate(model: InSerter, prompts: list[Prompt], max_new_tokens: int, stop_ids: list[int],
             banned_ids: list[int], temperature: float = 0.0,
             generators: list[torch.Generator] | None = None) -> list[tuple[list[int], bool]]:
    """Answers to prompts of any lengths, all at once; the result does not depend on the company.

    stop_ids end an answer and are not part of it; banned_ids are never chosen, nor is <|AUDIO|>.
    temperature: 0 is greedy; above, tokens are drawn from softmax(logits / temperature), those of each prompt
    by its own random generator (on the CPU)
    -> list of (ids of the answer, truncated: no stop id came within max_new_tokens)
    """
    h, cache = read_prompts(model, prompts, max_new_tokens)                             # (B, d)
    banned = sorted({*banned_ids, model.config.audio_token_index})
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)                                     # no stop id yet
    present = list(range(len(prompts)))      # the prompt of each row; one that has stopped may stay on
    longest = max(len(ids) for ids, _ in prompts)
    for new in range(1, max_new_tokens + 1):
        logits = model.language_model.lm_head(h)                                        # (B, V)
        logits[:, banned] = -torch.inf
        if temperature:
            tokens = drawn(logits.float() / temperature, [generators[prompt] for prompt in present])
        else:
            tokens = logits.argmax(1)
        rows = []                                                       # those that go on
        for row, token in enumerate(tokens.tolist()):
            prompt = present[row]
            running[prompt] = running[prompt] and token not in stop_ids
            if running[prompt]:
                answers[prompt].append(token)
                rows.append(row)
        if not rows or new == max_new_tokens:
            break
        if len(rows) <= 0.75 * len(present):                           # the finished leave in groups: leaving
            cache.keep(rows)                                            # copies the cache
            tokens = tokens[rows]
            present = [present[row] for row in rows]
        cache.look(longest + new)
        x = model.language_model.model.embed_tokens(tokens)
        h = model.language_model(x, cache.lengths, cache.step, False)
        cache.lengths = cache.lengths + 1
    return list(zip(answers, running))


def drawn(logits: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token of each row from softmax(logits (B, V)), where the row's own generator points: (B,)."""
    below = logits.softmax(1).cumsum(1)
    points = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    points = points.to(logits.device)[:, None] * below[:, -1:]
    return torch.searchsorted(below, points, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def read_prompts(model: InSerter, prompts: list[Prompt], room: int) -> tuple[Tensor, Cache]:
    """Prefill: one packed pass over all prompts -> (hidden state of each last position (B, d), cache)."""
    device = model.language_model.lm_head.weight.device
    lengths = torch.tensor([len(ids) for ids, _ in prompts])
    ends = lengths.cumsum(0)
    owner, offset = (x.to(device) for x in ragged(lengths))
    cache = Cache(lengths.to(device), int(lengths.max()) + room)
    x = model.embed(torch.cat([ids for ids, _ in prompts]), [w for _, clips in prompts for w in clips])
    attend_packed = packed_attention(F.pad(ends, (1, 0)).int(), True, x, model.language_model.head_size)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.store(owner, offset, k, v)
        return attend_packed(q, k, v)

    h = model.language_model(x, offset, attend, False)                                  # (T, d)
    return h[ends.to(device) - 1], cache


class Cache:
    """Keys and values of B sequences, a pair (B, Hkv, longest, D) per layer, and how long each one is.

    Layers come in turn: `at` counts them in a pass.
    """

    def __init__(self, lengths: Tensor, longest: int):
        self.lengths = lengths                                                          # (B,) int64
        self.longest = longest
        self.layers: list[list[Tensor]] = []
        self.at = 0

    def store(self, owner: Tensor, offset: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Keep k, v (T, Hkv, D) of the next layer at their sequence and place; the first pass makes room.
        -> all that is kept of the layer"""
        if self.at == len(self.layers):
            shape = (len(self.lengths), k.shape[1], self.longest, k.shape[2])
            self.layers.append([k.new_zeros(shape), v.new_zeros(shape)])
        pair = self.layers[self.at]
        for kept, new in zip(pair, (k, v)):
            kept[owner, :, offset] = new
        self.at += 1
        return pair

    def look(self, end: int) -> None:
        """Before a step: every sequence sees its own positions and the new one, all of them before `end`."""
        self.mask = (torch.arange(end, device=self.lengths.device) <= self.lengths[:, None])[:, None, None]
        self.at = 0

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """attend() of one new position per sequence: q (B, Hq, D), k, v (B, Hkv, D) -> (B, Hq, D)."""
        pair = self.store(torch.arange(len(q), device=q.device), self.lengths, k, v)
        keys, values = (kept[:, :, :self.mask.shape[-1]] for kept in pair)
        grouped = q.unflatten(1, (k.shape[1], -1))                                      # (B, Hkv, Hq/Hkv, D)
        return F.scaled_dot_product_attention(grouped, keys, values, self.mask).flatten(1, 2)

    def keep(self, rows: list[int]) -> None:
        """Forget all sequences but these."""
        self.lengths = self.lengths[rows]
        self.layers = [[kept[rows] for kept in pair] for pair in self.layers]


def complete(model: InSerter, tok: Tokenizer, prompts: list[Encoded], max_tokens: int, batch: int,
             temperature: float = 0.0) -> list[tuple[str, bool]]:
    """Continuations of prompts, in batches of similar length: (text, truncated) each.

    Greedy ones, or drawn at a temperature; then a prompt's name is the seed of its continuation.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    done: dict[int, tuple[str, bool]] = {}
    device = next(model.parameters()).device
    banned = [tok.audio_bos, tok.audio_eos]
    for start in range(0, len(order), batch):
        chosen = order[start:start + batch]
        asked = []
        for i in chosen:
            clips = [torch.from_numpy(clip) for clip in prompts[i].clips]
            asked.append((torch.tensor(prompts[i].ids), clips))
        generators = [torch.Generator().manual_seed(zlib.crc32(prompts[i].name.encode())) for i in chosen]
        with torch.autocast(device.type, torch.bfloat16, enabled=is_recent_gpu(device)):
            answers = generate(model, asked, max_tokens, tok.stops, banned, temperature, generators)
        for i, (ids, truncated) in zip(chosen, answers):
            done[i] = tok.decode(ids), truncated
    return [done[i] for i in range(len(prompts))]


Question = str | np.ndarray | list[np.ndarray]   # typed; a clip (samples,) float32 at 16 kHz; several clips


def answer(model: InSerter, tok: Tokenizer, questions: list[Question], max_tokens: int,
           batch: int) -> list[tuple[str, bool]]:
    """Greedy answers to typed and spoken questions: (text, cut off)."""
    return complete(model, tok, [asking(question, tok) for question in questions], max_tokens, batch)


def asking(question: Question, tok: Tokenizer) -> Encoded:
    """A question as a prompt."""
    if isinstance(question, str):
        parts, clips = [synth.text_part(question, False)], {}
    else:
        clips = dict(enumerate(question if isinstance(question, list) else [question]))
        parts = [SPEECH | {"audio": number} for number in clips]
    sample = {"parts": None, "messages": [{"role": "user", "content": parts}]}
    return encode(sample, clips, tok, reply=True)


def transcribe(model: InSerter, tok: Tokenizer, waveforms: list[np.ndarray], max_tokens: int,
               batch: int) -> list[str]:
    """What the model hears in clips at 16 kHz, by the prompt of the speech task."""
    asks = [synth.TASKS["transcribe"]["ask"]] * len(waveforms)
    return say_about(model, tok, waveforms, asks, max_tokens, batch)


def say_about(model: InSerter, tok: Tokenizer, waveforms: list[np.ndarray], asks: list[str], max_tokens: int,
              batch: int) -> list[str]:
    """What the model says of clips at 16 kHz when it is asked as in a speech task."""
    prompts = []
    for waveform, ask in zip(waveforms, asks, strict=True):
        sample = {"parts": [SPEECH, synth.text_part(ask, False)], "messages": None}
        prompts.append(encode(sample, {SPEECH["audio"]: waveform}, tok, reply=True))
    return [text.strip() for text, _ in complete(model, tok, prompts, max_tokens, batch)]


SPEECH = {"role": "speech", "text": "", "audio": "clip"}                # a clip whose words nobody wrote down


def load_audio(path: str) -> np.ndarray:
    """A sound file of any rate and channel count as (samples,) float32 at 16 kHz. UserError if it is none."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be read as audio ({error}); give a WAV or FLAC file.") from None
    return synth.to_16k([samples.mean(1)], rate)[0]


def read_audio(path: str) -> np.ndarray:
    """A question aloud. UserError if it is too short, too long, or silent."""
    waveform = load_audio(path)
    if not audio_positions(len(waveform)) or len(waveform) > LONGEST:
        raise UserError(f"{path} lasts {len(waveform) / RATE:.2f} s; a question lasts from 0.03 to 30 s.")
    if not np.abs(waveform).max() > 1e-4:
        raise UserError(f"{path} is silent; record it again.")
    return waveform


def load_run(c: Settings) -> tuple[InSerter, Tokenizer]:
    """The exported model of run c.run, on this process's device. UserError if there is none."""
    folder = run_folder(c) / "model"
    if not (folder / "config.json").is_file():
        raise UserError(f"There is no model in {folder}; train it first with torchrun inserter.py "
                        f"run={c.run}.")
    return load_model(folder).to(device_here()).eval(), open_tokenizer(folder)


def ask(c: Settings) -> str:
    is_file = Path(c.ask).suffix.lower() in (".wav", ".flac", ".ogg", ".mp3")
    question = read_audio(c.ask) if is_file else c.ask
    model, tok = load_run(c)
    (text, _), = answer(model, tok, [question], LONGEST_ANSWER, 1)
    return text


LONGEST_ANSWER = 1000                        # tokens; a model that never ends its turn is stopped there


def write(c: Settings) -> str:
    """Let the model that a run starts from write a corpus, the file c.write, for the recipe `continuation`.

    Its own questions and answers; or, of the documents of writing.to, answers to the first user turn of
    dialogues and continuations of the opening of texts. A reply that has no end within writing.tokens is left
    out, a continuation ends with its last whole sentence. A stopped run goes on behind the last line.
    -> what was written, in a sentence
    """
    synth.demand(rank_and_world()[1] == 1, "write= is done by one process; start python inserter.py.")
    path = Path(c.write)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.stat().st_size and not path.read_bytes().startswith(b'{"number": '):
        raise UserError(f"{path} was not begun by write=, so it is not continued; choose another file.")
    if c.fresh:
        path.unlink(missing_ok=True)
    tok = load_tokenizer(c)
    model = fresh_model(c, tok)
    writer = {"model": f"{checksum(model):08x}", "seed": c.seed, "precision": c.train.precision,
              "writing": c.writing}
    synth.same_settings(Path(f"{path}.yaml"), writer, ["writing.documents"],
                        "choose another file, or fresh=true", begun=path.is_file(), made=path)
    model = model.to(device_here()).eval()
    if c.train.precision == "bfloat16":
        model.to(torch.bfloat16)            # half the time of float32; autocast would convert at every token
    opening = tok.markup(("user",), False)[0]
    given = None
    if c.writing.to:
        given = list(itertools.islice(openings(c), c.writing.documents))
        synth.demand(bool(given), f"writing.to={c.writing.to} has no question to answer and no text of two "
                                  "sentences to continue; give another corpus.")
    wanted = c.writing.documents if given is None else len(given)
    lines = synth.whole_lines(path)
    first = json.loads(lines[-1])["number"] + 1 if lines else 0
    kept = 0

    def written(kind: str, prompts: dict[int, list[int]], tokens: int) -> Iterator[tuple[int, str, bool]]:
        """Number, continuation, and whether it has no end."""
        encoded = [Encoded(f"{c.seed} {kind} {number}", ids, [], [], []) for number, ids in prompts.items()]
        texts = complete(model, tok, encoded, tokens, c.bench.batch, c.writing.temperature)
        return ((number, *text) for number, text in zip(prompts, texts))

    with writing(path), open(path, "a", encoding="utf-8") as file:
        for numbers in batches(list(range(first, wanted)), c.bench.batch):
            if given is None:
                asked = written("question", {number: opening for number in numbers}, c.writing.tokens[0])
                documents = {number: question(synth.clean(text), 0) for number, text, endless in asked
                             if synth.count_words(synth.clean(text)) and not endless}
            else:
                documents = {number: given[number] for number in numbers}
            prompts = {number: prompt_ids(document, tok) for number, document in documents.items()}
            for number, text, endless in written("reply", prompts, c.writing.tokens[1]):
                document = with_reply(documents[number], text, endless)
                if document:
                    file.write(json.dumps({"number": number} | document, ensure_ascii=False) + "\n")
                    kept += 1
            file.flush()
    if wanted > first and not lines and not kept:
        raise UserError(f"None of {wanted} tries had words and an end within writing.tokens, so {path} is "
                        "empty; raise them, or take another model.")
    return f"{kept} documents of {max(0, wanted - first)} tried are written to {path}"


def openings(c: Settings) -> Iterator[dict]:
    """What a model is given of the training documents of writing.to, as documents without a reply."""
    corpus = Settings(c.synth | {"corpus": c.writing.to, "workers": 1})
    for number, (split, document) in enumerate(synth.split_documents(Settings(c | {"synth": corpus}))):
        if split != "train" or "audio_filepath" in document:
            continue
        lang = {"lang": document["lang"]} if "lang" in document else {}
        if "messages" in document:
            asked = [turn["content"] for turn in document["messages"] if turn["role"] == "user"]
            if asked and synth.count_words(asked[0]):
                yield question(asked[0], 0) | lang
            continue
        text = document["text"]
        ends = [end for _, end in synth.sentences(text)[:-1]
                if 0 < synth.count_words(text[:end]) <= c.writing.given]
        if not ends:
            continue
        text = text[:random.Random(f"{c.seed} opening {number}").choice(ends)]
        if c.writing.ask is None:
            yield {"text": text, "spoken": [0, len(text)]} | lang
        else:
            ask = synth.clean(c.writing.ask)
            yield question(f"{ask} {text}", len(ask) + 1) | lang


def question(text: str, start: int) -> dict:
    """A dialogue that waits for its answer; the question is spoken from `start` on."""
    return {"messages": [{"role": "user", "content": text}], "spoken": [start, len(text)]}


def prompt_ids(document: dict, tok: Tokenizer) -> list[int]:
    if "messages" in document:
        return asking(document["messages"][0]["content"], tok).ids
    return tok.opening + tok(document["text"])


def with_reply(document: dict, reply: str, endless: bool) -> dict | None:
    """A document with what the model wrote; None where that is nothing, or an answer without an end.

    >>> with_reply({"text": "One.", "spoken": [0, 4]}, " Two. Three. Fou", endless=True)
    {'text': 'One. Two. Three.', 'spoken': [0, 4], 'endless': True}
    """
    if "text" in document:
        whole = synth.sentences(reply)[:-1 if endless else None]
        written = synth.clean(reply[:whole[-1][1]]) if whole else ""
        space = reply[:len(reply) - len(reply.lstrip())]               # or none
        between = synth.clean(f"|{space}|")[1:-1]
        cut_off = {"endless": True} if endless else {}
        return document | {"text": document["text"] + between + written} | cut_off if written else None
    written = synth.clean(reply)
    if endless or not written:
        return None
    return document | {"messages": [*document["messages"], {"role": "assistant", "content": written}]}


def preview(c: Settings) -> Path:
    """Write preview.html: samples of every recipe with their clips in place, and each token's loss flag."""
    shards: dict[str, Path] = {}                                        # the first of each recipe
    for recipe, split, number in synth.wanted_shards(c):
        path = synth.shard_path(c, recipe, split, number)
        if split == "train" and path.is_file():
            shards.setdefault(recipe, path)
    if not shards:
        raise UserError(f"There are no shards in {c.data} to preview; run synth.py first.")
    tok = load_tokenizer(c)
    shown = []
    for i in range(c.preview):                                          # the recipes in turn
        path = list(shards.values())[i % len(shards)]
        number = i // len(shards)
        if number < synth.open_shard(path).count:
            shown.append(previewed(*synth.read_sample(path, number), tok))
    page = jinja2.Template(PREVIEW, autoescape=True).render(samples=shown)
    synth.write_whole(Path("preview.html"), page.encode())
    return Path("preview.html")


def previewed(sample: dict, files: dict[str, bytes], tok: Tokenizer) -> dict:
    """What the page shows of a sample: its turns, and its tokens as [text, is target, times]."""
    roles = [message["role"] for message in sample["messages"] or []] or [""]
    audio = {name: base64.b64encode(data).decode() for name, data in files.items()}
    encoded = encode(sample, decoded(files), tok)
    tokens: list[list] = []
    held: list[int] = []
    for i, label in zip(encoded.ids, [IGNORE, *encoded.labels]):    # a target is the label of the one before
        held.append(i)
        token = tok.decode(held)
        if "\ufffd" in token and len(held) < 4:         # a piece of a character: shown with what completes it
            continue
        held.clear()
        if token == AUDIO and tokens and tokens[-1][0] == AUDIO:
            tokens[-1][2] += 1
        else:
            tokens.append([token, label != IGNORE, 1])
    return {
        "id": sample["id"],
        "turns": list(zip(roles, synth.parts_of(sample))),
        "audio": audio,
        "tokens": tokens,
        "positions": len(encoded.ids),
        "targets": sum(label != IGNORE for label in encoded.labels)}


# --------------------------------------------------------------------------------------------------
# 9. The gap curve
#
# What the method is about, on dev samples that training never sees: how much worse does the model continue
# a text after *hearing* a segment than after *reading* it? In nats per character, so that any corpus and
# tokenizer can be compared. Obedience stands beside it where the corpus has dialogues.
# --------------------------------------------------------------------------------------------------

@torch.compiler.set_stance("force_eager")    # else generation's many shapes would use up the compilations
@torch.no_grad()
def evaluate(c: Settings, model: InSerter, tok: Tokenizer) -> dict[str, float]:
    """A point of the gap curve, by all ranks together. The loss on text beside it shows what is forgotten.

    A sharded model answers no questions: its ranks would have to generate in step.
    """
    rank, world = rank_and_world()
    names = ("interleaved", "text", "chat")
    interleaved, texts, chats = (dev_samples(c, name, c.train.eval_samples)[rank::world] for name in names)
    sums = Counter(dict.fromkeys(("characters", "heard", "typed", "text characters", "text", "questions",
                                  "obeys spoken", "obeys typed"), 0.0))
    heard: list[Encoded] = []
    typed: list[Encoded] = []
    for sample, clips in interleaved:
        continued, characters = after_speech(sample)
        encoded = encode(continued, clips, tok)
        if characters and len(encoded.ids) <= c.train.pack_length:      # as in training
            sums["characters"] += characters
            heard.append(encoded)
            typed.append(encode(continued, clips, tok, typed=True))
    sums["heard"] += nats(c, model, heard)
    sums["typed"] += nats(c, model, typed)
    read: list[Encoded] = []
    for sample, clips in texts:
        encoded = encode(sample, clips, tok)
        if len(encoded.ids) <= c.train.pack_length:
            parts = itertools.chain(*synth.parts_of(sample))
            sums["text characters"] += sum(len(part["text"]) for part in parts)
            read.append(encoded)
    sums["text"] += nats(c, model, read)
    asked = [(*first_exchange(sample), clips) for sample, clips in chats]
    spoken = [one for one in asked if one[1] and is_spoken(one[0]) and not model.sharded]
    sums["questions"] += len(spoken)
    for way in ("spoken", "typed"):
        sums[f"obeys {way}"] += obeyed(c, model, tok, spoken, typed=way == "typed")
    return gap_point(sum_over_ranks(sums))


def gap_point(total: dict[str, float]) -> dict[str, float]:
    """Sums over all ranks' dev samples as a point of the curve; what the corpus does not have is left out."""
    point = {}
    if total["characters"]:
        point = {way: total[way] / total["characters"] for way in ("heard", "typed")}
        point["gap"] = point["heard"] - point["typed"]
    if total["text characters"]:
        point["text"] = total["text"] / total["text characters"]
    if total["questions"]:
        point |= {way: total[way] / total["questions"] for way in ("obeys spoken", "obeys typed")}
    return point


def after_speech(sample: dict) -> tuple[dict, int]:
    """The sample with loss on the text after its first speech only, and the characters of that text."""
    kept = json.loads(json.dumps(sample))
    seen = False
    characters = 0
    for part in (part for parts in synth.parts_of(kept) for part in parts):
        seen = seen or part["role"] == "speech"
        if part["role"] == "text":
            part["loss"] = part["loss"] and seen
            characters += len(part["text"]) if part["loss"] else 0
    return kept, characters


def nats(c: Settings, model: InSerter, encoded: list[Encoded]) -> float:
    """Sum of the losses of encoded samples, in passes of as many positions as training's."""
    groups = list(grouped(encoded, c.train.pack_length * c.train.packs_at_once))
    if model.sharded:                        # every rank takes part in every pass: nothing, if need be
        idle = Encoded("", ids=[0, 0], labels=[IGNORE, IGNORE], clips=[], word_ids=[])
        groups += [[idle]] * (max(gather(len(groups))) - len(groups))
    total = 0.0
    for group in groups:
        pack = packed(group, ctc=False, waste=0, skipped=[], cursor={})
        with mixed_precision(c):
            total += float(model(**batch_of([pack]), chunk=c.train.loss_chunk))
    if model.sharded:
        model.reshard()                      # FSDP2 leaves that to a backward pass, which does not come
    return total


def grouped(documents: list[Encoded], most: int) -> Iterator[list[Encoded]]:
    """The documents in order, in groups of at most `most` positions, or of a longer one alone."""
    group: list[Encoded] = []
    for document in documents:
        if group and sum(len(other.ids) for other in [*group, document]) > most:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def first_exchange(sample: dict) -> tuple[dict, str]:
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


def is_spoken(sample: dict) -> bool:
    return any(part["role"] == "speech" for parts in synth.parts_of(sample) for part in parts)


def obeyed(c: Settings, model: InSerter, tok: Tokenizer, exchanges: list[tuple[dict, str, dict]],
           typed: bool) -> int:
    """How many of these questions (opening, reference, clips) are answered exactly by the reference."""
    openings = [encode(opening, clips, tok, typed=typed, reply=True) for opening, _, clips in exchanges]
    replies = complete(model, tok, openings, c.bench.max_tokens, c.bench.batch)
    return sum(reply == reference for (reply, _), (_, reference, _) in zip(replies, exchanges))


def dev_samples(c: Settings, recipe: str, count: int) -> list[tuple[dict, dict]]:
    """The first dev samples of a recipe with their decoded clips; none where the corpus has none."""
    found: list[tuple[dict, dict]] = []
    for path in sorted((Path(c.data) / recipe).glob("dev-*.tar")):
        for number in range(min(synth.open_shard(path).count, count - len(found))):
            sample, files = synth.read_sample(path, number)
            found.append((sample, decoded(files)))
    return found


def batches(items: list, size: int) -> Iterator[list]:
    return (items[start:start + size] for start in range(0, len(items), size))


# --------------------------------------------------------------------------------------------------
# 10. A run: start, save, continue
#
# runs/<run>/state/<step>/ has state.json (where every lane stands) and state.safetensors (weights and the
# optimizers' slots); no pickle. The folder is written aside, flushed and renamed, so it is whole or absent.
# A run that starts again reads the newest state and nothing else.
# --------------------------------------------------------------------------------------------------

def train(c: Settings, arguments: list[str]) -> None:
    """Run the stages from the start or from the newest state."""
    try:
        run_stages(c, arguments)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError("Another process of this run has gone, killed perhaps; start the same command again: "
                        f"it continues from the last state. ({str(error).splitlines()[0]})") from None


def run_stages(c: Settings, arguments: list[str]) -> None:
    """Make ready what a run needs, then train stage by stage."""
    rank, world = rank_and_world()
    stages = stages_of(c)
    for name in stages:
        if c.train.stages[name].packs % world:
            raise UserError(f"train.stages.{name}.packs={c.train.stages[name].packs} is no multiple of the "
                            f"{world} processes; choose one that is.")
    start_group()
    agreed(lambda: open_run(c) if rank == 0 else None)
    agreed(lambda: open_run(c) if rank > 0 else None)                   # after rank 0 has made way
    make_missing_shards(c, arguments)
    tok = load_tokenizer(c)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    progress, tensors = begin(c, tok, stages[0])
    model = fresh_model(c, tok)
    if tensors:
        weights = {name[len("weight."):]: t for name, t in tensors.items() if name.startswith("weight.")}
        model.load_state_dict(weights, strict=False)
        del weights
        say(f"continuing run {c.run} in stage {progress.stage} after step {progress.step}")
    check_agreement(c, progress, model)
    model.recompute = c.train.checkpointing
    if c.train.compile:
        for block in blocks_of(model):
            block.compile()
    if c.train.shard and world > 1:
        divide(model)                        # moves it block by block: a GPU may not hold it whole
    else:
        model.to(device_here())
    if rank == 0:
        tidy(c, progress.step)
    say(describe(model))
    saved = {name: t for name, t in tensors.items() if name.startswith("optim.")}
    del tensors                              # `train_stage` empties `saved`: a state may fill the memory
    first_step = progress.step
    for name in stages[stages.index(progress.stage):]:
        if name != progress.stage:
            progress = Progress(name, progress.step)
            saved = {}
        if progress.share(c.train.stages[name]) >= 1:
            continue
        if not train_stage(c, model, tok, progress, saved, stopping):
            say(f"stopped by a signal after step {progress.step}; the same command continues")
            sys.exit(128 + signal.SIGTERM)
    if progress.step == first_step:          # killed between the last state and its export
        export(c, model, tok, whole_tensors(model, []))
    if rank == 0:
        draw_curves(c)
        say(f"run {c.run} is finished: {run_folder(c) / 'model'} and curves.png; next: python bench.py")
    if world > 1:
        dist.destroy_process_group()


def start_group() -> None:
    """Join the other ranks: NCCL sums gradients on GPUs, gloo on CPUs."""
    demand_gpu()
    here, gpus = device_here(), torch.cuda.device_count()
    if here.type == "cuda":
        if here.index >= gpus:
            raise UserError(f"There is no GPU for process {here.index} (counted from 0) of this machine with "
                            f"{gpus} GPUs; start torchrun with --nproc-per-node={gpus} at most.")
        torch.cuda.set_device(here)
    if rank_and_world()[1] > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def demand_gpu() -> None:
    """Refuse to train on the CPU without a word where there is a GPU: its driver may be too old for torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if Path("/dev/nvidia0").exists() and not torch.cuda.is_available() and not hidden:
        raise UserError("There is a GPU here (/dev/nvidia0) that torch cannot use; install the torch that "
                        "fits its driver, or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU.")


def check_agreement(c: Settings, progress: Progress, model: InSerter) -> None:
    """All ranks stand at one step with the same weights; on disks of their own they might not."""
    states = gather([progress.stage, progress.step, checksum(model)])
    for rank, state in enumerate(states):
        if state != states[0]:
            where = [f"rank {number} at step {step} of {stage} (weights {digest:08x})"
                     for number, (stage, step, digest) in ((0, states[0]), (rank, state))]
            raise UserError(f"The processes do not start alike: {' and '.join(where)}. Let all machines "
                            f"share {run_folder(c)}, or copy that of rank 0 to each.")


def checksum(model: InSerter) -> int:
    """CRC-32 of all parameters; the model is still on the CPU."""
    found = 0
    for p in model.parameters():
        found = zlib.crc32(p.detach().contiguous().view(-1).view(torch.uint8).numpy(), found)
    return found


def divide(model: InSerter) -> None:
    """Divide parameters, gradients and AdamW's slots among the ranks (PyTorch's FSDP2), block by block.

    Each rank keeps its share and borrows a block's parameters from the others while it computes with them: a
    model too large for one GPU fits several. Gradients are averaged over the ranks, as by DDP.
    """
    _, world = rank_and_world()
    mesh = init_device_mesh(device_here().type, (world,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)            # what stands in no block
    model.sharded = True


def blocks_of(model: InSerter) -> list[nn.Module]:
    return [*model.audio_tower.layers, *model.language_model.model.layers]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, by all ranks; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def gradients_kept(network: nn.Module) -> Iterator[None]:
    """Context of a backward pass that more are to follow in the same step: ranks do not meet yet."""
    if isinstance(network, DistributedDataParallel):
        with network.no_sync():
            yield
    elif isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(False)
        yield
        network.set_requires_gradient_sync(True)
    else:
        yield


def stages_of(c: Settings) -> list[str]:
    """The stages to run: without those of steps=0, and, when weights are given, those that make stand-ins."""
    given = c.model["from"] or c.model.encoder
    return [name for name, stage in c.train.stages.items()
            if stage.steps != 0 and not (given and stage.from_scratch)]


def run_folder(c: Settings) -> Path:
    return Path("runs") / c.run


def open_run(c: Settings) -> None:
    """Make the run's folder, or check that it was begun with these settings: its config.yaml keeps them.

    Rank 0 removes an old run, if fresh=true asks for it.
    """
    folder = run_folder(c)
    if c.fresh and rank_and_world()[0] == 0 and folder.exists():
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder} has no config.yaml, so it may hold something else than a run; remove "
                            "it yourself, or choose another name with run=….")
        shutil.rmtree(folder)
    begun = any(folder.glob("state/[0-9]*")) or (folder / "model").exists()
    synth.same_settings(folder / "config.yaml", c, c.may_change,
                        "choose another name with run=…, or start it anew with fresh=true", begun)


def make_missing_shards(c: Settings, arguments: list[str]) -> None:
    """Let synth.py make this rank's share of the missing shards, then wait for the other ranks' shares."""
    rank, world = rank_and_world()
    wanted = [synth.shard_path(c, *key) for key in synth.wanted_shards(c)]
    if any(gather(any(not path.is_file() for path in wanted))):
        say("making the missing shards first")
        kept = [a for a in arguments if a.partition("=")[0] not in ("shard", "fresh", "plan")]
        command = [sys.executable, synth.__file__, *kept, f"shard={rank}/{world}"]
        if any(gather(subprocess.run(command).returncode)):
            sys.exit(2)                      # synth.py has said why
    agreed(lambda: wait_for(wanted))


def wait_for(paths: list[Path]) -> None:
    """Wait for the shards of other ranks or machines. Says once a minute for what; gives up after an hour in
    which none has come."""
    minutes = 0
    missing = [path for path in paths if not path.is_file()]
    while missing:
        for _ in range(60):
            time.sleep(1)
            left = [path for path in missing if not path.is_file()]
            if not left:
                return
        minutes = 0 if len(left) < len(missing) else minutes + 1
        missing = left
        print(f"waiting for {len(missing)} shards of other processes, {missing[0]} among them", flush=True)
        if minutes == 60:
            raise UserError(f"No shard has come for an hour, and {len(missing)} are missing, {missing[0]} "
                            "among them: did the process that makes them die? Start the same command again.")


def begin(c: Settings, tok: Tokenizer, first_stage: str) -> tuple[Progress, dict[str, Tensor]]:
    """Where the run stands, and the tensors of its newest state; none at its beginning."""
    saved = load_state(c)
    if saved is None:
        return Progress(first_stage), {}
    state, tensors = saved
    if state["tokenizer"] != tok.digest:
        raise UserError(f"The tokenizer in {c.data} is not the one that run {c.run} began with; restore it, "
                        "or use fresh=true.")
    fields = [field.name for field in dataclasses.fields(Progress)]
    return Progress(**{name: state[name] for name in fields}), tensors


def describe(model: InSerter) -> str:
    """What is trained, where and by which attention, and the heading of the log."""
    ways = []
    for name, module in (("encoder", model.audio_tower), ("LLM", model.language_model)):
        way = "fused" if uses_kernel(device_here(), module.head_size) else "plain"
        ways.append(f"{name} {way} (heads of {module.head_size})")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    _, world = rank_and_world()
    return (f"{millions:.1f} M parameters on {world} x {device_here().type}, attention: {', '.join(ways)}\n"
            "   step | loss | lr | grad norm | tokens/s | audio s/s | waiting for data | eta")


def save_run(c: Settings, model: InSerter, tok: Tokenizer, optimizers: list, progress: Progress,
             feed: Feed) -> None:
    """State, then export, by rank 0; every lane's cursor comes from the rank that serves it."""
    for cursors in gather(feed.cursors):
        progress.cursors |= cursors
    tensors = whole_tensors(model, optimizers)
    state = dataclasses.asdict(progress) | {"tokenizer": tok.digest, "settings": c}
    agreed(lambda: save_state(c, tensors, state))
    agreed(lambda: export(c, model, tok, tensors))


def whole_tensors(model: InSerter, optimizers: list) -> dict[str, Tensor]:
    """weight.<parameter> and optim.<slot>.<parameter>, whole, on the CPU. All ranks call; one gets them."""
    tensors = {}
    for name, p in model.named_parameters():
        slots = {f"optim.{slot}.{name}": value for optimizer in optimizers
                 for slot, value in optimizer.state.get(p, {}).items()}
        for key, value in {f"weight.{name}": p.detach(), **slots}.items():
            value = whole(value)             # by all ranks together, where each has a share
            if rank_and_world()[0] == 0:
                tensors[key] = value.cpu().contiguous()
    return tensors


def save_state(c: Settings, tensors: dict[str, Tensor], state: dict) -> None:
    """Rank 0 writes the state of a step and removes all but the newest few."""
    if rank_and_world()[0]:
        return
    folder = run_folder(c) / "state" / f"{state['step']:08d}"
    aside = folder.with_name(f".new.{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with writing(folder):
        aside.mkdir(parents=True)
        save_file(tensors, aside / "state.safetensors")
        digest = sha256_of(aside / "state.safetensors")
        (aside / "state.json").write_text(json.dumps(state | {"files": {"state.safetensors": digest}}))
        replace_folder(aside, folder)
    states = sorted(folder.parent.glob("[0-9]*"))
    damaged = [state for state in states if state > folder]         # or this run would have continued from it
    sound = states[:len(states) - len(damaged)]
    for old in damaged + sound[:-c.train.keep_states]:
        hidden = old.rename(old.with_name(f".old.{old.name}"))
        shutil.rmtree(hidden)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def load_state(c: Settings) -> tuple[dict, dict[str, Tensor]] | None:
    """The newest whole state: (state.json, tensors). A damaged one is named, and the one before it taken."""
    folders = sorted((run_folder(c) / "state").glob("[0-9]*"), reverse=True)
    for folder in folders:
        try:
            state = json.loads((folder / "state.json").read_text())
            for name, digest in state["files"].items():
                if sha256_of(folder / name) != digest:
                    raise ValueError(f"{name} has another SHA-256")
            tensors = load_file(folder / "state.safetensors")
            return state, {name: t.clone() for name, t in tensors.items()}       # or the file would stay open
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            say(f"{folder} is damaged ({error}); the state before it is taken.")
    if folders:
        raise UserError(f"No state in {folders[0].parent} is whole; start the run again with fresh=true.")
    return None


def restore_optimizers(model: InSerter, optimizers: list, saved: dict[str, Tensor]) -> None:
    """Put the tensors optim.<slot>.<parameter> back. A fused AdamW keeps its step on the GPU."""
    owner = {p: optimizer for optimizer in optimizers
             for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    for key, value in saved.items():
        _, slot, name = key.split(".", 2)
        p = named[name]
        if p in owner and isinstance(p, DTensor) and value.ndim:
            owner[p].state[p][slot] = distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
        elif p in owner:
            owner[p].state[p][slot] = value.to(p.device)


def export(c: Settings, model: InSerter, tok: Tokenizer, tensors: dict[str, Tensor]) -> None:
    """Rank 0 writes runs/<run>/model/: a Qwen2-Audio checkpoint, processor and model card, replaced whole.

    tensors: those of `whole_tensors`
    """
    if rank_and_world()[0]:
        return
    weights = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    folder = run_folder(c) / "model"
    aside = folder.with_name(".new.model")
    shutil.rmtree(aside, ignore_errors=True)
    with writing(folder):
        save_model(model, aside, weights)
        save_processor(model.config, tok, aside)
        (aside / "README.md").write_text(model_card(c), encoding="utf-8")
        replace_folder(aside, folder)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Context in which a full disk becomes one sentence and what was finished before is kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} could not be written ({error}); make room, then start the same command "
                        "again: it continues from the state before.") from None


def replace_folder(aside: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one."""
    for path in aside.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    old = folder.with_name(f".old.{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def tidy(c: Settings, step: int) -> None:
    """Forget what a killed process left: unfinished files, metrics that the state in use does not know."""
    folder = run_folder(c)
    for left in [*folder.glob(".*"), *folder.glob("state/.*")]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
    path = folder / "metrics.jsonl"
    if path.is_file():
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if step and line.endswith(b"\n") and json.loads(line)["step"] <= step]
        synth.write_whole(path, *kept)


def rank_and_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device_here() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def mixed_precision(c: Settings) -> torch.autocast:
    """Context in which matrix products are bfloat16, where train.precision wants that here."""
    device = device_here()
    half = c.train.precision == "bfloat16" or (c.train.precision == "auto" and is_recent_gpu(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over the ranks; float64 keeps counts and checksums exact."""
    if not dist.is_initialized():
        return {name: float(value) for name, value in values.items()}
    total = torch.tensor(list(map(float, values.values())), dtype=torch.float64, device=device_here())
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def gather(thing: Any) -> list:
    """The thing of every rank, on every rank; who comes first waits for the others, however long."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing, group=patient_group())
    return things


def agreed(action: Callable[[], None]) -> None:
    """Let each rank do something; a UserError of one is raised by all."""
    problem = ""
    try:
        action()
    except UserError as error:
        problem = str(error)
    problems = [problem for problem in gather(problem) if problem]
    if problems:
        raise UserError(problems[0])


@lru_cache
def patient_group() -> dist.ProcessGroup:
    """All ranks, with patience: another's long save is no failure, and torchrun ends all if one dies."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


def say(line: str) -> None:
    """Print a line above the progress bar, on rank 0."""
    if rank_and_world()[0] == 0:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


# --------------------------------------------------------------------------------------------------
# 11. The log: console, metrics.jsonl, curves
#
# Every log_every steps a row of metrics.jsonl says what happened since: loss, gradient norm, speed, waste.
# Points of the gap curve stand between them, {"eval": {…}}; curves.png is drawn from both when the run ends.
# --------------------------------------------------------------------------------------------------

PEAK_FLOPS = 989e12       # dense bfloat16 operations per second of an H100 or H200: the log's MFU is of these


class Log:
    """One line per log step, a progress bar on rank 0, and metrics.jsonl."""

    def __init__(self, c: Settings, progress: Progress, stage: Settings):
        self.c = c
        self.progress = progress
        self.stage = stage
        self.rank, self.world = rank_and_world()
        done = progress.stage_step if stage.steps else int(progress.targets)
        self.bar = tqdm(total=stage.steps or stage.tokens, initial=done, desc=progress.stage, leave=False,
                        disable=True if self.rank else None)
        self.first_step = progress.stage_step
        self.begun = self.since = self.last = time.perf_counter()
        self.sums: Counter = Counter()

    def step(self, loss: float, factor: float, norm: float, totals: dict[str, float]) -> None:
        """Count a step; every log_every steps write what happened since."""
        self.bar.update(1 if self.stage.steps else int(totals["targets"]))
        self.sums.update(totals | sum_over_ranks({"loss": loss}))
        self.last = time.perf_counter()
        if self.progress.step % self.c.train.log_every:
            return
        n = self.sums
        seconds = self.last - self.since
        row = {
            "loss": n["loss"] / max(n["targets"], 1),
            "lr": factor * self.stage.lr,
            "grad norm": norm,
            "tokens/s": n["positions"] / seconds,
            "audio s/s": n["audio samples"] / RATE / seconds,
            "targets": self.progress.targets,
            "batch": int(n["batch"]),
            "waste": n["waste"] / (n["positions"] + n["waste"]),
            "skipped": int(n["skipped"]),
            "wait": n["waited"] / seconds / self.world}
        if torch.cuda.is_available():
            row["MFU"] = n["flops"] / seconds / self.world / PEAK_FLOPS
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        self.write(row)
        say(self.line(row))
        self.since = self.last
        self.sums = Counter()

    def line(self, row: dict[str, float]) -> str:
        """A row of metrics.jsonl for the console."""
        share = self.progress.share(self.stage)
        per_step = (time.perf_counter() - self.begun) / max(self.progress.stage_step - self.first_step, 1)
        steps_left = (1 - share) / max(share, 1e-9) * self.progress.stage_step
        cells = [
            f"{self.progress.step:>7}",
            f"{row['loss']:.4f}",
            f"{row['lr']:.2e}",
            f"{row['grad norm']:.3f}",
            f"{row['tokens/s']:,.0f} tokens/s",
            f"{row['audio s/s']:.1f} audio s/s",
            f"waits {row['wait']:.0%}"]
        if "MFU" in row:
            cells += [f"MFU {row['MFU']:.1%}", f"{row['peak GB']:.1f} GB"]
        if row["skipped"]:
            cells.append(f"{row['skipped']} longer than a pack left out")
        return " | ".join([*cells, f"eta {per_step * steps_left / 60:.1f} min"])

    def point(self, point: dict[str, float]) -> None:
        """Keep a point of the gap curve."""
        self.write({"eval": point})
        values = " | ".join(f"{name} {value:.3f}" for name, value in point.items())
        say(f"{self.progress.step:>7} | dev {values}")
        evaluating = time.perf_counter() - self.last                    # not counted as training time
        self.since += evaluating
        self.begun += evaluating

    def write(self, row: dict) -> None:
        if self.rank == 0:
            path = run_folder(self.c) / "metrics.jsonl"
            line = json.dumps({"step": self.progress.step, "stage": self.progress.stage} | row) + "\n"
            with writing(path), open(path, "a") as file:
                file.write(line)


def step_flops(model: InSerter, pack: Pack) -> float:
    """Multiplications and additions of a step over a pack's real tokens and frames, forward and backward.

    A matrix takes two per entry and row; attention two products of L x L x width per clip, half of that where
    causal. Nothing that is padded, recomputed or not a matrix product counts; of CTC encoder and adapter do.
    """
    audio = model.config.audio_config
    text = model.config.text_config
    d = audio.d_model
    frames = np.array([convolved(n) for n in pack.clip_samples], dtype=float)           # of each clip
    tokens = np.diff(pack.cu_seqlens).astype(float)                                     # of each document
    heard = sum(map(audio_positions, pack.clip_samples))
    queries = model.language_model.head_size * text.num_attention_heads
    keys = model.language_model.head_size * text.num_key_value_heads

    matrices = 4 * d ** 2 + 2 * d * audio.encoder_ffn_dim
    encoder_block = 2 * matrices * frames.sum() + 4 * d * (frames ** 2).sum()
    convolutions = 2 * 3 * d * (2 * audio.num_mel_bins + d) * frames.sum()
    matrices = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    llm_block = 2 * matrices * tokens.sum() + 2 * queries * (tokens ** 2).sum()
    adapter = 2 * text.hidden_size * d * heard
    head = 2 * text.hidden_size * text.vocab_size * pack.supervised
    total = audio.encoder_layers * encoder_block + convolutions + adapter
    if pack.word_ids is None:
        total += text.num_hidden_layers * llm_block + head
    return 3 * float(total)


def draw_curves(c: Settings) -> None:
    """runs/<run>/curves.png: the training loss, the gap curve and obedience on dev, by step."""
    from matplotlib.figure import Figure     # half a second that only this needs

    rows = [json.loads(line) for line in (run_folder(c) / "metrics.jsonl").read_text().splitlines()]
    starts = {row["stage"]: row["step"] for row in reversed(rows)}
    panels = (
        ("training loss", "nats per target", ["loss"]),
        ("dev: text after speech, heard and typed", "nats per character", ["heard", "typed", "gap", "text"]),
        ("dev: answers equal to the reference", "share", ["obeys spoken", "obeys typed"]))
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axis, (title, unit, names) in zip(figure.subplots(1, 3), panels):
        for name in names:
            points = [(row["step"], values[name]) for row in rows if name in (values := row.get("eval", row))]
            style = {"lw": 0.8} if name == "loss" else {"lw": 1.5, "marker": "o", "ms": 3}
            axis.plot([step for step, _ in points], [value for _, value in points], label=name, **style)
        for start in starts.values():
            axis.axvline(start, color="0.8", lw=1, zorder=0)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.legend()
    losses = figure.axes[0]
    if any("loss" in row for row in rows):   # a short run logs none
        losses.set_yscale("log")
    for stage, start in starts.items():
        losses.text(start, 0.98, stage, transform=losses.get_xaxis_transform(), va="top", rotation=90,
                    fontsize=8)
    figure.savefig(run_folder(c) / "curves.png", dpi=110)


# --------------------------------------------------------------------------------------------------
# 12. Faster attention: computes exactly `plain_attention`; skip on first reading
#
# A pack has many short documents, and a call for each would cost more than the attention itself. On a CPU
# documents of similar length are padded to each other and share a call of torch's; on a GPU one kernel takes
# all of them (section 13).
# --------------------------------------------------------------------------------------------------

def uses_kernel(device: torch.device, head_size: int) -> bool:
    """Whether such heads are attended by `fused_attention`: on a GPU, or by Triton's interpreter."""
    if triton is None or head_size not in HEAD_SIZES:
        return False
    return is_recent_gpu(device) or os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def is_recent_gpu(device: torch.device) -> bool:
    """Whether it computes in bfloat16 and has what the kernel needs: Ampere (A100, RTX 30) or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def packed_attention(cu_seqlens: Tensor, causal: bool, x: Tensor, head_size: int) -> Callable[..., Tensor]:
    """The function attend(q, k, v) of a pack x (T, d): its index work is done once, for all layers."""
    here = sent(cu_seqlens, x.device)
    if uses_kernel(x.device, head_size):
        tiles = fused_tiles(here, causal, len(x))
        return lambda q, k, v: fused_attention(q, k, v, here, causal, tiles)
    buckets = length_buckets(cu_seqlens, causal, x.device)
    return lambda q, k, v: bucketed_attention(q, k, v, here, causal, buckets)


def bucketed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool,
                       buckets: tuple | None = None) -> Tensor:
    """`plain_attention` on a CPU: documents of similar length share a call, padded to the longest of them.

    buckets: the index work of `length_buckets`, shared by all layers
    """
    rows, blocks, back = buckets or length_buckets(cu_seqlens, causal, q.device)
    sizes = [count * length for count, length, _ in blocks]
    grouped = q.shape[1] != k.shape[1]
    queries, keys, values = (x.index_select(0, rows).split(sizes) for x in (q, k, v))
    outputs = []
    for (count, length, mask), *qkv in zip(blocks, queries, keys, values):
        qkv = [x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv]            # each (n, H, L, D)
        out = F.scaled_dot_product_attention(*qkv, mask, is_causal=causal, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))                               # (n L, Hq, D)
    return torch.cat(outputs).index_select(0, back)


def length_buckets(cu_seqlens: Tensor, causal: bool, device: torch.device) -> tuple[Tensor, list, Tensor]:
    """The index work of bucketed_attention, which depends on the documents' lengths alone.

    Lengths [3, 0, 7, 2] fall into the buckets (2, 4], (4, 8] and (1, 2]; the empty document is nowhere.
    -> rows    where the padded rows of all buckets come from
       blocks  [(documents n, longest L, mask of real keys (n, 1, 1, L) or None)], here (1, 3), (1, 7), (1, 2)
       back    (T,) the row at which each position's result stands
    """
    bounds = cu_seqlens.cpu().long()
    starts, lengths = bounds[:-1], bounds.diff()
    buckets: dict[int, list[int]] = {}
    for document, length in enumerate(lengths.tolist()):
        if length:
            buckets.setdefault((length - 1).bit_length(), []).append(document)
    back = torch.empty(int(bounds[-1]), dtype=torch.int64)
    sources, blocks, filled = [], [], 0
    for documents in buckets.values():
        start = starts[documents, None]                                                 # (n, 1)
        length = lengths[documents, None]
        column = torch.arange(int(length.max()))                                        # (L,)
        is_real = column < length                                                       # (n, L)
        rows = start + torch.minimum(column, length - 1)                                # padded by real rows
        back[rows[is_real]] = filled + is_real.flatten().nonzero()[:, 0]
        filled += rows.numel()
        mask = None
        if not causal and not is_real.all():          # causal: padding is last, where no query looks
            mask = is_real[:, None, None].to(device)
        sources.append(rows.flatten())
        blocks.append((*rows.shape, mask))
    return torch.cat(sources).to(device), blocks, back.to(device)


# --------------------------------------------------------------------------------------------------
# 13. The fused kernel: computes exactly `plain_attention`; skip on first reading
#
# Flash attention: a program holds a tile of query rows of one document and head, walks over the keys they may
# see, and keeps a running maximum and sum, so scores never reach memory; `lse`, the logarithm of every row's
# sum, is all the backward pass needs to make them again. That is two kernels without atomics, so the same
# bits come out every time: `query_gradient` holds queries and walks over keys, `key_gradient` holds keys and
# walks over queries. Work is the sum of squared document lengths; no program looks past its own. Tensors
# reach a kernel as (pointer, stride of a position, stride of a head); rows count from a document's start.
# --------------------------------------------------------------------------------------------------

HEAD_SIZES = (16, 32, 64, 128)               # others take bucketed_attention
TILE = 128                                   # rows of an entry of the table of tiles
compiled = triton.jit if triton else lambda function: function


def fused_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool,
                    tiles: Tensor | None = None) -> Tensor:
    """Arguments and result are those of `plain_attention`; tiles: fused_tiles' result, shared by layers.

    D is one of HEAD_SIZES; bfloat16 and float16 are added up in float32, and float32 is computed as such. The
    last dimension is contiguous, or copied; positions and heads may lie at any strides.
    """
    if torch.is_autocast_enabled(q.device.type):                    # which does not know operators of our own
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if tiles is None:
        tiles = fused_tiles(sent(cu_seqlens, q.device), causal, len(q))
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out, _ = attention_op(q, k, v, tiles, causal)
    return out


def fused_tiles(cu_seqlens: Tensor, causal: bool, positions: int) -> Tensor:
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


def tile_shape(kernel: Any, D: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
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


def launch(kernel: Any, tiles: Tensor, causal: bool, q: Tensor, k: Tensor, *others: Tensor) -> None:
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
# 14. The command line
# --------------------------------------------------------------------------------------------------

def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments)
    if c.ask is not None:
        print(ask(c))
    elif c.write is not None:
        print(f"{write(c)}; train on them with synth.corpus={c.write}.")
    elif c.preview is not None:
        print(f"{preview(c)} is written; open it in a browser.")
    else:
        train(c, arguments)


# --------------------------------------------------------------------------------------------------
# Data, all of it jinja2: chat templates, the page of `preview`, the model card
# --------------------------------------------------------------------------------------------------

# Put before any LLM's own template: contents that are lists of texts and clips become texts, clips numbered
# as by Qwen2-Audio. Qwen3 is asked not to think aloud, and Llama 3 is told one day for ever.
NUMBERED_CLIPS = """{%- set ns = namespace(clips=0, text='', turns=[]) -%}
{%- for message in messages -%}
{%- if message.content is string -%}{%- set ns.text = message.content -%}{%- else -%}
{%- set ns.text = '' -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{%- set ns.text = ns.text ~ part.text -%}{%- else -%}
{%- set ns.clips = ns.clips + 1 -%}
{%- set ns.text = ns.text ~ 'Audio ' ~ ns.clips ~ ': <|audio_bos|><|AUDIO|><|audio_eos|>\\n' -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set ns.turns = ns.turns + [{'role': message.role, 'content': ns.text}] -%}
{%- endfor -%}
{%- set messages = ns.turns -%}
{%- set enable_thinking = false -%}
{%- set date_string = '26 Jul 2024' -%}
"""

CHATML = """{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


PREVIEW = """<!doctype html><html lang="en"><meta charset="utf-8"><title>InSerter: samples</title><style>
body { font: 16px/1.6 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
section { border-top: 1px solid #ccc; padding: .5em 0 }
h2 { font-size: 1em; color: #666; margin: .3em 0 }
p { white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer; color: #666 }
.speech { display: inline-block; vertical-align: top; background: #e6f0fb; border-radius: .4em; margin: .1em;
          padding: .1em .5em }
.speech small { color: #467; margin-left: .6em }
.speech audio { height: 2em; width: 17em; vertical-align: middle }
.loss { border-bottom: 2px solid #e08a00 }
.key { white-space: normal }
.key span { margin-right: 1.5em }
code { display: inline-block; white-space: pre-wrap; margin: 0 1px .3em; background: #f0f0f0 }
</style>
<h1>InSerter: samples</h1>
<p class="key"><span class="speech">speech, with the words spoken</span>
<span class="loss">text that carries loss</span> <span>text that only conditions</span></p>
{% for sample in samples %}
<section><h2>{{ sample.id }}</h2>
{% for role, parts in sample.turns %}<p>{% if role %}<b>{{ role }}</b> {% endif %}
{%- for part in parts %}{% if part.role == "speech" -%}
<span class="speech">{{ part.text }}<br><audio controls preload="metadata" src="data:audio/flac;base64,\
{{ sample.audio[part.audio] }}"></audio><small>{{ part.voice }}, {{ part.seconds }} s
{{- ", " ~ part.noise if part.noise }}</small></span>
{%- else -%}
<span class="{{ "loss" if part.loss else "text" }}">{{ part.text }}</span>
{%- endif %}{% endfor %}</p>
{% endfor -%}
<details><summary>{{ sample.positions }} positions, {{ sample.targets }} targets (underlined)</summary>
{%- for token, is_target, times in sample.tokens -%}
<code class="{{ "loss" if is_target }}">{{ token | replace("\\n", "⏎") }}</code>
{%- if times > 1 %}× {{ times }} {% endif %}
{%- endfor %}</details></section>
{% endfor %}</html>
"""


CARD = """---
library_name: transformers
pipeline_tag: audio-text-to-text
language: {{ c.synth.lang }}
{% if bases -%}
base_model: [{{ bases | join(", ") }}]
license: other
license_name: that-of-the-base-models-and-the-data
{%- else -%}
license: mit
{%- endif %}
---
# {{ c.run }}: an InSerter speech LLM

Trained by interleaved pre-training (InSerter, arXiv 2503.02769): random segments of text are speech, the
loss is on text alone. It answers spoken and typed questions.

| | |
|---|---|
{%- for name, value in rows %}
| {{ name }} | {{ value }} |
{%- endfor %}

```python
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
import soundfile

processor = AutoProcessor.from_pretrained("FOLDER")
model = Qwen2AudioForConditionalGeneration.from_pretrained("FOLDER")
question = [{"role": "user", "content": [{"type": "audio", "audio_url": "question.wav"}]}]
text = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
inputs = processor(text=text, audio=[soundfile.read("question.wav", dtype="float32")[0]], sampling_rate=16000,
                   add_special_tokens=False, return_tensors="pt")           # 16 kHz, one channel
print(processor.batch_decode(model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1]:],
                             skip_special_tokens=True)[0])
```
"""


if __name__ == "__main__":
    synth.run(main)
