"""Obeying as it reads: half of the loss of a document with speech becomes the KL to what a reader says.

The reader gets the same document typed. At every target its distribution is p, that of the model that hears
is q, and the loss of the target is (1 - kl) * cross-entropy + kl * KL(p || q). Transcription (whose reader
merely copies) and stages by CTC are trained as ever; so are documents without speech, unless kl_text is above
0: then it is their kl, against forgetting. Two readers:

    teacher=itself    the model as it stands, without a gradient
    teacher=FOLDER    a checkpoint, frozen

    torchrun experiments/distill.py run=b kl=0.5 model.from=runs/a/model teacher=runs/a/model
    python experiments/distill.py 1       arms of seed 1 into results/distill-1.json, from the warm-up and the
                                          data of `python experiments/arms.py 1`, with the same tokens and SFT

Everything else is inserter.py's: this file replaces three of its functions, here and in the processes that
read samples, which import this file too.
"""
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import torch                                 # noqa: E402
import torch.nn.functional as F              # noqa: E402

import arms                                  # noqa: E402
import inserter                              # noqa: E402
import synth                                 # noqa: E402
from inserter import IGNORE                  # noqa: E402

ARMS = {"KL to itself": "itself", "frozen reader, KL": "runs/arms-{}-warmup/model"}
KEYS = ("typed_ids", "typed_labels", "typed_lengths", "kinds")
TASK, SPEECH, TEXT = range(3)                # kinds of documents: a speech task, any other with speech, none
original = {name: getattr(inserter, name) for name in ("read_encoded", "collate")}
original["forward"] = inserter.InSerter.forward
settings = {}                                # teacher: None for the model itself; kl: a share for every kind


# 1. Data: every document twice, heard and typed. The targets are the same tokens in the same order ---------

def read_encoded(path, number, tok):
    """As inserter.py's; with its kind, and `typed`, the same sample as it is read."""
    sample, files = synth.read_sample(path, number)
    encoded = inserter.encode(sample, inserter.decoded(files), tok)
    encoded.typed = inserter.encode(sample, {}, tok, typed=True)
    encoded.kind = SPEECH if encoded.clips else TEXT
    if Path(path).parent.name == "tasks":
        encoded.kind = TASK
    return encoded


def collate(documents, mels, stretch=0.0, seed=""):
    """As inserter.py's, with the typed documents, and the kind of each target's document, (targets,)."""
    batch = original["collate"](documents, mels, stretch, seed)
    if hasattr(documents[0], "typed"):
        typed = original["collate"]([document.typed for document in documents], mels)
        kinds = [document.kind for document in documents for label in document.labels if label != IGNORE]
        batch |= {"typed_ids": typed["ids"], "typed_labels": typed["labels"],
                  "typed_lengths": typed["lengths"], "kinds": torch.tensor(kinds)}
    return batch


# 2. The loss ----------------------------------------------------------------------------------------------

def at_targets(model, ids, labels, lengths, mel, frames):
    """Hidden states (targets, d) where something is to be predicted, and what: (targets,)."""
    hidden = model.hidden(ids, lengths, mel, frames)
    places = (labels != IGNORE).nonzero()[:, 0]
    targets = inserter.to_device(labels[places], hidden.device)
    return hidden[inserter.to_device(places, hidden.device)], targets


def forward(self, batch, chunk, classes=None):
    """As InSerter's, where nothing is trained or nothing is read."""
    if classes is not None or "typed_ids" not in batch or not torch.is_grad_enabled():
        plain = {name: tensor for name, tensor in batch.items() if name not in KEYS}
        return original["forward"](self, plain, chunk, classes)
    heard, targets = at_targets(self, batch["ids"], batch["labels"], batch["lengths"], batch["mel"],
                                batch["frames"])
    reader = settings["teacher"] or self
    with torch.no_grad():
        read, same = at_targets(reader, batch["typed_ids"], batch["typed_labels"], batch["typed_lengths"],
                                batch["mel"][:0], batch["frames"][:0])
    assert torch.equal(targets, same), "the documents that are heard and typed have other targets"
    shares = inserter.to_device(torch.tensor(settings["kl"])[batch["kinds"]], heard.device)
    head = self.language_model.lm_head.weight
    reader_head = reader.language_model.lm_head.weight

    def losses(heard, read, targets, share):
        q = F.linear(heard, head).float().log_softmax(1)                # (chunk, V)
        nats = F.nll_loss(q, targets, reduction="none")
        with torch.no_grad():
            p = F.linear(read, reader_head).float().log_softmax(1)
        kl = F.kl_div(q, p, log_target=True, reduction="none").sum(1)
        return (1 - share) * nats + share * kl

    chunks = zip(*(x.split(chunk) for x in (heard, read, targets, shares)))
    return torch.cat([inserter.recomputed(losses, *some) for some in chunks]).sum()


inserter.read_encoded = read_encoded         # on import, for the reading processes import this file as well
inserter.collate = collate
inserter.InSerter.forward = forward


# 3. Arms, and the command line -----------------------------------------------------------------------------

def measure(seed):
    """Train, fine-tune and ask the arms of a seed, both at once."""
    path = ROOT / "results" / f"distill-{seed}.json"
    rows = json.loads(path.read_text())["runs"] if path.is_file() else {}

    def make(arm):
        for run, lines in arms.arm_commands(seed, arm).items():
            if not run.endswith("-sft"):
                lines[0] = ["experiments/distill.py", *lines[0][1:], "teacher=" + ARMS[arm].format(seed)]
            if run not in rows:
                arms.execute(seed, run, lines, max(1, os.cpu_count() // len(ARMS)))
                rows[run] = {"commands": arms.printed(lines), **arms.figures(run)}
                synth.write_whole(path, json.dumps({"seed": seed, "runs": rows}, indent=1).encode() + b"\n")
            arms.print_row(run, seed, rows[run])

    arms.ARMS.update(dict.fromkeys(ARMS, arms.ARMS["InSerter"]))
    with ThreadPoolExecutor(len(ARMS)) as pool:
        list(pool.map(make, ARMS))


def main(arguments):
    if arguments and arguments[0].isdigit():
        return measure(int(arguments[0]))
    c = synth.load_config(arguments, teacher="itself", kl=0.5, kl_text=0.0)
    settings.update(teacher=None, kl=[0.0, c.kl, c.kl_text])          # of TASK, SPEECH, TEXT
    if c.teacher != "itself":
        settings["teacher"] = inserter.load_model(c.teacher).to(inserter.device_here())
    inserter.train(c)


if __name__ == "__main__":
    synth.run(main)
