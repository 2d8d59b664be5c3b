"""Everything that needs a GPU, in one run of at most 9 minutes: tables on the screen, gpu.json in FOLDER.

    python tests/gpu.py FOLDER [correct] [kernel] [operations] [step] [tiny] [sweep]       (without a choice all but sweep)

correct  every configuration in bfloat16 and float16 against float32, bit-identical repeats, no waiting for the GPU
kernel   attention on packs like real samples and at fixed lengths, against FlashAttention-2 (torch's varlen_attn),
         FlexAttention compiled with a document mask, and padded SDPA
operations   what share of a training step's operations each part has; needs no GPU
step     a training step of Whisper-small + Qwen2.5-0.5B sizes in packs of 8192 against transformers' Qwen2-Audio
tiny     synthesis and training of the tiny world, a few steps, end to end
sweep    other tile sizes than those in inserter.py

Clips and documents are drawn here, from a seed; nothing is read or downloaded. Without a GPU, but for operations: one sentence, status 2.
INSERTER_DRY=1 walks through all of it on a CPU at toy sizes, to see that this file works; its numbers mean nothing.
"""
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import inserter as M                                    # noqa: E402

DRY = os.environ.get("INSERTER_DRY") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
SECONDS = 510                                           # no new row is begun later than this
BEGUN = time.perf_counter()
RESULTS = {"command": "python tests/gpu.py FOLDER", "dry": DRY, "errors": {}}
HALVES = (torch.float16,) if DRY else (torch.bfloat16, torch.float16)
PEAK = M.PEAK_FLOPS                                     # of dense bfloat16, by the datasheet


def late():
    return time.perf_counter() - BEGUN > SECONDS


def guarded(name, function, *arguments):
    """function(*arguments), or None if it fails: the failure is kept and printed, and the rest goes on."""
    try:
        return function(*arguments)
    except Exception as error:                          # whatever it is, the other parts are still worth having
        RESULTS["errors"][name] = traceback.format_exc()[-3000:]
        print(f"  {name} failed: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}")
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        return None


# ---- samples: how long clips and documents are ----

def draw_sample(rng):
    """Clips' seconds and texts' tokens of one sample, in turn: [("text", 31), ("speech", 3.2), ("text", 58), …].

    Shares of positions as in the paper's mix; utterances of a few seconds with a long tail, as in read speech.
    """
    def seconds():
        return min(max(rng.lognormvariate(1.2, 0.6), 0.8), 28.0)
    kind = rng.choices(["interleaved", "task", "text"], [0.35, 0.45, 0.2])[0]
    if kind == "task":
        length = min(3 * seconds(), 28.0)
        return [("speech", length), ("text", max(4, round(3.3 * length)))]
    if kind == "text":
        return [("text", round(min(max(rng.lognormvariate(6.0, 0.9), 16), 3000)))]
    parts = [("text", rng.randint(8, 60))]
    for _ in range(rng.randint(1, 8)):
        parts += [("speech", seconds()), ("text", rng.randint(8, 60))]
    return parts


def positions(sample):
    return sum(n if kind == "text" else M.audio_positions(round(n * M.RATE)) + 2 for kind, n in sample) + 1


def draw_pack(rng, length):
    """Samples that fit into a pack of `length` positions, and the positions left over."""
    samples, left = [], length
    while True:
        sample = draw_sample(rng)
        if positions(sample) > length:                  # longer than a pack: left out
            continue
        if positions(sample) > left:
            return samples, left
        samples.append(sample)
        left -= positions(sample)


def document_lengths(seed, length):
    """(encoder frames of every clip, positions of every document, the rest as one more) of one pack."""
    samples, left = draw_pack(random.Random(seed), length)
    clips = [round(n * M.RATE) for s in samples for kind, n in s if kind == "speech"]
    return M.Encoder.lengths(clips), [positions(s) for s in samples] + [left] * (left > 0)


def bounds(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE)


