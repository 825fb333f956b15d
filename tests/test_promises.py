"""The promises of the project, each on a tiny real Stable Diffusion."""

import warnings
from contextlib import nullcontext

import hosts
import pytest
import torch
from hosts import assert_same, snapshot
from safetensors.torch import load_file, save_file
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline

import mole_diffusers as mole


@pytest.mark.parametrize("gate_type", ["sum", "mole"])
def test_detach_gives_the_original_back_bit_for_bit(pipe, loras, draw, gate_type):
    base, before = draw(pipe), snapshot(pipe)
    processors = dict(pipe.unet.attn_processors)
    mole.attach(pipe, loras, gate_type)
    assert not torch.allclose(draw(pipe), base, atol=1e-2)
    mole.detach(pipe)
    assert_same(before, snapshot(pipe))
    assert torch.equal(draw(pipe), base)
    assert all(pipe.unet.attn_processors[k] is p for k, p in processors.items())
    assert mole.attached(pipe) is None


def test_attaching_twice_replaces_and_one_detach_undoes_both(pipe, loras, draw):
    base, before = draw(pipe), snapshot(pipe)
    mole.attach(pipe, {"fox": loras["fox"]})
    mole.attach(pipe, {"ink": loras["ink"]})
    other = tiny_pipeline()
    mole.attach(other, {"ink": loras["ink"]})
    assert torch.equal(draw(pipe), draw(other))
    mole.detach(pipe)
    assert_same(before, snapshot(pipe))
    assert torch.equal(draw(pipe), base)


def test_detach_after_an_exception_inside_a_context(pipe, loras, draw):
    base = draw(pipe)
    mixture = mole.attach(pipe, loras, "mole")
    with pytest.raises(RuntimeError, match="stop"), mixture.only("fox"), mixture.trace():
        raise RuntimeError("stop")

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=interrupt)
    mole.detach(pipe)
    assert torch.equal(draw(pipe), base)


def test_a_failed_attach_leaves_what_was_attached(pipe, loras, draw, tmp_path):
    mole.attach(pipe, {"fox": loras["fox"]})
    attached = draw(pipe)
    wide = tiny_pipeline(width=32)
    wrong = tiny_lora(wide, tmp_path / "wide.safetensors")
    with pytest.raises(
        ValueError, match=r"'wide'.*does not fit layer text_encoder\..*\[16, 16\], the LoRA's down is \[4, 32\]"
    ):
        mole.attach(pipe, {"wide": wrong})
    for given in ((loras["fox"], 1, 2), [loras["fox"], 0.5], (1.0, loras["fox"])):
        with pytest.raises(TypeError, match=r"expert 'fox' is a file or \(file, strength\), got"):
            mole.attach(pipe, {"fox": given})
    with pytest.raises(FileNotFoundError, match="no LoRA file"):
        mole.attach(pipe, {"gone": tmp_path / "gone.safetensors"})
    with pytest.raises(FileNotFoundError, match="no gate type"):
        mole.attach(pipe, loras, tmp_path / "no-gates")
    assert torch.equal(draw(pipe), attached)


