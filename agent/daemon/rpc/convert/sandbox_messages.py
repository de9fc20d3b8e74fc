"""Convert sandboxes, events, lifetimes, network policies and secrets to and from the messages of sandbox.proto."""

from __future__ import annotations

from collections.abc import Mapping

from agent.common.model import Lifetime, NetSpec, SecretSpec, State
from agent.common.policy.rules import parse_rules
from agent.daemon.rpc.convert.guest_values import printable
from agent.daemon.rpc.convert.times import duration, duration_s, timestamp
from agent.daemon.sandbox.state.events import Event, EventType
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.validation import check_value
from agent.daemon.storage.secrets.placeholder import new_placeholder
from sandboxd.v1 import sandbox_pb2

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


def lifetime_from(message: sandbox_pb2.Lifetime) -> Lifetime:
    """Return the lifetime of a sandbox, in seconds; None for each limit that the message does not set."""
    total_s = duration_s(message.duration) if message.HasField("duration") else None
    lease_s = duration_s(message.lease) if message.HasField("lease") else None
    idle_s = duration_s(message.idle_timeout) if message.HasField("idle_timeout") else None
    return Lifetime(total_s, lease_s, idle_s)


def net_spec_from(message: sandbox_pb2.NetworkPolicy, tenant: str) -> NetSpec:
    """Return the network policy of a request.

    :raises InvalidSpec: a rule cannot be parsed.
    """
    allow = parse_rules(message.allow.rules, "network.allow") if message.HasField("allow") else None
    return NetSpec(allow=allow, tenant=tenant, inspect=message.inspect)


def secrets_from(messages: Mapping[str, sandbox_pb2.Secret]) -> dict[str, tuple[SecretSpec, str]]:
    """Return (specification with a fresh placeholder, value) of each secret, by name.

    :raises InvalidSpec: a name, a value or a rule for hosts is not valid.
    """
    found = {}
    for name, message in sorted(messages.items()):
        check_value(name, message.value)
        secret = SecretSpec(
            name=name,
            hosts=parse_rules(message.hosts, f"the hosts of secret {name[:80]!r}"),
            placeholder=new_placeholder(message.value if message.keep_shape else ""),
            in_body=message.in_body,
            redact=not message.allow_reflection,
        )
        found[name] = (secret, message.value)
    return found


def _network(net: NetSpec) -> sandbox_pb2.NetworkPolicy:
    message = sandbox_pb2.NetworkPolicy(inspect=net.inspect)
    if net.allow is not None:
        message.allow.rules.extend(str(rule) for rule in net.allow)
        message.allow.SetInParent()
    return message


def _secret_info(secret: SecretSpec) -> sandbox_pb2.SecretInfo:
    return sandbox_pb2.SecretInfo(
        hosts=[str(rule) for rule in secret.hosts], placeholder=secret.placeholder, in_body=secret.in_body,
        allow_reflection=not secret.redact,
    )  # fmt: skip


def sandbox_message(record: Record, region: str) -> sandbox_pb2.Sandbox:
    """Return the message for a sandbox on a node of `region`."""
    spec = record.spec
    message = sandbox_pb2.Sandbox(
        id=record.id, state=STATES[record.state], image=spec.image, image_digest=f"sha256:{record.image_digest}",
        vcpus=spec.vcpu_count, memory_bytes=spec.memory_bytes, disk_bytes=spec.disk_bytes, labels=record.labels,
        create_time=timestamp(record.create_time), error=record.error, vmm=record.vmm, region=region,
        phases=[sandbox_pb2.Phase(name=name, duration=duration(time_s)) for name, time_s in record.phases],
        network=_network(record.net), tenant=record.net.tenant, denials=record.denials,
        root=spec.root, volumes=dict(spec.volumes), parent=record.parent,
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


def event_message(value: Event, region: str) -> sandbox_pb2.SandboxEvent:
    """Return the message for an event of `WatchSandboxes`."""
    message = sandbox_pb2.SandboxEvent(type=_EVENTS[value.type], time=timestamp(value.time), reason=value.reason)
    if value.record is not None:
        message.sandbox.CopyFrom(sandbox_message(value.record, region))
    if value.denial is not None:
        denial = value.denial
        message.denial.CopyFrom(
            sandbox_pb2.Denial(
                reason=denial.reason.value, host=printable(denial.host), port=denial.port, protocol=denial.protocol,
                count=denial.count,
            )
        )  # fmt: skip
    return message
