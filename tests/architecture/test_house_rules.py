"""House rules that a program can check: names, packages, excuses in comments (DESIGN section 4)."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

FORBIDDEN_NAMES = ("utils", "util", "common", "core", "misc", "helpers")
BANNER = re.compile(r"^\s*#\s*([-=#*~_])\1{3,}")
TODO = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b")


def rule_complaints(source: object) -> list[str]:
    complaints = []
    for node in ast.walk(source.tree):
        rule = _broken_rule(node)
        if rule:
            complaints.append(source.at(node.lineno, rule))
    for number, line in enumerate(source.lines, start=1):
        if BANNER.search(line):
            complaints.append(source.at(number, "banner comment; a heading belongs into a file of its own"))
        if TODO.search(line):
            complaints.append(source.at(number, "do it, or file an issue"))
    for part in source.path.removesuffix(".py").split("/"):
        if part in FORBIDDEN_NAMES:
            complaints.append(source.at(1, f"{part!r} says nothing; name the file by what it holds"))
    return complaints


def _broken_rule(node: ast.AST) -> str | None:
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "bare except; name what you expect"
    if isinstance(node, ast.Global):
        return "module-level mutable state; pass an object"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        last = node.args[2:3]
        if last and isinstance(last[0], ast.Constant) and last[0].value is None:
            return 'getattr(x, "y", None) hides a missing attribute; declare it'
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
        if node.args.kwarg is not None:
            return f"{node.name} takes **{node.args.kwarg.arg}; name the arguments"
    return None


def init_complaints(source: object) -> list[str]:
    body = source.tree.body
    documented = bool(body) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    if not documented:
        return [source.at(1, "an __init__.py of ernie5/ holds a docstring")]
    return [source.at(node.lineno, "an __init__.py of ernie5/ holds a docstring and nothing else") for node in body[1:]]


def test_package_files_keep_the_house_rules(package_sources: tuple) -> None:
    complaints = [line for source in package_sources for line in rule_complaints(source)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_init_files_of_ernie5_hold_a_docstring_and_nothing_else(package_sources: tuple) -> None:
    inits = [s for s in package_sources if s.path.startswith("ernie5/") and s.path.endswith("/__init__.py")]
    complaints = [line for source in inits for line in init_complaints(source)]
    assert inits and not complaints, "\n" + "\n".join(complaints)


def test_every_module_and_every_public_name_of_ernie5_has_a_docstring(package_sources: tuple) -> None:
    complaints = []
    for source in package_sources:
        if ast.get_docstring(source.tree) is None:
            complaints.append(source.at(1, "the module has no docstring"))
        for node in source.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if ast.get_docstring(node) is None:
                    complaints.append(source.at(node.lineno, f"public {node.name} has no docstring"))
    assert not complaints, "\n" + "\n".join(complaints)


def test_every_folder_has_a_readme(repository: Path) -> None:
    folders = [path.parent for path in sorted((repository / "ernie5").glob("*/__init__.py"))]
    folders += [repository / name for name in ("kernels", "launch", "configs", "tools")]
    missing = [folder.relative_to(repository).as_posix() for folder in folders if not (folder / "README.md").is_file()]
    assert not missing, f"folders without README.md: {', '.join(missing)}"


def test_every_subfolder_with_python_is_a_package(repository: Path) -> None:
    folders = {path.parent for path in (repository / "ernie5").rglob("*.py")}
    bare = sorted(folder for folder in folders if not (folder / "__init__.py").is_file())
    missing = [folder.relative_to(repository).as_posix() for folder in bare]
    assert not missing, f"folders that would not be installed, they lack __init__.py: {', '.join(missing)}"


def test_no_init_file_stands_under_tests(repository: Path) -> None:
    found = [path.relative_to(repository).as_posix() for path in (repository / "tests").rglob("__init__.py")]
    assert not found, f"these shadow installed packages of the same name: {', '.join(found)}"


def test_the_rules_themselves_catch_what_they_are_for(source_of: Callable) -> None:
    bad = source_of(
        "ernie5/model/utils.py",
        "try:\n    a = getattr(b, 'c', None)\nexcept:\n    pass\n# ---- part two ----\n# TODO later\n"
        "def f(**options):\n    global a\n",
    )
    found = [complaint.split(": ", 1)[0].rsplit(":", 1)[1] for complaint in rule_complaints(bad)]
    assert sorted(found) == ["1", "2", "3", "5", "6", "7", "8"]
    assert init_complaints(source_of("ernie5/x/__init__.py", '"""Doc."""\nimport os\n'))[0].startswith(
        "ernie5/x/__init__.py:2"
    )
    assert init_complaints(source_of("ernie5/x/__init__.py", ""))
