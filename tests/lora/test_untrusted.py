"""What a small file from a stranger may ask for: memory, time, numbers, places; and what of it is carried on."""

import dataclasses
import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiers import thorough
from tiny import ATTENTION, lora_layers

import mole_diffusers as mole
from mole_diffusers import RefusedFileError, read_expert, safe_files, save_expert
from mole_diffusers.functional import low_rank
from mole_diffusers.lora import factors, words_of
from mole_diffusers.lora.metadata import PEFT_METADATA, scalings
from mole_diffusers.pipelines.kept import attach_kept, keep

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
KEY = "unet.mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def written(path, tensors, metadata=None):
    save_file({f"{LAYER}.{role}": t.contiguous() for role, t in tensors.items()}, path, metadata)
    return path


def pair(down=1.0, up=1.0, alpha=2.0):
    halves = {"lora_down.weight": torch.full((2, 16), down), "lora_up.weight": torch.full((16, 2), up)}
    return halves | {"alpha": torch.tensor(alpha, dtype=torch.float64)}


# ---- numbers


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair(alpha=1e300), "its alpha holds NaN or infinite values"),
        (pair(alpha=1e38), "its numbers go up to 1e.38, too large for a weight: at most 1e.12 is accepted"),
        (pair(down=1e20, up=1e20), "its numbers go up to 2e.40, too large for a weight"),
        (pair(down=1e-20, up=1e30), "its numbers go up to 1e.30, too large for a weight"),
    ],
)
@pytest.mark.shows("Files")
def test_changes_of_weight_that_are_too_large_are_refused(tmp_path, tensors, message):
    """Each number of these files is finite; what is made of them would not be."""
    with pytest.raises(RefusedFileError, match=f"x: layer '{KEY}': {message}"):
        read_expert(written(tmp_path / "x", tensors))


def test_large_numbers_that_are_read_decompose(pipe, tmp_path):
    expert = read_expert(written(tmp_path / "x", pair(down=1e6, up=1e5)))
    mole.attach(pipe, {"x": expert}, "rank")  # turns ranks to singular directions
    assert all(p.isfinite().all() for p in pipe.unet.parameters())


def test_a_layer_with_a_bad_alpha_can_be_dropped(tmp_path):
    other = {key.replace("to_q", "to_v"): t for key, t in load_file(written(tmp_path / "x", pair())).items()}
    bad = {f"{LAYER}.{role}": t for role, t in pair(alpha=torch.nan).items()}
    save_file(other | bad, tmp_path / "x")
    expert = read_expert(tmp_path / "x", drop_nonfinite=True)
    assert list(expert.layers["unet"]) == [KEY.removeprefix("unet.").replace("to_q", "to_v")]
    assert expert.notes.left_out == {KEY: "its alpha holds NaN or infinite values"}


@pytest.mark.shows("Files")
def test_what_half_precision_cannot_hold_is_refused_before_anything_changes(pipe, tmp_path):
    file = written(tmp_path / "x", pair(down=10.0, alpha=2e5))  # folded: 1e6
    mole.attach(pipe, {"x": file})
    mole.detach(pipe)
    pipe.to(dtype=torch.bfloat16)
    mole.attach(pipe, {"x": file})
    mole.detach(pipe)
    before = {k: v.clone() for k, v in pipe.unet.to(torch.float16).state_dict().items()}
    with pytest.raises(
        RefusedFileError, match="'x' .*: the numbers of layer unet.mid_block.* go up to 2e.06, which float16 cannot hold"
    ):
        mole.attach(pipe, {"x": file})
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_number_is_not_written_as_infinite(tmp_path, dtype):
    expert = read_expert(written(tmp_path / "x", pair(alpha=2e5)))
    with pytest.raises(ValueError, match=f"layer unet.mid_block.*attn1.to_q holds numbers that {dtype} cannot"):
        save_expert(expert, tmp_path / "y", dtype=dtype)
    assert not (tmp_path / "y").exists()
    key = KEY.removeprefix("unet.")
    lost = dataclasses.replace(expert.layers["unet"][key], up=torch.full((16, 2), torch.nan))
    with pytest.raises(ValueError, match="attn1.to_q holds numbers that torch.float32 cannot"):
        save_expert(dataclasses.replace(expert, layers={"unet": {key: lost}}), tmp_path / "y", dtype=torch.float32)
    save_expert(expert, tmp_path / "y", dtype=torch.bfloat16)
    delta = read_expert(tmp_path / "y").layers["unet"][key].delta()
    torch.testing.assert_close(delta, torch.full((16, 16), 2e5), rtol=1e-2, atol=0)


