"""Train the emoji world's base, UNet and text encoder together, on pictures of one to four subjects.

    python demos/emoji/experiments/train_base.py [--steps 40000] [--decay 0]
    python demos/emoji/experiments/train_base.py --save

You can stop training at any time and run the command again: it continues from the last checkpoint. The learning rate stays
at its peak, and the last `--decay` steps of `--steps` bring it down to zero. So give `--decay 3000` with the final run.
`--save` writes the averaged weights of the last checkpoint as an ordinary pipeline, `assets/base/` (fp16). A run without a
checkpoint continues from that pipeline's weights or, if there is none, starts from scratch. Training needs no autoencoder,
but `--save` does.
"""

import argparse
import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import train_autoencoder
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from encoder import CHANNELS, PATCH
from grounding import grounding_loss, watched
from latents import Pool
from loop import WORK, averaged, constant_then_decay, device, fit, mixed_precision, small_attention, updates
from muon import MuonAndAdamW
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mole_world import words
from mole_world.captions import BETWEEN, FORMS, PAPER
from mole_world.drawings import Drawings, default_folder
from mole_world.scenes import SIDE

BASE = default_folder() / "base"  # the pipeline that was saved last
TOKENS, WIDTH = 32, 128
TURNS = (
    "wide",
    "square",
    "broad",
    "one",
    "square",
    "high",
    "tall",
    "square",
    "broad",
    "high",
    "square",
    "one",
    "wide",
    "square",
    "large",
    "high",
)
BATCH = {"one": 16, "wide": 8, "tall": 8, "square": 8, "broad": 10, "high": 10, "large": 6}  # pictures per update
RATE, EMPTY = 5e-4, 0.1  # peak learning rate; share of empty captions
NOISY, EXTRA = 600, 0.4  # above this step of 1000, shapes are decided; share of pictures that are noised there in addition
GROUNDED = 0.05  # weight of the loss that makes places look at the words of what stands there
CHUNKS, GROWN, EVERY = 24, 100, 25  # chunks of the pool at first and in the end; updates per new chunk


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR: for flat backgrounds, the first step must be free to choose the mean colour."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # as in Stable Diffusion; trailing steps do not need it
        clip_sample=False,
    )


def words_of_captions() -> list[str]:
    """Every word of all wordings, but for subjects and styles."""
    texts = [*FORMS, *(text for texts in BETWEEN.values() for text in texts), *words.PLACES.values(), *words.LIGHTS.values()]
    texts += [*words.BACKGROUNDS, PAPER, "on a background", "an", "together"]
    return sorted({word for text in texts for word in text.replace(",", " ").split() if "{" not in word})


def load_tokenizer() -> CLIPTokenizer:
    """The world's tokenizer, which is made once and kept in `assets/base`, with a token for each word of its captions.

    Byte-pair training does not fix which number a word gets, but the weights depend on it. So words that are added later
    ("beach", "riding") get new numbers at the end. Names of later concepts ("aurora", "relief") are several tokens each,
    like most trigger words.
    """
    folder = BASE / "tokenizer"
    if not folder.exists():
        build_tokenizer().save_pretrained(folder)
    return with_words(CLIPTokenizer.from_pretrained(folder), words_of_captions())


def with_words(tokenizer: CLIPTokenizer, added: Sequence[str]) -> CLIPTokenizer:
    """A tokenizer in which each of these words is one token. Other words keep their tokens."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab, merges = dict(model["vocab"]), [tuple(m) for m in model["merges"]]
    for word in added:
        pieces = tokenizer.tokenize(word)
        while len(pieces) > 1:  # the newest merges come last: they apply to what the older ones leave
            *pieces, left, right = pieces
            merges.append((left, right))
            vocab.setdefault(left + right, len(vocab))
            pieces.append(left + right)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def build_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer that makes every word of the world's captions one token."""
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


def build_both(tokenizer: CLIPTokenizer) -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}).to(device())


def begin(both: torch.nn.ModuleDict, saved: dict[str, torch.Tensor], tokenizer: CLIPTokenizer) -> None:
    """Load saved weights. Words of captions that are new get vectors like those of trained words."""
    name = "text_encoder.embeddings.token_embedding.weight"
    vectors = both.state_dict()[name].clone()
    vectors[: len(saved[name])] = saved[name]
    both.load_state_dict(saved | {name: vectors})
    known, new = (*words.BASE_SUBJECTS, *words.BASE_STYLES), tuple(words_of_captions())
    like_trained(tokenizer, both["text_encoder"], ((known, new),))


