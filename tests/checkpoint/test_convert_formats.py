"""Paddle, the text part of the vision-language model, our own code beside the weights, dense to sparse."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import load_model
from ernie5.checkpoint.manifest import RunState, read_manifest
from ernie5.checkpoint.reshard import reshard
from ernie5.checkpoint.save import Contents, save_checkpoint
from ernie5.config.load import config_from_dict, config_to_dict, config_to_yaml
from ernie5.engine.interface import EngineState
from ernie5.evaluate.logits import text_logits
from ernie5.model.backbone import build_model
from ernie5.model.config import AudioModelConfig, ModelConfig, MoEConfig, MTPConfig, VisualModelConfig
from ernie5.tokenizers.text import load_text_tokenizer, train_text_tokenizer
from ernie5.train.config import RootConfig

# fp32 sums of a few hundred terms in another order.
TOLERANCE = 1e-4
UNIFIED = ModelConfig(
    layers=3, width=24, query_heads=3, kv_heads=1, head_width=10, vocab_size=320, dense_layers=1, dense_width=20,
    moe=MoEConfig(num_experts=6, top_k=2, expert_width=6, shared_experts=1, scale=1.5, num_groups=3),
    mtp=MTPConfig(depth=2),
    visual=VisualModelConfig(bits=4, num_scales=2, patch_pixels=2, encoder_channels=4, vit_width=16, vit_heads=2),
    audio=AudioModelConfig(levels=2, codes=8),
)
TEXT = dataclasses.replace(
    UNIFIED, qk_norm=False, modalities=("text",), mtp=MTPConfig(depth=1), visual=VisualModelConfig(),
    audio=AudioModelConfig(),
    moe=MoEConfig(num_experts=5, top_k=2, expert_width=6, shared_experts=1, score="softmax"),
)


def save(folder: Path, *, model: ModelConfig, precision: str = "fp32", tokenizer: str = "other") -> Path:
    """A checkpoint of `model` as training writes it, with random weights and balance biases that matter."""
    built = build_model(model, seed=3)
    generator = torch.Generator().manual_seed(1)
    parameters = {name: p.detach().clone() for name, p in built.named_parameters()}
    # Small initial weights make all logits alike; larger ones make choices that a wrong mask would change.
    parameters = {n: p if n.endswith("norm.weight") else p * 3 for n, p in parameters.items()}
    buffers = {name: 0.1 * torch.randn(b.shape, generator=generator) for name, b in built.named_buffers()}
    engine = EngineState(parameters, buffers, {}, 5, torch.ones(4, dtype=torch.float64))
    values = {"train": {"steps": 9, "run_dir": "runs/x"}, "model": config_to_dict(model),
              "tokenizers": {"audio_levels": 2}}
    if model.modalities == ("text",):
        tasks = ("image_to_text", "text_to_image", "video_to_text", "text_to_video", "audio_to_text", "text_to_audio",
                 "page")
        values["data"] = {"mixture": {"text": 1.0, **dict.fromkeys(tasks, 0.0)}}
    config = config_from_dict(values, schema=RootConfig)
    run = RunState(step=5, tokens=70, data={}, rng={})
    text, slices = config_to_yaml(config), tuple(engine.slices())
    contents = Contents(slices, 5, engine.magnitudes, run, text, precision, {"text": tokenizer})
    return save_checkpoint(folder / "checkpoints", contents=contents, config=CheckpointConfig())


def ids(vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (2, 21), generator=torch.Generator().manual_seed(2))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_paddle_names_fuses_and_transposes_as_the_table_says(convert: Callable, tmp_path: Path) -> None:
    own = save(tmp_path, model=dataclasses.replace(TEXT, tie_embeddings=False))
    convert(own, tmp_path / "hub", "ernie45-hf")
    convert(own, tmp_path / "paddle", "paddle", "--shard-size", "20KB")
    hub, paddle = read_all(tmp_path / "hub"), read_all(tmp_path / "paddle")
    layer = "layers.1"
    qkv = torch.cat([hub[f"model.{layer}.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(paddle[f"ernie.{layer}.self_attn.qkv_proj.weight"], qkv.T)
    for place in (f"{layer}.mlp.experts.3", f"{layer}.mlp.shared_experts", "layers.0.mlp", "mtp_block.0.mlp"):
        pair = torch.cat([hub[f"model.{place}.{part}_proj.weight"] for part in ("gate", "up")])
        assert torch.equal(paddle[f"ernie.{place}.up_gate_proj.weight"], pair.T)
        assert torch.equal(paddle[f"ernie.{place}.down_proj.weight"], hub[f"model.{place}.down_proj.weight"].T)
    for name in (f"{layer}.self_attn.o_proj", f"{layer}.mlp.gate", "mtp_linear_proj.0"):
        assert torch.equal(paddle[f"ernie.{name}.weight"], hub[f"model.{name}.weight"].T)
    for name in ("embed_tokens.weight", "norm.weight", f"{layer}.mlp.moe_statics.e_score_correction_bias"):
        assert torch.equal(paddle[f"ernie.{name}"], hub[f"model.{name}"])
    assert torch.equal(paddle["lm_head.weight"], hub["lm_head.weight"].T)
    convert(tmp_path / "paddle", tmp_path / "again", "ernie45-hf")
    assert equal(read_all(tmp_path / "again"), hub)
    config = json.loads((tmp_path / "paddle" / "config.json").read_text())
    assert config["architectures"] == ["Ernie4_5_MoeForCausalLM"] and config["tie_word_embeddings"] is False


def test_our_own_checkpoint_of_any_precision_comes_back_from_the_hub_bit_for_bit(
    convert: Callable, tmp_path: Path
) -> None:
    own = save(tmp_path, model=TEXT, precision="bf16")
    convert(tmp_path, tmp_path / "hub", "ernie45-hf")
    convert(tmp_path / "hub", tmp_path / "back", "ernie5")
    before, after = load_file(own / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)
    assert load_model(tmp_path / "back").config.model == TEXT
    convert(own, tmp_path / "masters", "ernie45-hf", "--masters")
    masters = read_all(tmp_path / "masters")
    wanted = load_file(own / "optimizer.safetensors")["master/final_norm.weight"]
    assert torch.equal(masters["model.norm.weight"], wanted) and masters["model.norm.weight"].dtype == torch.float32
    name = "model.layers.0.self_attn.q_proj.weight"
    assert 0 < (masters[name] - read_all(tmp_path / "hub")[name].float()).abs().max() < 0.01


@pytest.mark.parametrize(("precision", "ranks"), [("fp32", 1), ("bf16", 1), ("bf16", 3)])
def test_the_fp32_weights_of_a_run_in_one_file_as_zero_to_fp32_gives_them(
    precision: str, ranks: int, convert: Callable, verb: Callable, tmp_path: Path
) -> None:
    """Of a checkpoint by one rank or several: masters where there are some, every tensor fp32, media included."""
    own = save(tmp_path, model=UNIFIED, precision=precision)
    weights, optimizer = load_file(own / "model.safetensors"), load_file(own / "optimizer.safetensors")
    wanted = {name: optimizer.get(f"master/{name}", value) for name, value in weights.items()}
    if ranks > 1:
        reshard(own, target=tmp_path / "parts", ranks=ranks, plan=None)
        own = tmp_path / "parts"
    convert(own, tmp_path / "fp32", "ernie5", "--masters", "--dtype", "fp32")
    found = load_file(tmp_path / "fp32" / "model.safetensors")
    assert equal(found, wanted) and {value.dtype for value in found.values()} == {torch.float32}
    assert any(not torch.equal(found[name], weights[name].float()) for name in weights) == (precision == "bf16")
    loaded = load_model(tmp_path / "fp32")
    assert loaded.manifest.precision == "fp32" and not list((tmp_path / "fp32").glob("optimizer*"))
    state = dict(loaded.model.named_parameters())
    assert all(torch.equal(state[name], wanted[name]) for name in state)
    part = sorted(own.glob("optimizer*"))[-1]
    part.write_bytes(part.read_bytes()[:-1] + bytes([part.read_bytes()[-1] ^ 1]))
    code, _, err = verb("convert", own, tmp_path / "damaged", "--to", "ernie5", "--masters")
    assert code == 2 and part.name in err and "Take another checkpoint" in err
    assert not (tmp_path / "damaged").exists()


def test_a_model_that_ernie45_cannot_express_is_refused_by_setting_and_media_by_name(
    verb: Callable, convert: Callable, tmp_path: Path
) -> None:
    own = save(tmp_path / "unified", model=UNIFIED)
    code, _, err = verb("convert", own, tmp_path / "hub", "--to", "ernie45-hf", "--text-only")
    assert code == 2 and "qk_norm = true" in err and "score = sigmoid" in err and "scale = 1.5" in err
    assert "top_groups = 1 of 3" in err
    code, _, err = verb("convert", own, tmp_path / "hub", "--to", "ernie45-hf")  # all obstacles at once
    assert code == 2 and "qk_norm = true" in err and "first: audio_head" in err and "--to ernie5-hf" in err
    media = dataclasses.replace(UNIFIED, qk_norm=False, moe=TEXT.moe, mtp=TEXT.mtp)
    own = save(tmp_path / "media", model=media)
    code, _, err = verb("convert", own, tmp_path / "hub", "--to", "ernie45-hf")
    assert code == 2 and "first: audio_head.heads.0.weight" in err and "--text-only" in err
    assert "left out" in convert(own, tmp_path / "hub", "ernie45-hf", "--text-only")
    convert(tmp_path / "hub", tmp_path / "back", "ernie5")
    found = text_logits(load_model(tmp_path / "back").model, ids=ids(320))
    assert torch.equal(found, text_logits(load_model(own).model, ids=ids(320)))


def test_a_damaged_checkpoint_is_not_exported(verb: Callable, tmp_path: Path) -> None:
    own = save(tmp_path, model=TEXT)
    path = own / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    code, _, err = verb("convert", own, tmp_path / "hub", "--to", "ernie45-hf")
    assert code == 2 and "does not match its checksum" in err and "damaged: " in err
    assert not (tmp_path / "hub").exists()


def test_the_tokenizer_travels_and_special_ids_with_it(convert: Callable, tmp_path: Path) -> None:
    tokenizer = train_text_tokenizer(["a red ball moves to the left"] * 3, vocab_size=300)
    tokenizer.save(tmp_path / "run" / "tokenizers" / "text")
    own = save(tmp_path / "run", model=TEXT, tokenizer=tokenizer.identity)
    convert(own, tmp_path / "hub", "ernie45-hf")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    start = tokenizer.size
    assert [config[f"{kind}_token_id"] for kind in ("pad", "bos", "eos")] == [start, start + 1, start + 2]
    assert json.loads((tmp_path / "hub" / "generation_config.json").read_text())["eos_token_id"] == start + 2
    convert(tmp_path / "hub", tmp_path / "back", "ernie5")
    assert read_manifest(tmp_path / "back").tokenizers == {"text": tokenizer.identity}
    assert (tmp_path / "back" / "tokenizers" / "text" / "text.json").is_file()


def test_the_exported_tokenizer_gives_our_ids_and_our_text(convert: Callable, tmp_path: Path) -> None:
    tokenizer = train_text_tokenizer(["a red ball moves to the left", "мяч 红色的球 🎈🎈"] * 3, vocab_size=320)
    tokenizer.save(tmp_path / "run" / "tokenizers" / "text")
    own = save(tmp_path / "run", model=TEXT, tokenizer=tokenizer.identity)
    convert(own, tmp_path / "hub", "ernie5-hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hub", trust_remote_code=True)
    texts = ["a red ball", "  two  spaces\n\nx", "мяч 12345 红色的球, 🎈👩\u200d👧!", "a" * 300, "\t\t", "half \ud83c pair"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == tokenizer.decode(ids, exact=False)
    assert [theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id] == [tokenizer.size + i for i in range(3)]
    assert theirs("<bos>a<eos>")["input_ids"] == [tokenizer.size + 1, *tokenizer.encode("a"), tokenizer.size + 2]
    half = tokenizer.encode("🎈".encode("utf-16-be")[:3])  # a limit on tokens may cut a character
    assert theirs.decode(half) == "\ufffd\ufffd"
    batch = theirs(["a", "a red ball"], padding=True)
    assert len({len(row) for row in batch["input_ids"]}) == 1 and batch["input_ids"][0][-1] == tokenizer.size
    theirs.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again(texts)["input_ids"] == theirs(texts)["input_ids"]



def test_foreign_side_files_come_back_and_code_never_does(family, convert: Callable, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    family.build("untied").save_pretrained(hub)
    files = {"tokenizer.model": b"\0pieces", "tokenizer_config.json": b"{}", "generation_config.json": b'{"x": 1}'}
    for name, content in files.items():
        (hub / name).write_bytes(content)
    (hub / "tokenization_evil.py").write_text("raise SystemExit")
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, "moe_capacity": [64, 64, 64], "eos_token_id": 2}))
    convert(hub, tmp_path / "own", "ernie5")
    convert(tmp_path / "own", tmp_path / "back", "ernie45-hf")
    assert all((tmp_path / "back" / name).read_bytes() == content for name, content in files.items())
    assert not list(tmp_path.glob("*/**/*evil*"))[1:]
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert found["moe_capacity"] == [64, 64, 64] and found["eos_token_id"] == 2


@pytest.fixture
def vision_language(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    """A random Ernie4_5_VLMoe on disk as transformers saves it."""
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    text = {
        "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 151, "moe_intermediate_size": [20, 12], "moe_k": 2,
        "moe_num_experts": 5, "moe_num_shared_experts": 2, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 2, 2]},
    }
    special = {f"{medium}{part}_token_id": 140 + 3 * i + j for i, medium in enumerate(("image", "video"))
               for j, part in enumerate(("", "_start", "_end"))}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 4}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **special)
    model = Ernie4_5_VLMoeForConditionalGeneration(config).eval()
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.dim() == 1 or "bias" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + name.endswith("norm.weight"))
    model.save_pretrained(tmp_path / "vl")
    return model, tmp_path / "vl"


@torch.no_grad()
def test_the_text_part_of_the_vision_language_model_comes_in_and_goes_back(
    vision_language: tuple[torch.nn.Module, Path], family, verb: Callable, convert: Callable, tmp_path: Path
) -> None:
    from transformers import Ernie4_5_VLMoeForConditionalGeneration

    theirs, folder = vision_language
    given = ids(130)
    assert "62 tensors of pictures and their experts are left out" in convert(folder, tmp_path / "own", "ernie5")
    found = text_logits(load_model(tmp_path / "own").model, ids=given)
    assert (found - theirs(input_ids=given).logits).abs().max() < TOLERANCE
    memory = tmp_path / "memory"
    memory.mkdir()
    (memory / "config.json").write_text((folder / "config.json").read_text())
    state = {name: value.clone() for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    save_file(state, memory / "model.safetensors")
    convert(memory, tmp_path / "own-memory", "ernie5")
    assert equal(read_all(tmp_path / "own"), read_all(tmp_path / "own-memory"))
    convert(tmp_path / "own", tmp_path / "same", "ernie45-vl", "--into", folder)
    assert equal(read_all(tmp_path / "same"), read_all(folder))
    # Text that was trained further goes back, and pictures stay what they were.
    convert(tmp_path / "own", tmp_path / "text", "ernie45-hf")
    tensors = read_all(tmp_path / "text")
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    tensors[name], tensors["model.norm.weight"] = tensors[name] + 1, tensors["model.norm.weight"] * 2
    save_file(tensors, tmp_path / "text" / "model.safetensors")
    convert(tmp_path / "text", tmp_path / "grown", "ernie45-vl", "--into", folder)
    before, after = read_all(folder), read_all(tmp_path / "grown")
    assert torch.equal(after[name], before[name] + torch.tensor([[1.0], [0.0]]))
    assert {key for key in before if not torch.equal(before[key], after[key])} == {name, "model.norm.weight"}
    Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(tmp_path / "grown")
    narrow = save(tmp_path / "narrow", model=TEXT)
    code, _, err = verb("convert", narrow, tmp_path / "x", "--to", "ernie45-vl", "--into", folder)
    assert code == 2 and "hidden_size: 24 here, 48 there" in err
    for options, message in (([], "needs --into"), (["--into", tmp_path / "text"], "is ernie45-hf, not")):
        code, _, err = verb("convert", tmp_path / "own", tmp_path / "x", "--to", "ernie45-vl", *options)
        assert code == 2 and message in err


def test_the_whole_model_runs_where_ernie5_is_absent(convert: Callable, tmp_path: Path) -> None:
    own = save(tmp_path, model=UNIFIED)
    convert(own, tmp_path / "export", "ernie5-hf", "--shard-size", "20KB")
    given = ids(320)
    torch.save(given, tmp_path / "ids.pt")
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('ernie5', 'ernie5_kernels'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import torch; from transformers import AutoModelForCausalLM as Auto\n"
        "model, info = Auto.from_pretrained('export', trust_remote_code=True, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys'], info\n"
        "ids = torch.load('ids.pt', weights_only=True); model.eval()\n"
        "torch.save(model(ids).logits.detach(), 'logits.pt')\n"
        "padded = torch.nn.functional.pad(ids[:1, :5], (4, 0)); mask = (torch.arange(9) >= 4).long()[None]\n"
        "options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)\n"
        "written = model.generate(ids[:1, :5], attention_mask=torch.ones(1, 5).long(), **options)[0, 5:].tolist()\n"
        "left = model.generate(padded, attention_mask=mask, **options)[0, 9:].tolist()\n"
        "read = ids[:1, :5]\n"
        "for _ in range(12): read = torch.cat([read, model(read).logits[:, -1].argmax(-1, keepdim=True)], 1)\n"
        "assert written == read[0, 5:].tolist(), (written, read)\n"
        "assert left == written, (left, written)\n"
        "model.save_pretrained('saved')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found, wanted = torch.load(tmp_path / "logits.pt"), text_logits(load_model(own).model, ids=given)
    assert (found - wanted).abs().max() < TOLERANCE < wanted.abs().max() / 1000
    stored = read_all(tmp_path / "export")
    assert equal(stored, load_file(own / "model.safetensors")) and equal(read_all(tmp_path / "saved"), stored)
    convert(tmp_path / "saved", tmp_path / "back", "ernie5")
    assert equal(load_file(tmp_path / "back" / "model.safetensors"), stored)


def test_an_export_with_its_own_code_comes_back_bit_for_bit(verb: Callable, convert: Callable, tmp_path: Path) -> None:
    """All modalities; a tensor that the config promises, and one that it does not know, are named."""
    text = train_text_tokenizer(["a few words"] * 4, vocab_size=280)
    own = save(tmp_path / "run", model=UNIFIED, tokenizer=text.identity)
    text.save(tmp_path / "run" / "tokenizers" / "text")
    convert(own, tmp_path / "export", "ernie5-hf", "--shard-size", "20KB")
    code, out, err = verb("verify", tmp_path / "export")
    assert code == 0 and "ernie5-hf" in out, err
    assert "tokenizers of pictures and sound" in convert(tmp_path / "export", tmp_path / "back", "ernie5")
    loaded, before = load_model(tmp_path / "back"), load_model(own)
    assert equal(load_file(tmp_path / "back" / "model.safetensors"), load_file(own / "model.safetensors"))
    assert loaded.config.model == before.config.model
    assert loaded.manifest.tokenizers["text"] == text.identity
    convert(tmp_path / "back", tmp_path / "again", "ernie5-hf", "--shard-size", "20KB")
    assert equal(read_all(tmp_path / "again"), read_all(tmp_path / "export"))
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "export" / "config.json").read_text()
    settings = json.loads((tmp_path / "export" / "config.json").read_text())
    for name in ("bit_head.absent", "bit_head.weight"):
        changed = {**settings, "media_tensors": {**settings["media_tensors"], name: [1, 2]}}
        (tmp_path / "export" / "config.json").write_text(json.dumps(changed))
        code, _, err = verb("convert", tmp_path / "export", tmp_path / "bad", "--to", "ernie5")
        assert code == 2 and f"{name} " in err and "wanted is [1, 2]" in err and not (tmp_path / "bad").exists()
    code, _, err = verb("convert", tmp_path / "export", tmp_path / "bad", "--to", "ernie45-hf")
    assert code == 2


def test_the_tokenizers_that_a_run_keeps_come_along(convert: Callable, tmp_path: Path) -> None:
    text = train_text_tokenizer(["a few words"] * 4, vocab_size=280)
    save(tmp_path / "run", model=TEXT, tokenizer=text.identity)
    text.save(tmp_path / "run" / "tokenizers" / "text")
    train_text_tokenizer(["other words"] * 4, vocab_size=290).save(tmp_path / "tokenizers" / "text")  # not the run's
    convert(tmp_path / "run", tmp_path / "own", "ernie5")
    assert load_text_tokenizer(tmp_path / "own" / "tokenizers" / "text").identity == text.identity
    convert(tmp_path / "own", tmp_path / "far" / "again", "ernie5")
    assert load_text_tokenizer(tmp_path / "far" / "again" / "tokenizers" / "text").identity == text.identity


@pytest.mark.parametrize(("copies", "dense_layers"), [(1, 0), (3, 1)])
def test_an_upcycled_model_answers_like_the_dense_one(
    copies: int, dense_layers: int, verb: Callable, convert: Callable, tmp_path: Path
) -> None:
    dense = dataclasses.replace(TEXT, dense_layers=3, dense_width=24, mtp=MTPConfig(depth=1))
    own = save(tmp_path, model=dense)
    options = ("--expert-width", "8", "--copies", str(copies), "--dense-layers", str(dense_layers))
    convert(own, tmp_path / "sparse", "upcycle", *options)
    sparse = load_model(tmp_path / "sparse")
    assert (sparse.config.model.moe.num_experts, sparse.config.model.moe.top_k) == (3 * copies, 3)
    assert sparse.config.model.dense_layers == dense_layers and len(sparse.model.moe_layers()) == 3 - dense_layers
    wanted, found = (text_logits(model, ids=ids(320)) for model in (load_model(own).model, sparse.model))
    assert (found - wanted).abs().max() < TOLERANCE < wanted.abs().max() / 1000
    for bad, message in (("7", "must be a proper divisor of the dense width 24"), ("24", "proper divisor")):
        code, _, err = verb("convert", own, tmp_path / "x", "--to", "upcycle", "--expert-width", bad)
        assert code == 2 and message in err
    code, _, err = verb("convert", tmp_path / "sparse", tmp_path / "x", "--to", "upcycle", "--expert-width", "8")
    assert code == 2 and "has experts" in err
