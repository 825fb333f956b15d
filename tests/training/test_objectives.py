"""Every term of gate training: its gradient against differences of its value, and its value by another route."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from tiers import thorough
from tiny import tiny_clip, tiny_tokenizer
from transformers import CLIPImageProcessor

import mole_diffusers as mole
from mole_diffusers.training import (
    OBJECTIVES,
    Clip,
    GateTraining,
    RandomBatch,
    Samples,
    TrainingContext,
    TrainingData,
    read_clip,
)
from mole_diffusers.training.config import TERMS, ClipTerm, DistillationTerm, Term
from mole_diffusers.training.denoising import predict
from mole_diffusers.training.gate_trainer import GateTrainer
from mole_diffusers.training.objectives import _advance, _start

TEACH = {"seeds": 2, "steps": 2}
OPTIONS = {
    "single": TEACH,
    "composed": TEACH,
    "base": TEACH,
    "separate": {"steps": 1},
    "denoise": {},
    "clip": {"lengths": (3, 4), "steps": 1},
    "rollout": {"steps": 3},
    "collage": {"pictures": 4, "seeds": 2, "steps": 2},
}


@pytest.fixture
def context(pipe, loras, awake):
    """Two experts with live gates, words, pictures and a CLIP."""
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, mole.GateConfig("mole", total="linear"))
    awake(mixture, size=1.0)
    generator = torch.Generator().manual_seed(5)
    samples = Samples(torch.randn(4, 4, 16, 16, generator=generator), ["a fox", "fox", "ink", "an ink"])
    parts = {"a fox in ink": ["a fox", "ink art"]}
    data = TrainingData(
        {"fox": ["a fox"], "ink": ["ink art"]}, ["a fox in ink"], {"fox": ["cat"]}, ["a cat"], parts=parts, samples=samples
    )
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        model.requires_grad_(False)
    for parameter in mixture.parameters():
        parameter.requires_grad_(True)
    return TrainingContext(pipe, mixture, data, Clip(tiny_clip().requires_grad_(False), tiny_tokenizer()))


def draw_of(seed=0, batch=2, **share):
    return RandomBatch(torch.Generator().manual_seed(seed), batch, **share)


VARIANTS = {
    "composed with a style": ("composed", {}, ("ink",)),
    "rollout without guidance": ("rollout", {"guidance": 1.0, "checkpointing": True}, ()),
}
PLAIN = {name: (name, {}, ()) for name in OBJECTIVES}


@pytest.mark.parametrize(
    ("name", "options", "styles"), [*PLAIN.values(), *thorough(*VARIANTS.values())], ids=[*PLAIN, *VARIANTS]
)
def test_gradient_equals_the_difference_of_values(context, name, options, styles):
    """Along its own gradient a term must change by the gradient's length."""
    context.data = replace(context.data, styles=styles)
    term, parameters = OBJECTIVES[name](context, TERMS[name](**OPTIONS[name] | options)), context.mixture.parameters()
    kept = copy.deepcopy(context.state)

    def value():
        context.state = copy.deepcopy(kept)
        return term(draw_of())

    value().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert length > 1e-5

    def moved(by):
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(by * g / length)
            result = value().double()
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(by * g / length)
        return result

    step = 2e-2
    assert ((moved(step) - moved(-step)) / (2 * step)).item() == pytest.approx(length.item(), rel=0.03)


SHARED = ("single", "denoise")


@pytest.mark.parametrize("name", [*SHARED, *thorough(*(name for name in OBJECTIVES if name not in SHARED))])
def test_shares_of_a_batch_add_up(context, name):
    """The mean over two shares is the value of the whole batch."""
    term = OBJECTIVES[name](context, TERMS[name](**OPTIONS[name]))
    with torch.no_grad():
        whole = term(draw_of(batch=4))
        context.state.clear()
        halves = [term(draw_of(batch=4, index=i, count=2)) for i in range(2)]
    assert torch.stack(halves).mean().item() == pytest.approx(whole.item(), rel=1e-4)


def test_base_term_is_0_without_experts_and_1_for_their_sum(context):
    term, names = OBJECTIVES["base"](context, DistillationTerm(**TEACH)), context.mixture.experts
    with torch.no_grad():
        with context.mixture.fixed({}):
            assert term(draw_of()).item() == pytest.approx(0, abs=1e-6)
        with context.mixture.fixed(dict.fromkeys(names, 1.0)):
            values = [term(draw_of(seed, batch=16)).item() for seed in range(4)]
    assert sum(values) / 4 == pytest.approx(1, rel=0.2)


def test_clip_trajectories_end_and_begin_anew(context):
    term = OBJECTIVES["clip"](context, ClipTerm(lengths=(3, 3), steps=2))
    seen = []
    for _ in range(3):
        term(draw_of())
        seen.append((context.state["clip 0"] or {"at": None})["at"])
    assert seen == [2, 1, None]


