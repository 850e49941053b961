"""`ernie5 evaluate`: what it does for its file, whoever reads its words."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from ernie5.evaluate import command
from ernie5.evaluate.config import EvaluateConfig
from ernie5.generate.config import GenerateConfig


@pytest.mark.parametrize("unread", [("stderr",), ("stdout",), ("stdout", "stderr")], ids="-".join)
def test_figures_are_written_where_nobody_reads_what_is_said(
    unread: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(subject: object, *, announce: Callable[[str], None], **_: object) -> object:
        announce("losses")
        announce("more")
        return types.SimpleNamespace(to_json=lambda: '{"step": 3}')

    config = types.SimpleNamespace(
        evaluate=EvaluateConfig(), generate=GenerateConfig(), data=types.SimpleNamespace(shards=())
    )
    generation = types.SimpleNamespace(with_config=lambda config: None)
    loaded = types.SimpleNamespace(config=config, generation=generation, step=3)
    for name, value in (("find_checkpoint", lambda path: tmp_path), ("evaluate", measure),
                        ("load_generation", lambda path, device: loaded),
                        ("list_shards", lambda shards: ()), ("open_corpus", lambda shards: None)):
        monkeypatch.setattr(command, name, value)
    for name in unread:
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, name, os.fdopen(writer, "w"))
    assert command.main([str(tmp_path), "--json", "--out", str(tmp_path / "evaluation.json")]) == 0
    assert (tmp_path / "evaluation.json").read_text("utf-8") == '{"step": 3}'
