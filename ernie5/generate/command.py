"""`ernie5 generate CKPT --prompt TEXT --to text|image|video|audio --out FILE`, or `--gallery DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ernie5.config.arguments import CommandParser, add_setting
from ernie5.config.home import in_home
from ernie5.data.decode import decode_audio, decode_image, decode_video
from ernie5.data.examples import PromptPart
from ernie5.data.shards import list_shards, open_corpus
from ernie5.errors import EXIT_DONE, ConfigError, DataError
from ernie5.generate import media
from ernie5.generate.config import GenerateConfig
from ernie5.generate.gallery import GallerySize, write_samples
from ernie5.generate.interleave import Prompt
from ernie5.generate.load import LoadedGeneration, load_generation
from ernie5.generate.prompts import decode_sample

SUFFIXES = {"text": (".txt",), "image": (".png",), "video": (".mp4",), "audio": (".wav",)}
# Command-line name -> field of GenerateConfig.
SETTINGS = {
    "temperature": (float, "temperature"),
    "top-k": (int, "top_k"),
    "top-p": (float, "top_p"),
    "repetition-penalty": (float, "repetition_penalty"),
    "beam": (int, "beam"),
    "guidance": (float, "guidance"),
    "audio-guidance": (float, "audio_guidance"),
    "bit-temperature": (float, "bit_temperature"),
    "audio-temperature": (float, "audio_temperature"),
    "max-tokens": (int, "max_text_tokens"),
    "max-frames": (int, "max_audio_frames"),
    "video-frames": (int, "video_frames"),
    "seed": (int, "seed"),
}


class _Attach(argparse.Action):
    """Collects --prompt, --image, --audio and --video in the order in which they were given: it is theirs."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: str,
                 option_string: str | None = None) -> None:
        namespace.parts.append(((option_string or "").lstrip("-"), values))


def build_parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = CommandParser(
        prog="ernie5 generate",
        description="Write, draw, film or speak. --prompt, --image, --audio and --video may be mixed and repeated; "
        "their order is the order in which the model reads them.",
    )
    parser.add_argument("checkpoint", type=in_home, help="checkpoint, folder of checkpoints, or run directory")
    parser.set_defaults(parts=[])
    parser.add_argument("--prompt", action=_Attach, metavar="TEXT", help="text of the prompt")
    for name, kind in (("image", "a picture"), ("audio", "a sound"), ("video", "a clip")):
        parser.add_argument(
            f"--{name}", action=_Attach, type=in_home, metavar="FILE", help=f"attach {kind} to be understood"
        )
    parser.add_argument("--to", choices=tuple(SUFFIXES), default="text", help="what to make (default: text)")
    parser.add_argument("--out", type=Path, help="file to write: .txt, .png, .mp4 or .wav (text: default is stdout)")
    parser.add_argument("--voice", type=Path, metavar="FILE",
                        help="speak in the voice of this sound (default: the first speaker of the training shards)")
    parser.add_argument("--gallery", type=Path, metavar="DIR",
                        help="instead of a prompt: samples of every modality from the run's shards, for the report")
    parser.add_argument(
        "--data", type=in_home, nargs="+", metavar="SHARDS", help="shards of --gallery (default: those of the run)"
    )
    for option, (kind, field) in SETTINGS.items():
        add_setting(parser, option, schema=GenerateConfig, field=field, kind=kind, section="generate")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code. Raises the errors of ernie5/errors.py."""
    options = build_parser().parse_args(argv)
    check_options(options)
    chosen = vars(options)
    changes = {field: chosen[field] for _, field in SETTINGS.values() if chosen[field] is not None}
    loaded = load_generation(options.checkpoint, changes=changes, device=options.device)
    if options.gallery is not None:
        _make_gallery(loaded, options=options)
        return EXIT_DONE
    prompt = read_prompt(options.parts, loaded=loaded)
    made = _make(loaded, prompt=prompt, options=options)
    if options.out is None:
        print(made.decode("utf-8"))
    else:
        media.write_file(options.out, content=made)
        print(f"{options.to}: {options.out}")
    return EXIT_DONE


def check_options(options: argparse.Namespace) -> None:
    """Refuse what cannot work before a model is loaded; raises ConfigError."""
    if options.gallery is not None:
        return
    if not options.parts:
        raise ConfigError("Nothing to start from. Give --prompt TEXT, --image, --audio or --video, or --gallery DIR.")
    if any(kind == "prompt" and not value for kind, value in options.parts):
        raise ConfigError("--prompt is empty. Write the words to start from, or leave it out beside an attached file.")
    if options.out is None and options.to != "text":
        raise ConfigError(f"--to {options.to} needs --out FILE{SUFFIXES[options.to][0]}; only text goes to the screen.")
    if options.out is not None and options.to != "text" and options.out.suffix not in SUFFIXES[options.to]:
        raise ConfigError(
            f"--out {options.out} does not fit --to {options.to}: its name must end in {SUFFIXES[options.to][0]}."
        )


def read_prompt(parts: Sequence[tuple[str, str]], *, loaded: LoadedGeneration) -> Prompt:
    """Texts and decoded files in the order given; raises DataError for a file that is missing or unreadable."""
    data, prompt = loaded.config.data, []
    for kind, value in parts:
        if kind == "prompt":
            prompt.append(PromptPart(text=value))
            continue
        loaded.generation.require(kind)
        content = read_file(Path(value))
        if kind == "image":
            prompt.append(PromptPart(image=decode_image(content, pixels=data.image_pixels, name=value)))
        elif kind == "video":
            clip = decode_video(content, pixels=data.video_pixels, frames=data.video_frames, name=value)
            prompt.append(PromptPart(video=clip))
        else:
            prompt.append(PromptPart(audio=decode_audio(content, name=value)))
    return tuple(prompt)


def read_file(path: Path) -> bytes:
    """The bytes of an attached file; raises DataError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Attach a file that exists.") from error


