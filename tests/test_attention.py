"""The fused kernel against plain arithmetic in float64, without a GPU: interpreted, and compiled for one.

The interpreter and the compiler cannot share a process; each runs in one of its own and prints JSON:

    TRITON_INTERPRET=1 python tests/test_attention.py interpret
    python tests/test_attention.py compile     registers, memory and instructions of every kernel on sm_90
"""
import functools
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2AudioConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import inserter as M                         # noqa: E402

SHARED_LIMIT = 227 * 1024                    # bytes of shared memory that a block may have on sm_90
RESULTS = ("out", "dq", "dk", "dv")


def bounds(lengths: list[int]) -> Tensor:
    """cu_seqlens of documents of these lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------
# 1. The table of tiles
# --------------------------------------------------------------------------------------------------

def tiles_of(length: int) -> int:
    return math.ceil(length / M.TILE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [
    [],
    [0],
    [5],
    [128, 0, 129],
    [1] * 40 + [0] * 9 + [300, 1000, 127],
    [4096]])
def test_tiles_cover_every_document_once_longest_first(lengths, causal):
    cu_seqlens = bounds(lengths)
    table = M.fused_tiles(cu_seqlens, causal, sum(lengths))
    assert table.dtype == torch.int32
    assert len(table) <= tiles_of(sum(lengths)) + len(lengths)
    real = [row for row in table.tolist() if row[2] * M.TILE < row[1]]
    wanted = []
    for start, length in zip(cu_seqlens.tolist(), lengths):
        for i in range(tiles_of(length)):
            wanted.append([start, length, i, tiles_of(length) - 1 - i])
    assert sorted(real) == sorted(wanted)
    assert table.tolist()[:len(real)] == real, "surplus rows stand last"
    surplus = table.tolist()[len(real):]
    assert all(row[3] * M.TILE >= row[1] for row in surplus), "no kernel works for them"
    work = [row[2] + 1 if causal else tiles_of(row[1]) for row in real]
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize("device, capability, head_size, fused", [
    ("cpu", (9, 0), 64, False),
    ("cuda", (9, 0), 64, True),
    ("cuda", (9, 0), 40, False),             # none of HEAD_SIZES
    ("cuda", (8, 0), 64, True),
    ("cuda", (7, 5), 64, False)])            # a T4 has no bfloat16
def test_where_attention_is_fused(monkeypatch, device, capability, head_size, fused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    M.is_recent_gpu.cache_clear()
    assert M.uses_kernel(torch.device(device), head_size) == (fused and M.triton is not None)
    M.is_recent_gpu.cache_clear()


# --------------------------------------------------------------------------------------------------
# 2. What runs in the interpreter's process
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
            is_future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(is_future, -torch.inf)
        out.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(out)


def output_and_gradients(function: Callable, inputs: list[Tensor], weight: Tensor,
                         *arguments: Any) -> list[Tensor]:
    """[out, dq, dk, dv] where `weight` is the gradient of the output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, *arguments)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def laid_out(layout: str, T: int, heads: tuple[int, int, int], D: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v apart, of one joined projection, heads first, turned, or as rows cut from longer ones."""
    if layout == "joined":
        joined = torch.randn(T, sum(heads), D).to(dtype)
        return list(joined.split(list(heads), 1))
    if layout == "heads first":
        return [torch.randn(h, T, D).to(dtype).transpose(0, 1) for h in heads]
    if layout == "turned":                   # neighbours of a row lie apart, so it is copied
        return [torch.randn(D, h, T).to(dtype).transpose(0, 2) for h in heads]
    if layout == "cut":
        return [torch.randn(T, h, D + 3).to(dtype)[..., 1:-2] for h in heads]
    return [torch.randn(T, h, D).to(dtype) for h in heads]


def random_lengths(rng: random.Random, most: int) -> list[int]:
    """Documents of 0 to 300 positions, empty ones among them, with an odd sum that no tile divides.

    One is always of a few positions: their gradients are the largest, and so are the errors.
    """
    lengths = [rng.choice([0, 1, rng.randint(2, 40), rng.randint(0, most)]) for _ in range(rng.randint(0, 3))]
    lengths += [rng.randint(2, 5), most]
    rng.shuffle(lengths)
    return [*lengths, 1 - sum(lengths) % 2]


def last_place(largest: float, dtype: torch.dtype) -> float:
    """The distance from the largest value to the next one in this type."""
    return 2.0 ** math.floor(math.log2(largest)) * torch.finfo(dtype).eps


def check_pack(number: int, dtype: torch.dtype) -> dict:
    """One random pack: its settings, and per tensor the largest error, that of naive(), and the bound."""
    rng = random.Random(f"{number} {dtype}")
    torch.manual_seed(number)
    D = M.HEAD_SIZES[number % 4]
    causal = number // 4 % 2 == 1
    if dtype == torch.float16:
        Hq, Hkv = rng.choice([(1, 1), (2, 2), (2, 1), (3, 1)])
        most = rng.choice([70, 140, 300])
    else:                                    # its tiles are small: ten times the programs to interpret
        Hq, Hkv = rng.choice([(1, 1), (2, 1)])
        most = [140, 140, 70, 70][number // 4]
    cu_seqlens = bounds(random_lengths(rng, most))
    T = int(cu_seqlens[-1])
    layout = ["apart", "joined", "heads first", "turned", "cut"][number % 5]
    inputs = laid_out(layout, T, (Hq, Hkv, Hkv), D, dtype)
    weight = torch.randn(T, Hq, D).to(dtype)
    wide = [x.double() for x in inputs]
    exact = output_and_gradients(naive, wide, weight.double(), cu_seqlens, causal)
    same_type = output_and_gradients(naive, inputs, weight, cu_seqlens, causal)
    ours = output_and_gradients(M.fused_attention, inputs, weight, cu_seqlens, causal)
    row = {
        "pack": number,
        "type": name_of(dtype),
        "D": D,
        "heads": [Hq, Hkv],
        "causal": causal,
        "cu_seqlens": cu_seqlens.tolist(),
        "layout": layout}
    for name, a, n, e in zip(RESULTS, ours, same_type, exact):
        naive_error = (n.double() - e).abs().max().item()
        row[name] = {
            "error": (a.double() - e).abs().max().item(),
            "naive": naive_error,
            "bound": 2 * naive_error + last_place(e.abs().max().item(), dtype),
            "type": name_of(a.dtype)}
    return row


def check_isolation(dtype: torch.dtype) -> dict:
    """A document turned into NaN changes no bit of another's output or gradients."""
    torch.manual_seed(1)
    lengths = [37, 0, 133, 1, 69] if dtype == torch.float16 else [37, 0, 53, 20]
    cu_seqlens = bounds(lengths)
    T = sum(lengths)
    it = slice(37, 37 + lengths[2])
    others = [slice(0, 37), slice(it.stop, T)]
    inputs = [torch.randn(T, h, 32).to(dtype) for h in (2, 1, 1)]
    weight = torch.randn(T, 2, 32).to(dtype)
    spoilt = [x.clone() for x in inputs]
    for x in spoilt:
        x[it] = torch.nan
    found = {}
    for causal in (False, True):
        before, again, after = (output_and_gradients(M.fused_attention, x, weight, cu_seqlens, causal)
                                for x in (inputs, inputs, spoilt))
        same = [torch.equal(x[rows], y[rows]) for x, y in zip(before, after) for rows in others]
        found["causal" if causal else "bidirectional"] = {
            "others": not all(same),
            "repeat": not all(map(torch.equal, before, again)),
            "itself": all(bool(x[it].isnan().all()) for x in after)}
    return found


def check_operator() -> dict[str, bool]:
    """opcheck, compilation in one graph, checkpointing, autocast, shared tiles; True where it holds."""
    torch.manual_seed(2)
    lengths = torch.tensor([9, 0, 31, 5])
    cu_seqlens = bounds(lengths.tolist())
    inputs = [torch.randn(45, h, 16).half().requires_grad_() for h in (2, 1, 1)]
    weight = torch.randn(45, 2, 16).half()
    tiles = M.fused_tiles(cu_seqlens, True, 45)
    torch.library.opcheck(M.attention_op, (*inputs, tiles, True))
    out, lse = (x.detach() for x in M.attention_op(*inputs, tiles, True))
    torch.library.opcheck(M.gradient_op, (*(x.detach() for x in inputs), out, lse, weight, tiles, True))

    wanted = output_and_gradients(M.fused_attention, inputs, weight, cu_seqlens, True)
    joined = torch.compile(M.fused_attention, fullgraph=True, backend="aot_eager")
    attend = M.packed_attention(lengths, True, torch.zeros(45, 32), 16)
    checkpointed = functools.partial(M.recomputed, M.fused_attention)

    def same(function: Callable, *arguments: Any) -> bool:
        found = output_and_gradients(function, inputs, weight, *arguments)
        return all(map(torch.equal, found, wanted))

    summed = torch.autograd.grad(M.fused_attention(*inputs, cu_seqlens, True).sum(), inputs)
    ones = output_and_gradients(M.fused_attention, inputs, torch.ones_like(weight), cu_seqlens, True)
    wide = [x.float() for x in inputs]
    with torch.autocast("cpu", torch.float16):
        half = M.fused_attention(*wide, cu_seqlens, True)
    return {
        "opcheck": True,
        "compiled": same(joined, cu_seqlens, True),
        "checkpointed": same(checkpointed, cu_seqlens, True),
        "tiles shared": same(M.fused_attention, cu_seqlens, True, tiles),
        "chosen": same(attend),
        "autocast": torch.equal(half, wanted[0]),
        "expanded gradient": all(map(torch.equal, summed, ones[1:]))}


def small_model(layers: int = 2) -> M.InSerter:
    audio = {
        "model_type": "qwen2_audio_encoder",
        "d_model": 32,
        "encoder_layers": layers,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 80}
    text = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "tie_word_embeddings": True}
    model = M.random_model(Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=60), 1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def small_document(samples: int, text: int) -> M.Encoded:
    """A clip, then text, all of it with loss."""
    ids = [61, *[60] * M.audio_positions(samples), 62, *range(text)]
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(samples)).numpy()
    return M.Encoded("", ids, ids[1:] + [M.IGNORE], [waveform], [[]])


