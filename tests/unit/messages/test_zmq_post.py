"""Real sockets on loopback: what arrives, what must not, and that nothing ever blocks."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from uuid import uuid4

import msgspec
import pytest
import zmq

from diptych.messages import zmq_post
from diptych.messages.codec import MAX_FRAME_BYTES, Message, encode
from diptych.messages.errors import ClusterError, TooLarge
from diptych.messages.host_wire import HostWires
from diptych.messages.ids import Address, RequestId
from diptych.messages.requests import Abort
from diptych.messages.zmq_post import MAX_RAW_BYTES, Keyring, ZmqPost

KEYRING = Keyring.new()
STRANGER = Keyring.new()
TIMEOUT_S = 10.0          # for what must arrive; never reached unless a test fails
LAST = Abort(RequestId("last"))
WRONG_KEYS = {
    "no key": None,
    "another key": STRANGER,
    "our public key only": Keyring(KEYRING.public, STRANGER.secret),
    "our secret key only": Keyring(STRANGER.public, KEYRING.secret),
}
HANDSHAKE_ENDS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


def letter(name: object) -> Abort:
    return Abort(RequestId(str(name)))


@pytest.fixture(params=["one host", "two hosts"])
def posts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ZmqPost, ZmqPost]]:
    if request.param == "two hosts":              # names that nobody else looks for: all goes over ZeroMQ
        monkeypatch.setattr(HostWires, "_name", lambda *_: f"\0diptych/{uuid4().hex}".encode())
    a, b = ZmqPost(KEYRING), ZmqPost(KEYRING)
    yield a, b
    a.close()
    b.close()


@pytest.fixture
def raw() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """For sockets that are not ours."""
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def receive_until(post: ZmqPost, last: Message, sender: ZmqPost | None = None) -> list[Message]:
    """Everything up to `last`; a `sender` that is a member receives meanwhile, as members do."""
    received: list[Message] = []
    give_up_at = time.monotonic() + TIMEOUT_S
    while last not in received:
        assert time.monotonic() < give_up_at, f"{last} did not come, {len(received)} others did"
        received += post.receive(0.01 if sender else 0.1)
        if sender is not None:
            assert sender.receive(0) == []
    return received


def dealer(context: zmq.Context[zmq.Socket[bytes]], keys: Keyring | None) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if keys is not None:
        socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
        socket.curve_serverkey = KEYRING.public.encode()
    return socket


def end_of_handshake(socket: zmq.Socket[bytes], start: Callable[[], object]) -> int:
    """How the first handshake at the socket ended after `start`: a refusal is waited for, not a while in which nothing arrives."""
    monitor = socket.get_monitor_socket(HANDSHAKE_ENDS)
    try:
        start()
        assert monitor.poll(int(TIMEOUT_S * 1000)), "no handshake came to an end"
        return int.from_bytes(monitor.recv_multipart()[0][:2], "little")
    finally:
        socket.disable_monitor()


def connect_and_send(socket: zmq.Socket[bytes], to: Address, frame: bytes) -> None:
    socket.connect(to)
    with suppress(zmq.Again):             # refused that fast
        socket.send(frame, zmq.NOBLOCK)


# What arrives

def test_both_ways_in_order(posts: tuple[ZmqPost, ZmqPost]) -> None:
    for sender, receiver in (posts, posts[::-1]):
        sent = [letter(i) for i in range(500)]
        for message in sent:
            sender.send(receiver.address, message)
        assert receive_until(receiver, sent[-1], sender) == sent
        assert receiver.num_dropped == sender.num_dropped == 0


def test_many_senders_one_of_them_oneself(posts: tuple[ZmqPost, ZmqPost]) -> None:
    a, b = posts
    for sender in (a, b):
        for i in range(50):
            sender.send(a.address, letter((sender.address, i)))
    received: list[Message] = []
    give_up_at = time.monotonic() + TIMEOUT_S
    while len(received) < 100 and time.monotonic() < give_up_at:
        received += a.receive(0.1)
        assert b.receive(0) == []
    for sender in (a, b):
        ours = [letter((sender.address, i)) for i in range(50)]
        assert [message for message in received if message in ours] == ours


def test_the_largest_message_arrives(posts: tuple[ZmqPost, ZmqPost]) -> None:
    a, b = posts
    bare = len(encode(letter("x" * (1 << 20)))) - (1 << 20)
    largest = letter("x" * (MAX_FRAME_BYTES - bare))
    assert len(encode(largest)) == MAX_FRAME_BYTES
    a.send(b.address, largest)
    a.send(b.address, LAST)
    assert receive_until(b, LAST, a) == [largest, LAST]
    with pytest.raises(TooLarge):
        a.send(b.address, letter("x" * MAX_FRAME_BYTES))


def test_receive_waits_for_the_first_and_no_longer_than_told(posts: tuple[ZmqPost, ZmqPost]) -> None:
    a, b = posts
    a.send(b.address, letter("hello"))
    receive_until(b, letter("hello"), a)
    assert b.receive(0) == []
    assert b.receive(0.01) == []
    a.send(b.address, LAST)
    started = time.monotonic()
    assert b.receive(TIMEOUT_S) == [LAST]
    assert time.monotonic() - started < TIMEOUT_S / 2


def test_messages_for_a_peer_that_starts_later_arrive(posts: tuple[ZmqPost, ZmqPost]) -> None:
    a, b = posts
    _, port = b.address.rsplit(":", 1)
    b.close()
    a.send(b.address, letter("early"))
    successor = ZmqPost(KEYRING, port=int(port))
    try:
        assert successor.address == b.address
        a.send(b.address, LAST)
        assert LAST in receive_until(successor, LAST, a)
    finally:
        successor.close()


# What must not

@pytest.mark.parametrize("keys", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_a_client_without_the_key_is_refused(
    posts: tuple[ZmqPost, ZmqPost], raw: zmq.Context[zmq.Socket[bytes]], keys: Keyring | None
) -> None:
    a, b = posts
    socket = dealer(raw, keys)
    assert end_of_handshake(socket, lambda: connect_and_send(socket, b.address, encode(letter("no")))) != zmq.EVENT_HANDSHAKE_SUCCEEDED
    a.send(b.address, LAST)
    assert receive_until(b, LAST, a) == [LAST]


def test_the_right_key_gets_through(posts: tuple[ZmqPost, ZmqPost], raw: zmq.Context[zmq.Socket[bytes]]) -> None:
    """So that the refusals above are for the key's sake."""
    socket = dealer(raw, KEYRING)
    assert end_of_handshake(socket, lambda: connect_and_send(socket, posts[1].address, encode(LAST))) == zmq.EVENT_HANDSHAKE_SUCCEEDED
    assert receive_until(posts[1], LAST) == [LAST]


