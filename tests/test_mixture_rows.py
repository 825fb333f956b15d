"""Batches whose rows have experts of their own: one call is the separate calls."""

import pytest
import torch
from gate_types import size
from tiers import thorough

import mole_diffusers as mole
from mole_diffusers import functional
from mole_diffusers.gates import GATE_TYPES, GateConfig

PROMPTS = ["a fox", "ink", "a hat in ink"]
SETS = [{"fox": 1.0}, {"ink": -0.7, "fox": 0.5}, {"hat": 1.3, "ink": 0.4, "fox": 0.2}]
VARIANTS = [
    *map(GateConfig, GATE_TYPES),
    GateConfig("static", total="sigmoid", bins=2),
    GateConfig("mole", total="1"),
    GateConfig("mole", granularity="model"),
    GateConfig("mole", granularity="matrix", total="linear"),
    GateConfig("flow", start="mean"),
    GateConfig("prompt", axis="both", total="1"),
    GateConfig("rank", top=3),
]


def pictures(pipe, prompts, seeds, **options):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    options = {"num_inference_steps": 2, "output_type": "np", "negative_prompt": ["blurry"] * len(prompts)} | options
    return torch.from_numpy(pipe(prompts, generator=generators, **options).images)


@pytest.mark.parametrize(
    ("config", "guidance"),
    [
        *thorough((GateConfig("mole"), 1.0)),
        *((c, 5.0) for c in VARIANTS if c.gate_type == "flow"),
        *thorough(*((c, 5.0) for c in VARIANTS if c.gate_type != "flow")),
    ],
)
def test_rows_see_only_their_experts(pipe, loras, awake, config, guidance):
    pipe.to(dtype=torch.float64)  # where the best ranks do not change places by rounding
    mixture = mole.attach(pipe, {n: (f, 0.9) for n, f in loras.items()}, config)
    awake(mixture, size=size(config.gate_type))
    with mixture.rows(SETS):
        together = pictures(pipe, PROMPTS, [1, 2, 3], guidance_scale=guidance)
    for i, chosen in enumerate(SETS):
        for name in loras:
            mixture.strength(name, 0.9 * chosen.get(name, 0.0))
        apart = pictures(pipe, PROMPTS[i : i + 1], [i + 1], guidance_scale=guidance)
        torch.testing.assert_close(together[i : i + 1], apart, atol=1e-5, rtol=0)


def test_pictures_of_a_prompt_share_its_set_and_an_empty_set_is_the_base(pipe, loras):
    base = pictures(pipe, PROMPTS[:1], [1, 2], num_images_per_prompt=2)
    mixture = mole.attach(pipe, loras)
    with mixture.rows([{}, {"ink": 1.0}], images=2):
        together = pictures(pipe, PROMPTS[:2], [1, 2, 3, 4], num_images_per_prompt=2)
    with mixture.only("ink"):
        ink = pictures(pipe, PROMPTS[1:2], [3, 4], num_images_per_prompt=2)
    torch.testing.assert_close(together, torch.cat([base, ink]), atol=1e-5, rtol=0)


def test_fixed_weights_go_by_rows_too(pipe, loras):
    mixture = mole.attach(pipe, loras, "mole")
    with mixture.fixed({"fox": 0.5, "ink": 2.0}), mixture.rows([{"fox": 1.0}, {"ink": 1.0}]):
        together = pictures(pipe, PROMPTS[:2], [1, 2])
    with mixture.fixed({"fox": 0.5}):
        torch.testing.assert_close(together[:1], pictures(pipe, PROMPTS[:1], [1]), atol=1e-5, rtol=0)
    with mixture.fixed({"ink": 2.0}):
        torch.testing.assert_close(together[1:], pictures(pipe, PROMPTS[1:2], [2]), atol=1e-5, rtol=0)


def test_rows_restore_and_refuse_what_does_not_fit(pipe, loras, draw):
    mixture = mole.attach(pipe, loras)
    before = draw(pipe)
    with pytest.raises(ValueError, match="experts with their factors, .* got {'fox'}"), mixture.rows([{"fox"}]):
        pass
    for sets, images, got in (([], 1, "got 0 and 1"), (SETS, 0, "got 3 and 0")):
        with pytest.raises(ValueError, match=f"1 or more prompts and 1 or more pictures, {got}"):
            mixture.rows(sets, images=images)
    with pytest.raises(ValueError, match="unknown expert 'cat'"), mixture.rows([{"cat": 1.0}]):
        pass
    with pytest.raises(ValueError, match="sets for 3 prompts x 1 pictures do not divide a batch of 1 rows"):  # noqa: SIM117
        with mixture.rows(SETS):
            draw(pipe)
    assert torch.equal(draw(pipe), before)


def test_batch_rows_by_hand():
    table = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    expected = [[1, 0], [1, 0], [0.5, 0.5], [0.5, 0.5]] * 2  # two pictures each, then guidance's second half
    assert functional.rows_per_prompt(table, 8, 2).tolist() == expected


def test_a_row_of_tokens_takes_its_row_s_mask():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    weights = functional.gate_weights(torch.zeros(2, 5, 3), mask, "N")  # [B, T, N]
    assert torch.equal(weights, mask[:, None].expand(2, 5, 3).float())
