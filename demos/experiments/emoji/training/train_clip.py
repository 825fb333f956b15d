"""Train a small CLIPModel of the emoji world, for CLIP objectives. It shares no weights with the judge.

    python demos/experiments/emoji/training/train_clip.py [--steps 4800]

Contrastive (Radford et al., 2021) on pictures of every subject and style with their captions, degraded as the judge's are,
since it is asked about soft pictures. After `MIXED` steps a batch holds few styles, and often few subjects: what it is
compared with then differs in one word. Resumable.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from loop import device, fit, note
from train_base import TOKENS, build_tokenizer, to_tensor, trained_vae
from train_judge import degrade
from transformers import CLIPConfig, CLIPModel

from mole_diffusers import emoji

BATCH = 64
MIXED = 2200  # steps with batches of everything


def build_clip(tokenizer) -> CLIPModel:
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, "pad_token_id": tokenizer.pad_token_id}
    vision = {"image_size": emoji.SIZE, "patch_size": 8}
    return CLIPModel(
        CLIPConfig(
            text_config=size | special | text, vision_config=size | vision, projection_dim=128, logit_scale_init_value=2.6592
        )
    )


def vocabulary(step: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Subjects and styles of one batch."""
    subjects, styles = list(emoji.SUBJECTS), list(emoji.STYLES)
    if step < MIXED:
        return subjects, styles
    few = len(subjects) if step % 2 else 12
    return list(rng.choice(subjects, few, replace=False)), list(rng.choice(styles, 2, replace=False))


def pictures(
    drawings: emoji.Drawings, rng: np.random.Generator, count: int, *, words: tuple[list[str], list[str]]
) -> tuple[torch.Tensor, list[str]]:
    """Pictures [B, 3, 64, 64] in -1..1 of `words` (subjects, styles) and captions, no caption twice."""
    scenes: dict[str, emoji.Scene] = {}
    while len(scenes) < count:
        scene = emoji.draw_scene(*words, rng, pairs=0.5)
        scenes[scene.caption] = scene
    return to_tensor([drawings.picture(s, rng) for s in scenes.values()]), list(scenes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4800)
    args = parser.parse_args()
    torch.manual_seed(4)
    rng = np.random.default_rng(4)
    drawings, vae = emoji.Drawings(emoji.default_folder()), trained_vae()
    tokenizer = build_tokenizer(drawings)
    clip = build_clip(tokenizer).to(device())

    def similarity(x: torch.Tensor, captions: list[str]) -> torch.Tensor:
        ids = tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").to(device())
        with torch.autocast(device().type, torch.bfloat16):
            return clip(pixel_values=x.to(device()), **ids).logits_per_image.float()  # [B, B]

    def loss_at(step: int) -> torch.Tensor:
        x, captions = pictures(drawings, rng, BATCH, words=vocabulary(step, rng))
        logits = similarity(degrade(x.to(device()), vae if step % 4 == 0 else None, rng), captions)
        own = torch.arange(BATCH, device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    clip.load_state_dict(fit("clip", clip, loss_at, steps=args.steps, lr=1e-3, decay=0.99))
    clip.eval()
    with torch.no_grad():
        everything = (list(emoji.SUBJECTS), list(emoji.STYLES))
        logits = similarity(*pictures(drawings, np.random.default_rng(98), 256, words=everything))
    top = (logits.argmax(1) == torch.arange(256, device=logits.device)).float().mean().item()
    note("clip_retrieval", top1_of_256=top)
    clip.cpu().half().save_pretrained(drawings.folder / "clip")


if __name__ == "__main__":
    main()
