"""What a model writes when it reads: documents for the recipe `continuation`, or so that it forgets less.

Behaviour alignment (BLSP, arXiv 2309.00916; the paper stacks it on top): a model reads a text and writes what
comes next. Then the text is spoken, and what was written is the target: it learns to do so when it hears.

    it reads     tom has a ball.                where is the ball
    it writes    it is red.                     It is in the garden.
    a line       {"number": 0, "text": "tom has a ball. it is red.", "spoken": [0, 15]}
                 {"number": 1, "messages": [the question, the answer], "spoken": [0, 17]}

The lines are an ordinary corpus; "spoken" are the characters that it read. The writer is model.from (a
checkpoint of InSerter's), else model.llm (an LLM's), else the model of the run.

    python extras/align.py profile=smol to=data-smol/writing.jsonl          it asks itself, and answers

    python extras/align.py run=tiny to=own.jsonl given=tiny temperature=0   it answers and continues a corpus
    python synth.py data=data/own synth.corpus=own.jsonl synth.shards='{continuation: 12}'
    torchrun inserter.py run=aligned model.from=runs/tiny/model data=data/own synth.corpus=own.jsonl \\
        synth.shards='{continuation: 12}' \\
        train.stages.pretrain.steps=0 train.stages.align.steps=300 train.stages.sft.steps=0
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from random import Random

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import inserter
import synth
from inserter import Tokenizer
from synth import Settings, UserError

OPTIONS = {
    "to": "",                   # the file of documents
    "given": "",                # a corpus, as in synth.corpus: the first user turns of its dialogues are
                                # answered, the openings of its texts continued; "": the model asks itself
    "ask": "",                  # asks an instruct LLM for the continuation: Continue this in under 40 words:
    "opening_words": 30,        # of an opening, at most; it ends with a sentence
    "documents": 2560,          # tried, at most
    "question_tokens": 40,      # a question or answer that does not end within these is left out
    "reply_tokens": 200,
    "temperature": 0.7,         # 0: always the likeliest token
    "batch": 64}


# --------------------------------------------------------------------------------------------------
# 1. What the model reads
# --------------------------------------------------------------------------------------------------

def question(text: str, start: int = 0) -> dict:
    """A dialogue that waits for its answer; the question is spoken from `start` on."""
    return {"messages": [{"role": "user", "content": text}], "spoken": [start, len(text)]}


def openings(c: Settings) -> Iterator[dict]:
    """What the model reads of the training documents of c.given: documents without a reply."""
    ask = synth.clean(c.ask)
    given = Settings(c | {"synth": Settings(c.synth | {"corpus": c.given})})
    for number, (split, document) in enumerate(synth.split_documents(given, Counter())):
        if split != "train":
            continue
        lang = {"lang": document["lang"]} if "lang" in document else {}
        if "messages" in document:
            asked = [turn["content"] for turn in document["messages"] if turn["role"] == "user"]
            if asked and synth.count_words(asked[0]):
                yield question(asked[0]) | lang
            continue
        text = document["text"]
        ends = [end for _, end in synth.sentences(text)[:-1]
                if 0 < synth.count_words(text[:end]) <= c.opening_words]
        if ends:
            text = text[:Random(f"{c.seed} opening {number}").choice(ends)]
            opening = {"text": text, "spoken": [0, len(text)]}
            yield (question(f"{ask} {text}", start=len(ask) + 1) if ask else opening) | lang


def prompt_ids(document: dict, tok: Tokenizer) -> list[int]:
    """A document without a reply, as the model reads it."""
    if "text" in document:
        sample = {"parts": [synth.text_part(document["text"], loss=False)], "messages": None}
    else:
        asked = synth.text_part(document["messages"][0]["content"], loss=False)
        sample = {"parts": None, "messages": [{"role": "user", "content": [asked]}]}
    return inserter.encode(sample, {}, tok, reply=True).ids


def user_opening(tok: Tokenizer) -> list[int]:
    """A dialogue up to where the user's words begin: what the model writes there is a question."""
    ids = prompt_ids(question(""), tok)
    return ids[:max(i for i, token in enumerate(ids) if token == tok.turn_end)]


# --------------------------------------------------------------------------------------------------
# 2. What it writes
# --------------------------------------------------------------------------------------------------

class Draw(transformers.LogitsProcessor):
    """Makes the likeliest token a random one, drawn from softmax(logits / temperature): the Gumbel trick.

    Each prompt has random numbers of its own, so its continuation does not depend on the others of the batch.
    """

    def __init__(self, temperature: float, seeds: list[str], device: torch.device):
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(zlib.crc32(seed.encode())) for seed in seeds]

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """(B, tokens so far), (B, V) -> (B, V)"""
        noise = torch.empty_like(logits)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        return logits / self.temperature - noise.log()


