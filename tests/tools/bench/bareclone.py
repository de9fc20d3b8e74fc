"""What a create costs at least: a script that restores a template, asks its guest for the same, and has no agent.

It uses the agent's command line of the VMM, so that both start the same machine, and the guest's own modules for the
link. Namespace and disk are made before the clock starts.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.common.config.loading import load
from agent.common.config.paths import Paths
from agent.common.model import new_sandbox_id
from agent.daemon.host.syscalls import enter_netns
from agent.daemon.host.tap import attach
from agent.daemon.network.kernel import namespaces
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.sandbox.machine.vm_plan import TemplateMemory, VmPlan, vm_spec
from agent.daemon.sandbox.machine.vm_shape import DATA_DISK
from agent.daemon.sandbox.templates import files
from agent.daemon.storage.disks import DiskMaker
from agent.daemon.storage.images import ImageStore
from agent.daemon.vmm.driver import VmSpec
from agent.daemon.vmm.qemu.qemu_args import device_args, machine_args
from guest import wire
from guest.wire import Frame, FrameReader
from guest.yamux import YamuxSession
from tests.support import leaks
from tests.support.daemon import Daemon
from tests.tools.bench.qmp import Qmp

_NAMES = ("link", "console", "qmp")
_DISK_BYTES = 1 << 30
_TIMEOUT_S = 60.0


class _Guest:
    """The link, a call at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        nonce = os.urandom(wire.NONCE_BYTES)
        sock.sendall(wire.SYNC_REQUEST + nonce)
        received = bytearray()
        while wire.find_sync(received, wire.SYNC_REPLY) != nonce:
            received += sock.recv(1 << 16)
        self._session = YamuxSession(client=True, write=sock.sendall, on_stream=None)

    def call(self, op: str, until: int, **fields: object) -> bytes:
        """Returns the first frame of the kind `until`."""
        stream = self._session.open()
        stream.send(wire.pack_json(Frame.REQUEST, {"op": op, **fields}))
        reader = FrameReader(stream)
        while True:
            while (frame := reader.next()) is not None:
                if frame[0] == until:
                    return frame[1]
                if frame[0] == Frame.ERROR:
                    raise SystemExit(f"the guest refuses {op}: {frame[1]!r}")
            self._session.feed(self._sock.recv(1 << 16))


class BareClone:
    """Clones of the template that a daemon has made for one CPU."""

    def __init__(self, daemon: Daemon) -> None:
        self._settings = load(None, daemon.env)
        self._paths = Paths.of(self._settings)
        found = (files.read(path.parent) for path in self._paths.templates.glob("*/manifest.json"))
        self._template = next(one for one in found if one.shape.vcpu_count == 1)
        self._image = ImageStore(self._settings.images.images_dir).get(self._template.image)

    async def run(self) -> dict[str, float]:
        """Returns the milliseconds of each step, and their total, from the spawn to the program's first byte."""
        sandbox_id = new_sandbox_id()
        directory = leaks.make_directory()
        try:
            await namespaces.make(sandbox_id)
            await DiskMaker(directory).make_disk(directory / "disk", _DISK_BYTES)
            spec = self._spec(sandbox_id, directory)
            return await asyncio.to_thread(self._run, spec, directory)
        finally:
            await namespaces.remove(sandbox_id)
            shutil.rmtree(directory)

    def _spec(self, sandbox_id: str, directory: Path) -> VmSpec:
        template = self._template
        memory = TemplateMemory(template.ram, template.vmm)
        spec = vm_spec(VmPlan(sandbox_id, template.shape, self._image, memory), self._paths)
        root, data = spec.disks
        data = dataclasses.replace(data, path=directory / "disk")
        return dataclasses.replace(spec, disks=(root, data), run_dir=directory)

    def _run(self, spec: VmSpec, directory: Path) -> dict[str, float]:
        times = [time.perf_counter()]
        with _vmm(spec, directory) as sockets:
            self._restore(Qmp(sockets["qmp"]), spec)
            times.append(time.perf_counter())
            guest = _Guest(sockets["link"])
            times.append(time.perf_counter())
            guest.call("sys.configure", Frame.RESULT, **_configuration(spec.id))
            times.append(time.perf_counter())
            first = guest.call("proc.exec", Frame.STDOUT, argv=["/bin/echo", "hi"], env={}, stdin="null", replay=0)
            times.append(time.perf_counter())
        assert first == b"hi\n"
        steps = [(after - before) * 1000 for before, after in itertools.pairwise(times)]
        return {**dict(zip(("vmm", "answer", "configure", "echo"), steps, strict=True)), "total": sum(steps)}

    def _restore(self, qmp: Qmp, spec: VmSpec) -> None:
        capabilities = [{"capability": "x-ignore-shared", "state": True}]
        qmp.execute("migrate-set-capabilities", capabilities=capabilities)
        qmp.execute("migrate-incoming", uri=f"file:{self._template.vmm / 'state'}")
        while qmp.execute("query-migrate").get("status") != "completed":
            time.sleep(0.001)
        qmp.execute("cont")
        qmp.execute("block_resize", node_name=f"d-{DATA_DISK}", size=_DISK_BYTES)


def _configuration(name: str) -> dict[str, object]:
    entropy = base64.b64encode(os.urandom(64)).decode()
    return {
        "entropy": entropy, "time_ns": time.time_ns(), "hostname": name, "machine_id": os.urandom(16).hex(),
        "env": {}, "data_disk_serial": DATA_DISK, "data_disk_bytes": _DISK_BYTES, **guest_setup.NETWORK,
    }  # fmt: skip


@contextmanager
def _vmm(spec: VmSpec, directory: Path) -> Iterator[dict[str, socket.socket]]:
    """Spawns QEMU in the namespace; gives the connected sockets."""
    listeners = {name: socket.socket(socket.AF_UNIX) for name in _NAMES}
    for name, listener in listeners.items():
        listener.bind(str(directory / name))
        listener.listen()
    fds = {name: listener.fileno() for name, listener in listeners.items()}
    started: list[subprocess.Popen[bytes]] = []

    def spawn() -> None:  # a thread of its own: it stays in the namespace
        enter_netns(str(spec.netns))
        tap = attach(str(spec.nic.tap)) if spec.nic is not None else None
        devices = device_args(spec, fds["link"], fds["console"], fds["qmp"], None, tap)
        argv = ["qemu-system-x86_64", *machine_args(spec, "tcg"), *devices]
        passed = [*fds.values(), *([] if tap is None else [tap])]
        started.append(subprocess.Popen(argv, pass_fds=passed, stdout=subprocess.DEVNULL))
        if tap is not None:
            os.close(tap)

    thread = threading.Thread(target=spawn)
    thread.start()
    thread.join()
    connected = {name: socket.socket(socket.AF_UNIX) for name in _NAMES}
    try:
        for name, sock in connected.items():
            sock.settimeout(_TIMEOUT_S)
            sock.connect(str(directory / name))
            listeners[name].close()
        yield connected
    finally:
        for process in started:
            process.kill()
            process.wait()
        for sock in connected.values():
            sock.close()