def draw_inputs(T, Hq, Hkv, D, dtype, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    q, k, v, dout = (torch.randn(T, h, D, generator=g, device=DEVICE).to(dtype) for h in (Hq, Hkv, Hkv, Hq))
    return [x.requires_grad_() for x in (q, k, v)], dout


# ---- correctness ----

def naive(q, k, v, cu, causal):
    """The definition, in the type of its arguments."""
    out, group = [], q.shape[1] // k.shape[1]
    for a, b in zip(cu.tolist(), cu.tolist()[1:]):
        x, y, z = (t[a:b].transpose(0, 1) for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
        s = x @ y.transpose(1, 2) / q.shape[2] ** 0.5
        s = s.masked_fill(torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).triu(1), -torch.inf) if causal else s
        out.append((s.softmax(-1) @ z).transpose(0, 1))
    return torch.cat(out)


def all_four(function, inputs, dout):
    """Output and three gradients, into memory that was full of NaN."""
    if DEVICE.type == "cuda":
        poison = [torch.full((64 * 2 ** 20,), torch.nan, device=DEVICE) for _ in range(4)]
        del poison
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def check_configuration(dtype, D, causal, heads):
    rng = random.Random(D)
    lengths = [0, 1, 3, 300, 0, 129] + [rng.randint(1, 40 if DRY else 900) for _ in range(2 if DRY else 6)]
    cu = bounds(lengths)
    inputs, dout = draw_inputs(sum(lengths), *heads, D, dtype)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    exact = all_four(partial(naive, cu=cu, causal=causal), [x.to(wide) for x in inputs], dout.to(wide))
    same_type = all_four(partial(naive, cu=cu, causal=causal), inputs, dout)
    runs = [all_four(partial(M.fused_attention, cu_seqlens=cu, causal=causal), inputs, dout) for _ in range(3)]
    row = {"type": str(dtype)[6:], "D": D, "causal": causal, "heads": list(heads),
           "repeats identical": all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))}
    for name, a, n, e in zip(("out", "dq", "dk", "dv"), runs[0], same_type, exact):
        last = 2.0 ** math.floor(math.log2(e.abs().max().item())) * torch.finfo(dtype).eps
        error, bound = (a.to(wide) - e).abs().max().item(), 2 * (n.to(wide) - e).abs().max().item() + last
        row[name] = {"relative": ((a.to(wide) - e).norm() / e.norm()).item(), "of bound": error / bound if error == error else math.inf}
    row["passed"] = row["repeats identical"] and all(row[name]["of bound"] <= 1 for name in ("out", "dq", "dk", "dv"))
    return row


def check_no_waiting():
    """Tables of tiles and kernels, forward and backward, without one synchronisation (any would raise)."""
    cu = bounds([300, 0, 77])
    inputs, dout = draw_inputs(377, 4, 2, 64, HALVES[0])
    step = partial(all_four, partial(M.fused_attention, cu_seqlens=cu, causal=True), inputs, dout)
    step()
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return True


def measure_correctness():
    rows = []
    print("\ncorrectness: largest error over (2 x naive error of the same type + one unit in the last place); <= 1 is wanted")
    print(f"  {'type':9}{'D':>4} {'causal':7}{'heads':9}{'out':>6}{'dq':>6}{'dk':>6}{'dv':>6}  {'relative':>9}  repeats")
    for dtype in (*HALVES, torch.float32):
        for D in M.HEAD_SIZES[:2] if DRY else M.HEAD_SIZES:
            for causal, heads in ((False, (4, 4)), (True, (14, 2)), (True, (4, 4)))[:2 if DRY or dtype == torch.float32 else 3]:
                if row := guarded(f"correct {dtype} {D} {causal} {heads}", check_configuration, dtype, D, causal, heads):
                    rows.append(row)
                    shares = "".join(f"{row[n]['of bound']:6.2f}" for n in ("out", "dq", "dk", "dv"))
                    relative = max(row[n]["relative"] for n in ("out", "dq", "dk", "dv"))
                    print(f"  {row['type']:9}{D:4} {str(causal):7}{'/'.join(map(str, heads)):9}{shares}  {relative:9.1e}  "
                          f"{'identical' if row['repeats identical'] else 'DIFFER'}{'' if row['passed'] else '  FAILED'}")
    waited = guarded("no waiting", check_no_waiting)
    print(f"  {sum(r['passed'] for r in rows)} of {len(rows)} passed; " + ("no synchronisation" if waited else "SYNCHRONISES"))
    return {"rows": rows, "no synchronisation": bool(waited)}


