"""The compiled model with Triton's kernels: outputs and gradients of the eager one, and text as one graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie5.data.document import Shapes
from ernie5.data.synthetic import TASKS, synthetic_batch
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.model.config import AudioModelConfig, ModelConfig, MoEConfig, MTPConfig, VisualModelConfig
from ernie5.records import Batch
from ernie5.tokenizers.vocab import Vocab
from ernie5_kernels.testing import assert_close, kernel_device

VOCAB = Vocab(text_size=260, audio_levels=2, audio_codes=8)
MODEL = ModelConfig(
    layers=3, width=16, query_heads=2, kv_heads=1, head_width=8, vocab_size=VOCAB.size_head, dense_width=16,
    expert_backend="triton", attention_backend="triton", moe=MoEConfig(num_experts=4, top_k=2, expert_width=8),
    visual=VisualModelConfig(
        bits=4, num_scales=4, patch_pixels=2, encoder_channels=4, vit_width=16, vit_layers=1, vit_heads=2
    ),
    audio=AudioModelConfig(levels=2, codes=8),
)
TEXT = dataclasses.replace(MODEL, modalities=("text",), layers=2, mtp=MTPConfig(depth=0))
SHAPES = Shapes(patch_pixels=2, feature_channels=4, bits=4, num_scales=4, audio_levels=2, audio_codes=8)


def run(model: UnifiedModel, *, forward: object, batch: Batch) -> list[torch.Tensor]:
    """Every floating output of the model, and every gradient of the sum of their sines."""
    found = forward(batch)
    fields = (getattr(found, field.name) for field in dataclasses.fields(found))
    outputs = [x for x in fields if isinstance(x, torch.Tensor) and x.is_floating_point() and x.requires_grad]
    loss = sum(x.sin().sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize(
    ("config", "tasks"), [(TEXT, ("text",)), pytest.param(MODEL, TASKS, marks=pytest.mark.slow)],
    ids=["text", "all modalities"],
)
def test_the_compiled_model_has_the_results_of_the_eager_one(config: ModelConfig, tasks: tuple[str, ...]) -> None:
    """Pictures break the graph: how many patches lie where is data."""
    batch = synthetic_batch(
        VOCAB, shapes=SHAPES, rows=2, sequence_tokens=48, seed=0, mtp_depth=config.mtp.depth, tasks=tasks
    ).to(kernel_device())
    model = build_model(config, seed=0).to(kernel_device())
    expected = run(model, forward=model, batch=batch)
    found = run(model, forward=torch.compile(model, fullgraph=config is TEXT, backend="aot_eager"), batch=batch)
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert_close(one, expected=other, tolerance=1e-5, reason="fp32, another order of sums")
