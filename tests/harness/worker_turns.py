"""Turns of one worker of a fake cluster: what it is asked, and what comes back."""

from harness.fake_cluster import FakeCluster

from diptych.engine.worker import Worker
from diptych.messages.codec import Message
from diptych.messages.ids import Address, RequestId, WorkerId
from diptych.messages.membership import Role
from diptych.messages.requests import GenerateRequest, LoadUpdate, Route, SamplingParams, ServiceClass

PROMPT = list(range(10))
ROLES = [WorkerId("prefill-0"), WorkerId("decode-0")]


def route_to(cluster: FakeCluster, worker: Worker) -> Route:
    if worker.role is Role.DECODE:
        return Route(worker.ref)
    return Route(cluster.workers[WorkerId("decode-0")].ref, worker.ref)


def ask(
    cluster: FakeCluster,
    route: Route,
    name: str = "r",
    prompt: list[int] = PROMPT,
    gateway: str | None = None,
    service_class: ServiceClass = ServiceClass.DEFAULT,
) -> GenerateRequest:
    asked = GenerateRequest(
        request_id=RequestId(name),
        gateway=Address(gateway) if gateway else cluster.gateway.address,
        token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=4, seed=0, temperature=0.0),
        route=route,
        timeout_s=100.0,
        service_class=service_class,
    )
    cluster.gateway.send(route.first.address, asked)
    return asked


def answers(cluster: FakeCluster) -> list[Message]:
    """All that has come to the gateway but heartbeats."""
    cluster.network.deliver_all()
    return [message for message in cluster.gateway.receive(0) if not isinstance(message, LoadUpdate)]


def turn(cluster: FakeCluster, worker: Worker) -> list[Message]:
    cluster.network.deliver_all()
    worker.turn(0.0)
    return answers(cluster)


def in_flight(cluster: FakeCluster, kind: type) -> list[Message]:
    return [letter.message for letter in cluster.network.in_flight if isinstance(letter.message, kind)]
