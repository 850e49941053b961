"""Show what the visual tokenizer keeps of a corpus: pictures, their reconstructions, coarse to fine.

    .venv/bin/python tools/show_visual.py --out reconstructions.png [--tokenizer embedded] [--shards sample]
        [--split validation] [--pixels 64] [--count 12]

One row per picture: the original, then the picture after 1, 2, ... scales. The rows go from the worst to the best
reconstructed of all pictures of the split at equal distances; their PSNR is printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ernie5.errors import Ernie5Error
from ernie5.generate.media import encode_png, write_file
from ernie5.tokenizers.losses import psnr
from ernie5.tokenizers.visual.scales import scale_schedule
from ernie5.tokenizers.visual.tokenizer import VisualTokenizer, load_visual_tokenizer
from ernie5.train.visual_data import load_visual_set, to_unit

BATCH = 32


@torch.no_grad()
def main() -> int:
    """Reconstruct, choose, tile and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--tokenizer", default="embedded", help="`embedded` or a directory (default: embedded)")
    parser.add_argument("--shards", nargs="+", default=["sample"], help="shards or folders (default: sample)")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--count", type=int, default=12, help="rows (default: 12)")
    options = parser.parse_args()
    try:
        tokenizer = load_visual_tokenizer(options.tokenizer)
        found = load_visual_set(tuple(options.shards), split=options.split, pixels=options.pixels, frames=1)
        pictures = to_unit(found.pictures)[:, :, None]
        quality = torch.cat([psnr(tokenizer.reconstruct(part), part) for part in pictures.split(BATCH)])
        order = quality.argsort()
        rows = order[torch.linspace(0, len(order) - 1, min(options.count, len(order))).round().long()]
        write_file(options.out, content=encode_png(tile(tokenizer, pictures[rows])))
    except Ernie5Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.out}: {', '.join(f'{value:.1f}' for value in quality[rows])} dB; "
          f"mean of {len(quality)} pictures {quality.mean():.2f} dB")
    return 0


def tile(tokenizer: VisualTokenizer, pictures: torch.Tensor) -> torch.Tensor:
    """pictures [N, 3, 1, P, P] -> [3, N*P, (1+S)*P]: originals, then reconstructions of 1 … S scales."""
    side = pictures.shape[-1] // tokenizer.stride
    counts = range(1, len(scale_schedule(side, side, sizes=tokenizer.sizes)) + 1)
    columns = [pictures, *(tokenizer.reconstruct(pictures, num_scales=count) for count in counts)]
    wide = torch.cat([column[:, :, 0] for column in columns], dim=-1)
    return torch.cat(list(wide), dim=-2)


if __name__ == "__main__":
    sys.exit(main())
