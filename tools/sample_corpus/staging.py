"""Write the sources as ordinary files with sidecars, exactly what a user would hand to `ernie5 data build`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from clips import FRAMES_PER_SECOND, MOTIONS, Motion, render_clip
from concepts import Concept, load_font, render, whiten
from encode import encode_clip, encode_image, encode_speech
from PIL import Image
from plan import CutPlan
from speech import ENGLISH_VOICES, RECORDED, Utterance, recorded_prompts, speak_english, speak_mandarin
from tqdm import tqdm

MANDARIN_PITCHES = (35, 50, 65)
SYNTHESIZERS = 3

def write_description(path: Path, description: dict) -> None:
    """Write a json sidecar."""
    path.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")


def describe(concept: Concept) -> dict:
    """What a picture or clip of this emoji shows."""
    captions = [{"language": language, "text": text} for language, text in concept.captions.items()]
    return {
        "language": "en",
        "captions": captions,
        "keywords": list(concept.keywords),
        "group": concept.group,
        "subgroup": concept.subgroup,
    }


def render_concepts(concepts: Iterable[Concept], *, sources: Path) -> list[tuple[Concept, Image.Image]]:
    """The concepts that the font draws in one piece, with their pictures."""
    font = load_font(sources)
    drawn = [(concept, render(concept, font=font)) for concept in tqdm(concepts, desc="draw", unit="emoji")]
    return [(concept, image) for concept, image in drawn if image is not None]


def stage_images(pictures: list[tuple[Concept, Image.Image]], *, folder: Path, plan: CutPlan) -> None:
    """64-pixel pictures; the full cut keeps the transparency, the embedded one lies on white."""
    folder.mkdir(parents=True)
    for concept, picture in tqdm(pictures, desc="pictures", unit="file"):
        small = whiten(picture.resize((64, 64), Image.Resampling.LANCZOS))
        if not plan.transparency:
            white = Image.new("RGBA", small.size, (255, 255, 255, 255))
            small = Image.alpha_composite(white, small).convert("RGB")
        (folder / f"{concept.code}.webp").write_bytes(encode_image(small, colours=plan.image_colours))
        write_description(folder / f"{concept.code}.json", describe(concept) | {"source": "noto-emoji"})


def stage_clips(pictures: list[tuple[Concept, Image.Image]], *, folder: Path, plan: CutPlan) -> None:
    """Each chosen emoji in `plan.motions_per_concept` of the eight motions."""
    folder.mkdir(parents=True)
    chosen = sorted(pictures, key=lambda pair: pair[0].draw("clip"))[: plan.clip_concepts]
    for concept, picture in tqdm(chosen, desc="clips", unit="emoji"):
        for step in range(plan.motions_per_concept):
            motion = MOTIONS[(concept.draw("motion") + 3 * step) % len(MOTIONS)]
            name = f"{concept.code}-{motion.label}"
            frames = render_clip(picture, label=motion.label)
            data = encode_clip(frames, frames_per_second=FRAMES_PER_SECOND, crf=plan.clip_crf)
            (folder / f"{name}.mp4").write_bytes(data)
            write_description(folder / f"{name}.json", _describe_clip(concept, motion=motion))


def _describe_clip(concept: Concept, *, motion: Motion) -> dict:
    captions = [{"language": "en", "text": f"{concept.captions['en']} {motion.english}"}]
    if "zh" in concept.captions:
        captions.append({"language": "zh", "text": f"{concept.captions['zh']}{motion.chinese}"})
    return describe(concept) | {"captions": captions, "motion": motion.label, "source": "noto-emoji"}


def stage_speech(concepts: list[Concept], *, sources: Path, folder: Path, plan: CutPlan) -> None:
    """Recorded prompts and spoken captions."""
    folder.mkdir(parents=True)
    suffix = "flac" if plan.speech_kilobits is None else "opus"
    described = {concept.code: describe(concept) for concept in concepts}
    for utterance in tqdm(_utterances(concepts, sources=sources, plan=plan), desc="speech", unit="file"):
        data = encode_speech(utterance.samples, kilobits=plan.speech_kilobits)
        (folder / f"{utterance.name}.{suffix}").write_bytes(data)
        concept = described.get(utterance.name.split("_")[-1], {})
        shown = {name: concept[name] for name in ("keywords", "group", "subgroup") if name in concept}
        spoken = {"transcript": utterance.transcript, "language": utterance.language, "speaker": utterance.speaker}
        source = "asterisk" if utterance.language in RECORDED else utterance.speaker.split("-")[0]
        write_description(folder / f"{utterance.name}.json", spoken | shown | {"source": source})


def _utterances(concepts: list[Concept], *, sources: Path, plan: CutPlan) -> Iterator[Utterance]:
    for language in RECORDED:
        prompts = recorded_prompts(sources, language=language)
        fitting = [prompt for prompt in prompts if prompt.seconds <= plan.recorded_max_seconds]
        yield from fitting[: plan.recorded_prompts]
    english = sorted(concepts, key=lambda concept: concept.draw("english"))[: plan.english_concepts]
    mandarin = sorted((c for c in concepts if "zh" in c.captions), key=lambda concept: concept.draw("english"))
    with ThreadPool(SYNTHESIZERS) as pool:
        yield from pool.imap(partial(_speak_english, plan=plan), english)
        yield from pool.imap(_speak_mandarin, mandarin[: plan.mandarin_concepts])


def _speak_english(concept: Concept, *, plan: CutPlan) -> Utterance:
    voice = ENGLISH_VOICES[concept.draw("voice") % plan.english_voices]
    return speak_english(concept.captions["en"], name=f"en-{voice}_{concept.code}", voice=voice)


def _speak_mandarin(concept: Concept) -> Utterance:
    pitch = MANDARIN_PITCHES[concept.draw("pitch") % len(MANDARIN_PITCHES)]
    return speak_mandarin(concept.captions["zh"], name=f"zh-{pitch}_{concept.code}", pitch=pitch)
