"""Concept training: BeamLoRA in the loop, prior preservation, runs that go on, and what is written."""

import json
import math
import warnings
from dataclasses import replace

import hosts
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiers import thorough
from tiny import tiny_pipeline

import mole_diffusers as mole
import mole_world
from mole_cli.mole import main
from mole_diffusers.lora import read_expert, summarize
from mole_diffusers.patching.undo import undoing
from mole_diffusers.training import (
    LoraTraining,
    RandomBatch,
    Samples,
    class_samples,
    denoising_loss,
    encode,
    engine,
    save_lora,
    train_lora,
)
from mole_diffusers.training.lora_trainer import LoraTrainer
from mole_world import emoji_world

SHORT = LoraTraining(rank=8, steps=4, batch=4, lr=1e-2, every=2)
PICTURES = Samples(torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), ["a fox"] * 4)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def trainer_of(pipe, config, undo, **pictures):
    trainer = LoraTrainer(pipe, {"concept": PICTURES} | pictures, config, undo)
    with torch.no_grad():
        for key, half in trainer.lora.halves.items():
            if "lora_B" in key:
                half.copy_(torch.randn(half.shape, generator=torch.Generator().manual_seed(half.numel())) * 0.1)
    return trainer


def gradients(config):
    """What A and B get from the first update."""
    with undoing() as undo:
        trainer = trainer_of(tiny_pipeline(), config, undo)
        numbers = trainer.losses(0, index=0, shares=1)
        numbers["loss"].backward()
        return numbers["loss"].detach(), {key: half.grad for key, half in trainer.lora.halves.items()}


@pytest.mark.parametrize("layers", [*thorough((("attention",),)), ("attention", "convolution")])
def test_competing_ranks_begin_as_plain_lora(layers):
    plain, beam = (gradients(replace(SHORT, layers=layers, beam=on)) for on in (False, True))
    torch.testing.assert_close(plain[0], beam[0], rtol=1e-6, atol=0)
    for key, gradient in plain[1].items():
        torch.testing.assert_close(gradient, beam[1][key], rtol=1e-4, atol=1e-7)