# ---- memory and time


def ones(*shape):
    return torch.ones(shape, dtype=torch.float8_e4m3fn)


SMALL_FILES = {  # what each would take once multiplied out
    "loha": {f"hada_w{i}_{h}": ones(*((8000, 32) if h == "a" else (32, 8000))) for i in (1, 2) for h in "ab"},
    "lokr": {"lokr_w1_a": ones(8, 8), "lokr_w1_b": ones(8, 8), "lokr_w2_a": ones(1000, 64), "lokr_w2_b": ones(64, 1000)},
    "core": {"lora_down.weight": ones(1, 4000, 1, 1), "lora_mid.weight": ones(4000, 1, 3, 3), "lora_up.weight": ones(8, 1)},
}  # fmt: skip


@pytest.mark.parametrize("algorithm", SMALL_FILES)
def test_a_small_file_cannot_ask_for_more_than_free_memory(tmp_path, monkeypatch, algorithm):
    file = written(tmp_path / "x", SMALL_FILES[algorithm])
    free = 16 << 20
    assert 6 * file.stat().st_size < free
    monkeypatch.setattr(safe_files.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    with pytest.raises(RefusedFileError, match=f"layer '{KEY}': .* bytes, more than the {free} bytes of free memory"):
        read_expert(file)


def test_experts_are_not_stacked_beyond_free_memory(pipe, tmp_path, monkeypatch):
    expert = read_expert(written(tmp_path / "x", pair()))
    monkeypatch.setattr(safe_files.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 255}))
    with pytest.raises(RefusedFileError, match="the experts, stacked for the host, take 256 bytes"):
        mole.attach(pipe, {"x": expert})
    assert mole.attached(pipe) is None


def test_lokr_in_factors_is_never_multiplied_out(tmp_path):
    """24 KB that stand for a matrix of 8000 x 8000, whose own singular values would take minutes."""
    sides = {"lokr_w1_a": ones(2, 1), "lokr_w1_b": ones(1, 2), "lokr_w2_a": ones(4000, 1), "lokr_w2_b": ones(1, 4000)}
    begun = time.process_time()
    expert = read_expert(written(tmp_path / "x", sides))
    assert time.process_time() - begun < 1
    weights = expert.layers["unet"][KEY.removeprefix("unet.")]
    assert (weights.rank, weights.down.shape, weights.up.shape) == (1, (1, 8000), (8000, 1))
    torch.testing.assert_close(weights.up[:7] @ weights.down[:, -7:], torch.ones(7, 7))


def test_alphas_by_name_are_looked_up_however_many_there_are():
    alphas = {"b.to_q": 2, "to_q": 3} | {f"{i}.to_q": i for i in range(30_000)}
    config = {"unet.alpha_pattern": alphas, "unet.lora_alpha": 1}
    scaling = scalings({PEFT_METADATA: json.dumps(config)})["unet"]
    begun = time.process_time()
    scales = [scaling(f"a.{name}", 1) for _ in range(500) for name in ("b.to_q", "7.to_q", "7.to_k")]
    assert time.process_time() - begun < 1  # 3 s if all are tried for each layer
    assert scales == [2, 3, 1] * 500


