"""Broken files by the thousand: each is refused in one sentence or works, in little time and memory, and the pipeline is
the same bits afterwards."""

import json
import resource
import shutil
import time
from collections import Counter
from dataclasses import replace

import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline
from gate_types import LEARNED
from hosts import unet
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from libraries import WordEncoder
from mutations import json_mutated, safetensors_mutated
from safetensors.torch import save_file
from tiers import thorough
from tiny import lora_layers, tiny_lora, tiny_pipeline

from mole_diffusers import RefusedFileError, attach, attached, detach, read_expert
from mole_diffusers.lora.metadata import PEFT_CONFIG, PEFT_FILE, PEFT_METADATA
from mole_diffusers.pipelines.kept import attach_kept, keep
from mole_diffusers.retrieval import LoraLibrary, store
from mole_diffusers.safe_files import MAX_MESSAGE, read_safetensors

SECONDS = 2.0  # of the processor, for one file
ROOM = 1 << 30  # bytes of address space beyond what the process has
SENTENCE = MAX_MESSAGE + 4
CASES = {"loras": (10, 12_000), "gates": (14, 3_000), "kept": (8, 2_000), "index": (30, 2_500), "folder": (10, 1_000)}


@pytest.fixture(scope="module")
def host():
    """A pipeline of one attention block going down and one coming up."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    small = unet(block_out_channels=(8,), **blocks)
    pipe = StableDiffusionPipeline(**{**tiny_pipeline().components, "unet": small}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def valid(host, tmp_path_factory):
    """A folder with good files of every kind."""
    folder = tmp_path_factory.mktemp("valid")
    layers = list(lora_layers(host, ("to_q", "to_v", "conv1", "q_proj")).items())
    for form, layer in LAYERS.items():
        made = {}
        for name, module in layers[:3] + layers[-1:]:
            made |= layer(*name.split(".", 1), module.weight.shape)
        config = {"unet.lora_alpha": 8, "unet.use_rslora": True, "unet.alpha_pattern": {"attn1.to_q": 2}}
        said = {PEFT_METADATA: json.dumps(config)} if form == "diffusers" else {"ss_v2": "False"}
        save_file(made, folder / f"{form}.safetensors", said)
    (folder / "adapter").mkdir()
    shutil.copy2(folder / "peft.safetensors", folder / "adapter" / PEFT_FILE)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}, "use_dora": False}
    (folder / "adapter" / PEFT_CONFIG).write_text(json.dumps(config))
    (folder / "library").mkdir()
    for i, name in enumerate(("fox", "ink")):
        tiny_lora(host, folder / f"{name}.safetensors", rank=2, seed=i, ends=("to_q", "to_v"))
        (folder / f"{name}.txt").write_text(f"a {name} in snow\nthe {name}\n")
        (folder / f"{name}.json").write_text(json.dumps({"activation text": f"{name}, {name} art", "weight": 1}))
        for file in folder.glob(f"{name}.*"):
            shutil.copy2(file, folder / "library")
    LoraLibrary.index(folder / "library", WordEncoder())
    for family in LEARNED:
        attach(host, loras(folder), family).save_pretrained(folder / family)
    keep(attached(host), folder / "kept")
    detach(host)
    return folder


def loras(folder):
    return {name: folder / f"{name}.safetensors" for name in ("fox", "ink")}


def of_kohya(part, name):
    return {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part] + name.replace(".", "_")


def diffusers(part, name, shape):
    halves = {f"{part}.{name}.lora.down.weight": torch.randn(2, *shape[1:]), f"{part}.{name}.lora.up.weight": ups(shape)}
    return {key: half.bfloat16() for key, half in halves.items()}


def peft(part, name, shape):
    return {f"{part}.{name}.lora_A.weight": torch.randn(2, *shape[1:]), f"{part}.{name}.lora_B.weight": ups(shape)}


def ups(shape):
    return torch.randn(shape[0], 2, *(1,) * (len(shape) - 2))


def kohya(part, name, shape):
    stem = of_kohya(part, name)
    halves = {f"{stem}.lora_down.weight": torch.randn(2, *shape[1:]).half(), f"{stem}.lora_up.weight": ups(shape).half()}
    return halves | {f"{stem}.alpha": torch.tensor(float(len(name) % 3))}


def locon(part, name, shape):
    if len(shape) == 2:
        return kohya(part, name, shape)
    stem, core = of_kohya(part, name), torch.randn(2, 3, *shape[2:])
    halves = {f"{stem}.lora_down.weight": torch.randn(3, shape[1], 1, 1), f"{stem}.lora_up.weight": ups(shape)}
    return halves | {f"{stem}.lora_mid.weight": core}


def loha(part, name, shape):
    sides = {"a": (shape[0], 2), "b": (2, shape[1:].numel())}
    return {f"{of_kohya(part, name)}.hada_w{i}_{half}": torch.randn(*sides[half]) for i in (1, 2) for half in "ab"}


def lokr(part, name, shape):
    stem = of_kohya(part, name)
    return {f"{stem}.lokr_w1": torch.randn(2, 2), f"{stem}.lokr_w2": torch.randn(shape[0] // 2, shape[1] // 2, *shape[2:])}


def flux(part, name, shape):
    stem = f"lora_unet_double_blocks_{len(name) % 9}_img_attn_qkv"
    return {f"{stem}.lora_down.weight": torch.randn(2, 4), f"{stem}.lora_up.weight": torch.randn(12, 2)}


def dora(part, name, shape):
    magnitude = {f"{of_kohya(part, name)}.dora_scale": torch.rand(shape[0], *(1,) * (len(shape) - 1))}
    return kohya(part, name, shape) | magnitude


LAYERS = {
    "diffusers": diffusers, "peft": peft, "kohya": kohya, "locon": locon, "loha": loha, "lokr": lokr, "flux": flux,
    "dora": dora,
}  # fmt: skip


# ---- one broken file of each kind, and what is done with it; `change(file, other)` breaks a file where it lies


def some_loras(draw, change, host, folder):
    """A LoRA of any format, what stands beside it, or both; under gates of any family."""
    name = draw(st.sampled_from([*LAYERS, "fox", "adapter"]))
    file = f"adapter/{PEFT_FILE}" if name == "adapter" else f"{name}.safetensors"
    beside = {"fox": "fox.json", "adapter": f"adapter/{PEFT_CONFIG}"}.get(name)
    for broken in draw(st.sampled_from([[file], [beside], [file, beside]])) if beside else [file]:
        change(broken, "ink.safetensors")
    expert = read_expert(folder / file, drop_nonfinite=draw(st.booleans()))
    for layers in expert.layers.values():
        # what DoRA makes of the change of weight depends on the base
        assert all(replace(w, magnitude=None).delta().isfinite().all() for w in layers.values())
        assert all(w.magnitude is None or w.magnitude.isfinite().all() for w in layers.values())
    attach(host, {"x": expert}, draw(st.sampled_from(["sum", *LEARNED])))
    step(host)


def some_gates(draw, change, host, folder):
    """Gates of any family: their config or their weights."""
    family = draw(st.sampled_from(LEARNED))
    change(f"{family}/{draw(st.sampled_from(['config.json', 'gates.safetensors']))}")
    attach(host, loras(folder), folder / family)
    step(host)


def some_kept(draw, change, host, folder):
    """A kept mixture: its index, an expert, or its gates."""
    files = ["mixture.json", "mixture.json", "experts/0.safetensors", "gates/config.json", "gates/gates.safetensors"]
    change(f"kept/{draw(st.sampled_from(files))}")
    attach_kept(host, folder / "kept")
    step(host)


def some_index(draw, change, host, folder):
    """A library's index; half of the time its two files agree again."""
    change(f"library/{draw(st.sampled_from([store.ABOUT, store.ABOUT, store.VECTORS]))}")
    if draw(st.booleans()):
        agree(folder / "library")
    library = LoraLibrary.open(folder / "library", WordEncoder())
    for found in library.retrieve("a fox in snow, ink art"):
        library.expert(found.name)


