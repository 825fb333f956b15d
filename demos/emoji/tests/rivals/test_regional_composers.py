"""Regional composers against the same sums written out: layer by layer, and of single predictions."""

import copy
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from attention import watched, word_map
from torch import nn

import mole_diffusers as mole
from mole_diffusers.binding.regions import region_mask
from mole_diffusers.lora import read_expert
from rivals import regional_composers
from rivals.regional_composers import masked_blend, regional_prompts

PROMPT = "a fox a hat ink"  # a token per letter: "fox" is tokens 2..4, "hat" 6..8
WORDS = {"fox": range(2, 5), "hat": range(6, 9)}
PARTS = {"fox": ("a fox ink", (0.0, 0.0, 0.5, 0.5)), "hat": ("ink of a hat", "right")}  # the lower left is nobody's
FOUND = dict.fromkeys(PARTS, (PROMPT, "auto"))
WHOLE = (0.0, 0.0, 1.0, 1.0)
MATRIX = mole.GateConfig("static", granularity="matrix")


@pytest.fixture
def experts(loras):
    """fox and hat, and ink, which is a style."""
    return {name: replace(read_expert(path, name), triggers=(name,)) for name, path in loras.items()}


@pytest.fixture
def attach(pipe, experts):
    def attach(*names, gates=MATRIX):
        return mole.attach(pipe, {name: experts[name] for name in names or experts}, gates, binding=None)

    return attach


def latent(pipe, prompt=PROMPT, *, steps=1, seeds=(0,), guidance=3.0, **options):
    """The latents after so many steps, [B, 4, 16, 16]."""
    prompts = None if "prompt_embeds" in options else [prompt] * len(seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}
    return pipe(prompts, generator=generators, **call, **options).images


def mask(region, side=16):
    return region_mask(region, side, side)


class Written:
    """kohya's regional LoRA layer by layer: changes of picture layers by region, those of keys and values by prompt.

    Attributes:
        reading: the experts of the text that cross-attention reads; None where it has no expert.
    """

    def __init__(self, pipe, experts, texts):
        self.texts, self.reading = texts, frozenset()
        self.masks = {name: PARTS[name][1] if name in PARTS else WHOLE for name in experts}
        for name, module in pipe.unet.named_modules():
            for which, expert in experts.items():
                if (found := expert.layers["unet"].get(name.replace(".", "_"))) is not None:
                    module.register_forward_hook(partial(self.add, name, which, found.delta()))
            if name.endswith("attn2"):
                module.set_processor(self.cross)

    def add(self, name, expert, delta, module, args, out):
        if "attn2" in name and self.reading is None:
            return out
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            return out + nn.functional.linear(args[0], delta) * (expert in self.reading)
        if isinstance(module, nn.Conv2d):
            change = nn.functional.conv2d(args[0], delta.reshape(module.weight.shape), None, module.stride, module.padding)
            return out + change * mask(self.masks[expert], change.shape[-1])
        change = nn.functional.linear(args[0], delta)
        return out + change * (
            mask(self.masks[expert], int(change.shape[1] ** 0.5)).reshape(-1, 1) if change.dim() == 3 else 1
        )

    def cross(self, attn, hidden_states, encoder_hidden_states=None, **_):
        self.reading = None
        unconditional = self.attend(attn, hidden_states[:1], encoder_hidden_states[:1])
        side, total, rest = int(hidden_states.shape[1] ** 0.5), 0, 1
        for names, text, region in self.texts:
            self.reading = frozenset(names)
            share = rest if region is None else mask(region, side).reshape(-1, 1)
            rest = rest - share
            total = total + share * self.attend(attn, hidden_states[1:], text)
        return torch.cat([unconditional, total])

    def attend(self, attn, hidden, text):
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(hidden), attn.to_k(text), attn.to_v(text))
        )
        attended = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


def test_regional_prompts_are_the_sums_written_out(pipe, experts, attach):
    """With a style, and with a part of the picture that no region has."""
    host = copy.deepcopy(pipe)
    empty, _ = pipe.encode_prompt("", "cpu", 1, False)
    texts = []
    for names, prompt, region in (*((("ink", n), *PARTS[n]) for n in PARTS), (("ink",), PROMPT, None)):
        attach(*names)
        texts.append((names, pipe.encode_prompt(prompt, "cpu", 1, False)[0], region))
    with regional_prompts(pipe, attach(), PROMPT, PARTS):
        found = latent(pipe, steps=2)
    Written(host, experts, texts)
    wanted = latent(host, steps=2, prompt_embeds=texts[-1][1], negative_prompt_embeds=empty)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_a_regional_prompt_of_the_whole_picture_is_that_lora(pipe, attach):
    """Without an unconditional text, which has no LoRA."""
    attach("fox")
    alone = latent(pipe, "a fox", guidance=1.0, seeds=(3, 4))
    with regional_prompts(pipe, attach("fox"), PROMPT, {"fox": ("a fox", "everywhere")}):
        torch.testing.assert_close(latent(pipe, guidance=1.0, seeds=(3, 4)), alone, atol=1e-5, rtol=0)


def test_what_regional_prompts_cannot_draw(pipe, attach):
    for gates, parts, why in (
        ("sum", PARTS, r"need a gate per matrix \(granularity\), got {'gate_type': 'sum'}"),
        (MATRIX, FOUND, r"there is none for \['fox', 'hat'\]"),
        (MATRIX, {}, "one or more"),
        (MATRIX, {"owl": PARTS["fox"]}, r"got \['owl'\] of \['fox', 'ink', 'hat'\]"),
    ):
        with pytest.raises(ValueError, match=why), regional_prompts(pipe, attach(gates=gates), PROMPT, parts):
            pass


