"""Gate training and concept training on the tiny pipeline: what moves, what does not, and that a cut-off run goes on."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mole_diffusers as mole
from mole_diffusers.lora import read_expert
from mole_diffusers.training.config import DistillationTerm, LoraTraining
from mole_diffusers.training.context import TrainingContext
from mole_diffusers.training.data import Samples, TrainingData, encode, read_folder
from mole_diffusers.training.denoising import predict
from mole_diffusers.training.distillation import (
    attention_maps,
    composed_teacher,
    sample_trajectories,
    single_teacher,
    trigger_tokens,
)
from mole_diffusers.training.lora_adapter import save_kohya, save_lora
from mole_diffusers.training.lora_trainer import train_lora
from mole_diffusers.training.losses import composed_target, recovery_error, territory

TEACH = {"seeds": 2, "steps": 3}
BOTH = {"single": TEACH, "composed": TEACH}
SHORT = {"batch": 4, "steps": 6, "every": 3}


def gates_of(mixture):
    return {f"{p}.{k}": v.clone() for p, bank in mixture.banks.items() for k, v in bank.state_dict().items()}


def test_recovery_by_hand():
    teacher = torch.ones(2, 1, 2, 2)
    norm = torch.ones(2)  # the teacher differs from a base of zeros by 1 everywhere
    assert recovery_error(teacher, teacher, norm).item() == 0
    assert recovery_error(torch.zeros_like(teacher), teacher, norm).item() == pytest.approx(1)
    assert recovery_error(0.5 * teacher, teacher, norm).item() == pytest.approx(0.25)


def test_composed_target_by_hand():
    base = torch.zeros(1, 1, 1, 2)
    experts = torch.stack([base + 2, base + 3])
    masks = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).reshape(2, 1, 1, 1, 2)
    blend = composed_target(base, experts, masks, torch.tensor([0.5, 2.0]))
    assert blend.flatten().tolist() == [0.5 * 2 + 2 * 3, 2 * 3]
    one = composed_target(base, experts[:1], torch.ones(1, 1, 1, 1, 2), torch.ones(1))
    assert torch.equal(one, experts[0])


def test_territory_is_shared_out_and_each_keeps_its_own_ground():
    maps = torch.full((2, 1, 2, 2), 0.1)
    maps[0, 0, 0, 0], maps[1, 0, 1, 1] = 0.9, 0.2  # the second is faint, but strongest in its corner
    masks = territory(maps)
    torch.testing.assert_close(masks.sum(0), torch.ones(1, 1, 2, 2))
    assert masks[0, 0, 0, 0, 0] > 0.9
    assert masks[1, 0, 0, 1, 1] > 0.9


def test_attention_maps_equal_the_hosts_own_attention(pipe):
    """Two routes: read from the projections, and computed by diffusers' own get_attention_scores."""
    x, t, prompts = torch.randn(2, 4, 16, 16), torch.tensor([5, 800]), ["a fox", "an ink"]
    positions = torch.zeros(1, 2, 16)
    positions[..., 3] = 1
    attention = next(
        m for n, m in pipe.unet.named_modules() if n.endswith("mid_block.attentions.0.transformer_blocks.0.attn2")
    )
    scores = []

    def keep(_, args, kwargs):
        q, k = attention.to_q(args[0]), attention.to_k(kwargs["encoder_hidden_states"])
        q, k = attention.head_to_batch_dim(q), attention.head_to_batch_dim(k)
        scores.append(attention.get_attention_scores(q, k).unflatten(0, (2, -1)).mean(1)[..., 3])

    with attention_maps(pipe.unet, (8, 8), positions) as seen:
        handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
        predict(pipe, x, t, prompts)
        handle.remove()
    assert len(seen) == 4 + 1  # the mid block's projections ran once more for the check
    ours = [m for m in seen if torch.allclose(m[0].flatten(1), scores[0], atol=1e-5)]
    assert len(ours) == 2
    assert not any(m._forward_hooks for m in pipe.unet.modules())


def test_trigger_tokens_are_found_or_missed_by_name(pipe, loras):
    mixture = mole.attach(pipe, {"fox": loras["fox"]})
    found = trigger_tokens(pipe, mixture, "fox", ["a fox", ""])
    assert found[0].nonzero().flatten().tolist() == [2, 3, 4]  # start, a, f o x
    assert found[1].all()
    with pytest.raises(ValueError, match=r"lacks every trigger of expert 'fox': \['fox'\]"):
        trigger_tokens(pipe, mixture, "fox", ["a cat"])


def test_teachers_are_the_single_loras_and_their_sum(pipe, loras):
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, "mole")
    x, t, prompts = torch.randn(2, 4, 16, 16), torch.tensor([5, 800]), ["a fox in ink", ""]
    with torch.no_grad():
        fox, base = single_teacher(pipe, mixture, "fox")(x, t, prompts)
        ink, _ = single_teacher(pipe, mixture, "ink")(x, t, prompts)
        both, _ = composed_teacher(pipe, mixture, ["ink"])(x, t, prompts)
        torch.testing.assert_close(both, fox + ink - base, atol=1e-5, rtol=0)
        masked, _ = composed_teacher(pipe, mixture, [])(x, t, prompts)
        assert not torch.allclose(masked, both, atol=1e-3)
        mole.detach(pipe)
        torch.testing.assert_close(predict(pipe, x, t, prompts), base)
        mole.attach(pipe, {"fox": loras["fox"]})
        torch.testing.assert_close(predict(pipe, x, t, prompts), fox, atol=1e-6, rtol=0)


