"""Figures that need generation: captions, transcripts, and the nearest-target tests."""

from __future__ import annotations

import torch

from ernie5.data.examples import PromptPart
from ernie5.data.samples import Sample
from ernie5.evaluate import baselines, matching
from ernie5.evaluate.figures import Figure
from ernie5.evaluate.subject import Subject
from ernie5.generate.prompts import words_of_sample


def measure_captions(subject: Subject) -> list[Figure]:
    """Keywords of validation pictures found in greedy captions, against the likeliest caption words."""
    if not subject.has("image") or not subject.generation.can_read("image"):
        return []
    shown = subject.decoded("image", split="validation", count=subject.config.caption_samples)
    shown = [(sample, picture) for sample, picture in shown if sample.meta.keywords]
    training = [words_of_sample(sample, data=subject.data) for sample in
                subject.samples("image", split="train", count=0)]
    if not shown or not training:
        return []
    texts = subject.generation.write([(PromptPart(image=picture),) for _, picture in shown])
    keywords = [sample.meta.keywords for sample, _ in shown]
    return [_hit_figure("image_to_text_keywords", "Image to text: keywords found", texts, keywords, training)]


def measure_transcripts(subject: Subject) -> list[Figure]:
    """Words of validation transcripts found in greedy transcripts, against the likeliest transcript words."""
    if not subject.has("audio"):
        return []
    heard = subject.decoded("audio", split="validation", count=subject.config.caption_samples)
    training = [sample.meta.transcript or "" for sample in subject.samples("audio", split="train", count=0)]
    if not heard or not training:
        return []
    texts = subject.generation.write([(PromptPart(audio=sound),) for _, sound in heard])
    keywords = [tuple(dict.fromkeys(baselines.words_of(sample.meta.transcript or ""))) for sample, _ in heard]
    return [_hit_figure("audio_to_text_words", "Speech to text: words found", texts, keywords, training)]


def _hit_figure(
    key: str, title: str, texts: list[str], keywords: list[tuple[str, ...]], training: list[str]
) -> Figure:
    """The baseline says as many words as the model on average (at least as many as a training caption has)."""
    said = sum(len(baselines.words_of(text)) for text in texts) / len(texts)
    usual = sum(len(baselines.words_of(text)) for text in training) / len(training)
    constant = baselines.train_unigram_words(training).caption(max(round(said), round(usual), 1))
    hits = [baselines.keyword_hits(text, keywords=words) for text, words in zip(texts, keywords, strict=True)]
    base = [baselines.keyword_hits(constant, keywords=words) for words in keywords]
    return Figure(key, title, sum(hits) / len(hits), sum(base) / len(base), "unigram words", "%", False, len(hits))


def measure_pictures(subject: Subject) -> list[Figure]:
    """Training prompts drawn: is the picture nearer, in encoder features, to its own target than to another one?"""
    if not subject.has("image"):
        return []
    shown = subject.decoded("image", split="train", count=subject.config.match_samples)
    if len(shown) < 2:
        return []
    samples = [sample for sample, _ in shown]
    drawn = subject.generation.draw(_prompts(subject, samples))
    originals = torch.stack([picture for _, picture in shown])
    made, targets = _picture_features(subject, drawn), _picture_features(subject, originals)
    others = matching.other_indices(len(samples), seed=subject.config.seed)
    own = [matching.picture_distance(made[i], right=targets[i]) for i in range(len(samples))]
    other = [matching.picture_distance(made[i], right=targets[j]) for i, j in enumerate(others)]
    title, goal = "Text to image: nearer to its own target", subject.config.nearest_goal
    return [_match_figure("text_to_image_nearest", title, own, other, goal=goal)]


def measure_speech(subject: Subject) -> list[Figure]:
    """Training prompts spoken in their own voice: the same test on quantised codec latents, time-warped."""
    if not subject.has("audio"):
        return []
    sounds = subject.decoded("audio", split="train", count=subject.config.match_samples)
    if len(sounds) < 2:
        return []
    samples = [sample for sample, _ in sounds]
    heard = [subject.generation.maker.hear(sound) for _, sound in sounds]
    spoken = subject.generation.speak(_prompts(subject, samples), speakers=[speech.speaker for speech in heard])
    made = [_speech_features(subject, speech.codes) for speech in spoken]
    targets = [_speech_features(subject, speech.codes) for speech in heard]
    others = matching.other_indices(len(samples), seed=subject.config.seed)
    own = [matching.sequence_distance(made[i], right=targets[i]) for i in range(len(samples))]
    other = [matching.sequence_distance(made[i], right=targets[j]) for i, j in enumerate(others)]
    title, goal = "Text to speech: nearer to its own target", subject.config.nearest_goal
    return [_match_figure("text_to_audio_nearest", title, own, other, goal=goal)]


def _match_figure(key: str, title: str, own: list[float], other: list[float], *, goal: float) -> Figure:
    value = matching.own_is_nearer(own, other=other)
    return Figure(key, title, value, 0.5, "chance", "%", False, len(own), goal=goal)


def _prompts(subject: Subject, samples: list[Sample]) -> list[tuple[PromptPart, ...]]:
    return [(PromptPart(text=words_of_sample(sample, data=subject.data)),) for sample in samples]


@torch.no_grad()
def _picture_features(subject: Subject, images: torch.Tensor) -> torch.Tensor:
    visual = subject.generation.tokenizers.visual
    return torch.cat([visual.encode_frames(part) for part in images.split(subject.config.batch_rows)])


@torch.no_grad()
def _speech_features(subject: Subject, codes: torch.Tensor) -> torch.Tensor:
    audio = subject.generation.tokenizers.audio
    if not len(codes):
        return torch.zeros(0, 1)
    return audio.quantizer.look_up(codes[None])[0]
