"""Where words of LoRAs are tags of a prompt, "fox, owl", they have no places. The page says so beside the result, and a
click lists them as things: "a fox and an owl"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import gradio as gr

from mole_diffusers.app.mixer_cards import MixerCard, bare_tags, listed, newest, parse_named
from mole_diffusers.app.page import Page
from mole_diffusers.app.prompt_box import ORDERED
from mole_diffusers.app.sentences import markdown
from mole_diffusers.app.style import Values, status_line
from mole_diffusers.binding.vocabulary import is_look, is_scenery
from mole_diffusers.binding.who_acts import EVERY_PLACE, OWN_PLACE, OWN_TILE, Role
from mole_diffusers.lora.own_words import words_of
from mole_diffusers.studio.recipe import Recipe


class SideBySide:
    """What the page says of such tags, and the button.

    Attributes:
        outputs: the components that `of` has values for.
    """

    def __init__(self, page: Page):
        self.page = page
        self._said = status_line(elem_id="mixed", render=False)
        self._button = gr.Button("", size="sm", visible=False, elem_id="side-by-side", render=False)
        self._words = gr.State([])
        self.outputs = [self._said, self._button, self._words]

    def build(self) -> None:
        """Lay them out and connect the button."""
        self._said.render()
        self._button.render()
        prompt = self.page.prompt

        def as_things(words: list[str], text: str, cards: list[MixerCard], rewrites: list[str]) -> Values:
            now = newest(text, rewrites)
            return prompt.replaced(text, listed(now, words), cards, rewrites) if set(words) <= set(bare_tags(now)) else {}

        self._button.click(as_things, [self._words, *prompt.written], [prompt.text, *prompt.of_cards], **ORDERED)

    def of(self, recipe: Recipe, roles: Mapping[str, Role]) -> Values:
        """What is seen of it, given a recipe and what its LoRAs do."""
        if not (words := self.mixed(recipe, roles)):
            return self.nothing()
        tags = bare_tags(recipe.prompt)
        typed = ", ".join(recipe.prompt[slice(*tags[word])] for word in words)
        said = f"{markdown(typed)} are tags here, and may mix. Set a style to “everywhere”; give things places of their own:"
        label = f"Write “{listed(typed, words)}”"
        return {self._said: said, self._button: gr.update(visible=True, value=label), self._words: words}

    def nothing(self) -> Values:
        """What is seen if there are no such tags."""
        return {self._said: "", self._button: gr.update(visible=False), self._words: []}

    def mixed(self, recipe: Recipe, roles: Mapping[str, Role]) -> list[str]:
        """The tags of a recipe's prompt that would have places as a list of things, in their order, one of each LoRA; [] if
        there are fewer than two. Those of styles, as far as their names tell, and of LoRAs that were set to act everywhere
        are none of them."""
        catalog = self.page.actions.studio.catalog
        regions = {tag.name: tag.region for tag in parse_named(recipe.prompt, catalog.loras).tags}
        tags, words = bare_tags(recipe.prompt), list[str]()
        for name in (name for name, role in roles.items() if role.place == EVERY_PLACE and not regions[name]):
            own = (word.casefold() for word in words_of(catalog.expert(name)).words)
            word = next((word for word in own if word in tags), None)
            is_style = "style" in f"{catalog.loras[name].parent.name} {name}".casefold()
            if word and not (word in words or is_style or is_scenery(word.split()[-1]) or is_look(word.split())):
                words.append(word)
        if len(words) < 2:
            return []
        words.sort(key=lambda word: tags[word])
        after = self.page.actions.loras.roles(replace(recipe, prompt=listed(recipe.prompt, words)))
        changed = [after[name].place for name in roles if after[name].place != roles[name].place]
        return words if len(changed) >= len(words) and set(changed) <= {OWN_PLACE, OWN_TILE} else []
