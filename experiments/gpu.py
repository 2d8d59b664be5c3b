"""Everything that needs a GPU, in one run of at most 9 minutes: tables on the screen, gpu.json in FOLDER.

    python tests/gpu.py FOLDER [correct] [kernel] [operations] [step] [tiny] [sweep]  (default: all but sweep)

correct     every configuration in bfloat16 and float16 against float32, bit-identical repeats, no waiting for
            the GPU
kernel      attention on packs like real samples and at fixed lengths, against FlashAttention-2 (torch's
            varlen_attn), FlexAttention compiled with a document mask, and padded SDPA
operations  what share of a training step's operations each module has; needs no GPU
step        a training step of Whisper-small + Qwen2.5-0.5B sizes in packs of 8192 against transformers'
            Qwen2-Audio
tiny        synthesis and training of the tiny world, a few steps, end to end
sweep       other tile sizes than those in inserter.py

Clips and documents are drawn here, from a seed; nothing is read or downloaded. Without a GPU, but for
operations: one sentence, status 2. INSERTER_DRY=1 walks through all of it on a CPU at toy sizes, to see that
this file works; its numbers mean nothing.
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

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import inserter as M                         # noqa: E402

DRY = os.environ.get("INSERTER_DRY") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
PACK_LENGTH = 400 if DRY else 8192
SECONDS = 510                                # no new row is begun later than this
BEGUN = time.perf_counter()
RESULTS: dict[str, Any] = {"command": "python tests/gpu.py FOLDER", "dry": DRY, "errors": {}}
HALVES = (torch.float16,) if DRY else (torch.bfloat16, torch.float16)
TENSORS = ("out", "dq", "dk", "dv")
PEAK = M.PEAK_FLOPS                          # of dense bfloat16, by the datasheet

Sample = list[tuple[str, float]]             # [("text", 31 tokens), ("speech", 3.2 seconds), …]
Made = tuple[list[int], list[int], list[np.ndarray]]                     # ids, labels, clips


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


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------
# 1. Samples: how long clips and documents are
# --------------------------------------------------------------------------------------------------

def draw_sample(rng: random.Random) -> Sample:
    """Clips' seconds and texts' tokens of one sample, in turn: [("text", 31), ("speech", 3.2), …].

    Shares of positions as in the paper's mix; utterances of a few seconds with a long tail, as if read aloud.
    """
    def seconds() -> float:
        return min(max(rng.lognormvariate(1.2, 0.6), 0.8), 28.0)

    (kind,) = rng.choices(["interleaved", "task", "text"], [0.35, 0.45, 0.2])
    if kind == "task":
        length = min(3 * seconds(), 28.0)
        return [("speech", length), ("text", max(4, round(3.3 * length)))]
    if kind == "text":
        return [("text", round(min(max(rng.lognormvariate(6.0, 0.9), 16), 3000)))]
    sample = [("text", rng.randint(8, 60))]
    for _ in range(rng.randint(1, 8)):
        sample += [("speech", seconds()), ("text", rng.randint(8, 60))]
    return sample


def samples_in(seconds: float) -> int:
    return round(seconds * M.RATE)


def positions(sample: Sample) -> int:
    total = 1
    for kind, n in sample:
        total += n if kind == "text" else M.audio_positions(samples_in(n)) + 2
    return total


def draw_pack(rng: random.Random, length: int) -> tuple[list[Sample], int]:
    """Samples that fit into a pack of `length` positions, and the positions left over."""
    samples = []
    room = length
    while True:
        sample = draw_sample(rng)
        if positions(sample) > length:       # longer than a pack: left out
            continue
        if positions(sample) > room:
            return samples, room
        samples.append(sample)
        room -= positions(sample)


def document_lengths(seed: int, length: int) -> tuple[list[int], list[int]]:
    """(encoder outputs of every clip, positions of every document, the rest as one more) of one pack."""
    samples, room = draw_pack(random.Random(seed), length)
    clips = [samples_in(n) for sample in samples for kind, n in sample if kind == "speech"]
    documents = [positions(sample) for sample in samples]
    if room:
        documents.append(room)
    return [M.convolved(n) for n in clips], documents


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
        queries, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))
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
    row = {
        "type": name_of(dtype),
        "D": D,
        "causal": causal,
        "heads": list(heads),
        "repeats identical": identical}
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
          f"{repeats}{failed}")


def measure_correctness() -> dict:
    print("\ncorrectness: largest error over (2 x naive error of the same type + one unit in the last "
          "place); <= 1 is wanted")
    print(f"  {'type':9}{'D':>4} {'causal':7}{'heads':9}{'out':>6}{'dq':>6}{'dk':>6}{'dv':>6}  "
          f"{'relative':>9}  repeats")
    rows = []
    for dtype in (*HALVES, torch.float32):
        cases = [(False, (4, 4)), (True, (14, 2)), (True, (4, 4))]
        if DRY or dtype == torch.float32:
            cases = cases[:2]
        for D in M.HEAD_SIZES[:2] if DRY else M.HEAD_SIZES:
            for causal, heads in cases:
                name = f"correct {dtype} {D} {causal} {heads}"
                row = guarded(name, check_configuration, dtype, D, causal, heads)
                if row:
                    rows.append(row)
                    show_configuration(row)
    no_waiting = bool(guarded("no waiting", check_no_waiting))
    passed = sum(row["passed"] for row in rows)
    waits = "no synchronisation" if no_waiting else "SYNCHRONISES"
    print(f"  {passed} of {len(rows)} passed; {waits}")
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


def attention_flops(lengths: list[int], heads: int, D: int, causal: bool, backward: bool) -> float:
    """Products of matrices: two in the forward pass, five more in the backward pass; half if causal."""
    work = sum(n * n for n in lengths) * 4 * D * heads
    if backward:
        work *= 3.5
    return work / 2 if causal else work


def ours(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
    cu_seqlens = bounds(lengths)
    if M.uses_kernel(DEVICE, 64):            # as every head size timed here
        tiles = M.fused_tiles(cu_seqlens, causal, sum(lengths))
        return lambda q, k, v: M.fused_attention(q, k, v, cu_seqlens, causal, tiles)
    return lambda q, k, v: M.bucketed_attention(q, k, v, cu_seqlens, causal)


def flash(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
    from torch.nn.attention.varlen import varlen_attn
    cu_seqlens = bounds([n for n in lengths if n])
    longest = max(lengths)
    window = (-1, 0) if causal else (-1, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window)

    return attend


def flash_repeated(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
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
    lengths = [n for n in lengths if n]
    longest = max(lengths)
    is_real = torch.arange(longest, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    mask = None if causal or bool(is_real.all()) else is_real[:, None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=Hq != Hkv)

    attend.padded = (len(lengths), longest)
    return attend


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
    timer: Callable = milliseconds


def time_peer(name: str, make: Callable, case: Case) -> dict:
    """{pass: milliseconds} of one implementation, and the backend it turned out to use."""
    attend = make(case.lengths, case.causal, case.Hq, case.Hkv)
    (q, k, v), dout = draw_inputs(sum(case.lengths), case.Hq, case.Hkv, case.D, HALVES[0])
    if hasattr(attend, "padded"):
        n, longest = attend.padded
        heads = (case.Hq, case.Hkv, case.Hkv, case.Hq)
        q, k, v, dout = (torch.randn(n, h, longest, case.D, device=DEVICE).to(HALVES[0]) for h in heads)
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


def time_peers(case: Case) -> dict:
    if DRY:
        case = dataclasses.replace(case, Hq=2, Hkv=2 * case.Hkv // case.Hq or 1)
    row = {
        "case": case.name,
        "D": case.D,
        "heads": [case.Hq, case.Hkv],
        "causal": case.causal,
        "positions": sum(case.lengths),
        "documents": len(case.lengths),
        "longest": max(case.lengths),
        "times": {}}
    for name, make in PEERS.items():
        times = guarded(f"{case.name} D={case.D} causal={case.causal} {name}", time_peer, name, make, case)
        if times is None and name == "flash-2" and case.Hq != case.Hkv:
            times = guarded(f"{case.name} D={case.D} {name} repeated", time_peer, name, flash_repeated, case)
            if times:
                times["backend"] = "key-value heads repeated"
        if times:
            row["times"][name] = times
    cells = ""
    for direction in ("forward", "both"):
        work = attention_flops(case.lengths, case.Hq, case.D, case.causal, direction == "both")
        teraflops = {name: work / times[direction] / 1e9 for name, times in row["times"].items()}
        row[direction] = teraflops           # per second
        cells += "".join(f"{row[direction].get(name, math.nan):9.0f}" for name in PEERS)
    backend = row["times"].get("padded sdpa", {}).get("backend", "")
    print(f"  {case.name:26}{case.D:4} {str(case.causal):6}{cells}   {backend}", flush=True)
    return row


def pack_cases() -> list[Case]:
    """Packs like real samples: the LLM's of three, and the clips of one, which Flex compiles anew."""
    length = 200 if DRY else 8192
    cases = []
    for seed in range(1 if DRY else 3):
        _, documents = document_lengths(seed, length)
        cases.append(Case(f"pack {seed}, 14/2, replayed", documents, True, 14, 2, 64, replayed))
    clips, documents = document_lengths(0, length)
    if clips:
        cases.append(Case("clips of pack 0, replayed", clips, False, 12, 12, 64, replayed))
        cases.append(Case("clips of a pack, launched", clips, False, 12, 12, 64))
    cases.append(Case("pack, 14/2, launched", documents, True, 14, 2, 64))
    cases.append(Case("pack, 28/4, replayed", documents, True, 28, 4, 128, replayed))
    return cases


