"""Everything that needs a GPU, in one run of at most 9 minutes: tables on the screen, gpu.json in FOLDER.

    python experiments/gpu.py FOLDER [correct] [kernel] [operations] [step] [tiny]      (default: all)

correct     every configuration of the kernel in bfloat16, float16 and float32 against the definition,
            bit-identical repeats, no waiting for the GPU
kernel      attention on packs like real samples and at fixed lengths, against FlashAttention-2 (torch's
            varlen_attn), FlexAttention compiled with a document mask, and padded SDPA
operations  what share of a training step's operations each module has
step        a training step of Whisper-small + Qwen2.5-0.5B sizes in packs of 8192 against transformers'
            Qwen2-Audio
tiny        synthesis and training of the tiny world, a few steps, end to end

Clips and documents are drawn here, from a seed; nothing is read or downloaded. Without a GPU, but for
operations: one sentence, status 2. INSERTER_DRY=1 walks through all of it on a CPU at toy sizes, with the
kernel in Triton's interpreter, to see that this file works; its numbers mean nothing.

Legend, as in inserter.py: T positions of a pack   Hq, Hkv query and key-value heads   D head size
"""
import dataclasses
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DRY = os.environ.get("INSERTER_DRY") == "1"
ENVIRONMENT = dict(os.environ)
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"     # before triton is imported

import numpy as np                           # noqa: E402
import torch                                 # noqa: E402
import torch._dynamo                         # noqa: E402
import torch.nn.functional as F              # noqa: E402
from torch import Tensor, nn                 # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import (                   # noqa: E402
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    WhisperFeatureExtractor,
)

import inserter as M                         # noqa: E402

DEVICE = torch.device("cpu" if DRY else "cuda")
PACK_LENGTH = 400 if DRY else 8192
SECONDS = 510                                # no new row is begun later than this
BEGUN = time.perf_counter()
RESULTS: dict[str, Any] = {"command": "python experiments/gpu.py FOLDER", "dry": DRY, "errors": {}}
HALVES = (torch.float16,) if DRY else (torch.bfloat16, torch.float16)
TENSORS = ("out", "dq", "dk", "dv")
PEAK_FLOPS = 989e12                          # dense bfloat16 operations per second of an H100 or H200


def late() -> bool:
    return time.perf_counter() - BEGUN > SECONDS


def guarded(name: str, function: Callable, *arguments: Any) -> Any:
    """function(*arguments), or None if it fails: the failure is kept and printed, and the rest goes on."""
    try:
        return function(*arguments)
    except Exception as error:               # whatever it is, the others are still worth having
        RESULTS["errors"][name] = traceback.format_exc()[-3000:]
        first_line = str(error).partition("\n")[0]
        print(f"  {name} failed: {type(error).__name__}: {first_line[:160]}")
        free_memory()
        return None


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def free_memory() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------
# 1. Samples: how long clips and documents are
# --------------------------------------------------------------------------------------------------

Drawn = list[tuple[str, float]]              # [("text", 31 tokens), ("speech", 3.2 seconds), …]


def draw_sample(rng: random.Random) -> Drawn:
    """Texts' tokens and clips' seconds of one sample, in turn.

    Shares of positions as in the paper's mix; utterances of a few seconds with a long tail, as if read aloud.
    """
    def seconds() -> float:
        return min(max(rng.lognormvariate(1.2, 0.6), 0.8), 28.0)

    (recipe,) = rng.choices(["interleaved", "tasks", "text"], [0.35, 0.45, 0.2])
    if recipe == "tasks":
        length = min(3 * seconds(), 28.0)
        return [("speech", length), ("text", max(4, round(3.3 * length)))]
    if recipe == "text":
        return [("text", round(min(max(rng.lognormvariate(6.0, 0.9), 16), 3000)))]
    sample = [("text", rng.randint(8, 60))]
    for _ in range(rng.randint(1, 8)):
        sample += [("speech", seconds()), ("text", rng.randint(8, 60))]
    return sample


def clip_samples(drawn: Drawn) -> list[int]:
    return [round(seconds * M.RATE) for role, seconds in drawn if role == "speech"]


def positions(drawn: Drawn) -> int:
    texts = sum(tokens for role, tokens in drawn if role == "text")
    return texts + sum(M.audio_positions(n) + 2 for n in clip_samples(drawn)) + 1


