"""The DeepSpeed configuration of a run. Torch-free, so that a test can compare it with a golden text."""

from __future__ import annotations

import dataclasses

from ernie5.engine.config import EngineConfig
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
    optim.check_engine(kind="deepspeed", precision=engine.precision)
    engine.check_micro_batches(plan.micro_batches)
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
