"""Both directions with transformers: logits, bytes, generation, fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie5.checkpoint.convert.ernie45_config import model_config_of, read_config_file
from ernie5.checkpoint.load import load_model
from ernie5.checkpoint.manifest import read_manifest
from ernie5.data.document import DocumentBuilder, Shapes
from ernie5.generate.sampling import Sampling
from ernie5.generate.session import Decoder
from ernie5.generate.text import TextLimits, generate_text
from ernie5.tokenizers.vocab import Vocab

# Limit for fp32: logits are of order 1, sums run over at most 331 terms.
TOLERANCE = 1e-4
SHAPES = ("sparse", "untied", "interval", "dense", "dense_untied")


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def our_logits(verb: Callable, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Through the command line, as a user compares us."""
    given, out = folder.parent / "ids.pt", folder.parent / "logits.pt"
    torch.save(ids, given)
    code, _, err = verb("evaluate", folder, "--logits", given, "--out", out)
    assert code == 0, err
    return torch.load(out, weights_only=True)


def reload(folder: Path) -> torch.nn.Module:
    """Load with transformers and insist that every tensor found its place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    if model.config.model_type == "ernie4_5_moe":
        model.set_experts_implementation("eager")
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_bytes_survive_the_way_in_and_out(
    shape: str, family, verb: Callable, convert: Callable, tmp_path: Path
) -> None:
    theirs = family.build(shape)
    ids = family.ids(theirs)
    wanted = family.logits(theirs, ids)
    hub, own, back = tmp_path / "hub", tmp_path / "own", tmp_path / "back"
    theirs.save_pretrained(hub, max_shard_size="20KB")
    convert(hub, own, "ernie5")
    found = our_logits(verb, own, ids)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert (found - wanted).abs().max() < TOLERANCE < wanted.abs().max() / 100
    convert(own, back, "ernie45-hf", "--shard-size", "30KB")
    assert (back / "model.safetensors.index.json").is_file()
    assert equal(read_all(hub), read_all(back))
    assert (family.logits(reload(back), ids) - wanted).abs().max() == 0
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (hub, back))
    extra = {"torch_dtype", "rope_theta", "num_nextn_predict_layers", "head_dim", "dtype", "moe_layer_interval",
             "moe_layer_start_index", "use_bias", "moe_norm_min"}
    assert {k: v for k, v in before.items() if k not in extra} == {k: v for k, v in after.items() if k not in extra}


@pytest.mark.parametrize("rope", [
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 3e5},
    {"rope_parameters": {"rope_theta": 7e5}, "rope_theta": 3e5},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": None, "rope_theta": 3e5},
])
def test_the_base_of_the_positions_is_the_one_that_transformers_takes(rope: dict[str, object], tmp_path: Path) -> None:
    """In rope_parameters, else beside them, as releases before transformers 5 have it, else the default."""
    from transformers import AutoConfig

    values = {"model_type": "ernie4_5", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2,
              "vocab_size": 9, "intermediate_size": 8, **rope}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"]
    ours = model_config_of(read_config_file(tmp_path / "config.json"), mtp_depth=0, from_paddle=False)
    assert ours.rope_base == theirs


@pytest.mark.parametrize("shape", ["sparse", "untied"])
def test_the_layout_that_transformers_holds_in_memory_reads_the_same(
    shape: str, family, convert: Callable, tmp_path: Path
) -> None:
    theirs = family.build(shape)
    theirs.save_pretrained(tmp_path / "hub")
    memory = tmp_path / "memory"
    memory.mkdir()
    (memory / "config.json").write_text((tmp_path / "hub" / "config.json").read_text())
    tied = theirs.config.tie_word_embeddings
    state = {k: v.clone() for k, v in theirs.state_dict().items() if not (tied and k == "lm_head.weight")}
    assert any(key.endswith("experts.gate_up_proj") for key in state)
    save_file(state, memory / "model.safetensors", metadata={"format": "pt"})
    for name in ("hub", "memory"):
        convert(tmp_path / name, tmp_path / f"own-{name}", "ernie5")
    assert equal(read_all(tmp_path / "own-hub"), read_all(tmp_path / "own-memory"))


def test_mtp_modules_are_kept_in_either_orientation(family, convert: Callable, tmp_path: Path) -> None:
    theirs = family.build("sparse")
    hub = tmp_path / "hub"
    theirs.save_pretrained(hub)
    tensors = read_all(hub)
    for name in [name for name in tensors if name.startswith("model.layers.0.")]:
        tensors[name.replace("model.layers.0.", "model.mtp_block.0.")] = torch.randn_like(tensors[name])
    width = theirs.config.hidden_size
    tensors |= {f"model.mtp_{name}_norm.0.weight": torch.randn(width) for name in ("emb", "hidden")}
    projection = torch.randn(width, 2 * width)
    results = []
    for number, stored in enumerate((projection, projection.T.contiguous())):
        save_file({**tensors, "model.mtp_linear_proj.0.weight": stored}, hub / "model.safetensors")
        own, back = tmp_path / f"own{number}", tmp_path / f"back{number}"
        convert(hub, own, "ernie5")
        model = load_model(own).model
        assert len(model.mtp) == 1 and torch.equal(model.mtp[0].project.weight, projection)
        assert "MTP" in convert(own, back, "ernie45-hf")
        results.append(read_all(back))
        reload(back)
    assert equal(results[0], {**tensors, "model.mtp_linear_proj.0.weight": projection})
    assert equal(results[0], results[1])


def test_bf16_stays_bf16_but_routers_are_written_in_fp32(family, convert: Callable, tmp_path: Path) -> None:
    theirs = family.build("sparse").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "own", "ernie5")
    assert read_manifest(tmp_path / "own").precision == "bf16"
    convert(tmp_path / "own", tmp_path / "back", "ernie45-hf")
    convert(tmp_path / "own", tmp_path / "wide", "ernie45-hf", "--dtype", "fp32")
    before, after, wide = (read_all(tmp_path / name) for name in ("hub", "back", "wide"))
    fp32 = {name for name, value in after.items() if value.dtype == torch.float32}
    assert fp32 == {name for name in after if name.endswith(("mlp.gate.weight", "e_score_correction_bias"))}
    assert all(torch.equal(after[name].float(), value.float()) for name, value in before.items())
    assert all(torch.equal(wide[name], value.float()) for name, value in before.items())
    assert reload(tmp_path / "back").dtype == torch.bfloat16


def test_greedy_generation_agrees_with_transformers_for_64_tokens(family, convert: Callable, tmp_path: Path) -> None:
    theirs = family.build("sparse")
    theirs.save_pretrained(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "own", "ernie5")
    prompts = [[7, 3, 300], [5] * 9]
    vocab = Vocab(text_size=300, audio_levels=1, audio_codes=2)
    shapes = Shapes(bits=4, feature_channels=4, patch_pixels=2, audio_levels=1, audio_codes=2, num_scales=2)
    decoder = Decoder(load_model(tmp_path / "own").model, vocab=vocab, shapes=shapes)
    documents = []
    for prompt in prompts:
        builder = DocumentBuilder("p", task="text", vocab=vocab, shapes=shapes)
        builder.text(prompt)
        documents.append(builder.build())
    limits = TextLimits(max_tokens=64, stop_ids=(), num_ids=theirs.config.vocab_size)
    ours = generate_text(documents, decoder=decoder, limits=limits, sampling=Sampling())
    for prompt, written in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
                                 eos_token_id=None, pad_token_id=0)
        assert written == wanted[0, len(prompt):].tolist()
        assert len(set(written)) > 8  # a loop of two tokens would agree by luck


def test_peft_adapts_an_exported_model(family, convert: Callable, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    theirs = family.build("sparse")
    theirs.save_pretrained(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "own", "ernie5")
    convert(tmp_path / "own", tmp_path / "back", "ernie45-hf")
    ids = family.ids(theirs)
    adapted = get_peft_model(reload(tmp_path / "back"), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(reload(tmp_path / "back"), tmp_path / "adapter").eval()
    change = (family.logits(loaded, ids) - family.logits(theirs, ids)).abs().max()
    assert change > 1e-3
    assert torch.equal(family.logits(loaded, ids), family.logits(adapted.eval(), ids))
