"""Does a library find the LoRAs that a prompt asks for, and how fast: all LoRAs of the emoji world.

    python demos/experiments/emoji/studies/retrieve.py

Needs no training and about a minute. Writes docs/retrieval.md; its words beside the tables are in retrieve_text.md.
"""

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).parents[1] / "training"))

import numpy as np
import torch
import torch.nn.functional as F
from make_loras import scenes

from mole_diffusers import emoji, emoji_world
from mole_diffusers.emoji.world import EmojiWorld
from mole_diffusers.evaluation import emoji_protocol
from mole_diffusers.evaluation.tables import markdown
from mole_diffusers.retrieval.encoders import Encoder, PipelineText
from mole_diffusers.retrieval.entries import SAMPLES, LibraryEntry
from mole_diffusers.retrieval.library import LoraLibrary
from mole_diffusers.retrieval.phrases import phrases, tokenize
from mole_diffusers.retrieval.store import PROBE, Index

HERE = Path(__file__).parent
DOCS = HERE.parents[3] / "docs"
FREE = {  # prompts in nobody's captions: for a subject with its article, for a style
    True: (
        "{} asleep under a tree", "postcard with {} in the snow", "portrait of {}, evening light",
        "two friends and {} at the beach", "{} on my kitchen table",
    ),
    False: (
        "{} drawing of a bicycle", "a bridge at night, {} style", "my grandmother in {} style", "old town in the rain, {}",
        "{} picture of a teapot",
    ),
}  # fmt: skip
FORMS = {  # concept -> another form of its word, a synonym
    "fox": ("foxes", "vixen"),
    "octopus": ("octopuses", "squid"),
    "sunflower": ("sunflowers", "helianthus"),
    "doughnut": ("doughnuts", "donut"),
    "honeybee": ("honeybees", "bee"),
    "french fries": ("french fry", "chips"),
    "cheese wedge": ("cheese wedges", "slice of cheddar"),
    "tiger": ("tigers", "big cat"),
    "koala": ("koalas", "marsupial"),
    "tomato": ("tomatoes", "red fruit"),
    "crocodile": ("crocodiles", "alligator"),
    "birthday cake": ("birthday cakes", "candle tart"),
    "glossy": ("glossily shaded", "shiny"),
    "flat": ("flattened", "one-coloured"),
    "ink": ("inked", "brush pen"),
    "duotone": ("duotoned", "two-coloured"),
    "thermal": ("thermally coloured", "heat camera"),
    "blueprint": ("blueprints", "cyanotype"),
}
KINDS = {"as written": 0, "another form": 1, "a synonym": 2}
SIZES, ROUNDS = (10, 1000, 10_000), 40
Libraries = Mapping[str, LoraLibrary]  # by how they find
Split = Mapping[str, Sequence[emoji.Concepts]]


class ClipText:
    """The text half of the world's CLIP, which was trained beside pictures of every concept."""

    id = "the emoji world's CLIP"

    def __init__(self, world: EmojiWorld):
        self.model, self.tokenizer = world.clip(), world.pipe.tokenizer

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        padding = {"padding": "max_length", "truncation": True, "max_length": self.tokenizer.model_max_length}
        found = self.model.get_text_features(**self.tokenizer(list(texts), return_tensors="pt", **padding))
        return F.normalize(getattr(found, "pooler_output", found), dim=-1)  # a tensor before transformers 5


# ---- prompts


def trained_captions(concept: str) -> list[str]:
    """The first captions that the concept's LoRA was trained with."""
    rng = np.random.default_rng(sum(map(ord, concept)))
    return [scene.caption for scene in scenes(concept, SAMPLES, rng)]


def held_out(concept: str, kind: str, *, captions: int = 5) -> list[str]:
    """Prompts that ask for one concept, none of them on its card: captions of new scenes, and free ones.

    `kind` (of `KINDS`) says in which word: its own, another form of it, or a synonym.
    """
    subject, known = concept not in emoji.STYLES, set(trained_captions(concept))
    word = [concept, *FORMS.get(concept, ())][KINDS[kind]]
    said = emoji.article(word) if subject and kind != "another form" else word
    fresh = (s.caption for s in scenes(concept, 50, np.random.default_rng(7 + sum(map(ord, concept)))))
    new = [caption for caption in dict.fromkeys(fresh) if caption not in known][:captions]
    was = emoji.article(concept) if subject else f"{concept} "
    return [c.replace(was, said if subject else f"{said} ", 1) for c in new] + [f.format(said) for f in FREE[subject]]


# ---- libraries


def libraries(world: EmojiWorld, folder: Path) -> dict[str, LoraLibrary]:
    """The world's LoRAs with their captions beside them, read by triggers, or by text alone with either encoder."""
    for concept, path in world.loras.items():
        shutil.copy(path, folder)
        (folder / path.name).with_suffix(".txt").write_text("\n".join(trained_captions(concept)))
    own = LoraLibrary.index(folder, PipelineText(world.pipe))
    found = {"triggers": own, "own text encoder": without_triggers(own)}
    return found | {"CLIP": without_triggers(LoraLibrary.index(folder, ClipText(world)))}


def without_triggers(library: LoraLibrary) -> LoraLibrary:
    """The same entries without their trigger words."""
    entries = tuple(replace(entry, triggers=()) for entry in library.entries)
    return LoraLibrary(library.folder, index_of(entries, library.embeddings, library.encoder), library.encoder)


def index_of(entries: tuple[LibraryEntry, ...], embeddings: torch.Tensor, encoder: Encoder) -> Index:
    return Index(encoder.id, encoder(PROBE), entries, embeddings, {})


