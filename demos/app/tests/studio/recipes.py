"""A prompt with two LoRAs, and whether two pictures have the same pixels."""

import numpy as np

PROMPT = "a fox in ink <lora:fox:0.8> <lora:ink:1:stop=1>"


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))
