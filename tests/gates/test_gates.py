"""Gates: every family, place and input; resolution, precision, traces and files."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiers import thorough
from tiny import ATTENTION, FEED_FORWARD, tiny_lora, tiny_pipeline

import mole_diffusers as mole
from mole_diffusers import MoLEAttnProcessor
from mole_diffusers.gates import Context, GateConfig
from mole_diffusers.gates.types.mole import MoLEGate
from mole_diffusers.gates.types.static import StaticGate

ALL = Context(torch.tensor([True, True]), torch.zeros(1))


def test_mole_gate_by_hand():
    gate = MoLEGate(2, 2, "1", "pooled")
    with torch.no_grad():
        gate.matrix.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        gate.log_tau.fill_(math.log(0.5))
    hidden = torch.tensor([[[1.0, 8.0], [5.0, 0.0]]])  # mean (3, 4), normalised (0.6, 0.8), logits over tau (1.2, 1.6)
    weights = gate(hidden, ALL)
    share = 1 / (1 + math.exp(-0.4))
    torch.testing.assert_close(weights, torch.tensor([[1 - share, share]]))


def test_flattened_features_by_hand():
    gate = MoLEGate(2, 4, "1", "flattened")
    with torch.no_grad():
        gate.matrix[0, 3] = 2.0
    hidden = torch.tensor([[[0.0, 3.0], [0.0, 4.0]]])  # normalised (0, .6, 0, .8)
    share = 1 / (1 + math.exp(-1.6))
    torch.testing.assert_close(gate(hidden, ALL), torch.tensor([[share, 1 - share]]))


@pytest.mark.parametrize("total", ["1", "N", "sigmoid", "linear"])
@pytest.mark.parametrize("bias", [False, True])
def test_mole_weights_and_gradients_are_those_of_the_formula_as_it_is_written(total, bias):
    torch.manual_seed(0)
    gate, hidden = MoLEGate(3, 5, total, "pooled", bias=bias), torch.randn(2, 7, 5)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    context = Context(torch.tensor([True, False, True]), torch.zeros(1))

    def written():
        features = torch.nn.functional.normalize(hidden.mean(1), dim=-1)
        logits = features @ gate.matrix.T / gate.log_tau.exp() + (gate.bias if bias else 0)
        return mole.functional.gate_weights(logits, context.mask, total)

    for seed in range(3):  # what is kept without gradients follows every change of the parameters
        with torch.no_grad():
            torch.testing.assert_close(gate(hidden, context), written(), atol=1e-6, rtol=1e-6)
        direction = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        found, expected = (
            torch.autograd.grad((weights() * direction).sum(), list(gate.parameters()))
            for weights in (lambda: gate(hidden, context), written)
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        with torch.no_grad():
            for parameter, gradient in zip(gate.parameters(), found, strict=True):
                parameter.sub_(gradient)
    with torch.no_grad():
        assert gate(torch.zeros_like(hidden), context).isfinite().all()


def test_static_gate_changes_with_time_bins():
    gate = StaticGate(2, "linear", bins=2)
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    weights = gate(torch.zeros(3, 1, 1), Context(ALL.mask, torch.tensor([0.1, 0.6, 1.0])))
    assert weights.tolist() == [[1, 2], [3, 4], [3, 4]]
    assert not gate.step_invariant
    assert StaticGate(2, "1", bins=1).step_invariant


def test_the_temperature_stays_positive_and_sharpens():
    gate = MoLEGate(2, 2, "1", "pooled")
    with torch.no_grad():
        gate.matrix.copy_(torch.eye(2))
    hidden, entropies = torch.tensor([[[3.0, 4.0]]]), []
    for log_tau in (-3.0, 0.0, 3.0):
        with torch.no_grad():
            gate.log_tau.fill_(log_tau)
        entropies.append(mole.functional.entropy(gate(hidden, ALL)).item())
    assert entropies == sorted(entropies)


GRANULARITIES = ("model", "block", "layer", "matrix")
CONFIGS = [
    GateConfig("mole", granularity=granularity, total=total, inputs=inputs, features=features)
    for granularity in GRANULARITIES
    for total in ("N", "sigmoid", "linear")
    for inputs in ("hidden", "experts")
    for features in ("pooled", "flattened")
    if (features == "pooled" or granularity in ("block", "layer")) and (granularity != "model" or inputs == "hidden")
] + [GateConfig("static", granularity=granularity, total="N", bins=2) for granularity in GRANULARITIES]


def tier(config):
    """Every granularity, normalisation, input and kind of features in one case or more; their products are thorough."""
    chosen = [
        GateConfig("mole", granularity="model"),
        GateConfig("mole", granularity="block", total="sigmoid", inputs="experts", features="flattened"),
        GateConfig("mole", granularity="layer", total="linear"),
        GateConfig("static", granularity="matrix", total="N", bins=2),
    ]
    fast = config in chosen
    name = "-".join(map(str, config.to_dict().values()))
    return pytest.param(config, id=name, marks=[] if fast else [pytest.mark.thorough])


@pytest.mark.parametrize("config", map(tier, CONFIGS))
def test_every_gate_starts_at_the_plain_sum_and_then_matters(pipe, loras, draw, awake, config):
    mole.attach(pipe, loras, "sum")
    plain = draw(pipe, num_inference_steps=1)
    mixture = mole.attach(pipe, loras, config)
    torch.testing.assert_close(draw(pipe, num_inference_steps=1), plain, atol=1e-5, rtol=0)
    awake(mixture, size=1.0)
    assert not torch.allclose(draw(pipe, num_inference_steps=1), plain, atol=1e-3)


@pytest.mark.parametrize(
    ("granularity", "places"),  # in the text encoder's 2 layers, the UNet's 4 blocks, and the UNet outside them
    [
        *thorough(("model", 1 + 1), ("layer", 2 * 2 + 4 * 3 + 1)),
        ("block", 2 + 4 + 1),
        ("matrix", 2 * 6 + 4 * 10 + 7),
    ],
)
def test_places_by_granularity(pipe, loras, draw, granularity, places):
    with mole.attach(pipe, loras, GateConfig("mole", granularity=granularity)).trace() as trace:
        draw(pipe, num_inference_steps=1)
    assert len([p for p in trace.locations if "(" not in p]) == places


def test_layers_with_fewer_experts_are_traced_apart(pipe, loras, draw):
    with mole.attach(pipe, loras, GateConfig("static", total="1")).trace() as trace:
        draw(pipe)
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    torch.testing.assert_close(trace.weights(block)[0], torch.full((3,), 1 / 3))
    assert trace.weights(f"{block} (ink)")[0].tolist() == [0, 1, 0]


def test_pooled_gates_work_at_any_resolution_and_flattened_say_so(pipe, loras, draw):
    mole.attach(pipe, loras, GateConfig("mole", inputs="experts"))
    assert draw(pipe, height=48, width=32).shape == (1, 48, 32, 3)
    mole.attach(pipe, loras, GateConfig("mole", features="flattened"))
    assert draw(pipe).shape == (1, 32, 32, 3)
    with pytest.raises(ValueError, match="tied to one resolution; use features='pooled'"):
        draw(pipe, height=48, width=32)


def test_an_absent_expert_takes_no_mass(pipe, loras, draw):
    mixture = mole.attach(pipe, loras, GateConfig("static", granularity="matrix", total="1"))
    with mixture.trace() as trace:
        draw(pipe)
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    torch.testing.assert_close(trace.weights(f"{block}.attn1.to_q")[0], torch.full((3,), 1 / 3))
    assert trace.weights(f"{block}.ff.net.2")[0].tolist() == [0, 1, 0]


def test_inputs_experts_needs_an_expert_that_reads_the_block(pipe, tmp_path):
    path = tiny_lora(pipe, tmp_path / "f.safetensors", ends=FEED_FORWARD)
    with pytest.raises(ValueError, match=r"no expert has one; use inputs='hidden'"):
        mole.attach(pipe, {"f": path}, GateConfig("mole", inputs="experts"))
    mole.attach(pipe, {"f": path}, GateConfig("mole", granularity="layer", inputs="experts"))


def test_bad_configs_name_what_is_known(pipe, loras):
    with pytest.raises(ValueError, match=r"unknown gate type 'sumo'; known: \['sum', 'mean', 'factors', 'flow', 'mole', "):
        GateConfig("sumo")
    with pytest.raises(ValueError, match=r"'mole' gates have no option 'famly'"):
        GateConfig.from_dict({"famly": "sum"})
    with pytest.raises(ValueError, match=r"'mole' gates have no option 'bins'; their options: \['granularity', 'total', "):
        GateConfig("mole", bins=2)
    for options in ({"inputs": "experts"}, {"features": "flattened"}):
        with pytest.raises(ValueError, match="whole model reads text and time"):
            GateConfig("mole", granularity="model", **options)
    with pytest.raises(ValueError, match="fixed number of tokens"):
        mole.attach(pipe, loras, GateConfig("mole", granularity="matrix", features="flattened"))
    mixture = mole.attach(pipe, loras)
    for call in (mixture.strength, lambda n: mixture.only(n).__enter__(), lambda n: mixture.fixed({n: 1}).__enter__()):
        with pytest.raises(ValueError, match=r"unknown expert 'cat'; attached: \['fox', 'ink', 'hat'\]"):
            call("cat")
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        mixture.strength("fox", float("nan"))


@pytest.mark.parametrize(
    ("gate_type", "options", "message"),
    [
        ("static", {"bins": 0}, r"'bins' must be a whole number in 1\.\.1000, got 0"),
        ("static", {"bins": 2**40}, r"'bins' must be a whole number in 1\.\.1000"),
        ("static", {"bins": 1.5}, "'bins' must be a whole number"),
        ("static", {"bins": True}, "'bins' must be a whole number in 1..1000, got True"),
        ("static", {"bins": "2"}, "'bins' must be a whole number in 1..1000, got '2'"),
        ("static", {"bins": None}, "'bins' must be a whole number in 1..1000, got None"),
        ("retrieval", {"rank": 2**31}, r"'rank' must be a whole number in 1\.\.128"),
        ("retrieval", {"rank": [4]}, r"'rank' must be a whole number in 1\.\.128, got \[4\]"),
        ("prompt", {"top": -1}, r"'top' must be a whole number in 0\.\.65536, got -1"),
        ("rank", {"partition": 10**400}, r"'partition' must be a whole number in 0\.\.65536"),
        ("rank", {"rate": float("nan")}, r"'rate' must be a number in 0\.\.1, got nan"),
        ("rank", {"rate": "1e-5"}, r"'rate' must be a number in 0\.\.1, got '1e-5'"),
        ("rank", {"refactor": 1}, "'refactor' must be true or false, got 1"),
        ("mole", {"granularity": ["block"]}, r"unknown gate granularity \['block'\]"),
        (["mole"], {}, r"unknown gate type \['mole'\]"),
        ({}, {}, "unknown gate type {}"),
    ],
)
@pytest.mark.shows("Files")
def test_options_of_the_wrong_kind_or_size_are_refused(gate_type, options, message):
    """A stranger's gates come with a config, and what it asks for is made before their weights are compared."""
    with pytest.raises(ValueError, match=message):
        GateConfig.from_dict({"gate_type": gate_type, **options})


