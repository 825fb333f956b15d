"""LoRAtorio against its formula, written out patch by patch."""

import pytest
import torch
from one_step import after_a_step, latents, predictions
from tiers import thorough

import mole_diffusers as mole
from rivals.loratorio import loratorio

SEEDS = (3, 4)


def composed(base, experts, patch, temperature):
    """base [2 B, C, H, W], experts [N] of these; the first half is unconditional."""
    out, pictures = torch.zeros_like(base), len(base) // 2
    for b in range(pictures):
        for top in range(0, base.shape[2], patch):
            for left in range(0, base.shape[3], patch):
                here = (slice(None), slice(top, top + patch), slice(left, left + patch))
                of_base = base[pictures + b][here].flatten()
                scores = []
                for expert in experts:
                    own = expert[pictures + b][here].flatten()
                    scores.append(-(own @ of_base) / (own.norm() * of_base.norm()) / temperature)
                total = sum(score.exp() for score in scores)
                for expert, score in zip(experts, scores, strict=True):
                    share = score.exp() / total
                    out[pictures + b][here] += share * expert[pictures + b][here]
                    out[b][here] += 0.5 * share * expert[b][here]
                out[b][here] += 0.5 * base[b][here]
    return out


@pytest.mark.parametrize(("patch", "temperature"), [(3, 0.02), *thorough((4, 1.0), (16, 0.1))])
def test_it_is_the_formula_written_out(pipe, loras, patch, temperature):
    """Patches of 3 do not divide the picture's 16."""
    base, given = predictions(pipe, {}, seeds=SEEDS)
    experts = [predictions(pipe, {name: loras[name]}, seeds=SEEDS)[0] for name in ("fox", "ink")]
    mixture = mole.attach(pipe, {name: loras[name] for name in ("fox", "ink")}, binding=None)
    with loratorio(pipe, mixture, patch=patch, temperature=temperature):
        found = latents(pipe, seeds=SEEDS)
    wanted = after_a_step(pipe, composed(base, experts, patch, temperature), given, 3.0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)
    mean = after_a_step(pipe, sum(experts) / 2, given, 3.0)
    assert (found - mean).abs().max() > 1e-2


def test_without_guidance_one_lora_is_that_lora(pipe, loras):
    mixture = mole.attach(pipe, {"fox": loras["fox"]}, binding=None)
    alone = latents(pipe, guidance=1.0, num_inference_steps=2)
    with loratorio(pipe, mixture):
        torch.testing.assert_close(latents(pipe, guidance=1.0, num_inference_steps=2), alone, atol=1e-6, rtol=0)
    assert torch.equal(latents(pipe, guidance=1.0, num_inference_steps=2), alone)
