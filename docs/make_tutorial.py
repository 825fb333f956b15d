"""The pictures of tutorial.md, by running its code.

python docs/make_tutorial.py
"""

import os
import re
import tempfile
from pathlib import Path

import torch
from PIL import Image

DOCS = Path(__file__).parent


def main() -> None:
    """Run the blocks in a folder that goes away, and keep the pictures."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.DOTALL))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        exec(compile(code, "tutorial.md", "exec"), {})
        for path in Path(work).glob("tutorial_*.png"):
            with Image.open(path) as image:
                image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(DOCS / path.name, optimize=True)
        os.chdir(DOCS)


if __name__ == "__main__":
    main()
