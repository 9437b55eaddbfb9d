"""A server that stands in for one of vLLM."""

import pytest
from vllm_stand_in import StandIn


@pytest.fixture
def server(model_folder):
    stand_in = StandIn(model_folder)
    yield stand_in
    stand_in.http.shutdown()
