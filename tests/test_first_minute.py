"""What a newcomer meets first: the README's forty lines, the models that come with the code, the notebook."""
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import soundfile
import torch
from nbclient import NotebookClient
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

import inserter

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"


def run(*command, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, env=environment)


def test_the_readmes_block_prints_what_stands_below_it(tmp_path):
    readme = (ROOT / "README.md").read_text("utf-8")
    code, printed = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", readme, re.S).groups()
    done = run("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    without_figures = [re.sub(r"\d+\.\d+|[ \t]+$", "", text, flags=re.M) for text in (done.stdout, printed)]
    assert without_figures[0] == without_figures[1]
    before, after = map(float, re.findall(r"(\d+\.\d+) nats", done.stdout))
    assert after < before / 2


def test_readme_and_docs_name_files_that_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("question", ["sound", "text"])
def test_a_model_answers_before_anything_is_trained(question, tmp_path):
    asked = {"sound": str(ROOT / "assets" / "question.flac"),
             "text": "which day comes after thursday, use the word picnic"}
    done = run(ROOT / "inserter.py", f"ask={asked[question]}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "It is friday. I like the picnic.\n"
    assert "Run tiny has no model yet" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_run_has_no_model_to_fall_back_on(tmp_path):
    done = run(ROOT / "inserter.py", "run=other", "ask=hello", cwd=tmp_path)
    assert done.returncode == 2
    assert "There is no model in runs/other/model" in done.stderr


@pytest.mark.parametrize("name", ["tiny", "warmup"])
def test_transformers_opens_the_models_and_answers_alike(name):
    folder = ROOT / "assets" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5.5e6
    waveform, _ = soundfile.read(ROOT / "assets" / "question.flac", dtype="float32")
    processor = AutoProcessor.from_pretrained(folder)
    theirs = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    asked = [{"role": "user", "content": [{"type": "audio", "audio_url": "question.wav"}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, audio=[waveform], sampling_rate=16000, add_special_tokens=False,
                       return_tensors="pt")
    ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=40)[:, inputs["input_ids"].shape[1]:]
    reply = processor.batch_decode(ids, skip_special_tokens=True)[0]
    model, tok = inserter.load_model(str(folder)).eval(), inserter.open_tokenizer(folder)
    (ours, _), = inserter.answer(model, tok, [waveform], max_tokens=40, batch=1)
    assert ours == reply


def test_the_notebook_runs_and_was_kept_with_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert NOTEBOOK.stat().st_size < 1e6
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code[2:])
    assert str(ROOT) not in NOTEBOOK.read_text("utf-8")
    NotebookClient(notebook, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    texts = ["".join(output.get("text", "") for output in cell.outputs) for cell in code]
    assert any("before interleaving" in text and "obeys spoken" in text for text in texts)
    assert not any(output.output_type == "stream" and output.name == "stderr"
                   for cell in code for output in cell.outputs)