def test_a_failure_while_installing_undoes_what_was_done(pipe, loras, draw, monkeypatch):
    from mole_diffusers.patching.install import peft_injection

    base, before = draw(pipe), snapshot(pipe)
    fill, calls = peft_injection.fill, []

    def fail_on_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return fill(*args)

    monkeypatch.setattr(peft_injection, "fill", fail_on_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        mole.attach(pipe, loras, "mole")
    assert_same(before, snapshot(pipe))
    assert torch.equal(draw(pipe), base)


def test_sum_equals_set_adapters(pipe, loras, draw):
    mole.attach(pipe, loras, "sum")
    ours = draw(pipe)
    mole.detach(pipe)
    for name, path in loras.items():
        pipe.load_lora_weights(path, adapter_name=name)
    pipe.set_adapters(list(loras), [1.0] * len(loras))
    torch.testing.assert_close(ours, draw(pipe), atol=1e-5, rtol=0)


REST = [mole.GateConfig("static", total="1"), mole.GateConfig("static", total="N"), mole.GateConfig("mole", total="N")]


@pytest.mark.parametrize("gates", ["sum", mole.GateConfig("mole", total="1"), *thorough("mean", *REST)], ids=str)
def test_one_expert_equals_that_lora_in_diffusers(pipe, loras, draw, awake, gates):
    awake(mole.attach(pipe, {"hat": loras["hat"]}, gates))
    ours = draw(pipe)
    mole.detach(pipe)
    pipe.load_lora_weights(loras["hat"])
    torch.testing.assert_close(ours, draw(pipe), atol=1e-5, rtol=0)


def test_two_identical_experts_equal_one(pipe, loras, draw, awake):
    mole.attach(pipe, {"a": loras["ink"]})
    one = draw(pipe)
    awake(mole.attach(pipe, {"a": loras["ink"], "b": loras["ink"]}, mole.GateConfig("mole", total="1")))
    torch.testing.assert_close(draw(pipe), one, atol=1e-5, rtol=0)


def test_strength_and_weights_are_what_is_applied(pipe, loras, draw):
    strengths = {"fox": 0.5, "ink": -0.8, "hat": 1.7}
    mole.attach(pipe, {n: (loras[n], s) for n, s in strengths.items()})
    ours = draw(pipe)
    mole.detach(pipe)
    for name, path in loras.items():
        pipe.load_lora_weights(path, adapter_name=name)
    pipe.set_adapters(list(loras), list(strengths.values()))
    torch.testing.assert_close(ours, draw(pipe), atol=1e-5, rtol=0)


@pytest.mark.parametrize("total", ["N", *thorough("1")])
def test_strength_zero_means_absent(pipe, loras, draw, awake, total):
    config = mole.GateConfig("mole", total=total)
    mixture = awake(mole.attach(pipe, loras, config))
    with mixture.only("fox", "ink"):
        masked = draw(pipe)
    mixture.strength("hat", 0)
    assert torch.equal(draw(pipe), masked)


def test_only_restores_and_one_survivor_is_that_lora(pipe, loras, draw, awake):
    mixture = awake(mole.attach(pipe, loras, mole.GateConfig("mole", total="1")))
    before = draw(pipe)
    with mixture.only("hat"):
        alone = draw(pipe)
    assert torch.equal(draw(pipe), before)
    mole.attach(pipe, {"hat": loras["hat"]})
    torch.testing.assert_close(alone, draw(pipe), atol=1e-5, rtol=0)


def test_strengths_set_in_a_block_stay_but_of_those_it_names(pipe, loras):
    mixture = mole.attach(pipe, loras)
    with mixture.strengths({"fox": 0.5}), mixture.strengths({"hat": 0.7}):
        mixture.strength("fox", 3.0)
        mixture.strength("ink", 2.0)
        assert [mixture.strength(name) for name in loras] == [3.0, 2.0, 0.7]
    assert [mixture.strength(name) for name in loras] == [1.0, 2.0, 1.0]
    with mixture.strengths({"fox": 0.5}), mixture.only("fox"):
        mixture.parts.choose({"ink": 3.0})
        assert (mixture.strength("ink"), mixture.parts.active) == (3.0, {"ink"})
    assert (mixture.strength("ink"), mixture.parts.active) == (2.0, set(loras))


def test_fixed_weights_stand_in_for_gates(pipe, loras, draw, awake):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    with mixture.fixed({"fox": 0.5, "ink": 2.0}):
        fixed = draw(pipe)
    mole.attach(pipe, {"fox": (loras["fox"], 0.5), "ink": (loras["ink"], 2.0)})
    torch.testing.assert_close(fixed, draw(pipe), atol=1e-5, rtol=0)


@pytest.mark.shows("`disable_lora`, `enable_lora`, `scale`")
def test_only_gates_get_gradients(pipe, loras):
    from mole_diffusers.training.denoising import predict

    mixture = mole.attach(pipe, loras, "mole")
    for model in (pipe.unet, pipe.text_encoder):
        model.requires_grad_(False)
    for parameter in mixture.parameters():
        parameter.requires_grad_(True)
    pipe.enable_lora()  # peft turns gradients of active adapters on
    predict(pipe, torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), ["a fox", ""]).square().mean().backward()
    gates = {id(p) for p in mixture.parameters()}
    named = {n: p for bank in mixture.banks.values() for n, p in bank.named_parameters()}
    shared = {n: p for n, p in named.items() if "layers" in n or "transformer_blocks" in n}  # elsewhere is one expert
    assert all(p.grad.abs().sum() > 0 for n, p in shared.items() if n.endswith("matrix"))
    others = [p for model in (pipe.unet, pipe.text_encoder) for p in model.parameters() if id(p) not in gates]
    assert all(p.grad is None for p in others)


