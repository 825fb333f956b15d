"""Embeddings that prompts name as embedding:NAME: against diffusers' own loading, and what is no embedding."""

import dataclasses

import hosts
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiers import thorough
from tiny import tiny_pipeline

from mole_app.studio import embeddings
from mole_app.studio.as_code import as_code
from mole_app.studio.catalog import Catalog
from mole_app.studio.model_folders import files_of
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio

TRAINED = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def folder(tmp_path):
    save_file({"emb_params": TRAINED}, tmp_path / "easy negative.safetensors")
    save_file({"<x>": TRAINED[0].clone()}, tmp_path / "Face-1.5.safetensors")
    save_file({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, tmp_path / "xl.safetensors")
    save_file({"emb_params": TRAINED, "other": TRAINED[:1, :8].clone()}, tmp_path / "odd.safetensors")
    save_file({"emb_params": TRAINED * torch.nan}, tmp_path / "nan.safetensors")
    return tmp_path


@pytest.fixture
def studio(folder, loras):
    files = {name: loras[name] for name in ("fox", "ink")}
    return Studio(tiny_pipeline(), Catalog(files, {}, files={"embedding": files_of(folder, "embedding")}), "tiny")


def draw(studio, recipe):
    return np.asarray(studio.draw(recipe), int)


@pytest.mark.parametrize("lora", ["", " <lora:fox:1>"])
def test_a_prompt_is_drawn_as_diffusers_draws_it_and_the_next_one_as_before(studio, lora):
    plain = studio.complete(Recipe(f"a fox{lora}", steps=2, seed=1, guidance=3.0))
    before, words = draw(studio, plain), len(studio.base.pipe.tokenizer)
    prompts = {"prompt": f"a (fox:1.2), embedding:face-1.5{lora}", "negative": "blur, embedding:Easy Negative."}
    recipe = studio.complete(dataclasses.replace(plain, **prompts))
    assert set(recipe.embeddings) == {"Face-1.5", "easy negative"}
    drawn = draw(studio, recipe)
    assert len(studio.base.pipe.tokenizer) == words == len(studio.base.pipe.text_encoder.get_input_embeddings().weight)
    assert np.array_equal(draw(studio, plain), before)
    theirs = Studio(tiny_pipeline(), studio.catalog, "tiny")
    theirs.base.pipe.load_textual_inversion({"zwface": TRAINED[0]}, token="zwface")
    theirs.base.pipe.load_textual_inversion({"zwneg": TRAINED}, token="zwneg")
    same = {"prompt": f"a (fox:1.2), zwface{lora}", "negative": "blur, zwneg."}
    assert np.abs(draw(theirs, theirs.complete(dataclasses.replace(plain, **same))) - drawn).max() <= 1
    assert np.abs(drawn - before).max() > 3
    assert 'files={"embedding": files_of(".", "embedding")}' in as_code(recipe)


@pytest.mark.parametrize("host", ["sdxl", *thorough("flux", "sd3")])
def test_each_text_encoder_reads_its_own_vectors(host, tmp_path):
    pipe, _ = hosts.HOSTS[host]()
    widths = {model.config.hidden_size for model in embeddings._encoders(pipe).values()}
    save_file({f"clip_{width}": torch.ones(1, width) for width in widths}, tmp_path / "own.safetensors")
    with embeddings.taught(pipe, {"own": tmp_path / "own.safetensors"}) as words:
        for part, model in embeddings._encoders(pipe).items():
            tokenizer = getattr(pipe, part.replace("text_encoder", "tokenizer"))
            (row,) = tokenizer(words["own"], add_special_tokens=False).input_ids
            assert torch.equal(model.get_input_embeddings().weight[row], torch.ones(model.config.hidden_size))
    assert words["own"] not in tokenizer.get_added_vocab()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("embedding:fase", "there is no embedding 'fase'; known: Face-1.5, easy negative, nan, odd, xl"),
        (
            "embedding:xl",
            "the embedding 'xl' is for another kind of model: StableDiffusionPipeline reads vectors of 16",
        ),
        ("embedding:odd", "'odd' is no embedding: it should have one tensor for each text encoder"),
        ("embedding:nan", "'nan' is no embedding: it should have 1 to 75 vectors of finite numbers"),
    ],
)
def test_what_is_no_embedding_is_refused(studio, prompt, message):
    with pytest.raises(ValueError, match=message):
        studio.draw(studio.complete(Recipe(prompt, steps=1)))


def test_a_recipe_knows_its_embeddings_by_their_tensors(studio, folder):
    recipe = studio.complete(Recipe("embedding:easy negative", steps=1))
    assert studio.complete(recipe).embeddings == recipe.embeddings
    save_file({"emb_params": TRAINED + 1}, folder / "easy negative.safetensors")
    other = Studio(studio.base.pipe, Catalog({}, {}, files=studio.catalog.files), "tiny")
    with pytest.raises(ValueError, match="the embedding 'easy negative' here is another file than the recipe's"):
        other.complete(recipe)
    with pytest.raises(ValueError, match="nowhere is not there; give the folder of embedding files"):
        files_of(folder / "nowhere", "embedding")
