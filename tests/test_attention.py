"""The fused kernel against plain arithmetic in float64, without a GPU: run by Triton's interpreter, compiled for one.

The interpreter and the compiler cannot share a process, so each runs in one of its own and prints what it found as JSON:

    TRITON_INTERPRET=1 python tests/test_attention.py interpret
    python tests/test_attention.py compile            registers, shared memory and instructions of every kernel on sm_90
"""
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import inserter as M                                    # noqa: E402

SHARED_LIMIT = 227 * 1024                               # bytes of shared memory that a block may have on sm_90


# ---- the table of tiles ----

@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[], [0], [5], [128, 0, 129], [1] * 40 + [0] * 9 + [300, 1000, 127], [4096]])
def test_tiles_cover_every_document_once_longest_first(lengths, causal):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).int().tolist()], dtype=torch.int32)
    table = M.fused_tiles(cu, causal, sum(lengths))
    assert table.dtype == torch.int32 and len(table) <= -(-sum(lengths) // M.TILE) + len(lengths)
    rows = [row for row in table.tolist() if row[2] * M.TILE < row[1]]
    starts = cu.tolist()[:-1]
    wanted = sorted([s, n, i, -(-n // M.TILE) - 1 - i] for s, n in zip(starts, lengths) for i in range(-(-n // M.TILE)))
    assert sorted(rows) == wanted and table.tolist()[:len(rows)] == rows          # surplus rows stand last ...
    assert all(row[3] * M.TILE >= row[1] for row in table.tolist()[len(rows):])   # ... and no kernel works for them
    work = [row[2] + 1 if causal else -(-row[1] // M.TILE) for row in rows]
    assert work == sorted(work, reverse=True)


def test_padding_by_repeating_the_last_bound_adds_no_work():
    cu = torch.tensor([0, 300, 310], dtype=torch.int32)
    padded = torch.cat([cu, cu[-1:].expand(9)])
    real = [[row for row in M.fused_tiles(c, True, 310).tolist() if row[2] * M.TILE < row[1]] for c in (cu, padded)]
    assert real[0] == real[1] and len(real[0]) == 4


def test_attention_is_plain_on_a_cpu():
    assert not M.fused_here(torch.device("cpu"), 64)
    assert M.triton is None or (M.fused_here(torch.device("cuda"), 64) and not M.fused_here(torch.device("cuda"), 40))


# ---- what runs in the interpreter's process ----

def naive(q, k, v, cu, causal):
    """The definition, in the type of its arguments."""
    out = []
    for a, b in zip(cu.tolist(), cu.tolist()[1:]):
        group = q.shape[1] // k.shape[1]
        x, y, z = (t[a:b].transpose(0, 1) for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
        s = x @ y.transpose(1, 2) / q.shape[2] ** 0.5
        s = s.masked_fill(torch.ones(b - a, b - a, dtype=torch.bool).triu(1), -torch.inf) if causal else s
        out.append((s.softmax(-1) @ z).transpose(0, 1))
    return torch.cat(out)


def output_and_gradients(function, inputs, weight, *arguments):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, *arguments)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def laid_out(rng, T, Hq, Hkv, D, dtype):
    """q, k, v in one of four layouts: apart, of one joined projection, heads first, rows cut from longer ones."""
    layout = rng.choice(["apart", "joined", "heads first", "cut"])
    if layout == "joined":
        return layout, list(torch.randn(T, Hq + 2 * Hkv, D).to(dtype).split([Hq, Hkv, Hkv], 1))
    if layout == "heads first":
        return layout, [torch.randn(h, T, D).to(dtype).transpose(0, 1) for h in (Hq, Hkv, Hkv)]
    if layout == "cut":
        return layout, [torch.randn(T, h, D + 3).to(dtype)[..., 1:-2] for h in (Hq, Hkv, Hkv)]
    return layout, [torch.randn(T, h, D).to(dtype) for h in (Hq, Hkv, Hkv)]


def random_lengths(rng, most):
    """Documents of 0 to 300 positions, empty ones among them, with an odd sum that no tile divides. One is always of a few
    positions: their gradients are the largest, and so are the errors."""
    lengths = [rng.choice([0, 1, rng.randint(2, 40), rng.randint(0, most)]) for _ in range(rng.randint(0, 3))] + [rng.randint(2, 5), most]
    rng.shuffle(lengths)
    return lengths + [1 - sum(lengths) % 2]


def last_place(largest, dtype):
    """The distance from the largest value to the next one in this type."""
    return 2.0 ** (torch.tensor(largest).log2().floor().item()) * torch.finfo(dtype).eps


def check_pack(number, dtype):
    """One random pack: its settings, and per tensor the largest error, the naive one of the same type, and the bound."""
    rng = random.Random(f"{number} {dtype}")
    torch.manual_seed(number)
    D, (Hq, Hkv), causal = M.HEAD_SIZES[number % 4], rng.choice([(1, 1), (2, 2), (2, 1), (3, 1)]), number // 4 % 2 == 1
    most = rng.choice([70, 140, 300]) if dtype == torch.float16 else [300, 150, 100, 100][number // 4 % 4]
    cu = torch.tensor([0, *torch.tensor(random_lengths(rng, most)).cumsum(0).tolist()], dtype=torch.int32)
    T = int(cu[-1])
    layout, inputs = laid_out(rng, T, Hq, Hkv, D, dtype)
    weight = torch.randn(T, Hq, D).to(dtype)
    exact = output_and_gradients(naive, [x.double() for x in inputs], weight.double(), cu, causal)
    same_type = output_and_gradients(naive, inputs, weight, cu, causal)
    ours = output_and_gradients(M.fused_attention, inputs, weight, cu, causal)
    row = {"pack": number, "type": str(dtype)[6:], "D": D, "heads": [Hq, Hkv], "causal": causal, "cu_seqlens": cu.tolist(), "layout": layout}
    for name, a, n, e in zip(("out", "dq", "dk", "dv"), ours, same_type, exact):
        error, naive_error = ((x.double() - e).abs().max().item() for x in (a, n))
        row[name] = {"error": error, "naive": naive_error, "bound": 2 * naive_error + last_place(e.abs().max().item(), dtype),
                     "type": str(a.dtype)[6:]}
    return row


def check_isolation(dtype):
    """A document turned into NaN changes no bit of another's output or gradients."""
    torch.manual_seed(1)
    cu = torch.tensor([0, 37, 37, 170, 171, 240], dtype=torch.int32)
    inputs, weight = [torch.randn(240, h, 32).to(dtype) for h in (2, 1, 1)], torch.randn(240, 2, 32).to(dtype)
    changed = {}
    for causal in (False, True):
        before = output_and_gradients(M.fused_attention, inputs, weight, cu, causal)
        again = output_and_gradients(M.fused_attention, inputs, weight, cu, causal)
        spoilt = [x.clone() for x in inputs]
        for x in spoilt:
            x[37:170] = torch.nan
        after = output_and_gradients(M.fused_attention, spoilt, weight, cu, causal)
        same = [all(torch.equal(x[rows], y[rows]) for rows in (slice(0, 37), slice(170, 240))) for x, y in zip(before, after)]
        changed["causal" if causal else "bidirectional"] = {"others": not all(same), "repeat": not all(map(torch.equal, before, again)),
                                                            "itself": all(bool(x[37:170].isnan().all()) for x in after)}
    return changed


def check_operator():
    """opcheck, compilation in one graph, activation checkpointing, autocast, shared tiles; True where it holds."""
    torch.manual_seed(2)
    cu = torch.tensor([0, 9, 9, 40, 45], dtype=torch.int32)
    inputs, weight = [torch.randn(45, h, 16, requires_grad=True) for h in (2, 1, 1)], torch.randn(45, 2, 16)
    tiles = M.fused_tiles(cu, True, 45)
    torch.library.opcheck(M.attention_op, (*inputs, tiles, True))
    out, lse = (x.detach() for x in M.attention_op(*inputs, tiles, True))
    torch.library.opcheck(M.gradient_op, (*(x.detach() for x in inputs), out, lse, weight, tiles, True))
    wanted = output_and_gradients(M.fused_attention, inputs, weight, cu, True)
    joined = torch.compile(M.fused_attention, fullgraph=True, backend="aot_eager")

    def layers(q, k, v, *arguments):
        return M.computed_again(M.fused_attention, q, k, v, *arguments)

    def same(function, *arguments):
        return all(map(torch.equal, output_and_gradients(function, inputs, weight, *arguments), wanted))
    summed = torch.autograd.grad(M.fused_attention(*inputs, cu, True).sum(), inputs)
    ones = output_and_gradients(M.fused_attention, inputs, torch.ones_like(weight), cu, True)[1:]
    with torch.autocast("cpu", torch.float16):
        half = M.fused_attention(*inputs, cu, True)
    return {"opcheck": True, "compiled": same(joined, cu, True), "checkpointed": same(layers, cu, True),
            "tiles shared": same(M.fused_attention, cu, True, tiles), "chosen": same(M.attention, cu, True),
            "autocast": torch.equal(half, M.fused_attention(*(x.half() for x in inputs), cu, True)),
            "expanded gradient": all(map(torch.equal, summed, ones))}


def small_model():
    from transformers import Qwen2AudioConfig
    model = M.random_model(Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
                      "encoder_ffn_dim": 64, "num_mel_bins": 80},
        text_config={"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": True},
        audio_token_index=60), 1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def small_batch(samples, text, length):
    """One clip, then text, then the tail of a pack of `length` positions."""
    ids = torch.cat([torch.tensor([61, *[60] * M.audio_positions(samples), 62]), torch.arange(text)])
    cu = torch.tensor([0, len(ids)] + [length] * 3, dtype=torch.int32)
    ids = torch.cat([ids, torch.zeros(length - len(ids), dtype=torch.long)])
    return {"ids": ids, "labels": ids.roll(-1), "position_ids": torch.arange(length), "waveforms": [torch.randn(samples)],
            "cu_seqlens": cu, "chunk": 64}


def check_model():
    """Largest difference of the loss, gradients and answers of a small model by fused and by plain attention."""
    model, batch, results, chooser = small_model(), small_batch(8000, 20, 40), [], M.fused_here
    for M.fused_here in (chooser, lambda device, head: False):
        model.zero_grad()
        loss = model(**batch)
        loss.backward()
        answer = M.generate(model, [(batch["ids"], batch["waveforms"]), (batch["ids"][-5:], [])], 4, [], [])
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), answer))
    M.fused_here = chooser
    (a, b, c), (x, y, z) = results
    return {"loss": abs(a - x) / x, "gradient": ((b - y).norm() / y.norm()).item(), "answers": c == z}


def check_compilations():
    """How often blocks are compiled, as whole graphs, while clips and documents of four batches change their lengths."""
    model, compiled = small_model(), []

    def backend(graph, inputs):                         # one for all: blocks share what it compiled
        compiled.append(graph)
        return graph.forward
    for block in [*model.audio_tower.layers, *model.language_model.model.layers]:
        block.compile(backend=backend, fullgraph=True)
    for samples, text in ((8000, 20), (9000, 30), (4000, 7), (12000, 12)):
        model(**small_batch(samples, text, 64))
    return len(compiled)


def interpret():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)            # fills what torch.empty gives with NaN
    packs = [check_pack(number, torch.float16) for number in range(20)] + [check_pack(number, torch.float32) for number in range(16)]
    return {"poisoned": bool(torch.empty(9).isnan().all()), "packs": packs, "isolation": [check_isolation(t) for t in (torch.float16, torch.float32)],
            "operator": check_operator(), "model": check_model(), "compilations": check_compilations()}


# ---- what runs in the compiler's process ----

class NoDevice:
    """In place of Triton's driver: compile for a Hopper GPU that is not here."""

    def get_current_target(self):
        return M.triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(kernel):
    """Registers of a thread, bytes of its stack (where spilled registers go) and of shared memory; instructions used."""
    tool = Path(M.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    ptx = kernel.asm["ptx"]
    return {"registers": registers, "stack": stack + local, "shared": kernel.metadata.shared,
            "tensor cores": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)), "tf32": "tf32" in ptx}


def compile_all():
    """Every kernel as fused_attention would launch it, forward and backward, compiled in place of being run."""
    M.triton.runtime.driver.set_active(NoDevice())
    function, rows, setting = M.triton.runtime.jit.JITFunction, [], {}
    launch = function.run

    def run(self, *arguments, **options):
        kernel = launch(self, *arguments, **options | {"warmup": True})
        rows.append(setting | {"kernel": self.fn.__name__} | resources(kernel))
        return kernel
    function.run = run
    cases = [(causal, group) for causal, group in ((False, 1), (True, 2))]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in M.HEAD_SIZES:
            for causal, group in cases + [(True, 7)] * (dtype == torch.bfloat16 and D == 64):
                setting.update({"type": str(dtype)[6:], "D": D, "causal": causal, "group": group})
                q, k = (torch.zeros(256, heads, D, dtype=dtype, requires_grad=True) for heads in (2 * group, 2))
                M.fused_attention(q, k, k, torch.tensor([0, 256], dtype=torch.int32), causal).sum().backward()
    return {"kernels": rows}


# ---- what pytest looks at ----

def elsewhere(what, **environment):
    """The JSON that this file prints when a process of its own runs it."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"} | environment
        done = subprocess.run([sys.executable, __file__, what], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


needs_triton = pytest.mark.skipif(M.triton is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def interpreted():
    return elsewhere("interpret", TRITON_INTERPRET="1")


@needs_triton
def test_error_is_at_most_twice_the_naive_one(interpreted):
    packs = interpreted["packs"]
    assert len(packs) >= 30 and {(p["type"], p["D"], p["causal"]) for p in packs} == {
        (t, D, c) for t in ("float16", "float32") for D in M.HEAD_SIZES for c in (False, True)}
    for kind in ("float16", "float32"):
        shares = {name: max(p[name]["error"] / p[name]["bound"] for p in packs if p["type"] == kind) for name in ("out", "dq", "dk", "dv")}
        print(kind, "largest error over its bound:", {name: round(share, 2) for name, share in shares.items()})
    for p in packs:
        for name in ("out", "dq", "dk", "dv"):
            assert p[name]["type"] == p["type"] and p[name]["error"] <= p[name]["bound"], p


@needs_triton
def test_every_element_is_written(interpreted):
    assert interpreted["poisoned"]                      # then the errors above, none of them NaN, say it
    assert all(p[name]["error"] == p[name]["error"] for p in interpreted["packs"] for name in ("out", "dq", "dk", "dv"))


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
    assert found["loss"] < 1e-6 and found["gradient"] < 1e-5 and found["answers"], found


@needs_triton
def test_few_compilations(interpreted):
    assert 2 <= interpreted["compilations"] <= 4


@needs_triton
def test_kernels_compile_for_hopper():
    rows = elsewhere("compile", TRITON_INTERPRET="0")["kernels"]
    assert len(rows) == 3 * (3 * 4 * 2 + 1)
    for row in rows:
        print(*row.values())
        assert row["stack"] == 0 and row["shared"] <= SHARED_LIMIT and not row["tf32"], row
        assert (row["tensor cores"] > 0) == (row["type"] != "float32"), row


# ---- the operations that the MFU counts ----

def flops_by_formula(samples, text, supervised):
    heard = M.audio_positions(samples) if samples else 0
    clips = [samples] if samples else []
    pack = M.Pack(None, None, None, [0, heard + text], None, clips, None, [], supervised, 9, [], {})
    return M.step_flops(small_model(), pack)


def test_step_flops_are_those_of_the_products():
    """By hand, for one text, then for a clip beside it; the 9 positions left over never count."""
    n, d, ffn, heads, kv, vocab = 100, 64, 64, 64, 32, 64
    layer = 2 * n * (d * heads + 2 * d * kv + heads * d + 3 * d * ffn) + 2 * 2 * heads * n * n / 2
    assert flops_by_formula(0, n, 7) == 3 * (2 * layer + 2 * 7 * d * vocab)
    samples, a, frames, heard = 16000, 32, 50, 25                        # 100 frames, 50 rows of the encoder, 25 vectors
    clip = 2 * 100 * 3 * 80 * a + 2 * frames * 3 * a * a + 2 * (2 * frames * (4 * a * a + 2 * a * 64) + 4 * frames * frames * a)
    longer = flops_by_formula(0, n + heard, 7)
    assert flops_by_formula(samples, n, 7) == longer + 3 * (clip + 2 * heard * a * d)


# ---- the script that measures on a GPU ----

def gpu_script(*arguments, **environment):
    return subprocess.run([sys.executable, ROOT / "tests" / "gpu.py", *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment)


def test_without_a_gpu_one_sentence(tmp_path):
    done = gpu_script(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "needs a CUDA GPU" in done.stderr and not list(tmp_path.iterdir())


def test_gpu_script_walks_through(tmp_path):
    """At toy sizes on the CPU: the step agrees with transformers'; the peers that have no CPU version fail without harm."""
    done = gpu_script(tmp_path, "kernel", "step", INSERTER_DRY="1")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert all("flash-2" in name or "flex" in name for name in found["errors"]), found["errors"]
    assert found["step"]["losses"]["agree"] and found["step"]["unmatched names"] == 0 and len(found["step"]["ours"]) == 4
    assert all({"ours", "padded sdpa"} <= set(row["times"]) for row in found["kernel"]["rows"]) and "times as fast" in done.stdout


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
