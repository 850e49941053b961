"""`ernie5 train` under a launcher: `deepspeed launch/pretrain.py CONFIG [a.b=c ...]`, or torchrun in its place.

The launcher tells each process its rank through the environment; the `--local_rank` that some of them add to the
arguments is dropped, because it says the same.
"""

import os
import sys

from ernie5.__main__ import main


def without_local_rank(arguments: list[str]) -> list[str]:
    """The arguments less `--local_rank=N` and its variants; sets LOCAL_RANK where the launcher did not."""
    kept = []
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            kept.append(word)
            continue
        os.environ.setdefault("LOCAL_RANK", value or next(words, "0"))
    return kept


if __name__ == "__main__":
    sys.exit(main(["train", *without_local_rank(sys.argv[1:])]))
