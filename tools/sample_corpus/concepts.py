"""The emoji as concepts: names, keywords, groups, captions in several languages, and their pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LANGUAGES = ("en", "zh", "it", "ru", "fr", "de", "es", "ja")
SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
GLYPH_SIZE = 109
GLYPH_PIXELS = 136
LINE = re.compile(r"^([0-9A-F ]+?)\s*; fully-qualified\s*# (\S+) E[\d.]+ (.+)$")


@dataclasses.dataclass(frozen=True)
class Concept:
    """One emoji: code (file name), characters, group, subgroup, caption per language, English keywords."""

    code: str
    characters: str
    group: str
    subgroup: str
    captions: dict[str, str]
    keywords: tuple[str, ...]

    def draw(self, purpose: str) -> int:
        """A stable number for choices such as the voice of this concept, one stream per purpose."""
        return int.from_bytes(hashlib.sha256(f"{purpose}:{self.code}".encode()).digest()[:6], "big")


def read_concepts(sources: Path) -> list[Concept]:
    """All fully-qualified emoji without skin tones, in Unicode order (emoji-test.txt and the CLDR annotations)."""
    names = {language: _annotations(sources, language) for language in LANGUAGES}
    concepts, group, subgroup = [], "", ""
    test = sources / "unicode-data/usr/share/unicode/emoji/emoji-test.txt"
    for line in test.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif match := LINE.match(line):
            points = [int(point, 16) for point in match[1].split()]
            if SKIN_TONES.isdisjoint(points):
                concepts.append(_concept(points, match[3], group=group, subgroup=subgroup, names=names))
    return concepts


def _concept(points: list[int], name: str, *, group: str, subgroup: str, names: dict) -> Concept:
    characters = "".join(map(chr, points))
    bare = characters.replace("\ufe0f", "")
    captions = {language: found[bare][0] for language, found in names.items() if found.get(bare, ("", ()))[0]}
    keywords = names["en"].get(bare, ("", ()))[1]
    return Concept(
        code="-".join(f"{point:x}" for point in points if point != 0xFE0F),
        characters=characters,
        group=group,
        subgroup=subgroup,
        captions={"en": name.replace("⊛ ", "")} | captions,
        keywords=tuple(keywords) or tuple(re.findall(r"\w+", name.lower())),
    )


def _annotations(sources: Path, language: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    root = sources / "unicode-cldr-core/usr/share/unicode/cldr/common"
    for folder in ("annotationsDerived", "annotations"):
        for node in ElementTree.parse(root / folder / f"{language}.xml").iter("annotation"):
            name, keywords = found.get(node.attrib["cp"], ("", ()))
            if node.get("type") == "tts":
                name = node.text or ""
            else:
                keywords = tuple(word.strip() for word in (node.text or "").split("|"))
            found[node.attrib["cp"]] = (name, keywords)
    return found


def load_font(sources: Path) -> ImageFont.FreeTypeFont:
    """The Noto colour font at its only bitmap size."""
    path = sources / "fonts-noto-color-emoji/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    return ImageFont.truetype(str(path), GLYPH_SIZE, layout_engine=ImageFont.Layout.RAQM)


def render(concept: Concept, *, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The emoji as a square RGBA picture, or None where the font draws it in several pieces or not at all."""
    left, top, right, bottom = font.getbbox(concept.characters)
    if right - left > GLYPH_PIXELS + 4 or right <= left:
        return None
    image = Image.new("RGBA", (GLYPH_PIXELS, GLYPH_PIXELS), (255, 255, 255, 0))
    place = ((GLYPH_PIXELS - (right - left)) // 2 - left, (GLYPH_PIXELS - (bottom - top)) // 2 - top)
    ImageDraw.Draw(image).text(place, concept.characters, font=font, embedded_color=True)
    return image if image.getchannel("A").getbbox() else None


def whiten(image: Image.Image) -> Image.Image:
    """Put white under fully transparent pixels, so that lossy coding does not ring at the outline."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image).convert("RGB")
    flat.putalpha(image.getchannel("A"))
    return flat