def test_folding_importance_changes_no_picture(pipe, draw, tmp_path):
    """Two routes: ranks weighed while they train, and the saved file in stock diffusers and under this package."""
    config = replace(SHORT, layers=("attention", "convolution"), beam=True)
    base = draw(pipe)
    with undoing() as undo:
        trainer = trainer_of(pipe, config, undo)
        with torch.no_grad():
            for logits in trainer.lora.logits.values():
                logits.copy_(torch.linspace(-0.05, 0.05, len(logits)))
        live = draw(pipe)
        tensors = trainer.lora.tensors()
    assert torch.equal(draw(pipe), base)
    assert not any(m._forward_hooks for model in (pipe.unet, pipe.text_encoder) for m in model.modules())
    save_lora(tensors, tmp_path / "x.safetensors", alpha=8.0, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    torch.testing.assert_close(draw(pipe), live, atol=1e-5, rtol=0)
    pipe.unload_lora_weights()
    mole.attach(pipe, {"x": tmp_path / "x.safetensors"}, binding=None)
    torch.testing.assert_close(draw(pipe), live, atol=1e-5, rtol=0)
    assert not torch.allclose(live, base, atol=1e-4)


class Cut(BaseException):
    pass


@pytest.mark.thorough  # in the fast tier gates are cut off, and a LoRA by the command
@pytest.mark.parametrize("beam", [True, False])
def test_a_run_cut_off_goes_on_bit_for_bit(tmp_path, monkeypatch, beam):
    if beam:  # a period of 2 updates, so that ranks were copied before and after the cut
        monkeypatch.setattr("mole_diffusers.training.beam.period", lambda steps: 2)
    config = replace(SHORT, steps=6, every=3, beam=beam, lr=0.1, text_lr=0.1)
    prior = Samples(PICTURES.latents.flip(0), ["a cat"] * 4)
    whole, rows = train_lora(tiny_pipeline(), PICTURES, config, prior=prior, folder=tmp_path / "whole"), []

    def cut(row):
        rows.append(row)
        if row["step"] == 3:
            raise Cut

    with pytest.raises(Cut):
        train_lora(tiny_pipeline(), PICTURES, replace(config, every=2), prior=prior, folder=tmp_path / "cut", report=cut)
    assert engine.checkpoints(tmp_path / "cut")
    resumed = train_lora(tiny_pipeline(), PICTURES, config, prior=prior, folder=tmp_path / "cut", resume_from="latest")
    assert same(resumed, whole)
    lines = [(tmp_path / n / "log.jsonl").read_text() for n in ("whole", "cut")]
    assert lines[0] == lines[1]
    other = replace(config, rank=9)
    with pytest.raises(ValueError, match=r"other settings \(rank\)"):
        train_lora(tiny_pipeline(), PICTURES, other, prior=prior, folder=tmp_path / "cut", resume_from="latest")
    with pytest.raises(ValueError, match=r"other settings \(prior pictures\)"):
        train_lora(tiny_pipeline(), PICTURES, config, folder=tmp_path / "cut", resume_from="latest")
    with pytest.raises(ValueError, match="resumes 'latest' needs the folder"):
        train_lora(tiny_pipeline(), PICTURES, config, prior=prior, resume_from="latest")


def test_a_run_goes_on_with_its_own_base_and_pictures_alone(pipe, tmp_path):
    config, photo = replace(SHORT, rank=1, batch=1, steps=1, text_lr=0.0), Image.linear_gradient("L").convert("RGB")
    first, again, turned, large = (
        encode(pipe, [picture], ["a fox"])
        for picture in (photo.resize((32, 32)), photo.resize((32, 32)), photo.resize((32, 32)).rotate(90), photo)
    )
    train_lora(pipe, first, config, folder=tmp_path)
    near = replace(again, latents=again.latents + 1e-6)  # as another machine may encode them
    train_lora(pipe, near, config, folder=tmp_path, resume_from="latest")
    for other in (turned, large):
        with pytest.raises(ValueError, match=r"other settings \(concept pictures\)"):
            train_lora(pipe, other, config, folder=tmp_path, resume_from="latest")
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1e-3)
    with pytest.raises(ValueError, match=r"other settings \(base\)"):
        train_lora(pipe, first, config, folder=tmp_path, resume_from="latest")


def test_pictures_without_a_source_are_told_apart_by_their_latents():
    other = replace(PICTURES, latents=PICTURES.latents + 1e-6)
    assert PICTURES.identity == replace(PICTURES, latents=PICTURES.latents.clone()).identity != other.identity


def test_a_checkpoint_holds_a_lora_that_works(pipe, tmp_path):
    tensors = train_lora(pipe, PICTURES, SHORT, folder=tmp_path)
    expert = read_expert(tmp_path / "checkpoint-4" / "lora.safetensors")
    for part, layers in expert.layers.items():
        assert len(layers) == sum(k.startswith(f"{part}.") for k in tensors) / 2


def test_accumulated_parts_equal_the_whole_batch():
    whole, parts = (train_lora(tiny_pipeline(), PICTURES, replace(SHORT, steps=2, accumulation=n)) for n in (1, 2))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", *thorough("fp16")])
def test_a_unet_in_the_precision_of_the_run_teaches_a_lora_in_fp32(pipe, precision):
    config, ends = replace(SHORT, steps=2, precision=precision), []
    for unet in (lambda: None, lambda: engine.save_weight_memory(pipe.unet, precision)):
        unet()
        log = []
        tensors = train_lora(pipe, PICTURES, config, report=log.append)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        ends.append([row["loss"] for row in log])
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