def _make(loaded: LoadedGeneration, *, prompt: Prompt, options: argparse.Namespace) -> bytes:
    generation = loaded.generation
    if options.to == "text":
        return generation.write([prompt])[0].encode("utf-8")
    if options.to == "image":
        return media.encode_png(generation.draw([prompt])[0])
    if options.to == "video":
        return media.encode_mp4(generation.film([prompt])[0], frames_per_second=generation.config.frames_per_second)
    generation.require("audio")
    spoken = generation.speak([prompt], speakers=[_voice(loaded, path=options.voice)])[0]
    if not len(spoken.codes):
        raise DataError("The model ended the speech before its first frame. Try another --seed or --audio-temperature.")
    return media.encode_wav(spoken.waveform, sample_rate=generation.tokenizers.audio.sample_rate)


def _voice(loaded: LoadedGeneration, *, path: Path | None) -> torch.Tensor:
    """Speaker features [160] of --voice, or of the first training speech of the run's shards."""
    maker = loaded.generation.maker
    if path is not None:
        return maker.hear(decode_audio(read_file(path), name=str(path))).speaker
    corpus = open_corpus(list_shards(loaded.config.data.shards), split="train")
    if not corpus.samples("audio"):
        raise DataError("The run's shards hold no speech to borrow a voice from. Name a sound with --voice FILE.")
    sample = corpus.read(corpus.samples("audio")[0])
    return maker.hear(decode_sample(sample, medium="audio", data=loaded.config.data)).speaker


def _make_gallery(loaded: LoadedGeneration, *, options: argparse.Namespace) -> None:
    shards = tuple(options.data) if options.data else loaded.config.data.shards
    path = write_samples(options.gallery, generation=loaded.generation, data=loaded.config.data, shards=shards,
                         step=loaded.step, size=GallerySize())
    print(f"samples: {path}")
