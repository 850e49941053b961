"""`config.json` of the ERNIE 4.5 family <-> ModelConfig; what one side cannot express is refused by key. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from ernie5.errors import CheckpointError, ConfigError
from ernie5.model.config import ModelConfig, MoEConfig, MTPConfig

CONFIG_NAME = "config.json"
DENSE, SPARSE, VISION = ("ernie4_5",), ("ernie4_5_moe",), ("ernie4_5_vl_moe", "ernie4_5_moe_vl")
EXPORT = "ernie5"  # model_type of --to ernie5-hf
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
NORM_MIN = 1e-12
# What `Ernie4_5Config` and `Ernie4_5_MoeConfig` of transformers 5.23 assume where a file is silent.
HUB_ROPE_BASE = 500_000.0
DENSE_HEAD_WIDTH = 128


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids that generation needs; None where the tokenizer has none."""

    pad: int | None
    bos: int | None
    eos: int | None


class ConfigFile:
    """The values of one config.json with checked types; errors name the file and the key."""

    def __init__(self, path: Path, *, values: dict[str, object]) -> None:
        self.path, self.values = path, values

    def fail(self, key: str, rule: str) -> CheckpointError:
        """The error to raise for `key`."""
        return CheckpointError(f"{self.path}: {key} = {json.dumps(self.values.get(key))}: {rule}")

    def number(self, key: str, *, default: float | None = None) -> float:
        """A positive or zero number; the first of a list, which is the text part's in Ernie4_5_VLMoe."""
        value = self.values.get(key)
        value = value[0] if isinstance(value, list) and value else value
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise self.fail(key, "expected a number. Without it the model cannot be built")
        return value

    def whole(self, key: str, *, default: int | None = None) -> int:
        """A whole number >= 0."""
        value = self.number(key, default=default)
        if value != int(value):
            raise self.fail(key, "expected a whole number")
        return int(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """A truth value."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, "expected true or false")
        return value


def read_config_file(path: Path) -> ConfigFile:
    """Read a config.json. Raises CheckpointError where it is missing or no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: without it the tensors' shapes mean nothing") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return ConfigFile(path, values=values)


def model_type_of(file: ConfigFile) -> str:
    """`model_type`, checked to be of the family."""
    found = file.values.get("model_type")
    known = (*DENSE, *SPARSE, *VISION)
    if found not in known:
        raise file.fail("model_type", f"only the ERNIE 4.5 family can be converted ({', '.join(known)})")
    return str(found)


def text_part(file: ConfigFile) -> ConfigFile:
    """The values of the text model: `text_config` where there is one. Its tie is the outer one, as in transformers."""
    inner = file.values.get("text_config")
    if not isinstance(inner, dict):
        return file
    tie = file.values.get("tie_word_embeddings", inner.get("tie_word_embeddings"))
    return ConfigFile(file.path, values={**inner, "tie_word_embeddings": tie})


def model_config_of(file: ConfigFile, *, mtp_depth: int, from_paddle: bool) -> ModelConfig:
    """The ModelConfig that computes the same function as the text model of `file`.

    Raises CheckpointError naming the key for everything that this model has no counterpart of.
    """
    model_type = model_type_of(file)
    text = text_part(file)
    _refuse_foreign(text)
    layers, width = text.whole("num_hidden_layers"), text.whole("hidden_size")
    heads = text.whole("num_attention_heads")
    derived = None if width % max(heads, 1) else width // max(heads, 1)
    assumed = DENSE_HEAD_WIDTH if model_type in DENSE and not from_paddle else derived
    head_width = text.whole("head_dim", default=assumed)
    dense_layers = layers if model_type in DENSE else _dense_prefix(text, layers=layers)
    moe = MoEConfig()
    if dense_layers < layers:
        moe = _moe_config(text)
    try:
        return ModelConfig(
            layers=layers, width=width, query_heads=heads,
            kv_heads=text.whole("num_key_value_heads", default=heads), head_width=head_width,
            vocab_size=text.whole("vocab_size"), rope_base=float(_rope_base(text, from_paddle=from_paddle)),
            norm_eps=float(text.number("rms_norm_eps", default=1e-5)), qk_norm=False,
            tie_embeddings=text.flag("tie_word_embeddings", default=not from_paddle), dense_layers=dense_layers,
            dense_width=text.whole("intermediate_size"), modalities=("text",), moe=moe,
            mtp=MTPConfig(depth=mtp_depth),
        )
    except ConfigError as error:
        raise CheckpointError(f"{file.path} describes no model that can be built: {error}") from None


def _refuse_foreign(text: ConfigFile) -> None:
    if text.flag("use_bias", default=False):
        raise text.fail("use_bias", "this model's products have no biases, and no released ERNIE 4.5 has any")
    activation = text.values.get("hidden_act", "silu")
    if activation != "silu":
        raise text.fail("hidden_act", "the feed-forwards are SwiGLU, whose activation is silu")
    for key in ("rope_scaling", "compression_ratio"):
        if text.values.get(key) not in (None, 1, 1.0):
            raise text.fail(key, "scaled rotary positions are not supported. Remove the key if it changes nothing")


def _rope_base(text: ConfigFile, *, from_paddle: bool) -> float:
    parameters = text.values.get("rope_parameters")
    if parameters is None:
        return text.number("rope_theta", default=None if from_paddle else HUB_ROPE_BASE)
    if not isinstance(parameters, dict):
        raise text.fail("rope_parameters", "expected an object with rope_type and rope_theta")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise text.fail("rope_parameters", f"rope_type {kind!r} is not supported, only default")
    outer = {"rope_theta": text.values.get("rope_theta")}  # what transformers falls back to as well
    return ConfigFile(text.path, values=outer | parameters).number("rope_theta", default=HUB_ROPE_BASE)


def _dense_prefix(text: ConfigFile, *, layers: int) -> int:
    """Number of dense layers before the first with experts; the experts must then go on to the last layer."""
    kinds = text.values.get("mlp_layer_types")
    if isinstance(kinds, list):
        key, sparse = "mlp_layer_types", [index for index, kind in enumerate(kinds) if kind == "sparse"]
    else:
        key, start = "moe_layer_start_index", text.whole("moe_layer_start_index", default=1)
        interval = text.whole("moe_layer_interval", default=1)
        end = text.values.get("moe_layer_end_index", -1)
        end = end[0] if isinstance(end, list) and end else end
        if isinstance(end, bool) or not isinstance(end, int) or interval < 1:
            raise text.fail("moe_layer_end_index", "expected a whole number, and moe_layer_interval >= 1")
        end = layers - 1 if end == -1 else end
        sparse = [index for index in range(layers) if (index + 1) % interval == 0 and start <= index <= end]
    first = sparse[0] if sparse else layers
    if sparse != list(range(first, layers)):
        raise text.fail(
            key, f"layers {sparse[:8]} of {layers} have experts. This model has dense layers at the beginning only"
        )
    return first


def _moe_config(text: ConfigFile) -> MoEConfig:
    norm_min = text.number("moe_norm_min", default=NORM_MIN)
    if norm_min != NORM_MIN:
        raise text.fail("moe_norm_min", f"the router renormalises with the floor {NORM_MIN} alone")
    for key, alias in (("moe_k", "num_experts_per_tok"), ("moe_num_experts", "num_experts")):
        pair = [text.whole(name, default=0) for name in (key, alias)]
        if all(pair) and pair[0] != pair[1]:
            raise text.fail(alias, f"{key} = {pair[0]} means the same and says otherwise. Remove the one that is wrong")
    try:
        return MoEConfig(
            num_experts=text.whole("moe_num_experts", default=text.whole("num_experts", default=64)),
            top_k=text.whole("moe_k", default=text.whole("num_experts_per_tok", default=6)),
            expert_width=text.whole("moe_intermediate_size"),
            shared_experts=text.whole("moe_num_shared_experts", default=2), score="softmax",
        )
    except ConfigError as error:
        raise CheckpointError(f"{text.path} describes no experts that can be built: {error}") from None


def config_values(
    model: ModelConfig, *, base: dict[str, object], ids: SpecialIds, dtype: str, for_paddle: bool = False
) -> dict[str, object]:
    """The config.json of `model`. base: keys of an earlier config.json, kept where this model says nothing of them.

    Raises CheckpointError naming every setting that ERNIE 4.5 has no counterpart of.
    """
    refuse_inexpressible(model)
    sparse = bool(model.moe_layers)
    kept = {k: v for k, v in base.items() if k not in ("rope_theta", "dtype", "text_config", "vision_config")}
    lengths = {"max_position_embeddings": 131072, "initializer_range": 0.02, "use_cache": True}
    values: dict[str, object] = {
        **lengths, **kept,
        "architectures": [_architecture(sparse, for_paddle=for_paddle)],
        "model_type": (SPARSE if sparse else DENSE)[0],
        "vocab_size": model.vocab_size, "hidden_size": model.width, "intermediate_size": model.dense_width,
        "num_hidden_layers": model.layers, "num_attention_heads": model.query_heads,
        "num_key_value_heads": model.kv_heads, "head_dim": model.head_width, "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps, "tie_word_embeddings": model.tie_embeddings, "use_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base}, "rope_theta": model.rope_base,
        "torch_dtype": dtype, "num_nextn_predict_layers": model.mtp.depth,
    }
    if sparse:
        values |= {
            "moe_num_experts": model.moe.num_experts, "moe_k": model.moe.top_k,
            "moe_intermediate_size": model.moe.expert_width, "moe_num_shared_experts": model.moe.shared_experts,
            "moe_layer_start_index": model.dense_layers, "moe_layer_end_index": model.layers - 1,
            "moe_layer_interval": 1, "moe_norm_min": NORM_MIN,
        }
    given = {"pad_token_id": ids.pad, "bos_token_id": ids.bos, "eos_token_id": ids.eos}
    values |= {key: value for key, value in given.items() if key not in kept}
    return values


