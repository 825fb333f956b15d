"""Folding gates away: the same pictures by another route, and the host's very bits afterwards."""

import math
from dataclasses import replace

import pytest
import torch
from gate_types import GATES, INPUT_FREE, gate_types
from hosts import HOSTS, quiet
from safetensors import safe_open
from tiers import thorough
from tiny import CONVOLUTION, tiny_lora, tiny_pipeline

import mole_diffusers as mole
from mole_app.studio.clip_skip import clip_skip
from mole_diffusers import functional
from mole_diffusers.patching.gating.gate_location import GateLocation
from mole_diffusers.patching.install.folding import Averages, evaluate_gates

CLOSE = {"atol": 2e-5, "rtol": 0}


def load_stock(path, draw):
    """What stock diffusers draws with one LoRA file."""
    pipe = tiny_pipeline()
    pipe.load_lora_weights(path)
    return draw(pipe)


@pytest.mark.parametrize("gate_type", gate_types("static", among=INPUT_FREE))
def test_collapsed_gates_draw_the_same_and_leave_no_trace(pipe, loras, draw, awake, gate_type):
    base, bits = draw(pipe), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    mixture = awake(mole.attach(pipe, loras, gate_type), size=0.3 if GATES[gate_type].ranked else 3.0)
    gated = draw(pipe)
    with mixture.collapsed():
        assert mole.attached(pipe) is None
        assert list(pipe.unet.state_dict()) == list(bits)
        torch.testing.assert_close(draw(pipe), gated, **CLOSE)
    assert torch.equal(draw(pipe), gated)
    mole.detach(pipe)
    assert all(torch.equal(v, bits[k]) for k, v in pipe.unet.state_dict().items())
    assert torch.equal(draw(pipe), base)


def test_an_interruption_leaves_no_weight_folded(pipe, loras, monkeypatch):
    bits, copy, left = {k: v.clone() for k, v in pipe.unet.state_dict().items()}, torch.Tensor.copy_, [math.inf]

    def interrupted(weight, kept):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return copy(weight, kept)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt), mole.attach(pipe, loras).collapsed():
        left[0] = 3  # when two weights are restored
    monkeypatch.undo()
    mole.detach(pipe)
    assert all(torch.equal(v, bits[k]) for k, v in pipe.unet.state_dict().items())


def test_collapsed_respects_strength_and_only(pipe, loras, draw):
    mixture = mole.attach(pipe, {"fox": (loras["fox"], -0.7), "ink": loras["ink"], "hat": loras["hat"]})
    with mixture.only("fox", "hat"):
        gated = draw(pipe)
        with mixture.collapsed():
            torch.testing.assert_close(draw(pipe), gated, **CLOSE)


def test_collapsed_respects_weights_per_block_outside_of_blocks_too(pipe, loras, draw):
    pipe = quiet(mole.MoLEPipeline.from_pipe(pipe))
    pipe.load_lora_weights(loras["hat"], adapter_name="hat")  # with convolutions
    whole = draw(pipe)
    pipe.set_adapters("hat", {"unet": {"down": 0.1, "mid": 0.3, "up": 0.7}})
    live = draw(pipe)
    assert not torch.allclose(live, whole, atol=1e-2)
    with pipe.mixture.collapsed():
        torch.testing.assert_close(draw(pipe), live, **CLOSE)


def test_gates_without_input_are_evaluated_where_their_model_is(pipe, loras, monkeypatch):
    mixture, devices = mole.attach(pipe, {"fox": (loras["fox"], 0.8), "hat": loras["hat"]}, "static"), set()
    monkeypatch.setattr(GateLocation, "evaluate", lambda _, hidden, *__, **___: devices.add(hidden.device.type))
    pipe.unet.to("meta")
    evaluate_gates(pipe, [part for part in mixture.parts.components if part.name == "unet"], None)
    assert devices == {"meta"}


