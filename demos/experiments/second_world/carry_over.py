"""The first world's base as a start for this one: `assets/base_start.safetensors`, and the tokenizer that goes with it.

    python demos/experiments/second_world/carry_over.py

UNet and text encoder have the same shapes but for the latents' channels and the words. Latents of both worlds describe
patches of 4 x 4 pixels, so a linear map from one to the other, by least squares over drawings, goes into the UNet's first
and last layers. Words that both tokenizers know keep their embeddings, others get random ones of the same spread.
"""

import json

import numpy as np
import torch
import train_base
import words
from diffusers import StableDiffusionPipeline
from drawings import Drawings, default_folder
from encoder import patches
from loop import to_tensor
from safetensors.torch import save_file
from scenes import draw_scene
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from mole_diffusers import emoji

PICTURES = 400


def build_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in which every word of the world's captions is one token."""
    named = [*words.STYLES, *words.BACKGROUNDS, *words.SUBJECTS]
    text = [
        f"{w} drawing of a an and on background left right above below photo picture style the in with {w}" for w in named
    ]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=special, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(text, trainer)
    vocab = bpe.get_vocab()
    for letter in alphabet:
        vocab.setdefault(f"{letter}</w>", len(vocab))
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=train_base.TOKENS)


@torch.no_grad()
def latents_of_both(first: StableDiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the same places of the same drawings: in the first world [P, 8], and in this one [P, 20]."""
    drawings, rng = Drawings(default_folder()), np.random.default_rng(3)
    scenes = (draw_scene(words.SUBJECTS, words.STYLES, rng, count=1) for _ in range(PICTURES))
    pictures = to_tensor([drawings.picture(scene, rng) for scene in scenes])
    theirs = torch.cat([first.vae.encode(part).latent_dist.mode() for part in pictures.split(50)])
    theirs = theirs * first.vae.config.scaling_factor
    return theirs.movedim(1, -1).flatten(0, 2), patches(drawings)(pictures).movedim(1, -1).flatten(0, 2)


def linear(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """W [X, Y] of the best y = x W + b."""
    x, y = torch.cat([x, torch.ones(len(x), 1)], 1).double(), y.double()  # in float32 lstsq drops small singular values
    return torch.linalg.lstsq(x, y).solution[:-1].float()


@torch.no_grad()
def carried_over(first: StableDiffusionPipeline, tokenizer: CLIPTokenizer) -> dict[str, torch.Tensor]:
    """Weights of this world's UNet and text encoder."""
    theirs, ours = latents_of_both(first)
    state = train_base.build_both(tokenizer).state_dict()
    old = {f"unet.{name}": value for name, value in first.unet.state_dict().items()}
    old |= {f"text_encoder.{name}": value for name, value in first.text_encoder.state_dict().items()}
    old["unet.conv_in.weight"] = torch.einsum("ochw,ic->oihw", old["unet.conv_in.weight"], linear(ours, theirs))
    back = linear(theirs, ours)  # [8, 20]
    old["unet.conv_out.weight"] = torch.einsum("cihw,cp->pihw", old["unet.conv_out.weight"], back)
    old["unet.conv_out.bias"] = old["unet.conv_out.bias"] @ back
    for name, value in old.items():
        if "token_embedding" in name:
            known = first.tokenizer.get_vocab()
            state[name] = value.mean(0) + value.std(0) * torch.randn(state[name].shape)
            for word, i in tokenizer.get_vocab().items():
                if word in known:
                    state[name][i] = value[known[word]]
        elif "position_embedding" in name:
            state[name][: len(value)] = value
        else:
            state[name].copy_(value)
    return state


def main() -> None:
    torch.manual_seed(0)
    first = StableDiffusionPipeline.from_pretrained(emoji.default_folder() / "base", torch_dtype=torch.float32)
    tokenizer = build_tokenizer()
    state = carried_over(first, tokenizer)
    halves = {name: w.half().contiguous() if w.is_floating_point() else w for name, w in state.items()}
    tokenizer.save_pretrained(default_folder() / "base" / "tokenizer")
    save_file(halves, train_base.START)


if __name__ == "__main__":
    main()
