"""What a thread has the region receive: bytes of a pipe, datagrams of other threads, the plain text of a connection.

Lives here: those steps, and a thread's own TLS connection.  Not here: stores by any other call (hands.py).
Invariant: what a call that failed has not taken is there for the next one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
from typing import Any

from histories import words
from histories.hands import FAILED
from histories.holding import Holding
from histories.plan import Step, steps_of
from histories.stage import reserved_pair
from histories.words import PAGE, WORD

SECONDS = 3.0  # for what was sent to be there


class Connection:
    """Both ends of one, in this thread; without certificates, so that there are no files of them."""

    def __init__(self) -> None:
        here, there = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        here.check_hostname, here.verify_mode = False, ssl.CERT_NONE
        one, other = reserved_pair(socket.SOCK_STREAM)
        for end, context in ((one, there), (other, here)):
            end.setblocking(False)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
        self.sender = there.wrap_socket(one, server_side=True, do_handshake_on_connect=False)
        self.receiver = here.wrap_socket(other, do_handshake_on_connect=False)
        ends = [self.receiver, self.sender]
        while ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                ends[0].do_handshake()
                ends.pop(0)
                continue
            ends.reverse()
        self.receiver.settimeout(SECONDS)
        self.unread: int | None = None  # a value that was sent

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


def connect() -> Connection | None:
    """None: this OpenSSL makes no connection without certificates."""
    with contextlib.suppress(ssl.SSLError):
        return Connection()
    return None


class Receiving(Holding):
    """Descriptors and sockets that are read into the region."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connection = connect() if "tls" in steps_of(self.actor.plan) else None

    def do_readinto(self, step: Step) -> None:
        """A value by a pipe."""
        value = self.next_value()
        at, timeout, region = self.hot[step["at"]] * PAGE + WORD * self.cell, step["timeout"], self.on.region
        reading, writing = self.pipe
        with contextlib.suppress(BlockingIOError):  # what one that failed has left
            os.read(reading, PAGE)
        os.write(writing, struct.pack("@Q", value))
        arguments = (step["at"], "readinto", value, self.cell, timeout)
        number, result, ended = self.do(
            words.READINTO, arguments, lambda: region.readinto(reading, at, WORD, timeout=timeout)
        )
        if result is not FAILED:
            self.log.end(number, words.OK, result, at=ended)

    def do_send(self, step: Step) -> None:
        """Datagrams for another thread, each a value that nobody else stores."""
        ways = self.actor.ways
        to = step["to"] % len(ways)
        for _ in range(step["count"]):
            value = self.next_value()
            number = self.log.begin(words.SEND, self.on.participant, to, value)
            try:
                ways[to].send(struct.pack("@Q", value), socket.MSG_DONTWAIT)
                self.log.end(number, words.OK)
            except (BlockingIOError, ConnectionError):
                self.log.end(number, words.GONE)

    def do_receive(self, step: Step) -> None:
        """The next datagram, which is looked at first, into the own cell."""
        if self.actor.is_child:
            return
        way = self.actor.own_ways[self.slot]
        try:
            value = struct.unpack("@Q", way.recv(WORD, socket.MSG_PEEK | socket.MSG_DONTWAIT))[0]
        except BlockingIOError:
            return
        self._recv_into(way, "recv_into", value, step)

    def _recv_into(self, source: socket.socket, means: str, value: int, step: Step) -> bool:
        """False: it failed."""
        at, timeout, region = self.hot[step["at"]] * PAGE + WORD * self.cell, step["timeout"], self.on.region
        arguments = (step["at"], means, value, self.cell, timeout)
        number, result, ended = self.do(
            words.RECEIVE, arguments, lambda: region.recv_into(source, at, WORD, timeout=timeout)
        )
        if result is not FAILED:
            self.log.end(number, words.OK, result, at=ended)
        return result is not FAILED

    def do_tls(self, step: Step) -> None:
        """The next value of the connection, which is sent first unless one is there that no call has taken."""
        connection = self.connection
        if connection is None or self.actor.is_child:
            return
        if connection.unread is None:
            connection.unread = self.next_value()
            connection.sender.send(struct.pack("@Q", connection.unread))
        caught = self.actor.caught
        if self._recv_into(connection.receiver, "tls", connection.unread, step):
            connection.unread = None
        elif self.actor.caught != caught:  # nobody knows whether it has it
            connection.close()
            self.connection = None if "descriptors" in self.actor.extras else connect()