def test_save_load_same_image_and_permuted_experts_too(pipe, loras, draw, awake, tmp_path):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    image = draw(pipe)
    mixture.save_pretrained(tmp_path)
    fresh = tiny_pipeline()
    mole.attach(fresh, loras, tmp_path)
    assert torch.equal(draw(fresh), image)
    turned = mole.attach(fresh, dict(reversed(loras.items())), tmp_path)
    assert list(turned.experts) == list(loras)
    assert torch.equal(draw(fresh), image)


def test_a_batch_of_two_is_two_batches_of_one(pipe, loras, awake):
    awake(mole.attach(pipe, loras, "mole"))

    def images(prompts, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return torch.from_numpy(pipe(prompts, generator=generators, num_inference_steps=2, output_type="np").images)

    both = images(["a fox", "ink"], [1, 2])
    torch.testing.assert_close(both[:1], images(["a fox"], [1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(both[1:], images(["ink"], [2]), atol=1e-4, rtol=0)


def test_guidance_rows_have_their_own_gates(pipe, loras, draw, awake):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    with mixture.trace() as trace:
        draw(pipe)
    place = next(p for p in trace.locations if p.startswith("unet.mid"))
    first = next(w for name, _, w in trace.records if name == place)
    assert first.shape == (2, 3)
    assert not torch.allclose(first[0], first[1], atol=1e-4)


@pytest.mark.shows("`disable_lora`, `enable_lora`, `scale`")
def test_disable_lora_and_scale_work_through_the_mixture(pipe, loras, draw, awake):
    base = draw(pipe)
    awake(mole.attach(pipe, loras, "mole"))
    gated = draw(pipe)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), base)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), gated)
    torch.testing.assert_close(draw(pipe, cross_attention_kwargs={"scale": 0.0}), base, atol=1e-5, rtol=0)


@pytest.mark.parametrize("host", ["sd15", "flux", *thorough("sdxl", "sd3")])
def test_off_is_off_whatever_is_bound(host, tmp_path, recwarn):
    """Words, regions and tiles are those of experts: without any, the base draws."""
    pipe, options = hosts.HOSTS[host]()
    size = options | {"height": 32, "width": 32}  # with room for two tiles
    if host in ("sd15", "sdxl"):
        pipe.unet.register_to_config(sample_size=8)
    prompt, names = "a fox and an ox", ("fox", "ox")
    base = hosts.draw(pipe, size, prompt)
    files = {name: tiny_lora(pipe, tmp_path / name, seed=seed) for seed, name in enumerate(names)}
    mixture = mole.attach(pipe, files, binding={"fox": ("fox", "left"), "ox": ("ox", "right")})
    bound = hosts.draw(pipe, size, prompt)
    assert (bound - base).abs().max() > 1e-4
    attention = "cross_attention_kwargs" if hasattr(pipe, "unet") else "joint_attention_kwargs"
    for block in (nullcontext(), mixture.tiled() if hasattr(pipe, "unet") else nullcontext()):
        with block:
            assert torch.equal(hosts.draw(pipe, size | {attention: {"scale": 0.0}}, prompt), base)
            assert not mixture.layouts
            pipe.disable_lora()
            assert torch.equal(hosts.draw(pipe, size, prompt), base)
            pipe.enable_lora()
    assert torch.equal(hosts.draw(pipe, size, prompt), bound)
    assert not [each for each in recwarn if "places" in str(each.message)]