def check_model() -> dict:
    """How far a small model's loss, gradients and answers by fused attention are from those by plain."""
    model = small_model()
    documents = [small_document(8000, 20), small_document(400, 7)]
    tok = types.SimpleNamespace(audio=60, audio_bos=61, audio_eos=62, turn_end=1, end=0, decode=str)
    chosen = M.uses_kernel
    results = []
    for M.uses_kernel in (chosen, lambda device, head_size: False):
        model.zero_grad()
        loss = model(M.collate(documents, model.mels), 64)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((loss.item(), gradient, M.complete(model, tok, documents, 4, batch=2)))
    M.uses_kernel = chosen
    (loss, gradient, answers), (plain_loss, plain_gradient, plain_answers) = results
    return {
        "loss": abs(loss - plain_loss) / plain_loss,
        "gradient": ((gradient - plain_gradient).norm() / plain_gradient.norm()).item(),
        "answers": answers == plain_answers}


def check_compilations() -> int:
    """How often blocks are compiled, as whole graphs, while clips and documents change in number and length.

    There are more layers than PyTorch would compile one by one: all of a kind share what is compiled. The
    kernels, which are not part of a graph, do nothing meanwhile.
    """
    model = small_model(layers=10)
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:  # one for all: blocks share results
        compiled.append(graph)
        return graph.forward

    for block in [*model.audio_tower.layers, *model.language_model.model.layers]:
        block.compile(backend=backend, fullgraph=True)
    launch = M.launch
    M.launch = lambda *arguments: None
    for count, samples, text in ((2, 8000, 20), (3, 9000, 30), (2, 4000, 7), (4, 12000, 12)):
        documents = [small_document(samples + 320 * i, text + i) for i in range(count)]
        model(M.collate(documents, model.mels), 64)
    M.launch = launch
    return len(compiled)


