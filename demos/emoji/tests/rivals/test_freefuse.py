"""FreeFuse against its steps written out: a base's first steps, cores, cosines, balanced areas, and a bound picture."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention import watched, word_map
from diffusers import EulerDiscreteScheduler
from PIL import Image
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline

import mole_diffusers as mole
from mole_diffusers.lora import read_expert
from rivals.freefuse import balanced_argmax, freefuse

PROMPT = "a fox a hat ink"  # a token per letter: "fox" is tokens 2..4, "hat" 6..8
WORDS = {"fox": range(2, 5), "hat": range(6, 9)}
STEPS, FIRST = 6, 2
SUBJECTS = ("fox", "hat")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two subjects and a style, of the UNet alone, so that the base reads the same text."""
    folder, host, ends = tmp_path_factory.mktemp("loras"), tiny_pipeline(), ("to_q", "to_k", "to_v", "to_out.0", "conv1")
    files = {n: tiny_lora(host, folder / f"{n}.safetensors", seed=i, ends=ends) for i, n in enumerate(("fox", "ink", "hat"))}
    return {name: replace(read_expert(path, name), triggers=(name,)) for name, path in files.items()}


def latent(pipe, prompt=PROMPT, *, seeds=(0,), steps=2, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe([prompt] * len(seeds), generator=generators, **call, **options).images


def balanced(maps):
    """The owner of each token, one token and one round after the other."""
    bias, span = [0.0] * len(maps), float(maps.max() - maps.min())

    def owners():
        return [max(range(len(maps)), key=lambda c: float(maps[c, t]) - bias[c]) for t in range(maps.shape[1])]

    for i in range(15):
        found = owners()
        for c in range(len(maps)):
            area, share = found.count(c), maps.shape[1] / len(maps)
            bias[c] += ((area > share) - (area < share)) * 0.01 * span * 0.95**i
    return torch.tensor(owners())


def region_masks(call, row):
    """Mask pictures of fox and hat from one call of the base's UNet, which has maps of 8 x 8 tokens in three layers."""
    attended = torch.stack([word_map(call, row, words, (8, 8)).flatten() for words in WORDS.values()])
    likeness = []
    for c in range(2):
        contrast = 2 * attended[c] - attended[1 - c]
        core = contrast.argsort(descending=True)[:6]  # a tenth of 64
        total = torch.zeros(64)
        for features in call.own:
            z = features[row]
            for p in range(64):
                total[p] += torch.stack([torch.cosine_similarity(z[q], z[p], dim=0) for q in core]).mean()
        likeness.append((total - total.min()) / (total.max() - total.min()))
    owner = balanced(torch.stack(likeness))
    return [Image.fromarray(((owner == c).view(8, 8).numpy() * 255).astype("uint8")) for c in range(2)]


@pytest.mark.parametrize("euler", [False, *thorough(True)])
def test_regions_come_from_a_first_pass_of_the_base(pipe, experts, euler):
    """Each picture of a batch is the bound picture with the regions that its own noise gives."""
    if euler:  # a scheduler that scales what the UNet is given, and counts its steps
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    seeds, wanted = (3, 4), []
    with watched(pipe.unet) as calls:
        latent(pipe, seeds=seeds, steps=STEPS)
    for i, seed in enumerate(seeds):
        fox, hat = region_masks(calls[FIRST - 1], len(seeds) + i)
        binding = {"fox": (None, fox), "hat": (None, hat), "ink": (None, "everywhere")}
        mole.attach(pipe, experts, binding=binding)
        wanted.append(latent(pipe, seeds=[seed], steps=STEPS))
    mixture = mole.attach(pipe, experts, binding=None)
    with freefuse(pipe, mixture, SUBJECTS):
        torch.testing.assert_close(latent(pipe, seeds=seeds, steps=STEPS), torch.cat(wanted), atol=1e-4, rtol=0)


def test_without_two_subjects_there_are_no_regions(pipe, experts):
    mixture = mole.attach(pipe, experts, binding=None)
    for subjects, prompt in ((["fox"], PROMPT), (SUBJECTS, "a fox ink"), (SUBJECTS, "a cat")):
        with mixture.bound(dict.fromkeys(experts, (None, "everywhere"))):
            wanted = latent(pipe, prompt)
        with freefuse(pipe, mixture, subjects):
            torch.testing.assert_close(latent(pipe, prompt), wanted, atol=1e-5, rtol=0)


def test_the_order_of_experts_changes_nothing(pipe, experts):
    found = []
    for names in (list(experts), sorted(experts, reverse=True)):
        mixture = mole.attach(pipe, {name: experts[name] for name in names}, binding=None)
        with freefuse(pipe, mixture, [name for name in names if name in SUBJECTS]):
            found.append(latent(pipe))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_everything_is_given_back_after_an_error(pipe, experts):
    base = latent(pipe)
    mixture = mole.attach(pipe, experts, binding=None)
    before = latent(pipe)

    def stop(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), freefuse(pipe, mixture, SUBJECTS):
        latent(pipe, callback_on_step_end=stop)
    assert mixture.binding is None
    assert not any(m._forward_hooks and name.endswith("attn1") for name, m in pipe.unet.named_modules())
    assert torch.equal(latent(pipe), before)
    mole.detach(pipe)
    assert torch.equal(latent(pipe), base)


def test_a_second_text_encoder_is_refused(pipe, experts):
    mixture = mole.attach(pipe, experts, binding=None)
    other = SimpleNamespace(unet=pipe.unet, text_encoder_2=pipe.text_encoder)
    with pytest.raises(ValueError, match="needs a unet and one text encoder"), freefuse(other, mixture, SUBJECTS):
        pass


def test_areas_are_drawn_to_equal_shares():
    maps = torch.rand(3, 300, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.1], [0.0], [0.0]])
    for each in (maps, maps[:2]):
        found = balanced_argmax(each)
        assert torch.equal(found, balanced(each))
        areas, before = found.bincount(), each.argmax(0).bincount()
        assert areas.float().std() < before.float().std() / 2