@pytest.mark.parametrize("keys", [STRANGER, None], ids=["other key", "no key"])
def test_a_forged_server_reads_nothing(posts: tuple[ZmqPost, ZmqPost], raw: zmq.Context[zmq.Socket[bytes]], keys: Keyring | None) -> None:
    """Somebody else sits at a peer's address: he gets no byte of what is sent there."""
    server = raw.socket(zmq.ROUTER)
    if keys is not None:
        server.curve_server = True
        server.curve_publickey, server.curve_secretkey = keys.public.encode(), keys.secret.encode()
    address = Address(f"tcp://127.0.0.1:{server.bind_to_random_port('tcp://127.0.0.1')}")
    assert end_of_handshake(server, lambda: posts[0].send(address, letter("secret"))) != zmq.EVENT_HANDSHAKE_SUCCEEDED
    assert server.poll(0) == 0


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1 no message"],
        [msgspec.msgpack.encode({"type": "Abort"})],
        [b"\x82\xa4type\xa5Abort\xa1x" + b"\x91" * 100_000],
        [encode(LAST), encode(LAST)],
        [b"", encode(LAST)],
        [b"x" * (MAX_FRAME_BYTES + 1)],
    ],
    ids=["empty", "bytes", "field missing", "nested", "two frames", "delimiter", "too large"],
)
def test_what_is_no_message_is_dropped_and_counted(
    posts: tuple[ZmqPost, ZmqPost], raw: zmq.Context[zmq.Socket[bytes]], frames: list[bytes]
) -> None:
    socket = dealer(raw, KEYRING)
    socket.connect(posts[1].address)
    socket.send_multipart(frames)
    socket.send(encode(letter("next")))
    assert receive_until(posts[1], letter("next")) == [letter("next")]
    assert posts[1].num_dropped == 1


def test_who_sends_far_too_much_is_hung_up_on(posts: tuple[ZmqPost, ZmqPost], raw: zmq.Context[zmq.Socket[bytes]]) -> None:
    a, b = posts
    socket = dealer(raw, KEYRING)
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    connect_and_send(socket, b.address, bytes(MAX_RAW_BYTES + 1))
    assert monitor.poll(int(TIMEOUT_S * 1000))
    socket.disable_monitor()
    a.send(b.address, LAST)
    assert receive_until(b, LAST, a) == [LAST]


def test_an_address_that_is_none_is_dropped_and_counted(posts: tuple[ZmqPost, ZmqPost]) -> None:
    """Addresses arrive in messages; one that cannot be dialled must not end the process, nor keep `close` from ending."""
    a, b = posts
    wrong = ["", "nonsense", "tcp://127.0.0.1", "udp://127.0.0.1:1", "fake://a", "x://y"]
    for address in wrong:
        a.send(Address(address), LAST)
    assert a.num_dropped == len(wrong)
    a.send(b.address, LAST)
    assert receive_until(b, LAST, a) == [LAST]


