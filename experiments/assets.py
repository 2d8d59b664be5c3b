"""The models that come with the code: a run's export, in bfloat16, without its card and settings.

    torchrun inserter.py && python experiments/assets.py runs/tiny/model assets/tiny
    torchrun inserter.py run=warmup train.stages.pretrain.steps=0 train.stages.sft.steps=0
    python experiments/assets.py runs/warmup/model assets/warmup

assets/tiny answers `ask=` before anything is trained; `profile=quick` starts from assets/warmup, which hears
and reads, and has never seen interleaved text. Both open in transformers.
"""
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch                                 # noqa: E402
from safetensors.torch import load_file, save_file               # noqa: E402

import inserter                              # noqa: E402
import synth                                 # noqa: E402


def main(arguments):
    source, folder = map(Path, arguments)
    tensors = load_file(source / "model.safetensors")
    with inserter.replacing(folder) as aside:
        shutil.copytree(source, aside, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("README.md", "config.yaml"))
        save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},
                  aside / "model.safetensors", metadata={"format": "pt"})
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    synth.run(main)
