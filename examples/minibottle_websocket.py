"""WebSocket for minibottle: server and client in one file (RFC 6455, RFC 7692's compression).

One file to lay beside minibottle.py, where it is minibottle.websocket. A hello world, in app.py:

    from minibottle import App

    app = App()

    @app.websocket("/hello/<name>")
    async def hello(ws, name):               # or a plain def: it has a thread then
        await ws.send(f"Hello {name}!")
        async for message in ws:             # str for a text, bytes for a binary message
            await ws.send(message)

    $ python minibottle.py app:app

A client of it (`from minibottle import connect_websocket`):

    async with connect_websocket("ws://127.0.0.1:8080/hello/Ada") as ws:
        print(await ws.receive())

On the way in it is a GET route: hooks, abort(401), mounts and error pages work as ever, and a
handler with a parameter `request` gets it. Then the connection leaves HTTP: it lives on asyncio,
one loop a worker, and holds no thread. Pings are answered and messages arrive while a handler is
at work; one that reads slowly slows its peer down. When the server stops, the peer is told (1001).
On another server than minibottle's own the answer is 501.

The parts, each of which uses only those above it: 1 frames, 2 the handshake (both know no socket),
3 WebSocket, 4 the server side, 5 the client.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import ssl
import threading
import zlib
from base64 import b64encode
from codecs import utf_8_decode
from concurrent.futures import Future
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from contextvars import copy_context
from functools import lru_cache
from hashlib import sha1
from http.client import HTTPException
from http.client import HTTPResponse as HTTPClientResponse
from inspect import iscoroutinefunction, signature
from types import SimpleNamespace
from typing import (Any, AsyncIterator, Callable, Dict, Generator, Iterable, Iterator, List,
                    Mapping, Optional, Set, Tuple, Union)
from urllib.parse import unquote, urlsplit
from weakref import WeakKeyDictionary

from . import (NEED_DATA, HeaderDict, HTTPError, HTTPResponse, Request, WSGIHeaderDict,
               iter_counted, json_dumps, json_loads)

log = logging.getLogger("minibottle")


class WebSocketError(Exception):
    """The peer broke the protocol: closed with `code`, 1002 for that, 1007 for bad data, 1009 over
    a limit. The message names it."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class WebSocketClosed(ConnectionError):
    """The connection has ended, with this code and reason; 1006: the peer has vanished."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed with {code}" + (reason and f": {reason}"))
        self.code = code
        self.reason = reason


class Options:
    """What may be set of a WebSocket, and what it is otherwise."""

    subprotocols: Iterable[str] = ()  # that we speak, the best first
    deflate = True            # compress messages of 256 bytes and more, if the peer does too
    takeover = False          # and keep the windows from message to message: up to 300 KB each
    max_message = 16 << 20    # bytes, when inflated
    max_fragments = 100_000   # frames of a message
    max_queue = 16            # messages that wait for receive(); then the peer has to wait
    heartbeat = 20.0          # seconds of silence until a ping; as many again: closed. 0.0: none
    close_timeout = 5.0       # seconds for the peer to say goodbye, too
    write_timeout = 30.0      # seconds in which a peer reads nothing of what we send

    def __init__(self, **given: Any) -> None:
        unknown = [name for name in given if not hasattr(Options, name)]
        if unknown:
            raise TypeError(f"a WebSocket has no option {', '.join(unknown)}")
        vars(self).update(given)


# === 1. Frames ================================================================
# Messages to bytes and back, and permessage-deflate, for both sides.

OP_CONTINUATION, OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG = 0, 1, 2, 8, 9, 10
# RFC 6455 5.2, 5.4: the first bytes that a frame may have: FIN, three reserved bits, opcode.
CONTROL_HEADS = frozenset((0x88, 0x89, 0x8A))
INSIDE_HEADS = CONTROL_HEADS | {0x00, 0x80}              # while a message is in fragments
PLAIN_HEADS = CONTROL_HEADS | {0x01, 0x02, 0x81, 0x82}
DEFLATE_HEADS = PLAIN_HEADS | {0x41, 0x42, 0xC1, 0xC2}   # RFC 7692 6: RSV1 on the first frame
CLOSE_CODE = "100[0-37-9]|101[0-4]|[34][0-9]{3}"  # RFC 6455 7.4, and IANA's registry
DEFLATE_TAIL = b"\0\0\xff\xff"  # RFC 7692 7.2.1: a sender takes it off each message
DEFLATE_MIN_BYTES = 256         # shorter messages are sent as they are


class Deflate:
    """The compression of one connection, both ways, as `options` agree."""

    def __init__(self, options: Dict[str, str], side: str, peer: str) -> None:
        self.bits = int(options.get(side + "_max_window_bits") or 15)
        self.takeover = side + "_no_context_takeover" not in options
        self.peer_takeover = peer + "_no_context_takeover" not in options
        self.deflater: Any = None   # zlib's, when needed: 260 KB
        self.inflater: Any = None   # 40 KB

    def compress(self, data: bytes) -> bytes:
        """A message -> its payload; b"" if it is better sent as it is."""
        if len(data) < DEFLATE_MIN_BYTES or self.bits == 8:  # zlib has no window that small
            return b""
        deflater, bits = self.deflater, self.bits
        if not deflater:
            if not self.takeover:  # FAST: the window that holds the message, up to 10 times
                bits = min(bits, (len(data) + 262).bit_length())
            deflater = zlib.compressobj(6, zlib.DEFLATED, -bits, min(8, bits - 6))
            self.deflater = deflater if self.takeover else None
        return (deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]

    def inflate(self, data: bytes, most: int, last: bool) -> bytes:
        """The next of a message's payload -> what it stands for, cut at `most` bytes."""
        inflater = self.inflater = self.inflater or zlib.decompressobj(-15)
        try:
            data = inflater.decompress(data, most)
        except zlib.error as error:
            raise WebSocketError(1007, f"bad compressed data: {error}") from None
        if not (b"\0" + DEFLATE_TAIL).startswith(inflater.unused_data):  # RFC 7692 7.2.3.4
            raise WebSocketError(1007, "compressed data after its last block")
        if last and (inflater.eof or not self.peer_takeover):
            self.inflater = None
        return data


