"""extras/official.py: the official evaluator's verdicts, its faults, its figures, the file of its own verdicts."""
import doctest
import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "extras"))
import bench                                                          # noqa: E402
import official                                                       # noqa: E402

from test_cases import RIGHT, WRONG                                   # noqa: E402
from test_scoring import CASES, CHINESE_STORY, random_answers         # noqa: E402

HONEST = dict(bench.CHECKS)
AT_LEAST, LESS = "at least", "less than"
NO_COMMA, TITLE = ("punctuation:no_comma", {}), ("detectable_format:title", {})
HASH = "keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": AT_LEAST}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The official verdicts, for one test."""
    checks = dict(bench.CHECKS)
    monkeypatch.setattr(bench, "verdicts", bench.verdicts)
    monkeypatch.setattr(bench, "majority", bench.majority)
    official.install()
    yield
    bench.CHECKS.clear()
    bench.CHECKS.update(checks)


@pytest.fixture(params=["rule", "nltk punkt_tab"])
def tokenizer(request, monkeypatch):
    """Both ways to count sentences, the second where nltk and its model are installed."""
    if request.param == "rule":
        monkeypatch.setattr(official, "punkt", lambda: None)
    elif official.punkt() is None:
        pytest.skip("nltk's sentence model is not installed")


def verdicts(response, name, kwargs):
    row = bench.verdicts({"suite": "closed", "instruction_id_list": [name], "kwargs": [kwargs], "response": response})
    return row["strict"] + row["loose"]


@pytest.mark.parametrize("name, kwargs, right, right_zh, wrong, wrong_zh", CASES)
def test_check(tokenizer, name, kwargs, right, right_zh, wrong, wrong_zh):
    for response in right + right_zh:
        assert verdicts(response, name, kwargs) == [True, True], response
    for response in [*wrong, *wrong_zh, "", " \n"]:
        assert verdicts(response, name, kwargs)[0] is False, response


@pytest.mark.parametrize("text, count", [
    ("I CAN'T STOP", 4), ("the CAT'S HAT, DON’T", 5), ("CANNOT", 2), ("AT&T E-MAIL X/Y", 4),
    ("U.S. (A) [B] A:B", 5), ("AT 5PM 12", 2), ("TV's", 1), ("苹果 iPhone", 0), ("WAIT...WHAT--NO", 3)])
def test_words_in_capitals(tokenizer, text, count):
    assert official.capital_words(text) == count


def test_most_verdicts_are_bench_pys(monkeypatch):
    monkeypatch.setattr(official, "punkt", lambda: None)
    for text in random_answers(200):
        for name, kwargs, *_ in CASES:
            if name not in official.DIFFERENT:
                honest = bool(text.strip() and HONEST[name](text, **kwargs))
                assert verdicts(text, name, kwargs)[0] is honest, (name, text)


def test_the_mended_faults_are_there():
    """Of the answers of test_cases.py that bench.py judges rightly, the evaluator does so with ten alone."""
    agreed = [response for followed, cases in ((True, RIGHT), (False, WRONG)) for name, kwargs, response in cases
              if verdicts(response, name, kwargs)[0] is followed]
    assert len(agreed) == 10 and {"Yes !!!", "It costs $5.", "下雨了。"} < set(agreed), agreed


@pytest.mark.parametrize("name, kwargs", [
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": LESS}),
    ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": LESS}),
    ("keywords:letter_frequency", {"letter": "É", "let_frequency": 1, "let_relation": AT_LEAST}),
    ("length_constraints:number_words", {"num_words": 0, "relation": AT_LEAST}),
    ("length_constraints:number_words", {"num_words": -1, "relation": AT_LEAST}),
    ("keywords:frequency", {"keyword": "rock", "frequency": 0, "relation": AT_LEAST}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 0}),
    ("keywords:existence", {"keywords": []}), ("startend:end_checker", {"end_phrase": ""}),
    ("keywords:existence", {"keywords": ["new ("]}),
    ("keywords:frequency", {"keyword": "(a", "frequency": 1, "relation": AT_LEAST}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "a"}),
    ("language:response_language", {"language": "zh"}), ("language:response_language", {"language": "yue"})])
def test_what_the_official_code_leaves_to_chance_has_no_verdict(name, kwargs):
    assert verdicts("a text of some words", name, kwargs) == [None, None]


def test_one_negative_number_has_a_verdict():
    kwargs = {"capital_frequency": -1, "capital_relation": AT_LEAST}
    assert verdicts("a text", "change_case:capital_word_frequency", kwargs) == [True, True]


@pytest.mark.parametrize("response, name, kwargs, followed", [
    ("12345", "language:response_language", {"language": "en"}, True),
    (CHINESE_STORY, "language:response_language", {"language": "zh"}, None),
    ("what a day", "keywords:existence", {"keywords": ["d.y"]}, True),
    ("what a d.y", "keywords:existence", {"keywords": ["d.y"]}, True),
    ("P.S 1 PxS 2", "detectable_format:multiple_sections", {"section_spliter": "P.S", "num_sections": 2}, True)])
def test_faults(response, name, kwargs, followed):
    assert verdicts(response, name, kwargs)[0] is followed


def test_failed_detection_in_capitals(monkeypatch):
    monkeypatch.setattr(bench, "language_of", lambda text: None)
    for name, text in (("change_case:english_capital", "ABC"), ("change_case:english_lowercase", "abc")):
        assert verdicts(text, name, {}) == [True, True]


def test_the_tiny_suite_is_judged_as_before():
    checks = {"instruction_id_list": ["keywords:existence", "tiny:answer"],
              "kwargs": [{"keywords": ["d.y"]}, {"kind": "colour", "words": ["red"]}]}
    assert bench.follows("what a day, it is red", checks) == [False, True]


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------

def row(key, response, *instructions):
    names, kwargs = zip(*instructions)
    return {"key": key, "prompt": f"prompt {key}", "instruction_id_list": list(names), "kwargs": list(kwargs),
            "response": response}


@pytest.fixture
def score(tmp_path, monkeypatch):
    """score(rows, *settings) -> scored rows, {figure: ratio or None}"""
    monkeypatch.setattr(official, "install", lambda: None)           # the fixture above did

    def scored(rows, suite="closed"):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        official.main([f"score={path}", f"suite={suite}", "bench.bootstrap=100"])
        lines = json.loads(Path(f"{path}.results.json").read_text())["figures"]
        return bench.read_jsonl(Path(f"{path}.scored.jsonl")), {
            line["figure"]: line["typed"] and line["typed"][0] for line in lines}
    return scored


def test_missing_answers_are_left_out(score):
    rows = [row(1, "<<a>>", NO_COMMA, TITLE), row(2, None, NO_COMMA), row(3, None, NO_COMMA, TITLE), row(4, "", NO_COMMA)]
    scored, results = score(rows)
    assert results["strict-prompt"] == 1 / 2 and results["strict-instruction"] == 2 / 3
    assert scored[2]["strict"] == [None, None]


def test_verdicts_that_cannot_be_given_leave_the_denominators(score):
    scored, results = score([row(1, "a # b", NO_COMMA, HASH), row(2, "a, b", NO_COMMA), row(3, "a b", NO_COMMA)])
    assert scored[0]["strict"] == [True, None]
    assert results["strict-prompt"] == 1 / 2 and results["strict-instruction"] == 2 / 3


@pytest.mark.parametrize("votes, majority", [
    (["['YES', 'NO']"] * 4, [True, False]),
    (["['YES', 'NO']", "['NO', 'YES']"], [True, False]),             # the first vote decides
    (["['NO', 'NO']", "['YES', 'NO']"], [False, False]),
    (["['YES', 'YES', 'YES']", "['NO', 'NO']"], [True, True, True]),  # the longest
    (["nonsense"], []), (None, [])])
def test_open_votes(votes, majority):
    questions = {"suite": "open", "prompt": "p", "decomposed_questions": ["q", "q"], "response": "r"}
    assert bench.verdicts(questions | {"pred_score": votes})["strict"] == majority


def test_adjustment_scores(score):
    def adjusted(*votes, response="r"):
        return {"prompt": "p", "response": response, "pred_score": [json.dumps(vote) for vote in votes]}

    yes, no = "YES", "NO"
    rows = [adjusted((yes, yes, no), (yes, yes, no), (no, no, yes)), adjusted((yes, no, no)),
            adjusted((no, no, yes), ("maybe", yes, yes)), adjusted((yes, yes, yes), (no, no, no)),
            adjusted((yes, yes)), adjusted((yes, yes, yes), response=None)]
    _, results = score(rows, suite="adjustment")
    assert (results["IAR"], results["ECR"]) == (2 / 4, 2 / 4)


# --------------------------------------------------------------------------------------------------
# The evaluator's own verdicts
# --------------------------------------------------------------------------------------------------

def test_examples_in_the_docstrings():
    assert doctest.testmod(official).failed == 0


@pytest.mark.skipif("CLOSED_CONFORMANCE" not in os.environ, reason="CLOSED_CONFORMANCE names no file of official verdicts")
def test_official_verdicts(monkeypatch, capsys):
    path = Path(os.environ["CLOSED_CONFORMANCE"])
    official.punkt.cache_clear()
    if official.punkt():
        count, differ = official.compare(path)
        assert not differ and set(count) == set(bench.CHECKS)
    monkeypatch.setattr(official, "punkt", lambda: None)
    count, differ = official.compare(path)
    assert set(differ) <= {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
    assert all(n <= 0.01 * count[name] for name, n in differ.items())
    monkeypatch.setattr(official, "install", lambda: None)
    official.main([f"conformance={path}"])
    assert capsys.readouterr().out.startswith(f"{differ.total()} of {count.total()} verdicts differ")
