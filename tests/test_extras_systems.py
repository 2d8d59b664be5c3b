"""extras/systems.py: checkpoints, cascades and servers answer prompts; nothing is asked twice, no key is written."""
import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "extras"))
import bench                                                          # noqa: E402
import inserter                                                       # noqa: E402
import synth                                                          # noqa: E402
from server import CANARY, completion, serving                        # noqa: E402
import systems                                                        # noqa: E402
from synth import RATE, UserError                                     # noqa: E402

NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
WORDS = ("tea", "milk", "salt")
SIZES = ["model.audio.d_model=32", "model.audio.encoder_layers=1", "model.audio.encoder_attention_heads=2",
         "model.audio.encoder_ffn_dim=48", "model.text.hidden_size=32", "model.text.num_hidden_layers=1",
         "model.text.num_attention_heads=2", "model.text.num_key_value_heads=1",
         "model.text.intermediate_size=48", "model.text.vocab_size=600"]


def siren(number, seconds):
    """A tone that goes up and down, another one for each number."""
    time = np.arange(int(seconds * RATE)) / RATE
    return 0.1 * (number + 1) * np.sin(2 * np.pi * (300 + 400 * number) * time + 300 * np.sin(2 * time))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bench.jsonl(rows))


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """A folder of three prompts, each typed and spoken; one clip is longer than 30 s."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sib/audio").mkdir(parents=True)
    rows = []
    for number, word in enumerate(WORDS):
        soundfile.write(f"sib/audio/{number}.wav", siren(number, (0.5, 31.0, 0.9)[number]), RATE, subtype="PCM_16")
        rows.append({"prompt": f"Say {word} without commas.", "audio_path": f"audio/{number}.wav"} | NO_COMMA)
    write_rows(tmp_path / "sib/closed_standard_en.jsonl", rows)
    return tmp_path / "sib"


@pytest.fixture
def suite(prompts):
    """A file of rows as of the tiny suite: one prompt spoken and typed, silence, and a clip to be written down."""
    spoken = {"suite": "closed", "condition": "standard", "lang": "en", "key": "s", "prompt": "Say tea.",
              "audio_path": "../sib/audio/0.wav"} | NO_COMMA
    rows = [spoken, spoken | {"key": "typed", "audio_path": None},
            spoken | {"key": "silence", "condition": bench.SILENCE},
            spoken | {"key": "words", "suite": "transcription", "reference": "Say tea.", "instruction_id_list": [],
                      "kwargs": []}]
    write_rows(prompts.parent / "bench/prompts.jsonl", rows)
    return "prompts=bench/prompts.jsonl"


def ask(*settings, to="a.jsonl"):
    """Ask a system; {key: row} of the answers."""
    systems.main(["prompts=sib", f"to={to}", "bench.max_tokens=8", "bench.batch=4", *settings])
    return {row["key"]: row for row in bench.read_rows(Path(to))}


# --------------------------------------------------------------------------------------------------
# A server that speaks the OpenAI protocol, and misbehaves where it is told to
# --------------------------------------------------------------------------------------------------

@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("SYSTEM_API_KEY", CANARY)
    with serving() as start:
        yield start


def content_of(request):
    return request["messages"][-1]["content"]


def heard_or_read(request):
    """No comma in answers to clips, one in answers to texts."""
    clips = [part for part in content_of(request) if part["type"] == "input_audio"]
    return f"heard {len(clips)}" if clips else "Read, that is."


def test_a_servers_answers_are_scored(prompts, serve, capsys):
    server = serve(heard_or_read)
    rows = ask(f"system=url:{server.name}")
    responses = {row["prompt"].split()[1] + " " + row["mode"]: row["response"] for row in rows.values()}
    assert responses == {"tea spoken": "heard 1", "milk spoken": "heard 2", "salt spoken": "heard 1",
                         "tea typed": "Read, that is.", "milk typed": "Read, that is.", "salt typed": "Read, that is."}
    assert {"suite", "condition", "lang", "key", "prompt", "kwargs", "audio_path"} <= rows.popitem()[1].keys()
    bench.main(["score=a.jsonl", "bench.bootstrap=50"])
    figures = json.loads(Path("a.jsonl.results.json").read_text())["figures"]
    strict = next(line for line in figures if line["figure"] == "strict-prompt")
    assert (strict["rows"], strict["typed"][0], strict["spoken"][0], strict["gap"][0]) == (3, 0, 1, -1)


def test_what_a_server_gets(prompts, serve):
    server = serve(heard_or_read)
    ask(f"system=url:{server.name}", "request=Answer it.", "bench.requests=1")
    for request in server.requests:
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("some-model", 0, 8)
    spoken = [content_of(request) for request in server.requests if len(content_of(request)) > 1]
    assert [part["text"] for content in spoken for part in content if part["type"] == "text"] == ["Answer it."] * 3
    typed = [content_of(request) for request in server.requests if len(content_of(request)) == 1]
    assert sorted(part["text"] for part, in typed) == sorted(f"Say {word} without commas." for word in WORDS)
    first, rest, _ = max(spoken, key=len)
    clips = [soundfile.read(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) for part in (first, rest)]
    assert [len(clip) / rate for clip, rate in clips] == [30, 1]
    assert np.array_equal(np.concatenate([clip for clip, _ in clips]), soundfile.read("sib/audio/1.wav")[0])


def test_the_same_command_goes_on(prompts, serve):
    server = serve(heard_or_read)
    rows = ask(f"system=url:{server.name}")
    ask(f"system=url:{server.name}")
    assert len(server.requests) == 6                                 # nothing is asked twice
    lines = Path("a.jsonl").read_bytes().splitlines(keepends=True)
    Path("a.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed amid the fourth line
    assert ask(f"system=url:{server.name}") == rows
    assert len(server.requests) == 9
    with pytest.raises(UserError, match=r"other settings \(request\); choose another file than a.jsonl"):
        ask(f"system=url:{server.name}", "request=Answer it.")
    ask(f"system=url:{server.name}", "request=Answer it.", "fresh=true")
    assert len(server.requests) == 15


@pytest.mark.parametrize("reply, response, problem", [
    ("", "", None), ((200, completion(None)), "", None), ((200, completion("cut", "length")), "cut", None),
    ("half \ud800 a pair", "half ? a pair", None), ((200, b""), None, "no completion"),
    ((200, b"{}"), None, "no completion"), ((200, b"not json"), None, "no completion"),
    ((200, b'{"choices": []}'), None, "no completion"),
    ((400, b'{"error": {"message": "too long"}}'), None, "too long")])
def test_a_reply_that_is_none_is_a_missing_answer(prompts, serve, capsys, reply, response, problem):
    """One refused or malformed reply ends nothing: it is counted, and scored as not followed."""
    server = serve(lambda request: reply if "milk" in str(request["messages"]) else heard_or_read(request))
    rows = ask(f"system=url:{server.name}")
    milk = next(row for row in rows.values() if "milk" in row["prompt"] and row["mode"] == "typed")
    assert milk["response"] == response and len(server.requests) == len(rows) == 6
    assert milk.get("truncated", False) == (response == "cut")
    out = capsys.readouterr().out
    assert ("1 of them are missing, the first because: " in out) == (problem is not None)
    if problem:
        assert problem in milk["problem"] and problem in out
        assert bench.verdicts(milk)["strict"] == [False]


def test_a_server_that_refuses_is_one_sentence_and_nothing_is_lost(prompts, serve):
    server = serve(lambda request: "Tea." if len(server.requests) <= 2 else (401, b'{"error": "no"}'))
    with pytest.raises(UserError, match=r"http://127.0.0.1:\d+/v1: .*401.*; what is answered so far is kept"):
        ask(f"system=url:{server.name}", "bench.requests=1")
    assert len(Path("a.jsonl").read_bytes().splitlines()) == 2
    before = len(server.requests)
    server.reply = lambda request: "Milk."
    rows = ask(f"system=url:{server.name}")
    assert len(server.requests) == before + 4
    assert sorted(row["response"] for row in rows.values()) == ["Milk."] * 4 + ["Tea."] * 2
    server.close()
    with pytest.raises(UserError, match="v1: Connection error"):
        ask(f"system=url:{server.name}", "fresh=true")


def test_the_key_is_written_nowhere(prompts, serve, capfd):
    """A server that says the key back, in answers and refusals."""
    def echo(request):
        said = f"you are {request['authorization']}"
        if "salt" in str(request["messages"]):
            return 400, json.dumps({"error": {"message": said}}).encode()
        return said

    server = serve(echo)
    ask(f"system=url:{server.name}")
    server.reply = lambda request: (401, json.dumps({"error": {"message": request["authorization"]}}).encode())
    with pytest.raises(UserError) as refused:
        ask(f"system=url:{server.name}", "fresh=true")
    assert {request["authorization"] for request in server.requests} == {f"Bearer {CANARY}"}
    written = b"".join(path.read_bytes() for path in Path().rglob("*") if path.is_file())
    said = "".join([str(refused.value), *capfd.readouterr()])
    assert "Bearer [key]" in said and CANARY not in said and CANARY.encode() not in written


def test_a_server_without_a_key(prompts, serve, monkeypatch):
    monkeypatch.delenv("SYSTEM_API_KEY")
    rows = ask(f"system=url:{serve(lambda request: 'none: no key was given').name}")
    assert {row["response"] for row in rows.values()} == {"none: no key was given"}


# --------------------------------------------------------------------------------------------------
# Small models with random weights
# --------------------------------------------------------------------------------------------------

def randomise(model, scale=0.3):
    """All matrices random: the first ones of InSerter's blocks are zero."""
    torch.manual_seed(3)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = scale * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a run's export, an LLM, a Whisper and an ASR model with CTC."""
    folder = tmp_path_factory.mktemp("models")
    texts = [{"id": f"text-{n}", "parts": [synth.text_part(f"say {word} without commas", True)], "messages": None}
             for n, word in enumerate(WORDS)]
    synth.write_shard(folder / "data/text/train-000000.tar", texts, {text["id"]: {} for text in texts}, {})
    c = synth.load_config([*SIZES, f"data={folder / 'data'}"])
    tok = inserter.load_tokenizer(c)
    model = randomise(inserter.fresh_model(c, tok))
    for name in ("export", "whisper", "ctc", "llm"):
        (folder / name).mkdir()
    inserter.save_model(model, folder / "export")
    inserter.save_processor(model, tok, folder / "export")

    llm = randomise(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(tok.hf), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1)))
    llm.generation_config = transformers.GenerationConfig(eos_token_id=[tok.turn_end, tok.end])
    llm.save_pretrained(folder / "llm")
    tok.hf.save_pretrained(folder / "llm")
    save_whisper(folder / "whisper")
    save_ctc(folder / "ctc")
    return folder