@pytest.mark.parametrize("shape", [(9, 4, 30), (30, 4, 9), (5, 12, 7)])
def test_singular_values_come_from_the_factors(shape):
    out, rank, inner = shape
    up, down = torch.randn(out, rank), torch.randn(rank, inner)
    (cut_up, cut_down), error = factors.cut(up, down, 0.0)
    assert error == 0
    torch.testing.assert_close(cut_up @ cut_down, up @ down, atol=1e-4, rtol=1e-4)
    values = low_rank(down, up, min(shape))[2]
    wanted = torch.linalg.svdvals(up @ down)
    torch.testing.assert_close(values, wanted[: len(values)], atol=1e-4, rtol=1e-4)


# ---- another family, before anything is touched


def test_another_family_leaves_what_is_attached(pipe, loras, draw, monkeypatch, tmp_path):
    monkeypatch.setitem(mole.lora.families.BY_TEXT_WIDTH, 16, "SD 1.x")  # as if the tiny UNet were one
    mole.attach(pipe, {"fox": loras["fox"]})
    attached = draw(pipe)
    kohya = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    wide = {
        f"{kohya}_attn2_to_k.lora_down.weight": torch.ones(2, 2048),
        f"{kohya}_attn2_to_k.lora_up.weight": torch.ones(16, 2),
    }
    save_file(wide, tmp_path / "by_shape")
    written(tmp_path / "by_word", pair(), {"ss_base_model_version": "sdxl_base_v1-0"})
    written(tmp_path / "by_spec", pair(), {"modelspec.architecture": "flux-1-dev/lora"})
    monkeypatch.setattr(
        "mole_diffusers.patching.install.installation.Installation.replace",
        lambda *_: pytest.fail("the pipeline was touched"),
    )
    for file, family in (("by_shape", "SDXL"), ("by_word", "SDXL"), ("by_spec", "Flux")):
        with pytest.raises(
            RefusedFileError, match=f"{file}, {family}.: it is made for {family} and this pipeline is SD 1.x"
        ):
            mole.attach(pipe, {"x": tmp_path / file})
    monkeypatch.undo()
    assert torch.equal(draw(pipe), attached)


# ---- what is carried on


FOREIGN = {
    "ss_network_dim": "2", "ss_tag_frequency": json.dumps({"10_fox": {"fox": 3, "snow": 1}}), "ss_sd_model_name": "base",
    "modelspec.title": "Fox", "modelspec.license": "CC0", "someone.else": "kept", "emoji": "🦊 \u202e\x1b[2J",
}  # fmt: skip
UNTRUE = {"sshs_model_hash": "ab" * 32, "sshs_legacy_hash": "abcdabcd", "modelspec.hash_sha256": "0x12"}


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_foreign_metadata_survives_re_saving(tmp_path, format):
    peft = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6})}  # folded into the weights
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    halves = {f"{stem}.lora_A.weight": torch.ones(2, 16), f"{stem}.lora_B.weight": torch.ones(16, 2)}
    save_file(halves, tmp_path / "x", FOREIGN | UNTRUE | peft)
    expert = read_expert(tmp_path / "x")
    save_expert(expert, tmp_path / "y", format=format)
    again = read_expert(tmp_path / "y")
    assert again.metadata == FOREIGN | {"format": "pt"}
    assert words_of(again) == words_of(expert)
    for key, weights in expert.layers["unet"].items():
        torch.testing.assert_close(again.layers["unet"][key].delta(), weights.delta())
    assert weights.scale == 3


def test_nothing_is_said_of_triggers_where_there_are_none(tmp_path):
    expert = dataclasses.replace(read_expert(written(tmp_path / "x", pair(), {"modelspec.title": "t"})), triggers=())
    save_expert(expert, tmp_path / "y")
    assert read_expert(tmp_path / "y").metadata == {"format": "pt", "modelspec.title": "t"}


