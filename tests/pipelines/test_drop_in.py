"""Every drop-in pipeline, its folder, and the hub."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import diffusers
import hosts
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers.binding.config import Bound, to_json
from mole_diffusers.lora import read_expert
from mole_diffusers.pipelines import drop_in
from mole_diffusers.pipelines.kept import attach_kept, keep
from mole_diffusers.safe_files import RefusedFileError

BOTH = ["sd15", *thorough("sdxl")]
REST = (
    "sd15-img2img",
    "sd15-inpaint",
    "sd15-controlnet",
    "sdxl-img2img",
    "sdxl-inpaint",
    "sdxl-controlnet",
    "sd15-controlnet-img2img",
    "sdxl-controlnet-img2img",
    "sd15-controlnet-inpaint",
    "sdxl-controlnet-inpaint",
)
FORMS = ["sd15", *thorough("sdxl", *REST, "flux", "z_image")]


@pytest.fixture
def kind(request):
    """(drop-in pipeline, what its call needs) of the host named by the test."""
    pipe, options = hosts.HOSTS[getattr(request, "param", "sd15")]()
    return hosts.quiet(mole.MoLEPipeline.from_pipe(pipe)), options


def load_two(pipe, folder, awake):
    files = [tiny_lora(pipe, folder / f"{i}.safetensors", seed=i) for i in range(2)]
    for name, file in zip(("fox", "ink/2"), files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.load_gates("mole")
    pipe.set_adapters(["fox", "ink/2"], [1.0, -0.5])
    awake(pipe.mixture)


def same(picture, wanted):
    # Weights mapped from a file lie otherwise in memory than built ones, which costs SDXL its last bit.
    torch.testing.assert_close(picture, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", FORMS, indirect=True)
@pytest.mark.shows("Pipelines")
def test_a_folder_keeps_experts_gates_and_strengths(kind, awake, tmp_path):
    pipe, options = kind
    assert isinstance(pipe, getattr(diffusers, type(pipe).__name__.removeprefix("MoLE")))
    base = hosts.draw(pipe, options)
    load_two(pipe, tmp_path, awake)
    pipe.mixture.bind({"fox": (None, "left"), "ink/2": (None, Image.new("L", (8, 8), 255))})
    image = hosts.draw(pipe, options)
    assert not torch.allclose(image, base, atol=1e-2)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(hosts.draw(pipe, options), image)
    again = hosts.quiet(mole.MoLEPipeline.from_pretrained(tmp_path / "saved"))
    assert again.mixture.strength("ink/2") == -0.5
    assert again.mixture.binding["fox"].region == "left"
    assert again.mixture.binding["ink/2"].region.getpixel((1, 1)) == 255
    same(hosts.draw(again, options), image)
    plain = hosts.quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved"))
    assert type(plain) is next(k for k in type(again).__mro__ if k.__module__.startswith("diffusers"))
    same(hosts.draw(plain, options), base)


def test_an_expert_in_memory_is_written_out(kind, tmp_path):
    pipe, options = kind
    path = tiny_lora(pipe, tmp_path / "gone.safetensors")
    pipe.load_lora_weights(read_expert(path), adapter_name="fox")
    pipe.load_gates("mole")
    path.unlink()
    pipe.save_pretrained(tmp_path / "saved")
    again = hosts.quiet(type(pipe).from_pretrained(tmp_path / "saved"))
    same(hosts.draw(again, options), hosts.draw(pipe, options))


def peft_folder(pipe, folder):
    """What PEFT itself writes: the layers' scale, here 4, is only in the file next to them."""
    folder.mkdir()
    tensors = load_file(tiny_lora(pipe, folder / "plain"))
    halves = {f"base_model.model.{key.removeprefix('unet.')}": t for key, t in tensors.items() if key.startswith("unet.")}
    save_file(halves, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}))
    return folder / "adapter_model.safetensors"