def save_whisper(folder):
    marks = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    vocab = {sign: number for number, sign in enumerate([*"abcdefghijklmnopqrstuvwxyz", *marks])}
    end, start, no_times = (vocab[mark] for mark in marks)
    tokenizer = transformers.WhisperTokenizer(vocab=vocab, merges=[], unk_token=marks[0], pad_token=marks[0])
    tokenizer.add_special_tokens({"extra_special_tokens": marks[1:]})
    ids = {"decoder_start_token_id": start, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    model = randomise(transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        vocab_size=len(vocab), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, suppress_tokens=None,
        begin_suppress_tokens=None, **ids)), scale=1.0)
    model.generation_config = transformers.GenerationConfig(
        max_length=448, is_multilingual=False, no_timestamps_token_id=no_times, suppress_tokens=[end, start, no_times], **ids)
    for part in (model, tokenizer, transformers.WhisperFeatureExtractor()):
        part.save_pretrained(folder)


def save_ctc(folder):
    vocab = {sign: number for number, sign in enumerate(["<pad>", "<unk>", "|", *"abcdefgh"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json", pad_token="<pad>", unk_token="<unk>")
    model = randomise(transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_stride=(20, 20), conv_kernel=(20, 20), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True)), scale=1.0)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    for part in (model, tokenizer, extractor):
        part.save_pretrained(folder)


def without_marks(text, folder):
    """transformers leaves special tokens out, which a model with random weights writes too."""
    for mark in map(str, transformers.AutoTokenizer.from_pretrained(folder).added_tokens_decoder.values()):
        text = text.replace(mark, "")
    return text


def test_an_export_answers_as_the_run_itself(prompts, suite, models):
    """By transformers, in batches of typed and spoken prompts: what inserter.answer says to each alone."""
    export = models / "export"
    rows = ask(f"system=hf:{export}")
    rows |= ask(f"system=hf:{export}", suite, to="b.jsonl")
    assert len(rows) == 10
    model = inserter.load_model(export).eval()
    tok = inserter.open_tokenizer(export)
    for row in rows.values():
        if row["suite"] == "closed":
            question = bench.question_of(row, Path("bench"))
            (text, truncated), = inserter.answer(model, tok, [question], 8, 1)
            assert (row["response"], row["truncated"]) == (without_marks(text, export), truncated)
    assert len({row["response"] for row in rows.values() if row["mode"] == "spoken"}) > 3
    assert rows["words"]["response"] != rows["s"]["response"]          # the same clip, to be written down


@pytest.mark.parametrize("asr", ["whisper", "ctc"])
def test_a_cascade_answers_what_it_hears(prompts, suite, models, asr):
    """Both models, each asked alone, give the same."""
    system = f"system=cascade:{models / asr},{models / 'llm'}"
    batch = "bench.batch=4" if asr == "whisper" else "bench.batch=1"         # CTC hears the padding of a batch
    rows = ask(system, batch) | ask(system, batch, suite, to="b.jsonl")
    hear = transformers.pipeline("automatic-speech-recognition", str(models / asr))
    limits = {"generate_kwargs": {"num_beams": 1, "max_new_tokens": 12}} if asr == "whisper" else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "llm")
    llm = transformers.AutoModelForCausalLM.from_pretrained(models / "llm", dtype=torch.float32)
    for row in rows.values():
        text = row["prompt"]
        assert ("heard" in row) == (row["mode"] == "spoken")
        if row["mode"] == "spoken":
            text = row["heard"]
            clips = bench.question_of(row, Path("bench"))
            alone = [hear({"raw": clip, "sampling_rate": RATE}, **limits)["text"].strip() for clip in clips]
            if asr == "whisper":       # this one writes no spaces, and never ends
                assert all(map(str.startswith, text.split(" "), alone)) and len(text.split(" ")) == len(clips)
            else:
                assert text == " ".join(alone)
        if row["suite"] == "transcription":
            assert row["response"] == row["heard"]
            continue
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                               return_tensors="pt", return_dict=True)
        made = llm.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        assert row["response"] == tokenizer.decode(made, skip_special_tokens=True)
    assert len({row["heard"] for row in rows.values() if row["mode"] == "spoken"}) >= 4      # three clips and silence
    if asr == "whisper":
        assert len(rows["s"]["heard"]) == 10 + systems.TOKENS_A_SECOND / 2               # the clip lasts half a second


