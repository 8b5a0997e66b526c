"""Keys, models, health, metrics, request ids, and paths that are none."""

import gc
import weakref
from typing import Any

import pytest
from harness.gateway import CONTEXT, House, in_loop

from diptych.cluster.gateway import app
from diptych.cluster.gateway.answer import Answer
from diptych.messages.ids import WorkerId
from diptych.messages.requests import LinkFigures, LinkMeasured, TransferFailed

PUBLIC = ["/health", "/ready", "/metrics"]
ASK = {"prompt": "Hi", "max_tokens": 50}
OURS = '{gateway="gateway-0"}'
PAIR = '{decode="decode-0",gateway="gateway-0",prefill="prefill-0",transport="fake"}'


class TestKeys:
    @pytest.mark.parametrize("header", [None, "", "Bearer ", "Bearer wrong", "Bearer secret-1x", "secret-1", "Basic secret-1", "Bearer é"])
    @pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/v1/chat/completions", "/nothing"])
    @in_loop
    async def test_without_one_nothing_is_told(self, tmp_path, path, header):
        async with House(tmp_path, api_keys=frozenset({"secret-1", "secret-2"})) as house:
            reply = await house.send("POST", path, ASK, {} if header is None else {"authorization": header})
            assert (reply.status, reply.error["code"], reply.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
            assert "secret" not in reply.body.decode()

    @pytest.mark.parametrize("header", ["Bearer secret-1", "bearer secret-2"])
    @in_loop
    async def test_any_of_them_opens(self, tmp_path, header):
        async with House(tmp_path, api_keys=frozenset({"secret-1", "secret-2"})) as house:
            assert (await house.post("/v1/completions", ASK, {"authorization": header})).status == 200

    @pytest.mark.parametrize("path", PUBLIC)
    @in_loop
    async def test_health_is_open(self, tmp_path, path):
        async with House(tmp_path, api_keys=frozenset({"secret"})) as house:
            assert (await house.get(path)).status == 200


def test_a_config_does_not_show_its_keys(tmp_path):
    assert "secret" not in repr(House(tmp_path, api_keys=frozenset({"secret"})).config)


@in_loop
async def test_models(tmp_path):
    async with House(tmp_path) as house:
        [model] = (await house.get("/v1/models")).json["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", CONTEXT)
        assert (await house.get("/v1/models/tiny")).json == model
        missing = await house.get("/v1/models/huge")
        assert (missing.status, missing.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("POST", "/health", 405), ("GET", "/", 404),
    ("POST", "/v1/embeddings", 404), ("GET", "/v1/models/", 404), ("GET", "/v1/completions/", 404),
])  # fmt: skip
@in_loop
async def test_paths_and_methods_that_are_none(tmp_path, method, path, status):
    async with House(tmp_path) as house:
        reply = await house.send(method, path)
        assert (reply.status, reply.error["type"]) == (status, "invalid_request_error")
        assert ("allow" in reply.headers) == (status == 405)


@in_loop
async def test_ready_says_why_not(tmp_path):
    async with House(tmp_path, prefill=1, decode=1) as house:
        assert (await house.get("/ready")).json == {"status": "ready"}
        house.kill("decode-0")
        house.tell_membership()
        assert (await house.get("/ready")).status == 200           # the prefill worker stands in
        house.worker("prefill-0").frozen = True
        house.now += 5.0
        reply = await house.get("/ready")
        assert (reply.status, reply.json["reason"]) == (503, "none of 1 known workers is alive and takes requests")
        assert (await house.get("/health")).status == 200
    async with House(tmp_path, prefill=0, decode=0) as house:
        assert (await house.get("/ready")).json["reason"] == "no workers are known yet"


@in_loop
async def test_request_ids_are_echoed_if_they_can_be(tmp_path):
    async with House(tmp_path) as house:
        for stream in (False, True):
            reply = await house.post("/v1/completions", ASK | {"stream": stream}, {"x-request-id": "abc-1"})
            assert reply.headers["x-request-id"] == "abc-1"
        assert (await house.post("/v1/completions", {}, {"x-request-id": "abc-2"})).headers["x-request-id"] == "abc-2"
        for bad in ("x" * 257, "a b", "ü"):
            made = (await house.get("/health", {"x-request-id": bad})).headers["x-request-id"]
            assert made != bad
            assert made.isalnum()


