"""Measures of pictures against the models' own calls."""

import open_clip
import pytest
import timm
import torch
from PIL import Image
from protocol_parts import noise
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

from mole_world.evaluation.measures import Detection, Models, seam


def test_scores_are_the_models_own(models):
    """Of a wide picture, which becomes a square with grey bars."""
    loaded = Models(**models)
    picture, other = noise(99).resize((56, 28)), noise(98).resize((56, 28))
    square = Image.new("RGB", (56, 56), "grey")
    square.paste(picture, (0, 14))
    clip, transform = open_clip.create_model_from_pretrained(f"local-dir:{models['clip']}")
    tokens = open_clip.get_tokenizer(f"local-dir:{models['clip']}")(["a fox in ink"])
    image, text, _ = clip.eval()(transform(square)[None], tokens)
    assert loaded.fit(picture, "a fox in ink") == pytest.approx((image @ text.T).item(), abs=1e-5)
    dino = timm.create_model(f"local-dir:{models['dino']}", pretrained=True).eval()
    small = torch.tensor(list(square.resize((28, 28), Image.Resampling.BICUBIC).getdata())).T.reshape(1, 3, 28, 28)
    feature = dino(small / 127.5 - 1)
    assert torch.cosine_similarity(loaded.features([picture]), feature).item() == pytest.approx(1, abs=1e-3)
    x, y = (torch.tensor(list(each.getdata())).T.reshape(1, 3, 28, 56) / 127.5 - 1 for each in (picture, other))
    lpips = learned_perceptual_image_patch_similarity(x, y, net_type="squeeze").item()
    assert loaded.change(picture, other)[0] == pytest.approx(lpips, abs=1e-5)
    assert loaded.change(picture, picture) == pytest.approx((0, 1))


def test_a_box_is_inside_of_the_picture_and_counts_once(models):
    """Of boxes that nearly cover each other, the surest is left, whatever was looked for."""
    detector, found = Models(**models).detector, []
    given = [(-5, 0, 20, 20, 0.9), (0, 0, 21, 20, 0.8), (30, 30, 90, 50, 0.7), (60, 0, 70, 9, 0.6)]
    raw = [{"score": score, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))} for *box, score in given]
    detector.run = lambda image, candidate_labels, top_k: found.extend(candidate_labels) or raw
    boxes = detector.boxes(noise(0), ["a fox", "a hat"])
    assert boxes == [Detection(0, 0, 20, 20, 0.9), Detection(30, 30, 56, 50, 0.7)]
    assert found == ["a fox", "a hat"]


def test_a_seam_is_a_line_through_the_whole_picture():
    half, box = Image.new("RGB", (64, 48), "black"), Image.new("RGB", (64, 48), "black")
    half.paste("#646464", (32, 0, 64, 48))
    box.paste("#646464", (20, 20, 40, 40))
    assert seam(half) == seam(half.rotate(90, expand=True)) == 100
    assert seam(box) == 0  # its edges run along 20 of 48 pixels