def test_the_llm_of_an_export_is_the_second_of_a_cascade(prompts, models):
    """It answers what was heard as the export answers it typed; what is typed has nobody between."""
    export = models / "export"
    rows = ask(f"system=cascade:{models / 'whisper'},{export}")
    model = inserter.load_model(export).eval()
    tok = inserter.open_tokenizer(export)
    assert len({row["mode"] for row in rows.values()}) > 1
    for row in rows.values():
        if row["suite"] == "closed":
            (text, truncated), = inserter.answer(model, tok, [row.get("heard", row["prompt"])], 8, 1)
            assert (row["response"], row["truncated"]) == (without_marks(text, export), truncated)


# --------------------------------------------------------------------------------------------------
# Wrong use
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, sentence", [
    (["system=who"], "no system 'who'"), (["system=cascade:one"], "no system 'cascade:one'"),
    (["system=url:http://127.0.0.1:9/v1"], "it is hf:FOLDER, cascade:ASR,LLM or url:ADDRESS,MODEL"),
    (["system=hf:x", "prompts="], "prompts=FOLDER and to=FILE.jsonl are missing"),
    (["system=hf:x", "to=", "prompts=sib"], "prompts=FOLDER and to=FILE.jsonl are missing"),
    (["system=hf:x", "prompts=sib/audio"], "sib/audio is no folder with"),
    (["system=hf:x", "to=thesis.jsonl"], "thesis.jsonl was not begun by this script")])
def test_wrong_settings(prompts, settings, sentence):
    Path("thesis.jsonl").write_text("mine")
    with pytest.raises(UserError, match=sentence):
        ask(*settings)
    assert Path("thesis.jsonl").read_text() == "mine"


def test_a_checkpoint_of_another_kind(prompts, models):
    with pytest.raises(UserError, match="whisper does not open: Unrecognized configuration class"):
        ask(f"system=hf:{models / 'whisper'}")
