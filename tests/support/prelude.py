"""What probes in guests are written with, and what runs them there. Standard library alone."""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import subprocess
import time
import traceback
import urllib.error
import urllib.request

TIMEOUT_S = 8.0


def told(error):
    return f"{type(error).__name__}: {error}"


def connect(address, port, timeout=TIMEOUT_S):
    return socket.create_connection((address, port), timeout)


def tls(address, port=443, sni=None, send=b"", alpn=None, verify=True):
    """Returns what came back, or the error."""
    context = ssl.create_default_context()
    if not verify or sni is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(alpn)
    try:
        with connect(address, port) as sock, context.wrap_socket(sock, server_hostname=sni) as wrapped:
            return talk(wrapped, send) if send else "connected"
    except OSError as error:
        return told(error)


def talk(sock, send, pause=0.0):
    """Sends all (pieces of a list with pauses between them) and returns all that comes back."""
    data = b""
    try:
        for piece in send if isinstance(send, list) else [send]:
            sock.sendall(piece)
            time.sleep(pause)
        while piece := sock.recv(65536):
            data += piece
    except OSError as error:
        return (data.decode("latin-1") + f" <{told(error)}>") if data else told(error)
    return data.decode("latin-1")


def tcp(address, port, send, pause=0.0, timeout=TIMEOUT_S):
    try:
        with connect(address, port, timeout) as sock:
            return talk(sock, send, pause)
    except OSError as error:
        return told(error)


def request(host, path="/", headers=(), method="GET", body=b"", close=True):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers]
    if close:
        lines.append("Connection: close")
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def http(address, host, path="/", port=80, **rest):
    return tcp(address, port, request(host, path, **rest))


def https(address, host, path="/", port=443, sni=None, **rest):
    return tls(address, port, sni or host, request(host, path, **rest))


def fetch(url, headers=None, data=None, method=None):
    """Returns [status, body] as urllib has it, or the error."""
    try:
        asked = urllib.request.Request(url, headers=headers or {}, data=data, method=method)
        # A context of its own: urllib keeps its first one, and whom that trusts.
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S, context=ssl.create_default_context()) as answer:
            return [answer.status, answer.read().decode("latin-1")]
    except urllib.error.HTTPError as error:
        return [error.code, error.read().decode("latin-1")]
    except OSError as error:
        return told(error)


def resolve(name):
    try:
        return sorted({entry[4][0] for entry in socket.getaddrinfo(name, None)})
    except OSError as error:
        return told(error)


def dns_query(name, kind=1):
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.rstrip(".").split(".")) + b"\0"
    return os.urandom(2) + struct.pack(">HHHHH", 0x100, 1, 0, 0, 0) + labels + struct.pack(">HH", kind, 1)


def udp(address, port, data, wait=1.0):
    """Returns the answer, "" if none came, or the error."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(wait)
        try:
            sock.sendto(data, (address, port))
            return sock.recv(65535).decode("latin-1")
        except TimeoutError:
            return ""
        except OSError as error:
            return told(error)


def run(*argv, **env):
    """Returns [exit status, output and errors]."""
    done = subprocess.run(
        argv, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False
    )
    return [done.returncode, done.stdout.decode("latin-1")]


def frames(*raw):
    """Sends Ethernet frames as they are."""
    interface = next(name for name in os.listdir("/sys/class/net") if name != "lo")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((interface, 0))
        for frame in raw:
            sock.send(frame)


def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) // 2 * 2]))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source, target, payload, protocol=17, fragment=0, options=b""):
    size = 20 + len(options)
    head = struct.pack(
        ">BBHHHBBH4s4s", 0x40 | size // 4, 0, size + len(payload), 7, fragment, 64, protocol, 0,
        socket.inet_aton(source), socket.inet_aton(target),
    ) + options  # fmt: skip
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def ipv6(source, target, payload, following=17):
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    return struct.pack(">IHBB", 6 << 28, len(payload), following, 255) + addresses + payload


def udp_segment(port, data=b"x"):
    return struct.pack(">HHHH", 4000, port, 8 + len(data), 0) + data


def serve(port):
    """Runs the code that each connection brings, as the body of a function, and answers with what it returns."""
    server = socket.create_server(("127.0.0.1", port))
    while True:
        connection, _ = server.accept()
        with connection:
            code = b""
            while piece := connection.recv(65536):
                code += piece
            scope = dict(globals())
            try:
                exec(code.decode(), scope)
                result = {"result": scope["work"]()}
            except BaseException:
                result = {"error": traceback.format_exc()}
            connection.sendall(json.dumps(result, default=lambda value: value.decode("latin-1")).encode())