def test_a_clip_trajectory_of_another_share_is_not_gone_on_with(context):
    """As where a run on one process resumes on two."""
    loss = OBJECTIVES["clip"](context, ClipTerm(lengths=(3, 3), steps=1))
    loss(draw_of(0, batch=4))
    loss(draw_of(1, batch=4, index=0, count=2))
    assert (context.state["clip 0"]["at"], len(context.state["clip 0"]["x"])) == (1, 2)


@pytest.mark.parametrize("wording", ["captions", "authors"])
def test_the_clip_loss_is_that_of_its_texts_written_out(context, monkeypatch, wording):
    """Picture by picture and template by template, on what the first step of a trajectory gives."""
    templates = (lambda text: f"{text}!", lambda text: f"no {text}", lambda text: text)
    monkeypatch.setattr("open_clip.OPENAI_IMAGENET_TEMPLATES", templates)
    context.data = replace(context.data, composed=["fox ink", "ink fox"])
    term, seen = ClipTerm(lengths=(4, 4), steps=1, wording=wording), []
    image = Clip.image
    monkeypatch.setattr(Clip, "image", lambda clip, pixels: seen.append(image(clip, pixels)) or seen[-1])
    with torch.no_grad():
        found = OBJECTIVES["clip"](context, term)(draw_of(3))
    sources, drawn = seen
    now, total = context.state["clip 0"], 0
    for row in range(2):
        prompt, picture = context.data.composed[now["prompts"][row]], int(now["pictures"][row])
        caption, name = context.data.samples.captions[picture], ("fox", "fox", "ink", "ink")[picture]
        if wording == "authors":
            (text,), direction = context.clip.text([f"a {prompt}"]), 0
            for template in templates:
                end, begin = context.clip.text([template(prompt), template(name)])
                direction = direction + (end - begin) / len(templates)
        else:
            text, begin = context.clip.text([prompt, caption])
            direction = text - begin
        change = drawn[row] - sources[row]
        whole = 1 - (drawn[row] @ text) / (drawn[row].norm() * text.norm())
        turned = 1 - (change @ direction) / (change.norm() * direction.norm())
        total = total - torch.log((2.5 - whole - turned).clamp(1e-3) / 2) / 2
    torch.testing.assert_close(found, total, atol=1e-6, rtol=1e-6)


def test_a_clip_trajectory_equals_ddpm(context):
    """Two routes: the term's own steps, and diffusers' DDPM scheduler with the same noise."""
    now = _start(context, context.clip, draw_of(), ClipTerm(lengths=(4, 4)))
    scheduler = DDPMScheduler.from_config(context.pipe.scheduler.config)
    scheduler.set_timesteps(4)
    x, draw, generator = now["x"], draw_of(9), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen = _advance(context, draw, now)
            now |= {"x": seen, "at": now["at"] + 1}
            x = scheduler.step(
                predict(context.pipe, x, t.expand(2), ["a fox in ink"] * 2), t, x, generator=generator
            ).prev_sample
            torch.testing.assert_close(seen, x, atol=1e-4, rtol=1e-4)


def test_clip_features_equal_transformers_own(tmp_path):
    model = tiny_clip()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    ids = tiny_tokenizer()(["a fox", "ink"], padding="max_length", return_tensors="pt")
    logits = model(pixel_values=pixels, **ids).logits_per_image
    clip = Clip(model, tiny_tokenizer())
    torch.testing.assert_close(clip.scale * clip.image(pixels) @ clip.text(["a fox", "ink"]).T, logits)
    model.save_pretrained(tmp_path)
    CLIPImageProcessor(image_mean=[0.1] * 3, image_std=[0.2] * 3).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    read = read_clip(tmp_path)
    expected = model(pixel_values=(pixels / 2 + 0.4) / 0.2, **ids).logits_per_image
    torch.testing.assert_close(read.scale * read.image(pixels) @ read.text(["a fox", "ink"]).T, expected)
    assert not any(p.requires_grad for p in read.model.parameters())


def test_the_balance_losss_gradient_equals_the_difference_of_values(context):
    """The one term that reads the gates of others: as the loop computes it, with what it is beside held apart."""
    config = GateTraining({"denoise": 1.0, "balance": 1.0}, batch=2, steps=1)
    trainer = GateTrainer(replace(context, config=config))
    trainer.loss_fns = {"denoise": OBJECTIVES["denoise"](context, Term())}

    def value():
        return trainer.losses(0, index=0, shares=1)["balance"]

    parameters = context.mixture.parameters()
    gradients = torch.autograd.grad(value(), parameters, allow_unused=True, materialize_grads=True)
    length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert length > 1e-5
    ends = []
    for by in (2e-2, -2e-2):
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(by * g / length)
        ends.append(value().item())
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(by * g / length)
    assert (ends[0] - ends[1]) / 4e-2 == pytest.approx(length.item(), rel=0.03)
