"""LoRA-Flow's own properties."""

import math
from functools import partial

import hosts
import pytest
import torch
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers.gates import Context
from mole_diffusers.gates.types.flow import FlowGate
from mole_diffusers.lora import layer_key, read_expert
from mole_diffusers.patching.gating.gate_location import GateLocation

BOTH = Context(torch.tensor([True, True]), torch.zeros(1))


def test_softmax_then_bias_by_hand():
    gate = FlowGate(2, 1, "mean")
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[math.log(3)], [0.0]]))
        gate.offset.copy_(torch.tensor([0.5, -2.0]))
    weights = gate(torch.tensor([[[1.0], [0.0]]]), BOTH)  # two tokens
    torch.testing.assert_close(weights, torch.tensor([[[1.25, -1.75], [1.0, -1.5]]]))


@pytest.mark.parametrize("start", ["sum", "mean", "faithful"])
def test_weights_sum_to_one_and_the_bias(start):
    torch.manual_seed(0)
    gate = FlowGate(3, 4, start)
    torch.nn.init.normal_(gate.weight)
    torch.nn.init.normal_(gate.offset)
    mask = torch.ones(3, dtype=torch.bool)
    weights = gate(torch.randn(2, 5, 4), Context(mask, torch.zeros(2)))
    torch.testing.assert_close(weights.sum(-1), (1 + gate.bias(mask).sum()).expand(2, 5))


def test_states_that_lie_channel_by_channel_are_read_as_they_lie():
    torch.manual_seed(0)
    gate = FlowGate(2, 4, "sum")
    torch.nn.init.normal_(gate.weight)
    hidden = torch.randn(2, 4, 5).mT  # [B, T, C], as a UNet's block has it
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        weights = gate(hidden, BOTH)
    torch.testing.assert_close(weights, gate(hidden.contiguous(), BOTH))
    copied = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    assert list(hidden.shape) not in copied


