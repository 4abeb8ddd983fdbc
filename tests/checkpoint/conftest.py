"""The network of ``saving``, saved in every way."""

import pytest

from tests.checkpoint.saving import SAVERS, used_network


@pytest.fixture
def network():
    return used_network()


@pytest.fixture(params=SAVERS, ids=lambda save: save.__name__.removeprefix("save_"))
def saved(request, network, tmp_path):
    """A checkpoint of the network, in every format."""
    return request.param(network, tmp_path)
