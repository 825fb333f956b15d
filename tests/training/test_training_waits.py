"""An update of training asks nothing of the device, so that a card is given its work ahead of time.

It runs on torch's meta device: tensors there have no values, so whatever reads one (`item`, `tolist`, `if tensor`, picking
by a mask, `cpu()`) fails, where it would make the CPU wait for a card. Copies to the device are watched.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from gate_types import LEARNED
from hosts import HOSTS, sdxl
from tiers import thorough
from tiny import tiny_clip, tiny_lora, tiny_pipeline, tiny_tokenizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import mole_diffusers as mole
from mole_diffusers.patching.undo import undoing
from mole_diffusers.training import (
    OBJECTIVES,
    Clip,
    GateTraining,
    LoraTraining,
    Samples,
    TrainingContext,
    TrainingData,
    network,
    train_gates,
)
from mole_diffusers.training.config import TERMS, ClipTerm
from mole_diffusers.training.denoising import predict
from mole_diffusers.training.gate_trainer import GateTrainer
from mole_diffusers.training.lora_trainer import LoraTrainer

TEACH = {"seeds": 2, "steps": 2}
OPTIONS = {
    "single": TEACH,
    "composed": TEACH,
    "base": TEACH,
    "separate": {"steps": 8},
    "denoise": {},
    "clip": {"lengths": (3, 4)},
    "rollout": {"steps": 2},
    "collage": {"pictures": 2, "seeds": 2, "steps": 2},
}
LIVE = ("clip", "rollout", "separate", "denoise")  # these prepare nothing by the models that would need values
PICTURES = Samples(torch.randn(2, 4, 16, 16), ["a fox", "an ink"])


class Dispatched(TorchDispatchMode):
    """Notes every copy to the meta device that is not of the kind that waits for nothing."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), func.name()
        if name == "aten::_to_copy" and out.is_meta and not args[0].is_meta and not kwargs.get("non_blocking"):
            self.waits.append(name)
        return out


class Called(TorchFunctionMode):
    """Notes what hides such a copy: tensors made of numbers right on the meta device, and rows picked by numbers."""

    def __init__(self, waits: list[str]):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and out.is_meta and not isinstance(args[0], torch.Tensor):
            self.waits.append(func.__name__)
        if func is torch.Tensor.__getitem__ and out.is_meta:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.waits += [
                "picked" for i in indices if isinstance(i, list) or (isinstance(i, torch.Tensor) and not i.is_meta)
            ]
        return out


def waits(step):
    """What `step(i)` waits for in its second run, when all that is kept has been made."""
    step(0)
    watch = Dispatched()
    with watch, Called(watch.waits):
        step(1)
    return watch.waits


@pytest.fixture
def meta(monkeypatch):
    """A tiny pipeline and a CLIP, and `leave()`, which takes their values away."""
    pipe, clip = tiny_pipeline(), Clip(tiny_clip().requires_grad_(False), tiny_tokenizer())
    monkeypatch.setattr("mole_diffusers.training.gate_trainer.digest", lambda _: "of values")

    def leave():
        for model in (pipe.unet, pipe.text_encoder, pipe.vae, clip.model):
            model.to("meta")
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # meta has no autocast to ask for
        monkeypatch.setattr(Clip, "text", lambda _, captions: torch.empty(len(captions), 8, device="meta"))

    return pipe, clip, leave


@contextmanager
def words_bound(pipe, mixture, prompts):
    """A run of training in which words and a place are bound, and each prompt was read once."""
    mixture.bind({"fox": ("fox", "left"), "ink": "ink"})
    with mixture.parts.shared.tokens.remembering():
        with torch.no_grad():
            for pair in product(prompts, repeat=2):  # of two rows, since padding is as long as the longest
                predict(pipe, PICTURES.latents, torch.tensor([500, 500]), pair)
        yield


REST = [t for t in OBJECTIVES if t != "denoise"]
OTHERS = [gate_type for gate_type in LEARNED if gate_type != "mole"]
CASES = [("denoise", "mole"), *thorough(*((t, "mole") for t in REST), *(("denoise", f) for f in OTHERS))]


@pytest.mark.parametrize(("term", "gate_type"), CASES)
def test_an_update_of_gates_waits_for_nothing(meta, loras, term, gate_type):
    pipe, clip, leave = meta
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, gate_type)
    data = TrainingData(
        {"fox": ["a fox"], "ink": ["ink art"]}, ["a fox in ink"], {"fox": ["cat"]}, ["a cat"],
        parts={"a fox in ink": ["a fox", "ink art"]}, samples=PICTURES,
    )  # fmt: skip
    config = GateTraining({term: 1.0, "balance": 0.1}, batch=2, steps=2, drop=0.5, ema=0.9)
    context = TrainingContext(pipe, mixture, data, clip, config)
    terms = {} if term in LIVE else {term: OBJECTIVES[term](context, TERMS[term](**OPTIONS[term]))}
    with words_bound(pipe, mixture, ["", "a fox", "an ink", "ink art", "a fox in ink", "a cat"]):
        leave()
        terms = terms or {term: OBJECTIVES[term](context, TERMS[term](**OPTIONS[term]))}
        trainer = GateTrainer(context)
        trainer.loss_fns = terms
        with trainer.only_gates_learn():
            assert waits(lambda i: trainer.update(i)) == []
    assert len(trainer.engine.log.pending) == 2


