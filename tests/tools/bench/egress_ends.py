"""Both ends of the egress benchmark, each a process in its own namespace:
`python -m tests.tools.bench.egress_ends ...`.

Plain sockets and threads, so that as little as can be is theirs of what is measured.
"""

from __future__ import annotations

import json
import socket
import ssl
import statistics
import sys
import threading
import time

BYTE_PORT, STREAM_PORT, TLS_PORT = 7001, 7002, 7443
_PIECE = bytes(1 << 20)


def _bytes(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := sock.recv(64):
        sock.sendall(data)


def _stream(sock: socket.socket) -> None:
    """Sends as many bytes as the first line asks for."""
    left = int(sock.makefile("rb").readline())
    while left > 0:
        sock.sendall(_PIECE[:left])
        left -= len(_PIECE)


def _web(sock: socket.socket) -> None:
    """Answers GET /<bytes> with so many bytes."""
    head = b""
    while b"\r\n\r\n" not in head:
        if not (piece := sock.recv(65536)):
            return
        head += piece
    left = int(head.split()[1].decode().strip("/"))
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % left)
    while left > 0:
        sock.sendall(_PIECE[:left])
        left -= len(_PIECE)


def serve(certificate: str, key: str) -> None:
    """Serves for ever, each connection in a thread."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def one(sock: socket.socket, handler: object) -> None:
        with sock:
            try:
                if handler is _web:
                    sock = context.wrap_socket(sock, server_side=True)
                handler(sock)  # type: ignore[operator]
            except OSError:
                return

    def accept(port: int, handler: object) -> None:
        server = socket.create_server(("0.0.0.0", port), backlog=1024)
        while True:
            sock, _ = server.accept()
            threading.Thread(target=one, args=(sock, handler), daemon=True).start()

    for port, handler in ((BYTE_PORT, _bytes), (STREAM_PORT, _stream), (TLS_PORT, _web)):
        threading.Thread(target=accept, args=(port, handler), daemon=True).start()
    print("ready", flush=True)
    threading.Event().wait()


def connections(address: str, count: int) -> dict[str, float]:
    """Connects again and again, with one byte there and back: milliseconds for each, and how many in a second."""
    times = []
    start = time.perf_counter()
    for _ in range(count):
        begin = time.perf_counter()
        with socket.create_connection((address, BYTE_PORT)) as sock:
            sock.sendall(b"x")
            sock.recv(1)
        times.append((time.perf_counter() - begin) * 1000)
    return {"ms": statistics.median(times), "per_s": count / (time.perf_counter() - start)}


def round_trips(address: str, count: int) -> dict[str, float]:
    """One byte there and back on one connection: milliseconds."""
    times = []
    with socket.create_connection((address, BYTE_PORT)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            begin = time.perf_counter()
            sock.sendall(b"x")
            sock.recv(1)
            times.append((time.perf_counter() - begin) * 1000)
    return {"ms": statistics.median(times)}


def stream(address: str, size: int) -> dict[str, float]:
    """Receives a stream: MiB per second."""
    with socket.create_connection((address, STREAM_PORT)) as sock:
        sock.sendall(b"%d\n" % size)
        return _received(sock, size)


def web(address: str, name: str, ca_file: str, size: int) -> dict[str, float]:
    """Receives an HTTPS answer: MiB per second."""
    context = ssl.create_default_context(cafile=ca_file)
    with (
        socket.create_connection((address, TLS_PORT)) as plain,
        context.wrap_socket(plain, server_hostname=name) as sock,
    ):
        sock.sendall(f"GET /{size} HTTP/1.1\r\nHost: {name}:{TLS_PORT}\r\nX-Key: none\r\n\r\n".encode())
        return _received(sock, size)


def _received(sock: socket.socket, size: int) -> dict[str, float]:
    buffer = bytearray(1 << 20)
    got = sock.recv_into(buffer)
    start = time.perf_counter()
    while got < size and (count := sock.recv_into(buffer)):
        got += count
    if got < size:
        raise SystemExit(f"{got} bytes of {size} came")
    return {"mib_s": got / (1 << 20) / (time.perf_counter() - start)}


def main() -> None:
    """Runs the end that the words name and prints what it measured."""
    what, *words = sys.argv[1:]
    if what == "serve":
        serve(*words)
    elif what == "web":
        print(json.dumps(web(words[0], words[1], words[2], int(words[3]))))
    else:
        measure = {"connections": connections, "round_trips": round_trips, "stream": stream}[what]
        print(json.dumps(measure(words[0], int(words[1]))))


if __name__ == "__main__":
    main()
