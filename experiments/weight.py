"""What the code asks of a reader: lines, tokens and functions of the three scripts and of every extra.

    python experiments/weight.py [other.py …]     prints a table, writes results/weight.json

Tokens are names, numbers, operators and texts: no comments, docstrings or line ends. A line of code has one
at least. Python 3.11 counts an f-string as one token, later ones as several.
"""
import ast
import json
import os
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENCODING, tokenize.ENDMARKER)


def weigh(path: Path) -> dict:
    tree = ast.parse(path.read_bytes())
    docstrings = set()                       # their lines
    functions = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            functions.append(node)
    with open(path, "rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline)
                  if token.type not in SILENT and token.start[0] not in docstrings]
    code = {number for token in tokens for number in range(token.start[0], token.end[0] + 1)}
    sizes = {len(code & set(range(node.lineno, node.end_lineno + 1))): node.name for node in functions}
    longest = max(sizes, default=0)
    return {
        "file": os.path.relpath(path, ROOT),
        "lines": len(path.read_text("utf-8").splitlines()),
        "tokens": len(tokens),
        "tokens a line": round(len(tokens) / len(code), 1),
        "functions": len(functions),
        "longest function": f"{sizes.get(longest, '')} {longest}"}


def main(others: list[str]) -> None:
    rows = [weigh(ROOT / name) for name in ("synth.py", "inserter.py", "bench.py")]
    sums = {name: sum(row[name] for row in rows) for name in ("lines", "tokens", "functions")}
    rows.append(dict.fromkeys(rows[0], "") | {"file": "the three"} | sums)
    paths = [*sorted((ROOT / "extras").glob("*.py")), *(Path(name).resolve() for name in others)]
    rows += [weigh(path) for path in paths]
    for cells in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)):
        print(f"| {' | '.join(map(str, cells))} |")
    result = {
        "command": " ".join(["python experiments/weight.py", *others]),
        "python": sys.version.split()[0],
        "files": rows}
    (ROOT / "results" / "weight.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
