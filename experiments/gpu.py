"""Everything that needs a GPU, in one run of at most 9 minutes: tables on the screen, gpu.json in FOLDER.

    python experiments/gpu.py FOLDER [correct] [kernel] [operations] [step] [tiny]      (default: all)

correct     every configuration of the kernel in bfloat16, float16 and float32 against the definition,
            bit-identical repeats, no waiting for the GPU
kernel      attention on packs like real samples and at fixed lengths, against FlashAttention-2 (torch's
            varlen_attn), FlexAttention compiled with a document mask, and padded SDPA
operations  what share of a training step's operations each module has; needs no GPU
step        a training step of Whisper-small + Qwen2.5-0.5B sizes in packs of 8192 against transformers'
            Qwen2-Audio
tiny        synthesis and training of the tiny world, a few steps, end to end

Clips and documents are drawn here, from a seed; nothing is read or downloaded. Without a GPU: one sentence,
status 2. INSERTER_DRY=1 walks through all of it on a CPU at toy sizes, `correct` in Triton's interpreter, to
see that this file works; its numbers mean nothing.

Legend, as in inserter.py: T positions of a pack   Hq, Hkv query and key-value heads   D head size
"""
import dataclasses
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
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"     # it is looked at when a kernel is defined

import numpy as np                           # noqa: E402
import torch                                 # noqa: E402
import torch._dynamo                         # noqa: E402
import torch.nn.functional as F              # noqa: E402
from torch import Tensor, nn                 # noqa: E402
from transformers import Qwen2AudioConfig    # noqa: E402

import inserter                              # noqa: E402
import speed                                 # noqa: E402
import synth                                 # noqa: E402
from inserter import HOP, Encoded, InSerter, audio_positions, convolved    # noqa: E402
from speed import Drawn, padded_flops, step_flops, targets_of    # noqa: E402
from synth import RATE, UserError            # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)     # or a model would be attended in it
DEVICE = torch.device("cpu" if DRY else "cuda")
PACK_LENGTH = 400 if DRY else 8192
SECONDS = 510                                # no new row is begun later than this
BEGUN = time.perf_counter()
RESULTS: dict[str, Any] = {"command": "python experiments/gpu.py FOLDER", "dry": DRY, "errors": {}}
HALVES = (torch.float16,) if DRY else (torch.bfloat16, torch.float16)
TENSORS = ("out", "dq", "dk", "dv")
PEAK_FLOPS = 989e12                          # dense bfloat16 operations per second of an H100 or H200


def is_late() -> bool:
    return time.perf_counter() - BEGUN > SECONDS


def guarded(name: str, function: Callable, *arguments: Any) -> Any:
    """function(*arguments), or None if it fails: the failure is kept and printed, and the rest goes on."""
    try:
        return function(*arguments)
    except Exception as error:               # whatever it is, the others are still worth having
        RESULTS["errors"][name] = traceback.format_exc()[-3000:]
        first_line = str(error).partition("\n")[0]
        print(f"  {name} failed: {type(error).__name__}: {first_line[:100]}")
        return None


# --------------------------------------------------------------------------------------------------
# 1. Samples: how long clips and documents are
# --------------------------------------------------------------------------------------------------

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
    return [round(seconds * RATE) for role, seconds in drawn if role == "speech"]


def positions(drawn: Drawn) -> int:
    texts = sum(tokens for role, tokens in drawn if role == "text")
    return texts + sum(audio_positions(n) + 2 for n in clip_samples(drawn)) + 1


