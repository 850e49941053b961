"""Cached decoding equals running the whole sequence at once, for text, pictures, clips and speech."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie5.data.document import Document, DocumentBuilder, Shapes
from ernie5.generate.audio import CodeChoice, generate_speech
from ernie5.generate.image import BitChoice, Canvas, draw_frames, generate_images
from ernie5.generate.sampling import Sampling
from ernie5.generate.session import CellBlock, Decoder, Session
from ernie5.generate.text import TextLimits, generate_text, search_text
from ernie5.model.backbone import build_model
from ernie5.model.config import AudioModelConfig, ModelConfig, MoEConfig, VisualModelConfig
from ernie5.tokenizers.vocab import Vocab

VOCAB = Vocab(text_size=256, audio_levels=2, audio_codes=16)
SHAPES = Shapes(bits=4, feature_channels=6, patch_pixels=2, audio_levels=2, audio_codes=16, num_scales=3)
CONFIG = ModelConfig(
    layers=3, width=32, query_heads=2, kv_heads=1, head_width=16, vocab_size=VOCAB.size_head, dense_width=32,
    moe=MoEConfig(num_experts=4, top_k=2, expert_width=16),
    visual=VisualModelConfig(bits=4, num_scales=3, patch_pixels=2, encoder_channels=6, vit_width=16, vit_layers=1,
                             vit_heads=2),
    audio=AudioModelConfig(levels=2, codes=16),
)
LIMITS = TextLimits(max_tokens=6, stop_ids=(VOCAB.eos,), num_ids=256)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    model = build_model(CONFIG, seed=0).double().eval()
    with torch.no_grad():
        # Small initial weights make all logits alike; larger ones make choices that a wrong mask would change.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return Decoder(model=model, vocab=VOCAB, shapes=SHAPES)


def _prompt(words: list[int], *, end: list[int] | None = None) -> Document:
    builder = DocumentBuilder("p", task="text", vocab=VOCAB, shapes=SHAPES)
    builder.text([VOCAB.bos, *words, *(end or [])])
    return builder.build()


def _whole(decoder: Decoder, document: Document) -> torch.Tensor:
    """Hidden states [n, D] of a document that is run at once, unpadded and without a cache."""
    session = Session(decoder, prompts=[document])
    hidden = decoder.model.embed(session._batch).detach()
    return decoder.model.run_layers(hidden, positions=document.positions[None], intervals=document.intervals[None])[0]


def test_text_read_token_by_token_beside_a_longer_row_equals_the_whole(decoder: Decoder) -> None:
    rows = [[5, 6, 7], [9] * 11]
    session = Session(decoder, prompts=[_prompt(row) for row in rows])
    states = [session.read_prompt()]
    following = torch.tensor([[1, 2, 3], [4, 200, 100]])
    for column in range(3):
        states.append(session.read_text(following[:, column]))
    for index, row in enumerate(rows):
        whole = _whole(decoder, _prompt(row + following[index].tolist()))[-4:]
        torch.testing.assert_close(torch.cat(states, dim=1)[index], whole, rtol=1e-9, atol=1e-9)


def test_greedy_text_equals_recomputing_every_prefix(decoder: Decoder) -> None:
    rows = [[5, 6, 7], [9] * 11, []]
    written = generate_text([_prompt(row) for row in rows], decoder=decoder, limits=LIMITS, sampling=Sampling())
    for row, ids in zip(rows, written, strict=True):
        text = list(row)
        for _ in range(LIMITS.max_tokens):
            logits = decoder.model.text_logits(_whole(decoder, _prompt(text))[-1])
            best = max([*range(256), VOCAB.eos], key=lambda token: float(logits[token].detach()))
            if best == VOCAB.eos:
                break
            text.append(best)
        assert ids == text[len(row):]


def test_a_beam_of_one_is_greedy_and_a_wide_one_is_at_least_as_likely(decoder: Decoder) -> None:
    prompt = _prompt([5, 6, 7])
    limits = dataclasses.replace(LIMITS, max_tokens=4)
    greedy = generate_text([prompt], decoder=decoder, limits=limits, sampling=Sampling())[0]
    assert search_text(prompt, decoder=decoder, limits=limits, beam=1) == greedy
    never = dataclasses.replace(limits, stop_ids=())
    wide = search_text(prompt, decoder=decoder, limits=never, beam=8)
    narrow = search_text(prompt, decoder=decoder, limits=never, beam=1)
    assert _log_probability(decoder, wide) >= _log_probability(decoder, narrow) - 1e-9


class _Told:
    """A session whose next chances follow from the ids so far: 0, 1 and 2 are words, 3 ends a text."""

    CHANCES = {
        (): (0.6, 0.3, 0.05, 0.05), (0,): (0.99, 0.004, 0.003, 0.003), (1,): (0.05, 0.03, 0.02, 0.9),
        (0, 0): (0.9, 0.01, 0.01, 0.08), (0, 0, 0): (0.01, 0.95, 0.01, 0.03), (0, 0, 0, 1): (0.01, 0.01, 0.01, 0.97),
    }
    device = torch.device("cpu")

    def __init__(self, decoder: object, *, prompts: list[object]) -> None:
        self.texts: list[tuple[int, ...]] = [()] * len(prompts)

    def read_prompt(self) -> list[tuple[int, ...]]:
        return self.texts

    def read_text(self, ids: torch.Tensor) -> list[tuple[int, ...]]:
        self.texts = [(*text, int(token)) for text, token in zip(self.texts, ids, strict=True)]
        return self.texts

    def text_logits(self, texts: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor([self.CHANCES.get(text, (0.25,) * 4) for text in texts]).log()

    def select(self, rows: list[int]) -> None:
        self.texts = [self.texts[row] for row in rows]


def test_a_beam_goes_on_while_an_open_text_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts have ended after three ids, both less likely per id than the one that has not."""
    monkeypatch.setattr("ernie5.generate.text.Session", _Told)
    limits = TextLimits(max_tokens=8, stop_ids=(3,), num_ids=3)
    assert search_text(None, decoder=None, limits=limits, beam=2) == [0, 0, 0, 1]
    assert search_text(None, decoder=None, limits=limits, beam=1) == [0, 0, 0, 1]


