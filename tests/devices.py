"""The devices of a test that is meant for a card: `pytest -m gpu` runs it there, `pytest -m thorough` on the CPU."""

import pytest
import torch

CARD = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]
DEVICES = [pytest.param("cpu", marks=pytest.mark.thorough), pytest.param("cuda", marks=CARD)]
