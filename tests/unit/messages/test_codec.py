"""What is sent arrives as it was; what is not a message is Malformed or TooLarge and never anything else."""

from typing import Any, get_args

import msgspec
import pytest
from harness.values import values_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diptych.messages import handoff, membership, requests
from diptych.messages.codec import MAX_FRAME_BYTES, Message, decode, encode
from diptych.messages.errors import Malformed, TooLarge, WireError
from diptych.messages.handoff import KVAccept, Ticket
from diptych.messages.ids import Address, BlockId, Epoch, Imm, RequestId, WorkerId
from diptych.messages.requests import Abort, GenerateRequest, Route, SamplingParams, StepTokens, TokenDelta, WorkerRef

KINDS = get_args(Message)
WORKER = WorkerRef(WorkerId("decode-0"), Epoch(3), Address("tcp://127.0.0.1:1"))


def decode_or_wire_error(frame: bytes) -> Message | None:
    try:
        return decode(frame)
    except WireError:
        return None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_round_trip(kind: Any) -> None:
    @settings(max_examples=25)
    @given(message=values_of(kind))
    def check(message: Any) -> None:
        assert decode(encode(message)) == message
        assert decode(memoryview(encode(message))) == message

    check()


def test_every_tagged_struct_but_membership_is_a_message() -> None:
    """A new message that nobody added to the union would be dropped as malformed by its receivers. Membership travels by Ray."""
    defined = [value for module in (handoff, membership, requests) for value in vars(module).values() if isinstance(value, type)]
    tagged = {kind for kind in defined if issubclass(kind, msgspec.Struct) and kind.__struct_config__.tag is not None}
    assert tagged - {membership.Membership} == set(KINDS)


@settings(max_examples=300)
@given(frame=st.binary(max_size=64))
@example(frame=b"")
@example(frame=b"\xc1")
@example(frame=b"\x81\xa4type\xa5Abort")
@example(frame=b"\xdf\xff\xff\xff\xff")                    # a map that claims four billion entries
@example(frame=b"\x82\xa4type\xa5Abort\xaarequest_id\xa2\xff\xfe")    # text that is no UTF-8
def test_random_bytes_are_no_message(frame: bytes) -> None:
    with pytest.raises(Malformed):
        decode(frame)


@settings(max_examples=150)
@given(message=values_of(Message), at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_damaged_frame_is_a_message_or_a_wire_error(message: Message, at: float, flip: int) -> None:
    frame = bytearray(encode(message))
    frame[int(at * len(frame))] ^= flip
    decode_or_wire_error(bytes(frame))


@settings(max_examples=60)
@given(message=values_of(Message), at=st.floats(0, 1, exclude_max=True), tail=st.binary(min_size=1, max_size=4))
def test_a_cut_or_lengthened_frame_is_malformed(message: Message, at: float, tail: bytes) -> None:
    frame = encode(message)
    for wrong in (frame[: int(at * len(frame))], frame + tail):
        with pytest.raises(Malformed):
            decode(wrong)


@pytest.mark.parametrize(
    "message",
    [
        {"type": "Abort"},
        {"type": "Abort", "request_id": 7},
        {"type": "NoSuchMessage", "request_id": "r1"},
        {"type": "Membership", "version": 1, "workers": [], "gateways": []},
        {"type": ["Abort"], "request_id": "r1"},
        {"request_id": "r1"},
        ["Abort", "r1"],
        {"type": "KVRefuse", "ticket": ["decode-0", 1, "r1", 2], "reason": "no such reason", "message": ""},
        {"type": "KVDrained", "ticket": ["decode-0", 1, "r1"]},
        {"type": "KVDrained", "ticket": {"decode_id": "decode-0", "decode_epoch": 1, "request_id": "r1", "nonce": 2}},
        {"type": "KVDrained", "ticket": ["decode-0", "1", "r1", 2]},
        {"type": "KVDrained", "ticket": ["decode-0", 1.5, "r1", 2]},
        {"type": "KVDrained", "ticket": ["decode-0", True, "r1", 2]},
    ],
)
def test_wrong_tags_and_types_are_malformed(message: object) -> None:
    with pytest.raises(Malformed):
        decode(msgspec.msgpack.encode(message))


def test_bottomless_nesting_is_malformed() -> None:
    """Where a decoder skips a field that it does not know, it recurses."""
    for opening in (b"\x91", b"\x81\xa1x"):
        with pytest.raises(Malformed):
            decode(b"\x82\xa4type\xa5Abort\xa1x" + opening * 100_000 + b"\xc0")


def test_unknown_fields_are_skipped() -> None:
    """A newer sender may say more."""
    assert decode(msgspec.msgpack.encode({"type": "Abort", "request_id": "r1", "why": ["new"]})) == Abort(RequestId("r1"))


def test_the_size_limit_is_exact_on_both_sides() -> None:
    def abort_of(frame_bytes: int) -> Abort:
        bare = len(msgspec.msgpack.encode(Abort(RequestId("x" * (1 << 20))))) - (1 << 20)
        return Abort(RequestId("x" * (frame_bytes - bare)))

    largest = abort_of(MAX_FRAME_BYTES)
    assert len(encode(largest)) == MAX_FRAME_BYTES
    assert decode(encode(largest)) == largest
    too_large = abort_of(MAX_FRAME_BYTES + 1)
    with pytest.raises(TooLarge, match=rf"Abort of {MAX_FRAME_BYTES + 1} bytes; the limit is {MAX_FRAME_BYTES}"):
        encode(too_large)
    with pytest.raises(TooLarge, match=rf"{MAX_FRAME_BYTES + 1} bytes; the limit is {MAX_FRAME_BYTES}"):
        decode(msgspec.msgpack.encode(too_large))


def test_the_longest_prompt_fits() -> None:
    """A million tokens, as the codec promises."""
    sampling = SamplingParams(max_tokens=1, seed=2**63 - 1)
    prompt = tuple([200_000] * 1_000_000)
    assert len(encode(GenerateRequest(RequestId("r"), WORKER.address, prompt, sampling, Route(WORKER), 1.0))) < 5_100_000


def test_a_token_costs_few_bytes() -> None:
    """StepTokens is the message that is sent most."""
    one, two = (StepTokens(WORKER, tuple(TokenDelta(RequestId(f"r{i}"), 5, (17,)) for i in range(n))) for n in (1, 2))
    assert len(encode(two)) - len(encode(one)) <= 12


def test_values_are_frozen() -> None:
    ticket = Ticket(WorkerId("decode-0"), Epoch(1), RequestId("r"), 2)
    accept = KVAccept(ticket, 0, (BlockId(1),), Imm(0))
    for value, name in ((ticket, "nonce"), (accept, "imm")):
        with pytest.raises(AttributeError):
            setattr(value, name, 9)
    assert hash(ticket) == hash(Ticket(*msgspec.structs.astuple(ticket)))
