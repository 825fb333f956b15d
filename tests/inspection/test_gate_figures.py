"""Figures of gates say what the trace says: read back from the axes."""

from types import SimpleNamespace

import pytest
import torch

from mole_diffusers.inspection import gate_figures
from mole_diffusers.patching.trace import Trace

pytest.importorskip("matplotlib")


def test_the_heat_map_has_a_row_per_block_and_a_column_per_step(monkeypatch):
    records = [("text_encoder.x", -1, torch.ones(2))] * 4  # prompts are no steps
    for step in range(3):
        for place in ("unet.one", "unet.two"):
            records.append((place, step, torch.tensor([[step, 2.0], [step, 4.0]]) + (place == "unet.two")))
            records.append((f"{place} (b)", step, torch.zeros(1, 2)))  # layers that lack an expert
    records.append(("unet.once", 0, torch.ones(2)))
    trace = Trace(["a", "b"], SimpleNamespace(), records)
    monkeypatch.setattr(gate_figures, "_picture", lambda figure: figure)
    panels = gate_figures.heat_map(trace, gate_figures.block_places(trace)).axes
    assert panels[0].images[0].get_array().tolist() == [[0, 1, 2], [1, 2, 3]]
    assert panels[1].images[0].get_array().tolist() == [[3, 3, 3], [4, 4, 4]]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["one", "two"]
