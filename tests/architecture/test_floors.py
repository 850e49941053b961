"""Floors: a folder imports lower floors only, plus the sideways arrows listed here by name with their reason."""

from __future__ import annotations

from collections.abc import Callable

FLOORS = {
    "errors": 0,
    "config": 1,
    "records": 2, "observe": 2,
    "tokenizers": 3, "data": 3, "model": 3, "objectives": 3, "optim": 3,
    "parallel": 4, "elastic": 4, "quantize": 4,
    "engine": 5, "checkpoint": 5, "generate": 5,
    "train": 6, "evaluate": 6, "serve": 6,
    "posttrain": 7,
    "plan": 8,
    "__main__": 9,
}
# (importing module prefix, imported module prefix): why
SIDEWAYS = {
    ("ernie5.data", "ernie5.tokenizers"): "examples are made of tokens",
    ("ernie5.checkpoint", "ernie5.engine.interface"): "a checkpoint saves what the engine's interface hands out",
    ("ernie5.generate.load", "ernie5.checkpoint.load"): "a prompt needs a trained model; checkpoint knows no generate",
    ("ernie5.observe", "ernie5.records"): "the routing groups are named by TokenKind",
    ("ernie5.train.config", "ernie5.evaluate.config"): "one YAML configures both; schemas are torch-free",
}
PARALLEL_MAY_SEE = ("ernie5.model.interfaces", "ernie5.model.shard_plan", "ernie5.model.config")
PLAN_MAY_SEE = ("ernie5.config", "ernie5.errors", "ernie5.parallel.dims", "ernie5.model.shard_plan")


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def folder_of(module: str) -> str:
    return module.split(".")[1]


def below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def broken_rule(importer: str, imported: str) -> str | None:
    """The rule that an import breaks, or None."""
    here, there = folder_of(importer), folder_of(imported)
    if here == there or any(below(importer, a) and below(imported, b) for a, b in SIDEWAYS):
        return None
    for folder in (here, there):
        if folder not in FLOORS:
            return f"ernie5/{folder} has no floor; DESIGN section 2 lists them, tests/architecture/test_floors.py too"
    if here == "parallel" and there == "model" and not any(below(imported, name) for name in PARALLEL_MAY_SEE):
        return f"parallel sees only {', '.join(PARALLEL_MAY_SEE)}, not {imported}"
    if here == "plan" and not (imported.endswith(".config") or any(below(imported, name) for name in PLAN_MAY_SEE)):
        return f"plan sees configs and {', '.join(PLAN_MAY_SEE)}, not {imported}"
    if FLOORS[there] >= FLOORS[here]:
        return f"{here} (floor {FLOORS[here]}) may not import {imported} (floor {FLOORS[there]})"
    return None


def floor_complaints(source: object) -> list[str]:
    complaints = []
    for found in source.imports():
        modules = [f"ernie5.{name}" for name in found.names] if found.module == "ernie5" else [found.module]
        for module in modules:
            if module.startswith("ernie5."):
                rule = broken_rule(module_of(source.path), module)
                if rule:
                    complaints.append(source.at(found.line, rule))
    return complaints


def test_every_import_inside_ernie5_goes_to_a_lower_floor(package_sources: tuple) -> None:
    inside = [s for s in package_sources if s.path.startswith("ernie5/") and s.path != "ernie5/__init__.py"]
    complaints = [line for source in inside for line in floor_complaints(source)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_kernels_import_nothing_of_ernie5_but_its_errors(package_sources: tuple) -> None:
    complaints = [
        source.at(found.line, f"kernels may not import {found.module}")
        for source in package_sources
        if source.path.startswith("kernels/")
        for found in source.imports()
        if found.module.split(".")[0] == "ernie5" and found.module != "ernie5.errors"  # both stand on floor 0
    ]
    assert not complaints, "\n" + "\n".join(complaints)


def test_nobody_imports_tools_launch_or_tests(sources: tuple) -> None:
    complaints = [
        source.at(found.line, f"nothing may import {found.module}: it is never installed")
        for source in sources
        if not source.path.startswith("tools/")
        for found in source.imports()
        if found.module.split(".")[0] in ("tools", "launch", "tests", "configs")
    ]
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_rule_itself_catches_an_upward_a_relative_and_a_hidden_import(source_of: Callable) -> None:
    upward = source_of("ernie5/model/block.py", "def f():\n    from ernie5.engine.local import X\n")
    assert floor_complaints(upward)[0].startswith("ernie5/model/block.py:2: model (floor 3)")
    relative = source_of("ernie5/optim/adamw.py", "from ..train import loop\n")
    assert "optim (floor 3)" in floor_complaints(relative)[0]
    bare = source_of("ernie5/data/pack.py", "from ernie5 import model\n")
    assert "data (floor 3) may not import ernie5.model" in floor_complaints(bare)[0]
    unknown = source_of("ernie5/newcomer/x.py", "import ernie5.errors\n")
    assert "has no floor" in floor_complaints(unknown)[0]
    assert not floor_complaints(source_of("ernie5/data/pack.py", "import ernie5.tokenizers.vocab, ernie5.records\n"))
