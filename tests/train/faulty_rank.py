"""`ernie5 train` with faults of one rank, for tests: NaN in its gradient at one step, and a hang at another.

FAULTS="rank nan_step hang_step" says where; steps count the batches that the rank draws.
"""

from __future__ import annotations

import os
import sys
import time

import torch

from ernie5.__main__ import main
from ernie5.data.loader import Loader
from ernie5.train import build

RANK, NAN_STEP, HANG_STEP = map(int, os.environ["FAULTS"].split())


def install() -> None:
    """Replace the loader's step and the engine's construction, on the faulty rank alone."""
    whole_step, whole_engine = Loader.next_step, build.build_engine
    state = {"step": 0}

    def next_step(loader: Loader) -> list:
        state["step"] += 1
        if state["step"] == HANG_STEP:
            time.sleep(10_000)
        return whole_step(loader)

    def build_engine(*arguments: object, **named: object) -> object:
        engine = whole_engine(*arguments, **named)
        parameter = engine.model.final_norm.weight
        parameter.register_hook(lambda gradient: gradient * (torch.nan if state["step"] == NAN_STEP else 1.0))
        return engine

    Loader.next_step, build.build_engine = next_step, build_engine


if __name__ == "__main__":
    if int(os.environ["RANK"]) == RANK:
        install()
    sys.exit(main(["train", *sys.argv[1:]]))