def test_a_kept_mixture_copies_its_files_with_all_that_they_say(pipe, tmp_path):
    file = written(tmp_path / "x", pair(), FOREIGN | UNTRUE)
    keep(mole.attach(pipe, {"x": file}), tmp_path / "kept")
    assert (tmp_path / "kept" / "experts" / "0.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "file", ["../x", "/etc/passwd", "7.safetensors", None, *thorough("..", ".", "", "a/../../x", "a\0b", "x" * 3000, 3)]
)
def test_a_kept_mixture_names_files_of_its_own_folder_only(pipe, loras, draw, tmp_path, file):
    keep(mole.attach(pipe, {"fox": loras["fox"]}), tmp_path / "kept")
    attached = draw(pipe)
    (tmp_path / "kept" / "x").write_bytes(loras["fox"].read_bytes())
    about = json.loads((tmp_path / "kept" / "mixture.json").read_text())
    about["experts"][0]["file"] = file
    (tmp_path / "kept" / "mixture.json").write_text(json.dumps(about))
    with pytest.raises(RefusedFileError, match="mixture.json"):
        attach_kept(pipe, tmp_path / "kept")
    assert torch.equal(draw(pipe), attached)


def test_a_report_on_a_terminal_holds_no_codes_of_the_file(tmp_path, capsys):
    from mole_cli.mole import main

    file = written(tmp_path / "x.safetensors", pair(), {"modelspec.title": "Fox\x1b[2J\n   sha256  0", "emoji": "🦊"})
    assert main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert "title  Fox [2J    sha256  0\n" in out
    assert "\x1b" not in out


def test_what_a_file_says_of_itself_breaks_no_line(pipe, loras, tmp_path):
    mixture = mole.attach(pipe, loras, "mole")
    mixture.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"format": "gates\nall is well\x1b[2J"}))
    with pytest.raises(ValueError, match=r"are gates all is well \[2J version 1; this release reads"):
        mole.attach(pipe, loras, tmp_path)
    strange = {f"unet.\x1b[2Jx.lora.{half}.weight": torch.ones(2, 2) for half in ("down", "up")}
    save_file(strange | load_file(loras["fox"]), tmp_path / "strange.safetensors")
    with pytest.warns(UserWarning, match=r"lacks 1 of its layers, 'unet\.\\x1b\[2Jx' for one"):
        mole.attach(pipe, {"fox": tmp_path / "strange.safetensors"})


def test_every_layer_of_every_part_is_matched_or_has_a_reason(pipe, tmp_path, monkeypatch):
    """The report of what a file's layers met. The model is not searched once more for each that it lacks."""
    from mole_diffusers.lora import match

    tensors = {}
    other = ("lora_unet_down_blocks_7_resnets_0_conv1", "lora_unet_mid_block_resnets_0_norm1")
    for stem in (*other, "lora_te2_text_model_encoder_layers_0_mlp_fc1", LAYER):
        tensors |= {f"{stem}.lora_down.weight": torch.ones(2, 16), f"{stem}.lora_up.weight": torch.ones(16, 2)}
    save_file(tensors, tmp_path / "x")
    walks, walk = [], pipe.unet.named_modules
    monkeypatch.setattr(pipe.unet, "named_modules", lambda: walks.append(1) or walk())
    found = match(read_expert(tmp_path / "x"), {"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    assert {part: list(layers) for part, layers in found.layers.items()} == {
        "unet": ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    }
    assert found.unmatched == {
        "unet.down_blocks_7_resnets_0_conv1": "the unet has no such layer",
        "unet.mid_block_resnets_0_norm1": "the unet has a GroupNorm there, which takes no LoRA",
        "text_encoder_2.encoder_layers_0_mlp_fc1": "there is no text_encoder_2",
    }
    assert len(walks) == 2
    assert len(lora_layers(pipe, ATTENTION)) > 1
