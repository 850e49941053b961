"""What must work in milliseconds and without torch, and what must work from any directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "numpy", "deepspeed", "transformers", "tokenizers", "webdataset", "matplotlib")


def heavy_after(code: str, *, cwd: Path) -> str:
    """Heavy libraries that are loaded in a fresh interpreter after `code`; fails when the code fails."""
    code += f"\nimport sys\nprint('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.rsplit("HEAVY ", 1)[1].strip()


def test_importing_ernie5_and_asking_for_help_loads_nothing_heavy(tmp_path: Path) -> None:
    assert heavy_after("import ernie5, ernie5.__main__ as m; assert m.main(['--help']) == 0", cwd=tmp_path) == "[]"


def test_every_config_schema_loads_nothing_heavy(repository: Path, tmp_path: Path) -> None:
    files = sorted((repository / "ernie5").glob("*/config.py"))
    modules = [f"ernie5.{path.parent.name}.config" for path in files]
    assert len(modules) >= 10
    assert heavy_after("import " + ", ".join(modules), cwd=tmp_path) == "[]"


def test_validating_a_training_config_loads_nothing_heavy(repository: Path, tmp_path: Path) -> None:
    config = repository / "configs" / "pretrain" / "ernie5_2t4.yaml"
    code = f"from ernie5.__main__ import main; assert main(['train', {str(config)!r}, '--validate']) == 0"
    assert heavy_after(code, cwd=tmp_path) == "[]"


def test_a_layout_that_the_processes_do_not_make_up_is_refused_without_anything_heavy(
    repository: Path, tmp_path: Path
) -> None:
    """The launcher has told their number already; without one there is one process."""
    config = str(repository / "configs" / "pretrain" / "debug.yaml")
    code = (
        "import os\nfrom ernie5.__main__ import main\n"
        f"changes = [{config!r}, 'engine.kind=grid', 'parallel.tp=2']\n"
        "assert main(['train', *changes]) == 2\n"
        "os.environ.update(WORLD_SIZE='3')\n"
        "assert main(['train', *changes]) == 2 and main(['train', *changes, '--validate']) == 2\n"
        f"assert main(['train', {config!r}, 'engine.kind=local']) == 2\n"
        "os.environ.pop('WORLD_SIZE')\n"
        "assert main(['train', *changes, '--validate']) == 0"
    )
    assert heavy_after(code, cwd=tmp_path) == "[]"
    assert not list(tmp_path.iterdir()), "a start that is refused leaves nothing"


def test_both_packages_import_from_another_directory_under_their_installed_names(tmp_path: Path) -> None:
    code = "import ernie5, ernie5_kernels; print(ernie5_kernels.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.0.0"
