"""Between an LLM and the same LLM once it hears: does a mean of their weights forget less, and still obey?

    python experiments/average.py profile=smol kept=0.7      writes runs/smol-0.7/model, and prints its point

Every weight of the LLM becomes kept * the run's + (1 - kept) * that of the checkpoint it began from (WiSE-FT,
Wortsman et al. 2022, arXiv 2109.01903). Encoder, adapter and the rows of the audio tokens stay the run's. The
mean is a run like any other: `python bench.py profile=smol run=smol-0.7`, or experiments/everyday.py.
"""
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch                                 # noqa: E402

import inserter                              # noqa: E402
import synth                                 # noqa: E402


@torch.no_grad()
def average(model, start, kept, audio):
    """Move the LLM of `model` towards that of `start`, in place. audio: ids whose rows stay."""
    begun = dict(start.language_model.named_parameters())
    for name, weight in model.language_model.named_parameters():        # a matrix that is tied once
        mean = begun[name].lerp(weight, kept)
        if len(weight) == start.config.text_config.vocab_size:          # embeddings and head
            mean[audio] = weight[audio]
        weight.copy_(mean)


def main(arguments):
    c = synth.load_config(arguments, kept=0.7)
    model, tok = inserter.load_run(c)
    start = inserter.fresh_model(c, tok).to(inserter.device_here())
    average(model, start, c.kept, [tok.audio, tok.audio_bos, tok.audio_eos])
    source = inserter.run_folder(c) / "model"
    with inserter.replacing(Path("runs") / f"{c.run}-{c.kept}" / "model") as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        inserter.save_model(model, folder)
    for name, value in inserter.evaluate(c, model, tok).items():
        print(f"{name:16}{value:.4f}")


if __name__ == "__main__":
    synth.run(main)
