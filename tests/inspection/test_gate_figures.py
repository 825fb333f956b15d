"""Figures of gates say what the trace says: read back from the axes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mole_diffusers import Trace
from mole_diffusers.inspection import Contributions, gate_figures

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that matplotlib draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figures, draw = [], FigureCanvasAgg.draw
    monkeypatch.setattr(FigureCanvasAgg, "draw", lambda canvas: figures.append(canvas.figure) or draw(canvas))
    return figures


def test_the_heat_map_has_a_row_per_block_and_a_column_per_step(drawn):
    records = [("text_encoder.x", -1, torch.ones(2))] * 4  # prompts are no steps
    for step in range(3):
        for place in ("unet.one", "unet.two"):
            records.append((place, step, torch.tensor([[step, 2.0], [step, 4.0]]) + (place == "unet.two")))
            records.append((f"{place} (b)", step, torch.zeros(1, 2)))  # layers that lack an expert
    records.append(("unet.once", 0, torch.ones(2)))
    trace = Trace(["a", "b"], SimpleNamespace(), 0, records)
    gate_figures.heat_map(trace, gate_figures.block_places(trace))
    panels = drawn[-1].axes
    assert panels[0].images[0].get_array().tolist() == [[None, 1, 2], [1, 2, 3]]  # at 0 it does not act
    assert panels[1].images[0].get_array().tolist() == [[3, 3, 3], [4, 4, 4]]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["one", "two"]
    assert all(torch.equal(rows, trace.weights(place)) for place, rows in trace.all_weights().items())


def test_many_gates_have_a_row_per_block_with_the_mean_of_those_that_act(drawn):
    """Each gate has a label of its own, also where an attention has several transformer blocks."""
    host, weights = "unet.down_blocks.1.attentions.0.transformer_blocks", torch.rand(2, 48, 1) / 5 + 0.7
    weights[0, :24:2] = 0
    modules = [
        *(f"{host}.{i}.l{n}" for i in range(12) for n in range(2)),
        *(f"{host.replace('1', '2')}.0.l{n}" for n in range(24)),
    ]
    trace = Trace(["a"], SimpleNamespace(), 0, [(m, s, weights[s, i]) for s in (0, 1) for i, m in enumerate(modules)])
    labels = gate_figures.block_places(trace, {"down_blocks.1.attentions.0": "IN04", "down_blocks.2.attentions.0": "IN07"})
    assert list(labels.values()) == [
        *(f"IN04 {i}.l{n}" for i in range(12) for n in range(2)),
        *(f"IN07 l{n}" for n in range(24)),
    ]
    gate_figures.heat_map(trace, labels, locked=[modules[3]])
    panel, bar = drawn[-1].axes
    assert [t.get_text() for t in panel.get_yticklabels()] == ["IN04 (set)", "IN07"]
    wanted = [[weights[0, 1:24:2].mean(), weights[1, :24].mean()], weights[:, 24:].mean((1, 2)).tolist()]
    assert np.allclose(panel.images[0].get_array(), wanted)
    rgb = panel.images[0].to_rgba(np.array([0.8, 1.0, 1.2]))
    assert rgb[0, 2] > rgb[0, 0]  # less than 1 is blue, more is red, and 1 is neither
    assert rgb[2, 0] > rgb[2, 2]
    assert np.ptp(rgb[1, :3]) < 0.01
    assert bar.get_ylim() == pytest.approx((np.min(wanted), 1.05))


def test_shares_are_as_high_as_their_curves(drawn):
    records = [("unet.one", step, torch.tensor([0.98 + step / 50, 1.0])) for step in range(3)]
    trace = Trace(["a", "b"], SimpleNamespace(), 0, records)
    gate_figures.shares(trace, gate_figures.block_places(trace))
    (axes,) = drawn[-1].axes
    curves = np.stack([line.get_ydata() for line in axes.lines])
    assert curves.sum(0) == pytest.approx(1)
    assert axes.get_ylim() == pytest.approx((curves.min() - 0.02, curves.max() + 0.02))


def test_a_loss_is_shown_with_its_mean_and_with_terms_if_there_are_several(drawn):
    rows = [{"step": i, "loss": float(i**2), "a": float(i**2), "b": 0.0} for i in range(18)]
    for terms, labels in (("ab", ["loss", "a", "b", "mean of 3 updates"]), ("a", ["loss", "mean of 3 updates"])):
        gate_figures.losses([{name: row[name] for name in ("step", "loss", *terms)} for row in rows])
        (axes,) = drawn[-1].axes
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == labels
        mean = lines["mean of 3 updates"]
        assert mean.get_ydata()[[0, 1, 2, 17]] == pytest.approx([0, 1 / 2, 5 / 3, (15**2 + 16**2 + 17**2) / 3])
        assert mean.get_linewidth() > lines["loss"].get_linewidth()
    gate_figures.losses(rows[:1])
    assert len(drawn[-1].axes[0].lines) == 4


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
