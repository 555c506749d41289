from collections.abc import Iterator

import pytest

from .helpers import PLANES, House, our_threads, wait_for


@pytest.fixture(params=sorted(PLANES))
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """A hub on each data plane; afterwards no thread of it may be left."""
    before = our_threads()
    house = House(PLANES[request.param])
    yield house
    house.close()
    assert wait_for(lambda: our_threads() == before), our_threads()


@pytest.fixture
def grpc_house() -> Iterator[House]:
    house = House(PLANES["grpc"])
    yield house
    house.close()