def _log_probability(decoder: Decoder, ids: list[int]) -> float:
    hidden = _whole(decoder, _prompt([5, 6, 7, *ids]))
    logits = decoder.model.text_logits(hidden)[:, :256].log_softmax(dim=-1)
    return sum(float(logits[3 + place, token]) for place, token in enumerate(ids))


@pytest.mark.parametrize("window", [0, 1])
def test_a_clip_read_block_by_block_equals_the_whole(decoder: Decoder, window: int) -> None:
    decoder = dataclasses.replace(decoder, window_frames=window)
    from ernie5.data.corrupt import encode_scales
    from ernie5.data.drawing import draw_codes

    schedule = ((1, 1), (2, 2), (3, 4))
    latents = torch.randn(4, 3, 3, 4, generator=torch.Generator().manual_seed(1))
    codes = encode_scales(latents, schedule=schedule, config=None, generator=torch.Generator())
    drawing = draw_codes(codes, schedule=schedule, num_scales=3)
    plan, sizes = drawing.plan, drawing.plan.starts.tolist()
    hide = {frame: frame + window for frame in range(3)} if window else {}
    session = Session(decoder, prompts=[_prompt(row, end=[VOCAB.sep, VOCAB.bov]) for row in ([3], [1, 2, 3, 4])])
    states = [session.read_prompt()]
    for start in sorted(set(sizes)):
        cells = slice(start, start + sizes.count(start))
        place = CellBlock(plan.places[cells, 1:], int(plan.places[start, 0]), int(plan.scales[start]))
        states.append(session.read_cells(drawing.latents[cells].expand(2, -1, -1), block=place, is_video=True))
    states = torch.cat(states, dim=1)
    for index, row in enumerate(([3], [1, 2, 3, 4])):
        builder = DocumentBuilder("p", task="text_to_video", vocab=VOCAB, shapes=SHAPES)
        builder.text([VOCAB.bos, *row, VOCAB.sep])
        builder.draw(drawing, is_video=True, hide_after=hide)
        whole = _whole(decoder, builder.build())[-states.shape[1]:]
        torch.testing.assert_close(states[index], whole, rtol=1e-9, atol=1e-9)