def agree(folder):
    """Put the hash of the vectors into the index, where both can be read."""
    try:
        about = json.loads((folder / store.ABOUT).read_bytes())
        about["embeddings"] = read_safetensors(folder / store.VECTORS).sha256
        (folder / store.ABOUT).write_text(json.dumps(about))
    except (ValueError, TypeError):
        return


def some_folder(draw, change, host, folder):
    """A folder to be indexed: a LoRA, its captions or its note."""
    change(f"library/{draw(st.sampled_from(['fox.safetensors', 'fox.txt', 'fox.json']))}", "library/ink.safetensors")
    library = LoraLibrary.index(folder / "library", WordEncoder())
    assert "ink" in {card.name for card in library.entries}
    if library.skipped:
        raise RefusedFileError(library.skipped["fox.safetensors"])


DONE = {"loras": some_loras, "gates": some_gates, "kept": some_kept, "index": some_index, "folder": some_folder}


# ---- what holds for all of them


def step(host):
    """One step of denoising."""
    text = torch.ones(1, 16, 16)
    with torch.no_grad():
        host.unet(torch.ones(1, 4, 8, 8), torch.tensor([10]), encoder_hidden_states=text)


def state(pipe):
    """Everything that attaching changes: modules, their hooks and attributes, and the bits of the weights."""
    models = (pipe.unet, pipe.text_encoder)
    tree = [
        (name, type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for model in models
        for name, module in model.named_modules()
    ]
    return type(pipe), tree, [(k, v.clone()) for model in models for k, v in model.state_dict().items()]


def check_same(before, after):
    assert before[:2] == after[:2]
    for (key, old), (again, new) in zip(before[2], after[2], strict=True):
        assert key == again
        assert torch.equal(old, new)


@pytest.fixture
def bounded():
    """At most `ROOM` bytes beyond what is there, and one thread: threads that wait use the processor, too."""
    threads, before = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_AS)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    torch.set_num_threads(threads)


