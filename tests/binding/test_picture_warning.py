"""Warnings about pictures, as a script shows them: with Python's own filters."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import warnings
import mole_diffusers as mole
from tiny import tiny_lora, tiny_pipeline

pipe, folder = tiny_pipeline(), {folder!r}
mole.attach(pipe, {{"fox": tiny_lora(pipe, folder + "/fox.safetensors")}}, binding={{"fox": "fox"}})
for _ in range(3):
    pipe("an owl", num_inference_steps=1, output_type="latent")
warnings.simplefilter("ignore")
pipe("an owl", num_inference_steps=1, output_type="latent")
"""


def test_what_does_not_act_is_said_of_each_picture_unless_it_is_filtered(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(tmp_path))],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[1],  # where tiny.py is
    )
    assert run.stderr.count("expert 'fox' acts everywhere") == 3
