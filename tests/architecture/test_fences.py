"""Fences: each heavy library has one home inside ernie5/ and kernels/ (DESIGN section 2)."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

MEDIA = ("ernie5/data/decode.py", "ernie5/generate/media.py")
HOMES = {
    "deepspeed": ("ernie5/engine/deepspeed_*.py",),
    "triton": ("kernels/*",),
    "webdataset": ("ernie5/data/shards.py",),
    "transformers": ("ernie5/checkpoint/*",),
    "safetensors": ("ernie5/checkpoint/*", "ernie5/tokenizers/weights.py"),
    "av": MEDIA,
    "PIL": MEDIA,
    "soundfile": MEDIA,
    # remote/ is what an exported directory carries along; it runs without this package.
    "tokenizers": ("ernie5/tokenizers/text.py", "ernie5/checkpoint/remote/*"),
    "tensorboard": ("ernie5/observe/sinks.py",),
    "torch.utils.tensorboard": ("ernie5/observe/sinks.py",),
    "wandb": ("ernie5/observe/sinks.py",),
    "fastapi": ("ernie5/serve/app.py",),
    "uvicorn": ("ernie5/serve/app.py",),
    "starlette": ("ernie5/serve/app.py",),
    "yaml": ("ernie5/config/load.py",),
    "torch.distributed": (
        "ernie5/parallel/*", "ernie5/engine/*", "ernie5/checkpoint/*", "ernie5/observe/*", "ernie5/train/*",
    ),
}
DISTRIBUTED_ATTRIBUTE = "torch.distributed"


def fence_complaints(source: object) -> list[str]:
    complaints = []
    for found in source.imports():
        names = [found.module, *(f"{found.module}.{name}" for name in found.names)]
        for library, homes in HOMES.items():
            used = any(name == library or name.startswith(library + ".") for name in names)
            if used and not any(fnmatch.fnmatch(source.path, home) for home in homes):
                complaints.append(source.at(found.line, f"{library} may be imported in {', '.join(homes)} only"))
    homes = HOMES[DISTRIBUTED_ATTRIBUTE]
    if not any(fnmatch.fnmatch(source.path, home) for home in homes):
        for number, line in enumerate(source.lines, start=1):
            if DISTRIBUTED_ATTRIBUTE + "." in line.split("#")[0] and "import" not in line and '"' not in line:
                complaints.append(source.at(number, f"torch.distributed may be used in {', '.join(homes)} only"))
    return complaints


def test_every_heavy_library_stays_in_its_home(package_sources: tuple) -> None:
    complaints = [line for source in package_sources for line in fence_complaints(source)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_nothing_imports_kernels_by_its_folder_name(sources: tuple) -> None:
    complaints = [
        source.at(found.line, "import ernie5_kernels; `kernels` is another distribution's name")
        for source in sources
        for found in source.imports()
        if found.module.split(".")[0] == "kernels" and not source.path.startswith("kernels/")
    ]
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_fence_itself_catches_lazy_imports_and_attributes(source_of: Callable) -> None:
    lazy = source_of("ernie5/train/loop.py", "def f():\n    import deepspeed\n")
    assert fence_complaints(lazy) == [
        "ernie5/train/loop.py:2: deepspeed may be imported in ernie5/engine/deepspeed_*.py only"
    ]
    attribute = source_of("ernie5/model/block.py", "import torch\ntorch.distributed.barrier()\n")
    assert fence_complaints(attribute)[0].startswith("ernie5/model/block.py:2: torch.distributed")
    assert fence_complaints(source_of("ernie5/model/block.py", "from torch import distributed\n"))
    assert not fence_complaints(source_of("ernie5/engine/deepspeed_engine.py", "import deepspeed\n"))
    assert not fence_complaints(source_of("ernie5/data/x.py", "from ernie5.tokenizers import vocab\n"))