# ---- the kernel against what one would pick otherwise ----

def milliseconds(function):
    """Median time of a call, by events around it, the L2 cache emptied before each."""
    if DRY:
        begin = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - begin)
    return M.triton.testing.do_bench(function, warmup=20, rep=60, return_mode="median")


def replayed(function):
    """Time of a call without the CPU's share: a captured graph, replayed."""
    if DRY:
        return milliseconds(function)
    try:
        return M.triton.testing.do_bench_cudagraph(function, rep=40, return_mode="median")
    except RuntimeError as error:                       # some cannot be captured: then with the CPU's share
        RESULTS["errors"]["replay"] = str(error)[:300]
        torch.cuda.synchronize()
        return milliseconds(function)


def attention_flops(lengths, heads, D, causal, backward):
    """Products of matrices: two in the forward pass, five more in the backward pass; a causal document has half."""
    return sum(n * n for n in lengths) * 4 * D * heads * (3.5 if backward else 1) / (2 if causal else 1)


def ours(lengths, causal, Hq, Hkv):
    cu = bounds(lengths)
    tiles = M.fused_tiles(cu, causal, sum(lengths)) if M.fused_here(DEVICE, 64) else None
    return lambda q, k, v: M.attention(q, k, v, cu, causal, tiles)


def flash(lengths, causal, Hq, Hkv):
    from torch.nn.attention.varlen import varlen_attn
    cu, longest = bounds([n for n in lengths if n]), max(lengths)
    window = (-1, 0) if causal else (-1, -1)
    return lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window)