class Message:
    """A data message as it comes: `most` bytes at most, inflated, and UTF-8 if it is a text."""

    def __init__(self, opcode: int, deflate: Optional[Deflate], most: int) -> None:
        self.opcode, self.deflate, self.most = opcode, deflate, most
        self.data = bytearray()
        self.checked = self.frames = 0  # bytes that are good UTF-8; frames that came

    def expect(self, size: int) -> None:
        if len(self.data) + size > self.most:
            raise WebSocketError(1009, f"message over {self.most} bytes (max_message)")

    def add(self, piece: bytes, last: bool = False) -> None:
        """Take some payload. Raises WebSocketError as soon as no good message can come of it."""
        if self.deflate:
            piece = self.deflate.inflate(piece, self.most - len(self.data) + 1, last)
        self.expect(len(piece))
        self.data += piece
        if self.opcode == OP_TEXT:
            self.checked += decode_text(bytes(self.data[self.checked:]), last)[1]


def iter_messages(buf: bytearray, masked: bool, max_message: int, max_fragments: int,
                  deflate: Optional[Deflate] = None) -> Generator[Any, None, None]:
    """Decode what a peer sends from `buf`: (opcode, data) of each message, NEED_DATA between.

    Data is str for OP_TEXT, (code, reason) for OP_CLOSE, which is the last, else bytes. `masked`:
    the peer is a client. Raises WebSocketError as soon as no good message can come.
    """
    message = None
    fresh = DEFLATE_HEADS if deflate else PLAIN_HEADS
    while True:
        head = take_frame_head(buf, masked, INSIDE_HEADS if message else fresh)
        if not head:
            yield NEED_DATA
            continue
        first, size, mask = head
        opcode = first & 15
        while opcode >= OP_CLOSE and len(buf) < size:
            yield NEED_DATA
        if opcode >= OP_CLOSE or first in (0x81, 0x82) and size <= min(len(buf), max_message):
            # FAST: so is a message that is here in one plain frame, in half the time.
            data = apply_mask(bytes(buf[:size]), mask)
            del buf[:size]
            yield opcode, parse_payload(opcode, data)
            if opcode == OP_CLOSE:
                return
            continue
        if not message:
            message = Message(opcode, deflate if first & 0x40 else None, max_message)
        message.frames += 1
        if message.frames > max_fragments:
            raise WebSocketError(1009, f"message of over {max_fragments} frames (max_fragments)")
        message.expect(0 if message.deflate else size)
        for piece in iter_counted(buf, size):
            if piece:
                message.add(apply_mask(piece, mask))
                mask = mask[len(piece) & 3:] + mask[:len(piece) & 3]
            else:
                yield NEED_DATA
        if first > 127:
            message.add(DEFLATE_TAIL if message.deflate else b"", True)
            yield message.opcode, parse_payload(message.opcode, bytes(message.data))
            message = None


def take_frame_head(buf: bytearray, masked: bool, allowed: frozenset,
                    ) -> Optional[Tuple[int, int, bytes]]:
    """Take a frame's head off `buf` -> (first byte, length, mask); None if it is not all here."""
    if len(buf) < 2:
        return None
    first, size, start = buf[0], buf[1] & 127, 2
    if first not in allowed:
        raise WebSocketError(1002, f"a frame may not begin with {first:#04x} here: a reserved bit "
                                   "or opcode, a fragment out of turn")
    if (buf[1] > 127) != masked:
        raise WebSocketError(1002, "the client's frames are masked, the server's are not")
    if size > 125:
        if first in CONTROL_HEADS:
            raise WebSocketError(1002, "control frame over 125 bytes")
        start = 4 if size == 126 else 10
        if len(buf) < start:
            return None
        size = int.from_bytes(buf[2:start], "big")
        if not (126 if start == 4 else 1 << 16) <= size < 1 << 63:
            raise WebSocketError(1002, f"length {size} is not in its shortest form")
    end = start + 4 if masked else start
    if len(buf) < end:
        return None
    mask = bytes(buf[start:end])
    del buf[:end]
    return first, size, mask


def decode_text(data: bytes, final: bool = True) -> Tuple[str, int]:
    """UTF-8 -> (text, bytes it took: fewer if the last character is not `final`)."""
    try:
        return utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        raise WebSocketError(1007, f"text is not UTF-8: {error.reason}") from None