def interpret() -> dict:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)             # fills what torch.empty gives with NaN
    packs = [check_pack(number, dtype) for dtype in (torch.float16, torch.float32) for number in range(16)]
    return {
        "poisoned": bool(torch.empty(9).isnan().all()),
        "packs": packs,
        "isolation": [check_isolation(dtype) for dtype in (torch.float16, torch.float32)],
        "operator": check_operator(),
        "model": check_model(),
        "compilations": check_compilations()}


# --------------------------------------------------------------------------------------------------
# 3. What runs in the compiler's process
# --------------------------------------------------------------------------------------------------

class NoDevice:
    """In place of Triton's driver: compile for a Hopper GPU that is not here."""

    def get_current_target(self) -> Any:
        return M.triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(kernel: Any) -> dict:
    """Registers of a thread, bytes of its stack (where spilled ones go), of shared memory; instructions."""
    tool = Path(M.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    registers, stack, local = map(int, re.search(pattern, usage).groups())
    ptx = kernel.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack + local,
        "shared": kernel.metadata.shared,
        "tensor cores": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "tf32": "tf32" in ptx}


def compile_all() -> dict:
    """Every kernel as fused_attention would launch it, forward and backward, compiled and not run."""
    M.triton.runtime.driver.set_active(NoDevice())
    function = M.triton.runtime.jit.JITFunction
    launch = function.run
    rows, setting = [], {}

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        kernel = launch(self, *arguments, **options | {"warmup": True})
        rows.append(setting | {"kernel": self.fn.__name__} | resources(kernel))
        return kernel

    function.run = run
    cu_seqlens = torch.tensor([0, 256], dtype=torch.int32)
    cases = list(itertools.product((torch.bfloat16, torch.float32), M.HEAD_SIZES, ((False, 1), (True, 2))))
    cases += [(torch.bfloat16, 64, (True, 7)), (torch.float16, 64, (True, 2))]
    for dtype, D, (causal, group) in cases:
        setting = {"type": name_of(dtype), "D": D, "causal": causal, "group": group}
        q, k = (torch.zeros(256, h, D, dtype=dtype, requires_grad=True) for h in (2 * group, 2))
        M.fused_attention(q, k, k, cu_seqlens, causal).sum().backward()
    return {"kernels": rows}


