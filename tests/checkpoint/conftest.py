"""Random models of the ERNIE 4.5 family in transformers, awkward in shape, and their logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.__main__ import main
from ernie5.engine.interface import BUFFER, MOMENT, PARAMETER, EngineState, StateSource
from ernie5.parallel.boxes import whole_box

SHAPES = {
    # heads times head width != hidden size, one key head, odd vocabulary, dense prefix of two
    "sparse": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6, "vocab_size": 331,
               "intermediate_size": 56, "num_hidden_layers": 4, "moe_num_experts": 7, "moe_k": 3,
               "moe_intermediate_size": 24, "moe_num_shared_experts": 2, "moe_layer_start_index": 2},
    # untied, no shared experts (the 300B's way), no dense layer, every expert chosen
    "untied": {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 97,
               "intermediate_size": 20, "num_hidden_layers": 2, "moe_num_experts": 3, "moe_k": 3,
               "moe_intermediate_size": 10, "moe_num_shared_experts": 0, "moe_layer_start_index": 0,
               "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
               "rms_norm_eps": 1e-3},
    # one sparse layer, reached through the interval, one expert per token
    "interval": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
                 "intermediate_size": 36, "num_hidden_layers": 3, "moe_num_experts": 5, "moe_k": 1,
                 "moe_intermediate_size": 14, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
                 "moe_layer_interval": 3},
    "dense": {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
              "vocab_size": 301, "intermediate_size": 44, "num_hidden_layers": 3},
    "dense_untied": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
                     "vocab_size": 256, "intermediate_size": 40, "num_hidden_layers": 2, "tie_word_embeddings": False},
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Builders: `build(shape)` a random transformers model; `logits(model, ids)`; `ids(model)` [2, 37] int64."""

    build: Callable[[str], torch.nn.Module]
    logits: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    ids: Callable[[torch.nn.Module], torch.Tensor]


@torch.no_grad()
def fill(model: torch.nn.Module, *, seed: int = 0) -> None:
    """Weights that matter: norms away from one, biases that change choices, logits of a few units."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * values)
        elif parameter.dim() == 1 or "correction_bias" in name:
            parameter.copy_(0.1 * values)
        else:
            parameter.copy_(values * parameter.shape[-1] ** -0.5)


def build(shape: str) -> torch.nn.Module:
    """A random transformers model in eval mode."""
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Ernie4_5Config, Ernie4_5ForCausalLM

    pair = (Ernie4_5Config, Ernie4_5ForCausalLM) if "dense" in shape else (Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM)
    model = pair[1](pair[0](max_position_embeddings=512, **SHAPES[shape])).eval()
    if "dense" not in shape:
        model.set_experts_implementation("eager")  # torch's grouped product wants rows of 16 bytes
    fill(model)
    return model


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] fp32 of a transformers model."""
    return model(ids).logits.float()


@pytest.fixture(scope="session")
def family() -> Family:
    """See Family."""
    return Family(
        build=build, logits=logits_of,
        ids=lambda model: torch.randint(0, model.config.get_text_config().vocab_size, (2, 37),
                                        generator=torch.Generator().manual_seed(5)),
    )


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `ernie5 ARGUMENTS` in this process; returns exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def convert(verb: Callable) -> Callable[..., str]:
    """Run a conversion that must succeed; returns what it printed."""

    def run(source: Path, target: Path, to: str, *options: str) -> str:
        code, out, err = verb("convert", source, target, "--to", to, *options)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def read_state() -> Callable[[StateSource], EngineState]:
    """`read_state(source)`: every tensor of a state, whole."""

    def read(source: StateSource) -> EngineState:
        state = EngineState({}, {}, {}, source.updates, source.magnitudes)
        for kind in (PARAMETER, BUFFER, MOMENT):
            for key, shape in source.shapes(kind).items():
                state.tensors(kind)[key] = torch.full(shape, torch.nan)
                source.read(key, box=whole_box(shape), into=state.tensors(kind)[key])
        return state

    return read