# That nothing blocks

def test_a_peer_that_is_gone_never_blocks(posts: tuple[ZmqPost, ZmqPost], monkeypatch: pytest.MonkeyPatch) -> None:
    """It swallows what fits into its queue; the rest is dropped, counted, and there is no waiting."""
    monkeypatch.setattr(zmq_post, "MAX_QUEUED_MESSAGES", 100)
    a, b = posts
    b.close()
    started = time.monotonic()
    for i in range(300):
        a.send(b.address, letter(i))
    assert a.num_dropped == 200
    assert time.monotonic() - started < 5


def test_forget_drops_what_is_queued(posts: tuple[ZmqPost, ZmqPost]) -> None:
    a, b = posts
    port = int(b.address.rsplit(":", 1)[1])
    b.close()
    a.send(b.address, letter("old"))
    a.forget(b.address)
    a.forget(b.address)
    a.forget(Address("tcp://127.0.0.1:1"))
    successor = ZmqPost(KEYRING, port=port)
    try:
        a.send(successor.address, LAST)
        assert receive_until(successor, LAST, a) == [LAST]
    finally:
        successor.close()


def test_no_socket_is_opened_again_to_a_member_that_has_left(posts: tuple[ZmqPost, ZmqPost]) -> None:
    a, b = posts
    port = int(b.address.rsplit(":", 1)[1])
    a.update_members({b.address})
    a.send(b.address, letter("hello"))
    receive_until(b, letter("hello"), a)
    b.close()
    a.update_members(set())
    a.send(b.address, letter("late"))
    assert a._outboxes == {}
    successor = ZmqPost(KEYRING, port=port)
    try:
        a.update_members({successor.address})
        a.send(successor.address, LAST)
        assert receive_until(successor, LAST, a) == [LAST]
    finally:
        successor.close()


def test_close_leaves_no_thread_and_frees_the_port() -> None:
    before = set(threading.enumerate())
    post = ZmqPost(KEYRING)
    port = int(post.address.rsplit(":", 1)[1])
    post.send(Address("tcp://127.0.0.1:1"), LAST)              # nobody there: its queue is given up
    started = time.monotonic()
    post.close()
    assert time.monotonic() - started < 5
    assert set(threading.enumerate()) == before
    ZmqPost(KEYRING, port=port).close()


def test_close_with_mail_for_a_peer_that_has_just_gone(posts: tuple[ZmqPost, ZmqPost]) -> None:
    """What a wire gives back meanwhile must not keep a socket open."""
    a, b = posts
    a.send(b.address, letter("hello"))
    receive_until(b, letter("hello"), a)
    while a._wires.reaches(b.address) and not a._wires._outgoing[b.address].queued:
        a.send(b.address, letter("x" * 100_000))
    b.close()
    started = time.monotonic()
    a.close()
    assert time.monotonic() - started < 5


def test_last_words_of_a_member_that_leaves_in_order_arrive(posts: tuple[ZmqPost, ZmqPost]) -> None:
    leaver = ZmqPost(KEYRING)
    leaver.send(posts[1].address, letter("hello"))
    receive_until(posts[1], letter("hello"), leaver)
    leaver.send(posts[1].address, LAST)
    leaver.close()
    assert receive_until(posts[1], LAST) == [LAST]


def test_a_port_that_is_taken_is_a_typed_error(posts: tuple[ZmqPost, ZmqPost]) -> None:
    before = set(threading.enumerate())
    port = int(posts[0].address.rsplit(":", 1)[1])
    with pytest.raises(ClusterError, match=rf"127.0.0.1:{port}: Address already in use"):
        ZmqPost(KEYRING, port=port)
    with pytest.raises(ClusterError, match=r"no\.such\.host\.invalid"):
        ZmqPost(KEYRING, host="no.such.host.invalid")
    assert set(threading.enumerate()) == before


def test_fileno_becomes_readable(posts: tuple[ZmqPost, ZmqPost]) -> None:
    """How an event loop waits."""
    a, b = posts
    poller = zmq.Poller()
    poller.register(b.fileno(), zmq.POLLIN)
    received: list[Message] = []
    a.send(b.address, LAST)
    while LAST not in received:
        assert poller.poll(TIMEOUT_S * 1000)
        received += b.receive(0)
        assert a.receive(0) == []


def test_a_keyring_does_not_print_its_secret() -> None:
    assert KEYRING.secret not in f"{KEYRING!r} {KEYRING}"
    assert KEYRING.public in repr(KEYRING)
    assert Keyring.new() != KEYRING