def synthetic(encoder: Encoder, count: int) -> LoraLibrary:
    """`count` made-up LoRAs: random directions as embeddings, one made-up trigger each."""
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(count, encoder(PROBE).shape[1], generator=generator), dim=-1)
    entries = tuple(
        LibraryEntry(f"lora {i}", f"{i}.safetensors", "unknown", (f"trigger{i}",), (), "", ((0, 0),) * 3)
        for i in range(count)
    )
    return LoraLibrary("nowhere", index_of(entries, rows, encoder), encoder)


# ---- what is measured


def asked(library: LoraLibrary, prompt: str, **options) -> set[str]:
    """The concepts that a library finds for a prompt."""
    return {each.name.replace("_", " ") for each in library.retrieve(prompt, **options)}


def first(library: LoraLibrary, concept: str, kind: str) -> tuple[float, float]:
    """The share of the concept's prompts whose first LoRA is its own (recall at 1), and the share with another's."""
    found = [asked(library, prompt, k=1) for prompt in held_out(concept, kind)]
    return sum(s == {concept} for s in found) / len(found), sum(bool(s - {concept}) for s in found) / len(found)


def sets(library: LoraLibrary, split: Split, count: int) -> tuple[float, float, int]:
    """Over the split's compositions of `count` concepts: the share with all found, with no other beside, and how many."""
    cases = [case for case, _ in emoji_protocol.cases(split) if len(case.concepts) == count]
    found = [(asked(library, case.prompt), set(case.concepts)) for case in cases]
    return sum(s >= want for s, want in found) / len(cases), sum(s == want for s, want in found) / len(cases), len(cases)


def silent(library: LoraLibrary) -> float:
    """The share of captions of the base's own subjects and styles for which no LoRA is found."""
    prompts = [f"{style} drawing of {emoji.article(s)}" for style in emoji.BASE_STYLES for s in emoji.BASE_SUBJECTS]
    return sum(not asked(library, prompt) for prompt in prompts) / len(prompts)


def milliseconds(calls: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """The median processor time of one call of each, by turns, on one thread."""
    threads, spent = torch.get_num_threads(), {name: [] for name in calls}
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            for name, call in calls.items():
                start = time.process_time()
                call()
                spent[name] += [1000 * (time.process_time() - start)] if number else []  # the first warms up
    finally:
        torch.set_num_threads(threads)
    return {name: median(values) for name, values in spent.items()}


# ---- the page


def recall_table(found: Libraries, concepts: Sequence[str]) -> str:
    """Recall at 1 of every concept, in its own word, another form and a synonym; and how often another LoRA came."""
    cells = [(kind, name) for kind in KINDS for name in found]
    shares = np.array([[first(found[name], c, kind) for kind, name in cells] for c in concepts])  # [concepts, cells, 2]
    tuned = (*emoji.VALIDATION_SUBJECTS, *emoji.VALIDATION_STYLES)
    body = [
        [f"{c} *" if c in tuned else c, *(f"{x:.1f}" for x in row)] for c, row in zip(concepts, shares[..., 0], strict=True)
    ]
    means = [
        [name, *(f"{x:.2f}" for x in row)] for name, row in zip(("mean", "another LoRA"), shares.mean(0).T, strict=True)
    ]
    return markdown(["concept", *(f"{kind}: {name}" for kind, name in cells)], [*body, *means])


def sets_table(found: Libraries, split: Split) -> str:
    """Recall of the whole set, and what is found where nothing should be."""
    body, counts = [], []
    for name, library in found.items():
        two, three = (sets(library, split, count) for count in (2, 3))
        counts = [two[2], three[2]]
        body.append([name, *(f"{value:.2f}" for value in (*two[:2], *three[:2], silent(library)))])
    heads = [f"{word} of {n} concepts ({counts[n - 2]} prompts)" for n in (2, 3) for word in ("all", "exactly these")]
    return markdown(["", *heads, "none where none is asked for"], body)


def time_table(encoder: Encoder, sizes: Sequence[int], prompts: Sequence[str], *, rounds: int) -> str:
    """Median milliseconds of a query by the number of entries, and of the text encoder alone, on the same prompts."""

    def query(library: LoraLibrary) -> Callable[[], object]:
        turn = cycle(prompts)
        return lambda: library.retrieve(next(turn), threshold=0.0)

    turn = cycle(prompts)
    calls = {f"{n:,}": query(synthetic(encoder, n)) for n in sizes}
    calls["the text encoder alone"] = lambda: encoder(phrases(tokenize(next(turn))))
    spent = milliseconds(calls, rounds=rounds)
    smallest = spent[f"{sizes[0]:,}"]
    body = [[name, f"{value:.1f}", f"{value / smallest:.2f}"] for name, value in spent.items()]
    return markdown(["entries", "milliseconds", f"times {sizes[0]:,} entries"], body)


def page(world: EmojiWorld, concepts: Sequence[str], split: Split, *, sizes: Sequence[int], rounds: int) -> str:
    """The whole of docs/retrieval.md."""
    prompts = [case.prompt for case, _ in emoji_protocol.cases(split)]
    with TemporaryDirectory() as folder:
        found = libraries(world, Path(folder))
        text = (HERE / "retrieve_text.md").read_text()
        return text.format(
            recall=recall_table(found, concepts),
            sets=sets_table(found, split),
            times=time_table(found["triggers"].encoder, sizes, prompts, rounds=rounds),
        )


def main() -> None:
    concepts = [*emoji.HELD_OUT_SUBJECTS, *emoji.HELD_OUT_STYLES]
    (DOCS / "retrieval.md").write_text(page(emoji_world(), concepts, emoji.TEST, sizes=SIZES, rounds=ROUNDS))


if __name__ == "__main__":
    main()