# One step of DDIM is linear in the prediction, so the latent of a blend is the blend of the latents of single LoRAs.


def alone(pipe, attach, names, prompt, seeds=(0,)):
    """The latents of these LoRAs, and what their UNet call's attention was."""
    attach(*names)
    with watched(pipe.unet) as calls:
        found = latent(pipe, prompt, seeds=seeds)
    return found, calls[0]


def test_a_masked_blend_is_that_of_the_predictions(pipe, attach):
    fox, hat, rest = (
        alone(pipe, attach, names, prompt)[0]
        for names, prompt in ((("fox", "ink"), PARTS["fox"][0]), (("hat", "ink"), PARTS["hat"][0]), (("ink",), PROMPT))
    )
    with masked_blend(pipe, attach(), PROMPT, PARTS):
        found = latent(pipe)
    upper, right = mask(PARTS["fox"][1]), mask("right")
    torch.testing.assert_close(found, fox * upper + hat * right + rest * (1 - upper - right), atol=1e-5, rtol=0)
    assert min((x - y).abs().max() for x, y in ((fox, hat), (hat, rest), (rest, fox))) > 1e-3


def test_a_blend_in_some_steps_is_the_sum_in_the_others(pipe, attach):
    ways = {"sum": (0.0, 0.0), "blend": (0.0, 1.0), "sum, then blend": (0.5, 1.0), "blend, then sum": (0.0, 0.5)}
    mixture, found = attach(), {}
    for name, (since, until) in ways.items():
        with masked_blend(pipe, mixture, PROMPT, PARTS, since=since, until=until):
            found[name] = latent(pipe, steps=2)
    torch.testing.assert_close(found["sum"], latent(pipe, steps=2), atol=1e-5, rtol=0)
    with masked_blend(pipe, mixture, PROMPT, PARTS):
        assert torch.equal(found["blend"], latent(pipe, steps=2))
    assert min((found[x] - found[y]).abs().max() for x, y in combinations(ways, 2)) > 1e-4


@pytest.mark.thorough
def test_regions_that_overlap_share_their_place(pipe, attach):
    fox, hat = (alone(pipe, attach, (name,), PROMPT)[0] for name in ("fox", "hat"))
    parts = {"fox": (PROMPT, "everywhere"), "hat": (PROMPT, "right")}
    with masked_blend(pipe, attach("fox", "hat"), PROMPT, parts):
        torch.testing.assert_close(latent(pipe), fox + mask("right") * (hat - fox) / 2, atol=1e-5, rtol=0)


@pytest.mark.thorough
def test_a_masked_blend_finds_where_words_are_attended(pipe, attach, monkeypatch):
    """Each picture by its own maps, which the single LoRAs' predictions have."""
    monkeypatch.setattr(regional_composers, "THRESHOLD", 0.8)  # random weights attend to all places about alike
    seeds = (3, 5)
    single = {name: alone(pipe, attach, (name, "ink"), PROMPT, seeds) for name in PARTS}
    rest, _ = alone(pipe, attach, ("ink",), PROMPT, seeds)
    wanted, areas = [], []
    for i in range(len(seeds)):
        maps = {name: word_map(call, len(seeds) + i, WORDS[name], (8, 8)) for name, (_, call) in single.items()}
        picture = rest[i].clone()
        for name, other in (("fox", "hat"), ("hat", "fox")):
            own = (maps[name] > maps[other]) & (maps[name] > 0.8 * maps[name].max())
            own = own.repeat_interleave(2, 0).repeat_interleave(2, 1)  # 16 x 16
            picture = torch.where(own, single[name][0][i], picture)
            areas.append(own.float().mean())
        wanted.append(picture)
    with masked_blend(pipe, attach(), PROMPT, FOUND):
        torch.testing.assert_close(latent(pipe, seeds=seeds), torch.stack(wanted), atol=1e-5, rtol=0)
    assert min(areas) > 0.1
    assert sum(areas) < len(seeds)  # something is background


def test_what_the_prompt_does_not_name_has_no_part(pipe, attach):
    rest, _ = alone(pipe, attach, ("ink",), "a cat")
    with masked_blend(pipe, attach(), "a cat", dict.fromkeys(PARTS, ("a cat", "auto"))):
        torch.testing.assert_close(latent(pipe, "a cat"), rest, atol=1e-5, rtol=0)


# ---- both


def composers(pipe, mixture, turn=dict):
    yield regional_prompts(pipe, mixture, PROMPT, turn(PARTS))
    for parts in (PARTS, FOUND):
        yield masked_blend(pipe, mixture, PROMPT, turn(parts))


@pytest.mark.thorough
def test_neither_order_nor_batch_changes_a_picture(pipe, attach):
    seeds, together, apart = (3, 4), [], []
    for composer in composers(pipe, attach("fox", "ink", "hat")):
        with composer:
            together.append(latent(pipe, seeds=seeds, steps=2))
    for composer in composers(pipe, attach("hat", "fox", "ink"), lambda parts: dict(reversed(parts.items()))):
        with composer:
            apart.append(torch.cat([latent(pipe, seeds=[seed], steps=2) for seed in seeds]))
    for first, second in zip(together, apart, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


def test_everything_is_given_back_after_an_error(pipe, attach):
    base = latent(pipe)
    mixture = attach()
    before = latent(pipe)

    def stop(*_):
        raise RuntimeError("stop")

    for composer in composers(pipe, mixture):
        with pytest.raises(RuntimeError, match="stop"), composer:
            latent(pipe, callback_on_step_end=stop)
        assert mixture.binding is None
        assert not any("forward" in vars(m) for model in (pipe.unet, pipe.text_encoder) for m in model.modules())
        assert torch.equal(latent(pipe), before)
    mole.detach(pipe)
    assert torch.equal(latent(pipe), base)
