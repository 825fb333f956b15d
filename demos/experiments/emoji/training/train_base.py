"""Train the emoji world's base: autoencoder, then UNet and text encoder together, saved as an ordinary pipeline.

    python demos/experiments/emoji/training/train_base.py [--steps 12000]

Resumable: run it again and it goes on from the last checkpoint. Writes `assets/base/` (fp16).
The autoencoder sees every drawing, as Stable Diffusion's own saw far more than its UNet is asked for;
UNet and text encoder see base styles and base subjects only.
"""

import argparse
import json

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from loop import WORK, device, fit, small_attention
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mole_diffusers import emoji

TOKENS, WIDTH = 24, 128
SAMPLES, BATCH = 16000, 32
VAE_PHASES = {"vae": (1300, 2e-3), "vae_refine": (850, 1.5e-3)}  # name: (steps, learning rate)


def to_tensor(images: list) -> torch.Tensor:
    """RGB pictures as [B, 3, 64, 64] in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        sample_size=emoji.SIZE,
        norm_num_groups=16,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=emoji.SIZE // 4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR: flat backgrounds need the mean colour to be free at the first step."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def build_tokenizer(drawings: emoji.Drawings) -> CLIPTokenizer:
    """A byte-pair tokenizer in which every word of the world's captions is one token."""
    words = [*emoji.STYLES, *emoji.BACKGROUNDS, *drawings.layout["subjects"]]
    text = [f"{w} drawing of a an and on background photo picture style the in with {w}" for w in words]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=special, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(text, trainer)
    vocab = bpe.get_vocab()
    for letter in alphabet:
        vocab.setdefault(f"{letter}</w>", len(vocab))
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_vae(drawings: emoji.Drawings) -> AutoencoderKL:
    vae = build_vae().to(device()).to(memory_format=torch.channels_last)
    rng = np.random.default_rng(0)
    subjects = [s for s in drawings.layout["subjects"] if drawings.drawing(s, "joy").getbbox()]

    def loss_at(step: int) -> torch.Tensor:
        scenes = [emoji.draw_scene(subjects, emoji.STYLES, rng, pairs=0.35) for _ in range(16)]
        x = to_tensor([drawings.picture(s, rng) for s in scenes]).to(device(), memory_format=torch.channels_last)
        with torch.autocast(device().type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        slopes = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # nats per latent value
        return (y - x).abs().mean() + 0.3 * slopes + 1e-5 * kl

    for name, (steps, lr) in VAE_PHASES.items():
        vae.load_state_dict(fit(name, vae, loss_at, steps=steps, lr=lr))
    return vae.eval().requires_grad_(False)


def trained_vae() -> AutoencoderKL:
    """The autoencoder, frozen: as just trained, else the committed one."""
    path = WORK / f"{list(VAE_PHASES)[-1]}.pt"
    if path.exists():
        vae = build_vae()
        vae.load_state_dict(torch.load(path, weights_only=True)["ema"])
    else:
        vae = AutoencoderKL.from_pretrained(emoji.default_folder() / "base" / "vae", torch_dtype=torch.float32)
    return vae.to(device()).eval().requires_grad_(False)


@torch.no_grad()
def encode_samples(drawings: emoji.Drawings, vae: AutoencoderKL) -> tuple[torch.Tensor, list[str]]:
    """`SAMPLES` training pictures as scaled latents [S, 8, 16, 16] with their captions, made once and kept."""
    path = WORK / "samples.pt"
    if not path.exists():
        rng = np.random.default_rng(1)
        latents, captions = [], []
        for _ in tqdm(range(SAMPLES // 64), desc="encoding", mininterval=10):
            scenes = [emoji.draw_scene(emoji.BASE_SUBJECTS, emoji.BASE_STYLES, rng, pairs=0.35) for _ in range(64)]
            x = to_tensor([drawings.picture(s, rng) for s in scenes]).to(device())
            with torch.autocast(device().type, torch.bfloat16):
                latents.append(vae.encode(x).latent_dist.mode().float().cpu())
            captions += [s.caption for s in scenes]
        torch.save({"latents": torch.cat(latents), "captions": captions}, path)
    saved = torch.load(path, weights_only=True)
    vae.register_to_config(scaling_factor=round(1 / saved["latents"].std().item(), 4))
    return saved["latents"] * vae.config.scaling_factor, saved["captions"]


def train_unet(drawings: emoji.Drawings, vae: AutoencoderKL, steps: int) -> StableDiffusionPipeline:
    latents, captions = encode_samples(drawings, vae)
    tokenizer, scheduler = build_tokenizer(drawings), build_scheduler()
    both = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}).to(device())
    ids = tokenizer(["", *captions], padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(2)

    def loss_at(step: int) -> torch.Tensor:
        pick = torch.randint(0, len(latents), (BATCH,), generator=generator)
        words = torch.where(torch.rand(BATCH, generator=generator) < 0.1, 0, pick + 1)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator)
        t = torch.randint(0, 1000, (BATCH,), generator=generator)
        x, noise, t = latents[pick].to(device()), noise.to(device()), t.to(device())
        with torch.autocast(device().type, torch.bfloat16):
            context = both["text_encoder"](ids[words].to(device()))[0]
            v = both["unet"](scheduler.add_noise(x, noise, t), t, context).sample
        return F.mse_loss(v.float(), scheduler.get_velocity(x, noise, t))

    with small_attention():
        both.load_state_dict(fit("unet", both, loss_at, steps=steps, lr=7e-4, decay=0.999))
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=both["text_encoder"].eval(),
        tokenizer=tokenizer,
        unet=both["unet"].eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12000, help="UNet updates")
    args = parser.parse_args()
    torch.manual_seed(0)
    drawings = emoji.Drawings(emoji.default_folder())
    pipe = train_unet(drawings, train_vae(drawings), args.steps)
    pipe.to(dtype=torch.float16).save_pretrained(drawings.folder / "base")


if __name__ == "__main__":
    main()
