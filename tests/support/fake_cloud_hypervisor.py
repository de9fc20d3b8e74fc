"""Cloud Hypervisor as far as its driver sees it, in a script: for tests on hosts without the program or KVM.

It keeps requests in $FAKE_REQUESTS, and $FAKE_FAULT makes it misbehave.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time

FAULT = os.environ.get("FAKE_FAULT", "")
STATES = {"vm.boot": "Running", "vm.restore": "Running", "vm.pause": "Paused", "vm.resume": "Running"}


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def read(sock: socket.socket) -> tuple[str, bytes]:
    """Returns the name of a call and its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")), 0)
    while len(body) < length:
        body += sock.recv(65536)
    return head.split()[1].decode().removeprefix("/api/v1/"), body


def report(event: str) -> None:
    text = json.dumps({"timestamp": {"secs": 0, "nanos": 0}, "source": "vm", "event": event, "properties": None})
    os.write(int(option("--event-monitor").removeprefix("fd=")), text.encode() + b"\n\n")


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print("cloud-hypervisor v53.0")
        return
    if FAULT == "exits":
        sys.exit("no /dev/kvm here")
    state = "Created"
    listener = socket.socket(fileno=int(option("--api-socket").removeprefix("fd=")))
    while True:
        sock, _ = listener.accept()
        name, body = read(sock)
        with open(os.environ["FAKE_REQUESTS"], "ab") as file:
            file.write(name.encode() + b" " + body + b"\n")
        if name == FAULT:
            sys.exit(f"died of {name}")
        status, answer = 204, b""
        state = STATES.get(name, state)
        if name == "vmm.ping":
            version = "54.0.0" if FAULT == "version" else "53.0.0"
            status, answer = 200, json.dumps({"version": version}).encode()
        elif name == "vm.info":
            status, answer = 200, json.dumps({"config": {}, "state": state}).encode()
        elif name == f"{FAULT}!":
            status, answer = 500, b'["Error from API", "no"]'
        elif name == "vm.boot":
            os.write(1, b"hello from the guest\n")
        elif name == "vm.power-button":
            report("rebooting")
        elif name == "vm.restore" and FAULT != "silent":
            report("restored")
            report("resumed")
        elif name == "vm.snapshot":
            directory = json.loads(body)["destination_url"].removeprefix("file://")
            names = ["config.json", "state.json"] + ["memory-ranges"] * (FAULT == "ranges")
            for file_name in names:
                with open(f"{directory}/{file_name}", "x") as file_:
                    file_.write("{}")
        sock.sendall(b"HTTP/1.1 %d \r\nContent-Length: %d\r\n\r\n" % (status, len(answer)) + answer)
        sock.close()
        time.sleep(0)


if __name__ == "__main__":
    main()
