"""Before any timing: with the peer's weights we give the peer's numbers, in fp32, forward and backward."""

from __future__ import annotations

import dataclasses
import sys

import torch
from ours import build_layer, layer_inputs, model_config, text_batch
from peers import build_peer_layer, build_peer_model
from shapes import ROW_TOKENS, VOCABULARY, Shape

from ernie5.engine.micro_step import MicroStep, global_counts
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.objectives.config import ObjectivesConfig

LAYER_TOLERANCE = 1e-5  # fp32, another order of sums
STEP_TOLERANCE = 5e-5  # the same, through a softmax over 1,024 keys: gradients of query and key differ by 8e-6
LEAST_GAP = 1e-4  # of two logits of order one, summed in fp32
NAMES = (
    ("embedding.text.weight", "model.embed_tokens.weight"),
    ("final_norm.weight", "model.norm.weight"),
    ("layers.0.attention_norm.weight", "model.layers.0.input_layernorm.weight"),
    ("layers.0.mlp_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ("layers.0.attention.query.weight", "model.layers.0.self_attn.q_proj.weight"),
    ("layers.0.attention.key.weight", "model.layers.0.self_attn.k_proj.weight"),
    ("layers.0.attention.value.weight", "model.layers.0.self_attn.v_proj.weight"),
    ("layers.0.attention.output.weight", "model.layers.0.self_attn.o_proj.weight"),
    ("layers.0.moe.router.weight", "model.layers.0.mlp.gate.weight"),
    ("layers.0.moe.experts.gate_up", "model.layers.0.mlp.experts.gate_up_proj"),
    ("layers.0.moe.experts.down", "model.layers.0.mlp.experts.down_proj"),
)


def gate_layer(shape: Shape) -> float:
    """Our layer gives the output and gradients of Ernie4_5_MoeSparseMoeBlock; raises SystemExit otherwise."""
    small = dataclasses.replace(shape, tokens=ROW_TOKENS)
    peer = build_peer_layer("Ernie4_5_Moe", shape=small, implementation="eager", dtype=torch.float32)
    ours = build_layer(small, dtype=torch.float32)
    with torch.no_grad():
        ours.router.weight.copy_(peer.gate.weight)
        ours.experts.gate_up.copy_(peer.experts.gate_up_proj)
        ours.experts.down.copy_(peer.experts.down_proj)
    x = _without_ties(torch.randn(ROW_TOKENS, shape.width), router=ours.router.weight, top_k=shape.top_k).unsqueeze(0)
    results = []
    for run in (peer, lambda h: ours(h, inputs=layer_inputs(small))[0]):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        out.square().mean().backward()
        results.append((out.detach(), leaf.grad))
    pairs = [*zip(*results, strict=True), (peer.experts.down_proj.grad, ours.experts.down.grad)]
    what = f"layer {shape.name} equals Ernie4_5_MoeSparseMoeBlock"
    return _judge(pairs, what=what, tolerance=LAYER_TOLERANCE)


def gate_step(shape: Shape) -> float:
    """One layer deep, our loss and every gradient are those of Ernie4_5_MoeForCausalLM; raises SystemExit otherwise."""
    small = dataclasses.replace(shape, layers=1, tokens=ROW_TOKENS)
    ids = torch.randint(0, VOCABULARY, (1, ROW_TOKENS), generator=torch.Generator().manual_seed(1))
    peer = build_peer_model("Ernie4_5_Moe", shape=small, implementation="eager", dtype=torch.float32)
    theirs = dict(peer.named_parameters())
    ours = build_model(model_config(small), seed=0)
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for own, other in NAMES:
            weights[own].copy_(theirs[other])
    expected = peer(input_ids=ids, labels=ids).loss
    expected.backward()
    loss = _loss(ours, ids=ids)
    loss.backward()
    pairs = [(expected.detach(), loss.detach()), *((theirs[b].grad, weights[a].grad) for a, b in NAMES)]
    what = f"loss and gradients at {shape.name}, one layer, equal Ernie4_5_MoeForCausalLM's"
    return _judge(pairs, what=what, tolerance=STEP_TOLERANCE)


def _loss(model: UnifiedModel, *, ids: torch.Tensor) -> torch.Tensor:
    step = MicroStep(model, config=ObjectivesConfig(rescale=False, mtp_weight=0.0))
    batch = text_batch(ids)
    counts = global_counts([batch], reduce=lambda values: values)
    return step(batch, counts, torch.ones(4, dtype=torch.float64))[0]


def _without_ties(x: torch.Tensor, *, router: torch.Tensor, top_k: int) -> torch.Tensor:
    """Tokens whose last choice is nearly the first one left out, 3e-7 apart in one drawing of 250, change experts with
    the order of a sum: the first clear token takes their place."""
    logits = (x.double() @ router.detach().double().t()).sort(dim=-1, descending=True).values
    clear = logits[:, top_k - 1] - logits[:, top_k] > LEAST_GAP
    return torch.where(clear[:, None], x, x[clear][0])


def _judge(pairs: list[tuple[torch.Tensor, torch.Tensor]], *, what: str, tolerance: float) -> float:
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    print(f"gate: {what} to {worst:.1e} of the largest value")
    if not worst < tolerance:
        sys.exit(f"the gate is {tolerance}: no timing of something wrong")
    return worst
