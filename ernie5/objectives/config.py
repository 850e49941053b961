"""Settings of the objectives: user weights per modality, auxiliary losses, and the running magnitudes."""

from __future__ import annotations

from ernie5.config.base import Config, config
from ernie5.config.field import field, non_negative


@config
class ObjectivesConfig(Config):
    """How the losses of one step become one scalar (SPEC section 2, Weighting)."""

    text_weight: float = field(1.0, doc="user weight of the text loss", check=non_negative, kind="numerics")
    image_weight: float = field(1.0, doc="user weight of the image bit loss", check=non_negative, kind="numerics")
    video_weight: float = field(1.0, doc="user weight of the video bit loss", check=non_negative, kind="numerics")
    audio_weight: float = field(1.0, doc="user weight of the audio code loss", check=non_negative, kind="numerics")
    mtp_weight: float = field(
        0.3, doc="weight of multi-token prediction relative to text (0.3 pre-training, 0.1 mid-training)",
        check=non_negative, kind="numerics",
    )
    rescale: bool = field(
        True, doc="divide each modality's loss by its running magnitude, so that all lie in one interval",
        kind="numerics",
    )
    ema_decay: float = field(0.99, doc="decay of the running magnitude per optimizer step, in [0, 1)", kind="numerics")
    magnitude_floor: float = field(
        0.0,
        doc="smallest running magnitude, as a part of the loss of even guesses, in [0, 1]: bounds the weight that a "
        "modality gains by being learnt by heart",
        kind="numerics",
    )
    switch_weight: float = field(
        0.0, doc="weight of the switch load-balance loss (mean over MoE layers)", check=non_negative, kind="numerics"
    )
    sequence_weight: float = field(
        0.0, doc="weight of the sequence-wise load-balance loss (mean over MoE layers)", check=non_negative,
        kind="numerics",
    )
    z_weight: float = field(
        0.0, doc="weight of the router z-loss (mean over MoE layers)", check=non_negative, kind="numerics"
    )
    orthogonality_weight: float = field(
        0.0, doc="step size of the router orthogonality loss, applied decoupled after the optimizer step, times lr",
        check=non_negative, kind="numerics",
    )

    def validate(self) -> None:
        """Check the decay."""
        if not 0.0 <= self.ema_decay < 1.0:
            self.fail("ema_decay", "a decay lies in [0, 1); 0.99 averages about 100 steps")
        if not 0.0 <= self.magnitude_floor <= 1.0:
            self.fail("magnitude_floor", "a part of the loss of even guesses lies in [0, 1]; 0 sets no floor")
        if not any((self.text_weight, self.image_weight, self.video_weight, self.audio_weight)):
            self.fail("text_weight", "all four modality weights are 0, so nothing would be trained. Raise one of them")
