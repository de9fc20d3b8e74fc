"""Between protobuf messages and the agent's own values. What guests send is hostile and checked here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from agent.common.errors import GuestUnreachable
from agent.common.model import Lifetime, NetSpec, SecretSpec, State
from agent.common.policy.rules import parse_rules
from agent.daemon.sandbox.capacity.node import NodeInfo, Resource
from agent.daemon.sandbox.state.events import Event, EventType
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.validation import check_value
from agent.daemon.sandbox.templates.files import Template
from agent.daemon.storage.images import Image
from agent.daemon.storage.secrets.placeholder import new_placeholder
from sandboxd.v1 import node_pb2, process_pb2, sandbox_pb2

STATES = {
    State.CREATING: sandbox_pb2.Sandbox.STATE_CREATING,
    State.RUNNING: sandbox_pb2.Sandbox.STATE_RUNNING,
    State.FAILED: sandbox_pb2.Sandbox.STATE_FAILED,
    State.LOST: sandbox_pb2.Sandbox.STATE_LOST,
    State.PAUSED: sandbox_pb2.Sandbox.STATE_PAUSED,
    State.SUSPENDED: sandbox_pb2.Sandbox.STATE_SUSPENDED,
    State.DELETING: sandbox_pb2.Sandbox.STATE_DELETING,
    State.DELETED: sandbox_pb2.Sandbox.STATE_DELETED,
}
STATE_OF = {number: state for state, number in STATES.items()}
_EVENTS = {
    EventType.SNAPSHOT: sandbox_pb2.SandboxEvent.TYPE_SNAPSHOT,
    EventType.CREATED: sandbox_pb2.SandboxEvent.TYPE_CREATED,
    EventType.UPDATED: sandbox_pb2.SandboxEvent.TYPE_UPDATED,
    EventType.DELETED: sandbox_pb2.SandboxEvent.TYPE_DELETED,
    EventType.SYNCED: sandbox_pb2.SandboxEvent.TYPE_SYNCED,
    EventType.DENIED: sandbox_pb2.SandboxEvent.TYPE_DENIED,
}


def timestamp(seconds: float) -> Timestamp:
    """Returns a timestamp of seconds since 1970, exact to the microsecond."""
    result = Timestamp()
    result.FromMicroseconds(round(seconds * 1e6))
    return result


def timestamp_ns(nanoseconds: int) -> Timestamp:
    """Returns a timestamp of nanoseconds since 1970."""
    seconds, nanos = divmod(nanoseconds, 10**9)
    return Timestamp(seconds=seconds, nanos=nanos)


def seconds(message: Timestamp) -> float:
    """Returns seconds since 1970, of a time outside of protobuf's own range, too: the caller checks it."""
    return message.seconds + message.nanos / 1e9


def duration(seconds: float) -> Duration:
    """Returns a duration, exact to the microsecond."""
    result = Duration()
    result.FromMicroseconds(round(seconds * 1e6))
    return result


def lifetime_from(message: sandbox_pb2.Lifetime) -> Lifetime:
    """Returns the lifetime that a message asks for."""
    duration_s = _seconds(message.duration) if message.HasField("duration") else None
    lease_s = _seconds(message.lease) if message.HasField("lease") else None
    idle_s = _seconds(message.idle_timeout) if message.HasField("idle_timeout") else None
    return Lifetime(duration_s, lease_s, idle_s)


def _seconds(value: Duration) -> float:
    return value.seconds + value.nanos / 1e9


def net_from(message: sandbox_pb2.NetworkPolicy, tenant: str) -> NetSpec:
    """Returns the network policy that a message asks for, its rules as they are kept. :raises InvalidSpec:"""
    allow = None
    if message.HasField("allow"):
        allow = tuple(str(rule) for rule in parse_rules(message.allow.rules, "network.allow"))
    return NetSpec(allow=allow, tenant=tenant, inspect=message.inspect)


