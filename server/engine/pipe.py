"""Writes messages for the other end of a pipe without ever waiting for it.

Invariants:
- messages arrive whole and in order; what the pipe does not take at once is kept and written when it does, so a process
  that has stopped reading costs memory but never the event loop's time;
- what is sent after the other end has gone is lost: the end of that process's own pipe tells of it.
"""

from __future__ import annotations

import asyncio
import os
import struct
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any


class PipeWriter:
    """One event loop's. The frames are those of `Connection.recv`: a length of four bytes, then the pickle."""

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
        self._unsent += struct.pack("!i", len(body)) + body
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