def parse_payload(opcode: int, data: bytes) -> Any:
    """A message's bytes -> the str of a text, (code, reason) of a close, else as they are."""
    if opcode == OP_TEXT:
        return decode_text(data)[0]
    if opcode != OP_CLOSE:
        return data
    code = int.from_bytes(data[:2], "big") if data else 1005
    if data and (len(data) == 1 or not re.fullmatch(CLOSE_CODE, str(code))):
        raise WebSocketError(1002, f"bad close code {code}")
    return code, decode_text(data[2:])[0]


def format_frame(opcode: int, payload: bytes, mask: bytes = b"", flags: int = 0x80) -> bytes:
    """One frame (RFC 6455 5.2). A client gives 4 random bytes as `mask`; `flags`: FIN and RSV."""
    size, bit = len(payload), 0x80 if mask else 0
    short = size if size < 126 else 126 if size < 1 << 16 else 127
    length = b"" if size < 126 else size.to_bytes(2 if size < 1 << 16 else 8, "big")
    return bytes((flags | opcode, bit | short)) + length + mask + apply_mask(payload, mask)


def format_message(data: Union[str, bytes], mask: bytes = b"",
                   deflate: Optional[Deflate] = None) -> bytes:
    """A text for str, else a binary message."""
    opcode, payload = (OP_TEXT, data.encode()) if isinstance(data, str) else (OP_BINARY, data)
    packed = deflate.compress(payload) if deflate else b""
    return format_frame(opcode, packed or payload, mask, 0xC0 if packed else 0x80)


def format_close(code: int = 1000, reason: str = "", mask: bytes = b"") -> bytes:
    """1005: without a code. A long reason is cut to the 123 bytes that it may have."""
    if code != 1005 and not re.fullmatch(CLOSE_CODE, str(code)):
        raise ValueError(f"close code {code} may not be sent")
    text = reason.encode()[:123].decode("utf-8", "ignore").encode()
    return format_frame(OP_CLOSE, b"" if code == 1005 else code.to_bytes(2, "big") + text, mask)


xor_table = lru_cache(256)(lambda byte: bytes(byte ^ i for i in range(256)))


