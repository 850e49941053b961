"""Who sees whom, by brute force: the gradient of every position by every input, against the words of SPEC section 1."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie5.data.collate import Layout, collate_rows
from ernie5.data.corrupt import encode_scales
from ernie5.data.document import Document, DocumentBuilder, Shapes
from ernie5.data.drawing import draw_codes
from ernie5.data.synthetic import TASKS, synthetic_document
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.model.config import AudioModelConfig, ModelConfig, MoEConfig, MTPConfig, VisualModelConfig
from ernie5.objectives.mix import losses
from ernie5.records import Batch, LossTerms, TokenKind
from ernie5.tokenizers.vocab import Vocab

VOCAB = Vocab(text_size=256, audio_levels=2, audio_codes=8)
SHAPES = Shapes(bits=4, feature_channels=6, patch_pixels=2, audio_levels=2, audio_codes=8, num_scales=4)
HIDDEN_FRAME, HIDDEN_FROM = 0, 2


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    visual = VisualModelConfig(bits=4, num_scales=4, patch_pixels=2, encoder_channels=6, vit_width=16, vit_layers=1,
                               vit_heads=2)
    built = build_model(ModelConfig(
        layers=3, width=32, query_heads=2, kv_heads=1, head_width=16, vocab_size=VOCAB.size_head, dense_width=32,
        moe=MoEConfig(num_experts=4, top_k=2, expert_width=16), mtp=MTPConfig(depth=2), visual=visual,
        audio=AudioModelConfig(levels=2, codes=8),
    ), seed=0).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)
    return built


def _clip_that_hides_a_frame() -> Document:
    schedule, generator = ((1, 1), (2, 2), (2, 3)), torch.Generator().manual_seed(2)
    codes = encode_scales(torch.randn(4, 4, 2, 3), schedule=schedule, config=None, generator=generator)
    builder = DocumentBuilder("hidden", task="text_to_video", vocab=VOCAB, shapes=SHAPES)
    builder.text([VOCAB.bos, 7, VOCAB.sep])
    drawing = draw_codes(codes, schedule=schedule, num_scales=4)
    builder.draw(drawing, is_video=True, hide_after={HIDDEN_FRAME: HIDDEN_FROM})
    builder.finish_picture(is_video=True)
    builder.text([VOCAB.eos])
    return builder.build()


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """One of every task, the clip that hides a frame last."""
    made = [synthetic_document(VOCAB, shapes=SHAPES, task=task, seed=3, text_tokens=3) for task in TASKS]
    return [*made, _clip_that_hides_a_frame()]


def _visible(document: Document) -> torch.Tensor:
    """[n, n] bool, row i sees column j: what stands before, and the own patches of frames or scale of a frame."""
    length, time = document.length, document.positions[:, 0]
    scale = torch.full((length,), -1).index_copy(0, document.visual_cells.rows, document.visual_cells.scales)
    visual = (document.kinds != TokenKind.TEXT) & (document.kinds != TokenKind.AUDIO)
    joined = visual[1:] & visual[:-1] & (time[1:] == time[:-1]) & (scale[1:] == scale[:-1])
    block = torch.cat([torch.zeros(1), (~joined).cumsum(0)])
    place = torch.arange(length)
    visible = (place <= place[:, None]) | (block == block[:, None])
    if document.key == "hidden":
        cells = document.visual_cells.rows
        frame = time[cells] - time[cells[0]]
        visible[cells[frame == HIDDEN_FROM][0]:, cells[frame == HIDDEN_FRAME]] = False
    return visible


def _packed(documents: list[Document]) -> Batch:
    """Two rows with padding at the end."""
    rows = (tuple(documents[::2]), tuple(documents[1::2]))
    longest = max(sum(document.length for document in row) for row in rows)
    return collate_rows(rows, layout=Layout(longest + 3, VOCAB.pad, 2))


def test_every_position_sees_exactly_what_the_specification_lets_it_see(
    model: UnifiedModel, documents: list[Document]
) -> None:
    batch = _packed(documents)
    rows, tokens = batch.token_ids.shape
    inputs = model.layer_inputs(batch.positions, intervals=batch.intervals, kinds=batch.kinds)
    embedded = model.embed(batch).detach().requires_grad_(True)
    added = model.layers[0].attend(embedded, inputs=inputs).flatten(0, 1)
    mixture = torch.randn(added.shape[1], dtype=added.dtype, generator=torch.Generator().manual_seed(1))
    seen = torch.stack([
        torch.autograd.grad(added[row] @ mixture, embedded, retain_graph=True)[0].abs().amax(-1).flatten() > 0
        for row in range(len(added))
    ])
    expected = torch.eye(rows * tokens, dtype=torch.bool)  # padding sees itself
    for number, row in enumerate((documents[::2], documents[1::2])):
        start = number * tokens
        for document in row:
            place = slice(start, start + document.length)
            expected[place, place] = _visible(document)
            start += document.length
    assert torch.equal(seen, expected)


def _learn(model: UnifiedModel, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sums of nats per objective, and the gradients of a mixture of them."""
    model.zero_grad(set_to_none=True)
    output = model(batch)
    terms = losses(output, batch)
    sums = torch.stack([getattr(terms, field.name) for field in dataclasses.fields(LossTerms)])
    ((sums * torch.arange(1, 6)).sum() + output.touched).backward()
    return sums.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_losses_and_gradients_of_packed_documents_are_the_sums_of_those_alone(
    model: UnifiedModel, documents: list[Document]
) -> None:
    packed, gradients = _learn(model, _packed(documents))
    alone = [
        _learn(model, collate_rows([(document,)], layout=Layout(document.length, VOCAB.pad, 2)))
        for document in documents
    ]
    torch.testing.assert_close(packed, sum(sums for sums, _ in alone), rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, sum(own[name] for _, own in alone), rtol=1e-8, atol=1e-9, msg=name)
