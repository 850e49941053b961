"""Optimizer steps of batches, the same whatever the number of ranks and workers.

`data.streams` logical streams each pack their own rows. A step takes rows / streams rows of every stream, ordered by
stream, where its number of rows follows from its own number alone; rank r of dp owns streams r * streams / dp onwards,
so the global batch of a step is a function of (seed, step) alone. Workers are threads that pack ahead, each for some of
the rank's streams: they change when a row is made, never what is in it.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading

from ernie5.data.collate import Layout, Row, collate_rows
from ernie5.data.config import DataConfig, RampStageConfig
from ernie5.data.examples import ExampleMaker
from ernie5.data.pack import PackState
from ernie5.data.shards import list_shards, open_corpus
from ernie5.data.stream import SampleSource, Stream
from ernie5.errors import ConfigError, DataError, LayoutError
from ernie5.records import Batch
from ernie5.tokenizers.bundle import TokenizerBundle

LOG = logging.getLogger(__name__)
WAKE_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Rows of one optimizer step: global_sequences over all ranks, micro_sequences per forward pass; MTP modules.

    ramp: the first steps, which have fewer rows over all ranks.
    """

    global_sequences: int
    micro_sequences: int
    mtp_depth: int = 1
    ramp: tuple[RampStageConfig, ...] = ()

    def rows(self, step: int) -> int:
        """Rows over all ranks of the step that follows `step` others."""
        for stage in self.ramp:
            if step < stage.steps:
                return stage.global_sequences
            step -= stage.steps
        return self.global_sequences