def test_gates_stay_fp32_in_a_half_precision_host(pipe, loras, awake):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    before = [p.detach().clone() for p in mixture.parameters()]
    pipe.to(dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in mixture.parameters())
    assert all(torch.equal(a, b) for a, b in zip(mixture.parameters(), before, strict=True))
    assert pipe.unet.conv_in.weight.dtype == torch.bfloat16
    image = pipe("a", num_inference_steps=1, output_type="np").images
    assert torch.from_numpy(image).isfinite().all()


@pytest.mark.shows("IP-Adapter")
def test_our_processor_shows_the_signature_it_found(pipe, loras):
    import inspect

    found = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor
    mole.attach(pipe, loras, "mole")
    ours = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor
    assert isinstance(ours, MoLEAttnProcessor)
    assert ours.host is found
    assert inspect.signature(ours.__call__) == inspect.signature(found.__call__)


def test_gates_speak_even_when_every_processor_is_replaced(pipe, loras, draw, awake):
    awake(mole.attach(pipe, loras, "mole"))
    gated = draw(pipe)
    for module in pipe.unet.modules():
        if hasattr(module, "attn1"):
            module.attn1.set_processor(type(module.attn1.processor)())  # as IP-Adapter does
    torch.testing.assert_close(draw(pipe), gated, atol=1e-5, rtol=0)
    mole.detach(pipe)
    assert not any(isinstance(p, MoLEAttnProcessor) for p in pipe.unet.attn_processors.values())