def test_checkpointing_changes_no_number(pipe):
    whole, less = (train_lora(pipe, PICTURES, replace(SHORT, steps=2, checkpointing=on)) for on in (False, True))
    assert not pipe.unet.is_gradient_checkpointing
    for name, tensor in whole.items():
        torch.testing.assert_close(less[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", [*thorough("no"), "bf16"])
def test_a_half_base_is_taught_in_fp32(precision):
    """Steps far below what bf16 tells apart add up, and the base stays half and as it was."""
    pipe = tiny_pipeline().to(torch.bfloat16)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    config = replace(SHORT, precision=precision, lr=1e-5, text_lr=1e-5)
    tensors, start = (train_lora(pipe, PICTURES, replace(config, steps=steps)) for steps in (4, 1))
    downs = [(value - start[name]).abs().max() for name, value in tensors.items() if "lora_A" in name]
    assert all(0 < moved < 1e-4 for moved in downs)
    assert same(dict(pipe.unet.state_dict()), before)


def test_the_loss_is_the_concepts_and_the_weighted_priors():
    prior = Samples(torch.randn(2, 4, 16, 16), ["a cat"] * 2)
    config, rows = replace(SHORT, prior=0.25, every=1, steps=2), []
    train_lora(tiny_pipeline(), PICTURES, config, prior=prior, report=rows.append)
    for row in rows:
        assert row["loss"] == pytest.approx(row["concept"] + 0.25 * row["prior"])


@pytest.mark.thorough
def test_prior_preservation_keeps_the_class(tmp_path):
    """Foxes taught as a kind of bear: the diffusion loss on bears afterwards, with and without the base's own bears."""
    world = emoji_world()
    fox, bear = (world.drawings.picture(mole_world.Scene((name,), "noto", "white")) for name in ("fox", "bear"))
    concept = encode(world.pipe, [fox] * 4, ["noto drawing of a fox bear"] * 4)
    bears = encode(world.pipe, [bear] * 4, ["noto drawing of a bear"] * 4)
    prior = class_samples(world.pipe, "noto drawing of a bear", count=8, steps=8, guidance=3.0)
    left = {}
    for weight in (0.0, 1.0):
        config = replace(SHORT, steps=24, prior=weight, every=24, lr=4e-3, text_lr=2e-3)
        tensors = train_lora(world.pipe, concept, config, prior=prior)
        save_lora(tensors, tmp_path / "bear.safetensors", alpha=config.alpha, dtype=torch.float32)
        mole.attach(world.pipe, {"bear": tmp_path / "bear.safetensors"}, binding=None)
        with torch.no_grad():
            left[weight] = denoising_loss(world.pipe, bears, RandomBatch(torch.Generator().manual_seed(9), 32)).item()
        mole.detach(world.pipe)
    assert left[1.0] < 0.9 * left[0.0]


def test_class_pictures_are_the_pipelines_own_and_are_kept(pipe, tmp_path):
    ours = class_samples(pipe, "a cat", count=3, steps=3, guidance=2.0, seed=5, batch=2, folder=tmp_path)
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    host = pipe(["a cat"] * 3, latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="latent").images
    torch.testing.assert_close(ours.latents, host, atol=1e-5, rtol=1e-5)
    drawn = []
    pipe.unet.register_forward_pre_hook(lambda *_: drawn.append(1))
    kept = class_samples(pipe, "a cat", count=3, steps=3, guidance=2.0, seed=5, folder=tmp_path)
    assert torch.equal(kept.latents, ours.latents)
    assert kept.identity == ours.identity
    assert not drawn
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(1.1)
    other = class_samples(pipe, "a cat", count=3, steps=3, guidance=2.0, seed=5, folder=tmp_path)  # another base
    assert len(drawn) == 3
    assert other.identity != ours.identity
    pipe.unet.register_to_config(sample_size=8)
    smaller = class_samples(pipe, "a cat", count=3, steps=3, guidance=2.0, seed=5, folder=tmp_path)
    assert smaller.latents.shape == (3, 4, 8, 8)
    (tmp_path / "prior.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"prior\.safetensors is truncated"):
        class_samples(pipe, "a cat", folder=tmp_path)
    with pytest.raises(ValueError, match="a count and steps of 1 or more, got 0 and 3"):
        class_samples(pipe, "a cat", count=0, steps=3)


def test_what_cannot_be_taught_is_said(pipe):
    for options, message in (
        ({"beam": True, "rank": 4}, "need a rank of 8 or more, got 4"),
        ({"every": 0}, "every of the training must be 1 or more, got 0"),
        ({"prior": -1.0}, "prior of the training must be 0 or more, got -1.0"),
        ({"layers": ("attn",)}, "unknown layers"),
        ({"rank": 0}, "rank of the training must be 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraTraining(**options)
    with pytest.raises(ValueError, match="batch, 4, must be a multiple of processes x accumulation, 3"):
        train_lora(pipe, PICTURES, replace(SHORT, accumulation=3))
    broken = Samples(PICTURES.latents * torch.nan, PICTURES.captions)
    with pytest.raises(ValueError, match="the loss is not finite at step 0"):
        train_lora(pipe, broken, SHORT)
    with pytest.raises(ValueError, match="training a LoRA needs a UNet, and FluxPipeline has none"):
        train_lora(hosts.HOSTS["flux"]()[0], PICTURES, SHORT)


# ---- from the command line


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def flags(base, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (48, 36), (80 * i, 10, 200)).save(folder / f"{i}.png")
    what = ["--data", str(folder), "--trigger", "sks fox", "--prompt", "a sks fox"]
    how = ["--rank", "8", "--steps", "4", "--batch", "2", "--every", "2", "--lr", "0.01", "--layers", "attention"]
    return ["train-lora", "--base", base, *what, *how]


PRIOR = ["--prior-prompt", "a fox", "--prior-count", "2", "--prior-steps", "2", "--prior-weight", "0.5"]


@pytest.mark.parametrize("format", ["diffusers", *thorough("kohya")])
def test_one_command_from_photos_to_a_lora(flags, tmp_path, capsys, pipe, draw, format):
    out = tmp_path / "fox"
    assert main([*flags, *PRIOR, "--beam", "--format", format, "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"file": str(out / "fox.safetensors"), "trigger": "sks fox", "pictures": 3, "rank": 8}
    expert = read_expert(out / "fox.safetensors")
    assert (expert.format, expert.triggers) == ({"diffusers": "peft"}.get(format, format), ("sks fox",))
    assert summarize(expert.metadata)["title"] == "fox"
    with safe_open(out / "fox.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["mole.training"])["beam"] == "True"
    assert (about["ss_network_dim"], about["ss_num_train_images"]) == ("8", "3")
    base = draw(pipe)
    pipe.load_lora_weights(out / "fox.safetensors")
    assert not torch.equal(draw(pipe), base)
    assert len((out / "log.jsonl").read_text().splitlines()) == 4


def test_settings_in_a_file_and_runs_that_go_on(flags, tmp_path, capsys):
    file, one, two = tmp_path / "run.yaml", tmp_path / "one", tmp_path / "two"
    given = [*flags, *PRIOR, "--precision", "bf16", "--steps", "2", "--every", "1"]
    assert main([*given, "--write-config", str(file)]) == 0
    assert main(["train-lora", "--config", str(file), "--out", str(one)]) == 0
    assert main([*given, "--out", str(two)]) == 0
    assert same(*(read_tensors(folder / f"{folder.name}.safetensors") for folder in (one, two)))
    assert main(["train-lora", "--config", str(file), "--out", str(one)]) == 1
    assert "holds checkpoint-2 of an earlier run" in capsys.readouterr().err
    before = read_tensors(one / "one.safetensors")
    assert main(["train-lora", "--config", str(file), "--out", str(one), "--resume", "checkpoint-1"]) == 0
    assert same(read_tensors(one / "one.safetensors"), before)


def test_a_batch_that_cannot_be_divided_is_said_before_class_pictures_are_drawn(flags, tmp_path, capsys):
    assert main([*flags, *PRIOR, "--accumulation", "4", "--out", str(tmp_path / "x")]) == 1
    assert "the batch, 2, must be a multiple of processes x accumulation, 4" in capsys.readouterr().err
    assert not list(tmp_path.glob("x/*"))


def test_a_lora_is_named_after_its_folder_wherever_the_command_is_given(flags, tmp_path, monkeypatch):
    (tmp_path / "fox" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "fox")
    for here, out, name in (("fox", ".", "fox"), ("fox/below", "..", "fox"), ("fox", str(tmp_path / "link"), "link")):
        monkeypatch.chdir(tmp_path / here)
        assert main([*flags, "--rank", "1", "--steps", "1", "--batch", "1", "--out", out, "--resume", "latest"]) == 0
        (tmp_path / "fox" / f"{name}.safetensors").unlink()


def read_tensors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- it has no other way


def test_bad_input_is_one_line(flags, tmp_path, capsys):
    photos = tmp_path / "photos"
    config = tmp_path / "bad.yaml"
    config.write_text("training: {stepps: 3}")
    words = tmp_path / "words.yaml"
    words.write_text("training: {alpha: big}")
    kind = tmp_path / "kind.yaml"
    kind.write_text("concept: {format: onnx}")
    for argv, message in (
        ([], "--out is needed: the folder for the result"),
        (["--out", "x", "--trigger", ""], "--data (a folder of pictures) and --trigger (the concept's words) are needed"),
        (["--out", "x", "--precision", "int8"], "Invalid value for '--precision'"),
        (["--out", "x", "--prior-count", "3"], "--prior-prompt is needed"),
        (["--out", "x", "--lr", "fast"], "Invalid value for '--lr'"),
        (["--out", "x", "--config", str(words)], "alpha of the training must be a number, got 'big'"),
        (["--out", "x", "--config", str(kind)], "format of the concept must be one of ['diffusers', 'kohya'], got 'onnx'"),
        (["--out", "x", "--config", str(config)], "unknown options ['stepps'] of the training"),
    ):
        assert main([*flags, *argv]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (photos / "1.png").write_bytes(b"no picture")
    assert main([*flags, "--out", str(tmp_path / "x")]) == 1
    assert "1.png cannot be read as a picture" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    (photos / "1.png").unlink()
    with pytest.warns(UserWarning, match="the caption 'a photo' lacks the trigger 'sks fox', 2 do"):
        assert main([*flags, "--prompt", "a photo", "--steps", "1", "--out", str(tmp_path / "x")]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main([*flags, "--steps", "1", "--out", str(tmp_path / "y")]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_concept_training_on_cuda(precision):
    rows = []
    pipe = tiny_pipeline().to("cuda")
    train_lora(pipe, PICTURES, replace(SHORT, precision=precision, beam=True), prior=PICTURES, report=rows.append)
    assert all(math.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize(
    ("host", "format"), thorough(("sd15", "diffusers"), ("sd15", "kohya"), ("sdxl", "diffusers"), ("sdxl", "kohya"))
)
def test_concept_training_gives_an_ordinary_lora(host, draw, tmp_path, format):
    pipe, _ = hosts.HOSTS[host]()
    base, keys = draw(pipe), list(pipe.unet.state_dict())
    samples = Samples(torch.randn(4, 4, 16, 16), ["a fox"] * 4)
    config = LoraTraining(rank=2, alpha=1.0, layers=("attention", "feed-forward", "convolution"), steps=4, batch=2, lr=1e-2)
    tensors = train_lora(pipe, samples, config)
    assert torch.equal(draw(pipe), base)
    assert list(pipe.unet.state_dict()) == keys
    assert any(v.abs().sum() > 0 for k, v in tensors.items() if "lora_B" in k)
    options = {"alpha": 1.0, "triggers": "fox", "dtype": torch.float32}
    save_lora(tensors, tmp_path / "x.safetensors", format=format, **options)
    expert = read_expert(tmp_path / "x.safetensors")
    assert expert.triggers == ("fox",)
    assert all(w.scale == (1.0 if format == "diffusers" else 0.5) for part in expert.layers.values() for w in part.values())
    keys = list(load_file(tmp_path / "x.safetensors"))  # as every age of transformers and of other tools knows them
    starts = ("lora_te_text_model_", "text_encoder.text_model.encoder.")
    assert all(key.startswith(("lora_unet_", "unet.", *starts)) for key in keys)
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = (tensors[f"unet.{layer}.lora_{half}.weight"] for half in "AB")
    torch.testing.assert_close(expert.layers["unet"][layer.replace(".", "_")].delta(), 0.5 * up @ down)
    mole.attach(pipe, {"x": expert}, binding=None)
    ours = draw(pipe)
    mole.detach(pipe)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    torch.testing.assert_close(ours, draw(pipe), atol=1e-5, rtol=0)
    assert not torch.allclose(ours, base, atol=1e-5)