def test_gates_that_move_collapse_to_their_average(pipe, loras, draw, awake):
    """The other route: free static gates, set by hand to the mean of a trace of the moving ones."""
    mixture = awake(mole.attach(pipe, loras, mole.GateConfig("mole", total="sigmoid")))
    with mixture.trace() as trace:
        pipe("a fox", num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="latent")
    with mixture.collapsed("a fox"):
        collapsed = draw(pipe)
    still = mole.attach(pipe, loras, mole.GateConfig("static", total="linear"))
    for part, bank in still.parts.banks.items():
        for key, gate in bank.gates.items():
            name = part if key == "network" else f"{part}.{key.replace('/', '.')}"
            weights = torch.stack([trace.weights(p).mean(0) for p in trace.locations if p.split(" ")[0] == name])
            gate.logits.data = weights.amax(0, keepdim=True) - 1  # an expert that a layer lacks has 0 there
    torch.testing.assert_close(collapsed, draw(pipe), **CLOSE)


@pytest.mark.parametrize("axis", [*thorough("concept"), "both"])
def test_gates_of_the_prompt_are_folded_without_drawing(pipe, loras, draw, awake, axis):
    """The other route: what they say while a whole picture is drawn."""
    mixture = awake(mole.attach(pipe, loras, mole.GateConfig("prompt", axis=axis)))
    drawn, entered, call = Averages(), [], {"guidance_scale": 1.0}
    with mixture.parts.listen(drawn):
        draw(pipe, num_inference_steps=3, **call)
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda *_: entered.append(0))
    asked = Averages()
    with mixture.parts.listen(asked):
        evaluate_gates(pipe, mixture.parts.components, "a fox in ink", **call)
    assert not entered
    assert asked.weights.keys() == drawn.weights.keys()
    for key, weights in drawn.weights.items():
        torch.testing.assert_close(asked.weights[key], weights, **CLOSE)
    hook.remove()
    gated = draw(pipe, **call)
    with mixture.collapsed("a fox in ink", **call):
        torch.testing.assert_close(draw(pipe, **call), gated, **CLOSE)
    assert torch.equal(draw(pipe, **call), gated)


def test_folding_a_prompt_leaves_the_processors_of_a_call_that_stopped(loras):
    pipe, options = HOSTS["sd15-pag"]()
    mixture = mole.attach(pipe, loras, "prompt")
    before = dict(pipe.unet.attn_processors)
    with mixture.collapsed("a fox", **options):
        pass
    assert all(
        pipe.unet.attn_processors[name].location is p.location for name, p in before.items() if hasattr(p, "location")
    )
    assert {n: type(p) for n, p in pipe.unet.attn_processors.items()} == {n: type(p) for n, p in before.items()}


@pytest.mark.thorough
def test_still_gates_with_a_prompt_draw_nothing_either(pipe, loras, draw, awake):
    mixture, entered = awake(mole.attach(pipe, loras, "static")), []
    gated = draw(pipe)
    hook = pipe.unet.register_forward_pre_hook(lambda *_: entered.append(0))
    with mixture.collapsed("a fox"):
        assert not entered
        hook.remove()
        torch.testing.assert_close(draw(pipe), gated, **CLOSE)


def test_gates_that_move_need_a_prompt(pipe, loras):
    mixture = mole.attach(pipe, loras, "mole")
    with pytest.raises(ValueError, match="depends on the picture; give a prompt"), mixture.collapsed():
        pass
    assert mole.attached(pipe) is mixture


def test_a_mixture_is_folded_only_once(pipe, loras, draw):
    mixture = mole.attach(pipe, loras)
    gated = draw(pipe)
    with mixture.lifted(), mixture.collapsed():  # taking it off first is fine
        torch.testing.assert_close(draw(pipe), gated, **CLOSE)
        with pytest.raises(ValueError, match="already folded into the pipeline's weights"), mixture.collapsed():
            pass
    with mixture.collapsed():
        torch.testing.assert_close(draw(pipe), gated, **CLOSE)
    assert torch.equal(draw(pipe), gated)


def test_gates_that_move_are_averaged_on_the_pipeline_alone(pipe, loras, tmp_path):
    call, gone = {"path": tmp_path / "one.safetensors", "prompt": "a fox"}, "not attached any more"
    mixture = mole.attach(pipe, loras, "mole")
    with mixture.lifted(), pytest.raises(ValueError, match=gone):
        mixture.export_lora(**call)
    mole.attach(pipe, loras, "mole")
    with pytest.raises(ValueError, match=gone):
        mixture.export_lora(**call)
    still = mole.attach(pipe, loras, binding=None)
    mole.detach(pipe)
    still.export_lora(**call)  # nothing has to be drawn