def write(llm: transformers.PreTrainedModel, tok: Tokenizer, prompts: dict[str, list[int]], tokens: int,
          temperature: float) -> list[tuple[str, bool]]:
    """Continuations of prompts {seed: ids}: (text, endless: it did not end within so many tokens) of each."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(prompt, device=llm.device) for prompt in prompts.values()],
        batch_first=True, padding_value=tok.end, padding_side="left")                   # (B, longest)
    draw = [Draw(temperature, list(prompts), llm.device)] if temperature else []
    stops = [tok.turn_end, tok.end]
    written = llm.generate(
        ids, attention_mask=(ids != tok.end).long(),                    # no prompt has an end
        logits_processor=transformers.LogitsProcessorList(draw), do_sample=False, max_new_tokens=tokens,
        eos_token_id=stops, pad_token_id=tok.end, suppress_tokens=[tok.audio, tok.audio_bos, tok.audio_eos])
    texts = []
    for new in written[:, ids.shape[1]:].tolist():
        ends = [i for i, token in enumerate(new) if token in stops]
        texts.append((tok.decode(new[:ends[0]] if ends else new), not ends))
    return texts


def with_reply(document: dict, reply: str, endless: bool) -> dict | None:
    """A document with what the model wrote; None where that is nothing, or an answer without an end.

    >>> with_reply({"text": "One.", "spoken": [0, 4]}, " Two. Three. Fou", endless=True)
    {'text': 'One. Two. Three.', 'spoken': [0, 4], 'endless': True}
    """
    if "messages" in document:
        answer = {"role": "assistant", "content": synth.clean(reply)}
        if endless or not answer["content"]:
            return None
        return document | {"messages": [*document["messages"], answer]}
    whole = synth.sentences(reply)[:-1 if endless else None]
    written = synth.clean(reply[:whole[-1][1]]) if whole else ""
    if not written:
        return None
    space = synth.clean(f"|{reply[:len(reply) - len(reply.lstrip())]}|")[1:-1]          # before it, or none
    cut_off = {"endless": True} if endless else {}
    return document | {"text": document["text"] + space + written} | cut_off


# --------------------------------------------------------------------------------------------------
# 3. The file
# --------------------------------------------------------------------------------------------------

def load_writer(c: Settings) -> tuple[transformers.PreTrainedModel, Tokenizer, str]:
    """The LLM that writes, its tokenizer, and a checksum of its weights."""
    if c.model["from"]:
        llm = inserter.their_llm(inserter.load_model(c.model["from"]))
        tok = inserter.load_tokenizer(c)
    elif c.model.llm:
        llm = transformers.AutoModelForCausalLM.from_pretrained(c.model.llm, dtype=torch.float32)
        tok = inserter.load_tokenizer(c)
    else:
        model, tok = inserter.load_run(c)
        llm = inserter.their_llm(model)
    llm.generation_config = transformers.GenerationConfig()             # the checkpoint's may have penalties
    checksum = 0
    for weight in llm.parameters():
        checksum = zlib.crc32(weight.detach().cpu().numpy(), checksum)
    device = inserter.device_here()
    if c.train.precision == "bfloat16" or (c.train.precision == "auto" and device.type == "cuda"):
        for weight in llm.parameters():     # rotary speeds are no parameters, and stay exact
            weight.data = weight.data.bfloat16()
    return llm.to(device).eval(), tok, f"{checksum:08x}"


def documents_of(c: Settings, llm: transformers.PreTrainedModel, tok: Tokenizer,
                 documents: dict[int, dict]) -> Iterator[dict]:
    """{number: document without a reply} -> the documents; of {number: {}} the question is written, too."""
    if not c.given:
        opening = user_opening(tok)
        prompts = {f"{c.seed} question {number}": opening for number in documents}
        asked = write(llm, tok, prompts, c.question_tokens, c.temperature)
        documents = {number: question(synth.clean(text)) for number, (text, endless) in zip(documents, asked)
                     if synth.count_words(synth.clean(text)) and not endless}
    if documents:
        prompts = {f"{c.seed} reply {number}": prompt_ids(documents[number], tok) for number in documents}
        replies = write(llm, tok, prompts, c.reply_tokens, c.temperature)
        for (number, document), (text, endless) in zip(documents.items(), replies):
            complete = with_reply(document, text, endless)
            if complete:
                yield {"number": number} | complete


def main(arguments: list[str]) -> None:
    c = synth.load_config(arguments, **OPTIONS)
    if not c.to:
        raise UserError("to=FILE.jsonl is missing: the file in which the documents shall stand.")
    path = Path(c.to)
    settings_path = Path(f"{path}.yaml")
    before = path.read_bytes() if path.is_file() else b""
    if before and not settings_path.is_file():
        raise UserError(f"{path} was not begun by this script, so it is not continued; choose another file.")
    whole = 0 if c.fresh else before.rfind(b"\n") + 1       # a killed run may have left half a line
    given = list(itertools.islice(openings(c), c.documents)) if c.given else [{}] * c.documents
    if not given:
        raise UserError(f"given={c.given} has no question to answer and no text of two sentences to "
                        "continue; give another corpus.")
    llm, tok, checksum = load_writer(c)
    shaping = {name: c[name] for name in OPTIONS if name not in ("to", "documents", "batch")}
    shaping |= {"model": checksum, "seed": c.seed, "precision": c.train.precision}
    remedy = f"choose another file than {path}, or fresh=true"
    synth.same_settings(settings_path, shaping, remedy, begun=whole > 0)
    first = json.loads(before[:whole].splitlines()[-1])["number"] + 1 if whole else 0
    kept = 0
    with open(path, "a", encoding="utf-8") as file:
        os.truncate(path, whole)
        for start in tqdm(range(first, len(given), c.batch), desc="batches", disable=None):
            numbers = range(start, min(start + c.batch, len(given)))
            for document in documents_of(c, llm, tok, {number: given[number] for number in numbers}):
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
                kept += 1
            file.flush()
    if not path.stat().st_size:
        raise UserError(f"None of {len(given)} tries had words and an end, so {path} is empty; raise "
                        "question_tokens and reply_tokens, or take another model.")
    print(f"{kept} documents of {max(0, len(given) - first)} tried are written to {path}; train on them with "
          f"synth.corpus={path}.")


if __name__ == "__main__":
    synth.run(main)
