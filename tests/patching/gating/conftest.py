import pytest

import mole_diffusers as mole


@pytest.fixture
def attach(pipe, loras):
    def attach(binding, gates="sum", names=("fox", "ink", "hat")):
        return mole.attach(pipe, {name: loras[name] for name in names}, gates, binding=binding)

    return attach
