"""What the golden files hold, and the command that writes them again after a change that was meant:

    OMP_NUM_THREADS=1 .venv/bin/python tests/golden/debug_run.py

Read the difference (`git diff tests/golden`) before committing it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ernie5.config.load import config_to_yaml, load_config
from ernie5.data.document import Shapes
from ernie5.data.synthetic import TASKS, synthetic_batch
from ernie5.model.backbone import build_model
from ernie5.optim.schedule import learning_rate
from ernie5.records import Batch
from ernie5.tokenizers.vocab import Vocab
from ernie5.train.build import build_engine
from ernie5.train.config import RootConfig

FOLDER = Path(__file__).resolve().parent
PRETRAIN = FOLDER.parents[1] / "configs" / "pretrain"
STEPS = 20
ROWS = 2
TOKENS = 128
TEXT_TOKENS = 4096


def resolved_config() -> str:
    """The resolved debug configuration, with every default, as a run writes it beside its metrics."""
    return config_to_yaml(load_config(PRETRAIN / "debug.yaml", schema=RootConfig))


def parameter_table() -> str:
    """Name and shape of every parameter and persistent buffer of the debug model, as a checkpoint names them."""
    model = build_model(debug_config().model, seed=0)
    return "".join(f"{name} {list(value.shape)}\n" for name, value in model.state_dict().items())


def loss_curve(steps: int = STEPS) -> str:
    """The first of 20 fp32 steps of the debug model on synthetic rows of every task: objective, gradient norm.

    Synthetic, so that no encoder's rounding decides which tokens there are. The rows of four steps repeat: it learns.
    """
    config = debug_config()
    model = build_model(config.model, seed=config.train.seed)
    engine = build_engine(config, model=model, device=torch.device("cpu"), dp=1, run_dir=FOLDER)
    lines = []
    for step in range(steps):
        rate = learning_rate(step, config=config.optim, total_steps=STEPS)
        rows = [synthetic_rows(config, number=2 * (step % 4) + i) for i in range(2)]
        report = engine.train_step(rows, learning_rate=rate)
        lines.append(f"{float(report.sums.objective):.7g} {float(report.grad_norm):.7g}\n")
    return "".join(lines)


def debug_config(overrides: tuple[str, ...] = ()) -> RootConfig:
    """The debug configuration for 20 steps."""
    return load_config(PRETRAIN / "debug.yaml", schema=RootConfig, overrides=[f"train.steps={STEPS}", *overrides])


def synthetic_rows(config: RootConfig, *, number: int) -> Batch:
    """A micro-batch of every task, drawn by `number`."""
    visual, audio = config.model.visual, config.model.audio
    vocab = Vocab(text_size=TEXT_TOKENS, audio_levels=audio.levels, audio_codes=audio.codes)
    shapes = Shapes(
        patch_pixels=visual.patch_pixels, feature_channels=visual.encoder_channels, bits=visual.bits,
        num_scales=visual.num_scales, audio_levels=audio.levels, audio_codes=audio.codes,
    )
    tasks = TASKS[number % len(TASKS) :] + TASKS[: number % len(TASKS)]
    return synthetic_batch(vocab, shapes=shapes, rows=ROWS, sequence_tokens=TOKENS, seed=number, tasks=tasks)


def main() -> None:
    """Write every golden file."""
    torch.set_num_threads(1)
    (FOLDER / "debug.config.yaml").write_text(resolved_config(), encoding="utf-8")
    (FOLDER / "debug.parameters.txt").write_text(parameter_table(), encoding="utf-8")
    (FOLDER / "debug.losses.txt").write_text(loss_curve(), encoding="utf-8")


if __name__ == "__main__":
    main()