def test_a_folder_keeps_what_no_copy_of_a_file_has(kind, tmp_path):
    pipe, options = kind
    peft, noted, broken, file = (
        peft_folder(pipe, tmp_path / "peft"),
        *(tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("noted", "broken", "whole"))),
    )
    noted.with_suffix(".json").write_text(json.dumps({"activation text": "fox"}))
    tensors = load_file(broken)
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, broken)
    whole = read_expert(file)
    part = replace(whole, layers={"text_encoder": whole.layers["text_encoder"]})
    experts = {"peft": peft, "noted": noted, "broken": read_expert(broken, drop_nonfinite=True), "part": part, "whole": file}
    for name, source in experts.items():
        pipe.load_lora_weights(source, adapter_name=name)
    pipe.save_pretrained(tmp_path / "saved")
    again = hosts.quiet(type(pipe).from_pretrained(tmp_path / "saved"))
    same(hosts.draw(again, options), hosts.draw(pipe, options))
    assert next(iter(pipe.mixture.experts["peft"].layers["unet"].values())).scale == 4
    assert again.mixture.experts["noted"].triggers == ("fox",)
    assert [(n, e.layers.keys()) for n, e in again.mixture.experts.items()] == [
        (n, e.layers.keys()) for n, e in pipe.mixture.experts.items()
    ]
    assert (tmp_path / "saved/mole/experts/4.safetensors").read_bytes() == file.read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A drop-in with a LoRA, what its call needs, the folder that its mixture was saved to, and what it draws."""
    pipe, options = hosts.HOSTS["sd15"]()
    pipe, folder = hosts.quiet(mole.MoLEPipeline.from_pipe(pipe)), tmp_path_factory.mktemp("saved")
    pipe.load_lora_weights(tiny_lora(pipe, folder / "fox.safetensors"))
    pipe.save_pretrained(folder)
    return pipe, options, folder / "mole", hosts.draw(pipe, options)


def test_pickled_weights_are_read_only_if_asked_for(saved, tmp_path):
    pipe, options, folder, image = saved
    for how in ({"safe_serialization": False}, [False]):
        with pytest.raises(ValueError, match="saves safetensors, since it opens no pickled weights"):
            pipe.save_pretrained(tmp_path, *how) if isinstance(how, list) else pipe.save_pretrained(tmp_path, **how)
    assert not list(tmp_path.iterdir())
    with pipe.mixture.lifted():
        diffusers.StableDiffusionPipeline.save_pretrained(pipe, tmp_path, safe_serialization=False)
    shutil.copytree(folder, tmp_path / "mole")
    with pytest.raises(OSError, match=r"no file named .*\.safetensors .* only if you give use_safetensors=None"):
        mole.MoLEPipeline.from_pretrained(tmp_path)
    again = hosts.quiet(mole.MoLEPipeline.from_pretrained(tmp_path, use_safetensors=None))
    same(hosts.draw(again, options), image)


ROW = {"name": "fox", "file": "0.safetensors", "strength": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not of format mole_diffusers.mixture, version 1"),
        ({"experts": [{"name": "fox"}]}, "is not complete"),
        ({"experts": []}, "is not complete"),
        ({"experts": [{"name": "fox", "file": "../fox", "strength": 1}]}, "not the name of a file in experts/"),
        ({"experts": [ROW, {**ROW, "name": "ink"}]}, "'ink' must come once, with its own file in"),
        ({"experts": [{**ROW, "strength": 2**31}]}, "the strength of 'fox' must be in -1e.06..1e.06, got 2147483648"),
        ({"experts": [{**ROW, "weights": 3}]}, "the weights of 'fox' are by model, got 3"),
        ({"experts": [{**ROW, "weights": None}]}, "the weights of 'fox' are by model, got None"),
        ({"experts": [{**ROW, "weights": {"unet": {"up": {"block_0": [1] * 5}}}}]}, "is not complete: .*Expected 2 scales"),
    ],
)
def test_a_bad_folder_is_refused_and_changes_nothing(saved, tmp_path, change, message):
    pipe, options, folder, image = saved
    shutil.copytree(folder, tmp_path / "mole")
    index = tmp_path / "mole/mixture.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        pipe.load_mixture(index.parent)
    with pytest.raises(FileNotFoundError, match=r"it has no mixture.json"):
        pipe.load_mixture(tmp_path)
    assert torch.equal(hosts.draw(pipe, options), image)


def test_a_large_mask_is_read_again(saved, tmp_path):
    pipe, _, _, _ = saved
    noise = torch.randint(0, 256, (1024, 1024), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    name, before = next(iter(pipe.mixture.experts)), pipe.mixture.binding
    pipe.mixture.bind({name: (["fox"], Image.fromarray(noise.numpy()))})
    keep(pipe.mixture, tmp_path / "mole")
    pipe.mixture.bind(before)
    assert (tmp_path / "mole/mixture.json").stat().st_size > 1 << 20
    region = attach_kept(hosts.HOSTS["sd15"]()[0], tmp_path / "mole").binding[name].region
    assert torch.equal(torch.tensor(list(region.tobytes()), dtype=torch.uint8), noise.flatten())


def test_the_masks_of_all_experts_together_have_a_limit(saved, tmp_path, monkeypatch):
    pipe, _, folder, _ = saved
    shutil.copytree(folder, tmp_path / "mole")
    (index := tmp_path / "mole/mixture.json").with_name("experts").joinpath("1.safetensors").touch()
    binding = to_json(Bound((), Image.new("L", (8, 8))))
    rows = [{**ROW, "name": str(i), "file": f"{i}.safetensors", "binding": binding} for i in range(2)]
    index.write_text(json.dumps(json.loads(index.read_text()) | {"experts": rows}))
    monkeypatch.setattr("mole_diffusers.pipelines.kept.MAX_MASKS", 127)
    with pytest.raises(RefusedFileError, match="its masks have more than 127 pixels"):
        attach_kept(pipe, index.parent)


def test_what_holds_in_a_block_is_not_saved(kind, tmp_path):
    """In a block of this thread, and of another that draws."""
    pipe, _ = kind
    load_two(pipe, tmp_path, lambda mixture: mixture)
    pipe.mixture.bind({"fox": "fox"})
    keep(pipe.mixture, tmp_path / "wanted")
    begun = threading.Event()

    def block():
        with pipe.mixture.bound(None), pipe.mixture.only("fox"), pipe.mixture.strengths({"fox": 3}):
            begun.set()
            time.sleep(0.2)

    with ThreadPoolExecutor(1) as threads:
        threads.submit(block)
        begun.wait(60)
        keep(pipe.mixture, tmp_path / "outside")
    with pipe.mixture.bound(None), pipe.mixture.only("fox"), pipe.mixture.strengths({"fox": 3}):
        keep(pipe.mixture, tmp_path / "inside")
    names = ("wanted", "outside", "inside")
    wanted, *others = (json.loads((tmp_path / name / "mixture.json").read_text()) for name in names)
    assert [row["active"] for row in wanted["experts"]] == [True, True]
    assert others == [wanted, wanted]


def test_loras_that_threads_load_and_delete_at_once_are_all_loaded_and_deleted(kind, tmp_path):
    pipe, _ = kind
    files = [read_expert(tiny_lora(pipe, tmp_path / f"{i}.safetensors", seed=i)) for i in range(3)]
    names = [f"default_{i}" for i in range(3)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(pipe.load_lora_weights, files))
        assert set(pipe.mixture.experts) == set(names)
        list(threads.map(pipe.delete_adapters, names[:2]))
    assert list(pipe.mixture.experts) == names[2:]


def test_a_save_after_one_that_was_broken_off_keeps_what_else_was_there(saved, tmp_path):
    pipe, *_ = saved
    aside = tmp_path / ".pipe.old"  # as a save leaves it that was killed between its two renames
    aside.mkdir()
    (aside / "notes.txt").write_text("mine")
    pipe.save_pretrained(tmp_path / "pipe")
    assert (tmp_path / "pipe/notes.txt").read_text() == "mine"
    assert not aside.exists()


def test_a_save_in_other_shards_leaves_nothing_of_the_old_weights(kind, tmp_path):
    pipe, _ = kind
    folder = tmp_path / "pipe"
    pipe.save_pretrained(folder, variant="fp16")
    for size in ("20KB", "1GB", "20KB"):
        for model in (pipe.unet, pipe.text_encoder):
            next(model.parameters()).data += 1
        pipe.save_pretrained(folder, max_shard_size=size)
        again = type(pipe).from_pretrained(folder)
        for model, other in ((pipe.unet, again.unet), (pipe.text_encoder, again.text_encoder)):
            assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").is_file()


@pytest.mark.shows("`from_pipe`")
def test_from_pipe_shares_models_mixture_and_precision(kind, tmp_path):
    pipe, options = kind
    pipe.to(torch.bfloat16)
    pipe.load_lora_weights(tiny_lora(pipe, tmp_path / "fox.safetensors"))
    other = hosts.quiet(mole.MoLEStableDiffusionImg2ImgPipeline.from_pipe(pipe))
    assert other.unet is pipe.unet
    assert other.mixture is pipe.mixture
    assert other.unet.dtype == pipe.vae.dtype == torch.bfloat16
    assert hosts.draw(other, hosts.IMAGE).isfinite().all()
    cast = mole.MoLEStableDiffusionPipeline.from_pipe(pipe, dtype=torch.float32)
    assert cast.unet.dtype == torch.float32
    cast.vae.to(torch.bfloat16)
    assert mole.MoLEStableDiffusionPipeline.from_pipe(cast).vae.dtype == torch.bfloat16


def test_a_pipeline_of_from_pipe_draws_as_if_the_mixture_were_attached_to_it(kind, tmp_path):
    """In tiles, and in the places of a picture that is drawn over; also with a mixture that came later, or went."""
    pipe, _ = kind
    over, again = (
        hosts.quiet(made.from_pipe(pipe))
        for made in (mole.MoLEStableDiffusionImg2ImgPipeline, mole.MoLEStableDiffusionPipeline)
    )
    base = hosts.draw(over, hosts.IMAGE)
    made = {
        name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i, size=2.0) for i, name in enumerate(("fox", "owl"))
    }
    words = {name: name for name in made}

    def draw(pipe, prompt="fox&owl", **options):
        options |= {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        return pipe(prompt, **options).images

    call = {"width": 64, "height": 32}
    wanted = {}
    for name, called, options in (("over", over, hosts.IMAGE), ("again", again, call)):
        mole.attach(called, made, binding=words)
        wanted[name] = draw(called, **options)
    mixture = mole.attach(pipe, made, binding=words)
    same(draw(over, **hosts.IMAGE), wanted["over"])
    same(draw(again, **call), wanted["again"])
    with mixture.tiled(0):
        assert (draw(again, **call) - wanted["again"]).abs().max() > 1e-3
    mole.detach(pipe)
    same(hosts.draw(over, hosts.IMAGE), base)


def test_a_lora_that_another_pipeline_loads_is_drawn_in_tiles_too(kind, tmp_path):
    made, _ = kind
    made.save_pretrained(tmp_path / "saved")
    pipe = hosts.quiet(type(made).from_pretrained(tmp_path / "saved"))
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i, size=2.0) for i, n in enumerate(("fox", "owl"))}
    call = {"num_inference_steps": 2, "width": 64, "height": 32, "output_type": "pt"}

    def draw(pipe):
        return pipe("fox&owl", generator=torch.Generator().manual_seed(0), **call).images

    other = hosts.quiet(type(made).from_pipe(pipe))
    for name, file in files.items():
        other.load_lora_weights(file, adapter_name=name)
        other.mixture.bind({name: name})
    drawn = draw(pipe)
    same(drawn, draw(other))
    other.mixture.bind({name: name for name in files})
    with other.mixture.tiled(0):
        assert (draw(pipe) - drawn).abs().max() > 1e-3


def test_saving_waits_for_what_another_thread_loads(kind, tmp_path, monkeypatch):
    pipe, _ = kind
    files = [tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=n) for n in range(2)]
    pipe.load_lora_weights(files[0], adapter_name="first")
    loading = threading.Thread(target=pipe.load_lora_weights, args=(files[1], "second"))

    def kept(mixture, folder):
        keep(mixture, folder)
        loading.start()
        loading.join(0.2)

    monkeypatch.setattr(drop_in, "keep", kept)
    pipe.save_pretrained(tmp_path / "saved")
    loading.join()
    assert list(pipe.mixture.experts) == ["first", "second"]
    pipe.load_mixture(tmp_path / "saved" / "mole")
    assert list(pipe.mixture.experts) == ["first"]


def test_a_kind_without_a_dropin_is_refused():
    with pytest.raises(ValueError, match="LongCatImagePipeline has no drop-in pipeline; those that have one"):
        mole.MoLEPipeline.from_pipe(hosts.longcat())


@pytest.mark.parametrize("kind", BOTH, indirect=True)
@pytest.mark.shows("`custom_pipeline`, `push_to_hub`")
def test_custom_pipeline_opens_a_saved_folder(kind, awake, tmp_path, monkeypatch):
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe, options = kind
    load_two(pipe, tmp_path, awake)
    image = hosts.draw(pipe, options)
    saved = str(tmp_path / "saved")
    pipe.save_pretrained(saved)
    opened = diffusers.DiffusionPipeline.from_pretrained(saved, custom_pipeline=saved, trust_remote_code=True)
    hosts.quiet(opened).load_mixture(Path(saved, "mole"))
    assert isinstance(opened, getattr(mole, type(pipe).__name__))
    same(hosts.draw(opened, options), image)


@pytest.mark.parametrize("kind", BOTH, indirect=True)
@pytest.mark.shows("`custom_pipeline`, `push_to_hub`")
def test_the_hub_gets_the_folder_and_a_card_and_gives_it_back(kind, awake, hub, tmp_path, monkeypatch):
    from mole_diffusers.pipelines import sources

    pipe, options = kind
    load_two(pipe, tmp_path, awake)
    image = hosts.draw(pipe, options)
    api, folder = hub

    def snapshot(repo, allow_patterns, **options):
        assert (repo, allow_patterns, options) == ("me/mix", ["mole/*"], {"revision": "v1"})
        return str(folder)

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    assert pipe.push_to_hub("me/mix") == "https://hub/me/mix"
    api.create_repo.assert_called_once_with("me/mix", private=None, exist_ok=True)
    card = (folder / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "| ink/2 | -0.5 |" in card
    assert 'MoLEPipeline.from_pretrained("me/mix")' in card
    pipe.unload_lora_weights()
    pipe.load_mixture(sources.kept_folder("me/mix", revision="v1"))
    assert torch.equal(hosts.draw(pipe, options), image)
