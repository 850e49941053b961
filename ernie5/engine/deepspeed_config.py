"""The DeepSpeed configuration of a run, and the settings DeepSpeed cannot keep its promise for, refused.

Torch-free, so that a test can compare it with a golden text and `--validate` can refuse early.
"""

from __future__ import annotations

import dataclasses

from ernie5.engine.config import EngineConfig
from ernie5.errors import ConfigError
from ernie5.optim.config import OptimConfig

BUCKET_ELEMENTS = 50_000_000


@dataclasses.dataclass(frozen=True)
class DeepSpeedPlan:
    """Sizes that DeepSpeed wants to know: micro-batches per rank of the largest step (the engine tells DeepSpeed which
    one is the last of a step), rows in each, ranks, parameters of the model and of its largest layer, elements of a
    rank's pieces that stage 3 steps at a time, and whether copies to the host's memory want pages that stay in place
    (there is a GPU)."""

    micro_batches: int
    micro_sequences: int
    dp: int
    num_params: int
    layer_params: int
    sub_group_elements: int
    pin_memory: bool


def deepspeed_config(
    engine: EngineConfig, *, optim: OptimConfig, plan: DeepSpeedPlan
) -> dict[str, object]:
    """Return DeepSpeed's JSON configuration; raises ConfigError for combinations that would not equal `local`.

    DeepSpeed clips where it has cut gradients into pieces, by the norm of `deepspeed_norm`. Buckets are no larger than
    the model: stage 2 allocates them whole. In bf16, DeepSpeed would add up the gradients of stage 0 in bf16: it then
    holds fp32 parameters, the step runs on copies.
    """
    check_combination(engine, optim=optim)
    if engine.offload_optimizer != "none":
        check_offload(engine, micro_batches=plan.micro_batches)
    bucket = min(BUCKET_ELEMENTS, max(plan.num_params, 1))
    bucket += bucket % 2  # stages 1 and 2 refuse odd ones
    result: dict[str, object] = {
        "train_micro_batch_size_per_gpu": plan.micro_sequences,
        "gradient_accumulation_steps": plan.micro_batches,
        "train_batch_size": plan.micro_sequences * plan.micro_batches * plan.dp,
        "gradient_clipping": 0.0 if clips_by_itself(engine) else optim.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **(_whole_while_used(plan) if engine.zero_stage == 3 else {}),
            **_offload(engine, pin_memory=plan.pin_memory),
        },
    }
    if engine.precision == "bf16" and engine.zero_stage > 0:
        result["bf16"] = {"enabled": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def clips_by_itself(engine: EngineConfig) -> bool:
    """Whether gradients stay whole, so that the engine clips them: stage 0, and DeepSpeed's optimizer for stage 1 in
    bf16 (it is another one where the optimizer's state is on the host)."""
    is_bf16_optimizer = engine.zero_stage == 1 and engine.precision == "bf16" and engine.offload_optimizer == "none"
    return engine.zero_stage == 0 or is_bf16_optimizer


def _whole_while_used(plan: DeepSpeedPlan) -> dict[str, object]:
    """Stage 3: every parameter is sharded, and whole only while its layer runs.

    DeepSpeed's own settings keep all small parameters and whatever is used again within 1e9 elements. The window of
    prefetching is one layer at most: weights inside the window are not released either.
    """
    return {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": min(BUCKET_ELEMENTS, plan.layer_params),
        "sub_group_size": plan.sub_group_elements,
    }


def _offload(engine: EngineConfig, *, pin_memory: bool) -> dict[str, object]:
    """The optimizer stays our AdamW, which steps tensors where they are; no cpu_adam has to be compiled. Of the files
    that hold them (`deepspeed_nvme`) DeepSpeed knows nothing."""
    if engine.offload_optimizer == "none":
        return {}
    return {"offload_optimizer": {"device": "cpu", "pin_memory": pin_memory}}


def check_offload(engine: EngineConfig, *, micro_batches: int) -> None:
    """Refuse the case in which gradients would be added up in bf16: stage 1 adds them up where autograd leaves them.
    (Stages 2 and 3 have fp32 pieces of their own for that.)"""
    if engine.precision == "bf16" and engine.zero_stage == 1 and micro_batches > 1:
        engine.fail(
            "offload_optimizer",
            f"with bf16 weights, zero_stage {engine.zero_stage} would add up the gradients of {micro_batches} "
            "micro-batches in bf16. Set engine.zero_stage: 2 or 3, or a batch of one micro-batch per rank",
            error=ConfigError,
        )


def check_combination(engine: EngineConfig, *, optim: OptimConfig) -> None:
    """Refuse what DeepSpeed runs with other results than the local engine."""
    optim.check_engine(kind="deepspeed", precision=engine.precision)
    if engine.recompute != "none" and engine.zero_stage == 0 and engine.precision == "bf16":
        engine.fail(
            "recompute",
            "stage 0 runs each pass on bf16 copies of fp32 weights, which no longer exist when backward repeats a "
            "part. Set engine.zero_stage: 1",
            error=ConfigError,
        )
