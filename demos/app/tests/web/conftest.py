"""What the tests of the app share."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def only_served_pages_have_a_web_app():
    """Gradio makes a web app for every page that is defined, in half of that time, and a new one when it is launched."""
    blocks = pytest.importorskip("gradio.blocks")
    create, configure = blocks.App.create_app, blocks.Blocks.get_config_file

    def create_app(page, **options):
        return create(page, **options) if page.exited else None

    def get_config_file(page):
        return configure(page) if page.exited else {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks.Blocks, "exited", False, raising=False)  # until the end of the definition
        patch.setattr(blocks.App, "create_app", create_app)
        patch.setattr(blocks.Blocks, "get_config_file", get_config_file)
        yield


@pytest.fixture
def studio(loras):
    from tiny import tiny_pipeline

    from mole_app.studio.catalog import Catalog
    from mole_app.studio.render import Studio

    return Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny")


@pytest.fixture
def tiny(studio, tmp_path):
    """A page in a browser, of an app on the tiny pipeline."""
    from page_visits import RECIPE, visiting

    with visiting(studio, RECIPE, tmp_path) as page:
        yield page


@pytest.fixture(params=[1440, 390])
def any_width(request, studio, tmp_path):
    """The same on a desk and on a phone."""
    from page_visits import RECIPE, visiting

    with visiting(studio, RECIPE, tmp_path, width=request.param) as page:
        yield page
