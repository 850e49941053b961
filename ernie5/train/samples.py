"""A small gallery every so many steps: what the run looks like from outside while it is under way."""

from __future__ import annotations

from pathlib import Path

from ernie5.checkpoint.names import step_name
from ernie5.data.config import DataConfig
from ernie5.engine.interface import Engine
from ernie5.errors import Ernie5Error
from ernie5.generate.gallery import GallerySize, write_samples
from ernie5.generate.interleave import Generation
from ernie5.observe.log import get_log
from ernie5.train.hook import Hook, StepContext

SIZE = GallerySize(pictures=2, clips=1, speeches=1, texts=2)


class SamplesHook(Hook):
    """Writes RUN_DIR/samples/step-N/ on rank 0; the engines put the model back into train mode at their next step."""

    def __init__(self, folder: Path, *, generation: Generation, data: DataConfig, every: int, engine: Engine) -> None:
        self._folder, self._generation, self._data = folder, generation, data
        self._every, self._engine = every, engine

    def after_step(self, context: StepContext) -> None:
        """Write samples on the steps of the rhythm; the other ranks only lend their part of the weights."""
        if not (self._every and context.step % self._every == 0):
            return
        with self._engine.whole_model():
            if self._engine.is_main:
                self._write(context)

    def _write(self, context: StepContext) -> None:
        self._generation.decoder.model.eval()
        folder = self._folder / step_name(context.step)
        try:
            write_samples(folder, generation=self._generation, data=self._data, step=context.step, size=SIZE)
        except Ernie5Error as error:  # a gallery is not worth the run
            get_log().warning("no samples of step %d: %s", context.step, error)