@pytest.mark.parametrize("granularity", ["block", *thorough("model")])
@pytest.mark.shows("these work")
def test_gradient_checkpointing_gives_the_same_gradients(pipe, loras, awake, granularity):
    """The one gate of a whole model speaks outside the blocks that are computed again."""
    from mole_diffusers.training.denoising import predict

    mixture = awake(mole.attach(pipe, loras, GateConfig("mole", granularity=granularity)))
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])

    def gradients():
        predict(pipe, x, t, ["a fox", ""]).square().mean().backward()
        out = [p.grad.clone() for p in mixture.parameters() if p.grad is not None]
        for p in mixture.parameters():
            p.grad = None
        return out

    plain = gradients()
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_trace_by_hand(pipe, loras, draw):
    mixture = mole.attach(pipe, {"fox": loras["fox"], "hat": (loras["hat"], 0.5)}, GateConfig("static", total="1"))
    with mixture.trace() as trace:
        draw(pipe)
    assert trace.mean() == pytest.approx({"fox": 0.5, "hat": (0.25 * 6 + 0.5) / 7})  # alone in the network's own layers
    assert trace.weights("unet.mid_block.attentions.0.transformer_blocks.0").shape == (2, 2)
    assert {step for place, step, _ in trace.records if place.startswith("unet")} == {0, 1}
    with pytest.raises(ValueError, match="no gate was evaluated at 'nowhere'"):
        trace.weights("nowhere")
    with mixture.trace() as empty:
        pass
    for ask in (empty.mean, empty.entropy):
        with pytest.raises(ValueError, match="no gate was evaluated; call the pipeline inside the block"):
            ask()


