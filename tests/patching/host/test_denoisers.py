"""The record of each denoiser against diffusers' own class."""

import inspect
from functools import partial

import diffusers
import hosts
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_lora
from torch.overrides import TorchFunctionMode

import mole_diffusers as mole
from mole_diffusers.patching.host.denoiser_inputs import DenoiserInputs
from mole_diffusers.patching.host.denoisers import RECORDS, record


class Keys(TorchFunctionMode):
    """Keeps the keys of PyTorch's attention, [B, heads, S, D] of each call."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.kept.append(args[1] if len(args) > 1 else kwargs["key"])
        return func(*args, **(kwargs or {}))


def qwen():
    torch.manual_seed(0)
    shape = {"patch_size": 1, "in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 8}
    size = {"num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)}
    return diffusers.QwenImageTransformer2DModel(**shape, **size).eval()


def qwen_call(height=4, width=8, words=5):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, height * width, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, words, 16, generator=generator),
        "encoder_hidden_states_mask": torch.ones(1, words, dtype=torch.bool),
        "timestep": torch.ones(1),
        "img_shapes": [[(1, height, width)]],
    }


@pytest.mark.parametrize("name", RECORDS)
def test_a_class_takes_the_arguments_of_its_record(name):
    kind, known = getattr(diffusers, name), RECORDS[name]
    assert set(known.arguments) - {None} <= set(inspect.signature(kind.forward).parameters)
    assert known.text_width in inspect.signature(kind.__init__).parameters


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux", "chroma", "qwen", "flux2", "z_image", "krea2", "lumina2", "hidream"])
def test_the_order_of_text_and_picture_is_that_of_the_keys(name):
    """The keys of the first attention that follow the text are the text's, and they come first or last."""
    pipe, options = hosts.HOSTS[name]()
    options = {key: value for key, value in options.items() if key != "negative_prompt"}  # of another length
    if name == "lumina2":  # whose own is, too
        options["guidance_scale"] = 1.0
    model = hosts.denoiser(pipe)
    attention = {"z_image": lambda: model.layers[0].attention, "lumina2": lambda: model.layers[0].attn}
    attention["hidream"] = lambda: model.double_stream_blocks[0].block.attn1
    attention = attention.get(name, lambda: model.transformer_blocks[0].attn)()
    found, words, call = [], set(), DenoiserInputs(model)
    forward = attention.forward

    def watched(*args, **kwargs):
        with Keys() as keys:
            out = forward(*args, **kwargs)
        found.append(keys.kept[0])
        return out

    def changed(_, args, kwargs, by):
        given = dict(zip(call.names, args, strict=False)) | kwargs
        words.add(call.text((), given).shape[1])
        names = [name for name in (call.record.arguments.text, call.record.arguments.text_before) if name]
        texts = {name: given[name] for name in names}
        return (), given | {n: [each + by for each in t] if isinstance(t, list) else t + by for n, t in texts.items()}

    attention.forward = watched
    for by in (0, 1):
        handle = model.register_forward_pre_hook(partial(changed, by=by), with_kwargs=True)
        hosts.draw(pipe, options, steps=1)
        handle.remove()
    found = [found[0], found[len(found) // 2]]  # guidance calls the denoiser twice in a run
    (count,) = words
    differs = (found[0] != found[1]).any(-1).any(1)[0]  # [S]
    wanted = torch.zeros_like(differs)
    wanted[slice(0, count) if record(model).blocks.attention == "text first" else slice(-count, None)] = True
    assert 0 < count < len(differs)
    assert torch.equal(differs, wanted)


@torch.no_grad()
def test_a_region_on_qwen_image_acts(tmp_path):
    """Its pipeline says the picture's rows and columns, but not which words the text's tokens are."""
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": hosts.flow()}
    pipe = diffusers.QwenImagePipeline(transformer=qwen(), **parts)
    files = {n: tiny_lora(pipe, tmp_path / n, seed=i, ends=("to_q", "to_k", "to_v")) for i, n in enumerate(("fox", "ink"))}
    mixture, outputs = mole.attach(pipe, files), []
    for region in ("left", (0.0, 0.0, 0.5, 1.0), "right"):
        mixture.bind({"fox": (None, region)})
        outputs.append(pipe.transformer(**qwen_call()).sample)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)
    mixture.bind(None)
    alone = pipe.transformer(**qwen_call()).sample
    assert not torch.allclose(outputs[0], alone, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("region", ["left", None])
def test_a_given_picture_behind_the_drawn_one_has_no_regions(tmp_path, region):
    """As editing pipelines of Qwen-Image pass it on: an expert acts on all of its tokens."""
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": hosts.flow()}
    pipe = diffusers.QwenImagePipeline(transformer=qwen(), **parts)
    call = qwen_call() | {"img_shapes": [[(1, 4, 8), (1, 2, 2)]]}
    call["hidden_states"] = torch.cat([call["hidden_states"], torch.ones(1, 4, 16)], 1)
    base = pipe.transformer(**call).sample
    file = tiny_lora(pipe, tmp_path / "fox", ends=("transformer_blocks.1.img_mlp.net.2",))
    mixture = mole.attach(pipe, {"fox": file}, binding=None)
    whole = pipe.transformer(**call).sample
    mixture.bind({"fox": (None, region)} if region else None)
    drawn, given = pipe.transformer(**call).sample.split([32, 4], 1)
    left, right = drawn.unflatten(1, (4, 8)).chunk(2, 2)
    assert torch.equal(given, whole[:, 32:])
    assert torch.equal(left, whole[:, :32].unflatten(1, (4, 8))[:, :, :4])
    assert torch.equal(right, (base if region else whole)[:, :32].unflatten(1, (4, 8))[:, :, 4:])
    assert not torch.isclose(base, whole, atol=1e-4).all(-1).any()


@torch.no_grad()
def test_a_region_is_told_of_where_places_are_not_known(tmp_path):
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": hosts.flow()}
    pipe = diffusers.QwenImagePipeline(transformer=qwen(), **parts)
    mole.attach(pipe, {"fox": tiny_lora(pipe, tmp_path / "fox", ends=("to_q",))}, binding={"fox": (None, "left")})
    with pytest.warns(UserWarning, match="the region of 'fox' does not act"):
        pipe.transformer(**qwen_call() | {"img_shapes": [[(2, 4, 4)]]})  # layers of a picture


@pytest.mark.shows("Pipelines")
def test_a_class_without_a_record_is_refused():
    """That of LTX-2, say."""
    kind = diffusers.LTX2VideoTransformer3DModel
    with pytest.raises(ValueError, match=f"experts cannot act in a {kind.__name__}; known denoisers: UNet2DCondition"):
        record(kind.__new__(kind))


@pytest.mark.shows("Pipelines")
def test_a_pipeline_of_another_model_with_a_known_denoiser_is_refused(tmp_path):
    """Cosmos' own pipelines have Anima's denoiser, but not its conditioner."""
    pipe = hosts.anima()
    lora = tiny_lora(pipe, tmp_path / "fox", ends=("to_q",))
    pipe.text_conditioner = None
    with pytest.raises(ValueError, match="in a CosmosTransformer3DModel beside a text_conditioner, and Anima.* has none"):
        mole.attach(pipe, {"fox": lora})


@pytest.mark.shows("Pipelines")
def test_a_pipeline_with_two_denoisers_is_refused(tmp_path):
    """That of Wan 2.2, which draws the first steps with one and the others with the other."""
    pipe = hosts.wan()
    lora = tiny_lora(pipe, tmp_path / "fox", ends=("to_q",))
    pipe.register_modules(transformer_2=pipe.transformer)
    with pytest.raises(ValueError, match="a mixture acts in one denoiser, and this pipeline has two: transformer and tr"):
        mole.attach(pipe, {"fox": lora})
