"""Collages: single subjects set side by side, as targets of a composed prompt."""

from dataclasses import replace

import pytest
import torch

import mole_diffusers as mole
from mole_diffusers.training import RandomBatch, Samples, TrainingContext, TrainingData, denoising_loss
from mole_diffusers.training.config import CollageTerm
from mole_diffusers.training.context import experts_in
from mole_diffusers.training.denoising import sample_latents
from mole_diffusers.training.latents import decode, encode_pixels
from mole_diffusers.training.losses import side_by_side
from mole_diffusers.training.objectives import collage, draw_part

PROMPT = "a fox and a hat in ink"
DATA = TrainingData(composed=[PROMPT], parts={PROMPT: ["a fox in ink", "a hat"]})


def test_each_part_is_drawn_by_the_experts_that_it_names(pipe, loras):
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "hat", "ink")}, "mole")
    assert experts_in(mixture, "a fox in ink") == ["fox", "ink"]
    assert experts_in(mixture, "a foxglove") == []
    context, generator = TrainingContext(pipe, mixture, DATA), torch.Generator().manual_seed(1)
    drawn = draw_part(context, "a fox in ink", generator, CollageTerm(seeds=2, steps=2, guidance=2.0))
    mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, "sum")
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = decode(pipe, sample_latents(pipe, noise, ["a fox in ink"] * 2, steps=2, guidance=2.0))
    torch.testing.assert_close(drawn, wanted, atol=1e-5, rtol=1e-5)


def test_the_term_is_the_diffusion_loss_on_collages_and_reaches_the_gates(pipe, loras):
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "hat", "ink")}, "mole")
    context = TrainingContext(pipe, mixture, DATA)
    term = collage(context, CollageTerm(pictures=3, seeds=1, steps=2))
    draw = torch.Generator().manual_seed(0)
    parts = [draw_part(context, part, draw, CollageTerm(seeds=1, steps=2)) for part in DATA.parts[PROMPT]]
    sheet = encode_pixels(pipe, side_by_side(torch.stack(parts)))
    samples = Samples(sheet.repeat(3, 1, 1, 1), [PROMPT] * 3)
    wanted = denoising_loss(pipe, samples, RandomBatch(torch.Generator().manual_seed(5), 4))
    found = term(RandomBatch(torch.Generator().manual_seed(5), 4))
    torch.testing.assert_close(found, wanted)
    gradients = torch.autograd.grad(found, mixture.parameters(), allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)
    with pytest.raises(ValueError, match="collage term needs the parts"):
        collage(replace(context, data=TrainingData(composed=[PROMPT])), CollageTerm())


BOUND = {"fox": "fox", "hat": "hat", "ink": (["ink"], "everywhere")}


def test_in_a_collage_each_bound_expert_acts_in_the_place_of_its_part(pipe, loras):
    mixture = mole.attach(pipe, {n: loras[n] for n in BOUND}, "mole", binding=BOUND)
    data = TrainingData(composed=[PROMPT], parts={PROMPT: ["a fox in ink", "a hat in ink"]})
    term = collage(TrainingContext(pipe, mixture, data), CollageTerm(pictures=3, seeds=1, steps=2))
    found = term(RandomBatch(torch.Generator().manual_seed(5), 4))
    assert mixture.binding["fox"].region == "auto"
    draw = torch.Generator().manual_seed(0)
    context = TrainingContext(pipe, mixture, data)
    parts = [draw_part(context, part, draw, CollageTerm(seeds=1, steps=2)) for part in data.parts[PROMPT]]
    samples = Samples(encode_pixels(pipe, side_by_side(torch.stack(parts))).repeat(3, 1, 1, 1), [PROMPT] * 3)
    losses = []
    for regions in (("left", "right"), ("auto", "auto"), ("right", "left")):
        with mixture.bound({name: (name, region) for name, region in zip(("fox", "hat"), regions, strict=True)}):
            losses.append(denoising_loss(pipe, samples, RandomBatch(torch.Generator().manual_seed(5), 4)))
    torch.testing.assert_close(found, losses[0])
    assert all((found - other).abs() > 1e-5 for other in losses[1:])


@pytest.mark.thorough
def test_what_is_computed_again_is_bound_and_acts_as_it_did(pipe, loras):
    """With gradient checkpointing blocks run again when the layout and the experts that sit out are no longer those."""
    mixture = mole.attach(pipe, {n: loras[n] for n in BOUND}, "mole", binding=BOUND)
    term = collage(TrainingContext(pipe, mixture, DATA), CollageTerm(pictures=3, seeds=1, steps=2))
    before = mixture.binding

    def gradients():
        with mixture.only("fox", "hat"):
            loss = term(RandomBatch(torch.Generator().manual_seed(5), 4))
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in mixture.parameters() if p.grad is not None])
        for parameter in mixture.parameters():
            parameter.grad = None
        return found

    wanted = gradients()
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    torch.testing.assert_close(gradients(), wanted)
    assert wanted.abs().max() > 0
    assert mixture.binding == before
    assert mixture.parts.active == set(BOUND)


def test_an_expert_that_no_part_names_is_refused_before_anything_is_drawn(pipe, loras):
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "hat", "ink")}, "mole")
    data = TrainingData(composed=[PROMPT], parts={PROMPT: ["a fox", "a hat"]})
    with pytest.raises(ValueError, match=r"names \['ink'\] and none of its parts \['a fox', 'a hat'\] does"):
        collage(TrainingContext(pipe, mixture, data), CollageTerm())