def tell_words_apart(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Give tokens that are in no caption of the base vectors that are like the trained ones.

    They still have their short initial vectors, which the text encoder can hardly tell apart.
    """
    like_trained(
        tokenizer,
        text_encoder,
        (
            (words.BASE_SUBJECTS, words.HELD_OUT_SUBJECTS),
            (words.BASE_STYLES, words.HELD_OUT_STYLES),
            (words.BASE_SUBJECTS, words.OTHER_SUBJECTS),
            (words.BASE_STYLES, words.OTHER_STYLES),
        ),
    )


@torch.no_grad()
def like_trained(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, pairs: Sequence[tuple[Sequence[str], Sequence[str]]]
) -> None:
    """For each pair of trained and other words: new vectors for tokens of the others that still have a short one.

    They are drawn from a Gaussian with the mean and covariance of the trained ones, like in `resize_token_embeddings` of
    transformers.
    """

    def tokens(names: Sequence[str]) -> list[int]:
        return sorted({token for name in names for token in tokenizer(name).input_ids[1:-1]})

    vectors = text_encoder.get_input_embeddings().weight  # [V, C]
    generator = torch.Generator().manual_seed(0)
    for learned, unseen in pairs:
        known = vectors[tokens(learned)]  # [K, C]
        untrained = [i for i in tokens(unseen) if vectors[i].norm() < known.norm(dim=1).median() / 2]
        mean = known.mean(0)
        noise = torch.randn(len(untrained), len(known), generator=generator).to(known)
        vectors[untrained] = mean + noise @ (known - mean) / (len(known) - 1) ** 0.5


def pipeline(weights: dict[str, torch.Tensor], autoencoder: AutoencoderKL) -> StableDiffusionPipeline:
    """An ordinary pipeline with a run's averaged weights."""
    tokenizer = load_tokenizer()
    both = build_both(tokenizer)
    both.load_state_dict(weights)
    tell_words_apart(tokenizer, both["text_encoder"])
    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=both["text_encoder"].eval(),
        tokenizer=tokenizer,
        unet=both["unet"].eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved_weights() -> dict[str, torch.Tensor]:
    """Weights of both parts in `assets/base`; empty if none were saved."""
    files = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
    saved = {part: load_file(BASE / part / file) for part, file in files.items() if (BASE / part / file).exists()}
    return {f"{part}.{name}": value.float() for part, weights in saved.items() for name, value in weights.items()}


def trained() -> StableDiffusionPipeline:
    """The latest base: the last checkpoint, else the pipeline in `assets/base`."""
    weights = averaged("base") if (WORK / "base.pt").exists() else saved_weights()
    return pipeline(weights, train_autoencoder.trained()).to(device())


def updates_before() -> int:
    """How many updates the weights had when this run began. It is kept next to the checkpoint."""
    note, saved = WORK / "began_at.json", BASE / "updates.json"
    if not note.exists() and not (WORK / "base.pt").exists():
        WORK.mkdir(exist_ok=True)
        note.write_text(saved.read_text() if saved.exists() else "0")
    return int(note.read_text()) if note.exists() else 0


def train(steps: int, decay: int) -> None:
    """Train with the plain v loss and the one of `grounding.py`, on the canvases in turn."""
    updates_before()  # noted before the first checkpoint
    tokenizer, scheduler = load_tokenizer(), build_scheduler()
    pool = Pool(Drawings(default_folder()))
    both = build_both(tokenizer)
    print({name: f"{sum(p.numel() for p in part.parameters()) / 1e6:.1f} M" for name, part in both.items()}, flush=True)
    if not (WORK / "base.pt").exists() and (saved := saved_weights()):
        begin(both, saved, tokenizer)
    generator = torch.Generator().manual_seed(2)

    def loss_at(step: int) -> torch.Tensor:
        shape = TURNS[step % len(TURNS)]
        if step % EVERY == 0 or not pool.latents[shape]:
            pool.grow(min(GROWN, CHUNKS + step // EVERY))
        x, captions, placed = pool.batch(shape, BATCH[shape], generator)
        empty = torch.rand(len(captions), generator=generator) < EMPTY
        captions = ["" if e else c for e, c in zip(empty, captions, strict=True)]
        placed = [[] if e else p for e, p in zip(empty, placed, strict=True)]
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(0, 1000, (len(x),), generator=generator)
        noisy = torch.rand(len(x), generator=generator) < EXTRA
        t = torch.where(noisy, torch.randint(NOISY, 1000, (len(x),), generator=generator), t)
        ids = tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        x, noise, t, ids = x.to(device()), noise.to(device()), t.to(device()), ids.to(device())
        with mixed_precision(), watched(both["unet"]) as looks:
            v = both["unet"](scheduler.add_noise(x, noise, t), t, both["text_encoder"](ids)[0]).sample
        loss = F.mse_loss(v.float(), scheduler.get_velocity(x, noise, t))
        size = (PATCH * x.shape[2], PATCH * x.shape[3])
        return loss + GROUNDED * grounding_loss(looks, ids, placed, tokenizer, size)

    def share(step: int) -> float:
        return constant_then_decay(step, steps=steps, warmup=200, decay=max(1, decay))

    with small_attention():
        muon = MuonAndAdamW(both, RATE, ("conv_in", "conv_out", "embedding", "time_emb"))
        fit("base", both, loss_at, steps=steps, lr=RATE, share=share, decay=0.999, generator=generator, optimizer=muon)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40000, help="total number of updates, including earlier runs")
    parser.add_argument("--decay", type=int, default=0, help="how many of the last updates bring the rate down")
    parser.add_argument("--save", action="store_true", help="write the pipeline instead of training")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.save:
        pipe = pipeline(averaged("base"), train_autoencoder.trained())
        pipe.to(dtype=torch.float16).save_pretrained(BASE)
        (BASE / "updates.json").write_text(f"{updates_before() + updates('base')}\n")
    else:
        train(args.steps, args.decay)


if __name__ == "__main__":
    main()