def secrets_from(messages: Mapping[str, sandbox_pb2.Secret]) -> dict[str, tuple[SecretSpec, str]]:
    """Returns each secret that is asked for, with a fresh placeholder, and its value. :raises InvalidSpec:"""
    found = {}
    for name, message in sorted(messages.items()):
        check_value(name, message.value)
        secret = SecretSpec(
            name=name,
            hosts=tuple(str(rule) for rule in parse_rules(message.hosts, f"the hosts of secret {name[:80]!r}")),
            placeholder=new_placeholder(message.value if message.keep_shape else ""),
            in_body=message.in_body,
            redact=not message.allow_reflection,
        )
        found[name] = (secret, message.value)
    return found


def _network(net: NetSpec) -> sandbox_pb2.NetworkPolicy:
    message = sandbox_pb2.NetworkPolicy(inspect=net.inspect)
    if net.allow is not None:
        message.allow.rules.extend(net.allow)
        message.allow.SetInParent()
    return message


def _secret_info(secret: SecretSpec) -> sandbox_pb2.SecretInfo:
    return sandbox_pb2.SecretInfo(
        hosts=secret.hosts, placeholder=secret.placeholder, in_body=secret.in_body, allow_reflection=not secret.redact
    )


def sandbox(record: Record, region: str) -> sandbox_pb2.Sandbox:
    """Returns the message of a sandbox."""
    spec = record.spec
    message = sandbox_pb2.Sandbox(
        id=record.id, state=STATES[record.state], image=spec.image, image_digest=f"sha256:{record.image_digest}",
        vcpus=spec.vcpu_count, memory_bytes=spec.memory_bytes, disk_bytes=spec.disk_bytes, labels=record.labels,
        create_time=timestamp(record.create_time), error=record.error, vmm=record.vmm, region=region,
        phases=[sandbox_pb2.Phase(name=name, duration=duration(seconds)) for name, seconds in record.phases],
        network=_network(record.net), tenant=record.net.tenant, denials=record.denials,
        root=record.spec.root, volumes=dict(record.spec.volumes), parent=record.parent,
        secrets={secret.name: _secret_info(secret) for secret in record.secrets},
    )  # fmt: skip
    if spec.lifetime.duration_s is not None:
        message.lifetime.duration.CopyFrom(duration(spec.lifetime.duration_s))
    if spec.lifetime.lease_s is not None:
        message.lifetime.lease.CopyFrom(duration(spec.lifetime.lease_s))
    if spec.lifetime.idle_s is not None:
        message.lifetime.idle_timeout.CopyFrom(duration(spec.lifetime.idle_s))
    if record.expire_time is not None:
        message.expire_time.CopyFrom(timestamp(record.expire_time))
    return message


def event(value: Event, region: str) -> sandbox_pb2.SandboxEvent:
    """Returns the message of an event."""
    message = sandbox_pb2.SandboxEvent(type=_EVENTS[value.type], time=timestamp(value.time), reason=value.reason)
    if value.record is not None:
        message.sandbox.CopyFrom(sandbox(value.record, region))
    if value.denial is not None:
        denial = value.denial
        message.denial.CopyFrom(
            sandbox_pb2.Denial(
                reason=denial.reason.value, host=printable(denial.host), port=denial.port, protocol=denial.protocol,
                count=denial.count,
            )
        )  # fmt: skip
    return message


def image(value: Image, *, packages: bool = False) -> node_pb2.Image:
    """Returns the message of an image."""
    message = node_pb2.Image(
        name=value.name, digest=f"sha256:{value.digest}", size_bytes=value.size_bytes,
        kernel_version=value.kernel_version, min_memory_bytes=value.min_memory_bytes,
    )  # fmt: skip
    message.create_time.FromJsonString(value.created)
    if packages:
        message.packages.extend(f"{package.name}={package.version}" for package in value.packages)
    return message


def template(value: Template) -> node_pb2.Template:
    """Returns the message of a template."""
    shape = value.shape
    return node_pb2.Template(
        name=value.digest, image=value.image, image_digest=f"sha256:{shape.image_digest}", vcpus=shape.vcpu_count,
        ram_bytes=shape.memory_bytes, snapshot_key=shape.snapshot_key, size_bytes=value.size_bytes,
        create_time=timestamp(value.create_time), use_time=timestamp(value.last_used),
    )  # fmt: skip


def _resource(value: Resource) -> node_pb2.Resource:
    return node_pb2.Resource(
        total=value.total, allocatable=value.allocatable, allocated=value.allocated, used=value.used
    )


