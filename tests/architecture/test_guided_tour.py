"""The README's guided tour stays readable in one sitting."""

from __future__ import annotations

import re
from pathlib import Path

FILES, LINES = 9, 1200


def test_the_guided_tour_names_nine_files_of_at_most_1200_lines_together(repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    tour = readme.split("## Guided tour", 1)[1].split("\n## ", 1)[0]
    paths = [repository / name for name in re.findall(r"^\| `([\w/]+\.py)` \|", tour, flags=re.MULTILINE)]
    total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    assert len(paths) == FILES and total <= LINES, f"{len(paths)} files, {total} lines; the rule is {FILES}, {LINES}"


def test_the_loop_of_every_workflow_has_at_most_150_lines(repository: Path) -> None:
    assert len((repository / "ernie5/train/loop.py").read_text(encoding="utf-8").splitlines()) <= 150