def draw_pack(seed: int, length: int) -> list[Drawn]:
    """Samples for a pack of `length` positions, until one does not fit into the rest of it."""
    rng = random.Random(seed)
    pack = []
    room = length
    while True:
        drawn = draw_sample(rng)
        if positions(drawn) > length:        # longer than a pack: left out
            continue
        if positions(drawn) > room:
            return pack
        pack.append(drawn)
        room -= positions(drawn)


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
    if not DRY:
        poison = [torch.full((64 * 2 ** 20,), torch.nan, device=DEVICE) for _ in range(4)]
        del poison
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def check_configuration(dtype: torch.dtype, D: int, causal: bool, heads: tuple[int, int]) -> dict:
    """Three runs of the kernel against the definition in a wider type.

    The bound is twice the error of the definition in the same type, and a unit in the last place.
    """
    rng = random.Random(D)
    drawn = [rng.randint(1, 40 if DRY else 900) for _ in range(2 if DRY else 6)]
    lengths = [0, 1, 3, 150 if DRY else 300, 0, 129, *drawn]
    cu_seqlens = bounds(lengths)
    inputs, dout = draw_inputs(sum(lengths), *heads, D, dtype)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    by_definition = partial(naive, cu_seqlens=cu_seqlens, causal=causal)
    by_kernel = partial(inserter.fused_attention, cu_seqlens=cu_seqlens, causal=causal)
    exact = output_and_gradients(by_definition, [x.to(wide) for x in inputs], dout.to(wide))
    same_type = output_and_gradients(by_definition, inputs, dout)
    first, *repeats = (output_and_gradients(by_kernel, inputs, dout) for _ in range(3))
    of_bound = {}
    for name, a, n, e in zip(TENSORS, first, same_type, exact):
        last_place = 2.0 ** math.floor(math.log2(e.abs().max().item())) * torch.finfo(dtype).eps
        bound = 2 * (n.to(wide) - e).abs().max().item() + last_place
        error = (a.to(wide) - e).abs().max().item()
        of_bound[name] = math.inf if math.isnan(error) else error / bound
    relative = max(((a.to(wide) - e).norm() / e.norm()).item() for a, e in zip(first, exact))
    identical = all(torch.equal(a, b) for run in repeats for a, b in zip(first, run))
    passed = identical and max(of_bound.values()) <= 1
    shares = "".join(f"{share:6.2f}" for share in of_bound.values())
    print(f"  {str(dtype)[6:]:9}{D:4} {str(causal):7}{'{}/{}'.format(*heads):9}{shares}  {relative:9.1e}  "
          f"{'identical' if identical else 'DIFFER'}{'' if passed else '  FAILED'}", flush=True)
    return {"type": str(dtype)[6:], "D": D, "causal": causal, "heads": heads, "of bound": of_bound,
            "relative": relative, "repeats identical": identical, "passed": passed}


def check_no_waiting() -> bool:
    """Tables of tiles and kernels, forward and backward, without one synchronisation (any would raise)."""
    cu_seqlens = bounds([300, 0, 77])
    inputs, dout = draw_inputs(377, 4, 2, 64, HALVES[0])
    attend = partial(inserter.fused_attention, cu_seqlens=cu_seqlens, causal=True)
    output_and_gradients(attend, inputs, dout)
    if not DRY:
        torch.cuda.set_sync_debug_mode("error")
        try:
            output_and_gradients(attend, inputs, dout)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return True


def measure_correctness() -> dict:
    print("\ncorrectness: largest error in units of its bound; at most 1 is wanted")
    print(f"  {'type':9}{'D':>4} {'causal':7}{'heads':9}{'out':>6}{'dq':>6}{'dk':>6}{'dv':>6}  "
          f"{'relative':>9}  repeats")
    if DRY:
        os.environ["TRITON_INTERPRET"] = "1"
    groups = (2, 1) if DRY else (14, 2)
    rows = []
    for dtype in (*HALVES, torch.float32):
        for D in inserter.HEAD_SIZES[:2] if DRY else inserter.HEAD_SIZES:
            for causal, heads in ((False, (4, 4)), (True, groups)):
                name = f"correct {dtype} {D} {causal} {heads}"
                rows.append(guarded(name, check_configuration, dtype, D, causal, heads))
    no_waiting = bool(guarded("no waiting", check_no_waiting))
    os.environ.pop("TRITON_INTERPRET", None)
    passed = sum(bool(row and row["passed"]) for row in rows)
    print(f"  {passed} of {len(rows)} passed; {'no synchronisation' if no_waiting else 'SYNCHRONISES'}")
    return {"rows": rows, "no synchronisation": no_waiting}


