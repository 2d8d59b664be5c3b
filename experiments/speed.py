"""How fast: synthesis against the bare TTS library, a training step against transformers.

    python experiments/speed.py [synth] [step] [full]     all by default; full: at Qwen's whole vocabulary
    REAL_WEIGHTS=FOLDER python experiments/speed.py real  Whisper-tiny and SmolLM2-135M, copies in FOLDER

Writes results/speed.json. One thread, what is compared runs in turn, medians of ROUNDS. What counts is the
ratios. gpu.py compares the same on a GPU, by the functions of section 2.
"""
import ctypes
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np                           # noqa: E402
import torch                                 # noqa: E402
import transformers                          # noqa: E402
from torch import Tensor, nn                 # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import Qwen2AudioConfig    # noqa: E402

import inserter                              # noqa: E402
import synth                                 # noqa: E402
from inserter import IGNORE, Encoded, InSerter, audio_positions, convolved    # noqa: E402
from synth import RATE, Settings             # noqa: E402

ROUNDS = 7
clock = time.perf_counter


# --------------------------------------------------------------------------------------------------
# 1. Synthesis: texts to shard, against espeak alone
# --------------------------------------------------------------------------------------------------

def bare(espeak: synth.Espeak, texts: list[str], voices: list[dict]) -> float:
    """What the library alone does: set voice and parameters, synthesise, keep the bytes.

    -> seconds of speech
    """
    library = espeak.library
    pieces = []

    def keep(wave: Any, samples: int, events: Any) -> int:
        if wave and samples > 0:
            pieces.append(ctypes.string_at(wave, 2 * samples))
        return 0

    callback = type(espeak.callback)(keep)
    library.espeak_SetSynthCallback(callback)
    library.espeak_ng_SetRandSeed(0)
    for text, voice in zip(texts, voices):
        library.espeak_SetVoiceByName(f"gmw/en-US+{voice['timbre']}".encode())
        library.espeak_SetParameter(1, voice["rate"], 0)
        library.espeak_SetParameter(3, voice["pitch"], 0)
        data = text.encode()
        library.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)
    library.espeak_SetSynthCallback(espeak.callback)
    return sum(map(len, pieces)) / 2 / espeak.rate


class Stopwatch:
    """Calls functions and adds up the seconds of each part of the work."""

    def __init__(self):
        self.seconds = Counter()

    def __call__(self, part: str, function: Callable, *arguments: Any) -> Any:
        begun = clock()
        result = function(*arguments)
        self.seconds[part] += clock() - begun
        return result


def whole(espeak: synth.Espeak, texts: list[str], voices: list[dict], settings: Settings, path: Path,
          timed: Stopwatch) -> None:
    """The same clips as synth.py makes them, into a shard on disk."""
    samples = []
    clips = {}
    for first in range(0, len(texts), synth.CLIPS_AT_ONCE):
        some = slice(first, first + synth.CLIPS_AT_ONCE)
        waves, rate = timed("synthesis", espeak, texts[some], voices[some], first)
        for text, voice, wave in zip(texts[some], voices[some], waves):
            wave = timed("resampling", synth.to_16k, wave, rate)
            if timed("gate", synth.gate, wave, text, settings.gate):
                continue
            name = f"speed-train-{len(samples):06d}"
            part = {
                "role": "speech",
                "text": text,
                "audio": "00.flac",
                "seconds": len(wave) / RATE,
                "voice": voice["id"]}
            samples.append({"id": name, "recipe": "tasks", "lang": "en", "parts": [part], "messages": None})
            clips[name] = {"00.flac": timed("flac", synth.flac_bytes, wave)}
    timed("json, tar, disk", synth.write_shard, path, samples, clips, {})


def draw_spans(c: Settings, rng: random.Random, count: int) -> list[str]:
    """Spans of the tiny world's stories, as long as those that synth.py speaks."""
    spans = []
    while len(spans) < count:
        story = synth.story(rng, c.synth.facts)
        spans += [story[start:end] for start, end in synth.segments(story, c.synth, rng)]
    return spans[:count]


