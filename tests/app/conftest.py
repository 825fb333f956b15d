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
