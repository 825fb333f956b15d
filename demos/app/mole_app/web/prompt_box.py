"""The prompt on the page: its cards, what is wrong with it, and what it was before."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import gradio as gr

from mole_app.studio.catalog import Catalog
from mole_app.web.mixer_cards import MixerCard, cards_of, edit, newest, without_bad_tags
from mole_app.web.sentences import problem
from mole_app.web.style import Values, status_line

# For events that change the prompt or the cards, and for drawing the cards: one at a time, in the order they were sent.
ORDERED: dict[str, Any] = {"concurrency_id": "prompt", "concurrency_limit": 1}
MAX_UNDONE = 50  # texts of the prompt that can be brought back


class PromptBox:
    """The prompt and its cards.

    Attributes:
        text: the prompt's component.
        cards: the mixer's cards (state).
        shown: the cards as last drawn (state). A change redraws the mixer, see `redraw`.
        rewrites: the texts that the prompt has had, the present one last (state), for undoing, and for events that were sent
            with an older one.
        problem: the line below the prompt that says what is wrong with it.
        to_paint: the LoRA whose card was switched to a painted region last (state).
    """

    def __init__(self, text: gr.Textbox, catalog: Catalog):
        self.text, self.catalog = text, catalog
        self.cards, self.shown, self.rewrites = gr.State([]), gr.State({"cards": []}), gr.State([])
        self.problem = status_line(elem_id="problem", render=False)
        self.to_paint = gr.State("")

    @property
    def written(self) -> list[Any]:
        """Inputs and outputs of the events that edit the prompt."""
        return [self.text, self.cards, self.rewrites]

    @property
    def of_cards(self) -> list[Any]:
        """The components that `cards_for` has values for."""
        return [self.cards, self.shown, self.rewrites, self.problem]

    def cards_for(self, prompt: str) -> Values:
        """Updates for a prompt that fills the page: its cards, and what is wrong with it.

        A tag that cannot be read, or whose LoRA is not here, has no card.
        """
        return self.cards_now(prompt, []) | {self.rewrites: [prompt]}

    def cards_now(self, prompt: str, cards: list[MixerCard]) -> Values:
        """Updates for the cards after the prompt has changed, and what is wrong with it."""
        catalog = self.catalog
        try:
            new, said = cards_of(prompt, cards, catalog.loras, catalog.preferred_weight), ""
        except ValueError as error:
            readable = without_bad_tags(prompt, catalog.loras)
            new, said = cards_of(readable, cards, catalog.loras, catalog.preferred_weight), problem(error)
        return ({} if new == cards != [] else self.redraw(new)) | {self.problem: said}

    def replaced(self, given: str, new: str, cards: list[MixerCard], rewrites: list[str]) -> Values:
        """Updates that put a whole new text into the prompt, and its cards. It can be undone."""
        return self.cards_now(new, cards) | self.rewrite(given, new, self.typed(given, rewrites))

    def rewrite(self, given: str, new: str, rewrites: list[str]) -> Values:
        """Updates that put a new text into the prompt, if it differs. `given` is the prompt that the event was sent with."""
        if new == newest(given, rewrites):
            return {}
        before = rewrites if given in rewrites else [*rewrites, given]
        return {self.text: new, self.rewrites: [*before, new][-MAX_UNDONE:]}

    def typed(self, prompt: str, rewrites: list[str]) -> list[str]:
        """`rewrites` after the prompt was typed."""
        return rewrites if rewrites[-1:] == [prompt] else [*rewrites, prompt][-MAX_UNDONE:]

    def undo(self, prompt: str, rewrites: list[str]) -> Values:
        """Updates that put the text before the present one back into the prompt, and its cards."""
        before = [*self.typed(prompt, rewrites)[:-1]]
        if not before:
            return {}
        return {self.text: before[-1]} | self.cards_for(before[-1]) | {self.rewrites: before}

    def edited(self, names: Iterable[str], text: str, cards: list[MixerCard], rewrites: list[str], **edits: Any) -> Values:
        """Updates that edit these LoRAs in the prompt and the cards, from values of `written`; see `mixer_cards.edit`."""
        new, catalog = newest(text, rewrites), self.catalog
        for name in names:
            weight = None if any(card["name"] == name for card in cards) else catalog.preferred_weight(name)
            first = {} if weight is None else {"te": f"{weight:g}", "unet": f"{weight:g}"}
            new, cards = edit(new, cards, name, catalog.loras, **first | edits)
        return self.rewrite(text, new, rewrites) | self.redraw(cards)

    def redraw(self, cards: list[MixerCard]) -> Values:
        """Updates that redraw the mixer's cards, even if they are the same as before."""
        return {self.cards: cards, self.shown: {"cards": cards, "at": time.monotonic_ns()}}