def build_loader(
    config: DataConfig,
    *,
    tokenizers: TokenizerBundle,
    shape: StepShape,
    seed: int,
    split: str = "train",
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Loader:
    """Open the shards and start at step 0.

    split: `train`, or `validation`, which is read without any random draw of training. Raises LayoutError for rows and
    streams that do not divide, DataError for shards that cannot be used.
    """
    check_streams(config, shape=shape, dp_size=dp_size)
    corpus = open_corpus(list_shards(config.shards), split=split)
    maker = ExampleMaker(config, tokenizers=tokenizers, seed=seed, training=split == "train")
    source = SampleSource(corpus, config=config, maker=maker, seed=seed, split=split)
    share = config.streams // dp_size
    streams = [
        Stream(number, source=source, config=config, seed=seed)
        for number in range(dp_rank * share, (dp_rank + 1) * share)
    ]
    layout = Layout(config.sequence_tokens, tokenizers.vocab.pad, shape.mtp_depth)
    return Loader(streams, source=source, config=config, shape=shape, layout=layout, seed=seed)


def check_streams(config: DataConfig, *, shape: StepShape, dp_size: int) -> None:
    """Raises LayoutError unless dp divides streams and streams divide the rows of a step; ConfigError likewise for
    micro-batches."""
    streams = config.streams
    if streams % dp_size:
        fitting = [degree for degree in range(1, streams + 1) if streams % degree == 0]
        raise LayoutError(
            f"data.streams = {streams} is not a multiple of dp = {dp_size}. Each rank owns whole streams, so that the "
            f"data do not depend on the number of ranks. Degrees that work: {', '.join(map(str, fitting))}."
        )
    sizes = [("batch.global_sequences", shape.global_sequences)]
    sizes += [(f"batch.ramp[{i}].global_sequences", stage.global_sequences) for i, stage in enumerate(shape.ramp)]
    for key, rows in sizes:
        if rows % streams:
            fitting = [count for count in range(1, rows + 1) if rows % count == 0]
            raise LayoutError(
                f"{key} = {rows} is not a multiple of data.streams = {streams}. Every step takes the same number of "
                f"rows from every stream. Stream counts that work: {', '.join(map(str, fitting))}."
            )
        if rows // dp_size % shape.micro_sequences:
            raise ConfigError(
                f"batch.micro_sequences = {shape.micro_sequences} does not divide the {rows // dp_size} rows of a rank "
                f"({key} = {rows}, dp = {dp_size}). Every micro-batch has the same number of rows."
            )


class Loader:
    """Batches of one rank, step by step. `next_step` never ends: epochs follow one another."""

    def __init__(
        self,
        streams: list[Stream],
        *,
        source: SampleSource,
        config: DataConfig,
        shape: StepShape,
        layout: Layout,
        seed: int,
    ) -> None:
        self._streams, self._source, self._config = streams, source, config
        self._shape, self._layout, self._seed = shape, layout, seed
        self._states = {stream.number: stream.state() for stream in streams}
        self._prefetch: _Prefetch | None = None
        self._ran_ahead = False
        self.step = 0

    @property
    def num_skipped(self) -> int:
        """Samples that this rank could not use, each counted once."""
        return self._source.num_skipped

    @property
    def maker(self) -> ExampleMaker:
        """The document builder, with its cache of features."""
        return self._source.maker

    def next_step(self) -> list[Batch]:
        """The micro-batches of this rank for the next optimizer step."""
        rows = self.next_rows()
        micro = self._shape.micro_sequences
        return [collate_rows(rows[start : start + micro], layout=self._layout) for start in range(0, len(rows), micro)]

    def next_rows(self) -> list[Row]:
        """The packed rows of this rank for the next step, in global order."""
        if self._ran_ahead:
            for stream in self._streams:
                stream.restore(self._states[stream.number])
            self._ran_ahead = False
        if self._config.workers and self._prefetch is None:
            self._prefetch = _Prefetch(
                self._streams,
                workers=self._config.workers,
                ahead=self._config.prefetch_steps * self._shape.global_sequences // self._config.streams,
            )
        rows: list[Row] = []
        rows_per_stream = self._shape.rows(self.step) // self._config.streams
        for stream in self._streams:
            for _ in range(rows_per_stream):
                if self._prefetch is None:
                    row, state = stream.next_row(), None
                else:
                    row, state = self._prefetch.take(stream.number)
                rows.append(row)
            self._states[stream.number] = state or stream.state()
        self.step += 1
        return rows

    def state_dict(self) -> dict:
        """The cursor behind the last step: small, JSON-able, of this rank's streams (`merge_states` joins ranks)."""
        return {
            "step": self.step,
            "seed": self._seed,
            "num_streams": self._config.streams,
            "contents": dict(sorted(self._source.contents.items())),
            "streams": {str(number): dataclasses.asdict(state) for number, state in sorted(self._states.items())},
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue behind the step of `state`, which must hold this rank's streams, from any number of ranks.

        Warns where the shards hold other samples than they did. Raises DataError when seed or stream count differ from
        those of the run, or a sample has gone.
        """
        self.close()
        if state["seed"] != self._seed or state["num_streams"] != self._config.streams:
            raise DataError(
                f"the stored data cursor belongs to train.seed = {state['seed']} and data.streams = "
                f"{state['num_streams']}, the config has {self._seed} and {self._config.streams}. Resume with the "
                "values of the run, or start --fresh."
            )
        self._compare_contents(state.get("contents", {}))
        for stream in self._streams:
            if str(stream.number) not in state["streams"]:
                raise DataError(
                    f"the stored data cursor lacks stream {stream.number}; it was not written by all ranks together."
                )
            stream.restore(_parse_state(state["streams"][str(stream.number)]))
            self._states[stream.number] = stream.state()
        self.step, self._ran_ahead = state["step"], False

    def _compare_contents(self, stored: dict[str, list[int]]) -> None:
        """Warn of pools whose samples changed; cursors of before this was stored name none."""
        now = self._source.contents
        changed = [f"{pool} {stored[pool][0]}, now {now[pool][0]}" for pool in sorted(stored.keys() & now.keys())
                   if list(now[pool]) != list(stored[pool])]
        if changed:
            LOG.warning(
                "the shards hold other samples than when the checkpoint was written (%s): the run goes on in the order "
                "of the new ones, so that some come again early and some late", "; ".join(changed)
            )

    def close(self) -> None:
        """Stop the workers. The loader can be used on: the next step first makes again what was made ahead, so that
        closing for good reads nothing and cannot fail."""
        if self._prefetch is None:
            return
        self._prefetch.stop()
        self._prefetch, self._ran_ahead = None, True


def merge_states(states: list[dict]) -> dict:
    """Join the cursors of all ranks into one that any number of ranks can load. Raises DataError if steps differ."""
    steps = sorted({state["step"] for state in states})
    if len(steps) != 1:
        raise DataError(f"the data cursors of the ranks stand at different steps: {', '.join(map(str, steps))}.")
    streams = {number: cursor for state in states for number, cursor in state["streams"].items()}
    return states[0] | {"streams": dict(sorted(streams.items(), key=lambda item: int(item[0])))}


def _parse_state(values: dict) -> PackState:
    return PackState(
        tokens=tuple((task, tokens) for task, tokens in values["tokens"]),
        drawn=tuple((task, count) for task, count in values["drawn"]),
        # Cursors of before pages could take several rows name no part: there was one.
        waiting=tuple((task, index, *(part or [0])) for task, index, *part in values["waiting"]),
        text=values["text"],
        text_start=values["text_start"],
    )


class _Prefetch:
    """Threads that pack rows ahead; each owns some streams and keeps a bounded queue per stream."""

    def __init__(self, streams: list[Stream], *, workers: int, ahead: int) -> None:
        self._stop = threading.Event()
        self._queues: dict[int, queue.Queue] = {stream.number: queue.Queue(maxsize=ahead) for stream in streams}
        self._threads = [
            threading.Thread(target=self._work, args=(streams[worker::workers],), daemon=True)
            for worker in range(min(workers, len(streams)))
        ]
        for thread in self._threads:
            thread.start()

    def take(self, number: int) -> tuple[Row, PackState]:
        """The next row of stream `number` and the cursor behind it; raises what its worker raised."""
        item = self._queues[number].get()
        if isinstance(item, BaseException):
            self._queues[number].put(item)
            raise item
        return item

    def stop(self) -> None:
        """End the threads and wait for them."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, streams: list[Stream]) -> None:
        try:
            while not self._stop.is_set():
                # The emptiest queue first: the step waits for the stream that lags.
                stream = min(streams, key=lambda owned: self._queues[owned.number].qsize())
                if self._queues[stream.number].full():
                    self._stop.wait(WAKE_SECONDS / 10)
                    continue
                self._queues[stream.number].put((stream.next_row(), stream.state()))
        except BaseException as error:  # handed to the consumer, which raises it in its own thread
            for stream in streams:
                self._hand_over(stream.number, error)

    def _hand_over(self, number: int, error: BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queues[number].put(error, timeout=WAKE_SECONDS)
                return
            except queue.Full:
                continue
