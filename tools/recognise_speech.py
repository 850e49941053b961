"""Let a speech recogniser judge what the audio codec keeps of spoken words.

    .venv/bin/pip install pocketsphinx jiwer      # the English model lies in the package
    .venv/bin/python tools/recognise_speech.py [--shards sample] [--split validation] [--tokenizer embedded]

Every English clip is recognised as recorded and after the codec at 8, 4, 2 and 1 levels, as one of the split's phrases
(closed) and as any English (open). Phrases with words that the recogniser does not know are left out.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ernie5.data.decode import decode_audio
from ernie5.data.shards import list_shards, open_corpus
from ernie5.errors import Ernie5Error
from ernie5.tokenizers.audio.tokenizer import load_audio_tokenizer

LEVELS = (8, 4, 2, 1)
SILENCE = b"\0" * 9600  # 0.3 s of 16 bits on either side, which the recogniser takes its noise level from


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


@torch.no_grad()
def read_clips(shards: Sequence[str], *, split: str, place: str, known: set[str]) -> list[tuple[list[str], dict]]:
    """(words, 16-bit PCM by version) of every English clip whose words are all `known`."""
    corpus, codec = open_corpus(list_shards(tuple(shards)), split=split), load_audio_tokenizer(place)
    clips = []
    for ref in corpus.samples("audio"):
        sample = corpus.read(ref)
        words = words_of(sample.meta.transcript or "")
        if sample.meta.language != "en" or not words or not known.issuperset(words):
            continue
        wave = decode_audio(sample.media[0].data, name=sample.key)
        codes = codec.encode(torch.nn.functional.pad(wave, (0, -len(wave) % codec.samples_per_frame))[None])
        versions = {"recorded": wave}
        versions |= {f"{n} levels": codec.decode(codes[..., :n])[0, : len(wave)] for n in LEVELS if n <= codec.levels}
        pcm = {name: (w.clamp(-1, 1) * 32767).short().numpy().tobytes() for name, w in versions.items()}
        clips.append((words, pcm))
    return clips


def main() -> int:
    """Recognise every version of every clip, both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--split", "validation"), ("--tokenizer", "embedded")):
        parser.add_argument(name, default=default)
    parser.add_argument("--shards", nargs="+", default=["sample"])
    given = parser.parse_args()
    try:
        from jiwer import wer
        from pocketsphinx import Config, Decoder, get_model_path
    except ImportError:
        parser.error("needs a recogniser and a measure: pip install pocketsphinx jiwer")
    dictionary = (Path(get_model_path()) / "en-us" / "cmudict-en-us.dict").read_text(encoding="utf-8")
    known = {line.split()[0] for line in dictionary.splitlines()}
    try:
        clips = read_clips(given.shards, split=given.split, place=given.tokenizer, known=known)
    except Ernie5Error as error:
        parser.error(str(error))
    if not clips:
        parser.error(f"no English clip in split {given.split} of {', '.join(given.shards)}")
    with tempfile.NamedTemporaryFile("w", suffix=".gram") as grammar:
        phrases = " | ".join(sorted({" ".join(words) for words, _ in clips}))
        grammar.write(f"#JSGF V1.0;\ngrammar g;\npublic <s> = {phrases};\n")
        grammar.flush()
        closed = Decoder(Config(logfn="/dev/null", jsgf=grammar.name, lm=None))
    decoders = {"closed": closed, "open": Decoder(Config(logfn="/dev/null"))}
    print(f"{len(clips)} clips\n| vocabulary | version | phrases right | word error rate |\n|---|---|---:|---:|")
    for kind, decoder in decoders.items():
        for version in clips[0][1]:
            heard = []
            for _, pcm in clips:
                decoder.start_utt()
                decoder.process_raw(SILENCE + pcm[version] + SILENCE, full_utt=True)
                decoder.end_utt()
                heard.append(" ".join(words_of(decoder.hyp().hypstr)) if decoder.hyp() else "")
            spoken = [" ".join(words) for words, _ in clips]
            right = sum(a == b for a, b in zip(spoken, heard, strict=True)) / len(clips)
            print(f"| {kind} | {version} | {right:.1%} | {wer(spoken, heard):.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