@pytest.mark.parametrize("options", [{}, *thorough({"checkpointing": True})])
def test_an_update_of_gates_on_sdxl_waits_for_nothing(monkeypatch, tmp_path, options):
    pipe = sdxl()
    monkeypatch.setattr("mole_diffusers.training.gate_trainer.digest", lambda _: "of values")
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    mixture = mole.attach(pipe, files, "mole")
    config = GateTraining({"denoise": 1.0, "balance": 0.1}, batch=2, steps=2, drop=0.5, ema=0.9, **options)
    context = TrainingContext(pipe, mixture, TrainingData(samples=PICTURES), None, config)
    with words_bound(pipe, mixture, ["", *PICTURES.captions]):
        for model in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
            model.to("meta")
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # meta has no autocast to ask for
        trainer = GateTrainer(context)
        trainer.loss_fns = {"denoise": OBJECTIVES["denoise"](context, TERMS["denoise"]())}
        with trainer.only_gates_learn():
            assert waits(lambda i: trainer.update(i)) == []


@pytest.mark.parametrize("host", ["flux", *thorough("qwen", "z_image")])
def test_an_update_of_gates_on_a_transformer_waits_for_what_the_transformer_waits_for(monkeypatch, tmp_path, host):
    monkeypatch.setattr("mole_diffusers.training.gate_trainer.digest", lambda _: "of values")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # meta has no autocast to ask for
    pipe, bare = HOSTS[host]()[0], HOSTS[host]()[0]
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    mixture = mole.attach(pipe, files, "mole")
    inputs, sides = mixture.parts.shared.inputs, iter([(8, 8)] * 2)  # the side is read once, of each device
    inputs.record = replace(inputs.record, latent_size=lambda *_: next(sides)) if host == "flux" else inputs.record
    with words_bound(pipe, mixture, ["", *PICTURES.captions]):
        texts = {pair: network(pipe).embed(pair) for pair in product(("", *PICTURES.captions), repeat=2)}
        on_meta = partial(tree_map_only, torch.Tensor, lambda tensor: tensor.detach().to("meta", non_blocking=True))
        monkeypatch.setattr(type(network(pipe)), "embed", lambda _, prompts: on_meta(texts[tuple(prompts)]))
        for model in (
            pipe.transformer,
            pipe.text_encoder,
            getattr(pipe, "text_encoder_2", None),
            pipe.vae,
            bare.transformer,
        ):
            if model is not None:
                model.to("meta")
        x, level = torch.empty(2, 4, 16, 16, device="meta"), torch.empty(2, device="meta")
        own = waits(lambda _: network(bare).call(x, level, network(bare).embed(PICTURES.captions)))
        config = GateTraining({"denoise": 1.0, "balance": 0.1}, batch=2, steps=2, drop=0.5, ema=0.9)
        context = TrainingContext(pipe, mixture, TrainingData(samples=PICTURES), None, config)
        trainer = GateTrainer(context)
        trainer.loss_fns = {"denoise": OBJECTIVES["denoise"](context, TERMS["denoise"]())}
        with trainer.only_gates_learn():
            assert waits(lambda i: trainer.update(i)) == own


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:for gates")  # their values are gone
def test_what_a_checkpoint_holds_goes_where_the_run_is(meta, loras, tmp_path):
    pipe, clip, leave = meta
    files = {n: loras[n] for n in ("fox", "ink")}
    data = TrainingData(composed=["a fox in ink"], samples=PICTURES)
    config = GateTraining({"clip": {"lengths": (3, 3)}}, batch=2, steps=2, every=1, ema=0.9)
    train_gates(pipe, mole.attach(pipe, files, "mole"), data, config=config, clip=clip, folder=tmp_path)
    mole.detach(pipe)
    mixture = mole.attach(pipe, files, "mole")
    leave()
    trainer = GateTrainer(TrainingContext(pipe, mixture, data, clip, config), folder=tmp_path)
    trainer.engine.resume("checkpoint-1")
    way, state = trainer.context.state["clip 0"], trainer.engine.optimizer.state
    found = [way["x"], way["looks"], *trainer.ema.shadow_params, *(state[p]["exp_avg"] for p in trainer.engine.parameters)]
    assert all(tensor.is_meta for tensor in found)
    assert trainer.engine.device.type == "meta"
    trainer.loss_fns = {"clip": OBJECTIVES["clip"](trainer.context, ClipTerm(lengths=(3, 3)))}
    with trainer.only_gates_learn():
        trainer.update(1)


@pytest.mark.thorough
def test_an_update_of_a_concept_waits_for_nothing(meta):
    pipe, _, leave = meta
    leave()
    config = LoraTraining(rank=8, steps=2, batch=2, beam=True)
    with undoing() as undo:
        trainer = LoraTrainer(pipe, {"concept": PICTURES, "prior": PICTURES}, config, undo)
        assert waits(trainer.update) == []


def test_what_waits_is_noticed():
    values = torch.ones(2, device="meta")
    for step in (
        lambda _: values.to("cpu"),
        lambda _: values.sum().item(),
        lambda _: values[values > 0],
        lambda _: bool(values.any()),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            waits(step)
    assert waits(lambda _: torch.ones(2).to("meta")) == ["aten::_to_copy"]
    assert waits(lambda _: torch.tensor([1.0], device="meta")) == ["tensor"]
    assert waits(lambda _: values[[0, 1]]) == ["picked"]
    assert waits(lambda _: torch.ones(2).to("meta", non_blocking=True) + values) == []
