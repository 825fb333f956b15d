"""Pictures of results: the comparison grid."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 6


def grid(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], labels: Sequence[str], *, cell: int = 128
) -> Image.Image:
    """Pictures in a table with a label over each column and before each row.

    Args:
        rows: one sequence of pictures per row, as many as `columns`.
        cell: side of a cell in pixels; small pictures are enlarged without smoothing.
    """
    if any(len(row) != len(columns) for row in rows) or len(rows) != len(labels):
        raise ValueError(f"{[len(r) for r in rows]} pictures do not fill {len(labels)} rows of {len(columns)} columns")
    font = ImageFont.load_default(14)
    left = max((int(font.getlength(text)) for text in labels), default=0) + 2 * MARGIN
    top = 14 + 3 * MARGIN
    width, height = left + len(columns) * (cell + MARGIN), top + len(rows) * (cell + MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for c, text in enumerate(columns):
        draw.text((left + c * (cell + MARGIN) + cell // 2, MARGIN), _fitted(text, cell, font), "black", font, anchor="ma")
    for r, row in enumerate(rows):
        y = top + r * (cell + MARGIN)
        draw.text((MARGIN, y + cell // 2), labels[r], "black", font, anchor="lm")
        for c, image in enumerate(row):
            filter_ = Image.Resampling.NEAREST if image.width < cell else Image.Resampling.LANCZOS
            sheet.paste(image.resize((cell, cell), filter_), (left + c * (cell + MARGIN), y))
    return sheet


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-1]
    return text
