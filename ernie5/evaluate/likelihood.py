"""Figures that need one forward pass per sample: losses, routing, bits per byte, transcripts, bits of clips."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from ernie5.data.config import DataConfig
from ernie5.data.corrupt import encode_scales
from ernie5.data.examples import POOLS
from ernie5.errors import DataError
from ernie5.evaluate import baselines
from ernie5.evaluate.figures import Figure, Loss
from ernie5.evaluate.subject import Subject, keep_text_targets
from ernie5.objectives.mix import losses
from ernie5.records import Batch, Modality, ModelOutput
from ernie5.tokenizers.visual.quantizer import quantize_bits
from ernie5.tokenizers.visual.scales import resize_to, scale_schedule


@dataclasses.dataclass(frozen=True)
class Survey:
    """Losses of the validation split and group_loads [L, 6, E], both weighted like the training mixture.

    group_loads: of the samples as they are; drawn_loads: of the same samples with training's random draws (BPE-dropout,
    corruption, dropped conditions), which is the stream whose mean load the balance bias evens out.
    """

    losses: tuple[Loss, ...]
    group_loads: torch.Tensor
    drawn_loads: torch.Tensor


def survey_validation(subject: Subject) -> Survey:
    """Run samples of every task of the mixture; a task weighs as its share of the training tokens.

    Shares are tokens per task, so sums over a task are divided by its tokens and multiplied by its share.
    """
    nats, targets, raw_targets = torch.zeros(3, 4, dtype=torch.float64)
    loads, drawn_loads = torch.zeros(()), torch.zeros(())
    for task in POOLS:
        for output, batch, weight in _mixture_outputs(subject, task, has_draws=False):
            terms, counts = losses(output, batch), batch.counts()
            for modality in Modality:
                name = modality.name.lower()
                nats[modality] += weight * float(vars(terms)[name])
                targets[modality] += weight * float(vars(counts)[name])
                raw_targets[modality] += float(vars(counts)[name])
            loads = loads + weight * output.routing.group_loads.double().cpu()
        for output, _, weight in _mixture_outputs(subject, task, has_draws=True):
            drawn_loads = drawn_loads + weight * output.routing.group_loads.double().cpu()
    found = tuple(
        Loss(m.name.lower(), float(nats[m] / targets[m]), int(raw_targets[m])) for m in Modality if targets[m] > 0
    )
    return Survey(found, loads, drawn_loads)


def _mixture_outputs(
    subject: Subject, task: str, *, has_draws: bool
) -> Iterator[tuple[ModelOutput, Batch, float]]:
    """Forward passes over the validation samples of a task, with what one of their tokens weighs in the mixture."""
    share = mixture_share(subject.data, task)
    media = [part for part in task.split("_to_") if part in ("image", "video", "audio")]
    media += ["image"] if task == "page" else []
    if share <= 0 or not all(subject.has(part) for part in media):
        return
    documents = subject.documents(
        task, split="validation", count=subject.config.loss_samples, has_draws=has_draws
    )
    if task == "text":
        documents = [subject.cut(document)[0] for document in documents]
    weight = share / max(sum(document.length for document in documents), 1)
    for output, batch in subject.run(documents):
        yield output, batch, weight


def mixture_share(data: DataConfig, task: str) -> float:
    """The share of a task in data.mixture."""
    return float(vars(data.mixture)[task])


def measure_text(subject: Subject) -> list[Figure]:
    """Bits per UTF-8 byte of raw text under one canonical segmentation, against byte models and xz."""
    tokenizer = subject.generation.tokenizers.text
    texts, pieces, num_bytes = [], [], 0
    for sample in subject.shuffled("text", split="validation"):
        if subject.config.text_bytes and num_bytes >= subject.config.text_bytes:
            break
        document = subject.generation.maker.build_document(sample, task="text")
        pieces += [keep_text_targets(piece, num_ids=tokenizer.size) for piece in subject.cut(document)]
        texts.append((sample.meta.text or "").encode("utf-8", "surrogatepass"))
        num_bytes += len(texts[-1])
    if not texts or not subject.refs("text", split="train"):
        return []
    nats = sum(float(losses(output, batch).text) for output, batch in subject.run(pieces))
    value = nats / math.log(2.0) / num_bytes
    training = _training_texts(subject)
    found = []
    for order in (2, 3):
        baseline = baselines.train_byte_model(training, order=order).bits_per_byte(texts)
        found.append((f"order{order}", f"order-{order} byte model", baseline))
    found.append(("xz", "xz -9", baselines.xz_bits_per_byte(texts)))
    return [
        Figure(f"text_bits_per_byte_{key}", f"Text against {name}", value, baseline, name, "bits per byte", True,
               num_bytes, is_goal=key in subject.config.text_goals)
        for key, name, baseline in found
    ]


def _training_texts(subject: Subject) -> list[bytes]:
    texts, num_bytes, limit = [], 0, subject.config.training_text_bytes
    for ref in subject.refs("text", split="train"):
        if limit and num_bytes >= limit:
            break
        texts.append((subject.corpus.read(ref).meta.text or "").encode("utf-8", "surrogatepass"))
        num_bytes += len(texts[-1])
    return texts


def measure_transcript_loss(subject: Subject) -> list[Figure]:
    """Nats per token of a transcript given its speech, against the unigram distribution of training transcripts."""
    if not subject.has("audio"):
        return []
    tokenizer = subject.generation.tokenizers.text
    documents = [
        keep_text_targets(document, num_ids=tokenizer.size)
        for document in subject.documents("audio_to_text", split="validation", count=subject.config.caption_samples)
    ]
    training = [
        tokenizer.encode(sample.meta.transcript or "") for sample in subject.samples("audio", split="train", count=0)
    ]
    validation = [document.text_targets.ids.tolist() for document in documents]
    count = sum(len(ids) for ids in validation)
    if not count or not training:
        return []
    nats = sum(float(losses(output, batch).text) for output, batch in subject.run(documents))
    baseline = baselines.unigram_nats(training, validation=validation, num_ids=tokenizer.size)
    return [
        Figure("audio_to_text_loss", "Speech to text: loss", nats / count, baseline, "unigram tokens",
               "nats per token", True, count)
    ]


def measure_clips(subject: Subject) -> list[Figure]:
    """Bits of every frame but the first, predicted from the true past, against copying the frame before.

    Two baselines: the last frame's bits again; and, much harder, the bits that quantising the last finished frame
    against this frame's own true coarser scales gives, which corrects at each scale what copying got wrong before.
    """
    if not subject.has("video"):
        return []
    maker, sizes = subject.generation.maker, subject.generation.tokenizers.visual.sizes
    right = again = requantised = total = 0.0
    num_clips = 0
    for sample in subject.samples("video", split="validation", count=subject.config.loss_samples):
        try:
            document = maker.build_document(sample, task="text_to_video")
        except DataError:  # as `Subject.documents`
            continue
        latents = maker.features_of(sample, medium="video", purpose="draw").latents
        schedule = scale_schedule(latents.shape[-2], latents.shape[-1], sizes=sizes)
        codes = encode_scales(latents, schedule=schedule, config=None, generator=torch.Generator())
        if len(latents[0]) < 2:
            continue
        for output, batch in subject.run([document]):
            truth = batch.bit_targets.bits.unflatten(0, (latents.shape[1], -1)).cpu()
            guess = (output.bit_logits.float() > 0).float().unflatten(0, (latents.shape[1], -1)).cpu()
        right += float((guess[1:] == truth[1:]).sum())
        again += float((truth[:-1] == truth[1:]).sum())
        requantised += float((_copied_bits(codes.finished, inputs=codes.inputs, schedule=schedule) == truth[1:]).sum())
        total += truth[1:].numel()
        num_clips += 1
    if not total:
        return []
    return [
        Figure(key, title, right / total, copied / total, name, "%", False, num_clips)
        for key, title, copied, name in (
            ("video_next_frame_bits", "Video: bits of the next frame", again, "copying the last frame's bits"),
            ("video_next_frame_bits_requantised", "Video: bits of the next frame, harder baseline", requantised,
             "copying the last frame, re-quantised"),
        )
    ]


def _copied_bits(
    finished: torch.Tensor, *, inputs: tuple[torch.Tensor, ...], schedule: tuple[tuple[int, int], ...]
) -> torch.Tensor:
    """Bits of frames 1.. when each repeats the finished frame before it: [f - 1, cells, d]."""
    before = finished[:-1].movedim(-1, 1)
    bits = [
        quantize_bits(resize_to(before, grid).movedim(1, -1) - known[1:]).flatten(1, 2)
        for grid, known in zip(schedule, inputs, strict=True)
    ]
    return torch.cat(bits, dim=1)
