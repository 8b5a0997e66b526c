"""Tokens do not depend on what the KV travels over: split over each transport they are those of the decode worker alone."""

import pytest
from harness.shm_cluster import shm_cluster
from harness.ucx import needs_ucx

from diptych.messages.requests import SamplingParams
from diptych.models.embedded.path import embedded_model_path

PROMPTS = [[5, 6, 7, 8, 9], list(range(40, 90)), list(range(40, 73)), [3]]
SAMPLING = SamplingParams(max_tokens=10, seed=4, temperature=0.8, top_p=0.95)


@needs_ucx
@pytest.mark.parametrize(
    ("transports", "used"), [(("ucx",), "ucx"), (("ucx", "shm"), "ucx"), (("shm", "ucx"), "shm")], ids=["ucx", "ucx, shm", "shm, ucx"]
)
@pytest.mark.parametrize("lanes", [None, "tcp,self"], ids=["any lane", "tcp"])
def test_split_equals_local(transports: tuple[str, ...], used: str, lanes: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if lanes is not None:
        monkeypatch.setenv("UCX_TLS", lanes)
    with shm_cluster(embedded_model_path(), transports=transports) as cluster:
        split = cluster.generate(PROMPTS, SAMPLING, split=True)
        again = cluster.generate(PROMPTS, SAMPLING, split=True)          # warm prefix caches: fewer pages travel
        local = cluster.generate(PROMPTS, SAMPLING, split=False)
    assert [r.token_ids for r in split] == [r.token_ids for r in again] == [r.token_ids for r in local]
    assert {span.transport for span in cluster.spans} == {used}