@in_loop
async def test_metrics_count_what_happened(tmp_path):
    async with House(tmp_path) as house:
        await house.post("/v1/completions", ASK)
        await house.post("/v1/completions", {})
        await house.get("/wp-login.php")
        prefill = house.worker("prefill-0")
        prefill.post.send(house.address, TransferFailed(prefill.ref, "decode-0", "fake", "the link is down"))
        other = LinkFigures("slow", 5e-4, 1.5)
        before = LinkMeasured(prefill.ref, WorkerId("decode-0"), "gone", 2e-5, 20.0, 1 << 20)
        prefill.post.send(house.address, before)
        link = LinkMeasured(prefill.ref, WorkerId("decode-0"), "fake", 2e-5, 12.5, 1 << 20, others=(other,))
        prefill.post.send(house.address, link)
        await house.post("/v1/completions", {})
        await house.until(lambda: b"diptych_kv_transfer_probe_gbps{" in house.core.render_metrics())
        text = (await house.get("/metrics")).body.decode()
        for line in (
            'diptych_choices_total{gateway="gateway-0",outcome="finished"} 1.0',
            f"diptych_prompt_tokens_total{OURS} 2.0",
            f"diptych_output_tokens_total{OURS} 12.0",
            f"diptych_ttft_seconds_count{OURS} 1.0",
            f"diptych_tpot_seconds_count{OURS} 1.0",
            f"diptych_e2e_seconds_count{OURS} 1.0",
            f"diptych_workers_alive{OURS} 2.0",
            f"diptych_choices_running{OURS} 0.0",
            f"diptych_choices_queued{OURS} 0.0",
            f"diptych_dropped_frames{OURS} 0.0",
            f"diptych_kv_transfer_bytes_total{PAIR} 4096.0",
            f"diptych_kv_transfer_probe_gbps{PAIR} 12.5",
            f"diptych_kv_transfer_probe_latency_seconds{PAIR} 2e-05",
            f"diptych_kv_transfer_probe_gbps{PAIR.replace('fake', 'slow')} 1.5",
            f"diptych_kv_transfer_used{PAIR} 1.0",
            f"diptych_kv_transfer_used{PAIR.replace('fake', 'slow')} 0.0",
            f"diptych_kv_transfer_used{PAIR.replace('fake', 'gone')} 0.0",
            f"diptych_kv_transfer_seconds_total{PAIR} 0.001",
            f"diptych_kv_transfer_gbps{PAIR} 0.004096",
            f"diptych_kv_transfer_failures_total{PAIR} 1.0",
            'diptych_http_responses_total{gateway="gateway-0",path="/v1/completions",status="200"} 1.0',
            'diptych_http_responses_total{gateway="gateway-0",path="/v1/completions",status="400"} 2.0',
            'diptych_http_responses_total{gateway="gateway-0",path="other",status="404"} 1.0',
        ):
            assert line in text.splitlines(), line


@in_loop
async def test_status_tells_of_the_last_handoff(tmp_path):
    async with House(tmp_path) as house:
        for _ in range(2):
            await house.post("/v1/completions", ASK)
        status = house.core.status(port=1)
        [transfer] = status.transfers
        assert (transfer.transport, transfer.num_handoffs, transfer.num_pages, transfer.num_bytes) == ("fake", 2, 8, 8192)
        assert transfer.gbps == pytest.approx(8192 / 0.002 / 1e9)
        assert (status.last_span.worker.worker_id, status.last_span.decode_id) == ("prefill-0", "decode-0")
        assert (status.num_workers_alive, status.num_output_tokens, status.outcomes["finished"]) == (2, 24, 2)
        assert {load.worker.worker_id for load in status.loads} == {"prefill-0", "decode-0"}
        assert status.ttft.num_samples == status.tpot.num_samples == 2


@in_loop
async def test_the_smallest_workers_context_is_the_clusters(tmp_path):
    async with House(tmp_path, prefill=0, decode=0) as house:
        assert (await house.get("/v1/models/tiny")).json["max_model_len"] == CONTEXT


@in_loop
async def test_a_fault_of_ours_is_a_500_that_tells_nothing(tmp_path, caplog):
    async with House(tmp_path) as house:
        house.core.model.vocabulary.token_bytes = lambda token_id: 1 / 0
        reply = await house.post("/v1/completions", ASK)
        assert (reply.status, reply.error["type"]) == (500, "server_error")
        assert "division" not in reply.body.decode()
        assert "ZeroDivisionError" in caplog.text
        await house.until(lambda: house.core.dispatcher.num_running == 0)


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_an_answer_leaves_no_cycle_of_references(tmp_path, monkeypatch, stream):
    """Or the collector would have all of them to find."""
    answers: list[weakref.ref[Answer]] = []

    def remember(*parts: Any) -> Answer:
        answer = Answer(*parts)
        answers.append(weakref.ref(answer))
        return answer

    monkeypatch.setattr(app, "Answer", remember)
    async with House(tmp_path) as house:
        gc.disable()
        try:
            for body in (ASK, ASK | {"n": 2, "stop": "t"}):
                assert (await house.post("/v1/completions", body | {"stream": stream})).complete
            await house.until(lambda: [answer() for answer in answers] == [None, None])
        finally:
            gc.enable()