@pytest.mark.parametrize("value", [math.nan, 1e38, *thorough(math.inf, -math.inf)])
@pytest.mark.shows("Files")
def test_numbers_that_no_picture_survives_are_refused(pipe, loras, value):
    mixture = mole.attach(pipe, loras)
    calls = {
        "strength": lambda: mixture.strength("fox", value),
        "strengths": lambda: mixture.strengths({"fox": value}).__enter__(),
        "choose": lambda: mixture.parts.choose({"fox": value}),
        "fixed": lambda: mixture.fixed({"fox": value}).__enter__(),
        "rows": lambda: mixture.rows([{"fox": value}]).__enter__(),
        "attach": lambda: mole.attach(tiny_pipeline(), {"fox": (loras["fox"], value)}),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="the strength of 'fox' must be"):
            pytest.fail(f"{name} took {value}: {call()}")
    with pytest.raises(ValueError, match="one of 1 or more calls"):
        mixture.every(value).__enter__()
    assert mixture.strength("fox") == 1


def test_what_is_no_number_mapping_or_folder_is_said(pipe, loras, tmp_path):
    mixture = mole.attach(pipe, loras)
    with pytest.raises(TypeError, match="the strength of 'fox' must be a number, got '1'"):
        mixture.strength("fox", "1")
    with pytest.raises(TypeError, match="experts are names with files"):
        mole.attach(pipe, [loras["fox"]])
    with pytest.raises(TypeError, match="the name of an expert is text, as 'fox', got 1"):
        mole.attach(pipe, {1: loras["fox"]})
    (file := tmp_path / "gates").touch()
    with pytest.raises(FileExistsError, match="gates is a file, where a folder is to be written"):
        mixture.save_pretrained(file)


