"""InSerter: a speech LLM (encoder, adapter, LLM) trained on text in which random segments are speech.

One interleaved sample, its ids, and the labels the model is trained on (`.` = no loss):

    parts    text "tom puts the "        speech (1.62 s)                          text ". the ball is"
    ids      tom puts the                <|audio_bos|> <|AUDIO|> x 40 <|audio_eos|>  . the ball is <|endoftext|>
    labels   puts the .                  .             .              .              the ball is <|endoftext|>
                                                        (the label of <|audio_eos|> is the first text token after it)

Samples are packed end to end, never padded; attention stays inside a sample by `cu_seqlens`:

    waveforms ── log-mel ── Encoder ── Adapter ──┐ one vector per 40 ms, put in place of each <|AUDIO|>
    ids (T,) ────────────── embeddings ──────────┴── LLM ── LM head at the labelled positions ── loss

    torchrun inserter.py                                  train: the stages that config.yaml lists
    torchrun --nproc-per-node=4 inserter.py profile=qwen  on four GPUs
    python inserter.py ask=question.wav                   answer a spoken question
    python inserter.py ask="what colour is the sun"       or a typed one

Legend  T positions of a pack   d width   Hq, Hkv query and key-value heads   D head size   V vocabulary
        N, F, L  frames, frames kept as context, and convolution outputs of one clip   B prompts being answered
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from bisect import bisect_right
from collections import Counter
from functools import lru_cache
from hashlib import sha256
from multiprocessing import forkserver
from pathlib import Path
from typing import Iterator

import numpy as np
import soundfile
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2AudioConfig
from transformers.audio_utils import mel_filter_bank

import synth
from synth import Settings, UserError

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:               # it comes with torch on Linux; elsewhere attention is plain
    triton = None

RATE = synth.RATE                 # samples per second
IGNORE = -100                     # label of a position without loss, as in PyTorch's cross_entropy


# --------------------------------------------------------------------------------------------------
# 1. One sample: its ids and its labels
#
# The only place that knows special tokens, the chat template and the loss mask. Ids and labels are made
# together, so they cannot drift apart. The template is Qwen2-Audio's own.
# --------------------------------------------------------------------------------------------------

END, TURN, TURN_END, AUDIO_BOS, AUDIO, AUDIO_EOS = SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
SYSTEM = "You are a helpful assistant."


class Tokenizer:
    """Text to ids part by part. Special tokens that occur inside a text are read as plain text."""

    def __init__(self, hf):
        self.hf, self.backend = hf, hf.backend_tokenizer
        self.backend.encode_special_tokens = True
        self.special = {name: hf.convert_tokens_to_ids(name) for name in SPECIAL}
        self.digest = sha256(self.backend.to_str().encode()).hexdigest()

    def __call__(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


@dataclasses.dataclass
class Encoded:
    """One sample: ids and labels (n,), and its clips; labels[t] is the token after position t, or IGNORE."""
    name: str
    ids: list[int]
    labels: list[int]
    clips: list[np.ndarray]
    words: list[list[int]]        # tokens of each clip's words in small letters, which a CTC stage asks for


def encode(sample: dict, clips: dict[str, np.ndarray], tok: Tokenizer, typed: bool = False, reply: bool = False) -> Encoded:
    """Turn a sample into ids and labels; `clips` has the waveform of each part's "audio", (samples,) at 16 kHz.

    typed: every speech part is read as its text instead (the ceiling that the gap is measured against).
    reply: end with the opening of the assistant's turn, for generation.

    Every text part says whether it carries loss. Markup never does, but for an assistant's <|im_end|>; nor do the
    audio tokens. Spaces right before speech are not tokenised: a lone space is a token no pretrained LLM has seen.

    {"parts": [text "hi ", speech of 2 positions, text " you"]}, loss on both texts, gives
        ids     hi  <|audio_bos|>  <|AUDIO|>  <|AUDIO|>  <|audio_eos|>  you            <|endoftext|>
        labels  -   -              -          -          you            <|endoftext|>  -
    """
    ids, target, heard, words, sp = [], [], [], [], tok.special

    def put(tokens: list[int], loss: bool) -> None:
        ids.extend(tokens)
        target.extend([loss] * len(tokens))

    def put_parts(parts: list[dict], numbered: bool) -> None:
        carried = ""                                                  # spaces moved from a text to typed-out speech
        for part, following in zip(parts, [*parts[1:], None]):
            text, carried = carried + part["text"], ""
            if part["role"] == "text":
                kept = text.rstrip(" ") if following and following["role"] == "speech" else text
                carried = text[len(kept):] if typed else ""
                put(tok(kept), part["loss"])
            elif typed:
                put(tok(text), False)
            else:
                heard.append(clips[part["audio"]])
                words.append([i for word in synth.WORD.findall(text.lower()) for i in tok(f" {word}")])
                if numbered:
                    put(tok(f"Audio {len(heard)}: "), False)
                put([sp[AUDIO_BOS]] + [sp[AUDIO]] * audio_positions(len(heard[-1])) + [sp[AUDIO_EOS]], False)
                if numbered:
                    put(tok("\n"), False)

    if sample["parts"]:
        put_parts(sample["parts"], False)
        if not reply:
            put([sp[END]], True)
    else:
        messages = sample["messages"]
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": [synth.text_part(SYSTEM, False)]}, *messages]
        for message in messages:
            put([sp[TURN]] + tok(f"{message['role']}\n"), False)
            put_parts(message["content"], True)
            put([sp[TURN_END]], message["role"] == "assistant")
            put(tok("\n"), False)
        if reply:
            put([sp[TURN]] + tok("assistant\n"), False)
    labels = [i if loss else IGNORE for i, loss in zip(ids[1:], target[1:])] + [IGNORE]
    return Encoded(sample.get("id", ""), ids, labels, heard, words)


def read_encoded(path: Path, number: int, tok: Tokenizer) -> Encoded:
    """Read sample `number` of a shard, verified, as ids, labels and clips."""
    sample, files = synth.read_sample(path, number)
    return encode(sample, {name: synth.decode_flac(data) for name, data in files.items()}, tok)


def train_tokenizer(c: Settings, folder: Path) -> None:
    """Byte-level BPE with Qwen2's word splitting, trained on the first `text` shard; AutoTokenizer opens the folder."""
    path = synth.shard_path(c, "text", "train", 0)
    texts = [SYSTEM, "system\nuser\nassistant\n", "Audio 1: ", *(task["ask"] for task in synth.TASKS.values())]
    for number in range(synth.read_index(path)["count"]):
        sample, _ = synth.read_sample(path, number)
        texts += [part["text"] for parts in synth.parts_of(sample) for part in parts]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=c.model.vocab, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    hf = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=TURN_END, pad_token=END,
                                 extra_special_tokens=[TURN, AUDIO_BOS, AUDIO, AUDIO_EOS])
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    hf.save_pretrained(aside)
    try:
        aside.rename(folder)
    except OSError:                                                   # another rank was faster
        shutil.rmtree(aside)


def load_tokenizer(c: Settings) -> Tokenizer:
    """The tokenizer of the given weights, or, from scratch, data/tokenizer, trained when it is first needed."""
    if source := c.model["from"] or c.model.llm:
        hf = AutoTokenizer.from_pretrained(find_checkpoint(source))
        hf.add_special_tokens({"extra_special_tokens": [AUDIO_BOS, AUDIO, AUDIO_EOS]}, replace_extra_special_tokens=False)
        return Tokenizer(hf)
    folder = Path(c.data) / "tokenizer"
    if not folder.is_dir():
        train_tokenizer(c, folder)
    tok = open_tokenizer(folder)
    if len(tok.hf) > c.model.vocab:
        raise UserError(f"{folder} has {len(tok.hf)} tokens, more than model.vocab={c.model.vocab}; raise that, or remove the "
                        "folder so that it is trained again.")
    return tok


def open_tokenizer(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; remove the folder and start again.")
    return Tokenizer(AutoTokenizer.from_pretrained(folder))


# --------------------------------------------------------------------------------------------------
# 2. Packing: lanes of samples
#
# A step trains on G packs, one from each of G lanes. A lane is an endless stream of packs that depends on
# (seed, stage, lane) alone; rank r serves the lanes r, r + world, …. So batches are the same for any number
# of ranks and reading processes, and a run resumes from one small cursor per lane.
# --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Pack:
    """Whole documents end to end, bounded by `cu_seqlens`: as many as fit into pack_length positions, and no padding."""
    ids: torch.Tensor             # (P,) int64, P = pack_length - waste
    labels: torch.Tensor          # (P,) int64
    position_ids: torch.Tensor    # (P,) int64, from 0 in every document
    cu_seqlens: list[int]         # documents + 1
    audio: torch.Tensor           # (samples,) float32, the clips end to end
    clip_samples: list[int]       # samples of each clip
    words: list[list[int]] | None # in a CTC stage the tokens of each clip's words, which are its targets
    names: list[str]              # samples packed
    supervised: int               # targets: labels that are not IGNORE, or words
    waste: int                    # positions left over, since the next document did not fit
    skipped: list[str]            # samples longer than a pack, left out since the pack before
    cursor: dict                  # the lane's state after this pack


class Recipe:
    """The shards of one recipe as one long list per epoch: shards shuffled, samples shuffled inside each."""

    def __init__(self, c: Settings, name: str, salt: str):
        self.paths = sorted((Path(c.data) / name).glob("train-*.tar"))[:c.synth.shards.get(name, 0)]
        self.name, self.salt = name, f"{c.seed} {salt} {name}"
        self.counts = [synth.read_index(path)["count"] for path in self.paths]
        self.total, self.epoch, self.orders = sum(self.counts), None, {}
        if not self.total:
            raise UserError(f"{c.data} has no sample of the recipe {name}, which the stage's mix asks for; "
                            "set its share to 0 or give a corpus that has dialogues.")

    def locate(self, epoch: int, index: int) -> tuple[Path, int]:
        """Shard and number of the index-th sample of an epoch."""
        if epoch != self.epoch:
            self.shards = list(range(len(self.paths)))
            random.Random(f"{self.salt} {epoch}").shuffle(self.shards)
            self.ends = np.cumsum([self.counts[s] for s in self.shards]).tolist()
            self.epoch, self.orders = epoch, {}
        at = bisect_right(self.ends, index)
        shard = self.shards[at]
        if shard not in self.orders:
            self.orders = {shard: list(range(self.counts[shard]))}    # one order is kept: lanes read on in one shard
            random.Random(f"{self.salt} {epoch} {shard}").shuffle(self.orders[shard])
        return self.paths[shard], self.orders[shard][index - (self.ends[at] - self.counts[shard])]


class Lane:
    """An endless stream of packs. The next document comes from the recipe that is furthest below its share of positions.

    Its cursor {"pack": 7, "recipes": {"text": {"epoch": 0, "index": 12, "piece": 0, "fed": 3402}, …}} says all
    that is needed to go on.
    """

    def __init__(self, c: Settings, tok: Tokenizer, stage: str, lane: int, cursor: dict | None):
        settings = c.train.stages[stage]
        self.mix = {name: share for name, share in settings.mix.items() if share > 0}
        self.recipes = {name: Recipe(c, name, stage) for name in self.mix}
        self.tok, self.lane, self.lanes, self.length, self.ctc = tok, lane, settings.packs, c.train.pack_length, settings.ctc
        self.cursor = cursor or {"pack": 0, "recipes": {n: {"epoch": 0, "index": 0, "piece": 0, "fed": 0} for n in self.mix}}
        self.open: dict[str, Encoded] = {}                            # the document each recipe stands at
        self.skipped: list[str] = []

    def hungriest(self) -> str:
        fed = {name: self.cursor["recipes"][name]["fed"] for name in self.mix}
        total, share = sum(fed.values()), sum(self.mix.values())
        return max(self.mix, key=lambda name: self.mix[name] / share * total - fed[name])

    def advance(self, name: str) -> None:
        """Move a recipe's cursor to the lane's next sample, into the next epoch after the last."""
        place, recipe = self.cursor["recipes"][name], self.recipes[name]
        place["index"], place["piece"] = place["index"] + 1, 0
        if place["index"] * self.lanes + self.lane % recipe.total >= recipe.total:
            place["epoch"], place["index"] = place["epoch"] + 1, 0
        self.open.pop(name)

    def document(self, name: str) -> Encoded:
        """The document a recipe stands at; of a text longer than a pack the next piece. Longer others are skipped."""
        place, recipe, skipped = self.cursor["recipes"][name], self.recipes[name], 0
        while True:
            if name not in self.open:
                at = place["index"] * self.lanes + self.lane % recipe.total
                self.open[name] = read_encoded(*recipe.locate(place["epoch"], at), self.tok)
            whole = self.open[name]
            if len(whole.ids) <= self.length:
                return whole
            if name == "text":
                cut = slice(place["piece"] * self.length, (place["piece"] + 1) * self.length)
                return Encoded(whole.name, whole.ids[cut], whole.labels[cut], [], [])
            self.skipped.append(whole.name)
            self.advance(name)
            skipped += 1
            if skipped > recipe.total:
                raise UserError(f"Every sample of the recipe {name} is longer than a pack ({self.length} positions, "
                                f"{whole.name} has {len(whole.ids)}); raise train.pack_length.")

    def consume(self, name: str, used: int) -> None:
        """Count a document's positions and move on, by a piece or by a sample."""
        place = self.cursor["recipes"][name]
        place["fed"] += used
        place["piece"] += 1
        if place["piece"] * self.length >= len(self.open[name].ids) or used < self.length:
            self.advance(name)

    def pack(self) -> Pack:
        """Fill a pack with documents while they fit; the first that does not opens the next pack."""
        documents, used = [], 0
        while used < self.length:
            name = self.hungriest()
            document = self.document(name)
            if used + len(document.ids) > self.length:
                break
            documents.append(document)
            used += len(document.ids)
            self.consume(name, len(document.ids))
        skipped, self.skipped = self.skipped, []
        self.cursor["pack"] += 1
        return packed(documents, self.ctc, self.length - used, skipped, self.cursor)


def packed(documents: list[Encoded], ctc: bool, waste: int, skipped: list[str], cursor: dict) -> Pack:
    """Join documents end to end."""
    lengths, clips = [len(d.ids) for d in documents], [clip for d in documents for clip in d.clips]
    labels = torch.tensor([label for d in documents for label in d.labels])
    words = [ids for d in documents for ids in d.words] if ctc else None
    targets = sum(map(len, words)) if ctc else int((labels != IGNORE).sum())
    return Pack(torch.tensor([i for d in documents for i in d.ids]), labels, torch.cat([torch.arange(n) for n in lengths]),
                [0, *np.cumsum(lengths).tolist()], torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *clips])),
                [len(clip) for clip in clips], words, [d.name for d in documents], targets, waste, skipped, json.loads(json.dumps(cursor)))


