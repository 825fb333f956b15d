"""Figures of gates say what the trace says: read back from the axes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mole_diffusers.inspection import gate_figures
from mole_diffusers.inspection.contributions import Contributions
from mole_diffusers.patching.trace import Trace

pytest.importorskip("matplotlib")


def test_the_heat_map_has_a_row_per_block_and_a_column_per_step(monkeypatch):
    records = [("text_encoder.x", -1, torch.ones(2))] * 4  # prompts are no steps
    for step in range(3):
        for place in ("unet.one", "unet.two"):
            records.append((place, step, torch.tensor([[step, 2.0], [step, 4.0]]) + (place == "unet.two")))
            records.append((f"{place} (b)", step, torch.zeros(1, 2)))  # layers that lack an expert
    records.append(("unet.once", 0, torch.ones(2)))
    trace = Trace(["a", "b"], SimpleNamespace(), 0, records)
    monkeypatch.setattr(gate_figures, "_picture", lambda figure: figure)
    panels = gate_figures.heat_map(trace, gate_figures.block_places(trace)).axes
    assert panels[0].images[0].get_array().tolist() == [[0, 1, 2], [1, 2, 3]]
    assert panels[1].images[0].get_array().tolist() == [[3, 3, 3], [4, 4, 4]]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["one", "two"]


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((1024, 256), (1024, 256)), ((128, 64), (256, 128)), ((64, 192), (256, 768)), ((300, 1200), (300, 1200))],
)
def test_where_experts_act_is_shown_in_the_pictures_shape(size, wanted):
    """A picture that is white above and black below, with an expert on the right: the same in the figure."""
    picture = Image.new("L", size)
    picture.paste(255, (0, 0, size[0], size[1] // 2))
    found = Contributions(["fox"])
    found.sums[(2, 4)] = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 1, 1]]])
    shown = gate_figures.places(picture, found, shades={"fox": "#FF0000"})["fox: 2 x 4 tokens"]
    assert shown.size == wanted
    left, right = np.split(np.asarray(shown, int), 2, axis=1)
    half = wanted[1] // 2
    assert (left[:half] == 255).all()
    assert (left[half:] == 0).all()
    assert (right[..., 0] > right[..., 1]).all()
