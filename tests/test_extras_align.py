"""extras/align.py: what a model writes when it reads."""
import doctest
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "extras"))
import align                                                          # noqa: E402
import inserter                                                       # noqa: E402
import synth                                                          # noqa: E402
from synth import UserError                                           # noqa: E402

SIZES = ["model.audio.d_model=32", "model.audio.encoder_layers=1", "model.audio.encoder_attention_heads=2",
         "model.audio.encoder_ffn_dim=48", "model.text.hidden_size=32", "model.text.num_hidden_layers=1",
         "model.text.num_attention_heads=2", "model.text.num_key_value_heads=1",
         "model.text.intermediate_size=48", "model.text.vocab_size=600"]


def test_examples_in_docstrings_hold():
    assert doctest.testmod(align) == (0, 1)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    """A tokenizer for the tiny world."""
    c = synth.load_config([*SIZES, f"data={tmp_path_factory.mktemp('tok')}"])
    world = synth.tiny_world(1, "train", 60, c.synth.facts)
    texts = [document["text"] for document in world if "text" in document]
    samples = [{"id": f"{number}", "parts": [synth.text_part(text, True)], "messages": None}
               for number, text in enumerate(texts)]
    path = synth.shard_path(c, "text", "train", 0)
    synth.write_shard(path, samples, {sample["id"]: {} for sample in samples}, {})
    return inserter.load_tokenizer(c)


def export(folder: Path, tok: inserter.Tokenizer, seed: int = 1) -> inserter.InSerter:
    """A model in a folder, with random weights so large that tokens do not just predict themselves."""
    model = inserter.fresh_model(synth.load_config([*SIZES, f"seed={seed}"]), tok).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.language_model.named_parameters():
        noise = 0.15 * torch.randn(weight.shape, generator=generator)
        weight.data = noise + weight.data * (0.1 if "embed" in name or "head" in name else 1)
    model.language_model.lm_head.weight.data[tok.turn_end] *= 4         # it ends a turn now and then
    folder.mkdir(parents=True, exist_ok=True)
    inserter.save_model(model, folder)
    inserter.save_processor(model, tok, folder)
    return model


@pytest.fixture
def writer(tok, tmp_path, monkeypatch):
    """Arguments with which a random model writes."""
    monkeypatch.chdir(tmp_path)
    export(tmp_path / "model", tok)
    return ["model.from=model", "documents=30", "question_tokens=300", "reply_tokens=300", "temperature=5"]


