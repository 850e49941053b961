"""transformers' mixture-of-experts models at a shape, with each implementation of the experts."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from shapes import HEAD_WIDTH, ROW_TOKENS, VOCABULARY, Shape

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
LARGEST_BYTES = 1 << 30
FAMILIES = {
    "Ernie4_5_Moe": "ernie4_5_moe",
    "Qwen3Moe": "qwen3_moe",
    "Mixtral": "mixtral",
}


def possible(shape: Shape, *, implementation: str, dtype: torch.dtype) -> bool:
    """batched_mm copies an expert's weights for every choice of every token; leave out what needs more than 1 GiB."""
    choices = shape.tokens * shape.top_k * dtype.itemsize
    return implementation != "batched_mm" or choices * 3 * shape.width * shape.expert_width < LARGEST_BYTES


def peer_config(family: str, *, shape: Shape, implementation: str) -> object:
    """The family's configuration of the shape."""
    folder = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    sizes = {
        "hidden_size": shape.width, "num_hidden_layers": shape.layers, "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": HEAD_WIDTH, "vocab_size": VOCABULARY,
        "max_position_embeddings": ROW_TOKENS, "tie_word_embeddings": True, "use_cache": False,
        "num_experts_per_tok": shape.top_k, "attn_implementation": "sdpa", "experts_implementation": implementation,
    }
    own = {
        "Ernie4_5_Moe": {"moe_num_experts": shape.experts, "moe_k": shape.top_k, "moe_num_shared_experts": 0,
                         "moe_intermediate_size": shape.expert_width, "moe_layer_start_index": 0,
                         "intermediate_size": shape.expert_width, "pad_token_id": 0},
        "Qwen3Moe": {"num_experts": shape.experts, "moe_intermediate_size": shape.expert_width,
                     "intermediate_size": shape.expert_width, "norm_topk_prob": True},
        "Mixtral": {"num_local_experts": shape.experts, "intermediate_size": shape.expert_width,
                    "sliding_window": None},
    }[family]
    return getattr(module, f"{family}Config")(**sizes, **own)


def build_peer_layer(family: str, *, shape: Shape, implementation: str, dtype: torch.dtype) -> torch.nn.Module:
    """The family's mixture-of-experts block with normal weights."""
    folder = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = peer_config(family, shape=shape, implementation=implementation)
    config._experts_implementation = implementation
    layer = getattr(module, f"{family}SparseMoeBlock")(config)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer.to(dtype)


def build_peer_model(family: str, *, shape: Shape, implementation: str, dtype: torch.dtype) -> torch.nn.Module:
    """The family's causal language model, freshly initialised, in training mode."""
    folder = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = peer_config(family, shape=shape, implementation=implementation)
    torch.manual_seed(0)
    return getattr(module, f"{family}ForCausalLM")(config).to(dtype).train()


def build_peer_step(
    family: str, *, shape: Shape, implementation: str, dtype: torch.dtype, ids: torch.Tensor
) -> Callable[[], float]:
    """One step on `ids` with torch's fused AdamW on parameters of `dtype`, without fp32 masters or clipping."""
    model = build_peer_model(family, shape=shape, implementation=implementation, dtype=dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