# --------------------------------------------------------------------------------------------------
# 3. The kernel against what one would pick otherwise
#
# A peer is a function (lengths, causal, Hq, Hkv) -> attend(q, k, v): what depends on the lengths alone is
# made beforehand and not timed.
# --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Case:
    """Attention to be timed; replayed: as a captured graph, without the CPU's share of the time."""
    name: str
    lengths: list[int]
    causal: bool
    Hq: int
    Hkv: int
    D: int
    replayed: bool


def milliseconds(function: Callable, replayed: bool = False) -> float:
    """Median time of a call; without a graph by events around it, the L2 cache emptied before each."""
    if DRY:
        begun = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - begun)
    if replayed:
        try:
            return inserter.triton.testing.do_bench_cudagraph(function, rep=40, return_mode="median")
        except RuntimeError as error:        # some cannot be captured: then with the CPU's share
            RESULTS["errors"]["replay"] = str(error)[:300]
            torch.cuda.synchronize()
    return inserter.triton.testing.do_bench(function, warmup=20, rep=60, return_mode="median")


def ours(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
    cu_seqlens = bounds(lengths)
    if DRY:
        return partial(inserter.plain_attention, cu_seqlens=cu_seqlens, causal=causal)
    tiles = inserter.fused_tiles(cu_seqlens, causal, sum(lengths))
    return partial(inserter.fused_attention, cu_seqlens=cu_seqlens, causal=causal, tiles=tiles)


def flash(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
    from torch.nn.attention.varlen import varlen_attn
    cu_seqlens = bounds(lengths)
    longest = max(lengths)
    window = (-1, 0) if causal else (-1, -1)
    return lambda q, k, v: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window)


FLEX: list[Callable] = []                    # compiled once, for all lengths


def flex(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    number = torch.arange(len(lengths), device=DEVICE)
    document = torch.repeat_interleave(number, torch.tensor(lengths, device=DEVICE))

    def is_seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document[query] == document[key]
        return same & (key <= query) if causal else same

    torch._dynamo.config.recompile_limit = 64
    if not FLEX:
        FLEX.append(flex_attention if DRY else torch.compile(flex_attention, dynamic=False))
    mask = create_block_mask(is_seen, None, None, sum(lengths), sum(lengths), device=DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return FLEX[0](q, k, v, block_mask=mask, enable_gqa=Hq != Hkv)[0].transpose(0, 1)

    return attend


def padded_sdpa(lengths: list[int], causal: bool, Hq: int, Hkv: int) -> Callable:
    """Documents padded to the longest; gathering them is not part of the time: this is attention alone."""
    is_real = torch.arange(max(lengths), device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    mask = None if causal or bool(is_real.all()) else is_real[:, None, None]
    return partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal, enable_gqa=Hq != Hkv)


PEERS = {"ours": ours, "flash-2": flash, "flex": flex, "padded sdpa": padded_sdpa}


def time_peer(name: str, case: Case) -> dict[str, float]:
    """Milliseconds of the forward pass, and of both passes."""
    attend = PEERS[name](case.lengths, case.causal, case.Hq, case.Hkv)
    (q, k, v), dout = draw_inputs(sum(case.lengths), case.Hq, case.Hkv, case.D, HALVES[0])
    if name == "padded sdpa":
        heads = (case.Hq, case.Hkv, case.Hkv, case.Hq)
        shapes = [(len(case.lengths), h, max(case.lengths), case.D) for h in heads]
        q, k, v, dout = (torch.randn(shape, device=DEVICE).to(HALVES[0]).requires_grad_() for shape in shapes)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v), (q, k, v), dout.detach())

    return {"forward": milliseconds(forward, case.replayed), "both": milliseconds(both, case.replayed)}


def time_peers(case: Case) -> dict:
    """A row of the table: milliseconds of every peer, and TFLOP/s of the work that the documents need.

    That is two products of matrices in the forward pass and five in the backward pass; half of it if causal.
    """
    row = dataclasses.asdict(case) | {"times": {}}
    for name in PEERS:
        times = guarded(f"{case.name} D={case.D} causal={case.causal} {name}", time_peer, name, case)
        if times:
            row["times"][name] = times
    cells = ""
    for direction in ("forward", "both"):
        work = sum(n * n for n in case.lengths) * case.D * case.Hq * (2 if case.causal else 4)
        work *= 3.5 if direction == "both" else 1
        row[direction] = {name: work / times[direction] / 1e9 for name, times in row["times"].items()}
        cells += "".join(f"{row[direction].get(name, math.nan):9.0f}" for name in PEERS)
    print(f"  {case.name:16}{case.D:4} {str(case.causal):6}{cells}", flush=True)
    return row


def draw_cases() -> list[Case]:
    """Packs like real samples, the LLM's and the clips of one; and 16,384 positions of one length."""
    packs = [draw_pack(seed, 200 if DRY else 8192) for seed in range(1 if DRY else 3)]
    documents = [[positions(drawn) for drawn in pack] for pack in packs]
    clips = [convolved(n // HOP) for drawn in packs[0] for n in clip_samples(drawn)]
    cases = [Case(f"pack {n}", lengths, True, 14, 2, 64, True) for n, lengths in enumerate(documents)]
    cases.append(Case("pack 0", documents[0], True, 28, 4, 128, True))
    cases.append(Case("clips of pack 0", clips, False, 12, 12, 64, True))
    total = 256 if DRY else 16384
    for D in (64, 128):
        for causal in (True, False):
            for length in (256,) if DRY else (512, 1024, 2048, 4096, 8192, 16384):
                lengths = [length] * (total // length)
                name = f"{len(lengths)} x {length}"
                cases.append(Case(name, lengths, causal, 2048 // D, 2048 // D, D, False))
    return cases


def measure_kernel() -> dict:
    names = "".join(f"{name[:8]:>9}" for name in PEERS)
    print("\nattention, TFLOP/s of the work that documents need" + " " * 4 + "forward" + " " * 31
          + "forward + backward")
    print(f"  {'case':16}{'D':>4} {'causal':6}{names}{names}")
    rows = [time_peers(case) for case in draw_cases() if not is_late()]
    ratios = {}
    for peer in ("flash-2", "flex", "padded sdpa"):
        for direction in ("forward", "both"):
            rates = [row[direction] for row in rows if row["replayed"]]
            times = [rate["ours"] / rate[peer] for rate in rates if {"ours", peer} <= rate.keys()]
            ratios[f"{peer}, {direction}"] = statistics.geometric_mean(times) if times else None
    shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio)
    print(f"  times as fast on packs, geometric mean: {shown}")
    print("  wanted of ours at 2 x 8192, forward, not causal: 380 with heads of 64, 430 with heads of 128")
    return {"rows": rows, "ratios on packs": ratios}


# --------------------------------------------------------------------------------------------------
# 4. A training step against transformers
# --------------------------------------------------------------------------------------------------

def step_config() -> Qwen2AudioConfig:
    """Whisper-small and Qwen2.5-0.5B."""
    if DRY:
        return speed.tiny_config()
    audio = {"num_mel_bins": 80, "d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12,
             "encoder_ffn_dim": 3072, "max_source_positions": 1500}
    text = {"vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "intermediate_size": 4864,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    return speed.untied_config(audio, text)


def count_operations() -> dict:
    """Shares of a step's operations: of its time, if all took the same; attention takes more."""
    config = step_config()
    sums = Counter()
    packs = 8
    for seed in range(packs):
        pack = draw_pack(seed, PACK_LENGTH)
        lengths = torch.tensor([positions(drawn) for drawn in pack])
        frames = torch.tensor([math.ceil(n / HOP) for drawn in pack for n in clip_samples(drawn)])
        targets = sum(tokens for drawn in pack for role, tokens in drawn if role == "text") + len(pack)
        alone = torch.ones(int(lengths.sum()))           # every position a document of its own
        total = step_flops(config, lengths, frames, targets)
        sums["all"] += total
        sums["LM head"] += total - step_flops(config, lengths, frames, 0)
        sums["encoder and adapter"] += total - step_flops(config, lengths, frames[:0], targets)
        sums["LLM, attention"] += total - step_flops(config, alone, frames, targets)
    sums["LLM, matrices"] = 2 * sums["all"] - sum(sums.values())
    shown = [f"{name} {work / packs / 1e12:.2f} ({work / sums['all']:.0%})" for name, work in sums.items()]
    print("\nTFLOP of a step of a pack: " + ", ".join(shown))
    return {name: {"TFLOP a pack": work / packs / 1e12, "share": work / sums["all"]}
            for name, work in sums.items()}


def compare_losses(model: InSerter, peer: nn.Module, samples: list[Encoded]) -> dict:
    """Mean losses of the four shortest samples in float32."""
    few = sorted(samples, key=lambda sample: len(sample.ids))[:4]
    batch = inserter.collate(few, model.mels)
    torch.backends.cudnn.allow_tf32 = False              # their convolutions would be rounded to 10 bits
    with torch.no_grad():
        mine = float(model(batch, chunk=2048)) / targets_of(batch)
        theirs = float(peer(**speed.their_batches(few, 4, DEVICE)[0]).loss)
    agree = abs(mine - theirs) < 1e-3
    print(f"  losses of four samples in float32: {mine:.6f} and {theirs:.6f}{'' if agree else '  DIFFER'}")
    return {"ours": mine, "transformers": theirs, "agree": agree}


def time_steps(model: nn.Module, losses: Callable, count: int) -> dict:
    """Median seconds of a step, and its largest memory; losses() gives those of its micro-batches in turn."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    seconds = []
    warm = 1 if DRY else 3
    for number in range(warm + count):
        if number == warm and not DRY:
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY):
            for loss in losses():
                loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not DRY:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(seconds[warm:]), "peak GB": torch.cuda.max_memory_allocated() / 1e9}


def measure_ours(model: InSerter, packs: list[dict], checkpointing: bool, compiled: bool) -> dict:
    """One pack a step, in turn; a reading process has made it, log-mel frames included."""
    model.recompute = checkpointing
    if compiled:
        for block in [*model.audio_tower.layers, *model.language_model.model.layers]:
            block.compile(backend="eager" if DRY else "inductor")
    turn = iter(packs * 99)
    torch._dynamo.utils.counters.clear()
    row = time_steps(model, lambda: [model(next(turn), chunk=2048) / targets_of(packs[0])], 1 if DRY else 8)
    work = statistics.mean(step_flops(model.config, pack["lengths"], pack["frames"], targets_of(pack))
                           for pack in packs)
    row |= {
        "checkpointing": checkpointing,
        "compiled": compiled,
        "compilations": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "MFU": work / row["seconds"] / PEAK_FLOPS,
        "tokens/s": statistics.mean(len(pack["ids"]) for pack in packs) / row["seconds"]}
    print("  ours, " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    return row


def measure_theirs(peer: nn.Module, samples: list[Encoded], packs: int, at_once: int) -> dict:
    """All packs' samples in one step, over micro-batches; their features are made untimed, too."""
    batches = speed.their_batches(samples, at_once, DEVICE)
    row = time_steps(peer, lambda: (peer(**batch).loss / len(batches) for batch in batches), 1 if DRY else 3)
    row |= {"at once": at_once, "seconds": row["seconds"] / packs}
    print("  transformers, " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    return row


def measure_step() -> dict:
    config = step_config()
    rng = np.random.default_rng(0)
    made = [[speed.make_sample(drawn, config, rng) for drawn in draw_pack(seed, PACK_LENGTH)]
            for seed in range(1 if DRY else 2)]
    samples = [sample for pack in made for sample in pack]
    packs = [inserter.collate(pack, config.audio_config.num_mel_bins) for pack in made]
    model = speed.loud_model(config)
    peer, unmatched = speed.peer_of(model)
    model.to(DEVICE)
    peer.to(DEVICE)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\ntraining step: {count / 1e6:.0f} M parameters, {len(packs)} packs of {PACK_LENGTH} with "
          f"{sum(len(pack['frames']) for pack in packs)} clips, AdamW, bfloat16 autocast, seconds a pack")
    results = {
        "parameters": count,
        "unmatched names": unmatched,
        "losses": compare_losses(model, peer, samples),
        "ours": [],
        "transformers": []}
    for checkpointing, compiled in ((False, False), (True, False), (False, True), (True, True)):
        name = f"our step {(checkpointing, compiled)}"
        row = guarded(name, measure_ours, model, packs, checkpointing, compiled)
        results["ours"] += [row] if row else []
    model.cpu()
    for at_once in (2,) if DRY else (4, 8, 16):
        if not is_late():
            row = guarded(f"their step {at_once}", measure_theirs, peer, samples, len(packs), at_once)
            results["transformers"] += [row] if row else []
    if results["ours"] and results["transformers"]:
        best, theirs = (min(row["seconds"] for row in results[who]) for who in ("ours", "transformers"))
        lengths = torch.cat([pack["lengths"] for pack in packs])
        frames = torch.cat([pack["frames"] for pack in packs])
        work = step_flops(config, lengths, frames, sum(map(targets_of, packs)))
        results |= {"ratio": theirs / best, "by FLOPs": padded_flops(config, lengths, len(frames)) / work}
        print(f"  {results['ratio']:.1f} times as fast (wanted 3), by FLOPs {results['by FLOPs']:.1f}; "
              "MFU wanted 45 %")
    return results


# --------------------------------------------------------------------------------------------------
# 5. The tiny run, and the whole
# --------------------------------------------------------------------------------------------------

def measure_tiny(folder: Path) -> dict:
    """Synthesis and a shortened training of the tiny world, with the run's own log lines."""
    settings = [
        "run=gpu",
        "fresh=true",
        f"data={folder / 'data'}",
        f"synth.documents={80 if DRY else 2000}",
        "synth.held_out_documents=40",
        f"synth.shard_documents={40 if DRY else 500}",
        "synth.shards={interleaved: 1, tasks: 1, text: 1, chat: 1}",
        "train.eval_samples=8"]
    for stage in ("warmup_hear", "warmup_speech", "warmup_text", "pretrain", "sft"):
        settings.append(f"train.stages.{stage}.steps={2 if DRY else 200}")
    begun = time.perf_counter()
    command = [sys.executable, str(ROOT / "inserter.py"), *settings]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    lines = done.stdout.splitlines()
    print("\n" + "\n".join(lines[-12:]))
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    return {"seconds": time.perf_counter() - begun, "log": lines[-30:]}


def main(arguments: list[str]) -> None:
    measures = {
        "correct": measure_correctness,
        "kernel": measure_kernel,
        "operations": count_operations,
        "step": measure_step,
        "tiny": lambda: measure_tiny(folder)}
    if not arguments or not set(arguments[1:]) <= measures.keys():
        raise UserError(f"Give the folder for gpu.json, and some of {', '.join(measures)}, or none of these "
                        "for all: python experiments/gpu.py FOLDER.")
    folder = Path(arguments[0]).resolve()
    chosen = arguments[1:] or list(measures)
    if chosen != ["operations"]:
        if not DRY and not torch.cuda.is_available():
            raise UserError("experiments/gpu.py needs a CUDA GPU, and torch finds none here.")
        RESULTS["machine"] = "CPU" if DRY else torch.cuda.get_device_name()
        RESULTS["versions"] = {"torch": torch.__version__, "triton": inserter.triton.__version__}
        print(RESULTS["machine"], RESULTS["versions"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        if is_late():
            RESULTS["errors"][name] = "left out: no time"
        else:
            RESULTS[name] = guarded(name, measures[name])
        RESULTS["seconds"] = time.perf_counter() - BEGUN
        (folder / "gpu.json").write_text(json.dumps(RESULTS, indent=1) + "\n")
    errors = RESULTS["errors"]
    names = f": {', '.join(errors)}" if errors else ""
    print(f"\n{RESULTS['seconds']:.0f} s, {len(errors)} failures{names}; {folder.name}/gpu.json is written")


if __name__ == "__main__":
    synth.run(main)
