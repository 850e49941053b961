"""The tensors of a checkpoint as a tree of modules, with what each branch holds. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from ernie5.checkpoint.manifest import TensorEntry


@dataclasses.dataclass
class Branch:
    """A module (or a kind of moment) with its parts; entry: the tensor, where it is one."""

    parts: dict[str, Branch] = dataclasses.field(default_factory=dict)
    entry: TensorEntry | None = None
    tensors: int = 0
    values: int = 0
    num_bytes: int = 0


def grow_tree(tensors: Mapping[str, TensorEntry]) -> Branch:
    """`tensors` by name, such as `layers.0.moe.router.weight` or `exp_avg/layers.0...`, in their order."""
    root = Branch()
    for name, entry in tensors.items():
        way = [root]
        for part in name.replace("/", ".").split("."):
            way.append(way[-1].parts.setdefault(part, Branch()))
        way[-1].entry = entry
        for branch in way:
            branch.tensors += 1
            branch.values += math.prod(entry.shape)
            branch.num_bytes += entry.num_bytes
    return root


def tree_lines(root: Branch, *, depth: int | None = None) -> list[str]:
    """A line per branch and tensor below `root`, `depth` levels deep (None: all); parts with one part share a line."""
    rows = list(_rows(root, indent=1, depth=depth))
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {words}" for name, words in rows]


def _rows(branch: Branch, *, indent: int, depth: int | None) -> Iterator[tuple[str, str]]:
    if depth is not None and indent > depth:
        return
    for name, part in branch.parts.items():
        while part.entry is None and len(part.parts) == 1:
            (inner, part), = part.parts.items()
            name = f"{name}.{inner}"
        yield "  " * indent + name, _words(part)
        yield from _rows(part, indent=indent + 1, depth=depth)


def _words(branch: Branch) -> str:
    entry = branch.entry
    if entry is None:
        return f"{branch.values:>15,} values  {size_words(branch.num_bytes):>10}  {branch.tensors} tensors"
    shape = "x".join(map(str, entry.shape)) or "scalar"
    slices = f"  in {len(entry.slices)} slices" if len(entry.slices) > 1 else ""
    return f"{branch.values:>15,} values  {size_words(branch.num_bytes):>10}  {entry.dtype} {shape}{slices}"


def size_words(num_bytes: int) -> str:
    """Such as `7.1 MiB`."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"