def measure_synth() -> dict:
    c = synth.load_config([])
    rng = random.Random(0)
    espeak = synth.load_engine("espeak")
    texts = draw_spans(c, rng, 300)
    candidates = synth.candidates("train", c.synth)
    voices = [synth.draw_voice(rng, candidates, c.synth) for _ in texts]
    timed = Stopwatch()
    bares = []
    wholes = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train-000000.tar"
        bare(espeak, texts[:20], voices)                                 # warm both
        whole(espeak, texts[:20], voices[:20], c.synth, path, Stopwatch())
        for _ in range(ROUNDS):
            begun = clock()
            speech = bare(espeak, texts, voices)
            middle = clock()
            whole(espeak, texts, voices, c.synth, path, timed)
            bares.append(middle - begun)
            wholes.append(clock() - middle)
    shares = {part: seconds / sum(wholes) for part, seconds in timed.seconds.items()}
    shares["rest"] = 1 - sum(shares.values())
    ratios = [b / w for b, w in zip(bares, wholes)]
    results = {
        "clips": len(texts),
        "speech_seconds": speech,
        "bare_real_time": speech / statistics.median(bares),
        "whole_real_time": speech / statistics.median(wholes),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "shares": shares}
    print(f"\nsynthesis: {len(texts)} clips, {speech:.0f} s of speech, {ROUNDS} rounds in turn, one thread")
    print(f"  espeak alone {results['bare_real_time']:,.0f} x real time, whole path "
          f"{results['whole_real_time']:,.0f} x: {results['ratio']:.0%} (from {min(ratios):.0%} to "
          f"{max(ratios):.0%}; wanted 55 %)")
    clip_ms = 1000 * statistics.mean(wholes) / len(texts)
    for part, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"  {part:24s}{share:6.1%} {share * clip_ms:7.2f} ms a clip")
    return results


# --------------------------------------------------------------------------------------------------
# 2. The same weights and samples for ours and for transformers' Qwen2AudioForConditionalGeneration
# --------------------------------------------------------------------------------------------------

Drawn = list[tuple[str, float]]    # of a sample: [("text", 31 tokens), ("speech", 3.2 seconds), …]


def untied_config(audio: dict, text: dict) -> Qwen2AudioConfig:
    """Untied, so that both sides train the same parameters: transformers ignores tied embeddings."""
    return Qwen2AudioConfig(audio_config=audio, text_config=text | {"tie_word_embeddings": False},
                            audio_token_index=text["vocab_size"] - 1)


def loud_model(config: Qwen2AudioConfig) -> InSerter:
    """Random weights that all count: a fresh model's blocks are the identity."""
    model = inserter.random_model(config, seed=1)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def peer_of(model: InSerter) -> tuple[nn.Module, int]:
    """transformers' model of the same weights, and how many names of the checkpoint it did not understand."""
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        inserter.save_model(model, Path(folder))
        peer, report = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
            folder, attn_implementation="sdpa", dtype=torch.float32, output_loading_info=True)
    for trained in (model, peer):            # Whisper's positions are constants
        for name, p in trained.named_parameters():
            p.requires_grad_("embed_positions" not in name)
    return peer.train(), len(report["missing_keys"]) + len(report["unexpected_keys"])


def make_sample(drawn: Drawn, config: Qwen2AudioConfig, rng: np.random.Generator) -> Encoded:
    """Noise for speech, random words for text; all text is a target."""
    audio = config.audio_token_index
    ids = []
    is_target = []
    clips = []
    for role, n in drawn:
        if role == "text":
            ids += rng.integers(0, audio - 2, n).tolist()
            is_target += [True] * n
        else:
            clips.append((0.1 * rng.standard_normal(round(n * RATE))).astype(np.float32))
            heard = audio_positions(len(clips[-1]))
            ids += [audio - 2] + [audio] * heard + [audio - 1]
            is_target += [False] * (heard + 2)
    labels = [i if target else IGNORE for i, target in zip([*ids[1:], 0], [*is_target[1:], True])]
    return Encoded("sample", [*ids, 0], [*labels, IGNORE], clips, word_ids=[[] for _ in clips])