@pytest.fixture(scope="module")
def saved(loras, draw, tmp_path_factory):
    """A pipeline with gates, the folder they were saved to, and what it draws; a gate that is refused changes none of it."""
    pipe, folder = tiny_pipeline(), tmp_path_factory.mktemp("gates")
    mole.attach(pipe, loras, "mole").save_pretrained(folder)
    return pipe, folder, draw(pipe)


def edit(folder, change):
    about = json.loads((folder / "config.json").read_text())
    change(about)
    (folder / "config.json").write_text(json.dumps(about))
    save_file(load_file(folder / "gates.safetensors"), folder / "gates.safetensors")  # without the config of its own


def change_weights(folder, value):
    tensors = load_file(folder / "gates.safetensors")
    next(iter(tensors.values())).fill_(value)
    save_file(tensors, folder / "gates.safetensors")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "gates.safetensors").unlink(), FileNotFoundError, "has no gates.safetensors"),
        (lambda f: (f / "gates.safetensors").write_bytes(b"x"), ValueError, "is truncated"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "is not JSON"),
        (lambda f: edit(f, lambda a: a.update(version=99)), ValueError, "reads mole_diffusers.gates version 1"),
        (lambda f: edit(f, lambda a: a["gates"].update(granularity="layer")), ValueError, "lack .* more"),
        (lambda f: edit(f, lambda a: a["gates"].update(inputs="experts")), ValueError, "has shape .*, expected"),
        (
            lambda f: edit(f, lambda a: a.update(gates={"gate_type": "static", "bins": 2**40})),
            ValueError,
            "in 1..1000, got 1099",
        ),
        (
            lambda f: edit(f, lambda a: a.update(gates={"gate_type": "retrieval", "rank": 1.5})),
            ValueError,
            "in 1..128, got 1.5",
        ),
        (
            lambda f: (f / "config.json").write_text('{"gates": {"rate": 1e999}}'),
            ValueError,
            "1e999 is not a finite number",
        ),
        (lambda f: change_weights(f, torch.nan), ValueError, "holds values that are not finite numbers"),
        (lambda f: change_weights(f, torch.inf), ValueError, "holds values that are not finite numbers"),
        (
            lambda f: edit(f, lambda a: a.update(gates={"gate_type": "sum"})),
            ValueError,
            "which this pipeline and experts do not have",
        ),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "of another kind"),
        (lambda f: edit(f, lambda a: a.pop("experts")), ValueError, "config.json is not complete"),
        (lambda f: edit(f, lambda a: a["experts"].pop("hat")), ValueError, "weigh .* but the experts given are"),
    ],
)
@pytest.mark.shows("Files")
def test_damaged_or_foreign_gates_are_refused(saved, loras, draw, tmp_path, damage, error, message):
    pipe, folder, before = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        mole.attach(pipe, loras, tmp_path)
    assert torch.equal(draw(pipe), before)


def test_a_folder_with_the_name_of_a_family_is_a_folder(pipe, loras, awake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = awake(mole.attach(pipe, loras, "flow"))
    saved.save_pretrained("flow")
    for folder in (Path("flow"), "./flow"):
        assert all(map(torch.equal, mole.attach(pipe, loras, folder).parameters(), saved.parameters()))
    with pytest.raises(ValueError, match=r"'flow' is a gate type.*; write '\./flow' for the folder"):
        mole.attach(pipe, loras, "flow")
    fresh = mole.attach(pipe, loras, mole.GateConfig("flow"))
    assert not all(map(torch.equal, fresh.parameters(), saved.parameters()))


def test_gates_of_another_lora_file_warn(pipe, loras, tmp_path):
    mole.attach(pipe, {"a": loras["fox"]}, "mole").save_pretrained(tmp_path / "g")
    other = tiny_lora(tiny_pipeline(), tmp_path / "a.safetensors", seed=9, ends=ATTENTION)
    with pytest.warns(UserWarning, match="'a' is not the file"):
        mole.attach(pipe, {"a": other}, tmp_path / "g")