def test_off_is_off_in_a_loop_of_ones_own(pipe, loras):
    text, x = pipe.encode_prompt("a fox and a hat", "cpu", 1, False)[0], torch.ones(1, 4, 16, 16)
    call = {"sample": x, "timestep": 500, "encoder_hidden_states": text, "return_dict": False}
    with torch.no_grad():
        base = pipe.unet(**call)[0]
        mole.attach(pipe, loras, binding={"fox": ("fox", "left"), "hat": ("hat", "right")})
        mixed = pipe.encode_prompt("a fox and a hat", "cpu", 1, False)[0]
        assert not torch.allclose(mixed, text)
        pipe.disable_lora()
        assert torch.equal(pipe.encode_prompt("a fox and a hat", "cpu", 1, False)[0], text)
        call["encoder_hidden_states"] = pipe.encode_prompt("a fox and a hat", "cpu", 1, False)[0]
        assert torch.equal(pipe.unet(**call)[0], base)
        pipe.enable_lora()
        assert not torch.equal(pipe.unet(**call)[0], base)
        assert torch.equal(pipe.unet(**call, cross_attention_kwargs={"scale": 0.0})[0], base)


def test_an_ordinary_lora_stays_beside_the_mixture(pipe, loras, draw):
    pipe.load_lora_weights(loras["hat"], adapter_name="hat")
    plain = draw(pipe)
    mole.attach(pipe, {"fox": loras["fox"]})
    beside = draw(pipe)
    mole.detach(pipe)
    assert torch.equal(draw(pipe), plain)
    pipe.load_lora_weights(loras["fox"], adapter_name="fox")
    pipe.set_adapters(["hat", "fox"], [1.0, 1.0])
    torch.testing.assert_close(beside, draw(pipe), atol=1e-5, rtol=0)


def test_a_lora_that_is_loaded_already_is_named_since_it_acts_twice(pipe, loras, draw):
    two = {name: loras[name] for name in ("fox", "hat")}
    mole.attach(pipe, two)
    once = draw(pipe)
    mole.detach(pipe)
    for adapter in ("hat", "ink"):
        pipe.load_lora_weights(loras[adapter], adapter_name=adapter)
    pipe.set_adapters("hat", 0.5)
    with pytest.warns(UserWarning, match="'hat' is also on the pipeline as the adapter 'hat', so it acts twice") as said:
        mole.attach(pipe, two)
    assert sum("acts twice" in str(each.message) for each in said) == 1
    assert (draw(pipe) - once).abs().max() > 1e-2
    pipe.delete_adapters(["hat", "ink"])
    torch.testing.assert_close(draw(pipe), once, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("adapters", "weight"), [("ink", 1.0), ("hat", 0.0)])
def test_a_lora_that_acts_once_is_not_named(pipe, loras, adapters, weight):
    for adapter in ("hat", "ink"):
        pipe.load_lora_weights(loras[adapter], adapter_name=adapter)
    pipe.set_adapters(adapters, weight)
    with warnings.catch_warnings(record=True) as said:
        mole.attach(pipe, {"hat": loras["hat"]})
    assert not any("acts twice" in str(each.message) for each in said)


@pytest.mark.parametrize(
    ("binding", "named"),
    [
        ("auto", "'fox' and 'ink' are known"),
        ({"fox": "everywhere"}, "'ink' are known"),
        ({"fox": "everywhere", "ink": "everywhere"}, ""),
        ({"fox": "a fox"}, ""),  # its words are read, and each picture says that 'ink' has none
        (None, ""),
    ],
    ids=str,
)
def test_attach_says_once_who_has_no_words_if_nobody_has(pipe, loras, draw, binding, named):
    two = {name: loras[name] for name in ("fox", "ink")}
    with warnings.catch_warnings(record=True, action="always") as said:
        mole.attach(pipe, two, binding=binding)
        draw(pipe)
        draw(pipe)
        mole.attach(pipe, {"fox": loras["fox"]})  # one alone is the plain LoRA
    told = [str(each.message) for each in said if "no words of '" in str(each.message)]
    assert [f"no words of {named}" in each for each in told] == [True] * bool(named)