def _architecture(sparse: bool, *, for_paddle: bool) -> str:
    if sparse:
        return "Ernie4_5_MoeForCausalLM"
    return "Ernie4_5_ForCausalLM" if for_paddle else "Ernie4_5ForCausalLM"


def refuse_inexpressible(model: ModelConfig, *, media: str = "") -> None:
    """Raise CheckpointError for the settings whose function no ERNIE 4.5 class computes, all at once, and for `media`,
    what the model has of other modalities in words."""
    moe, found = model.moe, []
    if model.qk_norm:
        found.append("model.qk_norm = true (ERNIE 4.5 has no norm on queries and keys)")
    if model.moe_layers and moe.score != "softmax":
        found.append(f"model.moe.score = {moe.score} (ERNIE 4.5 routes by softmax)")
    if model.moe_layers and moe.scale != 1.0:
        found.append(f"model.moe.scale = {moe.scale} (ERNIE 4.5 has no factor on the combine weights)")
    if model.moe_layers and moe.is_group_limited:
        limit = f"model.moe.top_groups = {moe.top_groups} of {moe.num_groups}"
        found.append(f"{limit} (ERNIE 4.5 chooses from all experts)")
    way = "Use --to ernie5-hf: it carries its own code"
    if media:
        way = f"{way} and keeps all" if found else f"Give --text-only, or {way[0].lower()}{way[1:]} and keeps all"
        found.append(f"{media} (its text classes have no place for them; --text-only leaves them out)")
    if found:
        raise CheckpointError(f"the model cannot be written as ERNIE 4.5: {'; '.join(found)}. {way}")
