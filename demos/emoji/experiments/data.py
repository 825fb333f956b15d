"""Render open emoji sets into one lossless atlas with every subject of the world.

    python demos/emoji/experiments/data.py

This fetches the sets with `npm pack`, renders each icon at 96 x 96 RGBA, and writes `atlas.webp` (lossless), `atlas.json`
(subjects, styles, layout) and `LICENSES.md`.
"""

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import resvg_py
from PIL import Image
from tqdm import tqdm

from mole_world import words

ASSETS = Path(__file__).parents[1] / "mole_world" / "assets"
SIZE, COLUMNS = 96, 36  # more pixels than a subject has in any picture, so that all sizes are sharp
SETS = {  # style word: (npm package, version, licence, authors)
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc., Noto Emoji"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "CC BY 4.0", "Twitter, Twemoji"),
    "joy": ("@iconify-json/emojione", "1.2.3", "CC BY 4.0", "JoyPixels, EmojiOne v2"),
    "glossy": ("@iconify-json/fluent-emoji", "1.2.7", "MIT", "Microsoft Corporation, Fluent Emoji"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation, Fluent Emoji Flat"),
    "ink": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "Microsoft Corporation, Fluent Emoji High Contrast"),
}


def fetch(package: str, version: str, folder: Path) -> dict:
    """The icons of one npm package."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, capture_output=True, text=True, check=True
    )
    with tarfile.open(folder / packed.stdout.strip()) as tar:
        return json.load(tar.extractfile("package/icons.json"))


def render(icons: dict, name: str) -> Image.Image:
    """One icon as SIZE x SIZE RGBA. Raises KeyError if the set does not have it."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {namespaces} viewBox="{box}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def licences() -> str:
    rows = [f"| {s} | {p} {v} | {who} | {licence} |" for s, (p, v, licence, who) in SETS.items()]
    head = f"# Licences of the drawings in atlas.webp\n\nRendered at {SIZE} x {SIZE} pixels, otherwise unchanged.\n\n"
    return head + "| style | package | authors | licence |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        sets = {style: fetch(package, version, Path(tmp)) for style, (package, version, _, _) in SETS.items()}
    cells = [(sets[style], subject.replace(" ", "-")) for subject in words.SUBJECTS for style in SETS]
    atlas = Image.new("RGBA", (COLUMNS * SIZE, -(-len(cells) // COLUMNS) * SIZE))
    for i, (icons, name) in enumerate(tqdm(cells, desc="rendering")):
        atlas.paste(render(icons, name), (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    atlas.save(out / "atlas.webp", lossless=True, method=4)
    layout = {"size": SIZE, "columns": COLUMNS, "subjects": list(words.SUBJECTS), "styles": list(SETS)}
    (out / "atlas.json").write_text(json.dumps(layout, indent=1) + "\n")
    (out / "LICENSES.md").write_text(licences())
    print(f"{len(words.SUBJECTS)} subjects x {len(SETS)} styles in {time.time() - start:.0f} s -> {out / 'atlas.webp'}")


if __name__ == "__main__":
    main()