@pytest.mark.shows("`unload_lora_weights`")
def test_unload_takes_the_mixture_out(pipe, loras, draw):
    base = draw(pipe)
    mole.attach(pipe, loras)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), base)
    mole.detach(pipe)
    assert torch.equal(draw(pipe), base)


def test_active_adapters_and_gradients_of_an_ordinary_lora_come_back(pipe, loras):
    for name in ("hat", "fox"):
        pipe.load_lora_weights(loras[name], adapter_name=name)
    pipe.set_adapters(["hat", "fox"])
    pipe.unet.requires_grad_(False)
    before = snapshot(pipe)
    mole.attach(pipe, {"ink": loras["ink"]})
    mole.detach(pipe)
    assert_same(before, snapshot(pipe))
    assert pipe.get_active_adapters() == ["hat", "fox"]


def test_what_would_silently_not_act_is_refused(pipe, loras):
    pipe.load_lora_weights(loras["hat"], adapter_name="hat")
    pipe.disable_lora()
    with pytest.raises(ValueError, match=r"are disabled; call pipe.enable_lora\(\) first"):
        mole.attach(pipe, loras)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(loras["hat"], adapter_name="mole_experts")
    with pytest.raises(ValueError, match="already has an adapter named 'mole_experts'"):
        mole.attach(pipe, loras)
    pipe.unload_lora_weights()
    pipe.fuse_qkv_projections()
    with pytest.raises(ValueError, match="q, k and v are fused"):
        mole.attach(pipe, loras)


@pytest.mark.parametrize("beside", [False, True])
def test_a_mixture_that_is_disabled_is_not_replaced(pipe, loras, draw, beside):
    if beside:
        pipe.load_lora_weights(loras["hat"], adapter_name="hat")
    mixture = mole.attach(pipe, {"fox": loras["fox"]})
    on = draw(pipe)
    pipe.disable_lora()
    with pytest.raises(ValueError, match=r"are disabled; call pipe.enable_lora\(\) first"):
        mole.attach(pipe, {"ink": loras["ink"]})
    assert mole.attached(pipe) is mixture
    pipe.enable_lora()
    assert torch.equal(draw(pipe), on)


def test_a_text_encoder_with_another_pipelines_mixture_is_refused(pipe, loras, draw):
    other = type(pipe)(**pipe.components | {"unet": tiny_pipeline(1).unet}, requires_safety_checker=False)
    mole.attach(pipe, {"fox": loras["fox"]})
    picture = draw(pipe)
    with pytest.raises(ValueError, match="another pipeline's mixture is on its text_encoder; detach that one first"):
        mole.attach(other, {"ink": loras["ink"]})
    assert mole.attached(other) is None
    assert torch.equal(draw(pipe), picture)
    mole.detach(pipe)
    mole.attach(other, {"ink": loras["ink"]})


