"""Attach experts and gates to a pipeline, and control them through a `Mixture`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mole_diffusers.binding.config import Bound, files_bindings
from mole_diffusers.binding.picture_layout import Layout
from mole_diffusers.binding.regions import AUTO
from mole_diffusers.binding.who_acts import Explanation, without_words
from mole_diffusers.gates import GATE_TYPES, GateBank, GateConfig
from mole_diffusers.gates.checkpoint import GATE_WEIGHTS, load_gates, save_gates
from mole_diffusers.gates.hub import model_card, push
from mole_diffusers.gates.transforms import Control
from mole_diffusers.lora import Expert
from mole_diffusers.lora.expert import joined_embeddings
from mole_diffusers.lora.host_names import with_host_names
from mole_diffusers.lora.own_words import own_words
from mole_diffusers.lora.stacking import check_share
from mole_diffusers.lora.strengths import Source, files_of, finite, read_weighed
from mole_diffusers.lora.writing import trigger_phrase, write_lora
from mole_diffusers.patching.gating.settings import Change, RowSets, StrengthPlan
from mole_diffusers.patching.gating.trace import Trace
from mole_diffusers.patching.host.denoiser_inputs import denoiser, models_of
from mole_diffusers.patching.host.offloading import loaded
from mole_diffusers.patching.install import folding
from mole_diffusers.patching.install.installation import Installation, held, installed, remove
from mole_diffusers.patching.install.parts import Parts
from mole_diffusers.patching.install.peft_injection import also_loaded
from mole_diffusers.patching.subjects.per_subject import explain
from mole_diffusers.patching.subjects.prompt_subjects import UNTIL, Encode, Tiling

__all__ = ["Mixture", "attach", "attached", "detach"]

Gates = str | Path | GateConfig
FOLDED = "folded experts act on every word and in the whole picture: weights cannot hold words or places"


class Mixture:
    """Experts and gates attached to a pipeline; created by `attach`.

    Several threads may share a mixture. Calls of the pipeline, `with` blocks of the mixture and changes of settings wait
    for one another, so one thread's masks and strengths never reach another thread's picture. A block ends on the thread
    that began it, and must wait neither for another thread that draws with the mixture nor for a task of asyncio.

    A second pipeline over the same models does not wait, and it neither draws in tiles nor finds places in a given
    picture. Call it inside a `with` block of the mixture, or attach to it; otherwise the models hold the ranks of all
    experts from then on, also of inactive ones. A pipeline that a drop-in's `from_pipe` made needs neither.

    Attributes:
        config: the gates' configuration.
        experts: name -> Expert, in the order of the gates' columns.
        file_words: name -> the words that its file gives it beside the others, see `lora.own_words`.
        unmatched: name -> layer keys of the file that the pipeline does not have.
        parts: for the modules of this package; it may change with any version.
    """

    def __init__(
        self,
        pipe: Any,
        experts: Mapping[str, tuple[Expert, float]],
        config: GateConfig,
        binding: Mapping[str, Any] | str | None,
    ):
        self.parts = Parts(self, pipe, experts, config, binding)
        self.config, self.experts, self.unmatched = config, self.parts.experts, self.parts.unmatched
        self.file_words = self.parts.file_words

    def __repr__(self) -> str:
        strengths = zip(self.experts, self.parts.settings.strengths.now, self.parts.settings.active.now, strict=True)
        experts = ", ".join(f"{name} {strength:g}{'' if is_on else ' (off)'}" for name, strength, is_on in strengths)
        on, bound = self.parts.installation, "not bound" if self.binding is None else "bound"
        where = "on" if on.is_on else "lifted off" if on.is_lifted else "not attached any more to"
        return f"<Mixture of {experts}; gates {self.config.gate_type!r}, {bound}; {where} {type(self.parts.pipe).__name__}>"

    # ---- for users

    def strength(self, name: str, value: float | None = None) -> float:
        """Return the strength of one expert. With `value`, set it first (any sign and size; 0 means absent).

        Inside a `strengths` block that names the expert, the value holds until the block ends.
        """
        index = self.parts.index(name)
        with self.parts.lock:
            strengths = self.parts.settings.strengths.now
            if value is not None:
                self.parts.check_can_change()
                strengths[index] = finite(name, value)  # in this list, so that a block of `strengths` knows it from `choose`
                self.parts.shared.set(self.parts.settings.strengths, strengths)
            return strengths[index]

    @contextmanager
    def strengths(self, values: Mapping[str, float]) -> Iterator[None]:
        """Use these strengths inside the block. Experts that are not named keep theirs, and what `strength` gives them."""
        changed = {self.parts.index(name): finite(name, value) for name, value in values.items()}
        with self.parts.lock:
            before = list(self.parts.settings.strengths.now)
            inside = [changed.get(i, s) for i, s in enumerate(before)]
            try:
                with self.parts.with_settings(self.parts.settings.strengths.to(inside)):
                    yield
            finally:
                now = self.parts.settings.strengths.now
                for i, strength in enumerate(inside):
                    if i not in changed and strength != before[i]:  # set by `strength` inside
                        now[i] = strength
                self.parts.shared.set(self.parts.settings.strengths, now)

    def planned(self, plan: StrengthPlan) -> AbstractContextManager[None]:
        """Multiply the strengths by those of a plan inside the block: by component, block and step, or gates by hand.

        Raises TypeError for what is no `StrengthPlan`.
        """
        if not isinstance(plan, StrengthPlan):
            raise TypeError(f"a plan has the methods part, block and gates of mole_diffusers.StrengthPlan, got {plan!r}")
        return self.parts.planned(plan)

    def weighed(self) -> dict[str, tuple[Expert, float]]:
        """name -> (expert, strength), as `attach` takes them."""
        return self.parts.weighed()

    def only(self, *names: str) -> AbstractContextManager[None]:
        """Mask all other experts and renormalise the gates inside the block (MoLE's second inference mode)."""
        kept = {self.parts.index(name) for name in names}
        return self.parts.with_settings(self.parts.settings.active.to([i in kept for i in range(len(self.experts))]))

    def fixed(self, weights: Mapping[str, float]) -> AbstractContextManager[None]:
        """Replace every gate by these weights inside the block.

        Experts that are not named get 0. Strengths, `only` and the binding have no effect inside the block: weights hold on
        every word and in the whole picture. A region warns of that.
        """
        values = [0.0] * len(self.experts)
        for name, weight in weights.items():
            values[self.parts.index(name)] = finite(name, weight)
        return self.parts.with_settings(self.parts.settings.fixed.to(values))

    def rows(self, sets: Sequence[Mapping[str, float]], *, images: int = 1) -> AbstractContextManager[None]:
        """Give each prompt of a batch its own set of experts, by one mapping matrix (LoraRetriever, Zhao et al., 2024).

        Args:
            sets: for each prompt in order, name -> factor, which multiplies gate and strength. Experts that are not
                named are absent from that prompt's rows; an empty set is the base model. Guidance rows use the set of
                their prompt.
            images: the call's `num_images_per_prompt`.

        While the block runs, a batch whose size is not a multiple of prompts x images raises ValueError.
        """
        if not sets or images < 1:
            raise ValueError(f"rows take sets for 1 or more prompts and 1 or more pictures, got {len(sets)} and {images}")
        table = torch.zeros(len(sets), len(self.experts))  # [b, N]
        for row, chosen in enumerate(sets):
            if not isinstance(chosen, Mapping):
                raise ValueError(f'each prompt has experts with their factors, as {{"fox": 1.0}}, got {chosen!r}')
            for name, factor in chosen.items():
                table[row, self.parts.index(name)] = finite(name, factor)
        return self.parts.with_settings(self.parts.settings.rows.to(RowSets(table, images)))

    def adjusted(self, control: Control) -> AbstractContextManager[None]:
        """Transform the gates inside the block, before strengths apply: `control(location, gates, mask) -> gates`.

        See `gates.transforms`.
        """
        return self.parts.with_settings(self.parts.settings.control.to(control))

    def every(self, calls: int) -> AbstractContextManager[None]:
        """Evaluate the denoiser's gates only in every `calls`-th of its calls, and reuse their weights in between.

        A new text starts over, so it changes nothing in steps that are drawn in tiles, which have texts of their own. With
        gradients, and in a compiled model, gates are evaluated in every call.
        """
        if not isinstance(calls, int) or calls < 1:
            raise ValueError(f"gates can be evaluated in one of 1 or more calls, got {calls}")
        return self.parts.with_settings(self.parts.settings.every.to(calls))

    @contextmanager
    def trace(self, *, maps: bool = False) -> Iterator[Trace]:
        """Record every gate's weights while the block runs: by gate location, step, batch row and expert.

        Args:
            maps: also record where the model attends to the words of each bound subject, at every step instead of the
                first alone. This computes the attention of the layers that are read once more, and takes 4 bytes per
                place: for each subject, picture and step 1 KB in Stable Diffusion 1.5 at 512 pixels, 16 KB in Flux at
                1024.
        """
        with self.parts.lock:
            step, listeners = self.parts.shared.step, self.parts.shared.listeners
            trace = Trace(list(self.experts), step, step.number + 1)
            changes: list[Change[Any]] = [listeners.layouts.to((*listeners.layouts.now, trace.record_layouts))]
            if maps:
                changes.append(listeners.maps.to((*listeners.maps.now, trace.record_maps)))
            with self.parts.listen(trace.record), self.parts.with_settings(*changes):
                yield trace

    @contextmanager
    def drawing(self, call: Mapping[str, Any] | None = None, *, pipe: Any = None) -> Iterator[None]:
        """The block that every call of the pipeline runs in: other threads wait, and the picture's layout is decided anew.

        Use it if you draw without calling the pipeline, for example in your own denoising loop. Pictures that are drawn
        this way are not drawn in tiles.

        Args:
            call: the arguments of the pipeline's call.
            pipe: the pipeline that is called, over the same models; by default the one that the mixture is attached to.
        """
        pipe = self.parts.pipe if pipe is None else pipe
        with self.parts.lock:
            self.parts.installation.refuse_replaced(pipe)
            now = attached(self.parts.pipe)
            block: AbstractContextManager[None] = nullcontext()  # it was taken off while this call waited
            if now is not None:  # or replaced
                block = self.parts.running(call, pipe) if now is self else now.drawing(call, pipe=pipe)
            with block:
                yield

    @property
    def banks(self) -> dict[str, GateBank]:
        """Model, such as "unet" or "text_encoder" -> its gates. A bank that is added is trained and saved, too."""
        return self.parts.banks

    @property
    def gate_names(self) -> list[str]:
        """The name of each gate, such as "unet.mid_block.attentions.0.transformer_blocks.0"."""
        return self.parts.locations

    def layers_by_gate(self) -> list[tuple[nn.Module, list[str]]]:
        """Each gate with the layers that it weighs, such as "unet.down_blocks.0.attentions.0.proj_in"."""
        return self.parts.layers_by_gate()

    def parameters(self) -> list[nn.Parameter]:
        """The gates' parameters: everything that training changes."""
        return [p for bank in self.parts.banks.values() for p in bank.parameters()]

    def lifted(self) -> AbstractContextManager[None]:
        """Take the mixture off while the block runs, for example to save the original pipeline.

        Afterwards the mixture is put back, unless another one is attached by then, or `detach` was called inside the
        block. What `enable_lora`, `disable_lora` and `set_adapters` do to ordinary LoRAs inside the block stays, and
        also switches the mixture beside them on or off. Without ordinary LoRAs these calls do nothing.

        Raises ValueError for a mixture that is not attached.
        """
        return self.parts.installation.lifted()

    @contextmanager
    def collapsed(self, prompt: str | Sequence[str] | None = None, **call: Any) -> Iterator[None]:
        """Fold the gates' average weights into the pipeline's own weights: no cost per step, undone bit for bit.

        While the block runs, the pipeline carries nothing of the mixture, and its settings cannot be changed. Each expert
        then acts on every word and in the whole picture, or not at all if its words are not in `prompt`; without a prompt,
        each acts. In half precision, the folded weights are rounded like the pipeline's own.

        Args:
            prompt: what to draw while the gates are averaged over steps, rows and tokens. Gates that depend on nothing
                ("sum", "mean", "factors", and "static" with 1 bin) need no prompt. "prompt" gates need one, but they only
                read it, and nothing is drawn.
            **call: how to draw it, as arguments of the pipeline; 10 steps from seed 0 by default. "prompt" gates read the
                prompt alone; with a `guidance_scale`, their weights are averaged over the rows of guidance.

        Raises:
            ValueError: gates that depend on the picture, without a prompt; a quantised or offloaded host; a mixture that is
                folded already, or not attached any more.
        """
        with self.parts.lock:
            if self.parts.settings.folded.now:
                raise ValueError("this mixture is already folded into the pipeline's weights, by an outer `collapsed` block")
            if self.parts.installation.embeddings:
                warnings.warn("folded experts are without the words that their files trained embeddings of", stacklevel=3)
            layers, _ = self._one_lora(prompt, call, stacklevel=4)
            folded = self.parts.settings.folded.to(True)
            with self.parts.changed_while(folded), self.lifted(), folding.folded(self.parts.components, layers):
                yield

    def export_lora(
        self,
        path: str | Path,
        prompt: str | Sequence[str] | None = None,
        *,
        rank: int | None = None,
        format: str = "diffusers",
        dtype: torch.dtype = torch.float16,
        **call: Any,
    ) -> float:
        """Write the mixture, at its gates' average weights, as one ordinary LoRA for any tool.

        Its trigger words are those of all experts that weigh anything. Layers that did not run while the prompt was drawn,
        such as those that clip skip leaves out, are not in it.

        Args:
            prompt: what the averages are taken over, as for `collapsed`.
            rank: cut every layer to this rank by singular values. By default ranks add up and nothing is lost.
            format: "diffusers" or "kohya" keys.
            dtype: of the tensors in the file.
            **call: how to draw the prompt, as for `collapsed`.

        Returns:
            The relative error |dW - dW'| / |dW| of the cut over all layers, 0 without a cut. The file's header holds it,
            too.

        Raises ValueError for gates that depend on the picture, without a prompt or on a mixture that is not attached.
        """
        (layers, acting), error = self._one_lora(prompt, call, stacklevel=3), 0.0
        if rank is not None:
            layers, error = folding.truncated(layers, rank)
        about = {"mole.experts": ", ".join(self.experts), "mole.relative_error": f"{error:.3g}"}
        words = [own.words for own in own_words(self.experts).values()]
        about |= trigger_phrase([word for i in sorted(acting) for word in words[i]])
        trained = joined_embeddings(expert for i, expert in enumerate(self.experts.values()) if i in acting)
        write_lora(layers, path, format=format, dtype=dtype, metadata=about, embeddings=trained)
        return error

    def _one_lora(
        self, prompt: str | Sequence[str] | None, call: dict[str, Any], *, stacklevel: int
    ) -> tuple[folding.Folded, set[int]]:
        averages = folding.Averages()
        if self.is_bound:
            warnings.warn(FOLDED, stacklevel=stacklevel)
        heard = self.parts.shared.listeners.decisions
        changes: list[Change[Any]] = [self.parts.settings.tiling.to(Tiling(0)), heard.to((*heard.now, averages))]
        if prompt is None:
            changes.append(self.parts.settings.binding.to(None))
        with self.parts.lock, self.parts.changed_while(*changes):
            if prompt is not None and not folding.reads_nothing(self.parts.components):
                self.parts.installation.check_on()
            folding.evaluate_gates(self.parts.pipe, self.parts.components, prompt, **call)
            return folding.one_lora(self.parts.components, averages.weights)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes, with a model card. Returns the commit's address.

        `options` are those of `gates.hub.upload`: private, token, commit_message, ...
        """
        card = model_card(self.parts.weighed(), self.config, repo_id, pipeline=False)
        return push(self.save_pretrained, card, repo_id, **options)

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype = torch.float32, experts: Mapping[str, Expert] | None = None
    ) -> None:
        """Write `gates.safetensors`, stored as `dtype`, and `config.json`; `attach(..., gates=folder)` reads them.

        `experts` are the files that the gates will be loaded with, by default those of the mixture.
        """
        with self.parts.lock, loaded(self.parts.pipe):  # between calls, offloaded gates have no values
            self.parts.installation.check_in_use()
            save_gates(folder, self.parts.banks, self.config, experts=experts or self.experts, dtype=dtype)

    # ---- binding

    @property
    def binding(self) -> dict[str, Bound] | None:
        """Each expert's words and region; None if nothing is bound."""
        return self.parts.binding

    @property
    def is_bound(self) -> bool:
        """Whether binding keeps any expert off the words of others, or in a place."""
        bounds = list((self.binding or {}).values())
        return any(b.given is not None or (b.words and len(bounds) > 1) for b in bounds)

    def bind(self, binding: Mapping[str, Any] | None) -> None:
        """Set each expert's words and its place in the picture. Experts that are not named keep theirs.

        Args:
            binding: name -> words, "a fox" or ["a fox", "foxes"]; or (words, region), with None for the words that the
                file gives; or "everywhere": on every word and in the whole picture. A region is "auto" (found from
                attention); "left", "right", "top", "bottom", "center", "top left", ...; a box (left, top, right, bottom)
                in shares of the picture; or a mask picture, white where the expert acts. `bind(None)` binds no expert.

        Inside a `bound` block, all of it holds until the block ends.

        Raises ValueError for an unknown name or region; nothing changes then. So does a mixture that is not attached.
        """
        with self.parts.lock:
            self.parts.check_can_change()
            self.parts.shared.set(self.parts.settings.binding, self.parts.masks(binding))

    @contextmanager
    def bound(self, binding: Mapping[str, Any] | None) -> Iterator[None]:
        """`bind` while the block runs."""
        with (
            self.parts.lock,
            self.parts.with_settings(self.parts.settings.binding.to(self.parts.masks(binding))),
        ):
            yield

    def tiled(
        self,
        until: float = UNTIL,
        *,
        since: float | None = None,
        always: bool = True,
        prompt: str | None = None,
        encode: Encode | None = None,
    ) -> AbstractContextManager[None]:
        """Draw some steps in tiles: there, each subject that the prompt names is a picture of its own, in its own place.

        The first steps draw the picture as a whole, bound to the places of its subjects. They decide on one horizon and one
        light. In the steps from `since` to `until`, the denoiser is called for each subject separately, on its part of the
        latents. It reads the prompt without the other subjects, and runs with the subject's expert and the experts that act
        everywhere, such as a style. The last steps (at least one, unless `until` is 1) draw the whole again. That joins the
        parts. A prompt that names fewer than two subjects is drawn as usual, with a warning.

        A bound mixture draws in tiles by itself if all of this holds:

        - The denoiser is a UNet. SD 3 and Flux draw in tiles only inside this block: what it gains there was not measured.
        - The call only asks for pictures of one prompt, given as a text, without img2img, inpainting or ControlNet. Several
          prompts, and states (`prompt_embeds`) of a known one, are drawn as one picture each, with a warning.
        - The prompt lists subjects ("a fox and an owl"), at least one with an expert that is on. A subject without an expert
          counts only in a list such as "a fox, a lemon and an owl". Or it says that the subjects of two experts touch
          ("a fox riding an owl", "a fox in front of an owl"), and names no other expert but styles.
        - A window of the size that the UNet was trained at has room around each subject, and three quarters of it are the
          subject's place: two subjects need 768 x 512 pixels in Stable Diffusion 1.5.

        Where the windows of two subjects overlap, tiles begin earlier, and the silhouette of the one in front decides where
        they meet: the first subject or, if they touch, the one that the prompt says. Two that touch are laid out without
        their LoRAs: the base knows better how one rides the other, and does not keep them apart. Without guidance, and on
        Flux, which calls its transformer for each prompt by itself, there is no silhouette: each ends in the middle.

        Inside this block it always draws in tiles, or never with `until=0`. Pictures inside `fixed` and `rows` are not
        drawn in tiles, with a warning: weights by hand hold everywhere, and sets of experts belong to several prompts.

        Places are those that the mixture is bound to. Subjects without one share the rest of the picture in the order in
        which they are named, unless words such as "left of" decide.

        Args:
            until: share of the steps in 0..1, from pure noise, after which the picture is drawn as one; 0 for no tiles.
            since: share of the steps, less than `until`, that are drawn as one before the tiles. With 0, each subject has a
                scene of its own. By default 0.4, or 0.2 where windows overlap, and at most half of `until`.
            always: draw in tiles whatever the size and the prompt. False: only if the mixture would do so by itself.
            prompt: the text of the pictures, if the call gives text states instead of it. A call with another prompt raises
                ValueError.
            encode: function from a part of that prompt (`binding.Part`) to its text states [1, S, C], and to the
                pooled states that SDXL, SD 3 and Flux read, [1, P], None for other models. By default the pipeline encodes
                the part. `studio.prompt_weights.tiled_prompt` makes `prompt` and `encode` for a prompt with weights.

        Raises ValueError for shares that are not 0 <= since < until <= 1, and for `encode` without `prompt`. A picture that
        must be drawn in tiles also raises it for other transformers, for anything but one prompt, for more than eight
        subjects, for a video, a ControlNet, a prompt of several chunks, or a region of an expert that is not a subject. So
        do regions that leave a subject no place, SDXL's refiner, `prompt_2`, sizes such as `original_size`, pictures given
        to Flux Kontext, a denoiser's cache, and a callback that changes the states of the prompt.
        """
        are_numbers = all(isinstance(share, int | float) for share in (until, since or 0))
        if not are_numbers or (until != 0 and not 0 <= (since or 0) < until <= 1):
            raise ValueError(
                f"tiles need shares of the steps with 0 <= since < until <= 1, got since={since!r}, until={until!r}"
            )
        if encode is not None and prompt is None:
            raise ValueError("encode is for the parts of a prompt: give `prompt`, too")
        return self.parts.with_settings(self.parts.settings.tiling.to(Tiling(until, since, always, prompt, encode)))

    @property
    def layouts(self) -> list[Layout]:
        """Where each expert acts in the last pictures, or in those being drawn now: one layout per picture."""
        masks = self.parts.settings.binding.now
        return [] if masks is None else masks.layouts

    @property
    def binding_warnings(self) -> list[str]:
        """What binding warned of in the pipeline's last call.

        Warnings are about experts whose words are not in the prompt, several experts in one place, places that are
        undecided, and places that no expert got. They are also given as Python warnings, once in each call.
        """
        masks = self.parts.settings.binding.now
        return [] if masks is None else list(masks.warned)

    def explain(self, prompt: str, width: int | None = None, height: int | None = None) -> Explanation:
        """Who acts on a prompt, where and why, and the prompts of its tiles, before anything is drawn. Print it.

        Args:
            prompt: as the pipeline gets it, the only one of the call. Several prompts in one call, and states of a prompt,
                are not drawn in tiles.
            width: of the picture in pixels. Without a size, tiles are explained as if there were room.
            height: of the picture in pixels.

        Raises ValueError if only one of the two is given, or none that a picture has, and for several prompts.
        """
        if (bound := self.binding) is None:
            return Explanation.of_unbound(self.experts)
        tiling = self.parts.settings.tiling.now
        return explain(self.parts.pipe, prompt, bound, width=width, height=height, acting=self.parts.acting, tiling=tiling)

    # ---- begin and copy

    def _copied_to(self, pipe: Any) -> Installation:
        """What puts this mixture on a copy of its pipeline, with copies of its gates and settings. Call it while lifted."""
        kept = self.parts.persistent_settings()
        mixture = Mixture(pipe, kept.experts, self.config, kept.binding)
        for name, bank in self.parts.banks.items():  # inside `lifted` it is not offloaded
            mixture.parts.banks[name].load_state_dict(bank.state_dict())
        mixture.parts.set([strength for _, strength in kept.experts.values()], kept.active, copy(kept.plan))
        return mixture.parts.installation

    def __deepcopy__(self, memo: dict[int, Any]) -> Mixture | None:
        """The mixture of the pipeline's copy."""
        return attached(deepcopy(self.parts.pipe, memo))


def attach(
    pipe: Any,
    experts: Mapping[str, Source | tuple[Source, float]] | str | Path,
    gates: Gates = "sum",
    *,
    binding: Mapping[str, Any] | str | None = "auto",
    allow_missing_layers: bool = False,
) -> Mixture:
    """Put concept LoRAs on a pipeline, weighed by gates. Attaching again replaces them; `detach` restores the original.

    Args:
        pipe: a pipeline whose `unet` or `transformer` is of a class in `patching.host.denoisers.RECORDS`.
        experts: name -> file, or (file, strength). Strength is your own factor: any sign and size, 1 by default, 0 means
            absent. Or a folder: all LoRA files in it, each inactive unless the prompt has its words. Until then it only
                takes
            memory of the CPU.
        gates: a gate type (one of `gates.GATE_TYPES`), a GateConfig, a folder that `save_pretrained` wrote (a Path, or
            "./flow" if it has a gate type's name), or a hub id.
        binding: each expert's words and place, as `Mixture.bind` takes them. "auto" takes the trigger words from the
            files, and finds places for the subjects that a prompt lists. None binds nothing, so that `gates="sum"` is the
            plain sum.
        allow_missing_layers: also attach LoRAs of which the pipeline lacks more than a tenth of the layers, for example on
            a pruned model.

    Returns:
        The mixture: the handle for strengths, masks, traces, training and saving.

    Raises:
        ValueError, FileNotFoundError: a bad file, layer, gate type or gate folder, or LoRAs that `disable_lora` has switched
            off, the mixture's or others; the pipeline stays as it was.
    """
    denoiser(pipe)  # so that nothing else is taken for a pipeline
    with held(pipe) as before:
        mixture = _prepared(pipe, experts, gates, binding)
        for name, expert in mixture.experts.items():
            # An expert that is on the pipeline has been accepted before.
            if not allow_missing_layers and (before is None or before.experts.get(name) is not expert):
                check_share(expert, mixture.unmatched[name], models_of(pipe))
        mixture.parts.installation.replace(before)
    for why in _notices(mixture):
        warnings.warn(why, stacklevel=2)
    if isinstance(gates, str) and gates in GATE_TYPES and GATE_TYPES[gates].learns:
        before_training = GATE_TYPES[gates].untrained
        warnings.warn(
            f"{gates!r} gates weigh as {before_training} until they are trained or loaded from a folder", stacklevel=2
        )
    return mixture


def _notices(mixture: Mixture) -> Iterator[str]:
    """What a user should know about a mixture that was attached."""
    yield from mixture.parts.installation.without_embedding
    for name, keys in mixture.unmatched.items():
        if keys:
            yield f"expert {name!r}: the pipeline lacks {len(keys)} of its layers, {keys[0]!r} for one"
    models = models_of(mixture.parts.pipe)
    for name, expert in mixture.experts.items():
        found = [a for part, model in models.items() for a in also_loaded(model, expert.layers.get(part, {}))]
        for adapter in dict.fromkeys(found):
            yield (
                f"expert {name!r} is also on the pipeline as the adapter {adapter!r}, so it acts twice: call "
                f"pipe.delete_adapters({adapter!r})"
            )
    if why := without_words(mixture.binding or {}):
        yield why


def _prepared(
    pipe: Any,
    experts: Mapping[str, Source | tuple[Source, float]] | str | Path,
    gates: Gates,
    binding: Mapping[str, Any] | str | None,
) -> Mixture:
    """Read and check everything, without changing the pipeline."""
    is_folder = isinstance(experts, str | Path)
    read = read_weighed(files_of(experts) if isinstance(experts, str | Path) else experts)
    if not read:
        raise ValueError("attach needs at least one expert")
    named = {name: (with_host_names(expert, pipe, models_of(pipe)), strength) for name, (expert, strength) in read.items()}
    files = {name: expert for name, (expert, _) in named.items()}
    said: Any = {} if binding == AUTO else binding
    if is_folder and isinstance(said, Mapping):
        own = files_bindings(files)
        said = {name: dataclasses.replace(each, required=True) for name, each in own.items()} | dict(said)
    if not isinstance(gates, str | Path | GateConfig):
        known = ", ".join(GATE_TYPES)
        raise TypeError(f"gates are a gate type, a GateConfig, a folder or a hub id, got {gates!r}; gate types: {known}")
    # "sum" is the default, so the current folder must not change what it means.
    if gates in GATE_TYPES and gates != "sum" and (Path(str(gates)) / GATE_WEIGHTS).is_file():
        raise ValueError(
            f"{gates!r} is a gate type, and also a folder with gates here; write './{gates}' for the folder, or "
            f"GateConfig({gates!r}) for the gate type"
        )
    if isinstance(gates, GateConfig) or gates in GATE_TYPES:
        return Mixture(pipe, named, gates if isinstance(gates, GateConfig) else GateConfig(gate_type=str(gates)), said)
    saved = load_gates(gates)
    mixture = Mixture(pipe, {name: named[name] for name in saved.order(files)}, saved.config, said)
    saved.fill(mixture.parts.banks)
    return mixture


def detach(pipe: Any) -> None:
    """Restore the original pipeline, bit for bit. Does nothing if nothing is attached."""
    remove(pipe)


def attached(pipe: Any) -> Mixture | None:
    """The mixture on a pipeline, or None."""
    found: Any = installed(pipe)
    return None if found is None else found.mixture
