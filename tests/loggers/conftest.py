"""What the tests of the reporters share."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def _other_packages_may_warn():
    """The loggers' own packages are not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
