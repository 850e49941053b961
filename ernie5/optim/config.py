"""Settings of the optimizer and of the learning-rate schedule."""

from __future__ import annotations

from ernie5.config.base import Config, config
from ernie5.config.field import below_one, field, fraction, non_negative, positive


@config
class ScheduleConfig(Config):
    """Learning rate over the run (SPEC section 3): warm-up, then constant, cosine or WSD."""

    kind: str = field(
        "constant", doc="shape after the warm-up", choices=("constant", "cosine", "wsd"), kind="numerics"
    )
    warmup_steps: int | None = field(
        None, doc="linear warm-up; none: min(2000, 5 % of train.steps), at least 1", unit="steps",
        check=non_negative, kind="numerics",
    )
    final_ratio: float = field(
        0.1, doc="last learning rate over the peak, for cosine (default 1e-4 to 1e-5) and wsd", check=fraction,
        kind="numerics",
    )
    decay_fraction: float = field(
        0.2, doc="wsd: last part of the run that decays with 1 - sqrt", check=fraction, kind="numerics"
    )


@config
class OptimConfig(Config):
    """AdamW as in SPEC section 3, or Muon for matrices with AdamW for the rest."""

    name: str = field("adamw", doc="optimizer", choices=("adamw", "muon"), kind="numerics")
    learning_rate: float = field(1e-4, doc="peak learning rate", check=positive, kind="numerics")
    beta1: float = field(0.9, doc="decay of the first moment", check=below_one, kind="numerics")
    beta2: float = field(0.95, doc="decay of the second moment", check=below_one, kind="numerics")
    epsilon: float = field(1e-8, doc="added to the root of the second moment", check=positive, kind="numerics")
    weight_decay: float = field(0.1, doc="decoupled weight decay of matrices", check=non_negative, kind="numerics")
    moments: str = field(
        "fp32", doc="AdamW's moments: fp32, or 8bit: codes with one scale per 256 (local engine)",
        choices=("fp32", "8bit"), kind="numerics",
    )
    stochastic_rounding: bool = field(
        False, doc="with bf16: no fp32 masters; steps round the bf16 weights at random in proportion (local engine)",
        kind="numerics",
    )
    clip_norm: float = field(
        1.0, doc="largest global gradient norm; 0 switches clipping off", check=non_negative, kind="numerics"
    )
    muon_momentum: float = field(0.95, doc="muon: momentum", check=fraction, kind="numerics")
    muon_steps: int = field(5, doc="muon: Newton-Schulz iterations", check=positive, kind="numerics")
    schedule: ScheduleConfig = field(ScheduleConfig, doc="learning rate over the run")

    @property
    def is_compact(self) -> bool:
        """Whether the state is kept smaller than AdamW's in fp32."""
        return self.moments != "fp32" or self.stochastic_rounding

    def validate(self) -> None:
        """Refuse what Muon would ignore."""
        if self.name == "muon" and self.is_compact:
            key = "moments" if self.moments != "fp32" else "stochastic_rounding"
            self.fail(key, "muon keeps fp32 state and would ignore it. Set optim.name: adamw, or leave it out")

    def check_engine(self, *, kind: str, precision: str) -> None:
        """Refuse small state in an engine that does not keep it, and rounding where nothing is rounded."""
        if self.is_compact and kind != "local":
            key = "moments" if self.moments != "fp32" else "stochastic_rounding"
            self.fail(
                key,
                f"only the local engine keeps it, and engine.kind is {kind}, whose state is cut in fp32. Set "
                f"engine.kind: local, or leave optim.{key} out",
            )
        if self.stochastic_rounding and precision != "bf16":
            self.fail(
                "stochastic_rounding",
                f"engine.precision is {precision}, whose weights are not rounded. Set engine.precision: bf16, or leave "
                "optim.stochastic_rounding out",
            )