def test_stored_targets_are_what_the_teacher_predicts(pipe, loras):
    mixture = mole.attach(pipe, {"fox": loras["fox"]}, "mole")
    teach = single_teacher(pipe, mixture, "fox")
    context, term = TrainingContext(pipe, mixture, TrainingData()), DistillationTerm(seeds=2, steps=3)
    stored = sample_trajectories(context, teach, ["a fox"], term, seed=0, name="fox")
    assert stored.x.shape == (3 * 2 * 2, 4, 16, 16)
    with torch.no_grad():
        live, base = teach(stored.x[4:8], stored.timesteps[4:8], stored.prompts[4:8])
    torch.testing.assert_close(live, stored.targets[4:8], atol=1e-5, rtol=1e-4)
    assert stored.norms[4].item() == pytest.approx((live - base)[:2].square().mean().item(), rel=1e-4)


def test_one_expert_is_perfect_and_none_is_one(pipe, loras):
    """L1 of an ungated single expert is 0, and 1 where the expert weighs nothing."""
    mixture = mole.attach(pipe, {"fox": loras["fox"]}, "mole")
    term = DistillationTerm(seeds=2, steps=2, guidance=2.0)
    context, teach = TrainingContext(pipe, mixture, TrainingData()), single_teacher(pipe, mixture, "fox")
    stored = sample_trajectories(context, teach, ["a fox"], term, seed=0, name="fox")
    with torch.no_grad():
        student = predict(pipe, stored.x, stored.timesteps, stored.prompts)
        assert recovery_error(student, stored.targets, stored.norms).item() == pytest.approx(0, abs=1e-6)
        with mixture.fixed({}):
            student = predict(pipe, stored.x, stored.timesteps, stored.prompts)
        assert recovery_error(student, stored.targets, stored.norms).item() == pytest.approx(1, rel=1e-4)


def pictures(folder, count=3):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (32, 32), (80 * i, 10, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def test_a_folder_of_pictures(pipe, tmp_path):
    folder = pictures(tmp_path / "p")
    (folder / "0.txt").unlink()
    with pytest.raises(ValueError, match=r"0\.png has no caption"):
        read_folder(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}\n')
    images, captions = read_folder(folder, prompt="none")
    assert captions == ["none", "one", "picture 2"]
    samples = encode(pipe, images, captions, batch=2)
    assert samples.latents.shape == (3, 4, 16, 16)
    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png cannot be read as a picture"):
        read_folder(folder)
    with pytest.raises(ValueError, match="no pictures in"):
        read_folder(tmp_path / "empty")


@pytest.mark.parametrize("save", [save_lora, save_kohya])
def test_concept_training_gives_an_ordinary_lora(pipe, draw, tmp_path, save):
    base, keys = draw(pipe), list(pipe.unet.state_dict())
    samples = Samples(torch.randn(4, 4, 16, 16), ["a fox"] * 4)
    config = LoraTraining(rank=2, alpha=1.0, layers=("attention", "feed-forward", "convolution"), steps=4, batch=2, lr=1e-2)
    tensors = train_lora(pipe, samples, config)
    assert torch.equal(draw(pipe), base)
    assert list(pipe.unet.state_dict()) == keys
    assert any(v.abs().sum() > 0 for k, v in tensors.items() if "lora_B" in k)
    options = {"alpha": 1.0, "triggers": "fox", "dtype": torch.float32} | ({"rank": 2} if save is save_lora else {})
    save(tensors, tmp_path / "x.safetensors", **options)
    expert = read_expert(tmp_path / "x.safetensors")
    assert expert.triggers == ("fox",)
    assert all(w.scale == 0.5 for part in expert.layers.values() for w in part.values())
    mole.attach(pipe, {"x": expert})
    ours = draw(pipe)
    mole.detach(pipe)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    torch.testing.assert_close(ours, draw(pipe), atol=1e-5, rtol=0)
    assert not torch.allclose(ours, base, atol=1e-5)


def test_concept_training_from_an_earlier_lora(pipe, tmp_path):
    samples = Samples(torch.randn(4, 4, 16, 16), ["a fox"] * 4)
    config = LoraTraining(rank=2, alpha=2.0, steps=3, batch=2)
    first = train_lora(pipe, samples, config)
    still = train_lora(pipe, samples, LoraTraining(rank=2, alpha=2.0, steps=1, batch=2, lr=1e-12, text_lr=1e-12), init=first)
    for key, tensor in first.items():
        torch.testing.assert_close(still[key], tensor, atol=1e-6, rtol=1e-4)
    save_lora(first, tmp_path / "x.safetensors", alpha=2.0, rank=2)
    assert load_file(tmp_path / "x.safetensors").keys() == first.keys()
    with pytest.raises(ValueError, match="unknown layers"):
        LoraTraining(layers=("attn",))
    with pytest.raises(ValueError, match="1 or more"):
        LoraTraining(rank=0)
