"""Do results depend on words that the base cannot tell apart? The same LoRAs, where the base can.

    python demos/experiments/emoji/own_words.py [--split validation] [--kinds ...] [--arms ...] [--per-kind 6] [--seeds 4]

No caption of the base's training has a held-out word, so its token kept the short vector that it began with, and the text
encoder makes nearly the same of every such word. Models that know their words tell them apart. Here each such token gets a
vector as `resize_token_embeddings` of transformers would give it, from a Gaussian with the mean and the covariance of those
that were trained; the LoRAs are trained again on that base and composed as by `compose.py`. Kept in work/own_words/.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import make_loras
import torch
import train_base
from compose import ARMS, SEEDS, SPLITS
from loop import WORK, mixed_precision, note, small_attention
from sampling import GUIDANCE, STEPS

from mole_diffusers.emoji import TEST, words
from mole_diffusers.emoji.drawings import Drawings, default_folder
from mole_diffusers.emoji.world import emoji_world
from mole_diffusers.evaluation import emoji_protocol
from mole_diffusers.evaluation.rows import Rows
from mole_diffusers.evaluation.runner import evaluate
from mole_diffusers.evaluation.tables import as_frame, success_table
from mole_diffusers.training.lora_adapter import save_lora

FOLDER = WORK / "own_words"
CONCEPTS = {
    "validation": (*words.VALIDATION_SUBJECTS, *words.VALIDATION_STYLES),
    "test": (*words.TEST_SUBJECTS, *words.TEST_STYLES),
}


@torch.no_grad()
def tell_words_apart(pipe) -> None:
    """Give the tokens of held-out words, where the base was not trained on them, vectors like those of its own words."""
    vectors = pipe.text_encoder.get_input_embeddings().weight  # [V, C]
    generator = torch.Generator().manual_seed(0)
    for learned, held_out in ((words.BASE_SUBJECTS, words.HELD_OUT_SUBJECTS), (words.BASE_STYLES, words.HELD_OUT_STYLES)):
        known = vectors[tokens(pipe, learned)]  # [K, C]
        unknown = [i for i in tokens(pipe, held_out) if vectors[i].norm() < known.norm(dim=1).median() / 2]
        mean = known.mean(0)
        noise = torch.randn(len(unknown), len(known), generator=generator).to(known)
        vectors[unknown] = mean + noise @ (known - mean) / (len(known) - 1) ** 0.5


def tokens(pipe, names: tuple[str, ...]) -> list[int]:
    """Those that these words are made of."""
    return sorted({token for name in names for token in pipe.tokenizer(name).input_ids[1:-1]})


def alikeness(pipe, names: tuple[str, ...]) -> tuple[float, float, float]:
    """The smallest, the median and the largest cosine of the text states of two of these subjects."""
    states = []
    for name in names:
        read = pipe.tokenizer(f"a {name}", padding="max_length", return_tensors="pt").input_ids.to(pipe.device)
        with torch.no_grad():
            states.append(pipe.text_encoder(read)[0][0, len(pipe.tokenizer(f"a {name}").input_ids) - 2])
    states = torch.nn.functional.normalize(torch.stack(states), dim=1)
    cosines = (states @ states.T)[tuple(torch.triu_indices(len(states), len(states), 1))]
    return float(cosines.min()), float(cosines.median()), float(cosines.max())


def path_of(concept: str) -> Path:
    """Where the LoRA of a concept is kept."""
    return FOLDER / "loras" / f"{concept.replace(' ', '_')}.safetensors"


def make(pipe, drawings: Drawings, concept: str) -> None:
    """The LoRA of a concept, by the recipe that it has in the world, but with alpha = rank for all."""
    path, start = path_of(concept), time.time()
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = make_loras.recipe(concept)
    tensors = make_loras.train(pipe, make_loras.concept_samples(pipe, drawings, (concept,)), chosen, chosen.rank)
    save_lora(tensors, path, alpha=chosen.rank, rank=chosen.rank, triggers=concept)
    note(f"own words: {path.stem}", seconds=round(time.time() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--kinds", nargs="*", choices=TEST, default=list(TEST))
    arms = ("sum", "words only", "words and given places", "bound", "tiles")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=arms)
    parser.add_argument("--per-kind", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", nargs="*", help="train the LoRAs of these concepts and stop")
    args = parser.parse_args()
    pipe, drawings = train_base.trained(), Drawings(default_folder())
    known, before = alikeness(pipe, words.BASE_SUBJECTS), alikeness(pipe, words.HELD_OUT_SUBJECTS)
    tell_words_apart(pipe)
    after = alikeness(pipe, words.HELD_OUT_SUBJECTS)
    for name, found in (("the base's subjects", known), ("held-out subjects", before), ("held-out subjects now", after)):
        print(f"cosine of two of {name}:", *(f"{value:.3f}" for value in found), flush=True)
    concepts = CONCEPTS[args.split]
    split = {kind: SPLITS[args.split][kind][: args.per_kind] for kind in args.kinds}
    for concept in args.only or concepts:
        make(pipe, drawings, concept)
    if args.only:
        return
    world = replace(emoji_world(), pipe=pipe, loras={concept: path_of(concept) for concept in concepts})
    setup = emoji_protocol.setup(world, {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE})
    found = emoji_protocol.cases(split)
    metrics = emoji_protocol.JudgeMetrics(world.judge(), {(case.prompt, case.size): scene for case, scene in found})
    with small_attention(), mixed_precision():
        rows = evaluate(
            setup,
            [ARMS[name]() for name in args.arms],
            [case for case, _ in found],
            metrics,
            seeds=range(SEEDS[args.split], SEEDS[args.split] + args.seeds),
            rows=Rows(FOLDER / "rows" / args.split),
        )
    print(success_table(as_frame(rows)))


if __name__ == "__main__":
    main()
