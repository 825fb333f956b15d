"""Which words of the prompt, and which place in the picture, belong to which expert."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
