"""Expert layers of other packages at a shape: for their time alone, each installed by whoever races it.

DeepSpeed MoE and Tutel drop what passes a capacity of 1.0 and pad what stays below it, so they do no more work than is
asked; torchtitan multiplies in bf16 whatever it is given. Megatron-Core asks CUDA for a device and names a function of
Transformer Engine that it may not have; both are answered here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
from peers import build_peer_model, peer_config
from shapes import Shape
from torch import distributed, nn


def build_package_layer(package: str, *, shape: Shape, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The package's layer with normal weights in one process: x [B, T, D] -> [B, T, D]."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    layer = PACKAGES[package].build(shape)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return _FirstOutput(layer.to(dtype))


class _FirstOutput(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def _litgpt(shape: Shape) -> nn.Module:
    from litgpt.config import Config
    from litgpt.model import LLaMAMoE

    return LLaMAMoE(Config(
        n_embd=shape.width, n_expert=shape.experts, n_expert_per_token=shape.top_k, n_layer=1, bias=False,
        n_head=shape.query_heads, moe_intermediate_size=shape.expert_width, intermediate_size=shape.expert_width,
        mlp_class_name="LLaMAMoE",
    ))


def _torchtitan(shape: Shape) -> nn.Module:
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    experts = GroupedExperts.Config(dim=shape.width, hidden_dim=shape.expert_width, num_experts=shape.experts)
    dispatcher = LocalTokenDispatcher.Config(num_experts=shape.experts, top_k=shape.top_k)
    router = TokenChoiceTopKRouter.Config(
        num_experts=shape.experts, top_k=shape.top_k, route_norm=True, score_func="softmax",
        gate=Linear.Config(in_features=shape.width, out_features=shape.experts, bias=False),
    )
    routed = RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher)
    return MoE.Config(num_experts=shape.experts, routed_experts=routed, router=router).build()


def _megatron(shape: Shape) -> nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.cuda.current_device = lambda: "cpu"
    moe_utils.te_general_gemm = None
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1, hidden_size=shape.width, num_attention_heads=shape.query_heads, num_moe_experts=shape.experts,
        moe_router_topk=shape.top_k, moe_ffn_hidden_size=shape.expert_width, ffn_hidden_size=shape.expert_width,
        gated_linear_unit=True, activation_func=nn.functional.silu, add_bias_linear=False, params_dtype=torch.float32,
        use_cpu_initialization=True, perform_initialization=False, moe_token_dispatcher_type="allgather",
        moe_router_load_balancing_type="none", bias_activation_fusion=False,
    )
    return MoELayer(config, get_moe_module_spec(use_te=False, num_experts=shape.experts).submodules)


def _tutel(shape: Shape) -> nn.Module:
    from tutel import moe

    return moe.moe_layer(
        gate_type={"type": "top", "k": shape.top_k, "capacity_factor": 1.0, "fp32_gate": True},
        experts={
            "type": "llama_ffn", "num_experts_per_device": shape.experts, "hidden_size_per_expert": shape.expert_width,
        },
        model_dim=shape.width, seeds=(1, 1, 1),
    )


def _deepspeed(shape: Shape) -> nn.Module:
    import deepspeed
    from deepspeed.moe.layer import MoE
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

    deepspeed.init_distributed("gloo", dist_init_required=False)
    expert = Qwen3MoeMLP(peer_config("Qwen3Moe", shape=shape, implementation="eager"), shape.expert_width)
    layer = MoE(
        shape.width, expert, num_experts=shape.experts, k=shape.top_k, capacity_factor=1.0, min_capacity=1,
        use_rts=False,
    )
    layer.set_deepspeed_parallelism()
    return layer


def _auto_ep(shape: Shape) -> nn.Module:
    import deepspeed
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig

    deepspeed.init_distributed("gloo", dist_init_required=False)
    small = dataclasses.replace(shape, layers=1)
    model = build_peer_model("Qwen3Moe", shape=small, implementation="grouped_mm", dtype=torch.float32)
    config = AutoEPConfig(enabled=True, autoep_size=1, preset_model="qwen3_moe", load_balance_coeff=None)
    converter = AutoEP(model, config)
    (spec,) = converter.ep_parser()
    converter._replace_moe_layer_without_retarget(spec, 1, 0, False)  # what follows there trips over transformers 5.23
    layer = model.model.layers[0].mlp
    layer.set_deepspeed_parallelism()
    return layer


@dataclasses.dataclass(frozen=True)
class Package:
    """Its module, how to get it, its layer."""

    module: str
    install: str
    build: Callable[[Shape], nn.Module]

    @property
    def is_here(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None


PACKAGES = {
    "litgpt": Package("litgpt", "pip install --no-deps litgpt lightning lightning-utilities jsonargparse", _litgpt),
    "torchtitan": Package("torchtitan", "pip install --no-deps torchtitan spmd_types", _torchtitan),
    "megatron": Package("megatron", "pip install --no-deps megatron-core", _megatron),
    "tutel": Package("tutel", "NO_CUDA=1 pip install --no-deps --no-build-isolation PATH_OF_ITS_SOURCE", _tutel),
    "deepspeed": Package("deepspeed", "pip install deepspeed", _deepspeed),
    "autoep": Package("deepspeed", "pip install deepspeed", _auto_ep),
}
