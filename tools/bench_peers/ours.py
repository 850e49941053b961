"""This project's layer and step at a shape."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from shapes import HEAD_WIDTH, ROW_TOKENS, VOCABULARY, Shape

from ernie5.engine.interface import StepSettings
from ernie5.engine.local import LocalEngine
from ernie5.model.backbone import build_model
from ernie5.model.config import BalanceConfig, ModelConfig, MoEConfig, MTPConfig
from ernie5.model.interfaces import LayerInputs
from ernie5.model.moe.layer import MoELayer
from ernie5.objectives.config import ObjectivesConfig
from ernie5.optim.config import OptimConfig
from ernie5.records import AudioFrames, Batch, BitTargets, SpeakerCells, TextTargets, VisualCells, VisualPatches
from ernie5_kernels.attention import plan_attention


def model_config(shape: Shape) -> ModelConfig:
    """The shape as a text-only model, softmax scores as the peers."""
    return ModelConfig(
        layers=shape.layers, width=shape.width, query_heads=shape.query_heads, kv_heads=shape.kv_heads,
        head_width=HEAD_WIDTH, vocab_size=VOCABULARY, modalities=("text",), qk_norm=False, rope_base=5e5,
        mtp=MTPConfig(depth=0),
        moe=MoEConfig(num_experts=shape.experts, top_k=shape.top_k, expert_width=shape.expert_width, score="softmax",
                      balance=BalanceConfig(speed=0.0)),
    )


def build_layer(shape: Shape, *, dtype: torch.dtype) -> MoELayer:
    """The mixture-of-experts layer with normal weights."""
    layer = MoELayer(model_config(shape))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer.to(dtype)


def layer_inputs(shape: Shape) -> LayerInputs:
    """What the layer wants beside the hidden states."""
    rows = shape.tokens // ROW_TOKENS
    return LayerInputs(
        rotation=torch.zeros(0), plan=plan_attention(None, batch_rows=1, query_tokens=1, key_tokens=1),
        kinds=torch.ones(rows, ROW_TOKENS, dtype=torch.int64), active_experts=None, top_k=shape.top_k, cache=None,
    )


def build_step(shape: Shape, *, precision: str, ids: torch.Tensor) -> Callable[[], float]:
    """One optimizer step on `ids` [B, T], fp32 masters and clipping included; returns the loss."""
    settings = StepSettings(
        objectives=ObjectivesConfig(rescale=False, mtp_weight=0.0), clip_norm=1.0, balance_speed=0.0,
        magnitudes=torch.full((4,), math.log(VOCABULARY), dtype=torch.float64),
    )
    engine = LocalEngine(
        build_model(model_config(shape), seed=0), optim=OptimConfig(), settings=settings, precision=precision,
        device=torch.device("cpu"),
    )
    batch = text_batch(ids)
    return lambda: float(engine.train_step([batch], learning_rate=1e-4).sums.objective)


def text_batch(ids: torch.Tensor) -> Batch:
    """Rows of one document each, every token but the last of a row a target."""
    rows, tokens = ids.shape
    places = torch.arange(rows * tokens).view(rows, tokens)
    intervals = torch.zeros(rows, tokens, 4, dtype=torch.int32)
    intervals[..., 0], intervals[..., 3] = torch.arange(tokens), tokens
    none, nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 16)
    patches = VisualPatches(none, torch.zeros(0, 4, 192), torch.zeros(0, 4, 64), none.view(0, 1), none.view(0, 1, 1))
    return Batch(
        token_ids=ids, kinds=torch.ones_like(ids), document_ids=torch.zeros(rows, tokens, dtype=torch.int32),
        positions=torch.arange(tokens, dtype=torch.float32).view(1, -1, 1).expand(rows, tokens, 3).contiguous(),
        intervals=intervals, text_targets=TextTargets(places[:, :-1].flatten(), ids[:, 1:].flatten()), mtp_targets=(),
        image_patches=patches, video_patches=patches, visual_cells=VisualCells(none, nothing, none),
        bit_targets=BitTargets(none, nothing, torch.zeros(0), none, none.bool()),
        audio_frames=AudioFrames(none, none.view(0, 1)), audio_targets=AudioFrames(none, none.view(0, 1)),
        speakers=SpeakerCells(none, torch.zeros(0, 160)), sample_keys=tuple(() for _ in range(rows)),
    )
