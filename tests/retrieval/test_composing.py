"""LoRAs that are found for a prompt, composed: selection, mixture, fusion; one prompt or a mixed batch."""

import pytest
import torch
from libraries import WordEncoder
from safetensors.torch import load_file
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline

import mole_diffusers as mole
from mole_diffusers.retrieval import LoraLibrary, RetrievedLora, composed, composing
from mole_diffusers.retrieval.composing import fused
from mole_diffusers.training import save_lora

PROMPTS = ["a fox", "a hat in ink", "a teapot"]


@pytest.fixture(scope="module")
def lora_library(tmp_path_factory):
    """Three LoRAs of one rank, whose alpha / r is 1 / 2, 1 and 2."""
    folder, host = tmp_path_factory.mktemp("loras"), tiny_pipeline()
    for i, name in enumerate(("fox", "hat", "ink")):
        path = tiny_lora(host, folder / f"{name}.safetensors", rank=2, seed=i, size=0.4)
        save_lora(load_file(path), path, alpha=2.0**i, dtype=torch.float32)
    return LoraLibrary.index(folder, WordEncoder())


def pictures(pipe, prompts, seeds, **options):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    options = {"num_inference_steps": 2, "output_type": "np"} | options
    return torch.from_numpy(pipe(prompts, generator=generators, **options).images)


def layer(expert):
    return next(iter(expert.layers["unet"].values()))


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["selection", "mixture", "sum", "fusion"])
def test_a_mixed_batch_is_its_prompts_one_by_one(pipe, lora_library, mode):
    base = pictures(pipe, PROMPTS[2:], [3])
    with composed(lora_library, pipe, PROMPTS, mode=mode) as composition:
        together = pictures(pipe, PROMPTS, [1, 2, 3])
    assert [[each.name for each in row] for row in composition.found] == [["fox"], ["hat", "ink"], []]
    for i, prompt in enumerate(PROMPTS):
        with composed(lora_library, pipe, prompt, mode=mode):
            torch.testing.assert_close(together[i : i + 1], pictures(pipe, [prompt], [i + 1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[2:], base, atol=1e-5, rtol=0)
    assert mole.attached(pipe) is None
    assert torch.equal(pictures(pipe, PROMPTS[2:], [3]), base)


@pytest.mark.parametrize("mode", ["selection", "fusion", *thorough("mixture", "sum")])
def test_one_lora_found_is_that_lora(pipe, lora_library, draw, mode):
    with composed(lora_library, pipe, "a fox", mode=mode):
        found = draw(pipe, "a fox")
    pipe.load_lora_weights(lora_library.folder / "fox.safetensors")
    torch.testing.assert_close(found, draw(pipe, "a fox"), atol=1e-5, rtol=0)


def test_mixture_is_the_mean_gate_and_sum_is_the_plain_sum(pipe, lora_library, draw):
    files = {name: lora_library.folder / f"{name}.safetensors" for name in ("hat", "ink")}
    for mode, gates in (("mixture", "mean"), ("sum", "sum")):
        with composed(lora_library, pipe, PROMPTS[1], mode=mode):
            found = draw(pipe)
        mole.attach(pipe, files, gates)
        torch.testing.assert_close(found, draw(pipe), atol=1e-5, rtol=0)
        mole.detach(pipe)
    with composed(lora_library, pipe, PROMPTS[1], gates="mean", images=2):
        gated = draw(pipe, num_images_per_prompt=2)
    with composed(lora_library, pipe, PROMPTS[1], mode="mixture", images=2) as composition:
        torch.testing.assert_close(gated, draw(pipe, num_images_per_prompt=2), atol=1e-5, rtol=0)
    assert composition.sets == [{"hat": 0.5, "ink": 0.5}]


@pytest.mark.parametrize("mode", ["sum", "fusion"])
def test_loras_that_were_found_by_meaning_act(pipe, tmp_path, draw, monkeypatch, mode):
    """Though the prompt has none of their words, and whatever they were fused into."""
    for i, name in enumerate(("hat", "ink")):
        file = tiny_lora(pipe, tmp_path / f"{name}.safetensors", rank=2, seed=i, size=0.4)
        save_lora(load_file(file), file, alpha=2.0, triggers=f"sks {name}")
    found = [RetrievedLora("hat", 0.9, "a cap"), RetrievedLora("ink", 0.9, "drawn")]
    monkeypatch.setattr(composing, "retrieve_for", lambda *_, **__: found)
    base = draw(pipe, "a cap drawn")
    with composed(LoraLibrary.index(tmp_path, WordEncoder()), pipe, "a cap drawn", mode=mode):
        assert not torch.allclose(draw(pipe, "a cap drawn"), base, atol=1e-3)


@pytest.mark.parametrize("mode", ["sum", "fusion"])
def test_loras_that_were_found_by_a_name_act(pipe, tmp_path, draw, mode):
    """Though the prompt has none of the words in their files."""
    file = tiny_lora(pipe, tmp_path / "hat.safetensors", rank=2, size=0.4)
    save_lora(load_file(file), file, alpha=2.0, triggers="sks")
    base, library = draw(pipe, "a cap"), LoraLibrary.of({"cap": file}, WordEncoder())
    with composed(library, pipe, "a cap", mode=mode) as composition:
        assert composition.found[0][0].trigger == "cap"
        assert not torch.allclose(draw(pipe, "a cap"), base, atol=1e-3)


def test_fusion_is_the_mixture_less_a_quarter_of_the_cross_terms(lora_library):
    one, two = (lora_library.expert(name) for name in ("hat", "ink"))
    (a1, b1), (a2, b2) = ((layer(e).down, layer(e).scale * layer(e).up) for e in (one, two))
    mixture = (b1 @ a1 + b2 @ a2) / 2
    torch.testing.assert_close(layer(fused("both", [one, two])).delta() - mixture, -(b1 - b2) @ (a1 - a2) / 4)
    torch.testing.assert_close(layer(fused("one", [one])).delta(), layer(one).delta())


def test_what_cannot_be_fused_or_composed_says_why(pipe, lora_library, loras):
    fox, ink = (mole.read_expert(loras[name], name) for name in ("fox", "ink"))
    with pytest.raises(ValueError, match=r"fox\+ink cannot be fused: the ranks of layer '.*' are \{'fox': 4, 'ink': 2\}"):
        fused("fox+ink", [fox, ink])
    less = mole.read_expert(tiny_lora(pipe, lora_library.folder.parent / "less.safetensors", rank=2, ends=("to_q",)), "less")
    for pair in ([less, ink], [ink, less]):
        with pytest.raises(ValueError, match="'less': 0.*; use mode 'mixture' or 'sum'"):
            fused("both", pair)
    with (
        pytest.raises(ValueError, match="unknown mode 'best'; known: \\['selection'"),
        composed(lora_library, pipe, "x", mode="best"),
    ):
        pass
    mole.attach(pipe, loras)
    with pytest.raises(ValueError, match="already has a mixture"), composed(lora_library, pipe, "a fox"):
        pass


def test_the_pipeline_comes_back_after_an_exception(pipe, lora_library, draw):
    base = draw(pipe)
    with pytest.raises(RuntimeError, match="stop"), composed(lora_library, pipe, PROMPTS):
        raise RuntimeError("stop")
    assert torch.equal(draw(pipe), base)
