"""Makes sdattn_fast/lab/objects/sprites.png: one picture of all pictograms, 64x64 each, eight a row.

npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
python lab/make_sprites.py package/assets
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from sdattn_fast.lab.objects.sprites import NOUNS, SPRITE_SIDE

CODE_POINTS = {
    "apple": "1f34e", "car": "1f697", "balloon": "1f388", "book": "1f4d5", "star": "2b50", "heart": "2764",
    "bird": "1f426", "shirt": "1f455", "dress": "1f457", "cap": "1f9e2", "boot": "1f462", "backpack": "1f392",
    "umbrella": "2602", "bell": "1f514", "banana": "1f34c", "pineapple": "1f34d", "mushroom": "1f344",
    "carrot": "1f955", "hamburger": "1f354", "pizza": "1f355", "fire engine": "1f692", "sailboat": "26f5",
    "airplane": "2708", "rocket": "1f680", "house": "1f3e0", "castle": "1f3f0", "teddy bear": "1f9f8",
    "light bulb": "1f4a1", "snowman": "26c4", "cactus": "1f335", "pine tree": "1f332", "cat": "1f408",
    "elephant": "1f418", "penguin": "1f427", "owl": "1f989", "frog": "1f438", "turtle": "1f422", "whale": "1f433",
    "soccer ball": "26bd", "robot": "1f916",
}  # fmt: skip
COLUMNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    assets = parser.parse_args().assets
    atlas = Image.new("RGBA", (COLUMNS * SPRITE_SIDE, -(-len(NOUNS) // COLUMNS) * SPRITE_SIDE))
    for index, noun in enumerate(NOUNS):
        place = (index % COLUMNS * SPRITE_SIDE, index // COLUMNS * SPRITE_SIDE)
        atlas.paste(_square(_picture(assets, CODE_POINTS[noun])), place)
    to = Path(__file__).parents[1] / "sdattn_fast" / "lab" / "objects" / "sprites.png"
    atlas.save(to, optimize=True)
    print(f"{to}: {to.stat().st_size / 1000:.0f} kB")


def _picture(assets: Path, code_point: str) -> Image.Image:
    """Some names have a variation selector behind the code point."""
    paths = [assets / f"{code_point}{selector}.webp" for selector in ("", "-fe0f")]
    return Image.open(next(path for path in paths if path.exists())).convert("RGBA")


def _square(picture: Image.Image) -> Image.Image:
    """Without its margin, in the middle of a square."""
    picture = picture.crop(picture.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