class Lanes(IterableDataset):
    """The packs of some lanes, in turn, for a reading process. An error comes through as the item itself."""

    def __init__(self, c: Settings, tok: Tokenizer, stage: str, lanes: list[int], cursors: dict[int, dict]):
        self.arguments = c, tok.hf, stage, lanes, cursors

    def __iter__(self) -> Iterator[Pack | UserError]:
        c, hf, stage, lanes, cursors = self.arguments
        if get_worker_info():
            torch.set_num_threads(1)
            os.setpgrp()                                              # torchrun's SIGTERM goes to whole process groups, but
                                                                      # the rank reads on until all ranks stop at one step
        try:
            served = [Lane(c, Tokenizer(hf), stage, lane, cursors.get(lane)) for lane in lanes]
            while True:
                for lane in served:
                    yield lane.pack()
        except UserError as error:
            yield error


class Feed:
    """One rank's packs, step by step: `workers` reading processes, each with its own share of the rank's lanes."""

    def __init__(self, c: Settings, tok: Tokenizer, stage: str, lanes: list[int], cursors: dict[int, dict], pin: bool):
        self.lanes, self.cursors, workers = lanes, dict(cursors), min(c.train.workers, len(lanes))
        shares = [lanes[w::workers] for w in range(workers)] if workers else [lanes]
        options = {"num_workers": 1, "prefetch_factor": 2 * len(shares[0]), "multiprocessing_context": fork_server(),
                   "pin_memory": pin} if workers else {}
        self.loaders = [iter(DataLoader(Lanes(c, tok, stage, share, cursors), batch_size=None, **options)) for share in shares]

    def step(self) -> list[Pack]:
        """The rank's next packs in the order of its lanes. UserError of a reading process is raised here."""
        packs = [next(self.loaders[i % len(self.loaders)], None) for i in range(len(self.lanes))]
        for error in (p for p in packs if isinstance(p, UserError)):
            raise error
        self.cursors |= {lane: p.cursor for lane, p in zip(self.lanes, packs)}
        return packs


def fork_server():
    """Reading processes come from a server that was started before torch's threads: forking after them can hang."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inserter"])
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)           # inherited by the server: it outlives torchrun's signal
    forkserver.ensure_running()
    signal.signal(signal.SIGTERM, handler)
    return context


def batch_of(packs: list[Pack]) -> dict:
    """Join packs end to end into the model's arguments: documents stay apart by cu_seqlens."""
    starts = [0, *np.cumsum([len(p.ids) for p in packs]).tolist()]
    bounds = [start + b for p, start in zip(packs, starts) for b in p.cu_seqlens[:-1]]
    bounds += starts[-1:] * (64 - len(bounds) % 64)                   # empty documents: few shapes, so few compilations
    words = {} if packs[0].words is None else {"words": [ids for p in packs for ids in p.words]}
    return words | {"ids": torch.cat([p.ids for p in packs]), "labels": torch.cat([p.labels for p in packs]),
            "position_ids": torch.cat([p.position_ids for p in packs]), "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
            "waveforms": [clip for p in packs for clip in p.audio.split(p.clip_samples)]}


# -----------------------------------------------------------------------------------------------------------
# 3. Features: waveforms to log-mel frames
#
# Whisper pads every clip with zeros to 30 s and then computes 3000 frames. All frames past the clip's end are
# the same known silence, so only N = ceil(samples / 160) frames are computed, and two more that convolutions
# see beyond the end. One buffer holds all clips at multiples of the hop: a single FFT serves all of them.
# -----------------------------------------------------------------------------------------------------------

HOP = 160                       # samples between frames: 10 ms
WINDOW = 400                    # samples under one frame: 25 ms
LONGEST = 30 * RATE             # samples of the longest clip that Whisper's positions cover
MAX_FRAMES = LONGEST // HOP     # 3000
EDGE = WINDOW // 2              # frame t is centred on sample 160 t: frame 0 starts 200 before the clip


def audio_positions(samples):
    """Positions that a clip of so many samples takes in the LLM's sequence: one per 40 ms.

    >>> [audio_positions(n) for n in (160, 320, 321, 32000, 32161, 480000)]
    [0, 0, 1, 50, 50, 750]
    """
    return ((math.ceil(samples / HOP) - 1) // 2 + 1) // 2


def ragged(lengths):
    """Which piece each row of a packed tensor belongs to, and its place within the piece: (sum,) int64 each.

    >>> ragged([2, 0, 3])
    (tensor([0, 0, 2, 2, 2]), tensor([0, 1, 0, 1, 2]))
    """
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return owner, torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]


def context_frames(samples):
    """Frames kept of a clip: its own N and two of context for the convolutions, never past Whisper's 3000."""
    return min(math.ceil(samples / HOP) + 2, MAX_FRAMES)