def test_a_layer_that_clip_skip_leaves_out_is_not_exported(pipe, loras, draw, awake, tmp_path):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    mixture.export_lora(tmp_path / "whole.safetensors", "a fox", num_inference_steps=1)
    with clip_skip(pipe, 2):
        mixture.export_lora(tmp_path / "cut.safetensors", "a fox", num_inference_steps=1)
    whole, cut = (mole.read_expert(tmp_path / f"{name}.safetensors").layers for name in ("whole", "cut"))
    assert cut["unet"].keys() == whole["unet"].keys()
    assert set(cut["text_encoder"]) == {layer for layer in whole["text_encoder"] if layer.startswith("encoder_layers_0_")}


def test_a_mixture_comes_and_goes_while_layers_are_skipped(pipe, loras, draw):
    base, mixture = draw(pipe), mole.attach(pipe, loras)
    gated = draw(pipe)
    with clip_skip(pipe, 2):
        skipping = draw(pipe)
        with mixture.collapsed():
            torch.testing.assert_close(draw(pipe), skipping, **CLOSE)
        assert torch.equal(draw(pipe), skipping)
        mole.detach(pipe)
    assert torch.equal(draw(pipe), base)
    with clip_skip(pipe, 2):
        mole.attach(pipe, loras)
        assert torch.equal(draw(pipe), skipping)
    assert torch.equal(draw(pipe), gated)


def test_an_exception_inside_collapsed_restores(pipe, loras, draw):
    mixture = mole.attach(pipe, loras)
    gated = draw(pipe)
    with pytest.raises(RuntimeError, match="stop"), mixture.collapsed():
        raise RuntimeError("stop")
    assert torch.equal(draw(pipe), gated)


def test_settings_are_refused_while_weights_are_folded(pipe, loras, draw):
    mixture = mole.attach(pipe, loras)
    with mixture.collapsed():
        folded = draw(pipe)
        blocks = mixture.only("fox"), mixture.strengths({"fox": 5}), mixture.fixed({"fox": 0}), mixture.tiled()
        for block in blocks:
            with pytest.raises(ValueError, match="inside `collapsed` the experts are folded"), block:
                pass
        assert torch.equal(draw(pipe), folded)


def test_sets_of_each_prompt_are_exported_at_their_mean(pipe, loras, draw, tmp_path):
    mixture, path = mole.attach(pipe, loras, binding=None), tmp_path / "one.safetensors"
    with mixture.rows([{"fox": 1.0}, {"fox": 0.5, "ink": 1.0}]):
        mixture.export_lora(path, ["a fox", "a hat"], dtype=torch.float32)
    with mixture.fixed({"fox": 0.75, "ink": 0.5}):
        wanted = draw(pipe)
    torch.testing.assert_close(load_stock(path, draw), wanted, **CLOSE)


def test_a_quantised_host_is_refused_and_stays(pipe, loras):
    mixture = mole.attach(pipe, loras)
    weight = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.base_layer.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    first = next(n for n, m in pipe.unet.named_modules() if hasattr(m, "base_layer") and "mid_block" not in n)
    before = pipe.unet.get_submodule(first).base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"unet.mid_block.*float8.*cannot take the experts"), mixture.collapsed():
        pass
    assert torch.equal(pipe.unet.get_submodule(first).base_layer.weight, before)


@pytest.mark.parametrize("format", ["diffusers", *thorough("kohya")])
def test_an_exported_lora_draws_the_same_in_stock_diffusers(pipe, loras, draw, format, tmp_path):
    mixture = mole.attach(pipe, {"fox": (loras["fox"], 0.6), "ink": (loras["ink"], -1.3), "hat": loras["hat"]}, "mean")
    path = tmp_path / "one.safetensors"
    assert mixture.export_lora(path, format=format, dtype=torch.float32) == 0
    torch.testing.assert_close(load_stock(path, draw), draw(pipe), **CLOSE)
    assert mole.read_expert(path).format == ("kohya" if format == "kohya" else "peft")


def test_an_exported_average_is_what_collapsed_draws(pipe, loras, draw, awake, tmp_path):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    call = {"num_inference_steps": 3}
    mixture.export_lora(tmp_path / "one.safetensors", "a fox in ink", dtype=torch.float32, **call)
    with mixture.collapsed("a fox in ink", **call):
        torch.testing.assert_close(load_stock(tmp_path / "one.safetensors", draw), draw(pipe), **CLOSE)


