"""How fast: synthesis against the bare TTS library, a training step against transformers. Writes results/speed.json.

    python tests/speed.py [synth] [step] [full]        (all by default; full: the second step at Qwen's whole vocabulary)

One thread, what is compared runs in turn, medians. The numbers that count are the ratios.
"""
import ctypes
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor    # noqa: E402

import inserter                                         # noqa: E402
import synth                                            # noqa: E402

ROUNDS = 7
clock = time.perf_counter


# ---- synthesis: texts to shard, against espeak alone ----

def bare(espeak, texts, voices):
    """What the library alone needs: set voice and parameters, synthesise, keep the bytes. -> seconds of speech"""
    library, pieces = espeak.library, []

    def keep(wave, samples, events):
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


def whole(espeak, texts, voices, settings, path, spent):
    """The same clips as synth.py makes them, into a shard on disk; adds each part's seconds to `spent`."""
    def timed(part, function, *arguments):
        begin = clock()
        result = function(*arguments)
        spent[part] = spent.get(part, 0) + clock() - begin
        return result

    samples, clips = [], {}
    for first in range(0, len(texts), synth.CLIPS_AT_ONCE):
        some = slice(first, first + synth.CLIPS_AT_ONCE)
        waves, rate = timed("synthesis", espeak, texts[some], voices[some], first)
        for text, voice, wave in zip(texts[some], voices[some], timed("resampling", synth.to_16k, waves, rate)):
            if not timed("gate", synth.gate, wave, text, settings.gate):
                name = f"speed-train-{len(samples):06d}"
                part = {"role": "speech", "text": text, "audio": "00.flac", "seconds": len(wave) / synth.RATE, "voice": voice["id"]}
                samples.append({"id": name, "recipe": "tasks", "lang": "en", "parts": [part], "messages": None})
                clips[name] = {"00.flac": timed("flac", lambda: synth.flac_bytes(synth.to_int16(wave)))}
    timed("json, tar, digest, disk", synth.write_shard, path, samples, clips, {"counts": {}})


def measure_synth():
    c, rng, espeak = synth.load_config([]), random.Random(0), synth.Espeak()
    texts = [words for story in (synth.story(rng, c.synth.facts) for _ in range(300)) for words in
             (story[a:b] for a, b in synth.segments(story, c.synth, rng))][:300]
    chosen_from = synth.candidates("train", c.synth)
    voices = [synth.draw_voice(rng, chosen_from, c.synth) for _ in texts]
    bares, wholes, spent = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train-000000.tar"
        bare(espeak, texts[:20], voices), whole(espeak, texts[:20], voices[:20], c.synth, path, {})         # warm both
        for _ in range(ROUNDS):
            begin = clock()
            speech = bare(espeak, texts, voices)
            middle = clock()
            whole(espeak, texts, voices, c.synth, path, spent)
            bares.append(middle - begin)
            wholes.append(clock() - middle)
    ratios, shares = [b / w for b, w in zip(bares, wholes)], {part: seconds / sum(wholes) for part, seconds in spent.items()}
    shares["rest"] = 1 - sum(shares.values())
    real_time = [speech / statistics.median(seconds) for seconds in (bares, wholes)]
    print(f"\nsynthesis: {len(texts)} clips, {speech:.0f} s of speech, {ROUNDS} rounds in turn, one thread")
    print(f"  espeak alone {real_time[0]:,.0f} x real time, whole path {real_time[1]:,.0f} x: "
          f"{statistics.median(ratios):.0%} (from {min(ratios):.0%} to {max(ratios):.0%}; wanted 55 %)")
    for part, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"  {part:24s}{share:6.1%} {share * statistics.mean(wholes) / len(texts) * 1000:7.2f} ms a clip")
    return {"clips": len(texts), "speech_seconds": speech, "bare_real_time": real_time[0], "whole_real_time": real_time[1],
            "ratio": statistics.median(ratios), "ratios": ratios, "shares": shares}


# ---- a training step, against Qwen2AudioForConditionalGeneration ----

def sizes(vocab, mels, encoder_layers, d, encoder_heads, layers, width, heads, kv, ffn):
    """Untied, so that both sides train the same parameters: transformers ignores tied embeddings."""
    return Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "d_model": d, "encoder_layers": encoder_layers,
                      "encoder_attention_heads": encoder_heads, "encoder_ffn_dim": 4 * d, "num_mel_bins": mels},
        text_config={"model_type": "qwen2", "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers,
                     "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": False},
        audio_token_index=vocab - 1)


TEXT = 30                                                # tokens of a sample behind its clip, all of them targets


def make_batch(config, samples):
    """Samples of one clip, 2 s on average (1 to 3), and 30 tokens: as arguments of ours, and of theirs."""
    rng, clips = np.random.default_rng(0), []
    for i in range(samples):
        seconds = 1 + 2 * (i + 0.5) / samples
        clips.append((0.1 * rng.standard_normal(int(seconds * synth.RATE))).astype(np.float32))
    audio, documents = config.audio_token_index, []
    for clip in clips:
        words = torch.from_numpy(rng.integers(0, config.text_config.vocab_size - 3, TEXT))
        documents.append(torch.cat([torch.tensor([audio - 2] + [audio] * inserter.audio_positions(len(clip)) + [audio - 1]), words]))
    lengths = [len(d) for d in documents]
    targets = [torch.cat([torch.full((n - TEXT,), -100), d[-TEXT:]]) for n, d in zip(lengths, documents)]
    ours = {"ids": torch.cat(documents), "position_ids": torch.cat([torch.arange(n) for n in lengths]),
            "labels": torch.cat([torch.cat([t[1:], torch.tensor([-100])]) for t in targets]),
            "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), "chunk": 2048,
            "waveforms": [torch.from_numpy(clip) for clip in clips]}
    pad = torch.nn.utils.rnn.pad_sequence
    features = WhisperFeatureExtractor(config.audio_config.num_mel_bins)(clips, sampling_rate=synth.RATE, return_tensors="pt",
                                                                         return_attention_mask=True)
    theirs = {"input_ids": pad(documents, True), "labels": pad(targets, True, -100), "attention_mask": pad([torch.ones_like(d) for d in documents], True),
              "input_features": features.input_features, "feature_attention_mask": features.attention_mask}
    return ours, theirs