def fuzz(kind, cases, host, valid, folder):
    """How many files were refused and how many worked, and the longest that one took."""
    outcomes, slowest, before = Counter(), [0.0], state(host)
    shutil.copytree(valid, folder, dirs_exist_ok=True)
    attach(host, loras(folder))  # what is imported or made once does not count
    step(host)
    detach(host)

    @seed(0)
    @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=HealthCheck)
    @given(st.data())
    def one(data):
        broken = {f"library/{store.ABOUT}"} if kind == "index" else set()
        aside = 0.0  # seconds in which Hypothesis draws, which makes tables of its own at first

        def draw(strategy):
            nonlocal aside
            begun = time.process_time()
            drawn = data.draw(strategy)
            aside += time.process_time() - begun
            return drawn

        def change(name, other=None):
            broken.add(name)
            mutated = json_mutated if name.endswith(".json") else safetensors_mutated
            blob = mutated(draw, (folder / name).read_bytes(), (folder / (other or name)).read_bytes())
            (folder / name).write_bytes(blob)

        begun = time.process_time()
        try:
            outcomes[outcome(lambda: DONE[kind](draw, change, host, folder))] += 1
        finally:
            slowest.append(time.process_time() - begun - aside)
            detach(host)
            for name in broken:
                shutil.copy2(valid / name, folder / name)
        assert slowest[-1] < SECONDS
        check_same(before, state(host))

    one()
    return outcomes, max(slowest)


def outcome(run):
    """Whether a file worked or was refused in one sentence; anything else comes out."""
    try:
        run()
    except RefusedFileError as error:
        said = str(error)
    else:
        return "worked"
    assert 0 < len(said) <= SENTENCE
    assert "\n" not in said
    return "refused"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("amount", ["some", *thorough("many")])
def test_broken_files_are_refused_or_work(kind, amount, host, valid, draw, bounded, tmp_path, capsys):
    picture = draw(host)
    cases = CASES[kind][amount == "many"]
    outcomes, slowest = fuzz(kind, cases, host, valid, tmp_path)
    with capsys.disabled():
        print(
            f"\n{kind}: {cases} files, {outcomes['refused']} refused, {outcomes['worked']} worked, slowest {slowest:.2f} s"
        )
    assert outcomes.total() == cases
    assert min(outcomes["refused"], outcomes["worked"]) > cases / 50
    assert torch.equal(draw(host), picture)
