"""Where places can come from before the first step. Every file here is imported, which registers its source."""

from importlib import import_module
from pkgutil import iter_modules

for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")