def flops(config, clip_samples, padded):
    """Multiplications and additions of a step, forward and backward, by the matrix products alone."""
    a, t = config.audio_config, config.text_config
    head, total, longest = t.hidden_size // t.num_attention_heads, 0, max(map(inserter.audio_positions, clip_samples)) + 2 + TEXT
    for samples in clip_samples:
        frames = 3000 if padded else inserter.context_frames(samples)
        rows, heard = frames // 2, inserter.audio_positions(samples)
        length = longest if padded else heard + 2 + TEXT
        encoder = 2 * rows * (12 * a.d_model ** 2) + 4 * rows ** 2 * a.d_model
        forward = 2 * 3 * a.d_model * (frames * a.num_mel_bins + rows * a.d_model) + a.encoder_layers * encoder
        forward += 2 * (750 if padded else heard) * a.d_model * t.hidden_size
        matrices = t.hidden_size * head * 2 * (t.num_attention_heads + t.num_key_value_heads) + 3 * t.hidden_size * t.intermediate_size
        forward += t.num_hidden_layers * (2 * length * matrices + 2 * length ** 2 * t.hidden_size)
        logits = 2 * t.hidden_size * t.vocab_size * (length if padded else TEXT)
        total += 3 * forward + logits * (3 if padded else 4)              # our logits are computed again in the backward pass
    return total


def measure_step(name, config, samples, with_optimizer):
    (ours, theirs), source = make_batch(config, samples), inserter.random_model(config, 1)
    for p in source.parameters():                                        # blocks start as the identity: make all of it count
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    with tempfile.TemporaryDirectory() as folder:
        inserter.save_model(source, folder)
        peer = Qwen2AudioForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").train()
    targets = samples * TEXT
    forwards = {"inserter": lambda: source(**ours) / targets, "transformers": lambda: peer(**theirs).loss}
    for key, p in peer.named_parameters():                           # Whisper's positions are constants
        p.requires_grad_("embed_positions" not in key)
    models, optimizers = {"inserter": source, "transformers": peer}, {}
    trained = {who: [p for p in model.parameters() if p.requires_grad] for who, model in models.items()}
    counts = {who: sum(p.numel() for p in ps) for who, ps in trained.items()}
    assert counts["inserter"] == counts["transformers"], counts
    losses = {who: float(forward().detach()) for who, forward in forwards.items()}
    assert abs(losses["inserter"] - losses["transformers"]) < 1e-4, losses
    if with_optimizer:
        optimizers = {who: torch.optim.AdamW(ps, lr=1e-4, fused=True) for who, ps in trained.items()}

    def step(who):
        begin = clock()
        forwards[who]().backward()
        if with_optimizer:
            optimizers[who].step()
        models[who].zero_grad(set_to_none=True)
        return clock() - begin

    step("inserter"), step("transformers")                               # warm both
    rounds = [(step("inserter"), step("transformers")) for _ in range(ROUNDS)]
    ratios, clip_samples = [b / a for a, b in rounds], [len(w) for w in ours["waveforms"]]
    theory = flops(config, clip_samples, True) / flops(config, clip_samples, False)
    seconds = [statistics.median(column) for column in zip(*rounds)]
    print(f"\nstep, {name}: {counts['inserter'] / 1e6:.1f} M parameters, {samples} samples, "
          f"{'forward, backward, AdamW' if with_optimizer else 'forward, backward'}, float32, {torch.get_num_threads()} thread")
    print(f"  losses {losses['inserter']:.6f} and {losses['transformers']:.6f}")
    print(f"  inserter {seconds[0]:.3f} s, transformers {seconds[1]:.3f} s: {statistics.median(ratios):.1f} times as fast "
          f"(from {min(ratios):.1f} to {max(ratios):.1f}; wanted 5); by FLOPs {theory:.1f}")
    del models, optimizers, forwards, peer, source
    gc.collect()
    return {"parameters": counts["inserter"], "samples": samples, "losses": losses, "inserter_seconds": seconds[0],
            "transformers_seconds": seconds[1], "ratio": statistics.median(ratios), "ratios": ratios, "flop_ratio": theory}


def measure_steps(chosen):
    m = synth.load_config([]).model
    tiny = sizes(m.vocab, m.mels, m.encoder_layers, m.encoder_width, m.encoder_heads, m.llm_layers, m.llm_width, m.llm_heads,
                 m.llm_kv_heads, m.llm_ffn)
    base = {f"Whisper-base and 4 layers of Qwen2.5-0.5B, vocabulary {v}": sizes(v, 80, 6, 512, 8, 4, 896, 14, 2, 4864)
            for v in ([16384] if "step" in chosen else []) + ([151936] if "full" in chosen else [])}
    rows = {"tiny": measure_step("config.yaml's sizes", tiny, 16, True)} if "step" in chosen else {}
    return rows | {name: measure_step(name, config, 4, False) for name, config in base.items()}


def main(chosen):
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
