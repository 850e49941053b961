"""Illegal layouts are LayoutErrors that name rule and way out, before any process group exists."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from ernie5.errors import LayoutError
from ernie5.model.config import AudioModelConfig, ModelConfig, MoEConfig, VisualModelConfig
from ernie5.parallel.config import ParallelConfig
from ernie5.parallel.deepep import require_deepep
from ernie5.parallel.token_split import Splitter

MODEL = ModelConfig(moe=MoEConfig(num_experts=64, top_k=4, expert_width=96))


@pytest.mark.parametrize(
    "degrees,world,message",
    [
        ({"ep": 3}, 4, r"ep = 3: ep x etp = 3 x 1 does not divide dp x cp x tp = 4.*work: 2, 4"),
        ({"etp": 4, "ep": 2}, 4, r"etp = 4: .*does not divide"),
        ({"etp": 2, "ep": 3}, 3, r"etp = 2: ep x etp = 3 x 2 does not divide .* = 3,.*work: 1, or change"),
        ({"dp": 3}, 4, r"dp = 3: 4 processes were started.*Start 3 processes"),
        ({"ep": 8}, 4, r"ep = 8: .*Nearest degrees that work: 4, or change the number of processes"),
    ],
)
def test_degrees_that_do_not_factor_the_processes(degrees: dict, world: int, message: str) -> None:
    groups = dist.is_initialized()
    with pytest.raises(LayoutError, match=message):
        ParallelConfig(**degrees).derive_dims(world, kv_heads=2)
    assert dist.is_initialized() == groups


@pytest.mark.parametrize(
    "degrees,message",
    [
        ({"ep": 48}, r"ep = 48: does not divide model.moe.num_experts = 64.*work: 32, 64"),
        ({"etp": 7}, r"etp = 7: does not divide model.moe.expert_width = 96.*work: 6, 8"),
    ],
)
def test_degrees_that_do_not_cut_the_experts(degrees: dict, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ParallelConfig(**degrees).check_model(MODEL)


@pytest.mark.parametrize(
    "degrees,message",
    [
        ({"vpp": 2}, r"vpp = 2: virtual stages.*pp = 1.*Set parallel.vpp: 1 or parallel.pp: 2"),
        ({"pp": 2, "stage_layers": (1, 2, 3)}, r"stage_layers = .*2 sections of at least one layer. List 2 numbers"),
        ({"pp": 2, "stage_layers": (6, 0)}, r"stage_layers = .*at least one layer"),
    ],
)
def test_degrees_that_make_no_pipeline(degrees: dict, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ParallelConfig(**degrees)


def test_ways_of_splitting_that_nothing_would_follow() -> None:
    with pytest.raises(LayoutError, match=r"sequence = true: .*parallel.tp = 1 has one. Set parallel.sequence: false"):
        ParallelConfig(sequence=True)
    with pytest.raises(LayoutError, match=r"context = 'ulysses': .*parallel.cp = 1 has one. Leave parallel.context"):
        ParallelConfig(context="ulysses", tp=2)
    for dispatcher in ("hierarchical", "allgather"):
        with pytest.raises(LayoutError, match=rf"dispatcher = '{dispatcher}': .*parallel.ep = 1 .*set parallel.ep: 2"):
            ParallelConfig(dispatcher=dispatcher, etp=2)
        ParallelConfig(dispatcher=dispatcher, ep=2, node_size=2)
    with pytest.raises(LayoutError, match=r"node_size = 8: .*parallel.ep = 1 sends none. Leave parallel.node_size out"):
        ParallelConfig(node_size=8, tp=2, etp=2)


@pytest.mark.parametrize(
    "degrees,message",
    [
        ({"pp": 7}, r"pp = 7: .*7 sections.*model.layers = 6.*Nearest degrees that work: pp 6 with vpp 1"),
        ({"pp": 4, "vpp": 2}, r"pp = 4: .*8 sections.*work: pp 3 with vpp 2"),
        ({"pp": 2, "vpp": 4}, r"vpp = 4: .*8 sections.*work: vpp 3 with pp 2"),
        ({"pp": 4, "vpp": 4}, r"pp = 4: .*16 sections.*work: pp 4 with vpp 1"),
        ({"pp": 8, "vpp": 8}, r"pp = 8: .*64 sections.*work: pp 6 with vpp 1"),
        ({"pp": 2, "stage_layers": (3, 4)}, r"stage_layers = .*7 layers, and model.layers = 6"),
    ],
)
def test_more_sections_than_layers(degrees: dict, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ParallelConfig(**degrees).check_model(MODEL)
    assert MODEL.layers == 6


@pytest.mark.parametrize(
    "model,message",
    [
        (ModelConfig(visual=VisualModelConfig(bits=3)), r"tp = 4: is more than model.visual.bits = 3, .*at most 3"),
        (ModelConfig(audio=AudioModelConfig(codes=2)), r"tp = 4: is more than model.audio.codes \+ 1 = 3, "),
        (ModelConfig(dense_width=2), r"tp = 4: is more than model.dense_width = 2, "),
        (ModelConfig(moe=MoEConfig(shared_experts=1, expert_width=3)), r"tp = 4: .*shared.* x expert_width = 3, "),
    ],
)
def test_more_tensor_ranks_than_rows_of_a_head(model: ModelConfig, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ParallelConfig(tp=4).check_model(model)
    ParallelConfig(tp=2).check_model(model)
    ParallelConfig(tp=4).check_model(ModelConfig(modalities=("text",), visual=VisualModelConfig(bits=3)))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_beside_pipeline_stages_zero_is_refused_but_stage_1(stage: int) -> None:
    with pytest.raises(LayoutError, match=f"pp = 2: engine.zero_stage is {stage}, .*Set engine.zero_stage: 1"):
        ParallelConfig(pp=2).check_zero(stage)
    ParallelConfig(pp=2, tp=2, ep=2).check_zero(1)
    ParallelConfig(tp=2, ep=2).check_zero(stage)


def test_chunks_that_multi_token_prediction_looks_beyond() -> None:
    """At the edge: the chunks that are refused are those over which the first step could not look ahead."""
    for tokens in range(2, 130, 3):
        for degree, least in itertools.product((2, 3, 4), (1, 2, 5, 128)):
            layout = ParallelConfig(cp=degree, context_chunk=least)
            chunk = Splitter(degree, least).of_row(tokens, has_sinks=False).chunk
            layout.check_rows(tokens, ahead=chunk)
            with pytest.raises(LayoutError, match=f"chunks of {chunk} for .* reads {chunk + 1} tokens ahead") as caught:
                layout.check_rows(tokens, ahead=chunk + 1)
            if "context_chunk = " in str(caught.value):
                ParallelConfig(cp=degree, context_chunk=chunk + 1).check_rows(tokens, ahead=chunk + 1)
    ParallelConfig().check_rows(2, ahead=9)
    with pytest.raises(LayoutError, match=r"context_chunk = 1: rows of 128 .*Set parallel.context_chunk: 9"):
        ParallelConfig(cp=2, context_chunk=1).check_rows(128, ahead=9)
    with pytest.raises(LayoutError, match=r"cp = 4: rows of 16 .*Lower parallel.cp or model.mtp.depth"):
        ParallelConfig(cp=4).check_rows(16, ahead=3)


def test_dispatchers_that_cannot_run_are_refused_not_replaced() -> None:
    with pytest.raises(LayoutError, match="dispatcher = 'megablocks'.*no transport between ranks.*alltoall"):
        ParallelConfig(ep=2, dispatcher="megablocks")
    with pytest.raises(LayoutError, match="dispatcher = 'deepep'.*parallel.ep = 1 ranks"):
        ParallelConfig(dispatcher="deepep")
    with pytest.raises(LayoutError, match="overlap = 'shared'.*nothing runs beside"):
        ParallelConfig(ep=2, dispatcher="deepep", overlap="shared")
    ParallelConfig(ep=2, dispatcher="deepep")  # a cluster's configuration is checked on machines without a GPU
    missing = "deep_ep is not installed; there is no CUDA device.*alltoall"
    with pytest.raises(LayoutError, match=missing if not torch.cuda.is_available() else "deepep cannot run here"):
        require_deepep()


@pytest.mark.parametrize(
    "degrees,message",
    [
        ({}, r"overlap = 'shared': parallel.ep is 1"),
        ({"ep": 2, "dispatcher": "allgather"}, r"overlap = 'shared': allgather does not run beside other work"),
        ({"ep": 2}, r"overlap = 'shared': model.moe.shared_experts is 0"),
    ],
)
def test_an_overlap_without_anything_to_overlap_is_refused(degrees: dict, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ParallelConfig(**degrees, overlap="shared").check_model(MODEL)


def test_a_legal_layout_derives_dp_and_replicas() -> None:
    dims = ParallelConfig(ep=4, etp=2).derive_dims(16, kv_heads=1)
    assert (dims.dp, dims.edp, dims.ep, dims.etp) == (16, 2, 4, 2)