@lru_cache
def mel_constants(n_mels, device):
    """WhisperFeatureExtractor's Hann window (400,) and Slaney mel filters (402, n_mels), each row twice: the
    same weight for the squares of a frequency's real and imaginary part, which stand side by side."""
    filters = mel_filter_bank(EDGE + 1, n_mels, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    filters = torch.from_numpy(filters).float().repeat_interleave(2, 0)
    return torch.hann_window(WINDOW, device=device), filters.to(device)


def place_clips(waveforms, device):
    """All clips in one buffer, each with its edges mirrored as Whisper's STFT does.

    A clip's slot is |200 samples mirrored | clip | zeros| and 160 (F + 3) samples long: frames that straddle
    two slots are computed and dropped, three per clip. Right of the clip lie the zeros of Whisper's padding;
    the mirror at 480000 samples shows only to a clip that reaches there.
    -> buffer (samples,), slots [first frame of each clip's slot]
    """
    zeros = waveforms[0].new_zeros(WINDOW + 5 * HOP)
    pieces, starts, end = [zeros[:EDGE]], [], 0
    for w in waveforms:
        starts.append(end)
        size = HOP * (context_frames(len(w)) + 3)
        pieces += [w, zeros[:size - len(w)]]
        end += size
    pieces.append(zeros[:EDGE])
    buffer = torch.cat(pieces).to(device, torch.float32, non_blocking=True)
    mirrors = [(EDGE + s, -1) for s in starts]
    mirrors += [(EDGE + s + LONGEST - 1, 1) for s, w in zip(starts, waveforms) if len(w) > LONGEST - WINDOW]
    centre, side = torch.tensor(mirrors).T[:, :, None].to(device, non_blocking=True)
    reach = side * torch.arange(1, EDGE + 1, device=device)                      # (mirrors, 200)
    buffer[centre + reach] = buffer[centre - reach]
    return buffer, [s // HOP for s in starts]


def log_mel(waveforms, n_mels, device=None):
    """Log-mel frames of 16 kHz clips, packed; equal to WhisperFeatureExtractor's first F frames of each clip.

    waveforms: list of 1-D float32 tensors, 1 to 480000 samples each. They may lie on the CPU while `device`
    is a GPU: they travel in one copy.
    -> (sum of F, n_mels) float32 on `device` (theirs by default), F = context_frames(samples)
    """
    device = torch.device(device or waveforms[0].device)
    buffer, slots = place_clips(waveforms, device)
    window, filters = mel_constants(n_mels, device)
    owner, t = (x.to(device, non_blocking=True) for x in ragged([context_frames(len(w)) for w in waveforms]))
    slots = torch.tensor(slots).to(device, non_blocking=True)
    with torch.autocast(device.type, enabled=False):                       # bfloat16 costs two digits here
        spectrum = torch.fft.rfft(buffer.unfold(0, WINDOW, HOP) * window)        # (frames, 201) complex
        power = torch.view_as_real(spectrum).square().flatten(1)                 # (frames, 402)
        mel = (power @ filters).clamp_(min=1e-10).log10_()[slots[owner] + t]      # (sum of F, n_mels)
    peak = mel.new_full((len(waveforms),), -10.0).scatter_reduce(0, owner, mel.amax(1), "amax")
    return (torch.maximum(mel, peak[owner, None] - 8) + 4) / 4                    # each clip's own 80 dB


# -----------------------------------------------------------------------------------------------------------
# 4. Attention that stays inside a document
#
# `plain_attention` is the meaning; whatever is faster must compute exactly this. It sorts documents into
# buckets of similar length, pads inside a bucket only (to its longest document, so at most twofold) and calls
# torch's SDPA once per bucket. `tiles`, the index work, depends on cu_seqlens alone: all layers share it.
# `fused_attention`, the kernel of section 12, takes its place on a GPU.
# -----------------------------------------------------------------------------------------------------------

def make_tiles(cu_seqlens, causal, device):
    """Index work of plain_attention for a pack: where the buckets' padded rows come from, and the way back.

    cu_seqlens [0, 3, 3, 10, 12] has documents of 3, 7 and 2 positions (the empty one is nowhere): buckets of
    lengths (2, 4], (4, 8] and (1, 2], hence blocks of 1 x 3, 1 x 7 and 1 x 2 rows.
    -> rows (rows of all blocks,), blocks [(n, L, key mask (n, 1, 1, L) or None)], back (T,): each position's row
    """
    cu = cu_seqlens.cpu().long()
    starts, lengths, buckets = cu[:-1], cu.diff(), {}
    for document, length in enumerate(lengths.tolist()):
        if length:
            buckets.setdefault((length - 1).bit_length(), []).append(document)
    sources, blocks, back = [], [], torch.empty(int(cu[-1]), dtype=torch.int64)
    for documents in buckets.values():
        start, length = starts[documents, None], lengths[documents, None]        # (n, 1)
        column = torch.arange(int(length.max()))                                 # (L,)
        rows, real = start + torch.minimum(column, length - 1), column < length  # (n, L), padded by real rows
        back[rows[real]] = sum(map(len, sources)) + real.flatten().nonzero()[:, 0]
        mask = None if causal or real.all() else real[:, None, None].to(device)   # causal: padding is last, where no query looks
        sources.append(rows.flatten())
        blocks.append((*rows.shape, mask))
    return torch.cat(sources).to(device), blocks, back.to(device)


def plain_attention(q, k, v, cu_seqlens, causal, tiles=None):
    """Softmax attention of every position over its own document only (the positions before it, if `causal`).

    q: (T, Hq, D); k, v: (T, Hkv, D), query head h reads key-value head h // (Hq / Hkv); cu_seqlens:
    (documents + 1,) int32 from 0 to T, empty documents allowed; tiles: make_tiles' result, shared by layers.
    -> (T, Hq, D)
    """
    rows, blocks, back = tiles or make_tiles(cu_seqlens, causal, q.device)
    outputs, sizes = [], [n * length for n, length, _ in blocks]
    parts = (x.index_select(0, rows).split(sizes) for x in (q, k, v))
    for (n, length, mask), *qkv in zip(blocks, *parts):
        qkv = (x.unflatten(0, (n, length)).transpose(1, 2) for x in qkv)         # each n H L D
        out = F.scaled_dot_product_attention(*qkv, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out.transpose(1, 2).flatten(0, 1))                        # (n L, Hq, D)
    return torch.cat(outputs).index_select(0, back)


def fused_here(device, head):
    """Whether heads of this size are attended by `fused_attention` (section 12): on a GPU, or by Triton's interpreter."""
    return triton is not None and head in HEAD_SIZES and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def attention(q, k, v, cu_seqlens, causal, tiles=None):
    """The one attention of encoder and LLM; arguments and result are those of `plain_attention`."""
    return (fused_attention if fused_here(q.device, q.shape[2]) else plain_attention)(q, k, v, cu_seqlens, causal, tiles)


def packed_attend(cu_seqlens, causal, x, head):
    """What a block calls as attend(q, k, v, layer) for packed x (T, d) and heads of size `head`: layers share the tiles."""
    here = cu_seqlens.to(x.device, non_blocking=True)
    tiles = fused_tiles(here, causal, len(x)) if fused_here(x.device, head) else make_tiles(cu_seqlens, causal, x.device)
    return lambda q, k, v, layer: attention(q, k, v, here, causal, tiles)


# -----------------------------------------------------------------------------------------------------------
# 5. The model
#
# Modules are named so that state_dict() is a Qwen2-Audio checkpoint, name by name: audio_tower (Encoder),
# multi_modal_projector (Adapter), language_model (LLM). Blocks get attention as a function, attend(q, k, v,
# layer): packed for training, with a cache for generation; so each block is written once.
# -----------------------------------------------------------------------------------------------------------

def computed_again(function, *args):
    """function(*args), whose intermediate tensors are dropped and computed again in the backward pass.

    Nothing here is random (no dropout), so the random state, for which one would wait for a GPU, is let be.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def run_blocks(blocks, x, recompute, *args):
    """Blocks in turn; with `recompute` each keeps only its input, and the backward pass computes it again."""
    for block in blocks:
        again = recompute and torch.is_grad_enabled()
        x = computed_again(block, x, *args) if again else block(x, *args)
    return x


class EncoderBlock(nn.Module):
    """Whisper's block: attention, then GELU, each behind its layer norm. Keys carry no bias."""

    def __init__(self, c, layer):
        super().__init__()
        d, self.layer, self.heads = c.d_model, layer, c.encoder_attention_heads
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(d, d, bias=name != "k_proj") for name in names})
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.fc1, self.fc2 = nn.Linear(d, c.encoder_ffn_dim), nn.Linear(c.encoder_ffn_dim, d)

    def forward(self, x, attend):
        a, h = self.self_attn, self.self_attn_layer_norm(x)                       # (T, d)
        q, k, v = (linear(h).unflatten(1, (self.heads, -1)) for linear in (a.q_proj, a.k_proj, a.v_proj))
        x = x + a.out_proj(attend(q, k, v, self.layer).flatten(1))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


def convolve(x, conv, stride):
    """Convolution of width 3 over packed rows (T, in) without padding -> ((T - 3) // stride + 1, out).

    Three shifted views joined and one matrix product: as fast as conv1d, and no transposed copies.
    """
    taps = torch.cat([x[i:len(x) - 2 + i:stride] for i in range(3)], 1)           # (rows, 3 in)
    return F.linear(taps, conv.weight.transpose(1, 2).flatten(1), conv.bias)


