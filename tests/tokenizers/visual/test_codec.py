import dataclasses
import resource
import signal

import pytest
import torch

from ernie5.errors import ConfigError, EnvironmentFault, TokenizerError
from ernie5.tokenizers.config import VisualTokenizerConfig
from ernie5.tokenizers.visual.tokenizer import (
    UNTRAINED,
    VisualTokenizer,
    continue_visual_tokenizer,
    load_visual_tokenizer,
    save_visual_tokenizer,
)


SMALL = VisualTokenizerConfig(stem_channels=8, channels=12, feature_channels=6, decoder_attention=1)


@pytest.fixture
def tokenizer() -> VisualTokenizer:
    torch.manual_seed(0)
    made = VisualTokenizer(SMALL).eval()
    with torch.no_grad():  # make every path count, the zero-initialised temporal ones too
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.requires_grad_(False)


def clip(*, frames: int, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(2, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_shapes_follow_the_strides(tokenizer, frames):
    features = tokenizer.encode_features(clip(frames=frames))
    latents = tokenizer.to_latents(features)
    groups = 1 + (frames - 1) // 4
    assert features.shape == (2, 6, groups, 2, 3) and latents.shape == (2, 16, groups, 2, 3)
    assert tokenizer.decode(latents).shape == (2, 3, frames, 16, 24)
    assert tokenizer.reconstruct(clip(frames=frames)).abs().max() <= 1.0


def test_a_picture_is_exactly_the_first_frame_of_a_clip(tokenizer):
    video = clip(frames=9)
    features = tokenizer.encode_features(video)
    # fp32 sums may be ordered otherwise for other batch sizes
    torch.testing.assert_close(features[:, :, 0], tokenizer.encode_frames(video[:, :, 0]), atol=1e-5, rtol=1e-5)
    latents = tokenizer.quantize(tokenizer.to_latents(features))
    first = tokenizer.decode(latents[:, :, :1])
    torch.testing.assert_close(tokenizer.decode(latents)[:, :, :1], first, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changed", range(9))
def test_encoder_and_decoder_never_look_ahead(tokenizer, changed):
    video = clip(frames=9)
    other = video.clone()
    other[:, :, changed] = 0.0
    group = (changed + 3) // 4
    before, after = tokenizer.encode_features(video), tokenizer.encode_features(other)
    assert torch.equal(before[:, :, :group], after[:, :, :group])
    assert not torch.equal(before[:, :, group], after[:, :, group])


@pytest.mark.parametrize("group", range(3))
def test_the_decoder_never_looks_ahead(tokenizer, group):
    latents = torch.randn(1, 16, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    other = latents.clone()
    other[:, :, group] += 1.0
    before, after = tokenizer.decoder(latents), tokenizer.decoder(other)
    first = 0 if group == 0 else 4 * group - 3
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert not torch.equal(before[:, :, first], after[:, :, first])


def test_a_fresh_codec_treats_the_frames_of_a_clip_as_pictures():
    torch.manual_seed(0)
    fresh = VisualTokenizer(SMALL).eval()
    video = clip(frames=5)
    latents = fresh.to_latents(fresh.encode_features(video))
    alone = fresh.to_latents(fresh.encode_features(video[:, :, 4:5]))
    torch.testing.assert_close(latents[:, :, 1:], alone, atol=1e-5, rtol=1e-5)


def test_samples_of_a_batch_do_not_mix(tokenizer):
    video = clip(frames=5)
    together, alone = tokenizer.encode_features(video), tokenizer.encode_features(video[1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_gradient_from_a_clip():
    torch.manual_seed(0)
    fresh = VisualTokenizer(SMALL)
    latents = fresh.to_latents(fresh.encode_features(clip(frames=5)))
    fresh.decoder(latents).square().mean().backward()
    assert [name for name, p in fresh.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("shape", [(1, 3, 1, 20, 16), (1, 3, 2, 16, 16), (1, 3, 4, 16, 16), (1, 3, 1, 0, 16),
                                   (3, 1, 16, 16), (1, 1, 1, 16, 16)])
def test_sizes_that_the_strides_do_not_divide_are_refused(tokenizer, shape):
    with pytest.raises(TokenizerError):
        tokenizer.encode_features(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"active_from": (0.5, 0.6)}, "must begin with 0"),
        ({"active_bits": (), "active_from": ()}, "must begin with 0"),
        ({"pixel_shares": (0.0, 0.0, 0.0)}, "all zero"),
        ({"channels": 100, "decoder_attention": 1}, "multiple of 32"),
        ({"pixels": (4,), "pixel_shares": (1.0,), "patch": 1, "adversarial_weight": 0.1}, "8 px or more"),
    ],
)
def test_settings_that_ended_training_with_a_bug_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        VisualTokenizerConfig(**changes)


def test_saving_and_loading_gives_the_same_pictures_and_a_stable_identity(tokenizer, tmp_path):
    assert tokenizer.identity == UNTRAINED
    save_visual_tokenizer(tokenizer, tmp_path, dtype=torch.float32)
    loaded, again = load_visual_tokenizer(tmp_path), load_visual_tokenizer(tmp_path / "weights.safetensors")
    assert loaded.identity == again.identity and len(loaded.identity) == 64
    assert torch.equal(loaded.reconstruct(clip(frames=5)), tokenizer.reconstruct(clip(frames=5)))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_damaged_missing_and_foreign_files_are_named(tokenizer, tmp_path):
    with pytest.raises(TokenizerError, match="no visual tokenizer at"):
        load_visual_tokenizer(tmp_path / "nowhere")
    path = save_visual_tokenizer(tokenizer, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_visual_tokenizer(tmp_path)
    path.write_bytes(content.replace(b'\\"kind\\": \\"visual\\"', b'\\"kind\\": \\"sounds\\"'))
    with pytest.raises(TokenizerError, match="not a visual tokenizer"):
        load_visual_tokenizer(tmp_path)


def test_weights_of_another_shape_are_refused(tokenizer, tmp_path):
    from ernie5.tokenizers.weights import load_weights

    save_visual_tokenizer(tokenizer, tmp_path)
    other = VisualTokenizer(dataclasses.replace(SMALL, channels=16))
    with pytest.raises(TokenizerError, match="differ in name or shape"):
        load_weights(tmp_path, kind="visual").fill(other)


@pytest.mark.parametrize("place", ["directory", "embedded"])
def test_a_codec_grows_deeper_without_changing_what_it_shows(tokenizer, tmp_path, place):
    if place == "directory":
        save_visual_tokenizer(tokenizer, tmp_path, dtype=torch.float32)
        place = tmp_path
    trained = load_visual_tokenizer(place)
    deeper = dataclasses.replace(trained.config, decoder_attention=trained.config.decoder_attention + 1)
    grown = VisualTokenizer(deeper).eval()
    continue_visual_tokenizer(grown, place=place)
    # equal but for the order of fp32 sums, which depends on whether gradients are kept
    torch.testing.assert_close(grown.reconstruct(clip(frames=5)), trained.reconstruct(clip(frames=5)),
                               atol=1e-4, rtol=0)
    assert len(grown.state_dict()) > len(trained.state_dict())


def test_a_codec_cannot_shrink_or_be_resized_on_the_way(tokenizer, tmp_path):
    save_visual_tokenizer(tokenizer, tmp_path)
    for other in (dataclasses.replace(SMALL, decoder_attention=0), dataclasses.replace(SMALL, stem_channels=16)):
        with pytest.raises(TokenizerError, match="cannot be continued"):
            continue_visual_tokenizer(VisualTokenizer(other), place=tmp_path)


def test_attention_sees_all_cells_of_its_frame_and_none_of_another(tokenizer):
    block = tokenizer.decoder.attention[0]
    x = torch.randn(4, 12, 3, 5, generator=torch.Generator().manual_seed(3))
    other = x.clone()
    other[1, :, 0, 0] += 1.0
    change = (block(x, frames=2) - block(other, frames=2)).abs().amax(1)
    assert (change[1] > 0).all() and change[0].max() == change[2].max() == change[3].max() == 0


def test_attention_knows_where_a_cell_is(tokenizer):
    out = tokenizer.decoder.attention[0](torch.ones(1, 12, 3, 3), frames=1)
    assert (out[..., 1, 1] - out[..., 0, 0]).abs().max() > 1e-3


def test_a_file_that_may_not_grow_is_refused_in_one_line_and_the_old_one_stays(tokenizer, tmp_path):
    path = save_visual_tokenizer(tokenizer, tmp_path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at its start, said here all the same
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(EnvironmentFault, match="weights.safetensors: the file is larger than .* allows. Choose"):
            save_visual_tokenizer(tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
