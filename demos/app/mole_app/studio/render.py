"""Recipe -> picture, on one pipeline. The commands, the app and its API all call this."""

from __future__ import annotations

import dataclasses
import inspect
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from mole_app.studio import detail_pass, embeddings, picture_passes
from mole_app.studio.base_models import usual_size
from mole_app.studio.catalog import UNTRAINED, Catalog, gates_hash
from mole_app.studio.clip_skip import clip_skip, most_clip_skip
from mole_app.studio.current_base import CurrentBase
from mole_app.studio.ip_adapters import Reference
from mole_app.studio.names import WORLD
from mole_app.studio.picture_notes import PictureNotes
from mole_app.studio.predictions import Predictions
from mole_app.studio.prompt_syntax import LoraTag, parse
from mole_app.studio.prompt_weights import (
    call_arguments,
    cut_off,
    prompts_read,
    texts_read,
    tiled_prompt,
    unread,
)
from mole_app.studio.recipe import BOUND, PROMPTS, TILES, Recipe
from mole_app.studio.samplers import sampler, sampler_name
from mole_app.studio.strength_schedule import StrengthSchedule
from mole_app.studio.upscaling import enlarged
from mole_app.studio.weight_syntax import parse_weights, read_as_words
from mole_diffusers import Mixture, Tiling, denoiser, explain, models_of
from mole_diffusers.binding import AUTO, Explanation, Layout, bindings, files_bindings, region_picture
from mole_diffusers.lora import check_family
from mole_diffusers.merging import METHODS, by_activations

MERGES = [method for method in METHODS if method != "sum" and not by_activations(method)]
MAX_SIDE = 2048  # pixels of a picture in the app, and of one that a note suggests
OnStep = Callable[[int, torch.Tensor], None]  # (steps done, the clean latents that are predicted [1, C, h, w])
MixtureContext = Callable[[Mixture], AbstractContextManager]
SDXL_FOR_TWO = {(2048, 1024): "1344 x 768", (1024, 2048): "768 x 1344"}  # sizes for tiles -> that SDXL was trained at
NO_SECOND = "each tile has a prompt of its own: draw without prompt_2"
DETAILS = "the details of each subject"  # what the last pass draws


def check_size(width: int, height: int, larger: float = 1.0) -> None:
    """Raises ValueError for a size in pixels, made `larger` by this factor, that the app draws no pictures at."""
    if max(width, height) * larger > MAX_SIDE:
        times = f", {larger:g} times larger" if larger > 1 else ""
        raise ValueError(f"pictures have at most {MAX_SIDE} pixels a side, got {width} x {height}{times}")


