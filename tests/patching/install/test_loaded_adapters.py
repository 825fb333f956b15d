"""Which experts' ranks the layers hold: a folder of many LoRAs draws, and costs, as if only those were there that act."""

import threading
from contextlib import nullcontext

import pytest
import torch
from diffusers import StableDiffusionPipeline
from gate_types import gate_types
from hosts import OFFLOADS
from safetensors.torch import load_file, save_file
from tiers import thorough
from tiny import ATTENTION, FEED_FORWARD, tiny_lora, tiny_pipeline

import mole_diffusers as mole
from mole_diffusers.gates import GATE_TYPES
from mole_diffusers.lora.writing import trigger_phrase
from mole_diffusers.patching.gating.gated_experts import ADAPTER

ENDS = {"fox": ATTENTION, "owl": ATTENTION, "cat": ATTENTION + FEED_FORWARD, "dog": ATTENTION, "hat": ATTENTION}
FEED = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"  # in "cat" alone
PROMPT = "a fox and an owl"
CLOSE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folder(*names): one with these LoRAs, each with its name as its word and a rank of its own."""
    host, files = tiny_pipeline(), tmp_path_factory.mktemp("files")
    for i, (name, ends) in enumerate(ENDS.items()):
        file = tiny_lora(host, files / f"{name}.safetensors", rank=2 + i, seed=i, ends=ends)
        save_file(load_file(file), file, trigger_phrase([name]) | {"format": "pt"})

    def folder(*names):
        made = tmp_path_factory.mktemp("folder")
        for name in names:
            (made / f"{name}.safetensors").symlink_to(files / f"{name}.safetensors")
        return made

    return folder


def held(pipe, name):
    """The ranks that layers of a model hold, by layer."""
    model = getattr(pipe, name)
    return {n: m.lora_A[ADAPTER].weight for n, m in model.named_modules() if ADAPTER in getattr(m, "lora_A", {})}


def ranks(pipe, name="unet"):
    return {layer: len(down) for layer, down in held(pipe, name).items()}


def test_a_folder_draws_and_holds_what_its_named_loras_alone_do(folders, draw):
    many, two = tiny_pipeline(), tiny_pipeline()
    mole.attach(many, folders(*ENDS))
    mole.attach(two, folders("fox", "owl"))
    assert set(ranks(many).values()) == {1}  # of zeros: nothing is named yet
    for prompt in (PROMPT, "an owl", PROMPT):
        assert torch.equal(draw(many, prompt), draw(two, prompt))
        for model in ("unet", "text_encoder"):
            assert ranks(two, model).items() <= ranks(many, model).items()
    assert ranks(many)[FEED] == 1
    draw(many, "a cat")
    assert ranks(many)[FEED] == 4
    mole.detach(many)
    assert torch.equal(draw(many), draw(tiny_pipeline()))


@pytest.mark.parametrize("gates", gate_types("mole", "factors", among=GATE_TYPES))
def test_pictures_are_those_with_all_ranks(folders, draw, awake, gates):
    pipe = tiny_pipeline()
    mixture = awake(mole.attach(pipe, folders(*ENDS), gates), size=0.3)
    for prompt in (PROMPT, "a hat", "a house"):
        picture = draw(pipe, prompt)
        with mixture.adjusted(lambda location, given, mask: given):  # it may weigh anyone, so all are held
            torch.testing.assert_close(draw(pipe, prompt), picture, **CLOSE)
        assert ranks(pipe)[FEED] == 4
        assert max(ranks(pipe).values()) == 2 + 3 + 4 + 5 + 6


@pytest.mark.parametrize("gates", ["factors", *thorough("rank", "retrieval")])
def test_gates_that_read_single_ranks_have_all(folders, draw, gates):
    pipe = tiny_pipeline()
    mole.attach(pipe, folders(*ENDS), gates)
    before = held(pipe, "unet")
    assert {len(down) for down in before.values()} == {2 + 3 + 4 + 5 + 6, 4}
    draw(pipe)
    assert all(down is before[name] for name, down in held(pipe, "unet").items())


def test_ranks_move_only_when_others_are_named(folders, draw):
    pipe = tiny_pipeline()
    mixture = mole.attach(pipe, folders(*ENDS))
    draw(pipe, PROMPT)
    before = held(pipe, "unet")
    with mixture.tiled(0.6, since=0.0):  # each subject is drawn by its own LoRA
        draw(pipe, PROMPT, num_inference_steps=4)
    pipe.disable_lora()
    draw(pipe, "a dog")
    pipe.enable_lora()
    mixture.strength("fox", 0.5)
    draw(pipe, [PROMPT, "a fox"])
    assert all(down is before[name] for name, down in held(pipe, "unet").items())
    with mixture.only("owl"):
        draw(pipe, PROMPT)
    assert set(ranks(pipe).values()) == {1, 3}


def test_a_lora_that_acts_later_in_a_call_is_moved_in(folders, draw):
    """Beside those that are there; what was kept of the text belongs to the matrices of before."""
    pictures = []
    for starts in (0.0, 1e-9):  # with a tiny strength, nothing moves
        pipe = tiny_pipeline()
        mixture = mole.attach(pipe, folders("fox", "owl"), binding=None)
        mixture.strength("owl", starts)

        def louder(_, step, time, given, mixture=mixture):
            if step == 2:
                mixture.strength("owl", 1.0)
            return given

        pictures.append(draw(pipe, PROMPT, num_inference_steps=6, callback_on_step_end=louder))
        assert set(ranks(pipe).values()) == {2 + 3}
    torch.testing.assert_close(*pictures, **CLOSE)


def test_with_gradients_all_ranks_are_there(folders):
    """Checkpointed blocks run again with the matrices of their first run."""
    pipe = tiny_pipeline()
    mole.attach(pipe, folders(*ENDS))
    pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, pipe.unet.config.cross_attention_dim))
    assert max(ranks(pipe).values()) == 2 + 3 + 4 + 5 + 6


@pytest.mark.shows("`from_pipe`")
def test_nothing_moves_while_a_second_pipeline_draws_in_another_thread(folders, draw):
    pipe, alone = tiny_pipeline(), tiny_pipeline()
    mole.attach(pipe, folders(*ENDS))
    mole.attach(alone, folders(*ENDS))
    second = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    half_way, goes_on, drawn = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is thread and not half_way.is_set():
            half_way.set()
            assert goes_on.wait(60)

    between = next(m for n, m in pipe.unet.named_modules() if n.startswith("mid_block") and n.endswith(f"lora_A.{ADAPTER}"))
    between.register_forward_hook(wait)  # in the middle of a layer
    thread = threading.Thread(target=lambda: drawn.append(draw(second, "a cat")))
    thread.start()
    assert half_way.wait(60)
    try:
        torch.testing.assert_close(draw(pipe, "a dog"), draw(alone, "a dog"), **CLOSE)
    finally:
        goes_on.set()
        thread.join()
    assert len(drawn) == 1  # without an error


@pytest.mark.thorough
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_compiled_code_is_made_once_for_all_ranks(folders, draw, whole):
    torch.compiler.reset()
    pipe, other, graphs = tiny_pipeline(), tiny_pipeline(), []
    mole.attach(pipe, folders(*ENDS))
    mole.attach(other, folders(*ENDS))
    compiling = pipe.unet.compile if whole else pipe.unet.compile_repeated_blocks
    compiling(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    if whole:
        with torch.no_grad(), pytest.raises(Exception, match="made for other LoRAs"):
            pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, pipe.unet.config.cross_attention_dim))
    known = []
    for prompt in ("a fox", PROMPT, "a cat", "a hat and a dog"):  # bound blocks have graphs of their own
        picture = draw(pipe, prompt)
        if not whole:  # one graph has no words
            torch.testing.assert_close(picture, draw(other, prompt), **CLOSE)
        known.append(len(graphs))
    assert max(ranks(pipe).values()) == 2 + 3 + 4 + 5 + 6
    assert 0 < known[1] == known[-1]


@pytest.mark.thorough
@pytest.mark.parametrize("first", [False, True], ids=["attached first", "offloaded first"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_offloaded_pipelines_draw_the_same(folders, draw, name, first):
    pipe, plain = tiny_pipeline(), tiny_pipeline()
    if first:
        OFFLOADS[name](pipe)
    mixture = mole.attach(pipe, folders(*ENDS))
    mole.attach(plain, folders(*ENDS))
    if not first:
        OFFLOADS[name](pipe)
    by_parts = name != "model"
    with pytest.raises(ValueError, match="LoRAs that act now") if by_parts else nullcontext(), torch.no_grad():
        pipe.encode_prompt("a fox", "cpu", 1, False)
    for prompt in ("a fox", PROMPT, "a cat"):
        torch.testing.assert_close(draw(pipe, prompt), draw(plain, prompt), **CLOSE)
    if by_parts:
        assert max(ranks(pipe).values()) == 2 + 3 + 4 + 5 + 6
    else:
        assert ranks(pipe) == ranks(plain)
    with mixture.drawing(), torch.no_grad():
        pipe.encode_prompt("a fox", "cpu", 1, False)