def fixed_cases() -> list[Case]:
    """Documents of one length, 16,384 positions of them."""
    total = 128 if DRY else 16384
    cases = []
    for D in (64, 128):
        heads = 2 if DRY else 2048 // D
        for causal in (True,) if DRY else (True, False):
            for length in (128,) if DRY else (512, 1024, 2048, 4096, 8192, 16384):
                count = total // length
                cases.append(Case(f"{count} x {length}", [length] * count, causal, heads, heads, D))
    return cases


def measure_kernel() -> dict:
    names = "".join(f"{name[:8]:>9}" for name in PEERS)
    print("\nattention, TFLOP/s of the work that documents need" + " " * 4 + "forward" + " " * 31
          + "forward + backward")
    print(f"  {'case':26}{'D':>4} {'causal':6}{names}{names}   sdpa is")
    rows = [time_peers(case) for case in pack_cases()]
    for case in fixed_cases():
        if not late():
            rows.append(time_peers(case))
    real = [row for row in rows if "pack" in row["case"] and "replayed" in row["case"]]
    ratios = {}
    for peer in ("flash-2", "flex", "padded sdpa"):
        for direction in ("forward", "both"):
            rates = [row[direction] for row in real if {"ours", peer} <= row[direction].keys()]
            times = [rate["ours"] / rate[peer] for rate in rates]
            ratios[f"{peer}, {direction}"] = statistics.geometric_mean(times) if times else None
    shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio)
    print(f"  times as fast on packs, geometric mean: {shown}")
    at_8k = {row["D"]: row["forward"].get("ours") for row in rows
             if row["longest"] == 8192 and not row["causal"]}
    print(f"  forward at 8192: {at_8k} TFLOP/s (wanted 380 at 64, 430 at 128)")
    return {"rows": rows, "ratios on packs": ratios}