def flash_repeated(lengths, causal, Hq, Hkv):
    call = flash(lengths, causal, Hq, Hkv)
    return lambda q, k, v: call(q, *(x.repeat_interleave(Hq // Hkv, 1) for x in (k, v)))


FLEX = {}


def flex(lengths, causal, Hq, Hkv):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    document = torch.repeat_interleave(torch.arange(len(lengths), device=DEVICE), torch.tensor(lengths, device=DEVICE))

    def seen(b, h, query, key):
        same = document[query] == document[key]
        return same & (key <= query) if causal else same
    torch._dynamo.config.recompile_limit = 64
    T, compiled = sum(lengths), FLEX.setdefault("attention", flex_attention if DRY else torch.compile(flex_attention, dynamic=False))
    mask = create_block_mask(seen, None, None, T, T, device=DEVICE)

    def call(q, k, v):
        return compiled(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, enable_gqa=Hq != Hkv)[0].transpose(0, 1)
    return call


def padded_sdpa(lengths, causal, Hq, Hkv):
    """Documents padded to the longest; gathering them is not part of the time: this is attention alone."""
    lengths, longest = [n for n in lengths if n], max(lengths)
    real = torch.arange(longest, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    mask = None if causal or bool(real.all()) else real[:, None, None]

    def call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=Hq != Hkv)
    call.padded = (len(lengths), longest)
    return call


def longest_kernel(function):
    """Name of the GPU kernel that takes most of a call's time: it tells SDPA's backend."""
    if DRY:
        return "cpu"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize()
    name = max(seen.key_averages(), key=lambda e: e.self_device_time_total).key.lower()
    return next((b for b in ("cudnn", "flash", "fmha_cutlass", "efficient", "math") if b in name), name[:40])


PEERS = {"ours": ours, "flash-2": flash, "flex": flex, "padded sdpa": padded_sdpa}


def time_peer(name, make, lengths, causal, Hq, Hkv, D, timer):
    """{pass: milliseconds} of one implementation, and the backend it turned out to use."""
    call = make(lengths, causal, Hq, Hkv)
    (q, k, v), dout = draw_inputs(sum(lengths), Hq, Hkv, D, HALVES[0])
    if hasattr(call, "padded"):
        n, longest = call.padded
        q, k, v, dout = (torch.randn(n, h, longest, D, device=DEVICE).to(HALVES[0]) for h in (Hq, Hkv, Hkv, Hq))
        q, k, v = (x.requires_grad_() for x in (q, k, v))

    def forward():
        with torch.no_grad():
            return call(q, k, v)

    def both():
        return torch.autograd.grad(call(q, k, v), (q, k, v), dout)
    row = {"forward": timer(forward), "both": timer(both)}
    return row | ({"backend": longest_kernel(forward)} if name == "padded sdpa" else {})


def time_peers(case, lengths, causal, Hq, Hkv, D, timer=milliseconds):
    if not lengths:
        return None
    if DRY:
        Hq, Hkv = 2, 2 * Hkv // Hq or 1
    row = {"case": case, "D": D, "heads": [Hq, Hkv], "causal": causal, "positions": sum(lengths), "documents": len(lengths),
           "longest": max(lengths), "times": {}}
    for name, make in PEERS.items():
        arguments = (lengths, causal, Hq, Hkv, D, timer)
        times = guarded(f"{case} D={D} causal={causal} {name}", time_peer, name, make, *arguments)
        if times is None and name == "flash-2" and Hq != Hkv:
            times = guarded(f"{case} D={D} {name} repeated", time_peer, name, flash_repeated, *arguments)
            times = times and times | {"backend": "key-value heads repeated"}
        if times:
            row["times"][name] = times
    for part in ("forward", "both"):
        work = attention_flops(lengths, Hq, D, causal, part == "both")
        row[part] = {name: work / times[part] / 1e9 for name, times in row["times"].items()}          # TFLOP/s
    cells = "".join(f"{row[part].get(name, math.nan):9.0f}" for part in ("forward", "both") for name in PEERS)
    print(f"  {case:26}{D:4} {str(causal):6}{cells}   {row['times'].get('padded sdpa', {}).get('backend', '')}", flush=True)
    return row


def measure_kernel():
    print("\nattention, TFLOP/s of the work that documents need" + " " * 4 + "forward" + " " * 31 + "forward + backward")
    print(f"  {'case':26}{'D':>4} {'causal':6}" + 2 * "".join(f"{name[:8]:>9}" for name in PEERS) + "   sdpa is")
    length, rows = 200 if DRY else 8192, []
    for seed in range(1 if DRY else 3):
        rows.append(time_peers(f"pack {seed}, 14/2, replayed", document_lengths(seed, length)[1], True, 14, 2, 64, replayed))
    frames, documents = document_lengths(0, length)     # one pack's clips: every new number of frames has Flex compiled anew
    rows.append(time_peers("clips of pack 0, replayed", frames, False, 12, 12, 64, replayed))
    rows.append(time_peers("clips of a pack, launched", frames, False, 12, 12, 64))
    rows.append(time_peers("pack, 14/2, launched", documents, True, 14, 2, 64))
    rows.append(time_peers("pack, 28/4, replayed", documents, True, 28, 4, 128, replayed))
    total = 128 if DRY else 16384
    for D in (64, 128):
        for causal in (True,) if DRY else (True, False):
            for length in (128,) if DRY else (512, 1024, 2048, 4096, 8192, 16384):
                if not late():
                    heads = 2 if DRY else 2048 // D
                    rows.append(time_peers(f"{total // length} x {length}", [length] * (total // length), causal, heads, heads, D))
    rows = [r for r in rows if r]
    real = [r for r in rows if "pack" in r["case"] and "replayed" in r["case"]]
    ratios = {}
    for peer in ("flash-2", "flex", "padded sdpa"):
        for part in ("forward", "both"):
            some = [r[part]["ours"] / r[part][peer] for r in real if peer in r[part] and "ours" in r[part]]
            ratios[f"{peer}, {part}"] = statistics.geometric_mean(some) if some else None
    print("  times as fast on packs, geometric mean: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items() if v))
    at_8k = {r["D"]: r["forward"].get("ours") for r in rows if r["longest"] == 8192 and not r["causal"]}
    print(f"  forward at 8192: {at_8k} TFLOP/s (wanted 380 at 64, 430 at 128)")
    return {"rows": rows, "ratios on packs": ratios}


def measure_sweep():
    """Other tile sizes on a real pack and at 8192; those in inserter.py stand first."""
    kept, rows = M.tile_shape, []
    kernels = {"forward": M.forward_kernel, "queries": M.query_gradient, "keys": M.key_gradient}
    choices = [(128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2),
               (128, 32, 8, 2), (128, 32, 4, 3), (128, 64, 8, 2), (64, 32, 4, 2), (128, 64, 8, 1)]
    _, documents = document_lengths(0, 200 if DRY else 8192)
    cases = [("pack", documents, True, 14, 2, 64), ("pack", documents, True, 28, 4, 128)]
    cases = [("pack", documents, True, 2, 1, 16)] if DRY else cases
    cases += [("2 x 8192", [8192] * 2, True, 2048 // D, 2048 // D, D) for D in (64, 128)] * (not DRY)
    try:
        for case, lengths, causal, Hq, Hkv, D in cases:
            for part, kernel in kernels.items():
                for shape in [None, *choices[:1 if DRY else None]]:
                    if late():
                        break
                    M.tile_shape = lambda which, d, dtype: shape if shape and which is kernel else kept(which, d, dtype)
                    name = f"{case} {D} {part} {shape or kept(kernel, D, HALVES[0])}"
                    if times := guarded(f"sweep {name}", time_peer, "ours", ours, lengths, causal, Hq, Hkv, D, replayed):
                        rows.append({"case": case, "D": D, "kernel": part, "shape": shape, **times})
                        print(f"  {name:50} forward {times['forward']:.3f} ms, both {times['both']:.3f} ms{'' if shape else '   as in inserter.py'}")
    finally:
        M.tile_shape = kept
    return {"rows": rows}


# ---- a training step against transformers ----

def step_config():
    """Whisper-small and Qwen2.5-0.5B; untied, so that both sides train the same parameters."""
    from transformers import Qwen2AudioConfig
    a, t = (768, 12, 12, 80), (896, 24, 14, 2, 4864, 151936)
    if DRY:
        a, t = (32, 1, 2, 80), (64, 1, 4, 2, 64, 128)
    return Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "d_model": a[0], "encoder_layers": a[1], "encoder_attention_heads": a[2],
                      "encoder_ffn_dim": 4 * a[0], "num_mel_bins": a[3]},
        text_config={"model_type": "qwen2", "hidden_size": t[0], "num_hidden_layers": t[1], "num_attention_heads": t[2],
                     "num_key_value_heads": t[3], "intermediate_size": t[4], "vocab_size": t[5], "tie_word_embeddings": False,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        audio_token_index=t[5] - 1)


def make_sample(sample, config, rng):
    """(ids, labels, clips) of a drawn sample: noise for speech, random words; all text is a target."""
    audio, ids, target, clips = config.audio_token_index, [], [], []
    for kind, n in sample:
        if kind == "text":
            ids += rng.integers(0, config.text_config.vocab_size - 3, n).tolist()
            target += [True] * n
        else:
            clips.append((0.1 * rng.standard_normal(round(n * M.RATE))).astype(np.float32))
            heard = M.audio_positions(len(clips[-1]))
            ids += [audio - 2] + [audio] * heard + [audio - 1]
            target += [False] * (heard + 2)
    ids, target = ids + [0], target + [True]
    return ids, [i if t else M.IGNORE for i, t in zip(ids[1:], target[1:])] + [M.IGNORE], clips


def our_pack(samples, left):
    """A pack as the lanes of inserter.py make it."""
    documents = [M.Encoded("sample", ids, labels, clips, []) for ids, labels, clips in samples]
    return M.packed(documents, False, left, [], {})


def their_batches(samples, config, at_once):
    """The same samples for transformers, sorted by length to spare padding; features are made beforehand, untimed."""
    from transformers import WhisperFeatureExtractor
    extract, batches = WhisperFeatureExtractor(config.audio_config.num_mel_bins), []
    samples = sorted(samples, key=lambda s: len(s[0]))
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    for some in (samples[i:i + at_once] for i in range(0, len(samples), at_once)):
        batch = {"input_ids": pad([torch.tensor(ids) for ids, _, _ in some]),
                 "attention_mask": pad([torch.ones(len(ids), dtype=torch.long) for ids, _, _ in some]),
                 "labels": pad([torch.tensor([M.IGNORE] + labels[:-1]) for _, labels, _ in some], padding_value=M.IGNORE)}
        if clips := [c for _, _, clips in some for c in clips]:
            heard = extract(clips, sampling_rate=M.RATE, return_tensors="pt", return_attention_mask=True)
            batch |= {"input_features": heard.input_features, "feature_attention_mask": heard.attention_mask}
        batches.append({name: x.to(DEVICE) for name, x in batch.items()})
    return batches


def timed_steps(step, count):
    """Median seconds of a step and its largest memory in GB, after warm-up."""
    for _ in range(1 if DRY else 3):
        step()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(count):
        torch.cuda.synchronize() if DEVICE.type == "cuda" else None
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize() if DEVICE.type == "cuda" else None
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0


def measure_ours(model, packs, targets, checkpointing, compiled):
    model.checkpoint_blocks = checkpointing
    if compiled:
        for block in [*model.audio_tower.layers, *model.language_model.model.layers]:
            block.compile(backend="eager" if DRY else "inductor")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    turn = iter(packs * 99)
    torch._dynamo.utils.counters.clear()

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY):
            loss = model(**M.batch_of([next(turn)]), chunk=2048)
        (loss / targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds, memory = timed_steps(step, 1 if DRY else 8)
    n = len(packs)
    work = sum(M.step_flops(model, pack) for pack in packs) / n
    row = {"checkpointing": checkpointing, "compiled": compiled, "compilations": torch._dynamo.utils.counters["stats"]["unique_graphs"],
           "seconds": seconds, "MFU": work / seconds / PEAK, "TFLOP": work / 1e12, "peak GB": memory,
           "tokens/s": sum(len(p.ids) for p in packs) / n / seconds,
           "audio s/s": sum(len(p.audio) for p in packs) / n / M.RATE / seconds}
    how = f"ours{', checkpointing' * checkpointing}{', compiled' * compiled}{' ' + str(row['compilations']) + ' x' if compiled else ''}"
    print(f"  {how:34} {seconds:.4f} s | MFU {row['MFU']:.1%} | {row['tokens/s']:,.0f} tokens/s | "
          f"{row['audio s/s']:,.0f} audio s/s | {memory:.1f} GB", flush=True)
    return row


def measure_theirs(peer, samples, config, per_step, at_once):
    batches = their_batches(samples, config, at_once)
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=0.0, fused=True)

    def step():                                         # all packs' samples in one step, over micro-batches
        for batch in batches:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY):
                loss = peer(**batch).loss
            (loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds, memory = timed_steps(step, 1 if DRY else 3)
    print(f"  {f'transformers, {at_once} samples at once':34} {seconds / per_step:.4f} s a pack | {memory:.1f} GB", flush=True)
    return {"at once": at_once, "seconds": seconds / per_step, "peak GB": memory}


def padded_flops(samples, model):
    """A step's work when every clip lasts 30 s and logits are made at every position, without padding of texts."""
    packs = []
    for ids, labels, clips in samples:
        silent = [np.zeros(M.LONGEST, np.float32)] * len(clips)
        packs.append(our_pack([(ids, [0] * len(ids), [])], 0))
        packs[-1].clip_samples, packs[-1].supervised = [len(c) for c in silent], len(ids)
    return sum(M.step_flops(model, pack) for pack in packs)


def count_operations():
    """Shares of a step's operations: where the time goes if all operations take the same; attention and small sizes take more."""
    with torch.device("meta"):
        model = M.InSerter(step_config())
    rng, sums, n = np.random.default_rng(0), {}, 8
    for seed in range(n):
        samples, left = draw_pack(random.Random(seed), 400 if DRY else 8192)
        pack = our_pack([make_sample(s, model.config, rng) for s in samples], left)
        total, alone = M.step_flops(model, pack), torch.arange(len(pack.ids) + 1)
        without = {"LM head": replace(pack, supervised=0), "encoder and adapter": replace(pack, clip_samples=[]),
                   "LLM, attention": replace(pack, cu_seqlens=alone)}
        for name, rest in without.items():
            sums[name] = sums.get(name, 0) + total - M.step_flops(model, rest)
        sums["all"] = sums.get("all", 0) + total
    sums["LLM, matrices"] = 2 * sums["all"] - sum(sums.values())
    result = {name: {"TFLOP a pack": x / n / 1e12, "share": x / sums["all"]} for name, x in sums.items()}
    print("\noperations of a step: " + ", ".join(f"{name} {x['TFLOP a pack']:.1f} TFLOP ({x['share']:.0%})" for name, x in result.items()))
    return result


def measure_step():
    from transformers import Qwen2AudioForConditionalGeneration
    config, rng = step_config(), np.random.default_rng(0)
    length, n = (400, 1) if DRY else (8192, 2)
    drawn = [draw_pack(random.Random(seed), length) for seed in range(n)]
    made = [[make_sample(s, config, rng) for s in samples] for samples, _ in drawn]
    packs, samples = [our_pack(m, left) for m, (_, left) in zip(made, drawn)], [s for m in made for s in m]
    with torch.device("meta"):
        model = M.InSerter(config)
    model = model.to_empty(device=DEVICE)
    model.tie()
    g = torch.Generator(DEVICE).manual_seed(0)
    for name, p in model.named_parameters():
        p.data.normal_(0, 0.02, generator=g) if p.ndim > 1 else p.data.fill_(float("norm" in name and name.endswith("weight")))
    model.audio_tower.embed_positions.weight.data.copy_(M.sinusoids(1500, config.audio_config.d_model))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\ntraining step: {count / 1e6:.0f} M parameters, packs of {length}, {sum(len(p.clip_samples) for p in packs) / n:.0f} clips and "
          f"{sum(len(p.audio) for p in packs) / n / M.RATE:.0f} s of speech a pack, AdamW, bfloat16 autocast")
    peer = Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation="sdpa").to(DEVICE).train()
    weights = {renamed(name, peer): p for name, p in model.state_dict().items()}
    missing = peer.load_state_dict(weights, strict=False)
    results = {"parameters": count, "unmatched names": len(missing.missing_keys) + len(missing.unexpected_keys)}
    for name, p in peer.named_parameters():
        p.requires_grad_("embed_positions" not in name)
    few = sorted(samples, key=lambda s: len(s[0]))[:4]
    torch.backends.cudnn.allow_tf32 = False             # their convolutions would be rounded to 10 bits
    with torch.no_grad():
        mine = float(model(**M.batch_of([our_pack(few, 0)]), chunk=2048)) / sum(l != M.IGNORE for _, ls, _ in few for l in ls)
        other = float(peer(**their_batches(few, config, 4)[0]).loss)
    results["losses"] = {"ours": mine, "transformers": other, "agree": abs(mine - other) < 1e-3}
    print(f"  losses of four samples in float32: {mine:.6f} and {other:.6f}{'' if results['losses']['agree'] else '  DIFFER'}")
    targets = packs[0].supervised
    ways = ((False, False), (True, False), (False, True), (True, True))
    results["ours"] = [row for way in ways if (row := guarded(f"our step {way}", measure_ours, model, packs, targets, *way))]
    model.cpu()
    torch.cuda.empty_cache() if DEVICE.type == "cuda" else None
    results["transformers"] = []
    for at_once in (2,) if DRY else (4, 8, 16):
        if not late() and (row := guarded(f"their step {at_once}", measure_theirs, peer, samples, config, n, at_once)):
            results["transformers"].append(row)
    if results["ours"] and results["transformers"]:
        best, theirs = (min(row["seconds"] for row in results[who]) for who in ("ours", "transformers"))
        results["ratio"] = theirs / best
        results["by FLOPs"] = padded_flops(samples, model) / sum(M.step_flops(model, p) for p in packs)
        print(f"  {results['ratio']:.1f} times as fast (wanted 3), by FLOPs {results['by FLOPs']:.1f}; MFU wanted 45 %")
    return results


def renamed(name, peer):
    """transformers renames a checkpoint's tensors in memory."""
    names = set(peer.state_dict())
    tails = [name, f"model.{name}", name.replace("language_model.lm_head", "lm_head"), name.replace("language_model.model", "language_model"),
             name.replace("language_model.model", "model.language_model")]
    return next((tail for tail in tails if tail in names), name)


# ---- the tiny run ----

def measure_tiny(folder):
    """Synthesis and a shortened training of the tiny world, with the run's own log lines."""
    try:
        import espeakng_loader                          # noqa: F401
    except ImportError:
        print("\nthe tiny run is left out: espeakng_loader is not installed")
        return {"left out": "espeakng_loader is not installed"}
    steps = 2 if DRY else 200
    stages = [f"train.stages.{name}.steps={steps}" for name in ("warmup_hear", "warmup_text", "warmup_speech", "pretrain", "sft")]
    settings = ["synth.documents=2000", "synth.held_out_documents=40", "synth.shard_documents=500", f"data={folder / 'data'}", "run=gpu", *stages,
                "synth.shards={interleaved: 1, tasks: 1, text: 1, chat: 1}", "train.eval_samples=8"]
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / "inserter.py"), *settings], cwd=folder, capture_output=True, text=True, timeout=240)
    print("\n" + "\n".join(done.stdout.splitlines()[:3] + done.stdout.splitlines()[-6:]))
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    rows = [json.loads(line) for line in (folder / "runs" / "gpu" / "metrics.jsonl").read_text().splitlines()]
    return {"seconds": time.perf_counter() - begin, "last rows": rows[-4:], "log": done.stdout.splitlines()[-30:]}


# ---- the whole ----

def about_machine():
    if DRY:
        return {"device": "cpu"}
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    product = 2 * 8192 ** 3 / milliseconds(lambda: a @ a) / 1e9
    big = torch.empty(2 ** 31, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(big)
    copy = 2 * 2 ** 31 / milliseconds(lambda: target.copy_(big)) / 1e9
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": M.triton.__version__, "cuda": torch.version.cuda,
             "matrix product TFLOP/s": product, "copy TB/s": copy}
    print(" | ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()))
    return facts


def main(folder, chosen):
    if not DRY and chosen != ["operations"] and not torch.cuda.is_available():
        print("tests/gpu.py needs a CUDA GPU, and torch finds none here.", file=sys.stderr)
        return 2
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"correct": measure_correctness, "kernel": measure_kernel, "operations": count_operations, "step": measure_step,
             "tiny": partial(measure_tiny, folder), "sweep": measure_sweep}
    if unknown := [name for name in chosen if name not in parts]:
        print(f"{unknown[0]} is none of {', '.join(parts)}.", file=sys.stderr)
        return 2
    chosen = {name: parts[name] for name in chosen or list(parts)[:-1]}
    for name, part in (chosen if set(chosen) == {"operations"} else {"machine": about_machine, **chosen}).items():
        if late():
            RESULTS["errors"][name] = "left out: no time"
            continue
        RESULTS[name] = guarded(name, part)
        RESULTS["seconds"] = time.perf_counter() - BEGUN
        (folder / "gpu.json").write_text(json.dumps(RESULTS, indent=1) + "\n")
    print(f"\n{RESULTS['seconds']:.0f} s, {len(RESULTS['errors'])} failures{': ' * bool(RESULTS['errors'])}{', '.join(RESULTS['errors'])}; "
          f"{folder.name}/gpu.json is written")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("Give the folder for gpu.json: python tests/gpu.py FOLDER", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
