"""The shape of the project: three flat scripts that read from top to bottom, one direction of imports.

    python -m pytest -s tests/test_house.py      prints what each script asks of a reader
"""
import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"synth.py": set(), "inserter.py": {"synth"}, "bench.py": {"synth", "inserter"}}
EXTRAS = sorted(f"extras/{path.name}" for path in (ROOT / "extras").glob("*.py"))
EXPERIMENTS = sorted(f"experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py"))
COLUMNS = 110
SCREEN = 60                                  # lines of code of the longest function
EXTRA = 250                                  # lines of an extra
WEIGHT = 34_450                              # tokens of the three scripts
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER)


def docstring_lines(tree: ast.Module) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        documentable = isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        if documentable and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def measure(source: str) -> dict:
    """What a reader meets: lines of code and tokens, without blank lines, comments and docstrings."""
    tree = ast.parse(source)
    documented = docstring_lines(tree)
    lines = set()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT and token.start[0] not in documented:
            lines |= set(range(token.start[0], token.end[0] + 1))
            tokens += 1
    functions = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = len([n for n in lines if node.lineno <= n <= node.end_lineno])
    longest = max(functions, key=functions.get, default=None)
    return {"lines": len(source.splitlines()), "tokens": tokens, "tokens a line": round(tokens / len(lines), 1),
            "functions": len(functions), "longest line": max(map(len, source.splitlines())),
            "longest function": (longest, functions.get(longest, 0))}


def imported_by(source: str) -> set[str]:
    """The names of all modules that a script imports, inside its functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_measure_counts_code_alone():
    source = ('"""doc"""\n\nx = 1  # why\n# comment\ndef f():\n    """doc\n    more"""\n    return (1,\n'
              '            2)\n')
    assert measure(source) == {"lines": 9, "tokens": 14, "tokens a line": 3.5, "functions": 1,
                               "longest line": 14, "longest function": ("f", 3)}


def test_imports_are_seen_inside_functions():
    source = "import a, b.c\ndef f():\n    import d\n    from e import g\n"
    assert imported_by(source) == {"a", "b.c", "d", "e"}


@pytest.mark.parametrize("name", [*SCRIPTS, *EXTRAS, *EXPERIMENTS])
def test_files_are_read_on_one_screen(name):
    source = (ROOT / name).read_text("utf-8")
    found = measure(source)
    print(f"\n{name}: {', '.join(f'{key} {value}' for key, value in found.items())}")
    wide = [number for number, line in enumerate(source.splitlines(), 1) if len(line) > COLUMNS]
    assert not wide, f"{name} passes {COLUMNS} columns in the lines {wide}"
    assert found["longest function"][1] <= SCREEN
    assert name not in EXTRAS or found["lines"] <= EXTRA


def test_the_three_scripts_are_light():
    tokens = {name: measure((ROOT / name).read_text("utf-8"))["tokens"] for name in SCRIPTS}
    print(tokens, sum(tokens.values()))
    assert sum(tokens.values()) <= WEIGHT


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_go_one_way(name):
    imported = imported_by((ROOT / name).read_text("utf-8"))
    assert imported & {"synth", "inserter", "bench", "extras", "experiments", "tests"} == SCRIPTS[name]


def test_import_does_nothing(tmp_path):
    code = ("import synth, inserter, bench, os, sys; assert os.listdir() == []; "
            "assert 'espeakng_loader' not in sys.modules")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
