"""The fields of the page: those of a recipe, of a training, and the others that a browser keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gradio as gr

from mole_app.studio.catalog import UNTRAINED
from mole_app.studio.prompt_weights import prompts_read
from mole_app.studio.recipe import OPEN, Recipe
from mole_app.web import draw_over
from mole_app.web.actions import MAX_COUNT, Actions
from mole_app.web.fields import CONTROLS, TRAINING
from mole_app.web.style import Values

OF_BASE = ("width", "height", "guidance")  # fields that change with the base model
UNSET = {
    "sampler": "default",
    "controlnet": "none",
    "ip_adapter": "none",
}  # field of a Recipe -> the choice that is "" there


class Form:
    """The fields. Each is laid out (`render`) by the tab that it belongs to.

    Attributes:
        defaults: the recipe of a fresh page.
        controls: field of a Recipe -> its component.
        training: field of a TrainingRequest -> its component.
        axes: the two axes of a grid, across and down.
        locks, masks: gates set by hand, and painted regions, as in a Recipe. They are hidden components in the browser.
        base: the choice of the base model.
        more: the number of pictures to compose ("count"), the choice of a LoRA to add ("add") and of gates to download
            ("trained"), the panel with the prompts of the second text encoder ("second"), and that with the control map and
            the reference picture ("given").
        pictures: the components of a control map and a reference picture, by their names in a Recipe.
        choices: field -> function that lists its choices now, if these change with the base model, LoRAs and gates.
    """

    def __init__(self, actions: Actions, defaults: Recipe):
        self.actions, self.defaults = actions, defaults
        catalog, first = actions.studio.catalog, self._shown(defaults)
        known: dict[str, Callable[[], list[Any]]] = {
            "sampler": lambda: [UNSET["sampler"], *actions.studio.base.samplers],
            "controlnet": lambda: [UNSET["controlnet"], *catalog.files["controlnet"]],
            "ip_adapter": lambda: [UNSET["ip_adapter"], *catalog.files["ip_adapter"]],
            "gates": lambda: ["auto", *UNTRAINED, *catalog.gates],
            "styles": lambda: list(catalog.loras),
            "add": actions.loras.choices,
            "trained": lambda: list(catalog.gates),
        }

        def field(name: str, make: Callable[..., Any], **options: Any) -> Any:
            return make(*([known[name]()] if name in known else []), render=False, **options)

        self.controls = {name: field(name, make, value=first[name], elem_id=name) for name, make in CONTROLS.items()}
        self.training = {name: field(name, make, elem_id=f"train-{name}") for name, make in TRAINING.items()}
        self.axes = [
            gr.Textbox(value, label=label, max_length=500, elem_id=elem_id, render=False)
            for value, label, elem_id in (("arm=base,sum,gates", "Across", "axis-x"), ("seed=0,1", "Down", "axis-y"))
        ]
        self.locks, self.masks = gr.JSON({}, visible=False), gr.JSON({}, visible=False)
        names = list(actions.bases.sources)
        self.base = gr.Dropdown(
            names, value=actions.bases.open, label="Base model", visible=len(names) > 1, show_label=False, container=False,
            min_width=160, scale=0, elem_id="base", render=False,
        )  # fmt: skip
        self.more: dict[str, Any] = {
            "count": gr.Slider(1, MAX_COUNT, 1, step=1, label="Pictures", elem_id="count", render=False),
            "add": field("add", gr.Dropdown, value=None, label="Add a LoRA by name", elem_id="add", min_width=120),
            "trained": field("trained", gr.Dropdown, value=None, label="Gates to download", elem_id="which-gates"),
            "second": gr.Accordion(
                "Another prompt for the second text encoder", open=False, render=False, elem_id="second", visible="hidden"
            ),
            "given": gr.Accordion("ControlNet, IP-Adapter", open=False, render=False, elem_id="given", visible="hidden"),
        }
        self.pictures = {
            name: draw_over.Given(label=label, sources=["upload", "clipboard"], buttons=[], elem_id=name, render=False)
            for name, label in (("control", "Control map"), ("reference", "Reference picture"))
        }
        named = {**self.training, **self.controls, **self.more}
        self.choices = {named[name]: choices for name, choices in known.items()}

    @property
    def inputs(self) -> list[Any]:
        """The components whose values `recipe` takes."""
        return [*self.controls.values(), self.locks, self.masks, self.base]

    @property
    def lists(self) -> list[Any]:
        """The components that `now` has updates for."""
        return [self.more["second"], self.more["given"], *self.choices]

    def now(self) -> Values:
        """What changes with the base model, LoRAs and gates."""
        studio = self.actions.studio
        here = {
            "second": "prompt_2" in prompts_read(studio.base.pipe),
            "given": studio.base.takes_pictures and any(studio.catalog.files[kind] for kind in ("controlnet", "ip_adapter")),
        }  # those that are not are hidden, not gone: their fields would lose their values
        panels = {self.more[name]: gr.update(visible=is_here or "hidden") for name, is_here in here.items()}
        return {field: gr.update(choices=choices()) for field, choices in self.choices.items()} | panels

    def chosen(self, field: Any, value: Any) -> Any:
        """An update that chooses in a field of `choices`, also what was not there when this page was opened."""
        return gr.update(choices=self.choices[field](), value=value)

    def recipe(self, *values: Any) -> Recipe:
        """The recipe in the controls. Raises ValueError for values out of range, or if another base model is open."""
        *given, locks, masks, base = values
        self.actions.bases.check(base, "wait until it is changed, or reload the page")
        named = dict(zip(self.controls, given, strict=True))
        named |= {name: named[name] or 0 for name in OPEN}
        named["seed"] = -1 if named["seed"] is None else named["seed"]
        named |= {name: "" for name, choice in UNSET.items() if named[name] == choice}
        return Recipe(**named, locks=locks, masks=masks, base=self.actions.studio.base.name)

    def asked(self, *values: Any) -> tuple[Any, ...]:
        """Values of `inputs`, any further components, and those of `Page.pictures` -> the recipe, the further values, and
        the given pictures."""
        *given, image, painted, control, reference = values
        recipe = self.recipe(*given[: len(self.inputs)])
        seen = {"control": control, "reference": reference}
        pictures = draw_over.pictures(image, painted) | {name: each for name, each in seen.items() if each is not None}
        return recipe, *given[len(self.inputs) :], pictures

    def values(self, recipe: Recipe) -> Values:
        """The values of `inputs` for a recipe."""
        locks = {location: dict(row) for location, row in recipe.locks.items()}
        own = {self.locks: locks, self.masks: dict(recipe.masks), self.base: self.actions.bases.open}
        return {self.controls[name]: value for name, value in self._shown(recipe).items()} | own

    def _shown(self, recipe: Recipe) -> dict[str, Any]:
        """The values of `controls` for a recipe. Width and height are 0 if they are the usual size for the prompt, so that
        they follow the prompt."""
        shown = {name: getattr(recipe, name) or UNSET.get(name, getattr(recipe, name)) for name in CONTROLS}
        try:
            usual = self.actions.size_of(replace(recipe, width=0, height=0))
        except ValueError:  # a prompt that cannot be read, or whose LoRAs are not here
            return shown
        follows = not recipe.image and (recipe.width, recipe.height) == usual
        return shown | (dict.fromkeys(OPEN, 0) if follows else {})

    def fresh(self) -> Recipe:
        """The recipe of a fresh page: the defaults, with the size and guidance of the base model if that was changed."""
        return replace(self.defaults, **self.actions.bases.settings())

    def unknown_choices(self, recipe: Recipe) -> dict[str, Any]:
        """{field: the page's default} for the choices in a recipe that are not available here."""
        fresh, shown = self.fresh(), self._shown(recipe)
        listed = {name: self.choices[self.controls[name]]() for name in ("gates", *UNSET)}
        return {name: getattr(fresh, name) for name, names in listed.items() if shown[name] not in names}
