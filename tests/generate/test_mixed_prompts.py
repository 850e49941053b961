"""Prompts of unequal lengths that hold pictures, clips and sound, side by side: each step's logits are those of the
training pass over what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from ernie5.data.collate import Layout, collate_rows
from ernie5.data.document import Document, DocumentBuilder, Shapes
from ernie5.data.drawing import draw_codes
from ernie5.data.patches import merge_patches
from ernie5.generate.audio import CodeChoice, generate_speech
from ernie5.generate.image import BitChoice, Canvas, draw_frames
from ernie5.generate.sampling import Sampling
from ernie5.generate.session import Decoder, Session
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.model.config import AudioModelConfig, ModelConfig, MoEConfig, VisualModelConfig
from ernie5.records import ModelOutput
from ernie5.tokenizers.visual.quantizer import ScaleCodes, accumulate, quantize_bits
from ernie5.tokenizers.visual.scales import resize_to
from ernie5.tokenizers.vocab import Vocab

VOCAB = Vocab(text_size=256, audio_levels=3, audio_codes=8)
SHAPES = Shapes(bits=4, feature_channels=6, patch_pixels=2, audio_levels=3, audio_codes=8, num_scales=3)
PROMPTS: tuple[tuple[str | list[int], ...], ...] = (
    ("picture", [1, 2]), ([3, 4, 5, 6, 7],), ("sound", "clip"), (), ("clip", [9], "picture", [8]),
)


@pytest.fixture(scope="module", params=["running", "zero"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    visual = VisualModelConfig(bits=4, num_scales=3, patch_pixels=2, encoder_channels=6, vit_width=16, vit_layers=1,
                               vit_heads=2)
    model = build_model(ModelConfig(
        layers=4, width=32, query_heads=2, kv_heads=1, head_width=16, vocab_size=VOCAB.size_head, dense_width=32,
        moe=MoEConfig(num_experts=4, top_k=2, expert_width=16), visual=visual,
        audio=AudioModelConfig(levels=3, codes=8),
    ), seed=0).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() == 2 else 1.0)
    return Decoder(model=model, vocab=VOCAB, shapes=SHAPES, visual_origin=request.param, window_frames=2)


def _begun(parts: Sequence[str | list[int]], *, decoder: Decoder) -> DocumentBuilder:
    """BOS, the parts and SEP; equal calls give equal parts."""
    generator = torch.Generator().manual_seed(4)
    builder = DocumentBuilder("p", task="prompt", vocab=VOCAB, shapes=SHAPES, visual_origin=decoder.visual_origin)
    builder.text([VOCAB.bos])
    for part in parts:
        if part == "sound":
            builder.audio(torch.randint(8, (3, 3), generator=generator), generate=False)
        elif isinstance(part, str):
            frames, height = (8, 2) if part == "clip" else (1, 4)
            pixels = torch.rand(3, frames, 2 * height, 4, generator=generator)
            features = torch.randn(frames, 6, height, 2, generator=generator)
            group = 4 if part == "clip" else 1
            patches = merge_patches(pixels, features=features, frames_per_group=group)
            builder.patches(patches, is_video=part == "clip")
        else:
            builder.text(part)
    builder.text([VOCAB.sep])
    return builder


def _trained(document: Document, *, model: UnifiedModel) -> ModelOutput:
    """The training pass over a document, with padding behind it."""
    with torch.no_grad():
        return model(collate_rows([(document,)], layout=Layout(document.length + 3, VOCAB.pad, 1)))


def _heard(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[torch.Tensor]:
    """What a method of `owner` returns from here on, call by call."""
    results, method = [], getattr(owner, name)

    def spy(self: object, *arguments: object, **named: object) -> torch.Tensor:
        results.append(method(self, *arguments, **named))
        return results[-1]

    monkeypatch.setattr(owner, name, spy)
    return results


def _twins(begin: Callable[[DocumentBuilder], None], *, decoder: Decoder) -> tuple[list[Document], list[Document]]:
    """All prompts, and as many without any part, each begun by `begin`."""
    halves = []
    for prompts in (PROMPTS, ((),) * len(PROMPTS)):
        builders = [_begun(parts, decoder=decoder) for parts in prompts]
        for builder in builders:
            begin(builder)
        halves.append([builder.build() for builder in builders])
    return halves[0], halves[1]


def test_text_behind_mixed_prompts(decoder: Decoder) -> None:
    words = torch.randint(200, (len(PROMPTS), 5), generator=torch.Generator().manual_seed(5))
    session = Session(decoder, prompts=[_begun(parts, decoder=decoder).build() for parts in PROMPTS])
    logits = [session.text_logits(session.read_prompt())]
    logits += [session.text_logits(session.read_text(column)) for column in words.T]
    for row, parts in enumerate(PROMPTS):
        builder = _begun(parts, decoder=decoder)
        builder.text(words[row].tolist())
        builder.text([VOCAB.eos])
        output = _trained(builder.build(), model=decoder.model)
        expected = output.text_hidden[-6:] @ output.text_weight.T
        torch.testing.assert_close(torch.stack(logits, dim=1)[row], expected.detach(), rtol=1e-9, atol=1e-9)


def _codes_of(frames: torch.Tensor, *, canvas: Canvas, chances: list[torch.Tensor]) -> ScaleCodes:
    """The codes that lead to drawn frames [d, f, h, w], from the bits that were likelier in each scale."""
    targets, inputs = [[] for _ in canvas.schedule], [[] for _ in canvas.schedule]
    for frame in range(canvas.num_frames):
        drawn = torch.zeros_like(frames[:, frame])[None]
        for scale, grid in enumerate(canvas.schedule):
            inputs[scale].append(resize_to(drawn, grid).movedim(1, -1))
            bits = quantize_bits(chances[frame * len(canvas.schedule) + scale])
            targets[scale].append(bits.float().unflatten(0, grid)[None])
            drawn = accumulate(drawn, targets[scale][-1])
        torch.testing.assert_close(drawn[0], frames[:, frame])
    return ScaleCodes(tuple(map(torch.cat, targets)), tuple(map(torch.cat, inputs)), frames.permute(1, 2, 3, 0), ())


@pytest.mark.parametrize(("grid", "num_frames"), [((2, 3), 1), ((1, 1), 1), ((3, 2), 4), ((1, 1), 4)])
def test_pictures_and_clips_behind_mixed_prompts(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int], num_frames: int
) -> None:
    canvas = Canvas(grid, num_frames, num_scales=3, sizes=(1, 2, 3), is_video=num_frames > 1)
    prompts, plain = _twins(lambda builder: builder.begin_picture(is_video=canvas.is_video), decoder=decoder)
    logits, scale = _heard(monkeypatch, Session, "bit_logits"), 1.5
    drawn = draw_frames(prompts, unconditional=plain, decoder=decoder, canvas=canvas, choice=BitChoice(0.0, scale))
    found, count = torch.cat(logits, dim=1), len(PROMPTS)
    for row, parts in enumerate([*PROMPTS, *[()] * count]):
        item = row % count
        guided = [(part[item + count] + scale * (part[item] - part[item + count])).float() for part in logits]
        codes = _codes_of(drawn[item], canvas=canvas, chances=guided)
        builder = _begun(parts, decoder=decoder)
        drawing = draw_codes(codes, schedule=canvas.schedule, num_scales=3)
        hidden = {frame: frame + 2 for frame in range(num_frames - 1)}  # window_frames
        builder.draw(drawing, is_video=canvas.is_video, hide_after=hidden)
        builder.finish_picture(is_video=canvas.is_video)
        expected = _trained(builder.build(), model=decoder.model).bit_logits
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-6)  # codes are fp32


def test_speech_behind_mixed_prompts(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    voice = torch.randn(160, generator=torch.Generator().manual_seed(9))

    def begin(builder: DocumentBuilder) -> None:
        builder.speaker(voice)
        builder.begin_audio()

    prompts, plain = _twins(begin, decoder=decoder)
    logits = _heard(monkeypatch, UnifiedModel, "audio_logits_level")
    choice = CodeChoice(Sampling(1.0), max_frames=6, guidance=1.5, seed=1)
    spoken = generate_speech(prompts, unconditional=plain, decoder=decoder, choice=choice)
    found = torch.stack(logits, dim=1).unflatten(1, (-1, 3))
    assert {len(codes) for codes in spoken} != {6}  # some end before the others
    for row, parts in enumerate([*PROMPTS, *[()] * len(PROMPTS)]):
        codes = spoken[row % len(PROMPTS)]
        builder = _begun(parts, decoder=decoder)
        builder.speaker(voice)
        builder.audio(codes, generate=True)
        expected = _trained(builder.build(), model=decoder.model).audio_logits[: found.shape[1]]
        torch.testing.assert_close(found[row, : len(codes)], expected[: len(codes)], rtol=1e-9, atol=1e-9)
        if len(codes) < found.shape[1]:  # the end is drawn at level 1 alone
            torch.testing.assert_close(found[row, len(codes), 0], expected[len(codes), 0], rtol=1e-9, atol=1e-9)
