"""The judge of the emoji world: what it sees, and where."""

import pytest
import torch
from PIL import Image

from mole_world.judge import Judge, Labels

LABELS = Labels(("fox", "owl", "bat", "pig", "ant"), ("ink", "noto"), ("white", "blue", "grey"), ("day", "night"))


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return Judge(LABELS).eval()


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 128), (128, 128)])
def test_it_looks_at_every_canvas(judge, size):
    pictures = [Image.new("RGB", size, colour) for colour in ("red", "white")]
    verdict = judge.verdict(pictures)
    assert verdict.subjects.shape == (2, 5)
    assert (verdict.style.shape, verdict.background.shape) == ((2, 2), (2, 3))
    assert judge.subject_map(pictures).shape == (2, 5, size[1] // 16, size[0] // 16)


def test_as_many_subjects_are_seen_as_are_asked_for(judge):
    verdict = judge.verdict([Image.new("RGB", (128, 64), "red")])
    best = [judge.labels.subjects[i] for i in verdict.subjects[0].topk(2).indices]
    assert judge.sees(verdict, best).all()
    others = [s for s in judge.labels.subjects if s not in best]
    assert not judge.sees(verdict, others[:2]).any()
