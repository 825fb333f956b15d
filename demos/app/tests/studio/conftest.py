import pytest
from recipes import PROMPT


@pytest.fixture(scope="module")
def studio(loras):
    from tiny import tiny_pipeline

    from mole_app.studio.catalog import Catalog
    from mole_app.studio.render import Studio

    return Studio(tiny_pipeline(), Catalog(loras, {}), "tiny")


@pytest.fixture
def recipe(studio):
    """A completed one, of two steps."""
    from mole_app.studio.recipe import Recipe

    return studio.complete(Recipe(PROMPT, "blur", seed=7, steps=2, width=32, height=32))
