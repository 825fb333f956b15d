"""What tests of threads and interruptions share."""

from diffusers import StableDiffusionPipeline


def entered(block):
    with block:
        pass


def of_its_own_kind(pipe):
    """The same models in a pipeline whose class no other test has patched, and the class."""
    kind = type("Own", (StableDiffusionPipeline,), {})
    own = kind(**pipe.components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    return own, kind
