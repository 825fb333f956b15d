"""Models that measure pictures, each from a library that keeps it: transformers, timm, open_clip and torchmetrics.

All of them are in the extra `evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

import open_clip
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.ops import nms
from torchvision.transforms.functional import pil_to_tensor
from transformers import pipeline

Backbone = Literal["alex", "vgg", "squeeze"]
CLIP = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
DINO = "vit_base_patch14_dinov2.lvd142m"
DETECTOR = "google/owlv2-base-patch16-ensemble"
LPIPS: Backbone = "alex"
BOXES = 5  # boxes that a subject may be in
SAME_BOX = 0.7  # two boxes that share more of their union are one


class Detection(NamedTuple):
    """A part of a picture in pixels, and how sure the detector is."""

    left: int
    top: int
    right: int
    bottom: int
    score: float

    def crop(self, image: Image.Image) -> Image.Image:
        return image.crop(self[:4])


class Detector:
    """An open-vocabulary detector of transformers that its zero-shot pipeline runs, such as OWLv2."""

    def __init__(self, source: str, *, device: str):
        self.run = pipeline("zero-shot-object-detection", model=source, device=device)

    def boxes(self, image: Image.Image, subjects: Sequence[str]) -> list[Detection]:
        """Different boxes for any of the subjects: the surest ones of each, without those that nearly cover a surer one."""
        found: list[Detection] = []
        for subject in subjects:
            for each in self.run(image, candidate_labels=[subject], top_k=BOXES):
                left, top, right, bottom = (each["box"][name] for name in ("xmin", "ymin", "xmax", "ymax"))
                box = Detection(max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height), each["score"])
                if box.left < box.right and box.top < box.bottom:
                    found.append(box)
        if not found:
            return []
        corners, scores = torch.tensor([box[:4] for box in found]).float(), torch.tensor([box.score for box in found])
        return [found[i] for i in nms(corners, scores, SAME_BOX).tolist()]


class ImageFeatures:
    """The features of a timm model, such as DINOv2."""

    def __init__(self, source: str, *, device: str):
        self.model = timm.create_model(_local(source), pretrained=True, num_classes=0).eval().to(device)
        settings = timm.data.resolve_model_data_config(self.model) | {"crop_pct": 1.0}
        self.transform, self.device = timm.data.create_transform(**settings, is_training=False), device

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """[B, D] features of length 1. Pictures that are not square get grey bars."""
        squares = [ImageOps.pad(image, (max(image.size),) * 2, color="grey") for image in images]
        x = torch.stack([self.transform(square.convert("RGB")) for square in squares])  # [B, 3, H, W]
        return F.normalize(self.model(x.to(self.device)).float().cpu(), dim=-1)


class PromptFit:
    """How well a picture fits a prompt, by a CLIP of open_clip."""

    def __init__(self, source: str, *, device: str):
        self.model, self.transform = open_clip.create_model_from_pretrained(_local(source), device=device)
        self.tokenizer, self.device = open_clip.get_tokenizer(_local(source)), device
        self.model.eval()

    @torch.no_grad()
    def __call__(self, image: Image.Image, prompt: str) -> float:
        """The cosine of their features. Bars keep all of a wide picture, because CLIP sees a square in the middle."""
        square = ImageOps.pad(image, (max(image.size),) * 2, color="grey")
        pixels = self.transform(square.convert("RGB"))[None].to(self.device)
        text = self.model.encode_text(self.tokenizer([prompt]).to(self.device), normalize=True)
        return (self.model.encode_image(pixels, normalize=True) @ text.T).item()


class PictureChange:
    """How different two pictures are: LPIPS on a network of torchvision, and SSIM."""

    def __init__(self, network: Backbone, *, device: str):
        self.lpips = LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, image: Image.Image, other: Image.Image) -> tuple[float, float]:
        """LPIPS, 0 for equal pictures, and SSIM, 1 for equal pictures."""
        x, y = (_pixels(each)[None].to(self.device) / 255 for each in (image, other))  # [1, 3, H, W]
        lpips = self.lpips(x, y).item()
        self.lpips.reset()  # it gathers what it has seen, for a mean
        return lpips, cast(torch.Tensor, structural_similarity_index_measure(x, y, data_range=1.0)).item()


class Models:
    """All of them.

    Args:
        clip: for open_clip, a folder or "hf-hub:NAME".
        dino: for timm, a folder or name.
        detector: for transformers, a folder or hub id.
        lpips: alex, vgg or squeeze.
    """

    def __init__(
        self, *, clip: str = CLIP, dino: str = DINO, detector: str = DETECTOR, lpips: Backbone = LPIPS, device: str = "cpu"
    ):
        self.names = {"CLIP": clip, "DINO": dino, "detector": detector, "LPIPS": lpips}
        self.detector, self.features = Detector(detector, device=device), ImageFeatures(dino, device=device)
        self.fit, self.change = PromptFit(clip, device=device), PictureChange(lpips, device=device)


def seam(image: Image.Image) -> float:
    """How much more colour changes across one straight line through the whole picture than across most, 0 to 255.

    The change of a line is the median along it, so that the edge of a subject, which does not run along half of a straight
    line, is no seam.
    """
    x = _pixels(image)
    across = x.diff(dim=2).abs().mean(0).median(0).values  # [W - 1]
    down = x.diff(dim=1).abs().mean(0).median(1).values  # [H - 1]
    return max((lines.max() - lines.median()).item() for lines in (across, down))


def _pixels(image: Image.Image) -> torch.Tensor:
    """[3, H, W] in 0..255."""
    return pil_to_tensor(image.convert("RGB")).float()


def _local(source: str) -> str:
    """A folder as timm and open_clip name it."""
    return f"local-dir:{source}" if Path(source).is_dir() else source
