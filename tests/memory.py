"""How much memory does training take? From the real numbers of parameters, on tensors without data.

    python tests/memory.py

For each pair of models, number of GPUs and setting: gigabytes a GPU for weights, gradients and AdamW's two slots,
float32 all of them, beside which a pack's activations need room. Plain DDP keeps everything on every GPU;
train.shard=true (FSDP2) keeps a share, and the block that is being computed whole. Writes results/memory.json.
"""
import json
import sys
from pathlib import Path

import torch
from transformers import Qwen2AudioConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import inserter                                         # noqa: E402

WHISPERS = {                                            # mels, width, layers, heads
    "tiny.en": (80, 384, 4, 6),
    "small": (80, 768, 12, 12),
    "large-v3": (128, 1280, 32, 20)}
LLMS = {                                                # family, width, layers, heads, key-value heads, ffn, vocabulary, tied
    "SmolLM2-135M": ("llama", 576, 30, 9, 3, 1536, 49155, True),
    "Qwen2.5-0.5B": ("qwen2", 896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-3B": ("qwen2", 2048, 36, 16, 2, 11008, 151936, True),
    "Qwen2-Audio-7B's": ("qwen2", 4096, 32, 32, 32, 11008, 156032, False)}
PAIRS = (("tiny.en", "SmolLM2-135M"), ("small", "Qwen2.5-0.5B"), ("large-v3", "Qwen2.5-3B"),
         ("large-v3", "Qwen2-Audio-7B's"))
RANKS = (1, 2, 4, 8, 16)


def model_of(whisper: str, llm: str) -> inserter.InSerter:
    mels, width, layers, heads = WHISPERS[whisper]
    audio = {"num_mel_bins": mels, "d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads,
             "encoder_ffn_dim": 4 * width}
    family, width, layers, heads, kv_heads, ffn, vocab, tied = LLMS[llm]
    text = {"model_type": family, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab,
            "tie_word_embeddings": tied}
    with torch.device("meta"):
        return inserter.InSerter(Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=1))


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def gigabytes(model: inserter.InSerter, ranks: int, shard: bool) -> float:
    total = parameters(model)
    if not shard:
        return 16 * total / 1e9              # weights, gradients (they are DDP's buckets), AdamW's two slots
    blocks = [*model.audio_tower.layers, *model.language_model.model.layers]
    outside = total - sum(map(parameters, blocks))                      # embeddings, head, adapter, convolutions
    borrowed = outside + 2 * max(map(parameters, blocks))               # whole meanwhile: one block, and the next
    return (16 * total / ranks + 8 * borrowed) / 1e9                    # with their gradients before they are summed


def main() -> None:
    rows = []
    print(f"{'models':36}{'parameters':>12}{'setting':>9}" + "".join(f"{ranks:>7} GPU" for ranks in RANKS))
    for whisper, llm in PAIRS:
        model = model_of(whisper, llm)
        for shard in (False, True):
            figures = [round(gigabytes(model, ranks, shard), 1) for ranks in RANKS]
            rows.append({"encoder": whisper, "llm": llm, "parameters": parameters(model), "shard": shard,
                         "GB a GPU": dict(zip(map(str, RANKS), figures))})
            print(f"Whisper {whisper} + {llm:18}".ljust(36) + f"{parameters(model) / 1e6:>10,.0f} M"
                  + f"{'shard' if shard else 'DDP':>9}" + "".join(f"{figure:>11}" for figure in figures))
    result = {"command": "python tests/memory.py", "rows": rows}
    (ROOT / "results" / "memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