def apply_mask(data: bytes, mask: bytes) -> bytes:
    """XOR with the 4 bytes of `mask` again and again (RFC 6455 5.3); b"": as it is."""
    size = len(data)
    if not mask:
        return data
    if size < 400:
        key = int.from_bytes((mask * (size // 4 + 1))[:size], "little")
        return (int.from_bytes(data, "little") ^ key).to_bytes(size, "little")
    lanes = bytearray(data)  # FAST: every fourth byte by one table, 0.6 of the time for 16 KiB
    for i, byte in enumerate(mask):
        lanes[i::4] = lanes[i::4].translate(xor_table(byte))
    return bytes(lanes)


# === 2. The handshake =========================================================
# An HTTP request and its answer (RFC 6455 4), checked by both sides; compression is agreed here.

NO_TAKEOVER = {"server_no_context_takeover": "", "client_no_context_takeover": ""}
DEFLATE_OFFER = (r"permessage-deflate(?:[ \t]*;[ \t]*(?:(?:server|client)_no_context_takeover|"
                 r"client_max_window_bits|(?:server|client)_max_window_bits="
                 r"(?:[89]|1[0-5]|\"(?:[89]|1[0-5])\")))*")


def accept_websocket(environ: Dict[str, Any], subprotocols: Iterable[str] = (),
                     origins: Optional[List[str]] = None, deflate: bool = True,
                     takeover: bool = False) -> Tuple[List[tuple], str, Optional[Deflate]]:
    """Check a handshake (RFC 6455 4.2) -> (headers of the 101, subprotocol or "", Deflate or None).

    Our first subprotocol that the client has too. Raises HTTPError: 400, 403, 426.
    """
    headers = WSGIHeaderDict(environ)
    key, version, offered, extensions = (headers.get("Sec-WebSocket-" + name, "") for name in (
        "Key", "Version", "Protocol", "Extensions"))
    if (environ["REQUEST_METHOD"] != "GET" or environ.get("SERVER_PROTOCOL") == "HTTP/1.0"
            or environ.get("CONTENT_LENGTH", "0") != "0"):
        raise HTTPError(400, "A WebSocket begins with a GET of HTTP/1.1, without a body.")
    if not is_upgrade(headers) or version != "13":
        error = HTTPError(426, "This is a WebSocket: it takes Upgrade: websocket, Connection: "
                               "Upgrade and Sec-WebSocket-Version: 13.", Upgrade="websocket")
        error.set_header("Sec-WebSocket-Version", "13")
        raise error
    if not re.fullmatch("[0-9A-Za-z+/]{22}==", key):
        raise HTTPError(400, f"Sec-WebSocket-Key {key[:40]!a} is not 16 bytes in base64.")
    check_origin(headers.get("Origin"), headers.get("Host", "").lower(), origins)
    subprotocol = next((name for name in subprotocols if name in split_list(offered)), "")
    options = next(filter(None, map(parse_deflate, split_list(extensions))), {}) if deflate else {}
    if options:
        options.pop("client_max_window_bits", None)  # may be left out: we inflate them all
        options.update({} if takeover else NO_TAKEOVER)
    return (upgrade_headers(options, Accept=accept_key(key), Protocol=subprotocol),
            subprotocol, Deflate(options, "server", "client") if options else None)


def check_origin(origin: Optional[str], host: str, origins: Optional[List[str]]) -> None:
    """Raise HTTPError 403 unless a page of `origin` is of `host`, or of `origins`.

    A browser lets any page connect, with its user's cookies (RFC 6455 10.2); others send no Origin.
    """
    allowed = {origins} if isinstance(origins, str) else set(origins or ())
    for scheme, port in (("http", ":80"), ("https", ":443")):  # RFC 6454 6.2: origins leave it out
        allowed.add(f"{scheme}://{re.sub(port + '$', '', host)}")
    if origin is not None and origin not in allowed and "*" not in allowed:
        raise HTTPError(403, f"A page of {origin!a} may not open a WebSocket on {host!a}: "
                             f"origins=[{origin!a}] would let it.")


def request_websocket(key: str, subprotocols: Iterable[str] = (), deflate: bool = True,
                      takeover: bool = False) -> List[tuple]:
    """A client's headers, but for Host (RFC 6455 4.1); `key` is 16 random bytes in base64."""
    offer = {"permessage-deflate": "", "client_max_window_bits": "",
             **({} if takeover else NO_TAKEOVER)}
    return upgrade_headers(offer if deflate else {}, Version="13", Key=key,
                           Protocol=", ".join(subprotocols))


def check_accepted(status: int, headers: Mapping[str, str], key: str,
                   subprotocols: Iterable[str] = (), deflate: bool = True,
                   ) -> Tuple[str, Optional[Deflate]]:
    """Check the answer to request_websocket -> (subprotocol or "", Deflate or None)."""
    accept, subprotocol, extensions = (headers.get("Sec-WebSocket-" + name, "") for name in (
        "Accept", "Protocol", "Extensions"))
    if status != 101 or not is_upgrade(headers) or accept != accept_key(key):
        raise WebSocketError(1002, f"answered with {status}, Sec-WebSocket-Accept {accept!a}")
    options = parse_deflate(extensions) if deflate else {}
    if (extensions and not options.get("client_max_window_bits", options)  # it needs a number here
            or subprotocol and subprotocol not in subprotocols):
        raise WebSocketError(1010, f"answered with extensions {extensions!a} and subprotocol "
                                   f"{subprotocol!a}, which were not offered")
    return subprotocol, Deflate(options, "client", "server") if options else None


def upgrade_headers(options: Dict[str, str], **fields: str) -> List[tuple]:
    """({}, Key="x", Protocol="") -> Upgrade, Connection and Sec-WebSocket-Key."""
    fields["Extensions"] = "; ".join(f"{k}={v}" if v else k for k, v in options.items())
    return [("Connection", "Upgrade"), ("Upgrade", "websocket"),
            *(("Sec-WebSocket-" + name, value) for name, value in fields.items() if value)]


def is_upgrade(headers: Mapping[str, str]) -> bool:
    return ("websocket" in split_list(headers.get("Upgrade", "").lower())
            and "upgrade" in split_list(headers.get("Connection", "").lower()))


def split_list(text: str) -> List[str]:
    """"a, b" -> ["a", "b"]."""
    return [part.strip(" \t") for part in text.split(",")]


def accept_key(key: str) -> str:
    """"dGhlIHNhbXBsZSBub25jZQ==" -> "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" (RFC 6455 4.2.2)."""
    digest = sha1(key.encode("ascii") + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    return b64encode(digest).decode("ascii")


def parse_deflate(offer: str) -> Dict[str, str]:
    """"permessage-deflate; server_max_window_bits=9" -> the two as keys: {..., "...": "9"}.

    {} for another extension, and for what RFC 7692 7.1 forbids.
    """
    options = dict(re.findall(r'([a-z_-]+)(?:="?([0-9]+))?', offer))
    twice = len(options) <= offer.count(";")
    return options if re.fullmatch(DEFLATE_OFFER, offer) and not twice else {}


# === 3. WebSocket =============================================================
# One connection, on asyncio but without its transports: a reader and a writer of the event loop on
# a socket that does not block. An idle one costs a few KB, a message one task step.

OPEN, CLOSING, LINGERING, CLOSED = range(4)  # our close frame is sent; both are; the socket is
RECV_BYTES = 1 << 16
HIGH_WATER, LOW_WATER = 1 << 16, 1 << 14     # bytes that wait to be sent: send() waits, goes on
LINGER_SECONDS = 2.0    # input is read and dropped for so long, so that our close frame arrives
GRACE_SECONDS = 10.0    # a handler that does not notice the end is cancelled
TICK_SECONDS = 1.0
WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class WebSocket:
    """Both sides of a conversation look like this; all of it on the thread of its event loop."""

    __slots__ = ("loop", "connection", "sock", "close_connection", "options", "deflate",
                 "subprotocol", "is_client", "buf", "reader", "queue", "held", "paused", "getter",
                 "waiters", "out", "pong", "pings", "ponged", "state", "code", "reason",
                 "heard_at", "pinged_at", "moved_at", "deadline", "failure", "task",
                 "__dict__", "__weakref__")  # for what an application keeps there

    def __init__(self, connection: Any, close: Callable, options: Options, subprotocol: str,
                 deflate: Optional[Deflate], is_client: bool = True) -> None:
        self.loop = asyncio.get_running_loop()
        self.connection = connection        # its `sock` is ours until close(connection)
        self.sock = connection.sock
        self.close_connection = close
        self.options = options
        self.deflate = deflate
        self.subprotocol = subprotocol      # the one that both speak, or ""
        self.is_client = is_client
        self.buf, connection.buf = bytearray(connection.buf), b""
        self.reader = iter_messages(self.buf, not self.is_client, options.max_message,
                                    options.max_fragments, deflate)
        self.queue: List[Any] = []          # messages for receive()
        self.held = 0                       # their bytes and characters
        self.paused = False                 # the queue is full: we do not read
        self.getter: Any = None             # the future that receive() awaits
        self.waiters: tuple = ()            # those of until()
        self.out: Any = b""                 # what the socket has not taken yet
        self.pong: Optional[bytes] = None   # an answer that waits behind that
        self.pings = self.ponged = 0        # how many ping() has sent; the last one answered
        self.state = OPEN
        self.code, self.reason = 1006, ""   # when it has ended: why
        self.heard_at = self.moved_at = self.loop.time()
        self.pinged_at = self.deadline = 0.0
        self.failure: Any = None            # a WebSocketError, to be told when the queue is empty
        self.task: Any = None               # the handler's
        self.loop.add_reader(self.sock, self.on_readable)
        watch(self)
        self.pump()

    # -- for everybody --

    async def receive(self) -> Union[str, bytes]:
        """The next message. Raises WebSocketClosed when there will be none."""
        while not self.queue:
            await self.arrival()
        return self.take()

    def arrival(self) -> Any:
        """The future of the next message. FAST: no coroutine, which would cost 200 bytes."""
        if self.failure is not None:
            self.fail()
        self.check_open()
        if self.getter is not None and not self.getter.done():
            raise RuntimeError("two coroutines receive from one WebSocket")
        self.getter = self.loop.create_future()
        return self.getter

    def take(self) -> Union[str, bytes]:
        data = self.queue.pop(0)
        self.held -= len(data)
        if self.paused and not self.is_full(2):
            self.resume()
        return data

    def check_open(self) -> None:
        if self.state != OPEN:
            raise WebSocketClosed(self.code, self.reason)

    async def send(self, data: Union[str, bytes]) -> None:
        """A str goes as a text, bytes as a binary message. Waits for a peer that reads slowly."""
        self.check_open()
        if isinstance(data, (bytearray, memoryview)):
            data = bytes(data)
        if not isinstance(data, (str, bytes)):
            raise TypeError(f"a message is str or bytes, not {type(data).__name__}: send_json()?")
        self.write(format_message(data, self.mask(), self.deflate))
        if len(self.out) > HIGH_WATER:
            await self.until(lambda: len(self.out) <= LOW_WATER or self.state == CLOSED)
            if self.state == CLOSED:
                self.check_open()

    async def receive_json(self) -> Any:
        """Raises WebSocketError, and closes with 1007, where the message is none."""
        data = await self.receive()
        try:
            return json_loads(data)
        except ValueError as error:
            self.say_goodbye(1007, f"this is not JSON: {error}")
            raise WebSocketError(1007, self.reason) from None

    async def send_json(self, value: object) -> None:
        await self.send(json_dumps(value))

    async def ping(self) -> float:
        """Seconds that the peer took to answer."""
        self.check_open()
        began = self.loop.time()
        self.pings += 1
        number = self.pings
        self.write(format_frame(OP_PING, b"%d" % number, self.mask()))
        await self.until(lambda: self.ponged >= number or self.state != OPEN)
        self.check_open()
        return self.loop.time() - began

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye, and wait until the peer has too, for at most close_timeout."""
        self.say_goodbye(code, reason)
        end = CLOSED if self.is_client else LINGERING  # RFC 6455 7.1.1: the server closes first
        await self.until(lambda: self.state >= end)

    def __aiter__(self) -> WebSocket:
        return self

    async def __anext__(self) -> Union[str, bytes]:
        """receive(), until it is closed as is usual."""
        while not self.queue:
            if self.state != OPEN and self.code in (1000, 1001, 1005):
                raise StopAsyncIteration
            await self.arrival()
        return self.take()

    # -- in --

    def on_readable(self) -> None:
        try:
            data = self.sock.recv(RECV_BYTES)
        except WOULD_BLOCK:
            return
        except OSError:
            data = b""
        if not data:
            return self.end("the peer has vanished")
        self.heard_at = self.loop.time()
        if self.reader is not None:
            self.buf += data
            self.pump()

    def pump(self) -> None:
        """Take messages off what was read, while there is room for them."""
        try:
            for event in self.reader or ():
                if not event:
                    break
                opcode, data = event
                if opcode >= OP_CLOSE:
                    self.on_control(opcode, data)
                elif self.state == OPEN:
                    self.queue.append(data)
                    self.held += len(data)
                    if self.is_full():
                        self.paused = True
                        self.loop.remove_reader(self.sock)
                        break
        except WebSocketError as error:
            # What came before it may still have its answers: the next receive() tells the peer.
            self.reader, self.failure = None, error
            self.deadline = self.loop.time() + self.options.close_timeout
            awaited = self.getter is not None and not self.getter.done()
            if awaited and not self.queue or self.state != OPEN:
                self.fail()
        if self.getter is not None and self.queue:
            if not self.getter.done():
                self.getter.set_result(None)
            self.getter = None

    def is_full(self, share: int = 1) -> bool:
        return (len(self.queue) * share >= self.options.max_queue
                or self.held * share > self.options.max_message)

    def resume(self) -> None:
        """There is room again, or nobody wants it: first for what was read, then read on."""
        self.paused = False
        self.pump()
        if not self.paused and self.state != CLOSED:
            self.heard_at = self.loop.time()
            self.loop.add_reader(self.sock, self.on_readable)

    def on_control(self, opcode: int, data: Any) -> None:
        if opcode == OP_PING:
            if self.out:  # RFC 6455 5.5.3: the last one may answer them all
                self.pong = data
            elif self.state == OPEN:
                self.write(format_frame(OP_PONG, data, self.mask()))
        elif opcode == OP_PONG:
            if data.isdigit() and int(data) <= self.pings:  # one for all before it, too
                self.ponged = max(self.ponged, int(data))
                self.wake()
        else:
            self.say_goodbye(*data)
            self.linger()

    # -- out --

    def mask(self) -> bytes:
        return os.urandom(4) if self.is_client else b""

    def write(self, data: bytes) -> None:
        """Send what the socket takes; what it does not take follows."""
        if self.out:
            self.out += data
            return
        try:
            sent = self.sock.send(data)
        except WOULD_BLOCK:
            sent = 0
        except OSError:
            return self.end("the peer has vanished")
        if sent < len(data):
            self.out = bytearray(memoryview(data)[sent:])
            self.moved_at = self.loop.time()
            self.loop.add_writer(self.sock, self.on_writable)

    def on_writable(self) -> None:
        try:
            sent = self.sock.send(self.out)
        except WOULD_BLOCK:
            return
        except OSError:
            return self.end("the peer has vanished")
        self.moved_at = self.loop.time()
        del self.out[:sent]
        if not self.out:
            self.loop.remove_writer(self.sock)
            self.out = b""
            if self.pong is not None and self.state == OPEN:
                self.write(format_frame(OP_PONG, self.pong, self.mask()))
            self.pong = None
            if self.state == LINGERING:
                self.linger()
        if len(self.out) <= LOW_WATER:
            self.wake()

    async def until(self, test: Callable[[], bool]) -> None:
        while not test():
            waiter = self.loop.create_future()
            self.waiters += (waiter,)
            await waiter

    def wake(self) -> None:
        """Let those look again who wait for something."""
        waiters, self.waiters = (*self.waiters, self.getter), ()
        for waiter in waiters:
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    # -- the end --

    def say_goodbye(self, code: int = 1000, reason: str = "") -> None:
        """Send a close frame, unless one is sent already. What arrives from now on is dropped."""
        if self.state == OPEN:
            data = format_close(code, reason, self.mask())
            self.state, self.code, self.reason = CLOSING, code, reason
            self.deadline = self.loop.time() + self.options.close_timeout
            self.write(data)
            if self.paused:
                self.resume()
            if self.failure is not None:
                self.linger()  # no goodbye of the peer's will be read
            self.wake()

    def go_away(self) -> None:
        """The server stops."""
        self.say_goodbye(1001, "the server stops")

    def fail(self) -> None:
        """Close for what the peer did wrong; what came before has had its answer."""
        self.say_goodbye(self.failure.code, str(self.failure))
        self.linger()

    def linger(self) -> None:
        """Both have said goodbye, or the peer no longer knows how: let what we said arrive."""
        if self.state != CLOSED:
            self.state = LINGERING
            self.reader = self.failure = None
            self.deadline = self.loop.time() + LINGER_SECONDS
            self.wake()
            if not self.is_client and not self.out:
                try:
                    self.sock.shutdown(socket.SHUT_WR)
                except OSError:
                    self.end()

    def end(self, reason: str = "") -> None:
        if self.state == OPEN:
            self.code, self.reason = 1006, reason
        if self.state != CLOSED:
            self.state = CLOSED
            self.loop.remove_reader(self.sock)
            self.loop.remove_writer(self.sock)
            self.close_connection(self.connection)
            self.out = b""
            self.paused = False
            self.deadline = self.loop.time() + GRACE_SECONDS
            self.wake()
            if self.task is None:
                watched[self.loop].discard(self)

    def on_tick(self, now: float) -> None:
        """Once a second: what is late?"""
        options = self.options
        if self.out and now > self.moved_at + options.write_timeout:
            return self.end(f"the peer has read nothing for {options.write_timeout} s")
        if self.state == CLOSED:
            if self.task.done():
                watched[self.loop].discard(self)
            elif now > self.deadline:
                self.task.cancel()
        elif self.failure is not None and now > self.deadline:
            self.fail()
        elif self.state != OPEN:
            if now > self.deadline:
                self.end()
        elif options.heartbeat:
            if now > max(self.heard_at, self.pinged_at) + options.heartbeat:
                # Paused, we do not read an answer: yet a dead peer's system refuses the ping.
                if self.pinged_at > self.heard_at and not self.paused:
                    self.say_goodbye(1011, f"no answer to a ping within {options.heartbeat} s")
                else:
                    self.pinged_at = now
                    self.write(format_frame(OP_PING, b"", self.mask()))


watched: Any = WeakKeyDictionary()  # event loop -> the WebSockets on it that have not ended


def watch(ws: WebSocket) -> None:
    if ws.loop not in watched:
        watched[ws.loop] = set()
        ws.loop.call_later(TICK_SECONDS, tick, ws.loop)
    watched[ws.loop].add(ws)


def tick(loop: Any) -> None:
    """FAST: one timer for all: 5,000 take a millisecond."""
    if not watched[loop]:
        del watched[loop]
        return
    loop.call_later(TICK_SECONDS, tick, loop)
    for ws in list(watched[loop]):
        ws.on_tick(loop.time())


# === 4. The server side =======================================================

MAX_THREADS = 256  # handlers that are plain functions, in a process; over it 503


def websocket(app: Any, rule: str, *, origins: Union[None, str, List[str]] = None,
              route: Optional[dict] = None, **options: Any) -> Callable:
    """Decorate a handler: @app.websocket("/chat/<room>") async def chat(ws, room). When it returns
    the connection is closed (1000); when it raises, that is logged (1011).

    `origins`: whose pages may connect besides our own: ["https://example.org"], "*" for all.
    `route`: more arguments of app.route(). `options`: see Options.
    """
    limits = Options(**options)

    def decorator(handler: Callable) -> Callable:
        is_async = iscoroutinefunction(handler)
        wants_request = "request" in signature(handler).parameters

        def handshake(request: Request, **args: object) -> HTTPResponse:
            environ = request.environ
            if "minibottle.settings" not in environ:
                raise HTTPError(501, "A WebSocket needs minibottle's own server.")
            headers, *agreed = accept_websocket(environ, limits.subprotocols, origins,
                                                limits.deflate, limits.takeover)
            if not is_async and len(threads) >= MAX_THREADS:
                raise HTTPError(503, f"{MAX_THREADS} WebSockets have threads (MAX_THREADS).")
            if wants_request:
                args["request"] = request
            where = f"{request.fullpath!a} of {request.remote_addr}"

            def begin(c: Any, close: Callable) -> Callable:
                ws = WebSocket(c, close, limits, *agreed, is_client=False)
                if is_async:
                    ws.task = ws.loop.create_task(run_handler(ws, handler, args, where))
                else:
                    threading.Thread(target=copy_context().run, daemon=True,
                                     args=(run_blocking, ws, handler, args, where)).start()
                return ws.go_away

            environ["minibottle.upgrade"].append(begin)
            return HTTPResponse("", 101, headers[1:])  # the server adds Connection

        app.route(rule, "GET", handshake, **{"websocket": handler, **(route or {})})
        return handler
    return decorator


async def run_handler(ws: WebSocket, handler: Callable, args: dict, where: str) -> None:
    code = 1011
    try:
        await handler(ws, **args)
        code = 1000
    except asyncio.CancelledError:
        code = 1001
        raise
    except Exception as error:
        note_failure(ws, error, where)
    finally:
        ws.say_goodbye(code)


def note_failure(ws: WebSocket, error: Exception, where: str) -> None:
    """Log what a handler has raised, unless it only says that its WebSocket has ended."""
    if ws.state == OPEN or not is_end(error):
        log.error("the handler of a WebSocket failed: %s", where, exc_info=error)


def is_end(error: Any) -> bool:
    """Does it say that a WebSocket has ended? So does a task group's that has no other in it."""
    parts = getattr(error, "exceptions", ())
    return isinstance(error, (WebSocketClosed, WebSocketError)) or (
        bool(parts) and all(map(is_end, parts)))


threads: Set[WebSocket] = set()  # whose handlers are on them


class BlockingWebSocket:
    """A WebSocket for a plain function: what is awaited elsewhere, waits here."""

    def __init__(self, ws: WebSocket) -> None:
        self.ws = ws

    def wait(self, steps: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(steps, self.ws.loop).result()

    def receive(self, timeout: Optional[float] = None) -> Union[str, bytes]:
        """Raises asyncio.TimeoutError when nothing comes in so many seconds."""
        return self.wait(asyncio.wait_for(self.ws.receive(), timeout))

    def __iter__(self) -> Iterator[Union[str, bytes]]:
        try:
            while True:
                yield self.wait(self.ws.__anext__())
        except StopAsyncIteration:
            pass

    def __getattr__(self, name: str) -> Any:
        """send(), send_json(), receive_json(), ping(), close(); request, code and the like."""
        found = getattr(self.ws, name)
        if not callable(found):
            return found
        return lambda *args, **named: self.wait(found(*args, **named))


def run_blocking(ws: WebSocket, handler: Callable, args: dict, where: str) -> None:
    threads.add(ws)
    code = 1011
    try:
        handler(BlockingWebSocket(ws), **args)
        code = 1000
    except Exception as error:
        note_failure(ws, error, where)
    finally:
        threads.discard(ws)
        ws.loop.call_soon_threadsafe(ws.say_goodbye, code)


# === 5. The client ============================================================

@asynccontextmanager
async def connect_websocket(url: str, *, headers: Optional[Mapping[str, str]] = None,
                            timeout: float = 10.0, tls: Optional[ssl.SSLContext] = None,
                            **options: Any) -> AsyncIterator[WebSocket]:
    """async with connect_websocket("wss://example.org/chat") as ws: ... Closed at the end.

    `timeout`: seconds until it is open. `tls`: if not the system's trust. `options`: see Options.
    Raises OSError (TimeoutError) where nobody answers, WebSocketError for a refusal.
    """
    limits = Options(**options)
    opening = Opening(url, headers or {}, timeout, tls, limits)
    try:
        # a second more: the thread's own timeout tells more, and leaves nothing behind
        connection, *agreed = await asyncio.wait_for(asyncio.wrap_future(opening), timeout + 1.0)
    except (asyncio.CancelledError, asyncio.TimeoutError) as error:
        opening.give_up()
        if isinstance(error, asyncio.CancelledError):
            raise
        raise TimeoutError(f"{hide(url)} is not open within {timeout} s") from None
    ws = WebSocket(connection, lambda c: c.sock.close(), limits, *agreed)
    try:
        yield ws
    finally:
        await ws.close()


class Opening(Future):
    """What open_websocket() gives, on a thread of its own: the loop's few are for others."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.socks: List[Any] = []  # the last one is in use
        threading.Thread(target=self.run, args=args, daemon=True).start()

    def run(self, *args: Any) -> None:
        made = failure = None
        try:
            made = open_websocket(self.keep, *args)
        except Exception as error:
            failure = error
        if not self.set_running_or_notify_cancel():
            if made:
                made[0].sock.close()
        elif failure:
            self.set_exception(failure)
        else:
            self.set_result(made)

    def keep(self, sock: Any) -> None:
        self.socks.append(sock)
        if self.cancelled():
            raise TimeoutError("nobody waits for it any more")

    def give_up(self) -> None:
        """The thread may be reading from a server that sends byte by byte: that ends now."""
        if not self.cancel() and not self.exception():  # it has just been opened
            self.result()[0].sock.close()
        for sock in self.socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def open_websocket(keep: Callable, url: str, headers: Mapping[str, str], timeout: float,
                   tls: Optional[ssl.SSLContext], limits: Options) -> tuple:
    """-> (socket and what came after the head, subprotocol, Deflate). It waits, and gives each
    socket to keep() at once."""
    parts = urlsplit("" if re.search("[^!-~]", url) else url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ValueError(f"bad WebSocket URL {hide(url)!a}")
    is_tls = parts.scheme == "wss"
    where = parts.hostname, parts.port or (443 if is_tls else 80)
    key = b64encode(os.urandom(16)).decode("ascii")
    lines = format_request(parts, headers, request_websocket(
        key, limits.subprotocols, limits.deflate, limits.takeover))
    proxy = find_proxy("https" if is_tls else "http", *where)
    sock = socket.create_connection((proxy.hostname, proxy.port or 80) if proxy else where, timeout)
    try:
        keep(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if proxy:
            open_tunnel(sock, proxy, *where)
        if is_tls:
            tls = tls or ssl.create_default_context()
            sock = tls.wrap_socket(sock, server_hostname=where[0], do_handshake_on_connect=False)
            keep(sock)
            sock.do_handshake()
        with ask(sock, lines) as answer:
            agreed = check_accepted(answer.status, answer.headers, key, limits.subprotocols,
                                    limits.deflate)
            sock.setblocking(False)
            try:
                data = answer.fp.peek()
            except WOULD_BLOCK:
                data = b""
    except BaseException:
        sock.close()
        raise
    return SimpleNamespace(sock=sock, buf=data), *agreed


def format_request(parts: Any, headers: Mapping[str, str], upgrade: List[tuple]) -> List[str]:
    """The lines of the handshake."""
    fields = HeaderDict(headers)
    if parts.username:
        fields.setdefault("Authorization", format_basic(parts))
    lines = [f"GET {parts.path or '/'}{parts.query and '?' + parts.query} HTTP/1.1",
             "Host: " + parts.netloc.rpartition("@")[2],
             *map(": ".join, upgrade), *map(": ".join, fields.allitems())]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a line break in a header")
    return lines


def find_proxy(scheme: str, name: str, port: int) -> Any:
    """The URL's parts of http_proxy or https_proxy, None without one or for what is in no_proxy."""
    from urllib.request import getproxies, proxy_bypass
    found = getproxies().get(scheme)
    if not found or proxy_bypass(f"{name}:{port}"):
        return None
    parts = urlsplit(found if "://" in found else "http://" + found)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"a proxy is reached by http://, not by {hide(found)!a}")
    return parts


def open_tunnel(sock: Any, proxy: Any, name: str, port: int) -> None:
    """RFC 9110 9.3.6."""
    where = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    lines = [f"CONNECT {where} HTTP/1.1", "Host: " + where]
    if proxy.username:
        lines.append("Proxy-Authorization: " + format_basic(proxy))
    with ask(sock, lines, "CONNECT") as answer:
        if not 200 <= answer.status < 300:
            raise ConnectionRefusedError(f"the proxy answers {answer.status}")


@contextmanager
def ask(sock: Any, lines: List[str], method: str = "GET") -> Iterator[HTTPClientResponse]:
    """Send a request -> its answer, of which the head is read."""
    sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    with closing(HTTPClientResponse(sock, method=method)) as answer:
        try:
            answer.begin()
        except HTTPException as error:
            raise WebSocketError(1002, f"answered with no HTTP: {error!r:.99}") from None
        yield answer


def hide(url: str) -> str:
    """A URL for a message: without user and password."""
    return re.sub("//[^/?#]*@", "//", url)


def format_basic(parts: Any) -> str:
    """A URL's user and password -> "Basic QTpi" (RFC 7617)."""
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + b64encode(pair.encode()).decode("ascii")
