"""img2img and inpainting: each subject of the prompt keeps the place that it has in the given picture.

A subject is where the model, with only that subject's LoRA and prompt, makes smaller errors in denoising the picture than it
does for the others. This is a diffusion classifier (Li et al. 2023, arXiv 2303.16203), place by place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from mole_diffusers.binding.config import given_region
from mole_diffusers.binding.picture_layout import UNDECIDED, regions_of_subjects
from mole_diffusers.functional import onto
from mole_diffusers.patching.host.cropping import OF_WHOLE_SIZE
from mole_diffusers.patching.host.denoiser_inputs import DenoiserInputs
from mole_diffusers.patching.subjects.prompt_subjects import (
    AdapterSubset,
    PictureCall,
    PromptSubjects,
    SetPlaces,
    place_source,
)
from mole_diffusers.patching.undo import undoing

LEVEL = 0.5  # share of the noise levels that the model was trained at; from .2 to .8 all gave the same places

WANTED: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {  # the models' target
    "epsilon": lambda picture, noise, alpha: noise,
    "v_prediction": lambda picture, noise, alpha: alpha.sqrt() * noise - (1 - alpha).sqrt() * picture,
    "sample": lambda picture, noise, alpha: picture,
}


@place_source
def img2img(
    call: PictureCall, *, adapter_subset: AdapterSubset, set_places: SetPlaces
) -> AbstractContextManager[None] | None:
    """Find the subjects of a call in the picture that it draws over.

    None if there is no such picture, its prompt names fewer than two subjects, or the model's noise is not that of DDPM.
    """
    subjects = call.subjects
    if call.given.get("image") is None or subjects is None or len(subjects.parts) < 2 or call.obstacle:
        return None
    scheduler = call.pipe.scheduler
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("prediction_type") not in WANTED:
        return None
    return GivenPicture(call, subjects, adapter_subset, set_places).placed()


class GivenPicture:
    """Finds the places of subjects in the picture that a call draws over, before it first calls the UNet.

    If the pipeline adds noise to no picture, to several, or to one that is not everything its UNet denoises, it finds
    nothing. Places then come from attention, as in any other call.
    """

    def __init__(self, call: PictureCall, subjects: PromptSubjects, adapter_subset: AdapterSubset, set_places: SetPlaces):
        self.call, self.subjects, self.adapter_subset, self.set_places, self.pipe = (
            call,
            subjects,
            adapter_subset,
            set_places,
            call.pipe,
        )
        self._picture: torch.Tensor | None = None  # [B, C, H, W], the latents that noise was added to
        self._encoded: list[torch.Tensor] = []  # the pictures [b, 3, 8H, 8W] that these were made of
        self._has_begun = False  # whether the UNet was called

    @contextmanager
    def placed(self) -> Iterator[None]:
        """While the block runs, place a call's subjects before its first step."""
        add_noise, encode = self.pipe.scheduler.add_noise, self.pipe.vae.encode

        def seen(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._picture is None:
                self._encoded.append(x)
            return encode(x, *args, **kwargs)

        def noted(original_samples: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self._picture = original_samples
            return add_noise(original_samples, *args, **kwargs)

        with undoing() as undo:
            undo.override(self.pipe.scheduler, "add_noise", noted)
            undo.override(self.pipe.vae, "encode", seen)
            # Before the mixture's own hooks, so that the step itself is the last call that they see.
            undo.before_forward(self.pipe.unet, self._before_step, prepend=True, with_kwargs=True)
            yield

    def _before_step(self, _: Any, args: tuple, kwargs: dict) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        subjects, picture, reader = self.subjects, self._picture, DenoiserInputs(self.pipe.unet)
        latents, call = reader.latents(args, kwargs), reader.named(args, kwargs)
        free = [i for i in range(len(subjects.parts)) if given_region(subjects.sentence.subjects[i], subjects.bound) is None]
        if len(free) < 2 or picture is None or latents.shape[1:] != picture.shape[1:]:
            return
        # Latents of one picture differ if each has its own generator.
        given = [each for batch in self._encoded or [picture] for each in batch]
        if not all(torch.equal(each, given[0]) for each in given):
            return
        samples = len(latents) // len(picture)
        errors = torch.stack([self._errors(i, picture[:1], latents, call, samples) for i in free]).cpu()  # [K, H, W]
        chosen, (height, width) = [subjects.sentence.subjects[i] for i in free], errors.shape[1:]
        regions, margin = regions_of_subjects(
            subjects.sentence, chosen, errors.amax(0) - errors, subjects.bound, (height, width)
        )
        if margin >= UNDECIDED:
            self.set_places({subjects.keys[i]: region for i, region in zip(free, regions, strict=True)})

    @torch.no_grad()
    def _errors(
        self, subject: int, picture: torch.Tensor, latents: torch.Tensor, call: Mapping[str, Any], samples: int
    ) -> torch.Tensor:
        """The squared error of one thing's model at each place of a picture [1, C, H, W], [H, W].

        It is over as many noise samples as a step has rows for one picture, so that a batch has the places that each of its
        pictures would have. `call` are all arguments of the UNet for a step's latents.
        """
        alphas = self.pipe.scheduler.alphas_cumprod
        timestep = int(LEVEL * len(alphas))
        alpha, generator = alphas[timestep].to(latents), torch.Generator().manual_seed(0)
        noise = torch.randn(samples, *latents.shape[1:], generator=generator).repeat(len(latents) // samples, 1, 1, 1)
        noise = onto(noise, latents.device).to(latents.dtype)
        with self.adapter_subset(
            self.subjects.drawing(self.subjects.sentence.subjects[subject], self.subjects.parts[subject])
        ):
            text, pooled = self.call.encode(self.subjects.parts[subject])
            changed = {
                "sample": alpha.sqrt() * picture + (1 - alpha).sqrt() * noise,
                "timestep": torch.tensor(timestep, device=latents.device),
                "encoder_hidden_states": text.to(latents).expand(len(latents), -1, -1),
                "return_dict": False,
            }
            if pooled is not None:  # SDXL
                pooled = pooled.to(latents).expand(len(latents), -1)
                changed["added_cond_kwargs"] = {**call["added_cond_kwargs"], "text_embeds": pooled}
            kept = {name: value for name, value in call.items() if name not in OF_WHOLE_SIZE}  # of another noise level
            found = self.pipe.unet(**kept | changed)[0]
        wanted = WANTED[self.pipe.scheduler.config.prediction_type](picture, noise, alpha)
        return (found - wanted).float().square().mean((0, 1))
