"""How fast: synthesis against the bare TTS library, a training step against transformers.

    python tests/speed.py [synth] [step] [full]     (all by default; full: a step at Qwen's whole vocabulary)
    REAL_WEIGHTS=FOLDER python tests/speed.py real  a step of Whisper-tiny and SmolLM2-135M, from FOLDER's copies

Writes results/speed.json. One thread, what is compared runs in turn, medians. What counts is the ratios.
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

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import inserter                              # noqa: E402
import synth                                 # noqa: E402
from synth import Settings                   # noqa: E402

ROUNDS = 7
TEXT = 30                                    # tokens of a sample behind its clip, all of them targets
clock = time.perf_counter


# --------------------------------------------------------------------------------------------------
# 1. Synthesis: texts to shard, against espeak alone
# --------------------------------------------------------------------------------------------------

def bare(espeak: synth.Espeak, texts: list[str], voices: list[dict]) -> float:
    """What the library alone needs: set voice and parameters, synthesise, keep the bytes -> seconds."""
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
    samples, clips = [], {}
    for first in range(0, len(texts), synth.CLIPS_AT_ONCE):
        some = slice(first, first + synth.CLIPS_AT_ONCE)
        waves, rate = timed("synthesis", espeak, texts[some], voices[some], first)
        waves = timed("resampling", synth.to_16k, waves, rate)
        for text, voice, wave in zip(texts[some], voices[some], waves):
            if timed("gate", synth.gate, wave, text, settings.gate):
                continue
            name = f"speed-train-{len(samples):06d}"
            part = {
                "role": "speech",
                "text": text,
                "audio": "00.flac",
                "seconds": len(wave) / synth.RATE,
                "voice": voice["id"]}
            samples.append({"id": name, "recipe": "tasks", "lang": "en", "parts": [part], "messages": None})
            clips[name] = {"00.flac": timed("flac", lambda w: synth.flac_bytes(synth.to_int16(w)), wave)}
    timed("json, tar, digest, disk", synth.write_shard, path, samples, clips, {"counts": {}})


def draw_spans(c: Settings, rng: random.Random, count: int) -> list[str]:
    """Spans of the tiny world's stories, as long as those that synth.py speaks."""
    spans = []
    for _ in range(count):
        story = synth.story(rng, c.synth.facts)
        spans += [story[start:end] for start, end in synth.segments(story, c.synth, rng)]
    return spans[:count]


def measure_synth() -> dict:
    c = synth.load_config([])
    rng = random.Random(0)
    espeak = synth.Espeak()
    texts = draw_spans(c, rng, 300)
    candidates = synth.candidates("train", c.synth)
    voices = [synth.draw_voice(rng, candidates, c.synth) for _ in texts]
    timed = Stopwatch()
    bares, wholes = [], []
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
    show_synth(results, 1000 * statistics.mean(wholes) / len(texts))
    return results


def show_synth(results: dict, clip_ms: float) -> None:
    ratios = results["ratios"]
    print(f"\nsynthesis: {results['clips']} clips, {results['speech_seconds']:.0f} s of speech, "
          f"{ROUNDS} rounds in turn, one thread")
    print(f"  espeak alone {results['bare_real_time']:,.0f} x real time, whole path "
          f"{results['whole_real_time']:,.0f} x: {results['ratio']:.0%} (from {min(ratios):.0%} to "
          f"{max(ratios):.0%}; wanted 55 %)")
    for part, share in sorted(results["shares"].items(), key=lambda item: -item[1]):
        print(f"  {part:24s}{share:6.1%} {share * clip_ms:7.2f} ms a clip")


# --------------------------------------------------------------------------------------------------
# 2. A training step, against Qwen2AudioForConditionalGeneration
# --------------------------------------------------------------------------------------------------

def config_of(vocab: int, audio: dict, text: dict) -> Qwen2AudioConfig:
    """Untied, so that both sides train the same parameters: transformers ignores tied embeddings."""
    audio = {"model_type": "qwen2_audio_encoder"} | audio
    text = {"model_type": "qwen2", "vocab_size": vocab, "tie_word_embeddings": False} | text
    return Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=vocab - 1)


def tiny_config() -> Qwen2AudioConfig:
    """The sizes of config.yaml."""
    m = synth.load_config([]).model
    audio = {
        "num_mel_bins": m.mels,
        "encoder_layers": m.encoder_layers,
        "d_model": m.encoder_width,
        "encoder_attention_heads": m.encoder_heads,
        "encoder_ffn_dim": 4 * m.encoder_width}
    text = {
        "num_hidden_layers": m.llm_layers,
        "hidden_size": m.llm_width,
        "num_attention_heads": m.llm_heads,
        "num_key_value_heads": m.llm_kv_heads,
        "intermediate_size": m.llm_ffn}
    return config_of(m.vocab, audio, text)


def base_config(vocab: int) -> Qwen2AudioConfig:
    """Whisper-base and four layers of Qwen2.5-0.5B."""
    audio = {
        "num_mel_bins": 80,
        "encoder_layers": 6,
        "d_model": 512,
        "encoder_attention_heads": 8,
        "encoder_ffn_dim": 2048}
    text = {
        "num_hidden_layers": 4,
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864}
    return config_of(vocab, audio, text)