# --------------------------------------------------------------------------------------------------
# 4. What pytest looks at
# --------------------------------------------------------------------------------------------------

def elsewhere(what: str, **environment: str) -> dict:
    """The JSON that this file prints when a process of its own runs it."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"} | environment
        done = subprocess.run([sys.executable, __file__, what], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


needs_triton = pytest.mark.skipif(M.triton is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def interpreted():
    return elsewhere("interpret", TRITON_INTERPRET="1")


@needs_triton
def test_error_is_at_most_twice_the_naive_one(interpreted):
    packs = interpreted["packs"]
    assert len(packs) >= 30
    wanted = set(itertools.product(("float16", "float32"), M.HEAD_SIZES, (False, True)))
    assert {(pack["type"], pack["D"], pack["causal"]) for pack in packs} == wanted
    for kind in ("float16", "float32"):
        some = [pack for pack in packs if pack["type"] == kind]
        shares = {name: max(pack[name]["error"] / pack[name]["bound"] for pack in some) for name in RESULTS}
        rounded = {name: round(share, 2) for name, share in shares.items()}
        print(kind, "largest error over its bound:", rounded)
    for pack in packs:
        for name in RESULTS:
            assert pack[name]["type"] == pack["type"], pack
            assert pack[name]["error"] <= pack[name]["bound"], pack


@needs_triton
def test_every_element_is_written(interpreted):
    assert interpreted["poisoned"]           # then the errors above, none of them NaN, say it
    errors = [pack[name]["error"] for pack in interpreted["packs"] for name in RESULTS]
    assert not any(map(math.isnan, errors))


@needs_triton
def test_a_document_sees_itself_alone(interpreted):
    for found in interpreted["isolation"]:
        for way in ("bidirectional", "causal"):
            assert found[way] == {"others": False, "repeat": False, "itself": True}


@needs_triton
def test_operator_compiles_and_checkpoints(interpreted):
    assert all(interpreted["operator"].values()), interpreted["operator"]


@needs_triton
def test_model_is_the_same_by_both(interpreted):
    found = interpreted["model"]
    assert found["loss"] < 1e-6, found
    assert found["gradient"] < 1e-5, found
    assert found["answers"], found


@needs_triton
def test_few_compilations(interpreted):
    assert 2 <= interpreted["compilations"] <= 4


@needs_triton
def test_kernels_compile_for_hopper():
    rows = elsewhere("compile", TRITON_INTERPRET="0")["kernels"]
    assert len(rows) == 3 * (2 * 4 * 2 + 2)
    for row in rows:
        print(*row.values())
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED_LIMIT, row
        assert not row["tf32"], row
        assert (row["tensor cores"] > 0) == (row["type"] != "float32"), row


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