@pytest.mark.parametrize("there", [[True, True, True], [True, False, True]])
def test_weights_and_gradients_are_those_of_the_formula_as_it_is_written(there):
    torch.manual_seed(0)
    gate, mask = FlowGate(3, 4, "sum"), torch.tensor(there)
    context = Context(mask, torch.zeros(1), all_weighed=all(there))

    def written(hidden):
        logits = (hidden @ gate.weight.T).masked_fill(~mask, -torch.inf)
        return (torch.softmax(logits, -1) + 1 - 1 / sum(there) + gate.offset) * mask

    for rows in (2, 3):  # what is kept without gradients follows the batch, and every change of the parameters
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter)
        hidden = torch.randn(rows, 5, 4)
        with torch.no_grad():
            torch.testing.assert_close(gate(hidden, context), written(hidden), atol=1e-6, rtol=1e-6)
        direction = torch.randn(rows, 5, 3)
        found, expected = (
            torch.autograd.grad((weights * direction).sum(), list(gate.parameters()))
            for weights in (gate(hidden, context), written(hidden))
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_permuting_tokens_permutes_weights():
    torch.manual_seed(0)
    gate = FlowGate(2, 4, "sum")
    torch.nn.init.normal_(gate.weight)
    hidden, order = torch.randn(1, 5, 4), torch.randperm(5)
    torch.testing.assert_close(gate(hidden[:, order], BOTH), gate(hidden, BOTH)[:, order])


@pytest.mark.parametrize(
    ("start", "bias", "weights"),
    [*thorough(("sum", [0.5, 0.5], [1.0, 1.0])), ("mean", [0.0, 0.0], [0.5, 0.5]), ("faithful", [-0.5, 0.5], [0.0, 1.0])],
)
def test_each_start_is_set_adapters_with_its_weights(pipe, loras, draw, tmp_path, start, bias, weights):
    """The paper's start is the last LoRA alone."""
    assert FlowGate(2, 1, start).bias(BOTH.mask).tolist() == bias
    files = {"fox": loras["fox"], "owl": tiny_lora(pipe, tmp_path / "owl.safetensors", rank=8, seed=7)}
    mole.attach(pipe, files, mole.GateConfig("flow", start=start))
    ours = draw(pipe)
    mole.detach(pipe)
    for name, file in files.items():
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(list(files), weights)
    torch.testing.assert_close(ours, draw(pipe), atol=1e-5, rtol=0)


def test_the_last_expert_that_is_there_begins_alone():
    gate, mask = FlowGate(3, 4, "faithful"), torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    weights = gate(torch.randn(3, 2, 4), Context(mask, torch.zeros(3)))
    assert weights[:, 0].tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert torch.equal(weights[:, 0], weights[:, 1])


def test_layers_of_a_block_share_one_tensor_and_text_has_its_own(pipe, loras, draw, monkeypatch):
    seen, read = [], GateLocation.factor

    def note(slot, asking, x, layer):
        seen.append((asking.name, read(slot, asking, x, layer)))
        return seen[-1][1]

    monkeypatch.setattr(GateLocation, "factor", note)
    mole.attach(pipe, {"fox": loras["fox"]}, "flow")
    draw(pipe, num_inference_steps=1)
    block = "unet.mid_block.attentions.0.transformer_blocks.0."
    own = [w for name, w in seen if name.startswith(block) and not name.endswith(("attn2.to_k", "attn2.to_v"))]
    text = [w for name, w in seen if name.startswith(block) and name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert (len(own), len(text)) == (6, 2)
    assert all(w is own[0] for w in own)
    assert text[0] is text[1]
    assert own[0].shape == (2 * 64, 4)
    assert text[0].shape == (2 * 16, 4)


def test_permuting_experts_with_their_rows_leaves_the_image(pipe, loras, draw, awake):
    mixture = awake(mole.attach(pipe, loras, "flow"))
    kept = {part: {k: v.clone() for k, v in bank.state_dict().items()} for part, bank in mixture.banks.items()}
    image = draw(pipe)
    turned = mole.attach(pipe, dict(reversed(loras.items())), "flow")
    for part, bank in turned.banks.items():
        bank.load_state_dict({k: v.flip(0) for k, v in kept[part].items()})
    torch.testing.assert_close(draw(pipe), image, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", *thorough("sd3", "qwen", "z_image", "krea2", "lumina2")])
def test_where_text_and_picture_are_read_together_each_layer_has_a_gate_for_its_tokens(name, tmp_path):
    pipe, options = hosts.HOSTS[name]()
    pipe.text_encoder, encoder = None, pipe.text_encoder  # files without layers of it
    ends = (
        "to_q",
        "to_add_out",
        "proj_mlp",
        "norm1.linear",
        "context_embedder",
        "w2",
        "img_mlp.net.2",
        "ff.down",
        "linear_2",
    )
    files = {n: tiny_lora(pipe, tmp_path / n, seed=i, ends=ends) for i, n in enumerate(("fox", "ink"))}
    pipe.text_encoder = encoder
    mole.attach(pipe, files, "sum", binding=None)
    plain = hosts.draw(pipe, options, steps=1)
    mole.attach(pipe, files, "flow", binding=None)
    torch.testing.assert_close(hosts.draw(pipe, options, steps=1), plain, atol=1e-5, rtol=0)  # as it begins
    bank, experts, heard = pipe.transformer.mole_gates, [read_expert(file) for file in files.values()], set()
    for i, gate in enumerate(bank):
        gate.weight.normal_(generator=torch.Generator().manual_seed(i))

    def compare(layer, args, out, *, name):
        heard.add(name)
        gate, deltas = bank[name], [expert.layers["transformer"][layer_key(name)].delta() for expert in experts]
        weights = (
            (args[0] @ gate.weight.T).softmax(-1) + 1 / 2 + gate.offset
        )  # [..., 2], eq. 4-5 with b that starts at the sum
        wanted = layer.base_layer(args[0]) + sum(weights[..., k, None] * (args[0] @ d.T) for k, d in enumerate(deltas))
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)

    layers = {layer: module for layer, module in pipe.transformer.named_modules() if hasattr(module, "lora_A")}
    for layer, module in layers.items():
        module.register_forward_hook(partial(compare, name=layer))
    assert not torch.allclose(hosts.draw(pipe, options, steps=1), plain, atol=1e-3)
    assert heard == set(layers)
