"""Generation through a cache equals the full forward pass, token by token, block by block and level by level."""

from __future__ import annotations

import dataclasses

import torch

from ernie5.model.backbone import UnifiedModel
from ernie5.records import Batch


@dataclasses.dataclass
class ListCache:
    """The plainest KeyValueCache."""

    keys: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    values: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def length(self, layer: int) -> int:
        return self.keys[layer].shape[1] if layer in self.keys else 0

    def extend(self, layer: int, *, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer in self.keys:
            key, value = torch.cat((self.keys[layer], key), 1), torch.cat((self.values[layer], value), 1)
        self.keys[layer], self.values[layer] = key, value
        return key, value


def full_hidden(model: UnifiedModel, batch: Batch) -> torch.Tensor:
    embedded = model.embed(batch)
    return model.run_layers(embedded, positions=batch.positions, intervals=batch.intervals)


def test_a_prompt_then_single_tokens_equal_the_full_forward_pass(model, batches) -> None:
    batch = batches(("text",), tokens=10)
    expected, embedded, cache = full_hidden(model, batch), model.embed(batch), ListCache()
    pieces = [model.run_layers(
        embedded[:, :4], positions=batch.positions[:, :4], intervals=batch.intervals[:, :4], cache=cache
    )]
    for t in range(4, 10):
        span = slice(t, t + 1)
        pieces.append(model.run_layers(embedded[:, span], positions=batch.positions[:, span], cache=cache))
    assert torch.allclose(torch.cat(pieces, 1), expected, atol=1e-12)


def test_whole_visual_blocks_without_intervals_equal_the_full_forward_pass(model, batches) -> None:
    batch = batches(("image_generation",), tokens=34)
    expected, embedded, cache = full_hidden(model, batch), model.embed(batch), ListCache()
    starts = sorted(set(batch.intervals[0, :, 0].tolist())) + [34]
    pieces = [
        model.run_layers(embedded[:, a:b], positions=batch.positions[:, a:b], cache=cache)
        for a, b in zip(starts, starts[1:], strict=False)
    ]
    assert torch.allclose(torch.cat(pieces, 1), expected, atol=1e-12)


def test_audio_levels_read_between_the_top_layers_equal_the_training_logits(model, batches) -> None:
    batch = batches(("speech",), tokens=20)
    expected, embedded, cache = model(batch).audio_logits, model.embed(batch), ListCache()
    rows, levels, layers = batch.audio_targets.rows.tolist(), model.config.audio.levels, model.config.layers
    found = []
    for t in range(20):
        span, stop = slice(t, t + 1), layers - levels + 1
        hidden = model.run_layers(embedded[:, span], positions=batch.positions[:, span], cache=cache, stop_layer=stop)
        for level in range(levels):
            if t in rows:
                found.append(model.audio_logits_level(hidden, level=level)[0, 0])
            if level + 1 == levels:
                break
            if t in rows:
                codes = batch.audio_targets.codes[rows.index(t), level]
                hidden = hidden + model.audio_code_embedding(codes, level=level)
            hidden = model.run_layers(
                hidden, positions=batch.positions[:, span], cache=cache, start_layer=stop + level,
                stop_layer=stop + level + 1,
            )
    assert torch.allclose(torch.stack(found).view_as(expected), expected, atol=1e-12)


def test_text_and_bit_logits_equal_the_heads_of_the_forward_pass(model, batch) -> None:
    output, hidden = model(batch), None
    inputs = model.layer_inputs(batch.positions, intervals=batch.intervals, kinds=batch.kinds)
    hidden = model._layers(model.embed(batch), inputs=inputs, audio=batch.audio_targets, layers=tuple(range(5)))[0]
    flat = hidden.flatten(0, 1)
    text = model.text_logits(flat[batch.text_targets.rows])
    assert torch.allclose(text, output.text_hidden @ output.text_weight.T, atol=1e-12)
    assert torch.allclose(model.bit_logits(flat[batch.bit_targets.rows]), output.bit_logits, atol=1e-12)
