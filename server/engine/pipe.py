"""Messages through a pipe, written and read without ever waiting for the process at the other end.

Invariants:
- messages arrive whole and in order; what the pipe does not take at once is kept and written when it does, so a process
  that has stopped reading costs memory but never the event loop's time;
- what is sent after the other end has gone is lost: the end of that process's own pipe tells of it;
- a message that has arrived in part is kept until the rest is there: its length and its body are two writes if it is
  long, and a longer one than the pipe holds comes in pieces.

The frames are those of `multiprocessing.connection.Connection`: a length of four bytes, then the pickle.
"""

from __future__ import annotations

import asyncio
import os
import struct
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

_HEADER = struct.Struct("!i")


class PipeWriter:
    """One event loop's."""

    def __init__(self, connection: Connection) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._unsent = bytearray()
        os.set_blocking(connection.fileno(), False)

    def send(self, message: Any) -> None:
        if self._connection.closed:
            return
        body = ForkingPickler.dumps(message)
        is_waiting = bool(self._unsent)
        self._unsent += _HEADER.pack(len(body)) + body
        if not is_waiting:
            self._write()
            if self._unsent:
                self._loop.add_writer(self._connection.fileno(), self._write)

    def close(self) -> None:
        """Give up what is unsent."""
        self._forget()
        self._connection.close()

    def _write(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: os.write(self._connection.fileno(), self._unsent)]
        except BlockingIOError:
            return
        except OSError:  # the reader is gone
            pass
        self._forget()

    def _forget(self) -> None:
        self._unsent.clear()
        if not self._connection.closed:
            self._loop.remove_writer(self._connection.fileno())


class PipeReader:
    """The other direction, for a loop that tells when there is something to read."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._frame = bytearray()
        os.set_blocking(connection.fileno(), False)  # as uvloop does with all that it watches

    def receive(self) -> Any | None:
        """The next message, or None if it is not whole yet. Raises EOFError when the other end has gone."""
        while (missing := self._missing()) > 0:
            try:
                chunk = os.read(self._connection.fileno(), missing)
            except BlockingIOError:
                return None
            if not chunk:
                raise EOFError
            self._frame += chunk
        message = ForkingPickler.loads(memoryview(self._frame)[_HEADER.size :])
        self._frame = bytearray()
        return message

    def _missing(self) -> int:
        """Bytes to read until the length is known, then until the message is whole."""
        if len(self._frame) < _HEADER.size:
            return _HEADER.size - len(self._frame)
        (size,) = _HEADER.unpack_from(self._frame)
        return int(size) + _HEADER.size - len(self._frame)
