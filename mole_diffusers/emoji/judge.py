"""The emoji world's evaluator: which subjects, which style and which background a picture shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in B pictures; indices into its word lists.

    Attributes:
        subjects: [B, S] log-probabilities, each subject on its own.
        style: [B] the most likely style.
        background: [B] the most likely background.
    """

    subjects: torch.Tensor
    style: torch.Tensor
    background: torch.Tensor


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
    """A residual CNN on [B, 3, 64, 64] in -1..1: subject logits per position, pooled by log-sum-exp (multi-label);
    style and background from the mean feature."""

    def __init__(self, subjects: Sequence[str], styles: Sequence[str], backgrounds: Sequence[str]):
        super().__init__()
        self.subjects, self.styles, self.backgrounds = list(subjects), list(styles), list(backgrounds)
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 160)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU(), _Residual(after)]
        self.trunk = nn.Sequential(*layers, _Residual(160))  # [B, 160, 4, 4]
        self.subject = nn.Conv2d(160, len(subjects), 1)
        self.style = nn.Linear(160, len(styles))
        self.background = nn.Linear(160, len(backgrounds))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of subjects [B, S], style [B, Y] and background [B, K]."""
        features = self.trunk(x)
        mean = features.mean((2, 3))
        return self.subject(features).flatten(2).logsumexp(-1), self.style(mean), self.background(mean)

    @torch.no_grad()
    def verdict(self, images: Sequence[Image.Image]) -> Verdict:
        """Look at RGB pictures of 64 x 64."""
        subjects, style, background = self(_pixels(images))
        return Verdict(F.logsigmoid(subjects), style.argmax(-1), background.argmax(-1))

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """What the verdict is read from: [B, 160, 4, 4], rows and columns of places in the picture."""
        return self.trunk(_pixels(images))

    @torch.no_grad()
    def subject_map(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Logits of every subject at every place: [B, S, 4, 4]."""
        return self.subject(self.trunk(_pixels(images)))

    def sees(self, verdict: Verdict, subjects: Sequence[str]) -> torch.Tensor:
        """[B, len(subjects)] bool: is each subject among the len(subjects) most likely ones."""
        top = verdict.subjects.topk(len(subjects)).indices  # [B, k]
        wanted = torch.tensor([self.subjects.index(s) for s in subjects])
        return (top[:, None, :] == wanted[None, :, None]).any(-1)

    def is_style(self, verdict: Verdict, style: str) -> torch.Tensor:
        """[B] bool."""
        return verdict.style == self.styles.index(style)

    def is_background(self, verdict: Verdict, background: str) -> torch.Tensor:
        """[B] bool."""
        return verdict.background == self.backgrounds.index(background)

    def save(self, folder: Path) -> None:
        """fp16 weights and the word lists."""
        folder.mkdir(parents=True, exist_ok=True)
        halves = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file(halves, folder / "judge.safetensors")
        words = {"subjects": self.subjects, "styles": self.styles, "backgrounds": self.backgrounds}
        (folder / "judge.json").write_text(json.dumps(words, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Read what `save` wrote, as fp32, in evaluation mode."""
        judge = cls(**json.loads((folder / "judge.json").read_text()))
        judge.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "judge.safetensors").items()}
        )
        return judge.eval()


def _pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures as [B, 3, 64, 64] in -1..1."""
    x = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(0, 3, 1, 2)
    return x.float() / 127.5 - 1
