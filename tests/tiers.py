"""Which of a test's cases are left to the thorough tier."""

import pytest


def thorough(*cases):
    """Cases for `parametrize` that only the thorough tier runs; a tuple is the values of several arguments."""
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.thorough) for c in cases]