SHAPES = [                                   # rows, columns, warps, loads in flight
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 64, 4, 2),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (128, 32, 8, 2),
    (128, 32, 4, 3),
    (128, 64, 8, 2),
    (64, 32, 4, 2),
    (128, 64, 8, 1)]


def sweep_cases() -> list[Case]:
    _, documents = document_lengths(0, 200 if DRY else 8192)
    if DRY:
        return [Case("pack", documents, True, 2, 1, 16, replayed)]
    cases = [
        Case("pack", documents, True, 14, 2, 64, replayed),
        Case("pack", documents, True, 28, 4, 128, replayed)]
    for D in (64, 128):
        cases.append(Case("2 x 8192", [8192] * 2, True, 2048 // D, 2048 // D, D, replayed))
    return cases


def measure_sweep() -> dict:
    """Other tile sizes on a real pack and at 8192; those in inserter.py stand first."""
    kept = M.tile_shape
    kernels = {"forward": M.forward_kernel, "queries": M.query_gradient, "keys": M.key_gradient}
    rows = []

    def try_shape(case: Case, kernel_name: str, shape: tuple | None) -> None:
        kernel = kernels[kernel_name]
        M.tile_shape = lambda which, D, dtype: shape if shape and which is kernel else kept(which, D, dtype)
        name = f"{case.name} {case.D} {kernel_name} {shape or kept(kernel, case.D, HALVES[0])}"
        times = guarded(f"sweep {name}", time_peer, "ours", ours, case)
        if times:
            rows.append({"case": case.name, "D": case.D, "kernel": kernel_name, "shape": shape, **times})
            own = "" if shape else "   as in inserter.py"
            print(f"  {name:50} forward {times['forward']:.3f} ms, both {times['both']:.3f} ms{own}")

    try:
        for case in sweep_cases():
            for kernel_name in kernels:
                for shape in [None, *SHAPES[:1 if DRY else None]]:
                    if not late():
                        try_shape(case, kernel_name, shape)
    finally:
        M.tile_shape = kept
    return {"rows": rows}


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


def make_sample(sample: Sample, config: Qwen2AudioConfig, rng: np.random.Generator) -> Made:
    """(ids, labels, clips) of a drawn sample: noise for speech, random words; all text is a target."""
    audio = config.audio_token_index
    ids, is_target, clips = [], [], []
    for kind, n in sample:
        if kind == "text":
            ids += rng.integers(0, config.text_config.vocab_size - 3, n).tolist()
            is_target += [True] * n
        else:
            clips.append((0.1 * rng.standard_normal(samples_in(n))).astype(np.float32))
            heard = M.audio_positions(len(clips[-1]))
            ids += [audio - 2] + [audio] * heard + [audio - 1]
            is_target += [False] * (heard + 2)
    ids.append(0)
    is_target.append(True)
    labels = [i if target else M.IGNORE for i, target in zip(ids[1:], is_target[1:])]
    return ids, [*labels, M.IGNORE], clips


def our_pack(samples: list[Made], room: int) -> M.Pack:
    """A pack as the lanes of inserter.py make it."""
    documents = [M.Encoded("sample", ids, labels, clips, []) for ids, labels, clips in samples]
    return M.packed(documents, ctc=False, waste=room, skipped=[], cursor={})


def their_batches(samples: list[Made], config: Qwen2AudioConfig, at_once: int) -> list[dict[str, Tensor]]:
    """The same samples for transformers, sorted by length to spare padding; features are made untimed."""
    extract = WhisperFeatureExtractor(config.audio_config.num_mel_bins)
    samples = sorted(samples, key=lambda made: len(made[0]))
    batches = []
    for start in range(0, len(samples), at_once):
        some = samples[start:start + at_once]
        ids = [torch.tensor(ids) for ids, _, _ in some]
        labels = [torch.tensor([M.IGNORE, *labels[:-1]]) for _, labels, _ in some]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=M.IGNORE)}
        clips = [clip for _, _, clips in some for clip in clips]
        if clips:
            heard = extract(clips, sampling_rate=M.RATE, return_tensors="pt", return_attention_mask=True)
            batch["input_features"] = heard.input_features
            batch["feature_attention_mask"] = heard.attention_mask
        batches.append({name: x.to(DEVICE) for name, x in batch.items()})
    return batches


