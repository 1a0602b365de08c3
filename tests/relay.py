"""A way to a server that can be cut: what a caller sees of a service that goes away and comes back."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Relay:
    """Passes bytes on while it is open; a cut breaks every connection and refuses new ones."""

    url: str
    port: int
    _open: threading.Event = field(default_factory=threading.Event)
    _sockets: list[socket.socket] = field(default_factory=list)

    def lead_to(self, port: int) -> None:
        """Breaks every connection; new ones go to another port."""
        self.port = port
        with self.cut():
            pass

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        self._open.clear()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        try:
            yield
        finally:
            self._open.set()


@contextlib.contextmanager
def relay_to(port: int) -> Iterator[Relay]:
    """Relays a free port of 127.0.0.1 to another one."""
    listener = socket.create_server(("127.0.0.1", 0))
    relay = Relay(f"http://127.0.0.1:{listener.getsockname()[1]}", port)
    relay._open.set()

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                if not relay._open.is_set():
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", relay.port))
                relay._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=copy, args=pair, daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield relay
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        for one in relay._sockets:
            one.close()
