"""Variants of the method that live in experiments/: their losses and their means by known answers."""
import sys
from pathlib import Path

import pytest
import torch
from test_model import config, document, loud

import inserter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import average                               # noqa: E402


@pytest.fixture(scope="module")
def model():
    return loud(inserter.random_model(config(), 1))


@pytest.fixture
def distill(monkeypatch):
    """The module, whose import replaces functions of inserter.py; they come back after the test."""
    for name in ("read_encoded", "collate"):
        monkeypatch.setattr(inserter, name, getattr(inserter, name))
    monkeypatch.setattr(inserter.InSerter, "forward", inserter.InSerter.forward)
    sys.modules.pop("distill", None)
    import distill
    yield distill
    sys.modules.pop("distill")


def heard_and_typed(kind):
    """A document whose clip stands for two tokens, and the same document typed; three targets each."""
    heard = document([("text", 3), ("clip", 32000), ("text", 4)], 1)
    typed = document([("text", 3), ("text", 2), ("text", 4)], 1)
    for one in (heard, typed):
        one.ids[-4:] = [7, 8, 9, 10]
        one.labels[-4:-1] = [8, 9, 10]
    heard.typed = typed
    heard.kind = kind
    return heard


@torch.no_grad()
def log_probabilities(model, batch, prefix=""):
    """Of the three targets' positions, (3, V); without clips where the document is typed."""
    some = slice(0, 0) if prefix else slice(None)
    hidden = model.hidden(batch[f"{prefix}ids"], batch[f"{prefix}lengths"], batch["mel"][some],
                          batch["frames"][some])
    return model.language_model.lm_head(hidden[-4:-1]).log_softmax(1)


@pytest.mark.parametrize("kind, share", [(0, 0.0), (1, 0.25), (2, 0.75)])
@pytest.mark.parametrize("teacher", ["itself", "another"])
def test_the_loss_is_cross_entropy_and_what_a_reader_says(model, distill, kind, share, teacher):
    another = loud(inserter.random_model(config(), 2))
    reader = model if teacher == "itself" else another
    distill.settings.update(teacher=None if teacher == "itself" else another, kl=[0.0, 0.25, 0.75])
    batch = inserter.collate([heard_and_typed(kind)], model.mels)
    q = log_probabilities(model, batch)
    p = log_probabilities(reader, batch, "typed_")
    nats = -q[range(3), [8, 9, 10]].sum()
    kl = (p.exp() * (p - q)).sum()
    assert kl > 0.01
    loss = model(batch, 2)
    torch.testing.assert_close(loss, (1 - share) * nats + share * kl, atol=1e-4, rtol=0)
    loss.backward()
    assert another.language_model.lm_head.weight.grad is None
    with torch.no_grad():                                # what the gap curve asks is the plain loss
        torch.testing.assert_close(model(batch, 2), nats, atol=1e-4, rtol=0)


def test_a_document_that_is_read_teaches_itself_nothing(model, distill):
    distill.settings.update(teacher=None, kl=[0.0, 0.0, 1.0])
    one = document([("text", 8)], 3)
    one.labels[:7] = one.ids[1:]
    one.typed, one.kind = one, 2
    assert abs(model(inserter.collate([one], model.mels), 64).item()) < 1e-4


def test_the_mean_of_two_llms(model):
    other = inserter.random_model(config(), 2)
    begun, trained = dict(other.named_parameters()), dict(model.named_parameters())
    for kept in (0.0, 0.25, 1.0):
        mean = loud(inserter.random_model(config(), 1))
        average.average(mean, other, kept, [60, 61, 62])
        for name, weight in mean.named_parameters():
            first, second = begun[name], trained[name]
            expected = first + kept * (second - first) if name.startswith("language_model.") else second
            if "embed_tokens" in name:
                expected = torch.cat([expected[:60], second[60:63], expected[63:]])
            torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)