def timed_steps(step: Callable, count: int) -> tuple[float, float]:
    """Median seconds of a step and its largest memory in GB, after warm-up."""
    for _ in range(1 if DRY else 3):
        step()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(count):
        synchronise()
        begun = time.perf_counter()
        step()
        synchronise()
        seconds.append(time.perf_counter() - begun)
    memory = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0
    return statistics.median(seconds), memory


def mixed_precision() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)


def measure_ours(model: M.InSerter, packs: list[M.Pack], checkpointing: bool, compiled: bool) -> dict:
    model.recompute = checkpointing
    if compiled:
        for block in [*model.audio_tower.layers, *model.language_model.model.layers]:
            block.compile(backend="eager" if DRY else "inductor")
    optimizer = optimizer_of(model)
    turn = iter(packs * 99)
    torch._dynamo.utils.counters.clear()

    def step() -> None:
        with mixed_precision():
            loss = model(**M.batch_of([next(turn)]), chunk=2048)
        (loss / packs[0].supervised).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds, memory = timed_steps(step, 1 if DRY else 8)
    work = statistics.mean(M.step_flops(model, pack) for pack in packs)
    row = {
        "checkpointing": checkpointing,
        "compiled": compiled,
        "compilations": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "seconds": seconds,
        "MFU": work / seconds / PEAK,
        "TFLOP": work / 1e12,
        "peak GB": memory,
        "tokens/s": statistics.mean(len(pack.ids) for pack in packs) / seconds,
        "audio s/s": statistics.mean(len(pack.audio) for pack in packs) / M.RATE / seconds}
    how = "ours"
    if checkpointing:
        how += ", checkpointing"
    if compiled:
        how += f", compiled {row['compilations']} x"
    print(f"  {how:34} {seconds:.4f} s | MFU {row['MFU']:.1%} | {row['tokens/s']:,.0f} tokens/s | "
          f"{row['audio s/s']:,.0f} audio s/s | {memory:.1f} GB", flush=True)
    return row


