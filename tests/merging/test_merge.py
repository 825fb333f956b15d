"""Merges of real files: one ordinary LoRA that stock diffusers loads, and bad input."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import hosts
import pytest
import torch
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline

import mole_diffusers as mole
from mole_diffusers import safe_files
from mole_diffusers.lora import layer_key, read_expert
from mole_diffusers.merging import METHODS
from mole_diffusers.merging.activations import as_rows
from mole_diffusers.patching.host.denoisers import record

PROMPTS = {"fox": ["a fox", "the fox"], "ink": ["in ink"], "hat": ["a hat"]}
TWO_STEPS = {"num_inference_steps": 2, "output_type": "np"}
FILE = "fox.safetensors"
BY_ACTIVATIONS = ("ssr", "regmean", "iteris", "scalars")


@pytest.fixture
def activations(pipe):
    return mole.Activations(pipe, PROMPTS, steps=2, rows=64)


def merged(method, loras, pipe, **options):
    if method in BY_ACTIVATIONS:
        options["activations"] = mole.Activations(pipe, PROMPTS, steps=2, rows=64)
    if method == "iteris":
        options["rounds"] = 2
    return mole.merge({"fox": loras["fox"], "ink": (loras["ink"], 0.5)}, method, **options)


FAST = ("svd", "ties", "lego", "regmean")  # one of each file


def picture(pipe):
    return torch.from_numpy(pipe("a fox", generator=torch.Generator().manual_seed(0), **TWO_STEPS).images)


@pytest.fixture(scope="module")
def stock():
    """Plain diffusers, and what it draws without a LoRA."""
    pipe = tiny_pipeline()
    return pipe, picture(pipe)


@pytest.mark.parametrize("method", [*FAST, *thorough(*(method for method in METHODS if method not in FAST))])
def test_stock_diffusers_loads_every_merge(method, loras, tmp_path, stock):
    pipe, _ = stock
    expert = merged(method, loras, pipe)
    assert mole.attached(pipe) is None
    mole.save_expert(expert, tmp_path / "one.safetensors", dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "one.safetensors", adapter_name="one")
    theirs = {
        (part, layer_key(name)): module.get_delta_weight("one")
        for part in ("unet", "text_encoder")
        for name, module in getattr(pipe, part).named_modules()
        if hasattr(module, "get_delta_weight")
    }
    pipe.unload_lora_weights()
    ours = {(part, key): w.delta() for part, layers in expert.layers.items() for key, w in layers.items()}
    assert set(theirs) == set(ours)
    for key, delta in ours.items():
        torch.testing.assert_close(theirs[key], delta, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "factor"), [("sum", {}, 1.0), *thorough(("lego", {"clusters": 10**6}, 0.5**0.5))]
)
def test_convolutions_are_merged_too(tmp_path, stock, method, options, factor):
    """Against the mixture: LoRA-LEGO with as many clusters as ranks is the sum by the root of two."""
    pipe, _ = stock
    ends = "attn1.to_q", "attn2.to_v", "conv1", "proj_in", "conv_shortcut"
    one, other = (tiny_lora(pipe, tmp_path / f"{i}.safetensors", rank=8, seed=i, ends=ends) for i in (4, 5))
    expert = mole.merge({"one": one, "other": (other, 0.5)}, method, **options)
    mole.save_expert(expert, tmp_path / "one.safetensors", dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "one.safetensors", adapter_name="one")
    merged = picture(pipe)
    pipe.unload_lora_weights()
    mole.attach(pipe, {"one": (one, factor), "other": (other, 0.5 * factor)}, "sum")
    both = picture(pipe)
    mole.detach(pipe)
    torch.testing.assert_close(merged, both, rtol=0, atol=2e-5)


def test_stock_diffusers_draws_a_merge_as_we_do(loras, tmp_path, stock):
    pipe, plain = stock
    expert = merged("knots", loras, pipe)
    mole.save_expert(expert, tmp_path / "one.safetensors", dtype=torch.float32)
    mole.attach(pipe, {"merged": expert})
    ours = picture(pipe)
    mole.detach(pipe)
    pipe.load_lora_weights(tmp_path / "one.safetensors", adapter_name="one")
    theirs = picture(pipe)
    pipe.unload_lora_weights()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
    assert (ours - plain).abs().max() > 1e-3


def test_the_sum_is_set_adapters_and_the_strength_counts(loras, stock):
    pipe, _ = stock
    mole.attach(pipe, {"merged": merged("sum", loras, pipe)})
    ours = picture(pipe)
    mole.detach(pipe)
    for name in ("fox", "ink"):
        pipe.load_lora_weights(loras[name], adapter_name=name)
    pipe.set_adapters(["fox", "ink"], [1.0, 0.5])
    theirs = picture(pipe)
    pipe.unload_lora_weights()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)


def test_a_lower_rank_says_what_it_costs(loras, pipe):
    whole, small = merged("sum", loras, pipe), merged("svd", loras, pipe)
    assert whole.ranks == (2, 6)
    assert small.ranks == (2, 4)
    assert float(whole.metadata["mole.lost_energy"]) == 0
    key = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    exact, near = (e.layers["unet"][key].delta() for e in (whole, small))
    values = torch.linalg.svdvals(exact)
    assert (exact - near).norm() == pytest.approx(values[4:].norm().item(), rel=1e-4)
    lost = sum(
        (whole.layers[p][k].delta() - w.delta()).square().sum() for p, ls in small.layers.items() for k, w in ls.items()
    )
    energy = sum(w.delta().square().sum() for ls in whole.layers.values() for w in ls.values())
    assert float(small.metadata["mole.lost_energy"]) == pytest.approx(float(lost / energy), abs=1e-4)
    assert merged("ties", loras, pipe, rank=1).ranks == (1, 1)


def test_full_rank_merges_keep_nearly_all_of_their_energy(loras, pipe):
    for method in ("ties", "dare"):
        whole = merged(method, loras, pipe)
        assert 0 < float(whole.metadata["mole.lost_energy"]) <= 0.01
        full = merged(method, loras, pipe, rank=10**6)
        assert float(full.metadata["mole.lost_energy"]) == 0
        for part, layers in whole.layers.items():
            for key, weights in layers.items():
                squares = torch.linalg.svdvals(full.layers[part][key].delta()).square()
                assert squares[: weights.rank].sum() >= 0.9899 * squares.sum()
                assert squares[: weights.rank - 1].sum() < 0.9901 * squares.sum()


def test_a_merge_file_says_what_it_is(loras, pipe, tmp_path):
    expert = merged("dare", loras, pipe, drop=0.5)
    expert = mole.Expert(**{**vars(expert), "triggers": ("fox", "ink")})
    mole.save_expert(expert, tmp_path / "one.safetensors")
    again = read_expert(tmp_path / "one.safetensors")
    assert again.triggers == ("fox", "ink")
    assert again.metadata["mole.method"] == "dare"
    assert again.metadata["mole.options"] == '{"drop": 0.5}'
    assert (again.base, again.format) == (expert.base, "peft")


def test_activations_are_what_reaches_the_layer(pipe, loras, activations):
    """Against a hand-made run: the LoRA alone, conditional rows, words up to the text's end."""
    expert = read_expert(loras["fox"], "fox")
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    found = activations.own("fox", expert)
    key = "unet.mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    mole.attach(pipe, {"fox": expert})
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    generators = [torch.Generator().manual_seed(42 + i) for i in range(2)]
    pipe(PROMPTS["fox"], generator=generators, num_inference_steps=2, guidance_scale=1.0)
    handle.remove()
    mole.detach(pipe)
    tokens = [len(pipe.tokenizer(prompt).input_ids) for prompt in PROMPTS["fox"]]  # with beginning and end
    wanted = torch.cat([x[i, 1 : tokens[i]] for x in seen for i in range(2)])
    torch.testing.assert_close(found[key], wanted)
    assert activations.own("fox", expert) is found  # an expert is run once
    assert activations.own("fox", expert, 0.5) is not found