def test_a_mixture_that_was_taken_off_says_so(pipe, loras, draw, tmp_path):
    mixture = mole.attach(pipe, {"fox": loras["fox"], "ink": (loras["ink"], 0.5)}, binding=None)
    assert repr(mixture) == "<Mixture of fox 1, ink 0.5; gates 'sum', not bound; on StableDiffusionPipeline>"
    with mixture.lifted():
        assert "lifted off" in repr(mixture)
        mixture.strength("ink", 0.25)
        mixture.bind({"fox": ("fox", "left")})
    assert mixture.strength("ink") == 0.25
    mole.detach(pipe)
    assert (
        repr(mixture) == "<Mixture of fox 1, ink 0.25; gates 'sum', bound; not attached any more to StableDiffusionPipeline>"
    )
    calls = [
        lambda: mixture.strength("fox", 2.0),
        lambda: mixture.bind({"fox": "a fox"}),
        lambda: mixture.bind(None),
        lambda: mixture.parts.choose({"fox": 1.0}),
        lambda: mixture.save_pretrained(tmp_path / "gates"),
        lambda: mixture.push_to_hub("me/gates"),
    ]
    other = mole.attach(pipe, {"fox": loras["fox"]})
    for call in calls:
        with pytest.raises(ValueError, match="not attached any more: attach again, or use what is"):
            call()
    assert not (tmp_path / "gates").exists()
    assert (mixture.strength("fox"), other.strength("fox")) == (1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, files: mole.attach("me/fox", files), "on a loaded pipeline, such as .*from_pretrained.'me/fox'"),
        (lambda pipe, files: mole.attach(None, files), "a unet or a transformer, and NoneType has neither"),
        (lambda pipe, files: mole.attach(pipe.unet, files), "a unet or a transformer, and UNet2DConditionModel has neither"),
        (lambda pipe, files: mole.detach("me/fox"), "on a loaded pipeline"),
        (lambda pipe, files: mole.detach(None), "NoneType has neither"),
        (lambda pipe, files: mole.attach(pipe, files, gates="mol"), "'mol' is no gate type.*gate types: sum, mean.*mole"),
        (lambda pipe, files: mole.attach(pipe, files, gates=3), "gates are a gate type.*got 3; gate types: sum"),
        (
            lambda pipe, files: mole.attach(pipe, files, binding="fox"),
            'as {"fox": "a fox"}, or is None, got .fox.; only attach',
        ),
        (lambda pipe, files: mole.attach(pipe, files).bind("auto"), 'as {"fox": "a fox"}, or is None, got .auto.'),
        (lambda pipe, files: mole.attach(pipe, files).bind(["fox"]), "got .'fox'."),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_taken(pipe, loras, call, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        call(pipe, {"fox": loras["fox"]})


def test_a_pipeline_can_be_saved_while_lifted(pipe, loras, draw, tmp_path):
    base = draw(pipe)
    mixture = mole.attach(pipe, loras)
    attached = draw(pipe)
    with mixture.lifted():
        assert torch.equal(draw(pipe), base)
        pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(pipe), attached)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), base)


def test_push_to_hub_uploads_what_save_pretrained_writes(pipe, loras, hub):
    api, folder = hub
    sent = {"private": True, "commit_message": "first"}
    assert mole.attach(pipe, loras, "mole").push_to_hub("me/gates", token="secret", **sent) == "https://hub/me/gates"
    api.create_repo.assert_called_once_with("me/gates", private=True, exist_ok=True)
    assert api.upload_folder.call_args.kwargs["commit_message"] == "first"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "gates.safetensors"]


def test_a_region_that_weights_by_hand_overrule_is_said(pipe, loras, draw):
    mixture = mole.attach(pipe, {name: loras[name] for name in ("fox", "hat")}, binding={"fox": ("fox", "left")})
    for weights, is_lost in ({"fox": 1.0}, True), ({"hat": 1.0}, False):
        with mixture.fixed(weights):
            draw(pipe)
        assert any("region of 'fox' does not act" in why for why in mixture.binding_warnings) == is_lost


def test_a_region_of_a_lora_that_sees_no_picture_is_refused_unless_it_has_words(pipe, loras, tmp_path):
    layers = {key: value for key, value in load_file(loras["fox"]).items() if key.startswith("text_encoder.")}
    save_file(layers, tmp_path / "text.safetensors")
    mixture = mole.attach(pipe, {"text": tmp_path / "text.safetensors"})
    with pytest.raises(ValueError, match="region of 'text' cannot act: its LoRA has layers of text encoders alone"):
        mixture.bind({"text": (None, "left")})
    mixture.bind({"text": ("a fox", "left")})
