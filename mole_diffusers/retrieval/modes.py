"""How retrieved LoRAs are composed, and when a LoRA counts as found."""

from typing import Literal

Mode = Literal["selection", "mixture", "sum", "fusion"]  # how the LoRAs of a prompt are composed, see `composing.composed`
THRESHOLD = 0.8  # in steps of .05, the lowest at which seven of eight base subjects of the emoji world find nothing