def test_speech_drawn_level_by_level_equals_teacher_forcing(decoder: Decoder) -> None:
    rows = ([3], [1, 2, 3, 4])
    end = [VOCAB.sep, VOCAB.boa]
    choice = CodeChoice(Sampling(), max_frames=3)
    prompts = [_prompt(row, end=end) for row in rows]
    spoken = generate_speech(prompts, unconditional=[], decoder=decoder, choice=choice)
    for row, codes in zip(rows, spoken, strict=True):
        assert codes.shape == (3, 2)
        builder = DocumentBuilder("p", task="text_to_audio", vocab=VOCAB, shapes=SHAPES)
        builder.text([VOCAB.bos, *row, VOCAB.sep])
        builder.audio(codes, generate=True)
        batch = Session(decoder, prompts=[builder.build()])._batch
        # Reading the codes back through the training path must choose the same codes.
        output = decoder.model.forward(dataclasses.replace(batch, mtp_targets=(batch.text_targets,)))
        logits = output.audio_logits[:3]
        assert torch.equal(logits[:, 0].argmax(-1), codes[:, 0])
        assert torch.equal(logits[:, 1, :16].argmax(-1), codes[:, 1])


def test_guidance_of_one_equals_the_condition_alone_even_with_twins(decoder: Decoder) -> None:
    prompts = [_prompt(row, end=[VOCAB.sep, VOCAB.boi]) for row in ([3, 4], [5])]
    plain = [_prompt([], end=[VOCAB.sep, VOCAB.boi])] * 2
    canvas = Canvas(grid=(3, 3), num_frames=1, num_scales=3, sizes=(1, 2, 3), is_video=False)
    alone = generate_images(prompts, unconditional=[], decoder=decoder, canvas=canvas, choice=BitChoice(0.0, 1.0))
    nearly = BitChoice(0.0, 1 + 1e-9)
    twins = generate_images(prompts, unconditional=plain, decoder=decoder, canvas=canvas, choice=nearly)
    torch.testing.assert_close(alone, twins, rtol=1e-6, atol=1e-6)
    guided = generate_images(prompts, unconditional=plain, decoder=decoder, canvas=canvas, choice=BitChoice(0.0, 9.0))
    assert not torch.equal(alone, guided)


def test_without_condition_guidance_changes_nothing(decoder: Decoder) -> None:
    plain = [_prompt([], end=[VOCAB.sep, VOCAB.bov])]
    canvas = Canvas(grid=(2, 2), num_frames=2, num_scales=3, sizes=(1, 2, 3), is_video=True)
    first = draw_frames(plain, unconditional=plain, decoder=decoder, canvas=canvas, choice=BitChoice(0.0, 5.0))
    second = draw_frames(plain, unconditional=[], decoder=decoder, canvas=canvas, choice=BitChoice(0.0, 1.0))
    assert first.shape == (1, 4, 2, 2, 2)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_the_cache_doubles_without_losing_a_token() -> None:
    from ernie5.generate.cache import GrowingCache

    cache, whole = GrowingCache(1), torch.randn(2, 150, 1, 4)
    for start, stop in ((0, 3), (3, 64), (64, 65), (65, 150)):
        keys, values = cache.extend(0, key=whole[:, start:stop], value=-whole[:, start:stop])
    assert torch.equal(keys, whole) and torch.equal(values, -whole) and cache.length(0) == 150
    cache.select([1, 1, 0])
    keys, _ = cache.extend(0, key=whole[[0, 0, 0], :1], value=whole[[0, 0, 0], :1])
    assert torch.equal(keys[:, :150], whole[[1, 1, 0]]) and keys.shape[1] == 151
