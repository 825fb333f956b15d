"""The emoji world's evaluator. It tells which subjects, style, background and light a picture shows, on any canvas, and
whether it is one scene."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from mole_world.scenes import Scene

# The logit of a subject that is there. Of 288 true drawings of one to three subjects, seen through the autoencoder, 1 %
# have another subject above it; of 48 with one subject more than asked for, all.
ANOTHER = -1.7


class Labels(NamedTuple):
    """What a judge tells apart, in the order of its logits."""

    subjects: Sequence[str]
    styles: Sequence[str]
    backgrounds: Sequence[str]
    lights: Sequence[str]


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in B pictures: logits for its `Labels`.

    Attributes:
        subjects: [B, S], combined over places (see `Judge`).
        style: [B, Y], the mean over places, weighted by how much each place says about style.
        background: [B, K].
        light: [B, L]. It says something about landscapes only.
        one_scene: [B], above 0 if the picture is one scene rather than parts of several.
    """

    subjects: torch.Tensor
    style: torch.Tensor
    background: torch.Tensor
    light: torch.Tensor
    one_scene: torch.Tensor


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x + self.body(x))


class Judge(nn.Module):
    """A convolutional residual network on [B, 3, H, W] in -1..1, H and W multiples of 16.

    Each place, 16 pixels from the next, says which subject it belongs to. A subject is about as likely as its likeliest
    place.
    """

    def __init__(self, labels: Labels):
        super().__init__()
        self.labels = labels
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 224)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU(), _Residual(after)]
        self.trunk = nn.Sequential(*layers, _Residual(224))  # [B, 224, H / 16, W / 16]
        self.subject = nn.Conv2d(224, len(labels.subjects), 1)
        self.weight = nn.Conv2d(224, 1, 1)  # how much a place says about style
        self.style = nn.Conv2d(224, len(labels.styles), 1)
        self.background = nn.Linear(2 * 224, len(labels.backgrounds))  # of the mean and the largest feature
        self.light = nn.Linear(224, len(labels.lights))
        self.seam = nn.Sequential(nn.Conv2d(224, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 1, 1))  # where scenes meet

    def forward(self, x: torch.Tensor) -> Verdict:
        features = self.trunk(x)
        weight = self.weight(features).flatten(2).softmax(-1)  # [B, 1, P]
        style = (self.style(features).flatten(2) * weight).sum(-1)
        subjects = self.subject(features).flatten(2).logsumexp(-1)
        mean = features.mean((2, 3))
        one_scene = -self.seam(features).flatten(1).logsumexp(-1)
        background = self.background(torch.cat([mean, features.amax((2, 3))], 1))
        return Verdict(subjects, style, background, self.light(mean), one_scene)

    @torch.no_grad()
    def verdict(self, images: Sequence[Image.Image]) -> Verdict:
        """Look at RGB pictures that all have the same size."""
        return self(_pixels(images))

    @torch.no_grad()
    def subject_map(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Logits of every subject at every place: [B, S, H / 16, W / 16]."""
        return self.subject(self.trunk(_pixels(images)))

    def sees(self, verdict: Verdict, subjects: Sequence[str]) -> torch.Tensor:
        """[B, len(subjects)] bool: whether each subject is among the len(subjects) most likely ones."""
        top = verdict.subjects.topk(len(subjects)).indices  # [B, k]
        wanted = torch.tensor([self.labels.subjects.index(s) for s in subjects])
        return (top[:, None, :] == wanted[None, :, None]).any(-1)

    def sees_another(self, verdict: Verdict, subjects: Sequence[str]) -> torch.Tensor:
        """[B] bool: whether there is a subject besides these."""
        others = [i for i, subject in enumerate(self.labels.subjects) if subject not in subjects]
        return verdict.subjects[:, others].amax(-1) > ANOTHER

    def is_style(self, verdict: Verdict, style: str) -> torch.Tensor:
        """[B] bool."""
        return verdict.style.argmax(-1) == self.labels.styles.index(style)

    def is_background(self, verdict: Verdict, background: str) -> torch.Tensor:
        """[B] bool."""
        return verdict.background.argmax(-1) == self.labels.backgrounds.index(background)

    def is_one_scene(self, verdict: Verdict) -> torch.Tensor:
        """[B] bool."""
        return verdict.one_scene > 0

    def is_right(self, verdict: Verdict, scene: Scene) -> torch.Tensor:
        """[B] bool: whether all subjects of the scene are there, in its style."""
        return self.sees(verdict, scene.subjects).all(-1) & self.is_style(verdict, scene.style)

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Read a judge from its folder, in fp32 and in evaluation mode."""
        judge = cls(Labels(**json.loads((folder / "judge.json").read_text())))
        judge.load_state_dict(load_file(folder / "judge.safetensors"))
        return judge.eval()


def _pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size as [B, 3, H, W] in -1..1."""
    x = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(0, 3, 1, 2)
    return x.float() / 127.5 - 1
