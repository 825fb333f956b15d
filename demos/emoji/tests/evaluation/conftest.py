import pytest
import tiny_models
from protocol_parts import noise


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Options for a folder of each model, with random weights."""
    with tiny_models.saved(tmp_path_factory.mktemp("models")) as found:
        yield found


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """concept -> folder of its own pictures."""
    folders = {}
    for i, name in enumerate(("fox", "ink")):
        folders[name] = tmp_path_factory.mktemp(name)
        for j in range(2):
            noise(10 * i + j).save(folders[name] / f"{j}.png")
    return folders