def make_batch(config: Qwen2AudioConfig, samples: int) -> tuple[dict, dict]:
    """Samples of one clip, 2 s on average (1 to 3), and 30 tokens: as arguments of ours, and of theirs."""
    rng = np.random.default_rng(0)
    audio = config.audio_token_index
    clips, documents, targets = [], [], []
    for i in range(samples):
        seconds = 1 + 2 * (i + 0.5) / samples
        clips.append((0.1 * rng.standard_normal(int(seconds * synth.RATE))).astype(np.float32))
    for clip in clips:
        words = torch.from_numpy(rng.integers(0, config.text_config.vocab_size - 3, TEXT))
        heard = torch.tensor([audio - 2] + [audio] * inserter.audio_positions(len(clip)) + [audio - 1])
        documents.append(torch.cat([heard, words]))
        targets.append(torch.cat([torch.full_like(heard, inserter.IGNORE), words]))
    nothing = torch.tensor([inserter.IGNORE])
    lengths = [len(document) for document in documents]
    ours = {
        "ids": torch.cat(documents),
        "labels": torch.cat([torch.cat([target[1:], nothing]) for target in targets]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "waveforms": [torch.from_numpy(clip) for clip in clips],
        "chunk": 2048}
    extract = WhisperFeatureExtractor(config.audio_config.num_mel_bins)
    features = extract(clips, sampling_rate=synth.RATE, return_tensors="pt", return_attention_mask=True)
    theirs = {
        "input_ids": pad_sequence(documents, True),
        "labels": pad_sequence(targets, True, inserter.IGNORE),
        "attention_mask": pad_sequence([torch.ones_like(document) for document in documents], True),
        "input_features": features.input_features,
        "feature_attention_mask": features.attention_mask}
    return ours, theirs


def flops(config: Qwen2AudioConfig, clip_samples: list[int], padded: bool) -> float:
    """Multiplications and additions of a step, forward and backward, by the matrix products alone."""
    audio = config.audio_config
    text = config.text_config
    d = audio.d_model
    width = text.hidden_size
    head_size = width // text.num_attention_heads
    heads = text.num_attention_heads + text.num_key_value_heads
    matrices = width * head_size * 2 * heads + 3 * width * text.intermediate_size
    longest = max(map(inserter.audio_positions, clip_samples)) + 2 + TEXT
    total = 0
    for samples in clip_samples:
        heard = inserter.audio_positions(samples)
        frames = 3000 if padded else inserter.context_frames(samples)
        rows = frames // 2
        pooled = 750 if padded else heard
        length = longest if padded else heard + 2 + TEXT
        asked = longest if padded else TEXT
        convolutions = 2 * 3 * d * (frames * audio.num_mel_bins + rows * d)
        encoder_block = 2 * rows * (12 * d ** 2) + 4 * rows ** 2 * d
        llm_block = 2 * length * matrices + 2 * length ** 2 * width
        forward = convolutions + audio.encoder_layers * encoder_block + 2 * pooled * d * width
        forward += text.num_hidden_layers * llm_block
        logits = 2 * width * text.vocab_size * asked
        total += 3 * forward + logits * (3 if padded else 4)             # ours are computed again going back
    return total


def measure_step(name: str, model: inserter.InSerter, samples: int, with_optimizer: bool) -> dict:
    config = model.config
    ours, theirs = make_batch(config, samples)
    peer = peer_of(model)
    targets = samples * TEXT
    forwards = {"inserter": lambda: model(**ours) / targets, "transformers": lambda: peer(**theirs).loss}
    models = {"inserter": model, "transformers": peer}
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
    clip_samples = [len(waveform) for waveform in ours["waveforms"]]
    results = {
        "parameters": counts["inserter"],
        "samples": samples,
        "losses": losses,
        "inserter_seconds": statistics.median(fast for fast, _ in rounds),
        "transformers_seconds": statistics.median(slow for _, slow in rounds),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "flop_ratio": flops(config, clip_samples, True) / flops(config, clip_samples, False)}
    show_step(name, results, with_optimizer)
    return results


def loud_model(config: Qwen2AudioConfig) -> inserter.InSerter:
    """Random weights that all count: a fresh model's blocks are the identity."""
    model = inserter.random_model(config, 1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def real_model(folder: str) -> inserter.InSerter:
    """Whisper and SmolLM2 joined; untied, for transformers' Qwen2-Audio ties nothing."""
    c = synth.load_config([f"model.encoder={folder}/whisper-tiny.en", f"model.llm={folder}/smollm2-135m-instruct"])
    model = inserter.fresh_model(c, inserter.load_tokenizer(c))
    model.language_model.lm_head.weight = nn.Parameter(model.language_model.lm_head.weight.detach().clone())
    model.config.text_config.tie_word_embeddings = False
    return model


def peer_of(model: inserter.InSerter) -> nn.Module:
    """transformers' model of the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        inserter.save_model(model, folder)
        peer = Qwen2AudioForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa")
    for name, p in peer.named_parameters():  # Whisper's positions are constants
        p.requires_grad_("embed_positions" not in name)
    return peer.train()


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
        rows[name]["command"] = "REAL_WEIGHTS=FOLDER python tests/speed.py real"
    return rows


def main(chosen: list[str]) -> None:
    torch.set_num_threads(1)
    path = ROOT / "results" / "speed.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    if "synth" in chosen:
        results["synth"] = measure_synth()
    results["step"] = results.get("step", {}) | measure_steps(chosen)
    results["command"] = "python tests/speed.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{path.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main(sys.argv[1:] or ["synth", "step", "full"])
