"""The emoji world's encoder: the principal components of 4 x 4 pixels, written into a diffusers AutoencoderKL.

Nothing in it is trained. Each place of the latents holds the 20 components that vary most among the world's 4 x 4 patches.
Strong components are scaled down more, so that they are closer to the weak ones. Latents are a linear function of the
picture and known from the start. You can train the decoder, even several times, without changing them.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from loop import to_tensor
from random_scenes import draw_scene, random_picture
from safetensors.torch import load_file, save_file
from torch import nn

from mole_world import words
from mole_world.drawings import Drawings

CHANNELS, PATCH = 20, 4
EVENING = 0.3  # component of standard deviation s is divided by s ** EVENING; if larger, fine detail drowns shapes
CONSTANT = 30.0  # put next to the signal in each norm group; so large that the norm divides by a constant
LOG_VARIANCE = -12.0  # the encoder is certain


@dataclass(frozen=True)
class Patches:
    """A linear map from pixel patches to latents, with weight [C, 48] and bias [C]. Latents have a mean variance of 1."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] in -1..1 -> latents [B, C, H / 4, W / 4]."""
        return F.conv2d(F.pixel_unshuffle(x, PATCH), self.weight[..., None, None], self.bias)


def patches(drawings: Drawings, pictures: int = 1500) -> Patches:
    """The principal components of the world's pictures. They are computed once and kept next to the drawings.

    Nearly equal components depend on a machine's rounding, so the base and the decoder must share the file.
    """
    path = drawings.folder / "patches.safetensors"
    if not path.exists():
        rng = np.random.default_rng(5)
        scenes = (draw_scene(words.SUBJECTS, words.STYLES, rng, count=1) for _ in range(pictures))
        shown = to_tensor([random_picture(drawings, s, rng) for s in scenes])
        seen = F.pixel_unshuffle(shown, PATCH).movedim(1, -1).flatten(0, 2)
        mean = seen.mean(0)
        variance, axes = torch.linalg.eigh((seen - mean).T @ (seen - mean) / len(seen))
        spread, axes = variance.flip(0)[:CHANNELS].sqrt(), axes.flip(1)[:, :CHANNELS]
        weight = axes.T / spread[:, None] ** EVENING
        weight = weight / (spread ** (1 - EVENING)).square().mean().sqrt()
        save_file({"weight": weight.contiguous(), "bias": -weight @ mean}, path)
    return Patches(**load_file(path))


@torch.no_grad()
def write(autoencoder: AutoencoderKL, linear: Patches) -> None:
    """Set the encoder and both quantising layers to `linear`, exactly but for the norm's constants (about 1 in 1000).

    Residual branches are zero. Two strided convolutions gather the 4 x 4 pixels, and the last layers pass them on.
    """
    for module in autoencoder.encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.zero_()
            module.bias.zero_()
    _gather(autoencoder.encoder, linear)
    _through_the_norm(autoencoder.encoder, autoencoder.config.norm_num_groups)
    for layer in (autoencoder.quant_conv, autoencoder.post_quant_conv):
        _carry(layer, len(layer.weight))


def _gather(encoder: nn.Module, linear: Patches) -> None:
    """The first strided convolution puts 2 x 2 pixels into channels 4 * colour + number; the second applies `linear`."""
    _carry(encoder.conv_in, 3)
    first, second = (block.downsamplers[0].conv for block in encoder.down_blocks[:2])
    weight = linear.weight.reshape(CHANNELS, 3, 2, 2, 2, 2)  # [C, colour, outer y, inner y, outer x, inner x]
    for c, y, x in product(range(3), range(2), range(2)):
        first.weight[4 * c + 2 * y + x, c, y, x] = 1
        for outer_y, outer_x in product(range(2), range(2)):
            second.weight[:CHANNELS, 4 * c + 2 * y + x, outer_y, outer_x] = weight[:, c, outer_y, y, outer_x, x]
    second.bias[:CHANNELS] = linear.bias
    _carry(encoder.down_blocks[1].resnets[0].conv_shortcut, 12)


def _through_the_norm(encoder: nn.Module, groups: int) -> None:
    """Carry the components through the last norm: as x and -x, since silu(x) - silu(-x) = x, next to large constants.

    A group has mean zero, and only the constants decide its spread. The norm's weight undoes that.
    """
    shortcut, norm, out = encoder.down_blocks[2].resnets[0].conv_shortcut, encoder.conv_norm_out, encoder.conv_out
    width = norm.num_channels // groups
    slots = [i // 2 * width + i % 2 * 2 for i in range(CHANNELS)]  # two components in a group
    constant = torch.ones(norm.num_channels, dtype=torch.bool)
    for i, slot in enumerate(slots):
        shortcut.weight[slot, i, 0, 0], shortcut.weight[slot + 1, i, 0, 0] = 1, -1
        out.weight[i, slot, 1, 1], out.weight[i, slot + 1, 1, 1] = 1, -1
        constant[slot : slot + 2] = False
    signs = torch.tensor([-CONSTANT, CONSTANT]).repeat(norm.num_channels // 2)
    shortcut.bias.copy_(torch.where(constant, signs, 0.0))
    share = constant.reshape(groups, width).float().mean(1)  # of a group's channels, those with constants
    norm.weight.copy_((CONSTANT * share.sqrt()).repeat_interleave(width))
    norm.bias.zero_()
    out.bias[CHANNELS:] = LOG_VARIANCE


def _carry(layer: nn.Conv2d, channels: int) -> None:
    """Make a convolution pass its first channels on unchanged."""
    layer.weight.zero_()
    layer.bias.zero_()
    middle = layer.kernel_size[0] // 2
    for c in range(channels):
        layer.weight[c, c, middle, middle] = 1