def node(info: NodeInfo, images: list[Image], version: str) -> node_pb2.Node:
    """Returns the message of the node."""
    return node_pb2.Node(
        name=info.name, version=version, region=info.region,
        state=node_pb2.Node.STATE_DRAINING if info.draining else node_pb2.Node.STATE_READY,
        state_reason=info.draining,
        vmm=info.vmm.name, vmm_version=info.vmm.version, accelerator=info.vmm.accelerator, vmm_reason=info.vmm.reason,
        cpu_millis=_resource(info.cpu), memory_bytes=_resource(info.memory), disk_bytes=_resource(info.disk),
        sandboxes=_resource(info.sandboxes), images=[image(value) for value in images], labels=info.labels,
        start_time=timestamp(info.start_time), kernel=info.kernel, cpu_model=info.cpu_model,
        degraded=info.degraded,
    )  # fmt: skip


# -- what guests say ---------------------------------------------------------------------------------------------------


def _bad(what: str) -> GuestUnreachable:
    return GuestUnreachable(f"the guest's answer is malformed: {what}", reason="GUEST_MALFORMED")


def guest_dict(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the object `name`. :raises GuestUnreachable: it is none."""
    value = values.get(name)
    if not isinstance(value, dict):
        raise _bad(name)
    return value


def guest_list(values: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the list of objects `name`. :raises GuestUnreachable: it is none."""
    value = values.get(name)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _bad(name)
    return value


def guest_int(values: Mapping[str, Any], name: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
    """Returns the number `name`. :raises GuestUnreachable: it is none, or out of range."""
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _bad(name)
    return value


def guest_float(values: Mapping[str, Any], name: str) -> float:
    """Returns the number `name`. :raises GuestUnreachable: it is none."""
    value = values.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e18 < value < 1e18:
        raise _bad(name)
    return float(value)


def guest_text(values: Mapping[str, Any], name: str) -> str:
    """Returns the text `name`; what is not UTF-8 (surrogates) is replaced. :raises GuestUnreachable: no text."""
    value = values.get(name)
    if not isinstance(value, str):
        raise _bad(name)
    return printable(value)


def printable(text: str) -> str:
    """Returns text that protobuf can carry: what was not UTF-8 in the guest becomes U+FFFD."""
    if text.isascii():
        return text
    try:
        return text.encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return text.encode(errors="replace").decode()


def exit_message(values: Mapping[str, Any]) -> process_pb2.Exit:
    """Returns how a process ended."""
    number = guest_int(values, "signal", 0, 64)
    message = process_pb2.Exit(
        signal=guest_text(values, "signal_name")[:32], signal_number=number, oom_killed=values.get("oom") is True
    )
    if not number:
        message.exit_code = guest_int(values, "code", 0, 255)
    return message


def process(values: Mapping[str, Any]) -> process_pb2.Process:
    """Returns the message of a process."""
    argv = values.get("argv")
    if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv):
        raise _bad("argv")
    message = process_pb2.Process(
        process_id=guest_int(values, "id"), pid=guest_int(values, "pid", 0, 1 << 30),
        argv=[printable(word) for word in argv], user=guest_text(values, "user"), cwd=guest_text(values, "cwd"),
        start_time=timestamp_ns(guest_int(values, "start_ns", 0, 1 << 62)), terminal=values.get("tty") is True,
    )  # fmt: skip
    if values.get("exit") is not None:
        message.exit.CopyFrom(exit_message(guest_dict(values, "exit")))
    return message


def system_process(values: Mapping[str, Any]) -> process_pb2.SystemProcess:
    """Returns one line of the guest's process table."""
    return process_pb2.SystemProcess(
        pid=guest_int(values, "pid", 0, 1 << 30), parent_pid=guest_int(values, "ppid", 0, 1 << 30),
        uid=guest_int(values, "uid", 0, (1 << 31) - 1), state=guest_text(values, "state")[:8],
        rss_bytes=guest_int(values, "rss"), command=guest_text(values, "command")[:4096],
        cpu_seconds=guest_float(values, "cpu_s"),
    )  # fmt: skip
