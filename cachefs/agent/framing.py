"""Frames on the agent's socket: 4 bytes length, then one msgpack message. See `cachefs.agent.messages`."""

from __future__ import annotations

import struct
from typing import Generic, TypeVar

import msgspec

from cachefs import errors
from cachefs.agent.messages import MAX_MESSAGE_BYTES, Answer, Message, Request

LARGE_HEAD_BYTES = 4096
"""What is in a message beside the bytes that it carries; more of it costs a copy."""
_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


def encode(message: Message) -> bytes:
    """Return one message as a frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def encode_large(message: Message, payload_bytes: int) -> bytearray:
    """Return a message that carries so many bytes as a frame: with one copy of them, where `encode` makes two."""
    frame = bytearray(_LENGTH.size + payload_bytes + LARGE_HEAD_BYTES)
    _encoder.encode_into(message, frame, _LENGTH.size)
    _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
    return frame


class Frames(Generic[T]):
    """Splits received bytes into messages. `feed` raises ProtocolError for anything that is not one."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, received: bytes | bytearray) -> list[T]:
        """Take bytes from the stream; return the messages that are whole now."""
        buffer = self._buffer
        buffer += received
        messages: list[T] = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_MESSAGE_BYTES:
                raise errors.ProtocolError(f"a message of {length} bytes")
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            try:
                messages.append(self._decoder.decode(buffer[start + _LENGTH.size : end]))
            except msgspec.DecodeError as error:
                raise errors.ProtocolError(f"not a message: {error}") from error
            start = end
        if start:
            del buffer[:start]
        return messages


def requests() -> Frames[Request]:
    """Return a splitter for what an agent receives."""
    return Frames(msgspec.msgpack.Decoder(Request))


def answers() -> Frames[Answer]:
    """Return a splitter for what a worker receives."""
    return Frames(msgspec.msgpack.Decoder(Answer))
