"""IP-Adapters beside a mixture, loaded and unloaded before it or after."""

import hosts
import pytest
import torch
from hosts import assert_same, snapshot
from tiers import thorough
from tiny import ATTENTION, tiny_lora
from transformers import CLIPImageProcessor

import mole_diffusers as mole

CLOSE = {"atol": 1e-5, "rtol": 0}
IMAGE = {"ip_adapter_image": hosts.PICTURE}
ORDERS = ["load attach", "attach load"]
ENDS = ["unload detach", "detach unload"]


def of_flux(pipe):
    """Give Flux an image encoder and load random IP-Adapter weights into its transformer."""
    generator = torch.Generator().manual_seed(1)
    width, inner = pipe.transformer.config.joint_attention_dim, pipe.transformer.inner_dim
    token, count = {}, len(pipe.transformer.transformer_blocks)
    for key in (f"{i}.to_{half}_ip" for i in range(count) for half in ("k", "v")):
        token[f"{key}.weight"] = torch.randn(inner, width, generator=generator) * 0.3
        token[f"{key}.bias"] = torch.zeros(inner)
    project = {"proj.weight": torch.randn(4 * width, 8, generator=generator), "proj.bias": torch.zeros(4 * width)}
    project |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    torch.manual_seed(1)
    pipe.register_modules(image_encoder=hosts.eye(), feature_extractor=CLIPImageProcessor(size=32, crop_size=32))
    pipe.load_ip_adapter({"image_proj": project, "ip_adapter": token}, weight_name="")


class Case:
    """A host of its own for each test, its experts, and what is done to it, by name."""

    def __init__(self, name, folder, awake):
        self.name, self.awake = name, awake
        self.pipe, self.options = hosts.HOSTS[name]()
        layers = {"fox": ATTENTION, "hat": (*ATTENTION, "conv1", "conv2")}
        self.files = {n: tiny_lora(self.pipe, folder / n, seed=i, ends=e) for i, (n, e) in enumerate(layers.items())}

    def another(self):
        case = object.__new__(Case)
        vars(case).update(vars(self), pipe=hosts.HOSTS[self.name]()[0])
        return case

    def do(self, step):
        if step == "load":
            (of_flux if self.name == "flux" else hosts.ip_adapter)(self.pipe)
        elif step == "unload":
            self.pipe.unload_ip_adapter()
        elif step == "attach":
            self.awake(mole.attach(self.pipe, self.files, "mole"))
        else:
            mole.detach(self.pipe)

    def draw(self, **more):
        return hosts.draw(self.pipe, self.options | more)


FAST = [("sd15", ORDERS[1], ENDS[1]), ("flux", ORDERS[0], ENDS[0])]
THOROUGH = [(name, o, e) for name in ("sd15", "sdxl", "flux", "sd21", "animatediff") for o in ORDERS for e in ENDS]
CASES = [*FAST, *thorough(*(case for case in THOROUGH if case not in FAST))]


@pytest.mark.parametrize(("name", "order", "end"), CASES)
@pytest.mark.shows("IP-Adapter")
def test_an_ip_adapter_comes_and_goes_before_and_after_the_mixture(awake, tmp_path, name, order, end):
    case = Case(name, tmp_path, awake)
    base = case.draw()
    case.do("load")
    case.do("unload")  # which leaves traces of its own
    before, denoiser = snapshot(case.pipe), hosts.denoiser(case.pipe)
    kinds = {name: type(p) for name, p in denoiser.attn_processors.items()}
    first, second = order.split()
    case.do(first)
    alone = case.draw(**(IMAGE if first == "load" else {}))
    case.do(second)
    both, other = case.draw(**IMAGE), case.another()
    for step in reversed(order.split()):
        other.do(step)
    torch.testing.assert_close(both, other.draw(**IMAGE), **CLOSE)
    assert not torch.allclose(both, alone, atol=1e-3)
    for step in end.split():
        case.do(step)
        if step == end.split()[0]:
            left = case.draw(**({} if step == "unload" else IMAGE))
            assert not torch.allclose(left, both, atol=1e-3)
            assert not torch.allclose(left, base, atol=1e-3)
    assert torch.equal(case.draw(), base)
    assert_same(before, snapshot(case.pipe))
    assert kinds == {name: type(p) for name, p in denoiser.attn_processors.items()}


LAYERS = [("attn2.to_k", "attn2.to_v"), ("ff.net.2",)]  # the first that runs does not read what the gate of its block reads


@pytest.mark.parametrize("ends", LAYERS)
def test_a_gate_reads_the_same_when_an_adapter_replaces_its_processor(awake, tmp_path, ends):
    pipe, options = hosts.HOSTS["sd15"]()
    files = {name: tiny_lora(pipe, tmp_path / name, seed=i, ends=ends) for i, name in enumerate(("fox", "hat"))}
    mixture, heard = awake(mole.attach(pipe, files, "mole")), []
    with mixture.parts.listen(lambda decision: heard.append(decision.gates.clone())):
        expected, before = hosts.draw(pipe, options), list(heard)
        hosts.ip_adapter(pipe)
        pipe.set_ip_adapter_scale(0.0)
        heard.clear()
        torch.testing.assert_close(hosts.draw(pipe, options | IMAGE), expected, **CLOSE)
    torch.testing.assert_close(heard, before, **CLOSE)


MASKED = ["sd15", *thorough("sdxl", "sd21", "animatediff")]


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("order", [ORDERS[0], *thorough(ORDERS[1])])
@pytest.mark.shows("IP-Adapter")
def test_ip_adapter_masks_reach_the_adapter_through_the_mixture(awake, tmp_path, name, order):
    """The other route: the gates held at fixed weights, diffusers' own adapters at the same."""
    case = Case(name, tmp_path, awake)
    pipe, plain, held = case.pipe, case.another(), {"fox": 0.6, "hat": 0.9}
    for adapter, file in case.files.items():
        plain.pipe.load_lora_weights(file, adapter_name=adapter)
    plain.pipe.set_adapters(list(held), list(held.values()))
    plain.do("load")
    for step in order.split():
        case.do(step)
    pictures = []
    for mask in (torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32).triu(), torch.ones(1, 1, 32, 32)):
        options = IMAGE | {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
        with mole.attached(pipe).fixed(held):
            pictures.append(case.draw(**options))
        torch.testing.assert_close(pictures[-1], plain.draw(**options), **CLOSE)
    assert all(not torch.allclose(pictures[i], pictures[i - 1], atol=1e-3) for i in range(3))
    pipe.set_ip_adapter_scale(0.0)
    with mole.attached(pipe).fixed(held):
        torch.testing.assert_close(case.draw(**IMAGE), pictures[0], **CLOSE)
