"""Sizes: functions and files that one can take in (DESIGN section 4)."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

FUNCTION_LINES = 80
FILE_LINES = 500
SCRIPT_LINES = 100
LINE_CHARACTERS = 120


def size_complaints(source: object) -> list[str]:
    complaints = []
    parts = source.path.split("/")
    limit = SCRIPT_LINES if parts[0] in ("tools", "launch") and len(parts) == 2 else FILE_LINES
    if len(source.lines) > limit:
        complaints.append(source.at(limit + 1, f"{len(source.lines)} lines, at most {limit}; split the file"))
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                rule = f"{node.name} has {lines} lines, at most {FUNCTION_LINES}; split the function"
                complaints.append(source.at(node.lineno, rule))
    for number, line in enumerate(source.lines, start=1):
        if len(line) > LINE_CHARACTERS:
            complaints.append(source.at(number, f"{len(line)} characters, at most {LINE_CHARACTERS}"))
    return complaints


def test_functions_files_and_lines_stay_within_their_limits(sources: tuple) -> None:
    complaints = [line for source in sources for line in size_complaints(source)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_shell_scripts_stay_within_their_limit(repository: Path) -> None:
    scripts = [*repository.glob("launch/*.sh"), *repository.glob("tools/*.sh"), *repository.glob("tests/*.sh")]
    long = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in scripts}
    assert not {name: lines for name, lines in long.items() if lines > SCRIPT_LINES}


def test_the_limits_themselves_catch_a_long_function_and_a_long_tool(source_of: Callable) -> None:
    body = "def f():\n" + "    pass\n" * 80
    assert size_complaints(source_of("ernie5/model/x.py", body)) == [
        "ernie5/model/x.py:1: f has 81 lines, at most 80; split the function"
    ]
    assert "at most 100" in size_complaints(source_of("tools/x.py", "a = 1\n" * 101))[0]
    assert not size_complaints(source_of("tools/folder/x.py", "a = 1\n" * 101))
    assert "121 characters" in size_complaints(source_of("ernie5/x.py", "#" * 121 + "\n"))[0]