def targets_of(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"] != IGNORE).sum())


def their_batches(samples: list[Encoded], at_once: int, device: str = "cpu") -> list[dict[str, Tensor]]:
    """The samples for transformers, sorted by length to spare padding, with their log-mel features."""
    extract = transformers.WhisperFeatureExtractor(80)
    samples = sorted(samples, key=lambda sample: len(sample.ids))
    batches = []
    for start in range(0, len(samples), at_once):
        some = samples[start:start + at_once]
        ids = [torch.tensor(sample.ids) for sample in some]
        labels = [torch.tensor([IGNORE, *sample.labels[:-1]]) for sample in some]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE)}
        clips = [clip for sample in some for clip in sample.clips]
        if clips:
            heard = extract(clips, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
            batch["input_features"] = heard.input_features
            batch["feature_attention_mask"] = heard.attention_mask
        batches.append({name: x.to(device) for name, x in batch.items()})
    return batches


def step_flops(config: Qwen2AudioConfig, lengths: Tensor, frames: Tensor, targets: float) -> float:
    """Multiplications and additions of a step over real tokens and frames, forward and backward.

    A matrix takes two per entry and row; attention two products of L x L x width per clip, half of that where
    causal. Nothing that is padded, recomputed or not a matrix product counts.

    lengths: (documents,) positions   frames: (clips,) of 10 ms   targets: positions that have logits
    """
    audio = config.audio_config
    text = config.text_config
    d = audio.d_model
    outputs = convolved(frames).double()     # L of each clip
    tokens = lengths.double()
    queries = inserter.head_size_of(text) * text.num_attention_heads
    keys = inserter.head_size_of(text) * text.num_key_value_heads
    convolutions = 2 * 3 * d * (2 * audio.num_mel_bins + d) * outputs.sum()
    matrices = 4 * d ** 2 + 2 * d * audio.encoder_ffn_dim
    encoder_block = 2 * matrices * outputs.sum() + 4 * d * (outputs ** 2).sum()
    adapter = 2 * text.hidden_size * d * (outputs // 2).sum()
    matrices = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    llm_block = 2 * matrices * tokens.sum() + 2 * queries * (tokens ** 2).sum()
    head = 2 * text.hidden_size * text.vocab_size * targets
    forward = convolutions + audio.encoder_layers * encoder_block + adapter
    return 3 * float(forward + text.num_hidden_layers * llm_block + head)


def padded_flops(config: Qwen2AudioConfig, lengths: Tensor, clips: int) -> float:
    """The same when every clip lasts 30 s and logits are made at every position."""
    return step_flops(config, lengths, torch.full((clips,), inserter.MAX_FRAMES), int(lengths.sum()))


# --------------------------------------------------------------------------------------------------
# 3. A training step on one thread of a CPU
# --------------------------------------------------------------------------------------------------

def tiny_config() -> Qwen2AudioConfig:
    """The sizes of config.yaml."""
    sizes = synth.load_config([]).model
    return untied_config(dict(sizes.audio), dict(sizes.text))


def base_config(vocab: int) -> Qwen2AudioConfig:
    """Whisper-base and four layers of Qwen2.5-0.5B."""
    audio = {"num_mel_bins": 80, "d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8,
             "encoder_ffn_dim": 2048, "max_source_positions": 1500}
    text = {"vocab_size": vocab, "hidden_size": 896, "num_hidden_layers": 4, "num_attention_heads": 14,
            "num_key_value_heads": 2, "intermediate_size": 4864}
    return untied_config(audio, text)


def real_model(folder: str) -> InSerter:
    """Whisper and SmolLM2 joined; untied, for transformers' Qwen2-Audio ties nothing."""
    whisper = f"model.encoder={folder}/whisper-tiny.en"
    c = synth.load_config([whisper, f"model.llm={folder}/smollm2-135m-instruct"])
    model = inserter.fresh_model(c, inserter.load_tokenizer(c))
    model.language_model.lm_head.weight = nn.Parameter(model.language_model.lm_head.weight.detach().clone())
    model.config.text_config.tie_word_embeddings = False
    return model


def measure_step(name: str, model: InSerter, count: int, with_optimizer: bool) -> dict:
    """Steps on samples of one clip, 2 s on average (1 to 3), and 30 tokens.

    Ours make their log-mel frames each time; the peer's are made beforehand.
    """
    peer, unmatched = peer_of(model)
    assert not unmatched, unmatched
    rng = np.random.default_rng(0)
    seconds = [1 + 2 * (n + 0.5) / count for n in range(count)]
    samples = [make_sample([("speech", length), ("text", 30)], model.config, rng) for length in seconds]
    batch = inserter.collate(samples, model.mels)
    (theirs,) = their_batches(samples, count)
    targets = targets_of(batch)
    models = {"inserter": model, "transformers": peer}
    forwards = {
        "inserter": lambda: model(inserter.collate(samples, model.mels), chunk=2048) / targets,
        "transformers": lambda: peer(**theirs).loss}
    trained = {who: [p for p in network.parameters() if p.requires_grad] for who, network in models.items()}
    counts = {who: sum(p.numel() for p in parameters) for who, parameters in trained.items()}
    assert counts["inserter"] == counts["transformers"], counts
    losses = {who: float(forward().detach()) for who, forward in forwards.items()}
    assert abs(losses["inserter"] - losses["transformers"]) < 1e-4, losses
    optimizers = {}
    if with_optimizer:
        for who, parameters in trained.items():
            optimizers[who] = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(who: str) -> float:
        begun = clock()
        forwards[who]().backward()
        if with_optimizer:
            optimizers[who].step()
        models[who].zero_grad(set_to_none=True)
        return clock() - begun

    step("inserter")                         # warm both
    step("transformers")
    rounds = [(step("inserter"), step("transformers")) for _ in range(ROUNDS)]
    ratios = [slow / fast for fast, slow in rounds]
    longest = torch.full((count,), theirs["input_ids"].shape[1])
    logits = targets * 4 / 3                 # made again in the backward pass, beside three products
    work = step_flops(model.config, batch["lengths"], batch["frames"], logits)
    results = {
        "parameters": counts["inserter"],
        "samples": count,
        "losses": losses,
        "inserter_seconds": statistics.median(fast for fast, _ in rounds),
        "transformers_seconds": statistics.median(slow for _, slow in rounds),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "flop_ratio": padded_flops(model.config, longest, count) / work}
    show_step(name, results, with_optimizer)
    return results


def show_step(name: str, results: dict, with_optimizer: bool) -> None:
    passes = "forward, backward, AdamW" if with_optimizer else "forward, backward"
    ratios = results["ratios"]
    losses = results["losses"]
    print(f"\nstep, {name}: {results['parameters'] / 1e6:.1f} M parameters, {results['samples']} samples, "
          f"{passes}, float32, {torch.get_num_threads()} thread")
    print(f"  losses {losses['inserter']:.6f} and {losses['transformers']:.6f}")
    print(f"  inserter {results['inserter_seconds']:.3f} s, transformers "
          f"{results['transformers_seconds']:.3f} s: {results['ratio']:.1f} times as fast (from "
          f"{min(ratios):.1f} to {max(ratios):.1f}; wanted 5); by FLOPs {results['flop_ratio']:.1f}")


def measure_steps(chosen: list[str]) -> dict:
    rows = {}
    if "step" in chosen:
        rows["tiny"] = measure_step("config.yaml's sizes", loud_model(tiny_config()), 16, with_optimizer=True)
    for part, vocab in (("step", 16384), ("full", 151936)):
        if part in chosen:
            gc.collect()                     # the models before are large
            name = f"Whisper-base and 4 layers of Qwen2.5-0.5B, vocabulary {vocab}"
            rows[name] = measure_step(name, loud_model(base_config(vocab)), 4, with_optimizer=False)
    if "real" in chosen:
        gc.collect()
        name = "Whisper-tiny.en and SmolLM2-135M-Instruct"
        rows[name] = measure_step(name, real_model(os.environ["REAL_WEIGHTS"]), 8, with_optimizer=True)
        rows[name]["command"] = "REAL_WEIGHTS=FOLDER python experiments/speed.py real"
    return rows


def main(arguments: list[str]) -> None:
    chosen = arguments or ["synth", "step", "full"]
    torch.set_num_threads(1)
    path = ROOT / "results" / "speed.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    if "synth" in chosen:
        results["synth"] = measure_synth()
    results["step"] = results.get("step", {}) | measure_steps(chosen)
    results["command"] = "python experiments/speed.py"
    synth.write_whole(path, json.dumps(results, indent=1).encode() + b"\n")
    print(f"\n{path.relative_to(ROOT)} is written")


if __name__ == "__main__":
    synth.run(main)
