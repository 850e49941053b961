"""Speech: recorded prompts with transcripts (Italian, Russian) and synthesised captions (English, Mandarin)."""

from __future__ import annotations

import dataclasses
import gzip
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from encode import resample_speech

RECORDED = {"it": "it_IT_m_Carlo", "ru": "ru_RU_f_IvrvoiceRU"}
ENGLISH_VOICES = ("slt", "rms", "awb", "kal16")
MAX_SECONDS = 19.5
MIN_SECONDS = 0.4


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One clip to encode: name, language, speaker, transcript, and [n] int16 samples at 16 kHz."""

    name: str
    language: str
    speaker: str
    transcript: str
    samples: np.ndarray

    @property
    def seconds(self) -> float:
        return len(self.samples) / 16_000


def recorded_prompts(sources: Path, *, language: str) -> Iterator[Utterance]:
    """Prompts whose transcript is speech (not a sound in brackets) and that last 0.4 to 19.5 seconds, by name."""
    package = f"asterisk-core-sounds-{language}"
    folder = sources / f"{package}-g722/usr/share/asterisk/sounds/{RECORDED[language]}"
    listing = sources / package / f"usr/share/doc/{package}/core-sounds-{language}.txt.gz"
    for key, sentence in sorted(_transcripts(listing)):
        path = folder / f"{key}.g722"
        if path.is_file():
            samples = resample_speech(str(path), container="g722")
            utterance = Utterance(f"{language}-{_slug(key)}", language, RECORDED[language], sentence, samples)
            if MIN_SECONDS <= utterance.seconds <= MAX_SECONDS:
                yield utterance


def _transcripts(listing: Path) -> Iterator[tuple[str, str]]:
    text = gzip.decompress(listing.read_bytes()).decode("utf-8-sig", errors="replace")
    for line in text.splitlines():
        key, separator, sentence = line.partition(":")
        sentence = sentence.strip()
        if line.startswith(";") or not separator or not re.search(r"\w", sentence) or "\ufffd" in sentence:
            continue
        if not re.search(r"[\[\]<>()]|\?\w", sentence):
            yield key.strip(), sentence


def _slug(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", key)


def speak_english(text: str, *, name: str, voice: str) -> Utterance:
    """flite, 16 kHz voices."""
    wave = subprocess.run(["flite", "-voice", voice, "-t", text, "-o", "/dev/stdout"], capture_output=True, check=True)
    return Utterance(name, "en", f"flite-{voice}", text, _trim(resample_speech(_mend(wave.stdout))))


def speak_mandarin(text: str, *, name: str, pitch: int) -> Utterance:
    """espeak-ng with one of several pitches as its voices."""
    command = ["espeak-ng", "-v", "cmn", "-s", "150", "-p", str(pitch), "--stdout", text]
    wave = subprocess.run(command, capture_output=True, check=True)
    return Utterance(name, "zh", f"espeak-{pitch}", text, _trim(resample_speech(_mend(wave.stdout))))


def _mend(wave: bytes) -> bytes:
    """Write the true lengths into a RIFF header that was streamed to a pipe."""
    start = wave.index(b"data") + 8
    whole, data = (len(wave) - 8).to_bytes(4, "little"), (len(wave) - start).to_bytes(4, "little")
    return wave[:4] + whole + wave[8 : start - 4] + data + wave[start:]


def _trim(samples: np.ndarray, *, keep: int = 800) -> np.ndarray:
    """Cut silence at both ends down to 50 ms."""
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > 200)
    if len(loud) == 0:
        return samples
    return samples[max(0, loud[0] - keep) : loud[-1] + keep]