def test_each_text_encoder_is_recorded_on_its_own_tokens(tmp_path):
    """CLIP reads a beginning, words and an end; T5 no beginning."""
    pipe, options = hosts.HOSTS["flux"]()
    ends = ("self_attn.q_proj", "SelfAttention.q")
    expert = read_expert(tiny_lora(pipe, tmp_path / "a.safetensors", ends=ends))
    runs = mole.Activations(pipe, {"a": ["a fox", "fox"]}, steps=1, rows=10_000)
    found = runs.own("a", expert)
    assert {key.partition(".")[0] for key in found} == {"text_encoder", "text_encoder_2"}
    for key, inputs in found.items():
        clip = key.startswith("text_encoder.")
        tokenizer = pipe.tokenizer if clip else pipe.tokenizer_2
        assert len(inputs) == sum(len(tokenizer(prompt).input_ids) - clip for prompt in ("a fox", "fox"))


@pytest.mark.parametrize("host", ["flux", "sd3", "animatediff"])
def test_padding_is_left_out_of_what_reads_a_text_and_nothing_of_pictures_and_frames(tmp_path, host):
    """Against the inputs cut by hand. SD 3's attn2 here reads the picture, AnimateDiff's in motion modules frames."""
    pipe, _ = hosts.HOSTS[host]()
    ends = ("attn.to_k", "attn.add_k_proj", "attn2.to_k")
    expert, prompts = read_expert(tiny_lora(pipe, tmp_path / "a.safetensors", ends=ends)), ["a fox", "fox"]
    seen = {}
    for name, module in hosts.denoiser(pipe).named_modules():
        if name.endswith(ends):
            assert (record(hosts.denoiser(pipe)).blocks.token_type_of(name) is None) == ("motion_modules" in name)
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({layer_key(name): args[0]}))
    found = mole.Activations(pipe, {"a": prompts}, steps=1, rows=10**6).own("a", expert)
    tokenizer, start, whole = (pipe.tokenizer_2, 0, 512) if host == "flux" else (pipe.tokenizer, 1, 0)
    ends = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    assert {key.partition(".")[2] for key in found} == set(seen)
    for key, x in seen.items():  # [B, T, C]
        texts = [row[start : ends[i * len(ends) // len(x)]] for i, row in enumerate(x)]
        if "single" in key:
            wanted = torch.cat([part for row, text in zip(x, texts, strict=True) for part in (text, row[whole:])])
        elif "add_k" in key or "attentions" in key:
            wanted = torch.cat(texts)
        else:
            wanted = x.flatten(0, 1)
        torch.testing.assert_close(found[f"{next(iter(expert.layers))}.{key}"], wanted, msg=key)


def test_a_text_that_no_encoder_made_is_refused_by_name(pipe, loras, monkeypatch):
    runs, call = mole.Activations(pipe, PROMPTS, steps=1), type(pipe).__call__
    states = torch.randn(2, 77, 16)
    monkeypatch.setattr(type(pipe), "__call__", lambda pipe, prompts, **how: call(pipe, prompt_embeds=states, **how))
    with pytest.raises(ValueError, match="'fox' cannot be recorded: UNet2DConditionModel reads a text that is not as its"):
        runs.own("fox", read_expert(loras["fox"]))


def test_rows_are_spaced_and_limited(pipe, loras):
    few = mole.Activations(pipe, PROMPTS, steps=2, rows=5).own("ink", read_expert(loras["ink"]))
    assert {len(x) for key, x in few.items() if key.startswith("unet.") and "attn1" in key} == {10}


def test_running_experts_leaves_an_attached_mixture_in_place(pipe, loras, draw, activations):
    mixture = mole.attach(pipe, {"ink": loras["ink"]})
    before = draw(pipe)
    activations.own("fox", read_expert(loras["fox"]))
    assert mole.attached(pipe) is mixture
    assert torch.equal(draw(pipe), before)


def test_patches_of_a_convolution_are_what_its_matrix_multiplies():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1, stride=2, bias=False)
    x = torch.randn(2, 3, 8, 8)
    rows = as_rows(conv, x) @ conv.weight.flatten(1).T  # [B, T, Cout]
    torch.testing.assert_close(rows.transpose(1, 2).reshape(2, 5, 4, 4), conv(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "unknown merge method 'best'; known: ['sum',"),
        ({"method": "ties", "drop": 0.5}, "unknown options ['drop'] of merge method 'ties'; known: ['share', 'scale']"),
        ({"method": "ssr"}, "give activations=Activations(pipe, prompts)"),
        ({"method": "np", "protect": ["cat"]}, "unknown experts ['cat'] to protect; given: ['fox', 'ink']"),
        ({"method": "ties", "share": "half"}, "share of merge method 'ties' must be a number, got 'half'"),
        ({"method": "dare", "elect": 1}, "elect of merge method 'dare' must be true or false, got 1"),
        ({"method": "lego", "starts": 1.5}, "starts of merge method 'lego' must be a whole number, got 1.5"),
        ({"method": "lego", "features": "cosine"}, "must be one of ['raw', 'normalized'], got 'cosine'"),
        ({"method": "lego", "starts": 0}, "starts of k-means must be 1 or more, got 0"),
        ({"method": "lego", "clusters": "many"}, "clusters of merge method 'lego' must be a whole number, got 'many'"),
        ({"method": "ties", "scale": math.nan}, "scale of merge method 'ties' must be a finite number, got nan"),
        ({"method": "dare", "drop": math.inf}, "drop of merge method 'dare' must be a finite number, got inf"),
        ({"method": "np", "mu": math.nan}, "mu of merge method 'np' must be a finite number, got nan"),
        ({"rank": 0}, "the rank of a merge must be 1 or more"),
    ],
)
def test_bad_input(loras, options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        mole.merge({"fox": loras["fox"], "ink": loras["ink"]}, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (["fox"], "experts are names with files, as {'fox': 'fox.safetensors'}, got ['fox']"),
        ({1: FILE}, "the name of an expert is text, as 'fox', got 1"),
        ({"fox": (FILE, 1, 2)}, "expert 'fox' is a file or (file, strength), got ('fox.safetensors', 1, 2)"),
        ({"fox": 3}, "expert 'fox' is a file or (file, strength), got 3"),
        ({"fox": (FILE, "x")}, "the strength of 'fox' must be a number, got 'x'"),
        ({"fox": (FILE, math.inf)}, "the strength of 'fox' must be a finite number, got inf"),
        ({"fox": (FILE, -1e7)}, "the strength of 'fox' must be in -1e+06..1e+06, got -10000000.0"),
        ({}, "at least one expert"),
    ],
)
def test_merge_and_attach_refuse_the_same_experts(pipe, loras, monkeypatch, experts, message):
    monkeypatch.chdir(Path(loras["fox"]).parent)
    for run in (partial(mole.attach, pipe), mole.merge):
        with pytest.raises((TypeError, ValueError)) as error:
            run(experts)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("regmean", {"size": 1}, "unknown options ['size'] of merge method 'regmean'"),
        ("ssr", {"ridge": math.nan}, "ridge of merge method 'ssr' must be a finite number, got nan"),
        ("ssr", {"ridge": -0.1}, "the ridge must be 0 or more, got -0.1"),
        ("regmean", {"ridge": -1}, "the ridge must be 0 or more, got -1"),
        ("iteris", {"ridge": -1}, "the ridge must be 0 or more, got -1"),
        ("scalars", {"ridge": -1}, "the ridge must be 0 or more, got -1"),
        ("regmean", {"diagonal": 1.1}, "RegMean's diagonal must be at least 0 and at most 1, got 1.1"),
        ("regmean", {"diagonal": -0.1}, "RegMean's diagonal must be at least 0 and at most 1, got -0.1"),
        ("iteris", {"rounds": 0}, "rounds of IterIS must be 1 or more, got 0"),
        ("iteris", {"rank": 0}, "the rank of a merge must be 1 or more, got 0"),
        ("scalars", {}, "no prompts for expert 'cat', 'owl'; there are some for ['fox', 'hat', 'ink']"),
    ],
)
def test_bad_input_is_known_before_an_expert_runs(loras, activations, monkeypatch, method, options, message):
    monkeypatch.setattr(mole.Activations, "run", lambda *_: pytest.fail("an expert ran"))
    experts = {"fox": loras["fox"], **dict.fromkeys(() if options else ("cat", "owl"), loras["ink"])}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        mole.merge(experts, method, activations=activations, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_a_merge_that_memory_cannot_hold_is_refused_before_it_begins(loras, monkeypatch, method):
    """At full rank, 12 bytes for each number of its factors. One of rank 1 fits, but TIES sorts all entries of an expert."""
    experts = {"fox": loras["fox"], "ink": loras["ink"]}
    full = mole.merge(experts, method, rank=10**6)
    factors = [w for layers in full.layers.values() for w in layers.values()]
    size = 12 * sum(w.down.numel() + w.up.numel() for w in factors)
    most = 8 * sum(w.delta().numel() for w in factors)
    assert most < size
    memory = type("Memory", (), {"available": size - 1})
    monkeypatch.setattr(safe_files.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(ValueError, match=f"by '{method}' without a rank takes {size} bytes, more than the {size - 1} bytes"):
        mole.merge(experts, method)
    memory.available = most
    assert mole.merge(experts, method, rank=1).ranks == (1, 1)
    memory.available = most - 1
    if method == "dare":
        mole.merge(experts, method, rank=1)
    else:
        with pytest.raises(ValueError, match=f"by 'ties' of rank 1 takes {most} bytes"):
            mole.merge(experts, method, rank=1)


def test_a_merge_is_for_the_family_that_one_of_its_experts_tells(loras):
    fox, ink = (read_expert(loras[name], name) for name in ("fox", "ink"))
    assert mole.merge({"fox": replace(fox, base="unknown"), "ink": ink}).base == ink.base != "unknown"


def test_bad_experts(loras, pipe, activations, tmp_path):
    with pytest.raises(ValueError, match="at least one expert"):
        mole.merge({})
    with pytest.raises(ValueError, match="the strength of 'fox' must be a finite number"):
        mole.merge({"fox": (loras["fox"], float("nan"))})
    with pytest.raises(ValueError, match="rounds of IterIS must be 1 or more, got 0"):
        mole.merge({"fox": loras["fox"], "ink": loras["ink"]}, "iteris", activations=activations, rounds=0)
    with pytest.raises(ValueError, match="no prompts for expert 'cat'"):
        mole.merge({"cat": loras["fox"]}, "ssr", activations=activations)
    wide = tiny_lora(tiny_pipeline(width=32), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="'fox' is for cross-attention 16, 'wide' is for cross-attention 32"):
        mole.merge({"fox": loras["fox"], "wide": wide})
    unknown = replace(read_expert(wide), base="unknown")
    with pytest.raises(ValueError, match="do not fit one model: .* of layer 'text_encoder"):
        mole.merge({"fox": loras["fox"], "wide": unknown})