class Studio:
    """Draws recipes with one base model, and the LoRAs and gates of a catalog."""

    def __init__(self, pipe: Any, catalog: Catalog, base: str, config: str | None = None):
        self.catalog, self.base, self._reference = catalog, CurrentBase(pipe, catalog, base, config), Reference()

    # ---- what can be drawn

    def misfit(self, name: str) -> str:
        """Why a LoRA cannot be used with this base, in one clause; "" if it may fit. Only the file's header is read."""
        try:
            check_family(self.catalog.family(name), models_of(self.base.pipe))
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return ""

    def check_fit(self, names: Iterable[str]) -> None:
        """Raises ValueError for a LoRA that cannot be used with this base."""
        for name in names:
            if why := self.misfit(name):
                raise ValueError(f"the LoRA {name!r} cannot be used here: {why}")

    def complete(self, recipe: Recipe) -> Recipe:
        """Fill in everything that a recipe leaves open.

        This chooses a random seed, a size that can be drawn, the gates for "auto", and for tags without a strength the one
        in the note beside the LoRA. It adds the base, the hashes, and the LoRAs' names in this catalog. It drops locks of
        LoRAs that are not in the prompt, and clip skip if the base does not support it.

        Raises ValueError if something is missing here or does not fit.
        """
        self.base.check_open()
        given = parse(recipe.prompt, {*recipe.experts, *self.catalog.loras})
        names = {tag.name: self.catalog.local_name(tag.name, recipe.experts.get(tag.name, "")) for tag in given.tags}
        if len(set(names.values())) < len(names):
            raise ValueError(f"two tags of the prompt mean the same LoRA: {', '.join(names)}")
        self.check_fit(names.values())
        here_as = (dataclasses.replace(tag, name=names[tag.name]) for tag in given.tags)
        tags = tuple(tag.or_at(self.catalog.preferred_weight) for tag in here_as)
        here = {name: name for name in names.values()} | names  # a name in the recipe may be another LoRA's name here
        rows = {place: {here[n]: w for n, w in row.items() if n in here} for place, row in recipe.locks.items()}
        unfit = self.base.attachment.unfit
        gates = self.catalog.gates_for(names.values(), unfit=unfit) if recipe.gates == "auto" else recipe.gates
        source = self.catalog.gates_source(gates)
        digest = "" if gates in UNTRAINED else gates_hash(Path(source))
        if recipe.gates_sha256 not in ("", digest):
            raise ValueError(f"the gates {gates!r} here are not those of the recipe ({recipe.gates_sha256[:12]})")
        if "<lora:" in recipe.prompt_2 + recipe.negative_2:
            raise ValueError("the tags of LoRAs stand in the first prompt, which counts for every text encoder")
        for text in (given.text, recipe.negative, recipe.prompt_2, recipe.negative_2):
            parse_weights(text)
        kind, about = recipe.arm_and_name
        if kind == "merge" and about not in MERGES:
            raise ValueError(f"unknown merge {about!r}; known: {', '.join(MERGES)}")
        if kind == "alone" and about not in here:
            raise ValueError(f"the prompt has no LoRA {about!r} to draw alone, but {', '.join(names.values()) or 'none'}")
        if recipe.clip_skip > (most := most_clip_skip(self.base.pipe)) > 1:
            raise ValueError(f"clip skip is in 1..{most} with this base, got {recipe.clip_skip}")
        words = embeddings.named([getattr(recipe, name) for name in PROMPTS], self.catalog.files["embedding"])
        files = dict[str, Any]()
        for of in ("upscaler", "controlnet", "ip_adapter"):
            files[of], files[f"{of}_sha256"] = self.catalog.found(of, getattr(recipe, of), getattr(recipe, f"{of}_sha256"))
        if recipe.controlnet or recipe.ip_adapter:
            picture_passes.kind_in(self.base.pipe, picture_passes.CONTROLLED)
        own = usual_size(self.base.pipe, self.base.name, given.text)
        width, height = picture_passes.drawable(self.base.pipe, recipe.width or own[0], recipe.height or own[1])
        return dataclasses.replace(
            recipe,
            prompt=str(dataclasses.replace(given, tags=tags)),
            seed=secrets.randbelow(1 << 32) if recipe.seed == -1 else recipe.seed,
            width=width,
            height=height,
            sampler=sampler_name(recipe.sampler, self.base.scheduler) if recipe.sampler else "",
            clip_skip=min(recipe.clip_skip, most),
            arm=f"alone {here[about]}" if kind == "alone" else recipe.arm,
            locks={place: row for place, row in rows.items() if row},
            masks={here[name]: mask for name, mask in recipe.masks.items() if name in here},
            gates=gates,
            gates_sha256=digest,
            **files,
            experts={name: self.catalog.expert(name).sha256 for name in names.values()},
            embeddings=dict(self.catalog.found("embedding", name, recipe.embeddings.get(name, "")) for name in words),
            base=self.base.name,
        )

    def size_with_room(self, recipe: Recipe) -> tuple[int, int] | None:
        """The width and height from which on each subject of a completed recipe is drawn by itself in some steps; None if
        they are already, or if that cannot be."""
        if recipe.binding_of_pass() != AUTO:
            return None
        return self.explain(recipe).room

    def notes(self, asked: Recipe, recipe: Recipe, image: Image.Image | None = None) -> list[str]:
        """What a user should know about a completed recipe: what may be wrong with it, what was changed, and what is cut.

        Args:
            asked: the recipe before `complete`.
            recipe: the completed recipe.
            image: the picture that is drawn over.
        """
        notes = []
        if recipe.arm == "gates" and (others := self.catalog.other_files(recipe.gates, recipe.experts)):
            notes.append(f"the gates {recipe.gates!r} were trained with another file of {', '.join(map(repr, others))}")
        size = asked.width or recipe.width, asked.height or recipe.height
        drawn = f"{recipe.width} x {recipe.height} pixels"
        if image is not None and image.size != size:
            notes.append(f"the picture of {image.width} x {image.height} is drawn over at {drawn}")
        elif size != (recipe.width, recipe.height):
            notes.append(f"{size[0]} x {size[1]} is rounded to {drawn}")
        known = {*recipe.experts, *(tag.name for tag in parse(asked.prompt, {*asked.experts, *recipe.experts}).tags)}
        if gone := dict.fromkeys(name for row in asked.locks.values() for name in row if name not in known):
            notes.append(f"weights set by hand for {', '.join(map(repr, gone))} are left out: the prompt has no such LoRA")
        if recipe.detail and not detail_pass.with_a_place(self.explain(recipe)):
            notes.append("no subject of the prompt has a place of its own, so there is nothing for the detail pass")
        for tag in recipe.tags:
            if tag.start >= (last := min(recipe.steps, recipe.steps if tag.stop is None else tag.stop)):
                notes.append(f"{tag.name!r} acts in no step: it starts at {tag.start}, and ends before {last}")
        notes += self._notes_on_tiles(recipe)
        notes += self._notes_on_words(recipe)
        if asked.clip_skip != recipe.clip_skip:
            notes.append(f"{type(self.base.pipe).__name__} is drawn without clip skip")
        notes += [f"{name} does nothing without {other}".replace("_", " ") for name, other in recipe.unread.items()]
        notes += cut_off(self.base.pipe, recipe.text, recipe.prompt_2)
        return notes + unread(self.base.pipe, **{name: getattr(recipe, name) for name in (*PROMPTS[1:], "guidance")})

    def _notes_on_words(self, recipe: Recipe) -> list[str]:
        texts = recipe.text, recipe.negative, recipe.prompt_2, recipe.negative_2
        syntax = dict.fromkeys(found for text in texts for found in read_as_words(text))
        notes = [f"{found} is read as words: nothing is chosen or combined here" for found in syntax]
        if "<lora:" in recipe.negative:  # as in A1111, whose pictures can be drawn
            notes.append("the tags of LoRAs in the negative prompt are read as words")
        return notes

    def _notes_on_tiles(self, recipe: Recipe) -> list[str]:
        notes = []
        if recipe.binding == TILES and recipe.has_pictures:
            notes.append("tiles are drawn from noise alone: with a given picture LoRAs are bound, and draw it as one")
        elif recipe.binding_of_pass() == TILES and (why := self.explain(recipe).why_no_tiles):
            notes.append(f"no tiles are drawn: {why}")
        try:
            size = self.size_with_room(recipe)
        except ValueError as error:  # a painted region without a mask, which cannot be drawn
            return [*notes, str(error)]
        return notes if size is None else [*notes, self._note_on_room(size)]

    def _note_on_room(self, size: tuple[int, int]) -> str:
        """What is said of a size with room for several subjects, which is larger than the base was trained at."""
        words = f"at {size[0]} x {size[1]} pixels, each subject is drawn by itself in some steps"
        if self.base.name != WORLD:
            width, height = usual_size(self.base.pipe, self.base.name, "")
            words += f"; the base was trained at {width} x {height}, and may draw subjects twice there"
        if type(self.base.pipe).__name__.startswith("StableDiffusionXL") and size in SDXL_FOR_TWO:
            words += f": two have more room at {SDXL_FOR_TWO[size]}, which it was trained at, too"
        return words

    # ---- drawing

    def draw(
        self,
        recipe: Recipe,
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        control: Image.Image | None = None,
        reference: Image.Image | None = None,
        on_step: OnStep | None = None,
        inside: MixtureContext = nullcontext,
        noted: PictureNotes | None = None,
    ) -> Image.Image:
        """Draw a completed recipe.

        Args:
            image, mask, control, reference: the pictures whose hashes are in the recipe, see `picture_passes.with_pictures`.
            on_step: called after every step of every pass. An exception in it stops the drawing.
            inside: a function of the mixture whose context surrounds the first pass, for example a trace.
            noted: receives what the mixture says of the first pass.

        Raises ValueError if these are not the recipe's pictures.
        """
        pictures = {"image": image, "mask": mask, "control": control, "reference": reference}
        picture_passes.check_pictures(recipe, pictures)
        seen = {n: picture_passes.on_white(each) for n in ("control", "reference") if (each := pictures[n]) is not None}
        self.total_steps(recipe)
        size = recipe.width, recipe.height
        with self.base.lock:
            self.base.check_for(recipe)
            over: dict[str, Any] = {}
            if image is not None:
                over = {"strength": recipe.strength, "image": picture_passes.fitted(picture_passes.on_white(image), *size)}
            if mask is not None:
                over["mask_image"] = picture_passes.fitted(region_picture(mask), *size)
            noted = noted or PictureNotes()
            drawn = self._pass(recipe, size, over, seen, on_step, inside, noted=noted)
            if mask is not None:  # the VAE changes the rest a little
                drawn = Image.composite(drawn, over["image"], over["mask_image"])
            if recipe.hires > 1:
                larger = picture_passes.drawable(self.base.pipe, *(round(side * recipe.hires) for side in size))
                if recipe.upscaler:
                    drawn = enlarged(
                        drawn, self.catalog.files["upscaler"][recipe.upscaler], self.base.pipe._execution_device
                    )
                over = {"image": picture_passes.fitted(drawn, *larger), "strength": recipe.hires_strength}
                drawn = self._pass(recipe, larger, over, seen, on_step)
            if recipe.detail and noted.layout is not None:
                drawn = self._detailed(recipe, drawn, noted.layout, seen, on_step)
            return drawn

    def _detailed(
        self, recipe: Recipe, drawn: Image.Image, layout: Layout, seen: Mapping[str, Image.Image], on_step: OnStep | None
    ) -> Image.Image:
        """The picture with each subject's place drawn over once more, enlarged, by the LoRAs that act there."""
        usual = usual_size(self.base.pipe, self.base.name, "")
        for subject in detail_pass.subjects(self.explain(recipe), layout.regions, drawn.size):
            size = picture_passes.drawable(self.base.pipe, *detail_pass.enlarged(subject.box, usual))
            over = {"image": picture_passes.fitted(drawn.crop(subject.box), *size), "strength": recipe.detail}
            here = dict(seen)
            if "control" in seen:
                here["control"] = picture_passes.fitted(seen["control"], *drawn.size).crop(subject.box)
            part = self._pass(recipe, size, over, here, on_step, acting=subject.acting)
            drawn = detail_pass.put_back(drawn, part, subject)
        return drawn

    def total_steps(self, recipe: Recipe) -> int:
        """How often `draw` calls `on_step` for a recipe; less often if a subject's place is not found.

        Raises ValueError if a strength leaves no steps.
        """
        return sum(self._steps_of_passes(recipe))

    def _steps_of_passes(self, recipe: Recipe) -> tuple[int, int, int]:
        """The steps of the first pass, of the larger picture, and of all details."""
        count = partial(picture_passes.steps_drawn, self.base.pipe, recipe.steps)
        first = count(recipe.strength) if recipe.image else recipe.steps
        larger = count(recipe.hires_strength) if recipe.hires > 1 else 0
        if not recipe.detail:
            return first, larger, 0
        return first, larger, count(recipe.detail) * len(detail_pass.with_a_place(self.explain(recipe)))

    def part_of_step(self, recipe: Recipe, step: int) -> str:
        """What a step of `draw`, from 1, draws of a completed recipe's picture; "" for all of it at once."""
        first, larger, _ = self._steps_of_passes(recipe)
        if step > first:
            return "the larger picture" if step <= first + larger else DETAILS
        if (tiled := self.explain(recipe).tiled) is None:
            return ""
        begin, end = (share * recipe.steps for share in tiled)
        return "each subject by itself" if max(1, begin) + 1e-5 < step <= end + 1e-5 else ""

    def _pass(
        self,
        recipe: Recipe,
        size: tuple[int, int],
        over: dict[str, Any],
        seen: Mapping[str, Image.Image],
        on_step: OnStep | None,
        inside: MixtureContext = nullcontext,
        *,
        acting: Sequence[str] | None = None,
        noted: PictureNotes | None = None,
    ) -> Image.Image:
        """One call of a pipeline. `over` has the picture that it draws over, the strength and the mask, or is {}.

        Args:
            seen: the "control" map and the "reference" picture, if the recipe has them.
            acting: only these LoRAs act, everywhere; by default all, as the recipe says.
        """
        controlnet = self.catalog.files["controlnet"][recipe.controlnet] if recipe.controlnet else None
        pipe = self.base.drawing_with(controlnet)(over=bool(over), masked="mask_image" in over)
        steps = picture_passes.steps_drawn(pipe, recipe.steps, over.get("strength", 1.0))
        with ExitStack() as stack:
            stack.callback(setattr, pipe, "scheduler", self.base.scheduler)
            pipe.scheduler = sampler(recipe.sampler, self.base.scheduler, recipe.seed)
            mixture = self.base.attachment.to(pipe, recipe)
            shown = self._shown(pipe, recipe, size, seen, stack)
            files = {name: self.catalog.files["embedding"][name] for name in recipe.embeddings}
            words = stack.enter_context(embeddings.taught(pipe, files))  # after what is attached, and taken back before it
            texts = {name: embeddings.spelled(getattr(recipe, name), files, words.__getitem__) for name in PROMPTS}
            recipe = dataclasses.replace(recipe, **cast(dict[str, Any], texts))
            names = [] if mixture is None else list(mixture.experts)
            kind, about = recipe.arm_and_name
            stack.enter_context(clip_skip(pipe, recipe.clip_skip))
            told = None
            if on_step is not None:
                told = _callback(on_step, steps, size, stack.enter_context(Predictions(pipe.scheduler)))
            # A merge already contains the strengths, and has no gates to lock.
            tags, locks = ([LoraTag(name) for name in names], {}) if kind == "merge" else (recipe.tags, recipe.locks)
            schedule = StrengthSchedule(names, tags, unet=denoiser(pipe), steps=steps, locks=locks)
            if mixture is not None:
                weights = {"base": {}, "alone": {about: 1.0}, "sum": dict.fromkeys(names, 1.0)}
                by_hand = weights.get(kind) if acting is None else dict.fromkeys(acting, 1.0)
                if by_hand is not None:  # else the gates decide, or there are none
                    stack.enter_context(mixture.bound(None))  # they act everywhere, for comparison
                    stack.enter_context(mixture.fixed(by_hand))
                stack.enter_context(mixture.planned(schedule))
                if kind != "merge":  # what is off takes no words from the others
                    stack.enter_context(mixture.strengths({name: 0.0 for name in names if name not in recipe.acting}))
                if by_hand is None and (binding := recipe.binding_of_pass(over=bool(over))) == BOUND:
                    stack.enter_context(mixture.tiled(0))
                elif by_hand is None and binding != "none":
                    tiles = tiled_prompt(pipe, **recipe.call)
                    if binding == TILES and not tiles:
                        raise ValueError(NO_SECOND)
                    stack.enter_context(mixture.tiled(always=binding == TILES, **tiles))
                stack.enter_context(inside(mixture))
            drawn = pipe(
                **call_arguments(pipe, **recipe.call),
                **picture_passes.size_arguments(pipe, *size),
                **over,
                **shown,
                num_inference_steps=recipe.steps,
                guidance_scale=recipe.guidance,
                generator=torch.Generator("cpu").manual_seed(recipe.seed),
                callback_on_step_end=schedule.on_step(told),
            ).images[0]
            if mixture is not None and noted is not None:
                noted.take(mixture, recipe)
            return drawn

    def _shown(
        self, pipe: Any, recipe: Recipe, size: tuple[int, int], seen: Mapping[str, Image.Image], stack: ExitStack
    ) -> dict[str, Any]:
        """The arguments with which a pipeline sees a control map and a reference picture while `stack` is open."""
        given: dict[str, Any] = {}
        if "control" in seen:
            name = "control_image" if "control_image" in inspect.signature(type(pipe).__call__).parameters else "image"
            given = {name: picture_passes.fitted(seen["control"], *size)}
            given |= {"controlnet_conditioning_scale": recipe.control_strength, "control_guidance_end": recipe.control_end}
        if "reference" in seen:
            file, encoders = self.catalog.files["ip_adapter"][recipe.ip_adapter], self.catalog.files["clip_vision"]
            read = self._reference.acting(
                pipe, file, encoders, seen["reference"], scale=recipe.ip_scale, is_guided=recipe.guidance > 1
            )
            given |= stack.enter_context(read)
        return given

    def draws_in_tiles(self, recipe: Recipe) -> bool:
        """Whether a completed recipe would be drawn in tiles with binding "auto"."""
        automatic = dataclasses.replace(recipe, arm="gates", binding=AUTO)
        return not recipe.has_pictures and self.explain(automatic).tiles is not None

    def explain(self, recipe: Recipe) -> Explanation:
        """Who acts on the prompt of a completed recipe, where and why; see `Mixture.explain`."""
        if not recipe.experts:
            return Explanation({}, None, "the prompt has no LoRA")
        if recipe.binding_of_pass() == "none":
            return Explanation.of_unbound(recipe.experts)
        own = files_bindings({name: self.catalog.expert(name) for name in recipe.experts})
        return explain(
            self.base.pipe,
            recipe.plain_text,
            bindings(recipe.tag_bindings(), own, own),  # from its tag, otherwise from its file
            width=recipe.width,
            height=recipe.height,
            prompt_2=recipe.prompt_2 if "prompt_2" in prompts_read(self.base.pipe) else None,
            acting=recipe.acting,
            texts=texts_read(self.base.pipe, recipe.text, recipe.prompt_2),
            tiling=Tiling(until=0) if recipe.binding_of_pass() == BOUND else Tiling(always=recipe.binding == TILES),
        )


def _callback(
    on_step: OnStep, steps: int, size: tuple[int, int], predicted: Predictions
) -> Callable[[Any, int, Any, dict], dict]:
    """A `callback_on_step_end` that calls `on_step` once per step, also if a sampler evaluates the denoiser twice in it."""
    told = 0

    def callback(pipe: Any, index: int, timestep: Any, kwargs: dict) -> dict:
        nonlocal told
        done = min(index // pipe.scheduler.order + 1, steps)
        if done > told:
            told, latents = done, kwargs["latents"]
            if done < steps and predicted.clean is not None:
                latents = predicted.clean
            if latents.dim() == 3:  # Flux has them as a sequence of patches
                latents = pipe._unpack_latents(latents, size[1], size[0], pipe.vae_scale_factor)
            on_step(done, latents)
        return kwargs

    return callback
