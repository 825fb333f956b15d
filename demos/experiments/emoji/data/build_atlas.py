"""Render the open emoji sets into one lossless atlas: every animal, plant and food that the sets drew.

    python demos/experiments/emoji/data/build_atlas.py

Fetches the sets with `npm pack`, renders each icon at 64 x 64 RGBA and writes `atlas.webp` (lossless),
`atlas.json` (subjects, styles, licences, layout) and `LICENSES.md` beside it.
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

ASSETS = Path(__file__).parents[3] / "emoji" / "assets"
SIZE, COLUMNS = 64, 36
SETS = {  # style word: (npm package, version, licence, authors)
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc., Noto Emoji"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "CC BY 4.0", "Twitter, Twemoji"),
    "joy": ("@iconify-json/emojione", "1.2.3", "CC BY 4.0", "JoyPixels, EmojiOne v2"),
    "glossy": ("@iconify-json/fluent-emoji", "1.2.7", "MIT", "Microsoft Corporation, Fluent Emoji"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation, Fluent Emoji Flat"),
    "ink": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "Microsoft Corporation, Fluent Emoji High Contrast"),
}
CATEGORIES = ("Animals & Nature", "Food & Drink")
OPTIONAL = "joy"  # the oldest set: a subject that only it lacks stays, with an empty cell


def fetch(package: str, version: str, folder: Path) -> dict[str, dict]:
    """The JSON files of one npm package, by name."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, capture_output=True, text=True, check=True
    )
    with tarfile.open(folder / packed.stdout.strip()) as tar:
        return {n: json.load(tar.extractfile(f"package/{n}.json")) for n in ("icons", "metadata")}


def names(package: dict[str, dict]) -> set[str]:
    """Every name a set's icon can be asked by, old names included."""
    return set(package["icons"]["icons"]) | set(package["icons"].get("aliases", {}))


def render(icons: dict, name: str) -> Image.Image:
    """One icon as 64 x 64 RGBA; transparent where the set lacks it."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    if name not in icons["icons"]:
        return Image.new("RGBA", (SIZE, SIZE))
    icon = icons["icons"][name]
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {namespaces} viewBox="{box}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def common_subjects(packages: dict[str, dict]) -> list[str]:
    """The animals, plants and foods of noto that every set has drawn; one set may lack some."""
    wanted = {name for category in CATEGORIES for name in packages["noto"]["metadata"]["categories"][category]}
    for style, package in packages.items():
        if style != OPTIONAL:
            wanted &= names(package)
    return sorted(wanted)


def licences() -> str:
    rows = [f"| {s} | {p} {v} | {who} | {licence} |" for s, (p, v, licence, who) in SETS.items()]
    head = "# Licences of the drawings in atlas.webp\n\nRendered at 64 x 64 pixels, otherwise unchanged.\n\n"
    return head + "| style | package | authors | licence |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        packages = {style: fetch(p, v, Path(tmp)) for style, (p, v, _, _) in SETS.items()}
    subjects = common_subjects(packages)
    cells = [(packages[style]["icons"], name) for name in subjects for style in SETS]
    rows = -(-len(cells) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * SIZE, rows * SIZE))
    for i, (icons, name) in enumerate(tqdm(cells, desc="rendering")):
        atlas.paste(render(icons, name), (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    atlas.save(out / "atlas.webp", lossless=True, method=6)
    layout = {"size": SIZE, "columns": COLUMNS, "subjects": [s.replace("-", " ") for s in subjects], "styles": list(SETS)}
    (out / "atlas.json").write_text(json.dumps(layout, indent=1) + "\n")
    (out / "LICENSES.md").write_text(licences())
    print(f"{len(subjects)} subjects x {len(SETS)} styles in {time.time() - start:.0f} s -> {out / 'atlas.webp'}")


if __name__ == "__main__":
    main()