def measure_theirs(peer: nn.Module, samples: list[Made], config: Qwen2AudioConfig, packs: int,
                   at_once: int) -> dict:
    """All packs' samples in one step, over micro-batches."""
    batches = their_batches(samples, config, at_once)
    optimizer = optimizer_of(peer)

    def step() -> None:
        for batch in batches:
            with mixed_precision():
                loss = peer(**batch).loss
            (loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds, memory = timed_steps(step, 1 if DRY else 3)
    how = f"transformers, {at_once} samples at once"
    print(f"  {how:34} {seconds / packs:.4f} s a pack | {memory:.1f} GB", flush=True)
    return {"at once": at_once, "seconds": seconds / packs, "peak GB": memory}


def padded_flops(samples: list[Made], model: M.InSerter) -> float:
    """A step's work when every clip lasts 30 s and logits are made at every position."""
    total = 0.0
    for ids, _, clips in samples:
        pack = our_pack([(ids, [0] * len(ids), [])], 0)
        total += M.step_flops(model, dataclasses.replace(pack, clip_samples=[M.LONGEST] * len(clips)))
    return total


def count_operations() -> dict:
    """Shares of a step's operations: of its time, if all took the same; attention takes more."""
    with torch.device("meta"):
        model = M.InSerter(step_config())
    rng = np.random.default_rng(0)
    sums = Counter()
    n = 8
    for seed in range(n):
        drawn, room = draw_pack(random.Random(seed), PACK_LENGTH)
        pack = our_pack([make_sample(sample, model.config, rng) for sample in drawn], room)
        alone = list(range(len(pack.ids) + 1))           # every position a document of its own
        without = {
            "LM head": dataclasses.replace(pack, supervised=0),
            "encoder and adapter": dataclasses.replace(pack, clip_samples=[]),
            "LLM, attention": dataclasses.replace(pack, cu_seqlens=alone)}
        total = M.step_flops(model, pack)
        for name, rest in without.items():
            sums[name] += total - M.step_flops(model, rest)
        sums["all"] += total
    sums["LLM, matrices"] = 2 * sums["all"] - sum(sums.values())
    results = {name: {"TFLOP a pack": work / n / 1e12, "share": work / sums["all"]}
               for name, work in sums.items()}
    shown = [f"{name} {row['TFLOP a pack']:.1f} TFLOP ({row['share']:.0%})" for name, row in results.items()]
    print("\noperations of a step: " + ", ".join(shown))
    return results


def models_for_step(config: Qwen2AudioConfig) -> tuple[M.InSerter, nn.Module, int]:
    """Ours and transformers', of the same random weights; and how many names have no counterpart."""
    with torch.device("meta"):
        model = M.InSerter(config)
    model = model.to_empty(device=DEVICE)
    model.tie()
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
    for name, p in peer.named_parameters():
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


def compare_losses(model: M.InSerter, peer: nn.Module, samples: list[Made]) -> dict:
    """Mean losses of the four shortest samples in float32."""
    few = sorted(samples, key=lambda made: len(made[0]))[:4]
    pack = our_pack(few, 0)
    torch.backends.cudnn.allow_tf32 = False              # their convolutions would be rounded to 10 bits
    with torch.no_grad():
        mine = float(model(**M.batch_of([pack]), chunk=2048)) / pack.supervised
        other = float(peer(**their_batches(few, model.config, 4)[0]).loss)
    agree = abs(mine - other) < 1e-3
    print(f"  losses of four samples in float32: {mine:.6f} and {other:.6f}{'' if agree else '  DIFFER'}")
    return {"ours": mine, "transformers": other, "agree": agree}


def measure_step() -> dict:
    config = step_config()
    rng = np.random.default_rng(0)
    drawn = [draw_pack(random.Random(seed), PACK_LENGTH) for seed in range(1 if DRY else 2)]
    made = [[make_sample(sample, config, rng) for sample in samples] for samples, _ in drawn]
    packs = [our_pack(some, room) for some, (_, room) in zip(made, drawn)]
    samples = [sample for some in made for sample in some]
    model, peer, unmatched = models_for_step(config)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    clips = statistics.mean(len(pack.clip_samples) for pack in packs)
    seconds = statistics.mean(len(pack.audio) for pack in packs) / M.RATE
    print(f"\ntraining step: {count / 1e6:.0f} M parameters, packs of {PACK_LENGTH}, {clips:.0f} clips and "
          f"{seconds:.0f} s of speech a pack, AdamW, bfloat16 autocast")
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
            row = guarded(f"their step {at_once}", measure_theirs, peer, samples, config, len(packs), at_once)
            if row:
                results["transformers"].append(row)
    if results["ours"] and results["transformers"]:
        best, theirs = (min(row["seconds"] for row in results[who]) for who in ("ours", "transformers"))
        results["ratio"] = theirs / best
        results["by FLOPs"] = padded_flops(samples, model) / sum(M.step_flops(model, pack) for pack in packs)
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
    steps = 2 if DRY else 200
    settings = [
        "run=gpu",
        f"data={folder / 'data'}",
        "synth.documents=2000",
        "synth.held_out_documents=40",
        "synth.shard_documents=500",
        "synth.shards={interleaved: 1, tasks: 1, text: 1, chat: 1}",
        "train.eval_samples=8"]
    for stage in ("warmup_hear", "warmup_text", "warmup_speech", "pretrain", "sft"):
        settings.append(f"train.stages.{stage}.steps={steps}")
    begun = time.perf_counter()
    command = [sys.executable, str(ROOT / "inserter.py"), *settings]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    lines = done.stdout.splitlines()
    print("\n" + "\n".join([*lines[:3], *lines[-6:]]))
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


def main(arguments: list[str]) -> int:
    if not arguments:
        print("Give the folder for gpu.json: python tests/gpu.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).resolve()
    measures = {
        "correct": measure_correctness,
        "kernel": measure_kernel,
        "operations": count_operations,
        "step": measure_step,
        "tiny": partial(measure_tiny, folder),
        "sweep": measure_sweep}
    chosen = arguments[1:] or [name for name in measures if name != "sweep"]
    needs_gpu = set(chosen) != {"operations"}
    if not DRY and needs_gpu and not torch.cuda.is_available():
        print("tests/gpu.py needs a CUDA GPU, and torch finds none here.", file=sys.stderr)
        return 2
    unknown = [name for name in chosen if name not in measures]
    if unknown:
        print(f"{unknown[0]} is none of {', '.join(measures)}.", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    if needs_gpu:
        measures["machine"] = about_machine
        chosen = ["machine", *chosen]
    for name in chosen:
        if late():
            RESULTS["errors"][name] = "left out: no time"
            continue
        RESULTS[name] = guarded(name, measures[name])
        RESULTS["seconds"] = time.perf_counter() - BEGUN
        (folder / "gpu.json").write_text(json.dumps(RESULTS, indent=1) + "\n")
    errors = RESULTS["errors"]
    names = f": {', '.join(errors)}" if errors else ""
    print(f"\n{RESULTS['seconds']:.0f} s, {len(errors)} failures{names}; {folder.name}/gpu.json is written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
