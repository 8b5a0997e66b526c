"""MessagePack on the wire, typed and bounded.

Nothing that arrives is trusted: what does not decode into a Message is dropped by the receiver, and counted.
"""

import msgspec

from .errors import Malformed, TooLarge
from .handoff import (
    KVAccept,
    KVCancel,
    KVCommitted,
    KVDrained,
    KVLanded,
    KVOffer,
    KVProbe,
    KVProbeAccept,
    KVProbeCounted,
    KVProbeSent,
    KVRefuse,
    KVWait,
)
from .requests import Abort, GenerateRequest, LinkMeasured, LoadUpdate, RequestFailed, RequestSpan, StepTokens, TransferFailed

Message = (
    GenerateRequest | Abort | StepTokens | RequestFailed | RequestSpan | TransferFailed | LinkMeasured | LoadUpdate
    | KVOffer | KVAccept | KVWait | KVRefuse | KVLanded | KVCommitted | KVCancel | KVDrained
    | KVProbe | KVProbeAccept | KVProbeSent | KVProbeCounted
)  # fmt: skip

MAX_FRAME_BYTES = 16 << 20
"""A million-token prompt takes at most 5 MB; anything larger than this is no message of ours."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Raises TooLarge."""
    frame = _encoder.encode(message)
    if len(frame) > MAX_FRAME_BYTES:
        raise TooLarge(f"{type(message).__name__} of {len(frame)} bytes; the limit is {MAX_FRAME_BYTES}")
    return frame


def decode(frame: bytes | memoryview) -> Message:
    """Raises TooLarge, Malformed."""
    if len(frame) > MAX_FRAME_BYTES:
        raise TooLarge(f"frame of {len(frame)} bytes; the limit is {MAX_FRAME_BYTES}")
    try:
        return _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:     # the last: nested a thousand deep
        raise Malformed(f"frame of {len(frame)} bytes: {error}") from None
