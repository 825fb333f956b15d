"""What the emoji world's base is trained with, its latents and its optimizer, and how its judge is written."""

from copy import deepcopy

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from mole_world import Drawings, default_folder, emoji_world, words
from mole_world.judge import Judge, Labels

LABELS = Labels(("fox", "owl", "bat", "pig", "ant"), ("ink", "noto"), ("white", "blue", "grey"), ("day", "night"))


def test_the_base_learns_the_latents_that_the_autoencoder_gives(script):
    drawings, rng, random = Drawings(default_folder()), np.random.default_rng(1), script("random_scenes")
    scenes = [random.draw_scene(words.SUBJECTS, words.STYLES, rng, count=1) for _ in range(6)]
    pictures = script("loop").to_tensor([random.random_picture(drawings, scene, rng) for scene in scenes])
    autoencoder = AutoencoderKL.from_pretrained(drawings.folder / "base" / "vae", dtype=torch.float32)
    with torch.no_grad():
        encoded = autoencoder.encode(pictures).latent_dist.mean * autoencoder.config.scaling_factor
    assert (encoded - script("encoder").patches(drawings)(pictures)).square().mean() < 1e-4


def test_every_subject_and_base_style_is_one_token_with_the_number_that_the_weights_know(script):
    tokenizer = script("train_base").load_tokenizer()
    named = {part for word in (*words.SUBJECTS, *words.BASE_STYLES, *words.BACKGROUNDS) for part in word.split()}
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in named)
    caption = tokenizer("a bat and a pig", add_special_tokens=False).input_ids
    assert caption == [71, 514, 124, 71, 612]  # trained anew, a tokenizer may give these words any of several numbers


def word_tokens(tokenizer, names) -> list[int]:
    return sorted({token for name in names for token in tokenizer(name, add_special_tokens=False).input_ids})


def test_words_that_no_caption_had_get_vectors_like_trained_ones_and_no_other_word_changes(script):
    world = emoji_world()
    tokenizer, encoder = world.pipe.tokenizer, world.pipe.text_encoder
    vectors = encoder.get_input_embeddings().weight.data
    shipped = vectors.clone()
    frame = script("train_base").words_of_captions()
    once = ("bar", "joy")  # an earlier training had them
    known = word_tokens(tokenizer, (*words.BASE_SUBJECTS, *words.BASE_STYLES, *words.BACKGROUNDS, *frame, *once))
    unseen = sorted(set(word_tokens(tokenizer, (*words.SUBJECTS, *words.STYLES))) - set(known))
    vectors[unseen] *= 0.1  # as short as those that no update moved
    script("train_base").tell_words_apart(tokenizer, encoder)
    others = sorted(set(range(len(vectors))) - set(unseen))
    assert torch.equal(vectors[others], shipped[others])
    usual = vectors[known].norm(dim=1).median()
    assert (0.5 * usual < vectors[unseen].norm(dim=1)).all()
    assert (vectors[unseen].norm(dim=1) < 2 * usual).all()


def test_the_text_encoder_tells_the_words_of_loras_apart():
    """Where they were never trained and never given vectors, the smallest cosine of two was .994."""
    pipe = emoji_world().pipe
    read = pipe.tokenizer([f"a {name}" for name in words.HELD_OUT_SUBJECTS], padding="max_length", return_tensors="pt")
    ends = (read.input_ids != pipe.tokenizer.eos_token_id).sum(1) - 1  # where the last word stands
    with torch.no_grad():
        states = pipe.text_encoder(read.input_ids)[0][torch.arange(len(ends)), ends]
    states = torch.nn.functional.normalize(states, dim=1)
    cosines = (states @ states.T)[tuple(torch.triu_indices(len(states), len(states), 1))]
    assert cosines.max() < 0.8
    assert cosines.median() < 0.45


def tiny() -> nn.Module:
    torch.manual_seed(0)
    layers = {"conv_in": nn.Conv2d(2, 4, 3), "middle": nn.Conv2d(4, 6, 3), "out": nn.Linear(6, 3)}
    return nn.ModuleDict(layers)


def step(module: nn.Module, optimizer) -> None:
    x = torch.arange(2.0 * 2 * 36).reshape(2, 2, 6, 6) / 72
    hidden = module["middle"](module["conv_in"](x)).mean((2, 3))
    module["out"](hidden).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_hidden_weight_moves_along_its_orthogonal_gradient_and_a_first_layer_by_adam(script):
    module, lr = tiny(), 1e-2
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    step(module, script("muon").MuonAndAdamW(module, lr, ("conv_in",)))
    moved = {n: (before[n] * (1 - lr * 0.01) - p.detach()) / lr for n, p in module.named_parameters()}  # less the decay
    spectrum = torch.linalg.svdvals(moved["middle.weight"].flatten(1)) / (0.2 * (4 * 9) ** 0.5)
    assert spectrum.max() < 1.3  # three iterations bring large singular values to about 1, small ones up
    assert torch.linalg.svdvals(moved["out.weight"]).max() / (0.2 * 6**0.5) < 1.3
    for name in ("conv_in.weight", "conv_in.bias", "middle.bias"):
        assert torch.allclose(moved[name].abs(), torch.ones(()), atol=2e-2), name  # Adam's first step is of length 1


def test_a_resumed_run_takes_the_same_step(script):
    module = tiny()
    optimizer = script("muon").MuonAndAdamW(module, 1e-2, ("conv_in",))
    step(module, optimizer)
    other = tiny()
    other.load_state_dict(module.state_dict())
    resumed = script("muon").MuonAndAdamW(other, 1e-2, ("conv_in",))
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    step(module, optimizer)
    step(other, resumed)
    for (name, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_judge_is_saved_with_its_words(script, tmp_path):
    torch.manual_seed(0)
    judge = Judge(LABELS).eval()
    script("train_judge").save(judge, tmp_path)
    again = Judge.load(tmp_path)
    assert {name: tuple(known) for name, known in again.labels._asdict().items()} == LABELS._asdict()
    picture = [Image.new("RGB", (64, 64), "red")]
    assert torch.allclose(again.verdict(picture).subjects, judge.verdict(picture).subjects, atol=0.05)
