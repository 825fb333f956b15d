"""Tiny real pipelines and LoRA files, offline.

Fixtures import what they need: the process that only hands out tests to the workers starts seconds sooner without it.
"""

import gc
import io
import os
import shutil
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
from tiers import thorough

if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)  # workers that each take every core wait for one another
gc.disable()  # until everything is imported


@pytest.hookimpl(trylast=True)  # when other marks are deselected
def pytest_collection_modifyitems(items):
    """Tests that need a card are skipped where there is none."""
    for item in items:
        if item.get_closest_marker("gpu"):
            import torch  # here, since other runs of few tests do without it

            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"))


def pytest_collection_finish():
    """Collect rarely, and never look through what the imports made: that took a sixth of the time."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(30_000, 10, 100)


# A convolution of each kind, also in blocks that have no attention. Attaching takes 2 ms per layer.
CONVOLUTIONS = (
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.resnets.0.time_emb_proj",
    "down_blocks.1.resnets.0.conv2",
    "mid_block.resnets.0.time_emb_proj",
    "mid_block.attentions.0.proj_in",
    "up_blocks.0.attentions.1.proj_out",
    "up_blocks.1.resnets.1.conv1",
)


@pytest.fixture
def pipe():
    from tiny import tiny_pipeline

    return tiny_pipeline()


@pytest.fixture(scope="session")
def loras(tmp_path_factory):
    """name -> file; three LoRAs of different ranks and layer sets."""
    from tiny import ATTENTION, FEED_FORWARD, tiny_lora, tiny_pipeline

    shapes = {"fox": (4, ATTENTION), "ink": (2, ATTENTION + FEED_FORWARD), "hat": (8, ATTENTION + CONVOLUTIONS)}
    folder, host = tmp_path_factory.mktemp("loras"), tiny_pipeline()
    return {
        name: tiny_lora(host, folder / f"{name}.safetensors", rank=rank, seed=i, ends=ends)
        for i, (name, (rank, ends)) in enumerate(shapes.items())
    }


@pytest.fixture(scope="session")
def draw():
    """draw(pipe) -> pictures [B, H, W, 3] of one fixed prompt and seed."""
    import torch

    def run(pipe, prompt="a fox in ink", **options):
        options = {"num_inference_steps": 2, "output_type": "np"} | options
        return torch.from_numpy(pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images)

    return run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder that takes the calls that the real one takes; yields (its api, the folder)."""
    import huggingface_hub

    folder, api = tmp_path / "hub", create_autospec(huggingface_hub.HfApi)

    def upload_folder(*, repo_id, folder_path, **options):
        shutil.copytree(folder_path, folder)
        return f"https://hub/{repo_id}"

    api.return_value.upload_folder.side_effect = upload_folder
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    return api.return_value, folder


@pytest.fixture
def ascii_locale(monkeypatch):
    """Text files are in ASCII unless the code says otherwise."""
    monkeypatch.setattr(io, "text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")


@pytest.fixture(scope="session")
def awake():
    """awake(mixture): give its gates random parameters, so that they depend on what they read."""
    import torch

    def wake(mixture, seed=0, size=3.0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            matrices = [p for p in mixture.parameters() if p.dim() == 2]
            for parameter in matrices or mixture.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        return mixture

    return wake


OTHERS = ["flux", *thorough("sdxl", "sd21", "sd3", "animatediff")]


@pytest.fixture(params=OTHERS)
def other(request, awake, tmp_path):
    """A host that is not Stable Diffusion 1.5: its name, pipeline, options of its call, files, and `attach()`, which puts
    gates on it that depend on what they read."""
    import hosts
    from tiny import ATTENTION, FEED_FORWARD, tiny_lora

    import mole_diffusers as mole

    pipe, options = hosts.HOSTS[request.param]()
    ends = {"fox": ATTENTION + FEED_FORWARD, "ink": ATTENTION}
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i, ends=e) for i, (n, e) in enumerate(ends.items())}

    def attach():
        return awake(mole.attach(pipe, files, "mole"))

    return SimpleNamespace(name=request.param, pipe=pipe, options=options, files=files, attach=attach)


@pytest.fixture(scope="module")
def client(loras, tmp_path_factory):
    """A client of a fresh app on the tiny pipeline."""
    pytest.importorskip("gradio_client")
    from app_client import served

    with served(loras, tmp_path_factory.mktemp("app")) as found:
        yield found


@pytest.fixture
def decided(monkeypatch):
    """Random models attend to no word more than to another, so that no layout would be certain."""
    monkeypatch.setattr("mole_diffusers.binding.picture_layout.UNDECIDED", -1.0)
