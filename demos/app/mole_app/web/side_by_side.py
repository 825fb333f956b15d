"""Where words of LoRAs are tags of a prompt, "fox, owl", or it lacks them, the LoRAs have no places. The page says so beside
the result, and a click lists them as things: "a fox and an owl"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import gradio as gr

from mole_app.studio.recipe import Recipe
from mole_app.web.mixer_cards import MixerCard, bare_tags, listed, newest, parse_named, triggers_in, with_triggers
from mole_app.web.page import Page
from mole_app.web.prompt_box import ORDERED
from mole_app.web.sentences import markdown
from mole_app.web.style import Values, status_line
from mole_diffusers.binding import EVERY_PLACE, OWN_PLACE, OWN_TILE, Role, is_look, is_scenery
from mole_diffusers.lora import words_of


class SideBySide:
    """What the page says of it, and the button.

    Attributes:
        outputs: the components that `of` has values for.
    """

    def __init__(self, page: Page):
        self.page = page
        self._said = status_line(elem_id="mixed", render=False)
        self._button = gr.Button("", size="sm", visible=False, scale=0, elem_id="side-by-side", render=False)
        self._words = gr.State([])
        self.outputs = [self._said, self._button, self._words]

    def build(self) -> None:
        """Lay them out and connect the button."""
        with gr.Row(elem_id="advice", equal_height=True):
            self._said.render()
            self._button.render()
        prompt = self.page.prompt

        def as_things(words: list[str], text: str, cards: list[MixerCard], rewrites: list[str]) -> Values:
            now = self._with_words(newest(text, rewrites), words)
            if not _are_tags(words, now):
                return {}
            found = prompt.replaced(text, self._written(now, words), cards, rewrites)
            return found if prompt.shown in found else found | prompt.redraw(cards)  # with these words ticked

        self._button.click(as_things, [self._words, *prompt.written], [prompt.text, *prompt.of_cards], **ORDERED)

    def of(self, recipe: Recipe, roles: Mapping[str, Role]) -> Values:
        """What is seen of it, given a recipe and what its LoRAs do."""
        if not (words := self.mixed(recipe, roles)):
            return self.nothing()
        wanted = {word.casefold() for word in words}
        tags = bare_tags(prompt := self._with_words(recipe.prompt, words))
        typed = ", ".join(prompt[slice(*place)] for word, place in tags.items() if word in wanted)
        is_there = prompt == recipe.prompt
        why = f"{markdown(typed)} are tags without places" if is_there else "The prompt lacks words of LoRAs"
        said = f"{why}, so they may mix. As a list, each has its own; for a style, choose “everywhere”."
        label = f"Write “{', '.join([listed(typed, words), *self._missing_styles(recipe.prompt)])}”"
        return {self._said: said, self._button: gr.update(visible=True, value=label), self._words: words}

    def nothing(self) -> Values:
        """What is seen if there are no such tags."""
        return {self._said: "", self._button: gr.update(visible=False), self._words: []}

    def mixed(self, recipe: Recipe, roles: Mapping[str, Role]) -> list[str]:
        """The words that would have places as a list of things, in their order, one of each LoRA; [] if there are fewer than
        two. They are tags of the recipe's prompt; if that has one or none, and no others, it may lack the rest. Those of
        styles (see `_is_style`), and of LoRAs that were set to act everywhere are none of them."""
        catalog = self.page.actions.studio.catalog
        regions = {tag.name: tag.region for tag in parse_named(recipe.prompt, catalog.loras).tags}
        free = [name for name, role in roles.items() if role.place == EVERY_PLACE and not regions[name]]
        own = {name: words_of(catalog.expert(name)).words for name in free}
        tags, words = bare_tags(recipe.prompt), list[str]()
        lacks = set(tags) <= {word.casefold() for each in own.values() for word in each}
        for name in free:
            there = (word for word in own[name] if word.casefold() in tags)
            word = next(there, own[name][0] if lacks and own[name] else "")
            is_medium = any(map(is_scenery, re.split(r"[\W\d_]+", name.casefold())))  # its name says so: watercolor_v2
            if word and not (word in words or is_medium or self._is_style(name, own[name]) or is_look(word.split())):
                words.append(word)
        tagged = [word for word in words if word.casefold() in tags]
        words = tagged if len(tagged) > 1 else words
        whole = self._with_words(recipe.prompt, words)
        if len(words) < 2 or not _are_tags(words, whole):
            return []
        after = self.page.actions.loras.roles(replace(recipe, prompt=self._written(whole, words)))
        changed = [after[name].place for name in roles if after[name].place != roles[name].place]
        return words if len(changed) >= len(words) and set(changed) <= {OWN_PLACE, OWN_TILE} else []

    def _written(self, prompt: str, words: Sequence[str]) -> str:
        """A prompt with these of its tags as a list of things, and with the styles that it lacks."""
        return self._with_words(listed(prompt, words), self._missing_styles(prompt))

    def _missing_styles(self, prompt: str) -> list[str]:
        """What names the styles among a prompt's LoRAs of which it has no words: "watercolor", "sks style"."""
        catalog = self.page.actions.studio.catalog
        missing = []
        for name in (tag.name for tag in parse_named(prompt, catalog.loras).tags):
            words = words_of(catalog.expert(name)).words
            if words and self._is_style(name, words) and not triggers_in(prompt, words):
                missing.append(words[0] if is_scenery(words[0].split()[-1].casefold()) else f"{words[0]} style")
        return missing

    def _is_style(self, name: str, words: Sequence[str]) -> bool:
        """Whether a LoRA is a style, a medium or a setting, as far as its folder, its name or its words tell."""
        said = f"{self.page.actions.studio.catalog.loras[name].parent.name} {name}".casefold()
        return "style" in said or any(is_scenery(word.split()[-1].casefold()) for word in words)

    def _with_words(self, prompt: str, words: Sequence[str]) -> str:
        """A prompt, with those of these words that it lacks."""
        return with_triggers(prompt, [], words, self.page.actions.studio.catalog.loras)


def _are_tags(words: Sequence[str], prompt: str) -> bool:
    return {word.casefold() for word in words} <= set(bare_tags(prompt))