def test_a_cut_states_its_error(pipe, loras, tmp_path):
    mixture = mole.attach(pipe, loras)
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    mixture.export_lora(whole, dtype=torch.float32)
    error = mixture.export_lora(cut, rank=3, dtype=torch.float32)
    lost, square, smaller = 0.0, 0.0, mole.read_expert(cut).layers
    for part, layers in mole.read_expert(whole).layers.items():
        for key, weights in layers.items():
            small = smaller[part][key]
            assert small.rank == min(3, weights.rank)
            lost += (weights.delta() - small.delta()).square().sum().item()
            square += weights.delta().square().sum().item()
    assert error == pytest.approx(math.sqrt(lost / square), rel=1e-4)
    assert 0.01 < error < 1
    with safe_open(cut, "pt") as file:
        assert float(file.metadata()["mole.relative_error"]) == pytest.approx(error, rel=1e-2)
    assert mixture.export_lora(cut, rank=64) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="1 or more, got 0"):
        mixture.export_lora(cut, rank=0)
    with pytest.raises(ValueError, match=r"'lycoris'; known: \['diffusers', 'kohya'\]"):
        mixture.export_lora(cut, format="lycoris")


def test_low_rank_of_a_convolution_is_the_best_by_dense_svd():
    down, up = torch.randn(6, 5, 3, 3), torch.randn(7, 6, 1, 1)
    dense = up.flatten(1) @ down.flatten(1)
    small_down, small_up, values = functional.low_rank(down, up, 2)
    assert small_down.shape == (2, 5, 3, 3)
    assert small_up.shape == (7, 2, 1, 1)
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(values, s[:6], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(small_up.flatten(1) @ small_down.flatten(1), u[:, :2] * s[:2] @ v[:2], atol=1e-4, rtol=1e-4)


def test_an_expert_that_weighs_nothing_is_not_exported(pipe, loras, tmp_path):
    other = tiny_lora(pipe, tmp_path / "other.safetensors", ends=CONVOLUTION)
    mixture = mole.attach(pipe, {"fox": loras["fox"], "other": (other, 0.0)})
    mixture.export_lora(tmp_path / "one.safetensors")
    layers = mole.read_expert(tmp_path / "one.safetensors").layers
    assert {w.rank for part in layers.values() for w in part.values()} == {4}
    assert {k for part, ls in layers.items() for k in ls} == {
        k for ls in mole.read_expert(loras["fox"]).layers.values() for k in ls
    }


def test_an_exported_lora_has_the_trigger_words_of_the_loras_in_it(pipe, loras, tmp_path):
    experts = {name: replace(mole.read_expert(file), triggers=(name, "drawing")) for name, file in loras.items()}
    mixture = mole.attach(pipe, experts, binding=None)
    with mixture.only("fox", "hat"):
        mixture.export_lora(tmp_path / "one.safetensors")
    mole.save_expert(mole.merge({name: experts[name] for name in ("fox", "hat")}, "sum"), tmp_path / "merged.safetensors")
    one, merged = (mole.read_expert(tmp_path / f"{name}.safetensors").triggers for name in ("one", "merged"))
    assert one == merged == ("fox", "drawing", "hat")


@pytest.mark.parametrize(("rows", "columns"), [(3, 9), (9, 3)])
def test_a_rank_above_the_smaller_side_keeps_all(rows, columns):
    down, up = torch.randn(6, columns), torch.randn(rows, 6)
    small_down, small_up, _ = functional.low_rank(down, up, 5)
    assert len(small_down) == 3
    torch.testing.assert_close(small_up @ small_down, up @ down, atol=1e-5, rtol=1e-5)


def test_what_is_folded_refuses_changes_that_would_have_no_effect(pipe, loras):
    mixture = mole.attach(pipe, loras)
    with mixture.collapsed():
        for change in (
            lambda: mixture.strength("fox", 0.5),
            lambda: mixture.bind({"fox": "a fox"}),
            lambda: mixture.bind(None),
        ):
            with pytest.raises(ValueError, match="inside `collapsed` the experts are folded"):
                change()
        assert mixture.strength("fox") == 1.0
    mixture.strength("fox", 0.5)