def lines(path: str = "own.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def test_a_model_asks_itself_and_a_stopped_run_goes_on(writer, capsys):
    """The same lines whether in one go, in two, or in other batches; the lines are a corpus."""
    align.main([*writer, "to=own.jsonl"])
    whole = Path("own.jsonl").read_bytes()
    rows = lines()
    assert 3 < len(rows) < 30
    assert f"{len(rows)} documents of 30 tried are written to own.jsonl" in capsys.readouterr().out
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == len(rows)
    assert [row["spoken"] for row in rows] == [[0, len(question)] for question in questions]
    align.main([*writer, "to=folder/again.jsonl", "batch=5", "documents=12"])
    again = Path("folder/again.jsonl")
    part = again.read_bytes()
    with open(again, "a") as file:                                      # killed in the middle of a line
        file.write('{"number": 12, "mess')
    align.main([*writer, "to=folder/again.jsonl", "batch=5"])
    assert again.read_bytes() == whole and whole.startswith(part) and part != whole
    align.main([*writer, "to=own.jsonl"])
    assert Path("own.jsonl").read_bytes() == whole                      # nothing is left to be done
    read = list(synth.read_documents("own.jsonl", Counter()))
    assert read == [{key: row[key] for key in ("messages", "spoken")} for row in rows]


def test_other_settings_and_models_do_not_continue_a_file(writer, tok):
    align.main([*writer, "to=own.jsonl", "documents=12"])
    before = Path("own.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"settings \(temperature\); choose another file than own.jsonl"):
        align.main([*writer, "to=own.jsonl", "temperature=6"])
    export(Path("model"), tok, seed=2)
    with pytest.raises(UserError, match=r"other settings \(model\)"):
        align.main([*writer, "to=own.jsonl"])
    assert Path("own.jsonl").read_bytes() == before
    align.main([*writer, "to=own.jsonl", "fresh=true"])
    assert Path("own.jsonl").read_bytes() != before


@pytest.mark.parametrize("text", ['{"text": "a line of somebody else"}\n', "no newline at the end"])
@pytest.mark.parametrize("fresh", ["true", "false"])
def test_a_file_of_somebody_else_is_left_alone(writer, text, fresh):
    Path("own.jsonl").write_text(text)
    with pytest.raises(UserError, match="own.jsonl was not begun by this script"):
        align.main([*writer, "to=own.jsonl", f"fresh={fresh}"])
    assert Path("own.jsonl").read_text() == text


def test_the_user_turns_of_a_corpus_are_answered(writer, tok, monkeypatch):
    """At temperature 0 with what the model answers when it is asked."""
    monkeypatch.setattr(synth, "clean", str.strip)      # it says little but control characters
    model = inserter.load_model("model").eval()
    asks = ("where is", "who has", "is it", "say")
    questions = [f"{ask} the {thing}?" for ask in asks for thing in ("ball", "cat")]
    turns = [[{"role": role, "content": text} for role, text in
              (("system", "be brief"), ("user", question), ("assistant", "no"))] for question in questions]
    rows = [json.dumps({"messages": turn, "lang": "xx"}) + "\n" for turn in turns]
    Path("asked.jsonl").write_text("".join(rows))
    answers = inserter.answer(model, tok, questions, 300, 8)
    expected = [(question, text.strip()) for question, (text, truncated) in zip(questions, answers)
                if text.strip() and not truncated]
    held_out = "synth.held_out_share=0.0"
    align.main([*writer, "to=own.jsonl", "given=asked.jsonl", "temperature=0", held_out])
    assert [tuple(turn["content"] for turn in row["messages"]) for row in lines()] == expected
    assert expected and {row["lang"] for row in lines()} == {"xx"}


TALE = "has a ball. it is red. he puts it in the garden. anna sees it there."


@pytest.mark.parametrize("ask", ["", "Go on in under 40 words:"])
def test_the_texts_of_a_corpus_are_continued(writer, ask):
    """Openings end with a sentence and are marked as what is to be spoken; the corpus reads them back."""
    tales = [json.dumps({"text": f"tom{n} {TALE}"}) + "\n" for n in range(12)]
    Path("stories.jsonl").write_text("".join(tales))
    align.main([*writer, "to=own.jsonl", "given=stories.jsonl", "opening_words=8", f"ask={ask}",
                "synth.held_out_share=0.0"])
    documents = list(synth.read_documents("own.jsonl", Counter()))
    assert len(documents) > 3
    openings = set()
    for document in documents:
        start, end = document["spoken"]
        text = document["messages"][0]["content"] if ask else document["text"]
        opening = re.sub(r"^tom\d+ ", "", text[start:end])
        assert opening in ("has a ball.", "has a ball. it is red.")
        assert text[:start] == (f"{ask} " if ask else "")
        openings.add(opening)
        assert document["messages"][1]["content"] if ask else document["text"][end:].strip()
    assert len(openings) == 2


def test_the_tiny_world_is_continued_by_a_runs_export(writer, tok):
    """Without model.from and model.llm the run writes; its stories and dialogues come by turns."""
    export(Path("runs/mine/model"), tok)
    arguments = ["run=mine", "to=own.jsonl", "given=tiny", *writer[1:], "synth.documents=40"]
    align.main(arguments)
    rows = lines()
    assert {tuple(row)[1] for row in rows} == {"text", "messages"}
    assert max(row["number"] for row in rows) < 30
    Path("own.jsonl").unlink()
    align.main([*arguments, "model.from=runs/mine/model"])
    assert lines() == rows
    with pytest.raises(UserError, match="There is no model in runs/none/model"):
        align.main([*arguments, "run=none"])


def test_an_llm_alone_writes(tok, tmp_path, monkeypatch):
    """A checkpoint of transformers'; what its generation_config.json asks for is not done."""
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(vocab_size=600, hidden_size=32, intermediate_size=48,
                                      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained("llm")
    tok.hf.save_pretrained("llm")
    arguments = ["model.llm=llm", "given=tiny", "documents=12", "reply_tokens=300", "temperature=3"]
    align.main([*arguments, "to=plain.jsonl"])
    generation = transformers.GenerationConfig(do_sample=True, top_k=1, repetition_penalty=9.0, num_beams=2)
    generation.save_pretrained("llm")
    align.main([*arguments, "to=asked.jsonl"])
    assert lines("plain.jsonl") and lines("plain.jsonl") == lines("asked.jsonl")
    align.main([*arguments, "to=half.jsonl", "train.precision=bfloat16"])
    assert Path("half.jsonl.yaml").read_text() != Path("plain.jsonl.yaml").read_text()


def test_padding_is_not_read(writer, tok):
    """A prompt is continued alike beside a longer one."""
    llm, _, _ = align.load_writer(synth.load_config(writer, **align.OPTIONS))
    llm.model.layers[0].self_attn.o_proj.weight.data *= 50              # what is attended to matters
    for text in ("tom has", "anna sees the ball", "it is red."):
        prompt = tok(text)
        alone, = align.write(llm, tok, {"0": prompt}, 60, 0.0)
        beside, _ = align.write(llm, tok, {"0": prompt, "1": 40 * prompt}, 60, 0.0)
        assert alone == beside


def test_half_precision_leaves_rotary_speeds_as_they_are(writer):
    c = synth.load_config([*writer, "train.precision=bfloat16"], **align.OPTIONS)
    llm, _, checksum = align.load_writer(c)
    assert {weight.dtype for weight in llm.parameters()} == {torch.bfloat16}
    assert llm.model.rotary_emb.inv_freq.dtype == torch.float32
    whole = align.load_writer(synth.load_config(writer, **align.OPTIONS))
    assert whole[0].dtype == torch.float32 and whole[2] == checksum


def test_replies_without_an_end():
    """An answer is left out; a continuation ends with its last whole sentence, and its end is no target."""
    asked = align.question("where is it")
    assert align.with_reply(asked, " It is", endless=True) is None
    assert align.with_reply(asked, " \n", endless=False) is None
    assert align.with_reply(asked, " It is.", endless=False) == {
        "messages": [{"role": "user", "content": "where is it"}, {"role": "assistant", "content": "It is."}],
        "spoken": [0, 11]}
    opening = {"text": "Tom.", "spoken": [0, 4]}
    assert align.with_reply(opening, " It is", endless=True) is None
    assert align.with_reply(opening, " A. B", endless=True) == opening | {"text": "Tom. A.", "endless": True}
    assert align.with_reply(opening, " A. B", endless=False) == opening | {"text": "Tom. A. B"}


def test_the_end_of_a_text_that_was_cut_off_is_no_target(tok):
    sample = {"parts": [synth.text_part("it is", False), synth.text_part(" red.", True)], "messages": None}
    ended = inserter.encode(sample, {}, tok)
    endless = inserter.encode(sample | {"endless": True}, {}, tok)
    assert ended.ids == endless.ids and ended.labels[:-2] == endless.labels[:-2]
    assert (ended.labels[-2], endless.labels[-2]) == (tok.end, inserter.IGNORE)


def test_white_space_before_a_reply_is_as_a_corpus_keeps_it():
    """Else cleaning would change the text, and its range would count other characters."""
    for reply in (" \n\n\n\nIt is red. So.", " It is red.", "It", "\u00a0It is red."):
        document = align.with_reply({"text": "Tom has a ball.", "spoken": [0, 15]}, reply, False)
        assert document["text"] == synth.clean(document["text"])
        assert document["text"].startswith("Tom has a ball.")


def test_a_model_that_writes_nothing(writer):
    with pytest.raises(UserError, match="None of 30 tries had words and an end"):
        align.main([*writer, "to=own.jsonl", "question_tokens=1"])
    assert not Path("own.jsonl").read_bytes()
    align.main([*writer, "to=own.jsonl"])                               # nothing was begun
    assert lines()


def test_what_is_missing_is_said(writer):
    with pytest.raises(UserError, match="to=FILE.jsonl is missing"):
        align.main(writer)
    Path("short.txt").write_text("One sentence.")
    with pytest.raises(UserError, match="given=short.txt has no question to answer and no text of two"):
        align.main([*writer, "to=own.jsonl", "given=short.txt", "synth.held_out_share=0.0"])
    assert not Path("own.jsonl").exists()


def test_a_dialogue_is_written_as_training_encodes_it(tok):
    """The markup around a question that the model asks itself, and of its answer, is a sample's."""
    turns = [("user", "is it red"), ("assistant", "yes.")]
    messages = [{"role": role, "content": [synth.text_part(text, True)]} for role, text in turns]
    sample = {"parts": None, "messages": messages}
    trained = inserter.encode(sample, {}, tok).ids
    opening = align.user_opening(tok)
    asked = tok("is it red")
    assert trained[:len(opening) + len(asked)] == opening + asked
    prompt = align.prompt_ids(align.question("is it red"), tok)
    assert trained[:len(prompt) + 2] == prompt + tok("yes.")[:2]
    assert align.prompt_ids({"text": "is it red"}, tok) == asked


def test_drawn_tokens_follow_softmax():
    """20,000 draws of one token: frequencies within four standard deviations of the probabilities."""
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -torch.inf]]).expand(20000, 5)
    draw = align.Draw(0.7, [str(n) for n in range(len(logits))], torch.device("cpu"))
    counts = torch.bincount(draw(None, logits).argmax(1), minlength=5) / len(logits)
    want = (logits[0] / 0.7).softmax(0)
    assert ((counts - want).abs() <= 4 * (want * (1 - want) / len(logits)).sqrt()).all()
    again = align.Draw(0.7, ["9", "5"], torch.device("cpu"))(None, logits[:2])
    assert torch.equal(again[1], align.Draw(0.7, ["5"], torch.device("cpu"))(None, logits[:1])[0])