def draw_pack(seed: int, length: int) -> list[Drawn]:
    """Samples that fit into a pack of `length` positions; the first that does not ends it."""
    rng = random.Random(seed)
    samples = []
    room = length
    while True:
        sample = draw_sample(rng)
        if positions(sample) > length:       # longer than a pack: left out
            continue
        if positions(sample) > room:
            return samples
        samples.append(sample)
        room -= positions(sample)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE)


def draw_inputs(T: int, Hq: int, Hkv: int, D: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """[q, k, v] and the gradient of the output."""
    g = torch.Generator(DEVICE).manual_seed(0)
    q, k, v, dout = (torch.randn(T, h, D, generator=g, device=DEVICE).to(dtype) for h in (Hq, Hkv, Hkv, Hq))
    return [x.requires_grad_() for x in (q, k, v)], dout


# --------------------------------------------------------------------------------------------------
# 2. Correctness
# --------------------------------------------------------------------------------------------------

def naive(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    """The definition, in the type of its arguments."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    out = []
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        queries, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))       # (Hq, L, D)
        scores = queries @ keys.transpose(1, 2) / q.shape[2] ** 0.5
        if causal:
            is_future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(is_future, -torch.inf)
        out.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(out)


def output_and_gradients(function: Callable, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv], written into memory that was full of NaN."""
    if DEVICE.type == "cuda":
        poison = [torch.full((64 * 2 ** 20,), torch.nan, device=DEVICE) for _ in range(4)]
        del poison
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def check_configuration(dtype: torch.dtype, D: int, causal: bool, heads: tuple[int, int]) -> dict:
    """Three runs of the kernel against the definition in a wider type, and that in the same type as well."""
    rng = random.Random(D)
    drawn = [rng.randint(1, 40 if DRY else 900) for _ in range(2 if DRY else 6)]
    lengths = [0, 1, 3, 300, 0, 129, *drawn]
    cu_seqlens = bounds(lengths)
    inputs, dout = draw_inputs(sum(lengths), *heads, D, dtype)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    by_definition = partial(naive, cu_seqlens=cu_seqlens, causal=causal)
    by_kernel = partial(M.fused_attention, cu_seqlens=cu_seqlens, causal=causal)
    exact = output_and_gradients(by_definition, [x.to(wide) for x in inputs], dout.to(wide))
    same_type = output_and_gradients(by_definition, inputs, dout)
    first, *repeats = (output_and_gradients(by_kernel, inputs, dout) for _ in range(3))
    identical = all(torch.equal(a, b) for run in repeats for a, b in zip(first, run))
    name = str(dtype).removeprefix("torch.")
    row = {"type": name, "D": D, "causal": causal, "heads": list(heads), "repeats identical": identical}
    for name, a, n, e in zip(TENSORS, first, same_type, exact):
        last_place = 2.0 ** math.floor(math.log2(e.abs().max().item())) * torch.finfo(dtype).eps
        bound = 2 * (n.to(wide) - e).abs().max().item() + last_place
        error = (a.to(wide) - e).abs().max().item()
        row[name] = {
            "relative": ((a.to(wide) - e).norm() / e.norm()).item(),
            "of bound": math.inf if math.isnan(error) else error / bound}
    row["passed"] = identical and all(row[name]["of bound"] <= 1 for name in TENSORS)
    return row


def check_no_waiting() -> bool:
    """Tables of tiles and kernels, forward and backward, without one synchronisation (any would raise)."""
    cu_seqlens = bounds([300, 0, 77])
    inputs, dout = draw_inputs(377, 4, 2, 64, HALVES[0])
    attend = partial(M.fused_attention, cu_seqlens=cu_seqlens, causal=True)
    output_and_gradients(attend, inputs, dout)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            output_and_gradients(attend, inputs, dout)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return True


def show_configuration(row: dict) -> None:
    shares = "".join(f"{row[name]['of bound']:6.2f}" for name in TENSORS)
    relative = max(row[name]["relative"] for name in TENSORS)
    heads = "/".join(map(str, row["heads"]))
    repeats = "identical" if row["repeats identical"] else "DIFFER"
    failed = "" if row["passed"] else "  FAILED"
    print(f"  {row['type']:9}{row['D']:4} {str(row['causal']):7}{heads:9}{shares}  {relative:9.1e}  "
          f"{repeats}{failed}", flush=True)


def measure_correctness() -> dict:
    print("\ncorrectness: largest error over (2 x naive error of the same type + one unit in the last "
          "place); <= 1 is wanted")
    print(f"  {'type':9}{'D':>4} {'causal':7}{'heads':9}{'out':>6}{'dq':>6}{'dk':>6}{'dv':>6}  "
          f"{'relative':>9}  repeats")
    rows = []
    for dtype in (*HALVES, torch.float32):
        cases = [(False, (4, 4)), (True, (14, 2)), (True, (4, 4))]
        if DRY:
            cases = [(False, (2, 2)), (True, (4, 2))]
        for D in M.HEAD_SIZES[:2] if DRY else M.HEAD_SIZES:
            for causal, heads in cases:
                name = f"correct {dtype} {D} {causal} {heads}"
                row = guarded(name, check_configuration, dtype, D, causal, heads)
                if row:
                    rows.append(row)
                    show_configuration(row)
    no_waiting = bool(guarded("no waiting", check_no_waiting))
    passed = sum(row["passed"] for row in rows)
    print(f"  {passed} of {len(rows)} passed; {'no synchronisation' if no_waiting else 'SYNCHRONISES'}")
    return {"rows": rows, "no synchronisation": no_waiting}


# --------------------------------------------------------------------------------------------------
# 3. The kernel against what one would pick otherwise
#
# A peer is a function (lengths, causal, Hq, Hkv) -> attend(q, k, v): what depends on the lengths alone is
# made beforehand and not timed.
# --------------------------------------------------------------------------------------------------

def milliseconds(function: Callable) -> float:
    """Median time of a call, by events around it, the L2 cache emptied before each."""
    if DRY:
        begun = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - begun)
    return M.triton.testing.do_bench(function, warmup=20, rep=60, return_mode="median")


def replayed(function: Callable) -> float:
    """Time of a call without the CPU's share: a captured graph, replayed."""
    if DRY:
        return milliseconds(function)
    try:
        return M.triton.testing.do_bench_cudagraph(function, rep=40, return_mode="median")
    except RuntimeError as error:            # some cannot be captured: then with the CPU's share
        RESULTS["errors"]["replay"] = str(error)[:300]
        torch.cuda.synchronize()
        return milliseconds(function)


def ours(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
    cu_seqlens = bounds(lengths)
    tiles = M.fused_tiles(cu_seqlens, causal, sum(lengths))
    return lambda q, k, v: M.fused_attention(q, k, v, cu_seqlens, causal, tiles)


def flash(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
    from torch.nn.attention.varlen import varlen_attn
    cu_seqlens = bounds(lengths)
    longest = max(lengths)
    window = (-1, 0) if causal else (-1, -1)
    return lambda q, k, v: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window)


def flash_repeated(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
    """For a version of varlen_attn that wants as many key-value heads as query heads."""
    attend = flash(lengths, causal, Hq, Hkv)
    group = Hq // Hkv
    return lambda q, k, v: attend(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


FLEX: dict[str, Callable] = {}               # compiled once, for all lengths


def flex(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    number = torch.arange(len(lengths), device=DEVICE)
    document = torch.repeat_interleave(number, torch.tensor(lengths, device=DEVICE))

    def is_seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document[query] == document[key]
        return same & (key <= query) if causal else same

    torch._dynamo.config.recompile_limit = 64
    if not FLEX:
        FLEX["attention"] = flex_attention if DRY else torch.compile(flex_attention, dynamic=False)
    T = sum(lengths)
    mask = create_block_mask(is_seen, None, None, T, T, device=DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return FLEX["attention"](q, k, v, block_mask=mask, enable_gqa=Hq != Hkv)[0].transpose(0, 1)

    return attend


def padded_sdpa(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
    """Documents padded to the longest; gathering them is not part of the time: this is attention alone."""
    is_real = torch.arange(max(lengths), device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    mask = None if causal or bool(is_real.all()) else is_real[:, None, None]
    return partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal, enable_gqa=Hq != Hkv)


PEERS = {"ours": ours, "flash-2": flash, "flex": flex, "padded sdpa": padded_sdpa}


def longest_kernel(function: Callable) -> str:
    """Name of the GPU kernel that takes most of a call's time: it tells SDPA's backend."""
    if DRY:
        return "cpu"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize()
    longest = max(seen.key_averages(), key=lambda event: event.self_device_time_total)
    name = longest.key.lower()
    known = ("cudnn", "flash", "fmha_cutlass", "efficient", "math")
    return next((backend for backend in known if backend in name), name[:40])


@dataclasses.dataclass
class Case:
    """Attention to be timed."""
    name: str
    lengths: list[int]
    causal: bool
    Hq: int
    Hkv: int
    D: int
    timer: Callable


def time_peer(name: str, make: Callable, case: Case) -> dict:
    """{pass: milliseconds} of one implementation, and the backend that SDPA turned out to use."""
    attend = make(case.lengths, case.causal, case.Hq, case.Hkv)
    (q, k, v), dout = draw_inputs(sum(case.lengths), case.Hq, case.Hkv, case.D, HALVES[0])
    if name == "padded sdpa":
        shape = (len(case.lengths), max(case.lengths), case.D)
        heads = (case.Hq, case.Hkv, case.Hkv, case.Hq)
        q, k, v, dout = (torch.randn(shape[0], h, *shape[1:], device=DEVICE).to(HALVES[0]) for h in heads)
        q, k, v = (x.requires_grad_() for x in (q, k, v))

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v), (q, k, v), dout)

    row = {"forward": case.timer(forward), "both": case.timer(both)}
    if name == "padded sdpa":
        row["backend"] = longest_kernel(forward)
    return row


def attention_flops(case: Case, backward: bool) -> float:
    """Products of matrices: two in the forward pass, five more in the backward pass; half if causal."""
    work = sum(n * n for n in case.lengths) * 4 * case.D * case.Hq
    if backward:
        work *= 3.5
    return work / 2 if case.causal else work


def time_peers(case: Case) -> dict:
    """A row of the table: milliseconds of every peer, and TFLOP/s of the work that the documents need."""
    times = {}
    for name, make in PEERS.items():
        label = f"{case.name} D={case.D} causal={case.causal} {name}"
        found = guarded(label, time_peer, name, make, case)
        if found is None and name == "flash-2" and case.Hq != case.Hkv:
            found = guarded(f"{label} repeated", time_peer, name, flash_repeated, case)
        if found:
            times[name] = found
    row = {
        "case": case.name,
        "D": case.D,
        "heads": [case.Hq, case.Hkv],
        "causal": case.causal,
        "positions": sum(case.lengths),
        "documents": len(case.lengths),
        "longest": max(case.lengths),
        "times": times}
    cells = ""
    for direction in ("forward", "both"):
        work = attention_flops(case, backward=direction == "both")
        row[direction] = {name: work / found[direction] / 1e9 for name, found in times.items()}
        cells += "".join(f"{row[direction].get(name, math.nan):9.0f}" for name in PEERS)
    backend = times.get("padded sdpa", {}).get("backend", "")
    print(f"  {case.name:16}{case.D:4} {str(case.causal):6}{cells}   {backend}", flush=True)
    return row


def cases() -> list[Case]:
    """Packs like real samples, the LLM's and the clips of one; and 16,384 positions of one length."""
    rows = []
    length = 200 if DRY else 8192
    groups = ((2, 1), (4, 2)) if DRY else ((14, 2), (28, 4))
    for seed in range(1 if DRY else 3):
        pack = draw_pack(seed, length)
        documents = [positions(drawn) for drawn in pack]
        rows.append(Case(f"pack {seed}", documents, True, *groups[0], 64, replayed))
    rows.append(Case(f"pack {seed}", documents, True, *groups[1], 128, replayed))
    clips = [M.convolved(math.ceil(n / M.HOP)) for drawn in pack for n in clip_samples(drawn)]
    heads = 2 if DRY else 12
    rows.append(Case("clips of a pack", clips or [50], False, heads, heads, 64, replayed))
    total = 128 if DRY else 16384
    for D in (64, 128):
        heads = 2 if DRY else 2048 // D
        for causal in (True,) if DRY else (True, False):
            for length in (128,) if DRY else (512, 1024, 2048, 4096, 8192, 16384):
                lengths = [length] * (total // length)
                name = f"{len(lengths)} x {length}"
                rows.append(Case(name, lengths, causal, heads, heads, D, milliseconds))
    return rows


def measure_kernel() -> dict:
    names = "".join(f"{name[:8]:>9}" for name in PEERS)
    print("\nattention, TFLOP/s of the work that documents need" + " " * 4 + "forward" + " " * 31
          + "forward + backward")
    print(f"  {'case':16}{'D':>4} {'causal':6}{names}{names}   sdpa is")
    rows = [time_peers(case) for case in cases() if not late()]
    ratios = {}
    for peer in ("flash-2", "flex", "padded sdpa"):
        for direction in ("forward", "both"):
            rates = [row[direction] for row in rows if "pack" in row["case"]]
            times = [rate["ours"] / rate[peer] for rate in rates if {"ours", peer} <= rate.keys()]
            ratios[f"{peer}, {direction}"] = statistics.geometric_mean(times) if times else None
    shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio)
    print(f"  times as fast on packs, geometric mean: {shown}")
    at_8k = {row["D"]: row["forward"].get("ours") for row in rows
             if row["longest"] == 8192 and not row["causal"]}
    print(f"  forward at 8192: {at_8k} TFLOP/s (wanted 380 at 64, 430 at 128)")
    return {"rows": rows, "ratios on packs": ratios}


# --------------------------------------------------------------------------------------------------
# 4. A training step against transformers
# --------------------------------------------------------------------------------------------------

def step_config() -> Qwen2AudioConfig:
    """Whisper-small and Qwen2.5-0.5B; untied, so that both sides train the same parameters."""
    vocab = 128 if DRY else 151936
    d = 32 if DRY else 768
    audio = {
        "model_type": "qwen2_audio_encoder",
        "d_model": d,
        "encoder_layers": 1 if DRY else 12,
        "encoder_attention_heads": 2 if DRY else 12,
        "encoder_ffn_dim": 4 * d,
        "num_mel_bins": 80}
    text = {
        "model_type": "qwen2",
        "hidden_size": 64 if DRY else 896,
        "num_hidden_layers": 1 if DRY else 24,
        "num_attention_heads": 4 if DRY else 14,
        "num_key_value_heads": 2,
        "intermediate_size": 64 if DRY else 4864,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    return Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=vocab - 1)


def make_sample(drawn: Drawn, config: Qwen2AudioConfig, rng: np.random.Generator) -> M.Encoded:
    """Noise for speech, random words for text; all text is a target."""
    audio = config.audio_token_index
    ids, is_target, clips = [], [], []
    for role, n in drawn:
        if role == "text":
            ids += rng.integers(0, config.text_config.vocab_size - 3, n).tolist()
            is_target += [True] * n
        else:
            clips.append((0.1 * rng.standard_normal(round(n * M.RATE))).astype(np.float32))
            heard = M.audio_positions(len(clips[-1]))
            ids += [audio - 2] + [audio] * heard + [audio - 1]
            is_target += [False] * (heard + 2)
    ids.append(0)
    is_target.append(True)
    labels = [i if target else M.IGNORE for i, target in zip(ids[1:], is_target[1:])]
    return M.Encoded("sample", ids, [*labels, M.IGNORE], clips, word_ids=[[] for _ in clips])


def targets_of(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"] != M.IGNORE).sum())


def step_flops(config: Qwen2AudioConfig, lengths: Tensor, frames: Tensor, targets: int) -> float:
    """Multiplications and additions of a step over a batch's real tokens and frames, forward and backward.

    A matrix takes two per entry and row; attention two products of L x L x width per clip, half of that where
    causal. Nothing that is padded, recomputed or not a matrix product counts.

    lengths: (documents,) positions   frames: (clips,) of 10 ms   targets: positions that have logits
    """
    audio = config.audio_config
    text = config.text_config
    d = audio.d_model
    heard = M.convolved(frames).double()     # L of each clip
    tokens = lengths.double()
    queries = M.head_size_of(text) * text.num_attention_heads
    keys = M.head_size_of(text) * text.num_key_value_heads
    matrices = 4 * d ** 2 + 2 * d * audio.encoder_ffn_dim
    encoder_block = 2 * matrices * heard.sum() + 4 * d * (heard ** 2).sum()
    convolutions = 2 * 3 * d * (2 * audio.num_mel_bins + d) * heard.sum()
    adapter = 2 * text.hidden_size * d * (heard // 2).sum()
    matrices = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    llm_block = 2 * matrices * tokens.sum() + 2 * queries * (tokens ** 2).sum()
    head = 2 * text.hidden_size * text.vocab_size * targets
    forward = convolutions + audio.encoder_layers * encoder_block + adapter
    return 3 * float(forward + text.num_hidden_layers * llm_block + head)


def batch_flops(config: Qwen2AudioConfig, batch: dict[str, Tensor]) -> float:
    return step_flops(config, batch["lengths"], batch["frames"], targets_of(batch))


def padded_flops(config: Qwen2AudioConfig, samples: list[M.Encoded]) -> float:
    """A step's work when every clip lasts 30 s and logits are made at every position."""
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    clips = sum(len(sample.clips) for sample in samples)
    return step_flops(config, lengths, torch.full((clips,), M.MAX_FRAMES), int(lengths.sum()))


def count_operations() -> dict:
    """Shares of a step's operations: of its time, if all took the same; attention takes more."""
    config = step_config()
    sums = Counter()
    packs = 8
    for seed in range(packs):
        pack = draw_pack(seed, PACK_LENGTH)
        lengths = torch.tensor([positions(drawn) for drawn in pack])
        frames = torch.tensor([math.ceil(n / M.HOP) for drawn in pack for n in clip_samples(drawn)])
        targets = sum(tokens for drawn in pack for role, tokens in drawn if role == "text") + len(pack)
        alone = torch.ones(int(lengths.sum()))           # every position a document of its own
        total = step_flops(config, lengths, frames, targets)
        sums["all"] += total
        sums["LM head"] += total - step_flops(config, lengths, frames, 0)
        sums["encoder and adapter"] += total - step_flops(config, lengths, frames[:0], targets)
        sums["LLM, attention"] += total - step_flops(config, alone, frames, targets)
    sums["LLM, matrices"] = 2 * sums["all"] - sum(sums.values())
    results = {name: {"TFLOP a pack": work / packs / 1e12, "share": work / sums["all"]}
               for name, work in sums.items()}
    shown = [f"{name} {row['TFLOP a pack']:.1f} TFLOP ({row['share']:.0%})" for name, row in results.items()]
    print("\noperations of a step: " + ", ".join(shown))
    return results


def their_batches(samples: list[M.Encoded], at_once: int) -> list[dict[str, Tensor]]:
    """The same samples for transformers, sorted by length to spare padding; features are made untimed."""
    extract = WhisperFeatureExtractor(80)
    samples = sorted(samples, key=lambda sample: len(sample.ids))
    batches = []
    for start in range(0, len(samples), at_once):
        some = samples[start:start + at_once]
        ids = [torch.tensor(sample.ids) for sample in some]
        labels = [torch.tensor([M.IGNORE, *sample.labels[:-1]]) for sample in some]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=M.IGNORE)}
        clips = [clip for sample in some for clip in sample.clips]
        if clips:
            heard = extract(clips, sampling_rate=M.RATE, return_tensors="pt", return_attention_mask=True)
            batch["input_features"] = heard.input_features
            batch["feature_attention_mask"] = heard.attention_mask
        batches.append({name: x.to(DEVICE) for name, x in batch.items()})
    return batches


def models_for_step(config: Qwen2AudioConfig) -> tuple[M.InSerter, nn.Module, int]:
    """Ours and transformers', of the same random weights; and how many names have no counterpart."""
    with torch.device("meta"):
        model = M.InSerter(config)
    model = model.to_empty(device=DEVICE)
    g = torch.Generator(DEVICE).manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.02, generator=g)
        else:
            p.data.fill_(float("norm" in name and name.endswith("weight")))
    sinusoids = M.sinusoids(1500, config.audio_config.d_model)
    model.audio_tower.embed_positions.weight.data.copy_(sinusoids)
    peer = Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    peer = peer.to(DEVICE).train()
    names = set(peer.state_dict())
    weights = {their_name(name, names): p for name, p in model.state_dict().items()}
    report = peer.load_state_dict(weights, strict=False)
    for trained in (model, peer):
        for name, p in trained.named_parameters():
            p.requires_grad_("embed_positions" not in name)
    return model, peer, len(report.missing_keys) + len(report.unexpected_keys)


def their_name(name: str, names: set[str]) -> str:
    """transformers renames a checkpoint's tensors in memory; names: all of its own."""
    candidates = [
        name,
        f"model.{name}",
        name.replace("language_model.lm_head", "lm_head"),
        name.replace("language_model.model", "language_model"),
        name.replace("language_model.model", "model.language_model")]
    return next((candidate for candidate in candidates if candidate in names), name)


def compare_losses(model: M.InSerter, peer: nn.Module, samples: list[M.Encoded]) -> dict:
    """Mean losses of the four shortest samples in float32."""
    few = sorted(samples, key=lambda sample: len(sample.ids))[:4]
    batch = M.collate(few, model.mels)
    torch.backends.cudnn.allow_tf32 = False              # their convolutions would be rounded to 10 bits
    with torch.no_grad():
        mine = float(model(batch, chunk=2048)) / targets_of(batch)
        theirs = float(peer(**their_batches(few, 4)[0]).loss)
    agree = abs(mine - theirs) < 1e-3
    print(f"  losses of four samples in float32: {mine:.6f} and {theirs:.6f}{'' if agree else '  DIFFER'}")
    return {"ours": mine, "transformers": theirs, "agree": agree}


def timed_steps(model: nn.Module, losses: Callable, count: int) -> dict:
    """Median seconds of a step and its largest memory, after warm-up; losses(): each micro-batch's in turn."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    seconds = []
    warm = 1 if DRY else 3
    for number in range(warm + count):
        synchronise()
        if number == warm and DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY):
            for loss in losses():
                loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise()
        seconds.append(time.perf_counter() - begun)
    memory = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0
    return {"seconds": statistics.median(seconds[warm:]), "peak GB": memory}


def measure_ours(model: M.InSerter, packs: list[dict], checkpointing: bool, compiled: bool) -> dict:
    """One pack a step, in turn; a reading process has made it, log-mel frames included."""
    model.recompute = checkpointing
    if compiled:
        for block in [*model.audio_tower.layers, *model.language_model.model.layers]:
            block.compile(backend="eager" if DRY else "inductor")
    turn = iter(packs * 99)
    torch._dynamo.utils.counters.clear()
    row = timed_steps(model, lambda: [model(next(turn), chunk=2048) / targets_of(packs[0])], 1 if DRY else 8)
    seconds = row["seconds"]
    work = statistics.mean(batch_flops(model.config, pack) for pack in packs)
    frames = statistics.mean(int(pack["frames"].sum()) for pack in packs)
    row |= {
        "checkpointing": checkpointing,
        "compiled": compiled,
        "compilations": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "MFU": work / seconds / PEAK_FLOPS,
        "TFLOP": work / 1e12,
        "tokens/s": statistics.mean(len(pack["ids"]) for pack in packs) / seconds,
        "audio s/s": frames * M.HOP / M.RATE / seconds}
    name = "ours, checkpointing" if checkpointing else "ours"
    if compiled:
        name += f", compiled {row['compilations']} x"
    print(f"  {name:34} {seconds:.4f} s | MFU {row['MFU']:.1%} | {row['tokens/s']:,.0f} tokens/s | "
          f"{row['audio s/s']:,.0f} audio s/s | {row['peak GB']:.1f} GB", flush=True)
    return row


def measure_theirs(peer: nn.Module, samples: list[M.Encoded], packs: int, at_once: int) -> dict:
    """All packs' samples in one step, over micro-batches."""
    batches = their_batches(samples, at_once)
    row = timed_steps(peer, lambda: (peer(**batch).loss / len(batches) for batch in batches), 1 if DRY else 3)
    row |= {"at once": at_once, "seconds": row["seconds"] / packs}
    print(f"  {f'transformers, {at_once} samples at once':34} {row['seconds']:.4f} s a pack | "
          f"{row['peak GB']:.1f} GB", flush=True)
    return row


def measure_step() -> dict:
    config = step_config()
    rng = np.random.default_rng(0)
    made = [[make_sample(drawn, config, rng) for drawn in draw_pack(seed, PACK_LENGTH)]
            for seed in range(1 if DRY else 2)]
    samples = [sample for pack in made for sample in pack]
    packs = [M.collate(pack, config.audio_config.num_mel_bins) for pack in made]
    model, peer, unmatched = models_for_step(config)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\ntraining step: {count / 1e6:.0f} M parameters, {len(packs)} packs of {PACK_LENGTH} with "
          f"{sum(len(pack['frames']) for pack in packs)} clips, AdamW, bfloat16 autocast")
    results = {
        "parameters": count,
        "unmatched names": unmatched,
        "losses": compare_losses(model, peer, samples),
        "ours": [],
        "transformers": []}
    for checkpointing, compiled in ((False, False), (True, False), (False, True), (True, True)):
        name = f"our step {(checkpointing, compiled)}"
        row = guarded(name, measure_ours, model, packs, checkpointing, compiled)
        if row:
            results["ours"].append(row)
    model.cpu()
    free_memory()
    for at_once in (2,) if DRY else (4, 8, 16):
        if not late():
            row = guarded(f"their step {at_once}", measure_theirs, peer, samples, len(packs), at_once)
            if row:
                results["transformers"].append(row)
    if results["ours"] and results["transformers"]:
        best, theirs = (min(row["seconds"] for row in results[who]) for who in ("ours", "transformers"))
        results["ratio"] = theirs / best
        work = sum(batch_flops(config, pack) for pack in packs)
        results["by FLOPs"] = padded_flops(config, samples) / work
        print(f"  {results['ratio']:.1f} times as fast (wanted 3), by FLOPs {results['by FLOPs']:.1f}; "
              "MFU wanted 45 %")
    return results


# --------------------------------------------------------------------------------------------------
# 5. The tiny run
# --------------------------------------------------------------------------------------------------

def measure_tiny(folder: Path) -> dict:
    """Synthesis and a shortened training of the tiny world, with the run's own log lines."""
    if importlib.util.find_spec("espeakng_loader") is None:
        print("\nthe tiny run is left out: espeakng_loader is not installed")
        return {"left out": "espeakng_loader is not installed"}
    settings = [
        "run=gpu",
        f"data={folder / 'data'}",
        f"synth.documents={80 if DRY else 2000}",
        "synth.held_out_documents=40",
        f"synth.shard_documents={40 if DRY else 500}",
        "synth.shards={interleaved: 1, tasks: 1, text: 1, chat: 1}",
        "train.eval_samples=8",
        "train.log_every=2"]
    for stage in ("warmup_hear", "warmup_speech", "warmup_text", "pretrain", "sft"):
        settings.append(f"train.stages.{stage}.steps={2 if DRY else 200}")
    begun = time.perf_counter()
    command = [sys.executable, str(ROOT / "inserter.py"), *settings]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    lines = done.stdout.splitlines()
    print("\n" + "\n".join([*lines[:7], *lines[-6:]]))
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    rows = (folder / "runs" / "gpu" / "metrics.jsonl").read_text().splitlines()
    return {
        "seconds": time.perf_counter() - begun,
        "last rows": [json.loads(row) for row in rows[-4:]],
        "log": lines[-30:]}


# --------------------------------------------------------------------------------------------------
# 6. The whole
# --------------------------------------------------------------------------------------------------

def about_machine() -> dict:
    if DRY:
        return {"device": "cpu"}
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    source = torch.empty(2 ** 31, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": M.triton.__version__,
        "cuda": torch.version.cuda,
        "matrix product TFLOP/s": 2 * 8192 ** 3 / milliseconds(lambda: a @ a) / 1e9,
        "copy TB/s": 2 * 2 ** 31 / milliseconds(lambda: target.copy_(source)) / 1e9}
    print(" | ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in machine.items()))
    return machine


def main(arguments: list[str]) -> None:
    measures = {
        "correct": measure_correctness,
        "kernel": measure_kernel,
        "operations": count_operations,
        "step": measure_step,
        "tiny": lambda: measure_tiny(folder)}
    if not arguments or not set(arguments[1:]) <= measures.keys():
        sentence = "Give the folder for gpu.json, and no or some of its parts: python experiments/gpu.py FOLDER"
        raise M.UserError(f"{sentence} [{'] ['.join(measures)}].")
    folder = Path(arguments[0]).resolve()
    chosen = arguments[1:] or list(measures)
    if chosen != ["operations"]:
        if not DRY and not torch.cuda.is_available():
            raise M.UserError("experiments/gpu.py needs a CUDA GPU, and torch finds none here.")
        measures["machine"] = about_machine
        chosen = ["machine", *chosen]
    folder.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        if late():
            RESULTS["errors"][name] = "left out: no time"
        else:
            RESULTS[name] = guarded(name, measures[name])
        RESULTS["seconds"] = time.perf_counter() - BEGUN
        (folder / "gpu.json").write_text(json.dumps(RESULTS, indent=1) + "\n")
    errors = RESULTS["errors"]
    names = f": {', '.join(errors)}" if errors else ""
    print(f"\n{RESULTS['seconds']:.0f} s, {len(errors)} failures{names}; {folder.name}/gpu.json is written")


if __name__ == "__main__":
    M.synth.run(main)
