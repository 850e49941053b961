"""Galleries of the report: what the model made beside its prompt and target, what the tokenizers give back."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from ernie5.errors import DataError
from ernie5.generate.manifest import Gallery, GalleryItem
from ernie5.generate.media import data_uri

# A click pauses; the browser's own controls would cover half of a small clip.
PAUSE = 'onclick="this.paused?this.play():this.pause()"'
TITLES = {
    "text_to_image": ("Text to image", "wide"),
    "text_to_video": ("Text to video", "wide"),
    "text_to_audio": ("Text to speech", "wide"),
    "image_to_text": ("Image to text", "tiny"),
    "video_to_text": ("Video to text", "tiny"),
    "audio_to_text": ("Speech to text", "wide"),
    "text": ("Text, continued", ""),
    "image_reconstruction": ("Pictures through the visual tokenizer", "wide"),
    "video_reconstruction": ("Clips through the visual tokenizer", "wide"),
    "audio_reconstruction": ("Speech through the audio tokenizer", "wide"),
}


def gallery_blocks(gallery: Gallery, *, folder: Path, reconstructions: bool) -> str:
    """HTML of one kind of samples, grouped by task in the order of TITLES; unknown tasks come last."""
    tasks = [item.task for item in gallery.items if item.task.endswith("_reconstruction") == reconstructions]
    order = [task for task in TITLES if task in tasks] + sorted(set(tasks) - set(TITLES))
    return "".join(
        _block(task, items=[item for item in gallery.items if item.task == task], folder=folder) for task in order
    )


def _block(task: str, *, items: Sequence[GalleryItem], folder: Path) -> str:
    title, grid = TITLES.get(task, (task.replace("_", " "), "wide"))
    cards = "".join(f'<div class="card">{_card(item, folder=folder)}</div>' for item in items)
    return f'<h4>{html.escape(title)}</h4><div class="grid {grid}">{cards}</div>'


def _card(item: GalleryItem, *, folder: Path) -> str:
    if item.task == "text":
        return (
            f'<p class="words text">{html.escape(item.prompt)}<mark>{html.escape(item.output)}</mark></p>'
            f'<p class="tag">{html.escape(item.split)} prompt</p>'
        )
    if item.output_file:
        made = "tokenizer" if item.task.endswith("_reconstruction") else "generated"
        sides = [_figure(item.output_file, caption=made, folder=folder)]
        if item.target_file:
            original = _figure(item.target_file, caption="original", folder=folder)
            sides = [original, *sides] if made == "tokenizer" else [*sides, original]
        layout = "one" if Path(item.output_file).suffix == ".wav" else "pair"
        words = f'<p class="prompt">{html.escape(item.prompt)}</p>' if item.prompt else ""
        return f'<div class="{layout}">{"".join(sides)}</div>{words}{_tag(item)}'
    shown = f'<div class="one">{_figure(item.prompt_file, caption="", folder=folder)}</div>' if item.prompt_file else ""
    target = f"<b>reference</b>{html.escape(item.target)}" if item.target else ""
    return f'{shown}<p class="words"><b>model</b>{html.escape(item.output) or "(nothing)"}{target}</p>{_tag(item)}'


def _tag(item: GalleryItem) -> str:
    return f'<span class="tag">{html.escape(item.split)}</span>'


def _figure(name: str, *, caption: str, folder: Path) -> str:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{path} is named in samples.json but does not exist. Make the gallery again.")
    uri = data_uri(path.read_bytes(), suffix=path.suffix)
    if path.suffix == ".mp4":
        body = f'<video src="{uri}" autoplay loop muted playsinline {PAUSE}></video>'
    elif path.suffix == ".wav":
        body = f'<audio src="{uri}" controls preload="metadata"></audio>'
    else:
        body = f'<img src="{uri}" alt="{html.escape(caption)}" loading="lazy">'
    words = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{body}{words}</figure>"