class Encoder(nn.Module):
    """Whisper's encoder on packed clips, pooled by 2 at its end: one vector per 40 ms of speech."""

    def __init__(self, c):
        super().__init__()
        self.config, self.head = c, c.d_model // c.encoder_attention_heads
        self.conv1, self.conv2 = nn.Conv1d(c.num_mel_bins, c.d_model, 3), nn.Conv1d(c.d_model, c.d_model, 3)
        self.embed_positions = nn.Embedding(c.max_source_positions, c.d_model)
        self.embed_positions.requires_grad_(False)                                # sinusoids, never trained
        self.layers = nn.ModuleList(EncoderBlock(c, i) for i in range(c.encoder_layers))
        self.layer_norm = nn.LayerNorm(c.d_model)

    def convolutions(self, mel, samples):
        """Both convolutions on packed frames: (sum of F, n_mels) -> (sum of L, d). No clip sees another.

        Each clip gets a slot of even length P >= N + 3:

            slot      0  m0 m1 m2 m3 … m(F-1) 0    zeros: the padding of the first convolution
            c1        ?  c0 c1 c2 c3 …             c(t) is centred on frame t; ? belongs to the slot before
            c2          └ ?c0c1 ┘ └ c1c2c3 ┘ …     ? has to be the second's padding: it is set to zero
        """
        frames = [context_frames(n) for n in samples]
        slot = torch.tensor([(math.ceil(n / HOP) + 4) // 2 * 2 for n in samples])            # P
        start, (owner, t) = slot.cumsum(0) - slot, ragged(frames)
        rows = (start[owner] + 1 + t).to(mel.device, non_blocking=True)
        x = mel.new_zeros(int(slot.sum()) + 2, mel.shape[1]).index_copy(0, rows, mel)
        x = F.gelu(convolve(x, self.conv1, 1))                                    # (sum of P, d)
        x = F.pad(x, (0, 0, 1, 1)).index_fill(0, start.to(mel.device, non_blocking=True), 0)
        owner, t = ragged(self.lengths(samples))
        return F.gelu(convolve(x, self.conv2, 2))[(start[owner] // 2 + t).to(mel.device, non_blocking=True)]

    @staticmethod
    def lengths(samples):
        """Convolution outputs L of each clip."""
        return [(math.ceil(n / HOP) - 1) // 2 + 1 for n in samples]

    def forward(self, waveforms, recompute):
        """List of 1-D waveforms -> (sum of audio_positions, d), clips in order."""
        device, samples = self.conv1.weight.device, [len(w) for w in waveforms]
        x = self.convolutions(log_mel(waveforms, self.config.num_mel_bins, device), samples)  # (sum of L, d)
        length = torch.tensor(self.lengths(samples))
        x = x + self.embed_positions(ragged(length)[1].to(device, non_blocking=True))
        cu_seqlens, x = F.pad(length.cumsum(0), (1, 0)).int(), F.pad(x, (0, 0, 0, -len(x) % 16))
        ends = F.pad(cu_seqlens, (0, 1), value=len(x))                         # a clip nobody hears rounds up: few shapes
        x = run_blocks(self.layers, x, recompute, packed_attend(ends, False, x, self.head))
        owner, t = ragged(length // 2)                                         # an odd last output is dropped
        first = (cu_seqlens[owner] + 2 * t).to(device, non_blocking=True)
        return self.layer_norm((x.index_select(0, first) + x.index_select(0, first + 1)) / 2)


class Adapter(nn.Module):
    """From the encoder's width to the LLM's."""

    def __init__(self, c):
        super().__init__()
        self.linear = nn.Linear(c.audio_config.d_model, c.text_config.hidden_size)

    def forward(self, x):
        return self.linear(x)


def rope_speed(c, head, device=None):
    """Radians by which each pair of a head turns from one position to the next: (head / 2,)."""
    # transformers' own rounding: a unit in the last place of a speed is 1e-4 radians at position 1000
    return 1 / c.rope_parameters["rope_theta"] ** (torch.arange(0, head, 2, device=device).float() / head)


def rotate(x, rope):
    """Rotary positions: pairs (i, i + D/2) of x (T, H, D) turned by the angles of cosine and sine `rope`."""
    cos, sin = rope                                                               # (T, 1, D/2) float32
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class LLMBlock(nn.Module):
    """Qwen2's block: grouped-query attention with rotary positions, then SwiGLU, each behind its RMS norm."""

    def __init__(self, c, layer):
        super().__init__()
        d, self.layer = c.hidden_size, layer
        self.head = getattr(c, "head_dim", None) or d // c.num_attention_heads
        heads, kv = c.num_attention_heads * self.head, c.num_key_value_heads * self.head
        inputs = {"q_proj": nn.Linear(d, heads), "k_proj": nn.Linear(d, kv), "v_proj": nn.Linear(d, kv)}
        self.self_attn = nn.ModuleDict({**inputs, "o_proj": nn.Linear(heads, d, bias=False)})
        shapes = {"gate_proj": (d, c.intermediate_size), "up_proj": (d, c.intermediate_size),
                  "down_proj": (c.intermediate_size, d)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.input_layernorm = nn.RMSNorm(d, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(d, c.rms_norm_eps)

    def forward(self, x, rope, attend):
        a, m, h = self.self_attn, self.mlp, self.input_layernorm(x)               # (T, d)
        q, k, v = (linear(h).unflatten(1, (-1, self.head)) for linear in (a.q_proj, a.k_proj, a.v_proj))
        x = x + a.o_proj(attend(rotate(q, rope), rotate(k, rope), v, self.layer).flatten(1))
        h = self.post_attention_layernorm(x)
        return x + m.down_proj(F.silu(m.gate_proj(h)) * m.up_proj(h))


class LLM(nn.Module):
    """Qwen2. Its head is applied by whoever needs logits: the loss at a few positions, generation at one."""

    def __init__(self, c):
        super().__init__()
        self.config, self.head = c, getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        layers = nn.ModuleList(LLMBlock(c, i) for i in range(c.num_hidden_layers))
        table, norm = nn.Embedding(c.vocab_size, c.hidden_size), nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.model = nn.ModuleDict({"embed_tokens": table, "layers": layers, "norm": norm})
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, x, position_ids, attend, recompute):
        """Embeddings (T, d) -> hidden states (T, d), ready for lm_head."""
        angle = position_ids[:, None, None].float() * rope_speed(self.config, self.head, x.device)     # (T, 1, D/2)
        x = run_blocks(self.model.layers, x, recompute, (angle.cos(), angle.sin()), attend)
        return self.model.norm(x)


def chunked_losses(hidden, weight, targets, chunk):
    """Nats of each target under softmax(hidden @ weight.T): (T', d), (V, d), (T',) -> (T',) float32.

    Logits exist for `chunk` positions at a time, in the forward pass and again in the backward pass: for 8192
    positions and 151,936 tokens at once they would take 5 GB in float32.
    """
    def losses(h, t):
        return F.cross_entropy(F.linear(h, weight).float(), t, reduction="none")
    parts = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([computed_again(losses, h, t) for h, t in parts])


class InSerter(nn.Module):
    """Encoder, Adapter and LLM over one packed sequence. `config` is a transformers Qwen2AudioConfig.

    Ids, labels, cu_seqlens and waveforms may lie on the CPU while the model is on a GPU; then everything that
    has to be counted is counted there, and the GPU is never waited for.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpoint_blocks = config, False
        self.audio_tower = Encoder(config.audio_config)
        self.multi_modal_projector = Adapter(config)
        self.language_model = LLM(config.text_config)
        self.tie()

    def tie(self):
        """One matrix as embedding and head, where the config says so."""
        if self.config.text_config.tie_word_embeddings:
            self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight

    def embed(self, ids, waveforms):
        """Embeddings of a pack: ids (T,), each <|AUDIO|> replaced in order by one vector heard -> (T, d)."""
        table = self.language_model.model.embed_tokens
        count = sum(audio_positions(len(w)) for w in waveforms)
        slots = ids == self.config.audio_token_index
        if ids.is_cuda:                     # told late, by the device, but without waiting for it
            torch._assert_async(slots.sum() == count, "the ids' <|AUDIO|> positions do not match the clips")
        elif (found := int(slots.sum())) != count:
            raise ValueError(f"The ids hold {found} <|AUDIO|> positions, but the {len(waveforms)} clips "
                             f"give {count}; count them with audio_positions(samples).")
        x = table(ids.to(table.weight.device, non_blocking=True))
        if waveforms:
            slots = torch.nonzero_static(slots, size=count)[:, 0].to(x.device, non_blocking=True)
            return x.index_copy(0, slots, self.hear(waveforms).to(x.dtype))
        if torch.is_grad_enabled():         # DDP hangs where a parameter is missing from one rank's graph
            x = x + 0 * self.hear([torch.zeros(4 * HOP)]).sum()
        return x

    def hear(self, waveforms):
        """Waveforms -> (sum of audio_positions, d) in the LLM's space; UserError if too short or long."""
        for seconds in (len(w) / RATE for w in waveforms if not audio_positions(len(w)) or len(w) > LONGEST):
            raise UserError(f"A clip of {seconds:.3f} s cannot be heard: clips last from 0.021 to 30 s; "
                            "drop it, or cut it into shorter ones.")
        return self.multi_modal_projector(self.audio_tower(waveforms, self.checkpoint_blocks))

    def hidden(self, ids, position_ids, cu_seqlens, waveforms):
        """Hidden states of packed documents, ready for lm_head.

        ids, position_ids: (T,) int64, positions restart with each document; cu_seqlens: (documents + 1,)
        int32 from 0 to T; waveforms: the clips of the whole pack in order.  -> (T, d)
        """
        x = self.embed(ids, waveforms)
        attend = packed_attend(cu_seqlens, True, x, self.language_model.head)
        return self.language_model(x, position_ids.to(x.device, non_blocking=True), attend, self.checkpoint_blocks)

    def losses(self, ids, labels, position_ids, cu_seqlens, waveforms, chunk):
        """Nats of every supervised position, in order: (number of labels that are not -100,) float32."""
        h = self.hidden(ids, position_ids, cu_seqlens, waveforms)
        kept = (labels != -100).nonzero()[:, 0]
        targets, kept = (x.to(h.device, non_blocking=True) for x in (labels[kept], kept))
        return chunked_losses(h.index_select(0, kept), self.language_model.lm_head.weight, targets, chunk)

    def word_loss(self, waveforms, words):
        """Nats of each clip's words (lists of tokens) by CTC (Graves et al. 2006), summed; <|AUDIO|> stands for the blank.

        Encoder, adapter and the LLM without its blocks say, vector by vector, which word they hear, so that a word heard comes
        to lie near the same word read. Words without room among the vectors are left out.
        """
        lengths, heard = [audio_positions(len(w)) for w in waveforms], self.language_model.model.norm(self.hear(waveforms))
        logits = self.language_model.lm_head(heard).float().log_softmax(1).split(lengths)
        targets, counts = torch.tensor([i for ids in words for i in ids]), [len(ids) for ids in words]
        logits = nn.utils.rnn.pad_sequence(logits, batch_first=True).transpose(0, 1)        # the cheaper copy
        return F.ctc_loss(logits, targets.to(heard.device), lengths, counts, self.config.audio_token_index, "sum", zero_infinity=True)

    def forward(self, ids, labels, position_ids, cu_seqlens, waveforms, chunk, words=None):
        """Sum of the loss in nats, a float32 scalar. Every parameter takes part, with clips or without.

        labels[t] (T,) int64 is the token that should FOLLOW position t, or -100 where none is asked for; `chunk` positions
        at a time go through the head; the other arguments are those of `hidden`; with `words` the loss is `word_loss` alone.
        """
        return (self.losses(ids, labels, position_ids, cu_seqlens, waveforms, chunk).sum() if words is None
                else self.word_loss(waveforms or [torch.zeros(4 * HOP)], words or [[]]))


# -----------------------------------------------------------------------------------------------------------
# 6. Weights: from nothing, from two checkpoints, from one; and back to disk
#
# A checkpoint is config.json and model.safetensors (or several, with an index) under Qwen2-Audio's names.
# Qwen2-Audio ignores tied embeddings: both matrices are always written, and ours are one again after loading
# if the config asks for it and they are equal. A tied config with two different matrices is read as untied.
# -----------------------------------------------------------------------------------------------------------

REMEDY = "fetch or export the checkpoint again"


def sinusoids(positions, width):
    """Whisper's positions (positions, width): sines, then cosines, of wavelengths from 2 pi to 20000 pi."""
    speed = torch.exp(-math.log(10000) / (width // 2 - 1) * torch.arange(width // 2))
    angle = torch.arange(positions)[:, None] * speed
    return torch.cat([angle.sin(), angle.cos()], 1)


def fresh(name, shape, seed):
    """A parameter's first value, from the seed and its own name alone: other parts never change it.

    Matrices are normal with standard deviation 1 / sqrt(3 inputs); those that write to the residual stream start at
    zero, so that every block is the identity at first and a token's embedding is not drowned; embeddings have
    1 / sqrt(width); norms start as the identity and biases at zero. Three things let an encoder hear sooner: a
    convolution's filters sum to zero, for log-mel frames differ little from each other beside what they share;
    positions are half as loud as Whisper's; its keys start as twice its queries, so that a frame looks at its neighbours.
    """
    if name.endswith("embed_positions.weight"):
        return sinusoids(*shape) / 2
    silent = name.endswith(("bias", "out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight"))
    if silent or len(shape) == 1:
        return torch.zeros(shape) if silent else torch.ones(shape)
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return normal / math.sqrt(shape[1])
    if ".conv" in name:
        return 3 * (normal - normal.mean((1, 2), keepdim=True)) / math.sqrt(math.prod(shape[1:]))
    if name.startswith("audio_tower") and "k_proj" in name:
        return 2 * fresh(name.replace("k_proj", "q_proj"), shape, seed)
    return normal / math.sqrt(3 * math.prod(shape[1:]))


def build(config, tensors, source):
    """InSerter with these tensors (by name) as its float32 weights; UserError says what does not fit."""
    text, audio = config.text_config, config.audio_config
    plain = (text.rope_parameters["rope_type"] == "default" and text.hidden_act == "silu"
             and audio.activation_function == "gelu" and audio.max_source_positions == MAX_FRAMES // 2
             and all(kind == "full_attention" for kind in text.layer_types))
    if not plain:
        raise UserError(f"{source}: its config wants more than Qwen2-Audio's plain layers (default rotary "
                        "positions, full attention, silu, gelu, 1500 audio positions); use another.")
    with torch.device("meta"):
        model = InSerter(config)
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    wrong = [name for name in wanted if name not in tensors or tuple(tensors[name].shape) != wanted[name]]
    if wrong or len(tensors) > len(wanted):
        name = (wrong or sorted(set(tensors) - set(wanted)))[0]
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        raise UserError(f"{source}: its config.json and its weights disagree at {name} (expected "
                        f"{wanted.get(name, 'nothing')}, found {found}); {REMEDY}.")
    model.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    model.tie()
    return model


def random_model(config, seed):
    """(c) InSerter from nothing but sizes: the same weights for the same config and seed, on any machine.

    The LLM's first heads start by looking one, one, two, two, … tokens back, by their biases, which rotary positions turn.
    To copy, a model must know what stood before each token; so it learns to repeat, and to hear, in fewer steps. What the
    adapter says is as long as an embedding, or the LLM's blocks could add little to it.
    """
    with torch.device("meta"):
        model = InSerter(config)
    tensors = {name: fresh(name, tuple(p.shape), seed) for name, p in model.state_dict().items()}
    first, text, head = "language_model.model.layers.0.self_attn", config.text_config, model.language_model.head
    turn = (1 + torch.arange(text.num_attention_heads) // 2)[:, None] * rope_speed(text, head)         # (Hq, D/2)
    tensors[f"{first}.q_proj.bias"] = 4 * torch.cat([turn.cos(), -turn.sin()], 1).flatten()
    tensors[f"{first}.k_proj.bias"] = 4.0 * (torch.arange(text.num_key_value_heads * head) % head < head // 2)
    tensors["multi_modal_projector.linear.weight"] /= math.sqrt(text.hidden_size / 3)
    return build(config, tensors, "random model")


def find_checkpoint(source):
    """Folder of a checkpoint: the folder itself, or the local copy of a model on the Hugging Face hub."""
    if Path(source).is_dir():
        return Path(source)
    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]                # weights and tokenizer, no pickle
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except (OSError, ValueError) as error:        # no network, no such model, or not even a possible name
        raise UserError(f"{source} is not a folder here and could not be had from the Hugging Face hub "
                        f"({type(error).__name__}); check the name, or give the folder of a copy.")


def read_json(path):
    """Content of a JSON file; UserError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({type(error).__name__}); {REMEDY}.")


def read_checkpoint(source, model_type):
    """(config as dict, {name: tensor}, folder) of a checkpoint: one safetensors file, or several."""
    folder = find_checkpoint(source)
    config = read_json(folder / "config.json")
    if config.get("model_type") != model_type:
        raise UserError(f"{folder / 'config.json'} describes a {config.get('model_type')} model where "
                        f"{model_type} is needed; give another folder.")
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
    tensors = {}
    for path in (folder / name for name in files):
        try:
            tensors.update(load_file(path))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is missing or damaged ({type(error).__name__}); {REMEDY}.")
    return config, tensors, folder


def load_model(source):
    """(a) InSerter from a Qwen2-Audio checkpoint: ours, transformers' or the hub's; float32, on the CPU."""
    config, tensors, folder = read_checkpoint(source, "qwen2_audio")
    # transformers 5.17 saves the LLM's names with one "model." too many
    tensors = {name.replace("language_model.model.model.", "language_model.model."): t for name, t in tensors.items()}
    config = Qwen2AudioConfig.from_dict(config)
    head, table = (f"language_model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    if config.text_config.tie_word_embeddings and table in tensors:
        same = torch.equal(tensors.setdefault(head, tensors[table]), tensors[table])
        config.text_config.tie_word_embeddings = same
    return build(config, tensors, folder)


def join_models(whisper, llm, audio_ids, seed):
    """(b) InSerter from a Whisper and a Qwen2 or Qwen2.5 checkpoint; adapter and audio rows are fresh.

    audio_ids: those of <|AUDIO|>, <|audio_bos|>, <|audio_eos|>, as the tokenizer gives them once the three
    are added to it as special tokens, in that order: 151646 to 151648 for Qwen2, as in Qwen2-Audio, but
    151665 to 151667 for Qwen2.5, which calls the former <|object_ref_start|> and so on. Their matrices are
    padded (151936 rows in the 0.5B), so the ids fall on rows that no text uses; past the end, rows are added.
    The three rows are drawn with the spread of the others, for nothing ever trained them.
    """
    hears, audio, _ = read_checkpoint(whisper, "whisper")
    reads, text, folder = read_checkpoint(llm, "qwen2")
    names = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins",
             "max_source_positions", "activation_function")
    hears = {name: hears[name] for name in names if name in hears}
    config = Qwen2AudioConfig(audio_config={"model_type": "qwen2_audio_encoder", **hears}, text_config=reads,
                              audio_token_index=audio_ids[0])
    audio = {name.removeprefix("model."): t for name, t in audio.items()}
    tensors = {name.replace("encoder.", "audio_tower.", 1): t for name, t in audio.items() if name.startswith("encoder.")}
    if reads.get("tie_word_embeddings") and "model.embed_tokens.weight" in text:
        text["lm_head.weight"] = text["model.embed_tokens.weight"]
    tensors |= {f"language_model.{name}": t for name, t in text.items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors:
            tensors[name] = with_fresh_rows(tensors[name].float(), audio_ids, name, seed)
            config.text_config.vocab_size = len(tensors[name])
    with torch.device("meta"):
        adapter = Adapter(config).state_dict(prefix="multi_modal_projector.")
    tensors |= {name: fresh(name, tuple(t.shape), seed) for name, t in adapter.items()}
    return build(config, tensors, folder)


def with_fresh_rows(matrix, ids, name, seed):
    """The matrix (V, d), longer if an id lies past its end, with new rows at `ids`, spread like the rest."""
    rows = max(len(matrix), max(ids) + 1)
    matrix = torch.cat([matrix, matrix.new_zeros(rows - len(matrix), matrix.shape[1])])
    matrix[list(ids)] = fresh(name, (len(ids), matrix.shape[1]), seed) * math.sqrt(matrix.shape[1]) * matrix.std()
    return matrix


def save_model(model, folder):
    """Write config.json and weights: transformers' Qwen2AudioForConditionalGeneration opens them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if model.config.text_config.tie_word_embeddings:            # safetensors holds no shared memory
        tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"].clone()
    model.config.architectures = ["Qwen2AudioForConditionalGeneration"]
    model.config.dtype = next(model.parameters()).dtype
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -----------------------------------------------------------------------------------------------------------
# 7. Generation
#
# Prompts of any lengths are read once, packed like training documents; their keys and values go to a padded
# cache (B, Hkv, longest, D), the one padded tensor here. Then every step feeds one token per prompt. Query
# heads that share a key-value head stand as rows of one small query, so keys are never repeated.
# -----------------------------------------------------------------------------------------------------------

class Cache:
    """Keys and values of B sequences, a pair (B, Hkv, longest, D) per layer, and how long each one is."""

    def __init__(self, lengths, longest):
        self.lengths, self.longest, self.layers = lengths, longest, []            # lengths: (B,) int64

    def store(self, owner, offset, k, v, layer):
        """Keep k, v (T, Hkv, D) at their sequence and place; the first call of a layer makes room."""
        if layer == len(self.layers):
            shape = (len(self.lengths), k.shape[1], self.longest, k.shape[2])
            self.layers.append([k.new_zeros(shape), v.new_zeros(shape)])
        for kept, new in zip(self.layers[layer], (k, v)):
            kept[owner, :, offset] = new

    def step(self, q, k, v, layer):
        """attend() of one new position per sequence: q (B, Hq, D), k, v (B, Hkv, D) -> (B, Hq, D)."""
        self.store(torch.arange(len(q), device=q.device), self.lengths, k, v, layer)
        keys, values = (kept[:, :, :self.mask.shape[-1]] for kept in self.layers[layer])
        grouped = q.unflatten(1, (k.shape[1], -1))                                # (B, Hkv, Hq/Hkv, D)
        return F.scaled_dot_product_attention(grouped, keys, values, self.mask).flatten(1, 2)

    def look(self, end):
        """Before a step: every sequence sees its own positions and the new one, all of them before `end`."""
        self.mask = (torch.arange(end, device=self.lengths.device) <= self.lengths[:, None])[:, None, None]

    def keep(self, rows):
        """Forget all sequences but these."""
        self.lengths = self.lengths[rows]
        self.layers = [[kept[rows] for kept in pair] for pair in self.layers]


def read_prompts(model, prompts, room):
    """Prefill: one packed pass over all prompts -> (hidden state of each last position (B, d), cache)."""
    device = model.language_model.lm_head.weight.device
    lengths = torch.tensor([len(ids) for ids, _ in prompts])
    owner, offset = (x.to(device) for x in ragged(lengths))
    cache = Cache(lengths.to(device), int(lengths.max()) + room)
    x = model.embed(torch.cat([ids for ids, _ in prompts]), [w for _, clips in prompts for w in clips])
    packed = packed_attend(F.pad(lengths.cumsum(0), (1, 0)).int(), True, x, model.language_model.head)

    def attend(q, k, v, layer):
        cache.store(owner, offset, k, v, layer)
        return packed(q, k, v, layer)
    return model.language_model(x, offset, attend, False)[lengths.cumsum(0).to(device) - 1], cache


@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop_ids, banned_ids):
    """Greedy answers to prompts of any lengths, all at once; the result does not depend on the company.

    prompts: list of (ids (n,) int64 with its <|AUDIO|> positions, n >= 1; list of waveforms); stop_ids end an
    answer and are not part of it; banned_ids are never chosen, nor is <|AUDIO|>.
    -> list of (ids of the answer, truncated: no stop id came within max_new_tokens)
    """
    h, cache = read_prompts(model, prompts, max_new_tokens)
    banned, stops = sorted({*banned_ids, model.config.audio_token_index}), set(stop_ids)
    answers, truncated, present = [[] for _ in prompts], [True] * len(prompts), list(range(len(prompts)))
    longest = max(len(ids) for ids, _ in prompts)
    for new in range(1, max_new_tokens + 1):
        logits = model.language_model.lm_head(h)                                  # (B, V)
        logits[:, banned] = -torch.inf
        tokens, rows = logits.argmax(1), []
        for row, (prompt, token) in enumerate(zip(present, tokens.tolist())):
            truncated[prompt] = truncated[prompt] and token not in stops
            if truncated[prompt]:
                answers[prompt].append(token)
                rows.append(row)
        if not rows or new == max_new_tokens:
            break
        if len(rows) <= 0.75 * len(present):     # the finished leave in groups: leaving copies the cache
            cache.keep(rows)
            tokens, present = tokens[rows], [present[row] for row in rows]
        cache.look(longest + new)
        x = model.language_model.model.embed_tokens(tokens)
        h = model.language_model(x, cache.lengths, cache.step, False)
        cache.lengths = cache.lengths + 1
    return list(zip(answers, truncated))


# --------------------------------------------------------------------------------------------------
# 8. Questions and answers
# --------------------------------------------------------------------------------------------------

def question_sample(question: str | np.ndarray) -> tuple[dict, dict]:
    """A dialogue with one user turn, typed (text) or spoken (waveform at 16 kHz), and its clips."""
    spoken = not isinstance(question, str)
    part = {"role": "speech", "text": "", "audio": "0"} if spoken else synth.text_part(question, False)
    return {"parts": None, "messages": [{"role": "user", "content": [part]}]}, {"0": question}


def complete(model: InSerter, tok: Tokenizer, prompts: list[Encoded], stop: str, max_tokens: int,
             batch: int) -> list[tuple[str, bool]]:
    """Greedy continuations of prompts, in batches of similar length: (text, truncated) each."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    done: dict[int, tuple[str, bool]] = {}
    device = next(model.parameters()).device
    for at in range(0, len(order), batch):
        chosen = order[at:at + batch]
        asked = [(torch.tensor(prompts[i].ids), [torch.from_numpy(clip) for clip in prompts[i].clips]) for i in chosen]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            answers = generate(model, asked, max_tokens, [tok.special[stop]], [tok.special[AUDIO_BOS], tok.special[AUDIO_EOS]])
        done |= {i: (tok.decode(ids), truncated) for i, (ids, truncated) in zip(chosen, answers)}
    return [done[i] for i in range(len(prompts))]


def answer(model: InSerter, tok: Tokenizer, questions: list, max_tokens: int, batch: int) -> list[tuple[str, bool]]:
    """Answer typed (str) and spoken ((samples,) float32 at 16 kHz) questions greedily: (text, truncated) each."""
    return complete(model, tok, [encode(*question_sample(q), tok, reply=True) for q in questions], TURN_END, max_tokens, batch)


def transcribe(model: InSerter, tok: Tokenizer, waveforms: list[np.ndarray], max_tokens: int, batch: int) -> list[str]:
    """What the model hears in clips at 16 kHz, by the prompt of the speech task."""
    parts = [{"role": "speech", "text": "", "audio": "0"}, synth.text_part(synth.TASKS["transcribe"]["ask"], False)]
    prompts = [encode({"parts": parts, "messages": None}, {"0": w}, tok, reply=True) for w in waveforms]
    return [text.strip() for text, _ in complete(model, tok, prompts, END, max_tokens, batch)]


def read_audio(path: str) -> np.ndarray:
    """A sound file of any rate and channel count as (samples,) float32 at 16 kHz. UserError if it cannot be heard."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be read as audio ({error}); give a WAV or FLAC file.") from None
    waveform = synth.to_16k([samples.mean(1)], rate)[0]
    if not audio_positions(len(waveform)) or len(waveform) > LONGEST:
        raise UserError(f"{path} lasts {len(waveform) / RATE:.2f} s; a question lasts from 0.03 to 30 s.")
    if not np.abs(waveform).max() > 1e-4:
        raise UserError(f"{path} is silent; record it again.")
    return waveform


def load_run(c: Settings) -> tuple[InSerter, Tokenizer]:
    """The exported model of run c.run, on this process's device. UserError if there is none."""
    folder = run_folder(c) / "model"
    if not (folder / "config.json").is_file():
        raise UserError(f"There is no model in {folder}; train it first with torchrun inserter.py run={c.run}.")
    return load_model(folder).to(device_here()).eval(), open_tokenizer(folder)


def ask(c: Settings) -> str:
    question = read_audio(c.ask) if Path(c.ask).suffix.lower() in (".wav", ".flac", ".ogg", ".mp3") else c.ask
    model, tok = load_run(c)
    return answer(model, tok, [question], c.bench.max_tokens, 1)[0][0]


# --------------------------------------------------------------------------------------------------
# 9. The gap curve
#
# What the method is about, on dev samples that training never sees: how much worse does the model
# continue a text after *hearing* a segment than after *reading* it? In nats per character, so that any
# corpus and tokenizer can be compared. Obedience stands beside it where the corpus has dialogues.
# --------------------------------------------------------------------------------------------------

def after_speech(sample: dict) -> tuple[dict, int]:
    """The sample with loss on the text after its first speech only, and the characters of that text."""
    seen, characters, kept = False, 0, json.loads(json.dumps(sample))
    for parts in synth.parts_of(kept):
        for part in parts:
            seen = seen or part["role"] == "speech"
            if part["role"] == "text":
                part["loss"] = part["loss"] and seen
                characters += len(part["text"]) if part["loss"] else 0
    return kept, characters


def dev_samples(c: Settings, recipe: str, count: int) -> list[tuple[dict, dict]]:
    """The first dev samples of a recipe with their decoded clips; none where the corpus has none."""
    found = []
    for path in sorted((Path(c.data) / recipe).glob("dev-*.tar")):
        for number in range(min(synth.read_index(path)["count"], count - len(found))):
            sample, files = synth.read_sample(path, number)
            found.append((sample, {name: synth.decode_flac(data) for name, data in files.items()}))
    return found


def nats(c: Settings, model: InSerter, encoded: list[Encoded]) -> float:
    """Sum of the losses of encoded samples, packed in one forward pass."""
    with mixed_precision(c):
        return float(model(**batch_of([packed(encoded, False, 0, [], {})]), chunk=c.train.loss_chunk))


@torch.no_grad()
def evaluate(c: Settings, model: InSerter, tok: Tokenizer) -> dict[str, float]:
    """A point of the gap curve, samples shared out over the ranks. Text loss beside it shows what is forgotten."""
    (rank, world), sums = rank_and_world(), Counter()
    sources = {name: dev_samples(c, name, c.train.eval_samples)[rank::world] for name in ("interleaved", "text", "chat")}
    for at in range(0, c.train.eval_samples, 16):
        continued = ((*after_speech(sample), clips) for sample, clips in sources["interleaved"][at:at + 16])
        if batch := [(sample, n, clips) for sample, n, clips in continued if n]:
            sums["characters"] += sum(n for _, n, _ in batch)
            for way in ("heard", "typed"):
                encoded = [encode(s, clips, tok, typed=way == "typed") for s, _, clips in batch]
                sums[way] += nats(c, model, encoded)
        if texts := sources["text"][at:at + 16]:
            sums["text characters"] += sum(len(p["text"]) for s, _ in texts for parts in synth.parts_of(s) for p in parts)
            sums["text"] += nats(c, model, [encode(s, clips, tok) for s, clips in texts])
    spoken = [(s, clips) for s, clips in sources["chat"] if any(p["role"] == "speech" for p in s["messages"][0]["content"])]
    sums["questions"] += len(spoken)
    for way in ("spoken", "typed out"):
        opening = [encode({"parts": None, "messages": s["messages"][:1]}, clips, tok, typed=way == "typed out", reply=True)
                   for s, clips in spoken]
        replies = complete(model, tok, opening, TURN_END, c.bench.max_tokens, c.bench.batch) if opening else []
        sums[way] += sum(reply == s["messages"][1]["content"][0]["text"] for (reply, _), (s, _) in zip(replies, spoken))
    keys = ("characters", "heard", "typed", "text characters", "text", "questions", "spoken", "typed out")
    total = dict(zip(keys, all_reduce([float(sums[key]) for key in keys])))
    point = {}
    if total["characters"]:
        point = {way: total[way] / total["characters"] for way in ("heard", "typed")}
        point["gap"] = point["heard"] - point["typed"]
    if total["text characters"]:
        point["text"] = total["text"] / total["text characters"]
    if total["questions"]:
        point |= {"obeys spoken": total["spoken"] / total["questions"], "obeys typed": total["typed out"] / total["questions"]}
    return point


def draw_curves(c: Settings) -> None:
    """runs/<run>/curves.png: the training loss, the gap curve and obedience on dev, by step."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (run_folder(c) / "metrics.jsonl").read_text().splitlines()]
    shown, starts = [(r["step"], r.get("eval", r)) for r in rows], {r["stage"]: r["step"] for r in reversed(rows)}
    panels = (("training loss", "nats per target", ("loss",)),
              ("dev: text after speech, heard and typed", "nats per character", ("heard", "typed", "gap", "text")),
              ("dev: answers equal to the reference", "share", ("obeys spoken", "obeys typed")))
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axis, (title, unit, keys) in zip(figure.subplots(1, 3), panels):
        for key in keys:
            points = [(step, values[key]) for step, values in shown if key in values]
            axis.plot(*zip(*points), marker="" if key == "loss" else "o", ms=3, lw=0.8 if key == "loss" else 1.5, label=key)
        for first in starts.values():
            axis.axvline(first, color="0.8", lw=1, zorder=0)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.legend() if any(key in values for key in keys for _, values in shown) else None
    figure.axes[0].set_yscale("log" if any("loss" in values for _, values in shown) else "linear")             # a short run logs none
    for stage, first in starts.items():
        figure.axes[0].text(first, 0.98, stage, transform=figure.axes[0].get_xaxis_transform(), va="top", rotation=90, fontsize=8)
    figure.savefig(run_folder(c) / "curves.png", dpi=110)


# --------------------------------------------------------------------------------------------------
# 10. State: stop anywhere, continue exactly
#
# runs/<run>/state/<step>/ has state.json (where every lane stands) and state.safetensors (weights and the
# optimizer's slots); no pickle. The folder is written aside, flushed and renamed, so it is whole or absent.
# --------------------------------------------------------------------------------------------------

def run_folder(c: Settings) -> Path:
    return Path("runs") / c.run


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


@contextlib.contextmanager
def writing(folder: Path):
    """Context in which a full disk becomes one sentence and what was finished before is kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} could not be written ({error}); make room, then start the same command again: it continues "
                        "from the state before.") from None


def save_state(c: Settings, model: InSerter, optimizers: list, where: dict) -> None:
    """Write the state of a step and remove all but the newest few."""
    folder = run_folder(c) / "state" / f"{where['step']:08d}"
    aside = folder.with_name(f".new.{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with writing(folder):
        aside.mkdir(parents=True)
        tensors = {f"weight.{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters()}
        names = {p: name for name, p in model.named_parameters()}
        for optimizer in optimizers:
            for p, slots in optimizer.state.items():
                tensors |= {f"optim.{slot}.{names[p]}": value.detach().cpu().contiguous() for slot, value in slots.items()}
        save_file(tensors, aside / "state.safetensors")
        digest = sha256((aside / "state.safetensors").read_bytes()).hexdigest()
        (aside / "state.json").write_text(json.dumps(where | {"files": {"state.safetensors": digest}}))
        replace_folder(aside, folder)
    states = sorted(folder.parent.glob("[0-9]*"))
    damaged = [state for state in states if state > folder]           # or this run would have continued from it
    for old in damaged + states[:len(states) - len(damaged) - c.train.keep_states]:
        hidden = old.rename(old.with_name(f".old.{old.name}"))
        shutil.rmtree(hidden)


def load_state(c: Settings) -> tuple[dict, dict[str, torch.Tensor]] | None:
    """The newest whole state: (where, tensors). A damaged one is named and the one before it is taken."""
    folders = sorted((run_folder(c) / "state").glob("[0-9]*"), reverse=True)
    for folder in folders:
        try:
            where = json.loads((folder / "state.json").read_text())
            for name, digest in where["files"].items():
                if sha256((folder / name).read_bytes()).hexdigest() != digest:
                    raise ValueError(f"{name} has another SHA-256")
            return where, load_file(folder / "state.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            say(f"{folder} is damaged ({error}); the state before it is taken.")
    if folders:
        raise UserError(f"No state in {folders[0].parent} is whole; start the run again with fresh=true.")
    return None


def export(c: Settings, model: InSerter, tok: Tokenizer) -> None:
    """runs/<run>/model/: a Qwen2-Audio checkpoint with its tokenizer, replaced whole."""
    folder = run_folder(c) / "model"
    aside = folder.with_name(".new.model")
    shutil.rmtree(aside, ignore_errors=True)
    with writing(folder):
        save_model(model, aside)
        tok.hf.save_pretrained(aside)
        replace_folder(aside, folder)


# --------------------------------------------------------------------------------------------------
# 11. Training
# --------------------------------------------------------------------------------------------------

def rank_and_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device_here() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def mixed_precision(c: Settings):
    """Context in which matrix products are bfloat16, where train.precision wants that here."""
    half = c.train.precision == "bfloat16" or (c.train.precision == "auto" and device_here().type == "cuda")
    return torch.autocast(device_here().type, torch.bfloat16, enabled=half)


def all_reduce(values: list[float]) -> list[float]:
    """Sum over the ranks; float64 keeps counts and checksums exact."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device_here())
    dist.all_reduce(total)
    return total.tolist()


def say(line: str) -> None:
    if rank_and_world()[0] == 0:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def part_of(name: str) -> str:
    return {"audio_tower": "encoder", "multi_modal_projector": "adapter"}.get(name.split(".")[0], "llm")


def make_optimizers(c: Settings, model: InSerter, stage: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices inside the blocks and the adapter if so set; every trained parameter in one group.

    Muon orthogonalises a matrix's update; embeddings, the LM head, convolutions and vectors are AdamW's.
    """
    groups: dict[str, list[dict]] = {"muon": [], "adamw": []}
    for part in ("encoder", "adapter", "llm"):
        named = [(n, p) for n, p in model.named_parameters() if part_of(n) == part and not n.endswith("embed_positions.weight")]
        rate = stage.lr_scale.get(part, 1.0)
        for _, p in named:
            p.requires_grad_(rate > 0)
        matrices = [p for n, p in named if c.train.optimizer == "muon" and p.ndim == 2
                    and "embed" not in n and "lm_head" not in n]
        others = [p for _, p in named if all(p is not m for m in matrices)]
        if rate > 0:
            groups["muon"] += [{"params": matrices, "lr": 0.0, "rate": stage.muon_lr * rate}] if matrices else []
            decayed, plain = [p for p in others if p.ndim > 1], [p for p in others if p.ndim == 1]
            groups["adamw"] += [{"params": ps, "lr": 0.0, "rate": stage.lr * rate, "weight_decay": decay}
                                for ps, decay in ((decayed, c.train.weight_decay), (plain, 0.0)) if ps]
    made = [torch.optim.AdamW(groups["adamw"], betas=tuple(c.train.betas), fused=True)] if groups["adamw"] else []
    if groups["muon"]:
        made.append(torch.optim.Muon(groups["muon"], momentum=c.train.muon_momentum, weight_decay=c.train.weight_decay))
    return made


PEAK_FLOPS = 989e12             # dense bfloat16 operations per second of an H100 or H200, which the MFU in the log refers to


def step_flops(model: InSerter, pack: Pack) -> float:
    """Multiplications and additions that a step needs for a pack's real tokens and frames, forward and twice that backward.

    A matrix takes two per entry and row; attention two products of L x L x width per clip, half of that where causal.
    Nothing that is padded, recomputed or not a matrix product counts.
    """
    a, t = model.config.audio_config, model.config.text_config
    frames, heard = np.array(Encoder.lengths(pack.clip_samples)), sum(map(audio_positions, pack.clip_samples))
    tokens = np.diff(pack.cu_seqlens).astype(float)
    heads, kv = (model.language_model.head * n for n in (t.num_attention_heads, t.num_key_value_heads))
    block = 2 * (4 * a.d_model ** 2 + 2 * a.d_model * a.encoder_ffn_dim) * frames.sum() + 4 * a.d_model * (frames ** 2.0).sum()
    encoder = a.encoder_layers * block + 2 * 3 * a.d_model * (2 * a.num_mel_bins + a.d_model) * frames.sum()
    layer = 2 * t.hidden_size * (2 * heads + 2 * kv + 3 * t.intermediate_size) * tokens.sum() + 2 * heads * (tokens ** 2).sum()
    ends = 2 * t.hidden_size * (a.d_model * heard + t.vocab_size * pack.supervised)              # adapter and LM head
    return 3 * float(encoder + (pack.words is None) * t.num_hidden_layers * layer + ends)


def rate_at(stage: Settings, step: int, progress: float) -> float:
    """Share of the learning rate: linear over `ramp` steps, then a cosine down to `floor` at progress 1."""
    cosine = (1 + math.cos(math.pi * min(progress, 1))) / 2
    return min(1.0, (step + 1) / max(stage.ramp, 1)) * (stage.floor + (1 - stage.floor) * cosine)


@dataclasses.dataclass
class Progress:
    """Where a run stands: `step` counts over all stages, the others inside the stage."""
    stage: str
    step: int = 0
    stage_step: int = 0
    targets: float = 0.0                                              # supervised tokens of the stage so far
    cursors: dict = dataclasses.field(default_factory=dict)

    def share(self, stage: Settings) -> float:
        return self.stage_step / stage.steps if stage.steps is not None else self.targets / stage.tokens


def backward(c: Settings, network, packs: list[Pack], targets: float) -> float:
    """Forward and backward over one rank's packs; gradients become those of the mean over the global batch's targets.

    DDP averages over ranks, so each rank's sum is divided by targets / world. Ranks meet in the last pass only.
    Returns this rank's summed loss in nats.
    """
    world, device, total = rank_and_world()[1], device_here(), torch.zeros(())
    groups = [packs[i:i + c.train.packs_at_once] for i in range(0, len(packs), c.train.packs_at_once)]
    for group in groups:
        apart = isinstance(network, DistributedDataParallel) and group is not groups[-1]
        with network.no_sync() if apart else contextlib.nullcontext():
            with mixed_precision(c):
                loss = network(**batch_of(group), chunk=c.train.loss_chunk)
            (loss * (world / max(targets, 1))).backward()
        total = total.to(device) + loss.detach()                      # read at the end: nothing in between waits for a GPU
    return float(total)


def next_packs(model: InSerter, feed: Feed, stopping: list[int]) -> tuple[list[Pack], dict]:
    """The step's packs, and what the ranks together say of it: targets, a stop signal, errors, a checksum of all ids."""
    sentence, packs, begun = "", [], time.perf_counter()
    try:
        packs = feed.step()
    except UserError as error:
        sentence = str(error)
    waited = time.perf_counter() - begun
    checksum = sum(zlib.crc32(p.ids.numpy().tobytes(), p.cursor["pack"] + (lane << 16)) for lane, p in zip(feed.lanes, packs))
    facts = {"targets": sum(p.supervised for p in packs), "stop": len(stopping), "errors": bool(sentence), "batch": checksum,
             "positions": sum(len(p.ids) for p in packs), "audio samples": sum(sum(p.clip_samples) for p in packs),
             "waste": sum(p.waste for p in packs), "skipped": sum(len(p.skipped) for p in packs), "waited": waited,
             "flops": sum(step_flops(model, p) for p in packs)}
    facts = dict(zip(facts, all_reduce([float(value) for value in facts.values()])))
    if facts["errors"]:
        raise UserError(next(filter(None, gather(sentence))))
    return packs, facts


def gather(thing) -> list:
    """The thing of every rank, on every rank."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def train_stage(c: Settings, model: InSerter, tok: Tokenizer, at: Progress, slots: dict, stopping: list[int]) -> bool:
    """Train one stage from where it stands; True when it is done, False when a signal stopped it (the state is saved)."""
    stage, (rank, world) = c.train.stages[at.stage], rank_and_world()
    optimizers = make_optimizers(c, model, stage)
    restore_slots(model, optimizers, slots)
    lanes = list(range(rank, stage.packs, world))
    feed = Feed(c, tok, at.stage, lanes, {int(lane): cursor for lane, cursor in at.cursors.items()}, device_here().type == "cuda")
    network = DistributedDataParallel(model, find_unused_parameters=stage.ctc) if world > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    log, stop = Log(c, at, stage), False
    while at.share(stage) < 1 and not stop:
        packs, facts = next_packs(model, feed, stopping)
        stop = facts["stop"] > 0                                      # after this step, which the cursors already count
        loss = backward(c, network, packs, facts["targets"])
        norm = nn.utils.clip_grad_norm_(trained, c.train.clip)
        if not math.isfinite(float(norm)):                            # the same on all ranks: gradients are averaged
            raise UserError(f"The loss or its gradient is not finite at step {at.step + 1}; nothing was changed by it. Samples: "
                            f"{', '.join(name for names in gather([n for p in packs for n in p.names]) for name in names)}.")
        rate = rate_at(stage, at.stage_step, at.share(stage))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        at.step, at.stage_step, at.targets = at.step + 1, at.stage_step + 1, at.targets + facts["targets"]

        # From here on nothing is training: log, evaluate (but no gap of an LLM that has read no text yet), save.
        log.step(all_reduce([loss])[0], rate, float(norm), facts)
        done = at.share(stage) >= 1
        if (at.step % c.train.eval_every == 0 or done) and not (stage.warmup and set(stage.mix) == {"tasks"}):
            log.point(evaluate(c, model, tok))
        if at.step % c.train.save_every == 0 or done or stop:
            save_run(c, model, tok, optimizers, at, feed)
    log.bar.close()
    return at.share(stage) >= 1


def save_run(c: Settings, model: InSerter, tok: Tokenizer, optimizers: list, at: Progress, feed: Feed) -> None:
    """State, then export, by rank 0; every lane's cursor comes from the rank that serves it."""
    for cursors in gather(feed.cursors):
        at.cursors |= {str(lane): cursor for lane, cursor in cursors.items()}
    error = ""
    if rank_and_world()[0] == 0:
        try:
            save_state(c, model, optimizers, dataclasses.asdict(at) | {"tokenizer": tok.digest, "settings": c})
            export(c, model, tok)
        except UserError as failed:
            error = str(failed)
    if errors := [e for e in gather(error) if e]:
        raise UserError(errors[0])


def restore_slots(model: InSerter, optimizers: list, slots: dict[str, torch.Tensor]) -> None:
    """Put saved optimizer slots back. AdamW keeps its step on the CPU unless it is fused on a GPU."""
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    for key, value in slots.items():
        _, slot, name = key.split(".", 2)
        if (p := named[name]) in owner:
            owner[p].state[p][slot] = value.to(p.device)


class Log:
    """One line per log step, a progress bar on rank 0, and metrics.jsonl."""

    def __init__(self, c: Settings, at: Progress, stage: Settings):
        self.c, self.at, self.stage, self.rank = c, at, stage, rank_and_world()[0]
        self.bar = tqdm(total=stage.steps or stage.tokens, initial=at.stage_step if stage.steps else int(at.targets), desc=at.stage,
                        disable=True if self.rank else None, leave=False)
        self.since, self.sums = time.perf_counter(), Counter()
        self.first = at.stage_step, self.since

    def write(self, row: dict) -> None:
        if self.rank == 0:
            with writing(path := run_folder(self.c) / "metrics.jsonl"), open(path, "a") as file:
                file.write(json.dumps({"step": self.at.step, "stage": self.at.stage} | row) + "\n")

    def step(self, loss: float, rate: float, norm: float, facts: dict) -> None:
        at, c = self.at, self.c
        self.bar.update(1 if self.stage.steps else int(facts["targets"]))
        self.sums.update(facts)
        self.sums["loss"] += loss
        if at.step % c.train.log_every:
            return
        seconds = time.perf_counter() - self.since
        left = (1 - at.share(self.stage)) / max(at.share(self.stage), 1e-9) * at.stage_step
        eta = left * (time.perf_counter() - self.first[1]) / max(at.stage_step - self.first[0], 1)
        n, world = self.sums, rank_and_world()[1]
        row = {"loss": n["loss"] / max(n["targets"], 1), "lr": rate * self.stage.lr, "grad norm": norm,
               "tokens/s": n["positions"] / seconds, "audio s/s": n["audio samples"] / RATE / seconds, "targets": at.targets,
               "batch": int(n["batch"]), "waste": n["waste"] / (n["positions"] + n["waste"]), "skipped": int(n["skipped"]),
               "wait": n["waited"] / seconds / world}
        if torch.cuda.is_available():
            row |= {"MFU": n["flops"] / seconds / world / PEAK_FLOPS, "peak GB": torch.cuda.max_memory_allocated() / 1e9}
        self.write(row)
        say(f"{at.step:>7} | {row['loss']:.4f} | {row['lr']:.2e} | {norm:.3f} | {row['tokens/s']:,.0f} tokens/s | "
            f"{row['audio s/s']:.1f} audio s/s | waits {row['wait']:.0%} | "
            + (f"MFU {row['MFU']:.1%} | {row['peak GB']:.1f} GB | " if "MFU" in row else "") + f"eta {eta / 60:.1f} min")
        self.since, self.sums = time.perf_counter(), Counter()

    def point(self, point: dict[str, float]) -> None:
        self.write({"eval": point})
        say(f"{self.at.step:>7} | dev " + " | ".join(f"{k} {v:.3f}" for k, v in point.items()))
        self.since = time.perf_counter() if not self.sums else self.since


def stages_of(c: Settings) -> list[str]:
    """The stages to run: those with steps=0 are left out, and, when weights are given, the warm-up stages, which make
    stand-ins for Whisper and Qwen."""
    given = c.model["from"] or c.model.encoder
    return [name for name, stage in c.train.stages.items() if stage.steps != 0 and not (given and stage.warmup)]


def fresh_model(c: Settings, tok: Tokenizer) -> InSerter:
    """The model a run starts from: a Qwen2-Audio checkpoint, Whisper plus Qwen2, or random weights."""
    m = c.model
    if m["from"]:
        return load_model(m["from"])
    if m.encoder:
        return join_models(m.encoder, m.llm, [tok.special[name] for name in (AUDIO, AUDIO_BOS, AUDIO_EOS)], c.seed)
    audio = {"num_mel_bins": m.mels, "d_model": m.encoder_width, "encoder_layers": m.encoder_layers,
             "encoder_attention_heads": m.encoder_heads, "encoder_ffn_dim": 4 * m.encoder_width, "max_source_positions": MAX_FRAMES // 2}
    text = {"vocab_size": m.vocab, "hidden_size": m.llm_width, "num_hidden_layers": m.llm_layers,
            "num_attention_heads": m.llm_heads, "num_key_value_heads": m.llm_kv_heads, "intermediate_size": m.llm_ffn, "tie_word_embeddings": m.tie,
            "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta}, "max_position_embeddings": 32768}
    return random_model(Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=tok.special[AUDIO]), c.seed)


def make_missing_shards(c: Settings, arguments: list[str]) -> None:
    """Let synth.py make this rank's share of the missing shards, then wait for the other ranks' shares."""
    rank, world = rank_and_world()
    wanted = [synth.shard_path(c, *key) for key in synth.wanted_shards(c)]
    if any(not path.is_file() for path in wanted):
        say("making the missing shards first")
        kept = [a for a in arguments if a.partition("=")[0] not in ("shard", "fresh")]
        script = Path(synth.__file__)
        if subprocess.run([sys.executable, script, *kept, f"shard={rank}/{world}"]).returncode:
            sys.exit(2)                                               # synth.py has said why
    while any(not path.is_file() for path in wanted):                 # no process group yet: its time-outs are shorter
        time.sleep(1)


def open_run(c: Settings) -> None:
    """Make the run's folder, or check that it was started with these settings, which it keeps in config.yaml."""
    folder = run_folder(c)
    if c.fresh and folder.exists():
        shutil.rmtree(folder)
    synth.same_settings(folder / "config.yaml", c, c.may_change,
                        "choose another name with run=…, or start it anew with fresh=true")


def tidy(c: Settings, step: int) -> None:
    """Forget what a killed process left: metrics of steps after the state that a run continues from, unfinished files."""
    folder = run_folder(c)
    for left in [*folder.glob(".*"), *folder.glob("state/.*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if (path := folder / "metrics.jsonl").is_file():
        lines = path.read_bytes().splitlines(keepends=True)
        synth.write_whole(path, *[line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step])


def train(c: Settings, arguments: list[str]) -> None:
    """Run the stages from the start or from the newest state."""
    rank, world = rank_and_world()
    for name in (name for name in stages_of(c) if c.train.stages[name].packs % world):
        raise UserError(f"train.stages.{name}.packs={c.train.stages[name].packs} is no multiple of the {world} processes; "
                        "choose one that is.")
    if rank == 0 or not c.fresh:                                      # each rank refuses by itself: no process group yet
        open_run(c)
    make_missing_shards(c, arguments)
    tok = load_tokenizer(c)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    if device_here().type == "cuda":
        torch.cuda.set_device(device_here())
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    saved, stages = load_state(c), stages_of(c)
    where, tensors = saved or ({"stage": stages[0]}, {})
    if where.pop("tokenizer", tok.digest) != tok.digest:
        raise UserError(f"The tokenizer in {c.data} is not the one that run {c.run} began with; restore it, or use fresh=true.")
    at, model = Progress(**{key: where[key] for key in where if key not in ("files", "settings")}), fresh_model(c, tok)
    if saved:
        model.load_state_dict({n.removeprefix("weight."): t for n, t in tensors.items() if n.startswith("weight.")}, strict=False)
        say(f"continuing run {c.run} in stage {at.stage} after step {at.step}")
    model.checkpoint_blocks = c.train.checkpointing
    model.to(device_here())
    if rank == 0:
        tidy(c, at.step)
    runs = [f"{'fused' if fused_here(device_here(), m.head) else 'plain'} (heads of {m.head})" for m in (model.audio_tower, model.language_model)]
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on {world} x {device_here().type}, attention: encoder {runs[0]}, "
        f"LLM {runs[1]}\n   step | loss | lr | grad norm | tokens/s | audio s/s | waiting for data | eta")
    slots, begun = {n: t for n, t in tensors.items() if n.startswith("optim.")}, at.step
    for name in stages[stages.index(at.stage):]:
        if name != at.stage:
            at, slots = Progress(name, at.step), {}
        if at.share(c.train.stages[name]) >= 1:
            continue
        if not train_stage(c, model, tok, at, slots, stopping):
            say(f"stopped by a signal after step {at.step}; the same command continues")
            sys.exit(128 + signal.SIGTERM)
    if rank == 0:
        if at.step == begun:                                          # killed between the last state and its export
            export(c, model, tok)
        draw_curves(c)
        say(f"run {c.run} is finished: {run_folder(c) / 'model'} and curves.png; next: python bench.py")
    if world > 1:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# 12. The fused kernel: computes exactly `plain_attention`; skip on first reading
#
# Flash attention: a program holds a tile of query rows of one document and head, walks over the keys they
# may see, and keeps a running maximum and sum, so scores never reach memory; `lse`, the logarithm of every
# row's sum, is all the backward pass needs to make them again. That is two kernels without atomics, so the
# same bits come out every time: `query_gradient` holds queries and walks over keys, `key_gradient` holds
# keys and walks over queries. Work is the sum of squared document lengths; no program looks past its own.
# Tensors reach a kernel as (pointer, stride of a position, stride of a head); rows count from a document's start.
# --------------------------------------------------------------------------------------------------

HEAD_SIZES = (16, 32, 64, 128)                                        # others take plain_attention
TILE = 128                                                            # rows of an entry of the table of tiles
compiled = triton.jit if triton else lambda function: function


def fused_tiles(cu_seqlens, causal, positions):
    """The kernels' table of tiles (n, 4) int32, the most work first, made on cu_seqlens' device without waiting for it.

    A row is: first position and length of a document, the number of a tile in it, and that of the tile's mirror image.
    A causal tile has as many keys to walk over as its mirror image has queries, so one order serves all kernels. n
    is the most tiles there can be; surplus rows name a tile past their document's end, where programs leave at once.

    >>> fused_tiles(torch.tensor([0, 300, 300, 310]), True, 310)[:4].tolist()
    [[0, 300, 2, 0], [0, 300, 1, 1], [0, 300, 0, 2], [300, 10, 0, 0]]
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    counts = (lengths + TILE - 1) // TILE
    ends, number = counts.cumsum(0), torch.arange(positions // TILE + len(lengths), device=cu_seqlens.device)
    document = torch.searchsorted(ends, number, right=True).clamp(max=len(lengths) - 1)
    count = counts[document]
    index = torch.minimum(number - (ends - counts)[document], count)
    mirror = torch.where(index < count, count - 1 - index, count)
    work = torch.where(index < count, index + 1 if causal else count, 0)
    return torch.stack([starts[document], lengths[document], index, mirror], 1).int()[work.argsort(descending=True, stable=True)]


@compiled
def place(tiles, column: constexpr, ROWS: constexpr):
    """The program's document (first position, length) and its first row there; `column` 2: the tile, 3: its mirror image."""
    entry = tiles + tl.program_id(1) * ROWS // 128 * 4                # several programs share a TILE if it is larger than ROWS
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
    """A tile's logits from products of queries and keys: scaled, in bits (2 ** x is cheaper than e ** x), and on an
    edge -inf where a query may not look. Queries past the document's end see what they like: nothing reads them."""
    if edge:
        products = tl.where(key <= query if causal else key < length, products, float("-inf"))
    return products * (1.4426950408889634 * D ** -0.5)


@compiled
def row_products(a, b, ROWS: constexpr):
    """Sum of a * b along each row. In float32 it is summed as `dot` sums, for in a query that sees one key it has to cancel
    against such a sum exactly: its gradient is zero."""
    if a.dtype == tl.float32:
        result = tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :], dot(a, b.T), 0.0), 1)
    else:
        result = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    return result


@compiled
def forward_kernel(q, k, v, out, lse, T, tiles, causal: constexpr, group: constexpr, D: constexpr,
                   ROWS: constexpr, COLS: constexpr):
    start, length, first = place(tiles, 2, ROWS)
    if first >= length:
        return
    head, rows = tl.program_id(0), first + tl.arange(0, ROWS)
    queries, mean = read(q, start, head, rows, length, D), tl.zeros([ROWS, D], tl.float32)     # not yet divided by `total`
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    last = tl.minimum(first + ROWS, length) if causal else length
    full = first if causal else length // COLS * COLS                 # every query sees the keys before: no mask there
    for edge in tl.static_range(2):
        for col in range(full if edge else 0, last if edge else full, COLS):
            cols = col + tl.arange(0, COLS)
            keys = read(k, start, head // group, cols, length, D)
            s = scores(dot(queries, keys.T), rows[:, None], cols[None, :], length, edge, causal, D)
            higher = tl.maximum(top, tl.max(s, 1))                    # finite: every row sees the first key it meets
            p, shrink = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
            values = read(v, start, head // group, cols, length, D)
            total, top = total * shrink + tl.sum(p, 1), higher
            mean = dot(p.to(values.dtype), values, mean * shrink[:, None])
    tl.store(cells(out, start, head, rows, D), mean / total[:, None], mask=rows[:, None] < length)
    tl.store(lse + head * T + start + rows, top + tl.log2(total), mask=rows < length)


@compiled
def query_gradient(q, k, v, out, dout, dq, lse, delta, T, tiles, causal: constexpr, group: constexpr, D: constexpr,
                   ROWS: constexpr, COLS: constexpr):
    """Also writes delta = sum(out * dout) of each row, which `key_gradient` reads afterwards."""
    start, length, first = place(tiles, 2, ROWS)
    if first >= length:
        return
    head, rows = tl.program_id(0), first + tl.arange(0, ROWS)
    queries, dmean = read(q, start, head, rows, length, D), read(dout, start, head, rows, length, D)
    inner = row_products(dmean, read(out, start, head, rows, length, D), ROWS)
    tl.store(delta + head * T + start + rows, inner, mask=rows < length)
    size = tl.load(lse + head * T + start + rows, mask=rows < length, other=0.0)
    gradient = tl.zeros([ROWS, D], tl.float32)
    for col in range(0, tl.minimum(first + ROWS, length) if causal else length, COLS):
        cols = col + tl.arange(0, COLS)
        keys, values = read(k, start, head // group, cols, length, D), read(v, start, head // group, cols, length, D)
        s = scores(dot(queries, keys.T), rows[:, None], cols[None, :], length, True, causal, D)
        ds = tl.exp2(s - size[:, None]) * (dot(dmean, values.T) - inner[:, None])
        gradient = dot(ds.to(keys.dtype), keys, gradient)
    tl.store(cells(dq, start, head, rows, D), gradient * D ** -0.5, mask=rows[:, None] < length)


@compiled
def key_gradient(q, k, v, dout, dk, dv, lse, delta, T, tiles, causal: constexpr, group: constexpr, D: constexpr,
                 ROWS: constexpr, COLS: constexpr):
    """Tiles stand on their side here: rows are keys, columns queries. The query heads of a key's head add up."""
    start, length, first = place(tiles, 3, ROWS)
    if first >= length:
        return
    home, rows = tl.program_id(0), first + tl.arange(0, ROWS)
    keys, values = read(k, start, home, rows, length, D), read(v, start, home, rows, length, D)
    dkeys, dvalues = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, D], tl.float32)
    for head in range(home * group, (home + 1) * group):
        for col in range(first if causal else 0, length, COLS):
            cols = col + tl.arange(0, COLS)
            queries, dmean = read(q, start, head, cols, length, D), read(dout, start, head, cols, length, D)
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
    """(rows, columns, warps, loads in flight) of a kernel's tiles: as large as the registers of its warps hold."""
    if dtype == torch.float32:                                        # no tensor cores; a dot's operands take registers too
        return {forward_kernel: (32, 32, 8, 1), query_gradient: (16, 16, 8, 1), key_gradient: (32, 16, 4, 1)}[kernel]
    return {forward_kernel: (TILE, 64, 4 if D < 128 else 8, 3),       # four warps wait less for each other than eight
            query_gradient: (TILE, 64, 8, 2),                         # holds a second tile of scores
            key_gradient: (TILE, 64 if D < 128 else 32, 8, 2)}[kernel]                         # and two gradients


def launch(kernel, tiles, causal, q, k, *others):
    """Programs for every tile and head; the heads of one tile stand together, so that the longest come first."""
    rows, cols, warps, stages = tile_shape(kernel, q.shape[2], q.dtype)
    tensors = [(x, x.stride(0), x.stride(1)) if x.dim() == 3 else x for x in (q, k, *others)]
    grid = (k if kernel is key_gradient else q).shape[1], len(tiles) * (TILE // rows)
    kernel[grid](*tensors, len(q), tiles, causal, q.shape[1] // k.shape[1], q.shape[2], rows, cols, num_warps=warps, num_stages=stages)


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
    (dq, dk, dv), delta = empty_gradients(q, k, v), torch.empty_like(lse)
    launch(query_gradient, tiles, causal, q, k, v, out, dout, dq, lse, delta)
    launch(key_gradient, tiles, causal, q, k, v, dout, dk, dv, lse, delta)
    return dq, dk, dv


@gradient_op.register_fake
def empty_gradients(q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.causal = inputs[4]


def run_backward(ctx, dout, _):
    *kept, tiles = ctx.saved_tensors
    return *gradient_op(*kept, dout.contiguous(), tiles, ctx.causal), None, None


attention_op.register_autograd(run_backward, setup_context=keep_for_backward)


def fused_attention(q, k, v, cu_seqlens, causal, tiles=None):
    """Arguments and result are those of `plain_attention`; tiles: fused_tiles' result, shared by layers.

    D is one of HEAD_SIZES; bfloat16 and float16 are added up in float32, and float32 is computed as such. The last
    dimension is contiguous, or copied; positions and heads may lie at any strides.
    """
    if torch.is_autocast_enabled(q.device.type):                      # which does not know operators of our own
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    tiles = fused_tiles(cu_seqlens.to(q.device, non_blocking=True), causal, len(q)) if tiles is None else tiles
    return attention_op(*(x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v)), tiles, causal)[0]


# --------------------------------------------------------------------------------------------------
# 13. The command line
# --------------------------------------------------------------------------------------------------

def main(arguments: list[str]) -> None:
    config = synth.load_config(arguments)
    if config.ask is not None:
        print(ask(config))
    else:
        train(config, arguments)


if __name__ == "__main__":
    synth.run(main)
