"""The model's expert layer on Triton by the configuration's word, against the same layer on PyTorch: every gradient."""

from __future__ import annotations

import pytest
import torch

from ernie5.model.config import BalanceConfig, ModelConfig, MoEConfig
from ernie5.model.interfaces import LayerInputs
from ernie5.model.moe.layer import MoELayer
from ernie5_kernels.attention import plan_attention
from ernie5_kernels.testing import assert_close, kernel_device, random_tensor

WIDTH, EXPERTS, TOP_K, INNER = 24, 5, 2, 12
BALANCE = BalanceConfig(switch_loss=True, z_loss=True)


def build(backend: str, *, score: str) -> MoELayer:
    moe = MoEConfig(
        num_experts=EXPERTS, top_k=TOP_K, expert_width=INNER, shared_experts=0, score=score, balance=BALANCE
    )
    config = ModelConfig(layers=1, modalities=("text",), width=WIDTH, expert_backend=backend, moe=moe)
    layer = MoELayer(config).to(kernel_device())
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random_tensor(*parameter.shape, seed=seed))
    layer.router.balance_bias.copy_(torch.linspace(-0.1, 0.1, EXPERTS))
    return layer


def run(layer: MoELayer, *, active: torch.Tensor | None) -> list[torch.Tensor]:
    hidden = random_tensor(2, 9, WIDTH, seed=11).requires_grad_()
    inputs = LayerInputs(
        rotation=torch.zeros(0), plan=plan_attention(None, batch_rows=1, query_tokens=1, key_tokens=1),
        kinds=torch.ones(2, 9, dtype=torch.int64, device=hidden.device), active_experts=active, top_k=TOP_K, cache=None,
    )
    out, routing = layer(hidden, inputs=inputs)
    loss = (out * random_tensor(2, 9, WIDTH, seed=12)).sum() + routing.switch_loss + 0.1 * routing.z_loss
    gradients = torch.autograd.grad(loss, [hidden, *layer.parameters()])
    return [out.detach(), routing.group_loads, routing.switch_loss.detach(), *gradients]


@pytest.mark.parametrize(("score", "restricted"), [("sigmoid", False), ("softmax", True)])
def test_the_layer_on_triton_is_the_layer_on_pytorch(score: str, restricted: bool) -> None:
    active = torch.tensor([True, True, False, True, True], device=kernel_device()) if restricted else None
    found, expected = (run(build(name, score=score), active=active) for name in ("triton", "reference"))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, expected=other, tolerance=2e-5, reason="fp32, another order of sums")


def test_the_layer_multiplies_in_fp8_when_told_by_name() -> None:
    found, expected = (run(build(name, score="sigmoid"), active=None) for name in ("triton_fp8", "reference"))
    assert not torch.equal(found[0], expected[0])
    for one, other in zip(found, expected, strict=True):
        error = (one - other).norm() / other.norm().clamp_min(1e-6)
        assert error < 0.2, "e4m3 has 3 bits of mantissa: up to 6 % per factor"
