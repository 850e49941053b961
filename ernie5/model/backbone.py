"""The unified model: embeddings, layers, heads, and one forward pass from Batch to ModelOutput."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ernie5.model.block import DenseBlock, MoEBlock
from ernie5.model.config import ModelConfig
from ernie5.model.embedding import InputEmbedding
from ernie5.model.heads import AudioHead
from ernie5.model.interfaces import AttentionPlanner, KeyValueCache, LayerInputs
from ernie5.model.linear import Linear
from ernie5.model.moe.balance import LayerRouting, stack_routings
from ernie5.model.moe.layer import MoELayer
from ernie5.model.moe.router import Router, check_subnetwork
from ernie5.model.mtp import MTPModule
from ernie5.model.norm import RMSNorm
from ernie5.model.outline import OutlinedModel
from ernie5.model.rope import rotation
from ernie5.model.shard_plan import Section, whole_section
from ernie5.records import AudioFrames, Batch, ModelOutput, SubNetwork, TokenKind
from ernie5_kernels.attention import plan_attention
from ernie5_kernels.linear import linear


class UnifiedModel(OutlinedModel):
    """Text, image, video and audio, in and out, over one sparse decoder (SPEC sections 1 and 2).

    `plan_attention` is the seam beside each layer's AttentionOp. `forward` runs a section of the model where asked to;
    the parameters of other sections may then be absent (None), the buffers of all are there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.plan_attention: AttentionPlanner = plan_attention
        self.embedding = InputEmbedding(config)
        self.layers = nn.ModuleList(
            [(DenseBlock if i < config.dense_layers else MoEBlock)(config, layer=i) for i in range(config.layers)]
        )
        self.final_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.text_head = None if config.tie_embeddings else Linear(config.width, config.vocab_size)
        self.bit_head = Linear(config.width, config.visual.bits) if config.has_visual else None
        self.audio_head = AudioHead(config) if config.has_audio else None
        self.mtp = nn.ModuleList([MTPModule(config, depth=d) for d in range(config.mtp.depth)])

    @property
    def text_weight(self) -> torch.Tensor:
        """The text head [V, D], the text embedding where tied."""
        return self.embedding.text.weight if self.text_head is None else self.text_head.weight

    def moe_layers(self) -> tuple[MoELayer, ...]:
        """The mixture-of-experts layers, in order; index i is row i of RoutingStats.loads."""
        return tuple(layer.moe for layer in self.layers if isinstance(layer, MoEBlock))

    def routers(self) -> tuple[Router, ...]:
        """The routers, in the same order, for `update_balance`."""
        return tuple(layer.router for layer in self.moe_layers())

    def embed(self, batch: Batch) -> torch.Tensor:
        """Batch -> hidden states [B, T, D] before the first layer."""
        return self.embedding(batch)

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Output of the last layer [..., D] -> logits [..., V], at least fp32."""
        logits = linear(self.final_norm(hidden), weight=self.text_weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def bit_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Output of the last layer [..., D] -> logits of one bits [..., d], at least fp32."""
        logits = self.bit_head(self.final_norm(hidden))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def audio_logits_level(self, hidden: torch.Tensor, *, level: int) -> torch.Tensor:
        """Output of layer L-Q+level (0-based) [..., D] -> logits [..., C+1], at least fp32; class C is the end."""
        logits = self.audio_head.logits(hidden, level=level)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def audio_code_embedding(self, codes: torch.Tensor, *, level: int) -> torch.Tensor:
        """Codes [...] predicted at level 0 .. Q-2 -> [..., D], to be added after layer L-Q+level."""
        return self.audio_head.embed_target(codes, level=level)

    def layer_inputs(
        self,
        positions: torch.Tensor,
        *,
        intervals: torch.Tensor | None,
        kinds: torch.Tensor | None = None,
        subnetwork: SubNetwork | None = None,
        cache: KeyValueCache | None = None,
        first_layer: int = 0,
    ) -> LayerInputs:
        """What the layers share: positions [B, T, 3]; intervals [B, S, 4] over cached and new columns, None for all
        visible; kinds [B, T], None for tokens without padding.
        """
        config, (batch_rows, tokens) = self.config, positions.shape[:2]
        wide = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        cached = 0 if cache is None else cache.length(first_layer)
        plan = self.plan_attention(intervals, batch_rows=batch_rows, query_tokens=tokens, key_tokens=cached + tokens)
        active = None
        if subnetwork is not None:
            check_subnetwork(subnetwork, config=config.moe)
        if subnetwork is not None and subnetwork.experts is not None:
            active = torch.zeros(config.moe.num_experts, dtype=torch.bool)
            active[list(subnetwork.experts)] = True
            active = active.to(positions.device)
        return LayerInputs(
            rotation=rotation(positions.to(wide), head_width=config.head_width, base=config.rope_base),
            plan=plan,
            kinds=torch.full((batch_rows, tokens), int(TokenKind.TEXT), device=positions.device)
            if kinds is None
            else kinds,
            active_experts=active,
            top_k=(subnetwork.top_k if subnetwork is not None else None) or config.moe.top_k,
            cache=cache,
        )

    @torch.no_grad()
    def run_layers(
        self,
        hidden: torch.Tensor,
        *,
        positions: torch.Tensor,
        intervals: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        start_layer: int = 0,
        stop_layer: int | None = None,
        subnetwork: SubNetwork | None = None,
    ) -> torch.Tensor:
        """Run layers start_layer .. stop_layer-1 over new tokens, for generation.

        hidden [B, T, D]; positions [B, T, 3] fp32; intervals [B, S, 4] over the S cached and new columns, rows counted
        from the first cached token, or None where each new token sees every cached and every new one (a single token,
        or one visual block). Keys and values go into `cache`. Returns [B, T, D].
        """
        inputs = self.layer_inputs(
            positions, intervals=intervals, cache=cache, subnetwork=subnetwork, first_layer=start_layer
        )
        stop = self.config.layers if stop_layer is None else stop_layer
        for index in _chosen(subnetwork, total=self.config.layers):
            if start_layer <= index < stop:
                hidden = self.layers[index](hidden, inputs=inputs)[0]
        return hidden

    def forward(
        self,
        batch: Batch,
        *,
        subnetwork: SubNetwork | None = None,
        section: Section | None = None,
        hidden: torch.Tensor | None = None,
    ) -> ModelOutput:
        """One packed micro-batch -> hidden states and logits where targets are, and what the routers did.

        section: the part of the model to run, by default all; hidden [B, T, D]: what the section before gave.
        """
        section = section or whole_section(self.config.layers)
        chosen = _chosen(subnetwork, total=self.config.layers)
        layers = tuple(index for index in chosen if section.first <= index < section.stop)
        if section.has_embedding:
            hidden = self.embed(batch)
        inputs = self.layer_inputs(
            batch.positions, intervals=batch.intervals, kinds=batch.kinds, subnetwork=subnetwork
        )
        hidden, audio_logits, routings = self._layers(hidden, inputs=inputs, audio=batch.audio_targets, layers=layers)
        output = ModelOutput(
            hidden=hidden,
            text_hidden=None,
            text_weight=None,
            mtp_hidden=(),
            bit_logits=None,
            audio_logits=audio_logits,
            first_audio_level=0 if self.audio_head is None else max(0, section.first - self.audio_head.first_layer),
            routing=stack_routings(routings, config=self.config, chosen=chosen, like=hidden),
            touched=self._touch(batch, section=section, ran=layers),
        )
        return self._read_heads(output, batch=batch, inputs=inputs) if section.has_heads else output

    def _read_heads(self, output: ModelOutput, *, batch: Batch, inputs: LayerInputs) -> ModelOutput:
        """Add what the heads say about the output of the last layer."""
        hidden, flat = output.hidden, output.hidden.flatten(0, 1)
        mtp_hidden, state = [], hidden
        embeddings = self.embedding.text(batch.token_ids) if self.mtp else hidden
        for module, targets in zip(self.mtp, batch.mtp_targets, strict=True):
            state = module(state, embeddings=embeddings, inputs=inputs)
            mtp_hidden.append(self.final_norm(state.flatten(0, 1).index_select(0, targets.rows)))
        bits = flat.new_zeros(0, self.config.visual.bits)
        if self.bit_head is not None:
            bits = self.bit_head(self.final_norm(flat.index_select(0, batch.bit_targets.rows)))
        return dataclasses.replace(
            output,
            text_hidden=self.final_norm(flat.index_select(0, batch.text_targets.rows)),
            text_weight=self.text_weight,
            mtp_hidden=tuple(mtp_hidden),
            bit_logits=bits,
        )

    def _layers(
        self, hidden: torch.Tensor, *, inputs: LayerInputs, audio: AudioFrames, layers: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, LayerRouting]]:
        """Run the layers, reading audio levels off the top ones and adding the target codes already known there."""
        logits, routings = [], {}
        for index in layers:
            hidden, routing = self.layers[index](hidden, inputs=inputs)
            if routing is not None:
                routings[index] = routing
            level = None if self.audio_head is None else self.audio_head.level_after(index)
            if level is None:
                continue
            flat = hidden.flatten(0, 1)
            logits.append(self.audio_head.logits(flat.index_select(0, audio.rows), level=level))
            if level + 1 < self.audio_head.num_levels:  # without audio too: every rank then has the same graph
                known = self.audio_head.embed_target(audio.codes[:, level], level=level)
                hidden = flat.index_add(0, audio.rows, known).view_as(hidden)
        empty = hidden.new_zeros(audio.rows.numel(), 0, self.config.audio.codes + 1)
        return hidden, torch.stack(logits, dim=1) if logits else empty, routings

    def _touch(self, batch: Batch, *, section: Section, ran: tuple[int, ...]) -> torch.Tensor:
        """A zero with a gradient path to every parameter that this batch or sub-network left out of the graph."""
        idle: list[nn.Module] = [self.layers[i] for i in range(section.first, section.stop) if i not in ran]
        if section.has_embedding:
            idle += self.embedding.idle_modules(batch)
        if self.audio_head is not None and not batch.audio_targets.rows.numel():
            levels = {self.audio_head.level_after(index) for index in range(section.first, section.stop)}
            idle += [table for level, table in enumerate(self.audio_head.targets) if level in levels]
        total = torch.zeros((), device=batch.token_ids.device)
        for module in idle:
            for parameter in module.parameters():
                total = total + parameter.flatten()[:1].sum() * 0.0
        return total


def _chosen(subnetwork: SubNetwork | None, *, total: int) -> tuple[int, ...]:
    if subnetwork is None or subnetwork.layers is None:
        return tuple(range(total))
    return subnetwork.layers


def build_model(config: ModelConfig, *, seed: int) -> UnifiedModel:
    """The whole model in fp32 on the CPU, every parameter drawn from (seed, its name)."""
    return UnifiedModel.outline(config, seed=seed).draw()
