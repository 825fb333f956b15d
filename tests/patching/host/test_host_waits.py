"""A step of a mixture asks nothing of the device that a step of the base does not ask."""

import pytest
from hosts import HOSTS, draw
from tiers import thorough
from tiny import tiny_lora
from waits import waits_of_a_step

import mole_diffusers as mole

OTHERS = ("anima", "chroma", "hidream", "krea2", "lumina2")
VIDEOS = ("ltx", "wan")  # have no regions


@pytest.mark.parametrize("gate_type", ["mole", *thorough("sum", "flow")])
@pytest.mark.parametrize("host", ["flux", "flux2", *thorough("sd15", "sdxl", "sd3", "qwen", "z_image", *OTHERS, *VIDEOS)])
def test_a_bound_step_waits_for_nothing_that_a_step_of_the_base_does_not_wait_for(tmp_path, host, gate_type):
    pipe, options = HOSTS[host]()
    pipe.set_progress_bar_config(disable=True)

    def drawn(steps):
        return draw(pipe, options, "a fox and an ink", steps=steps)

    base = waits_of_a_step(drawn)
    files = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "ink"))}
    mixture = mole.attach(pipe, files, gate_type)
    assert waits_of_a_step(drawn) <= base
    mixture.bind({"fox": "fox", "ink": "ink"} if host in VIDEOS else {"fox": ("fox", "left"), "ink": ("ink", "right")})
    assert waits_of_a_step(drawn) <= base
