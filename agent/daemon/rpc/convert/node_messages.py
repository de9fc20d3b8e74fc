"""Convert the node, its images and its templates to the messages of node.proto."""

from __future__ import annotations

from agent.daemon.rpc.convert.times import timestamp
from agent.daemon.sandbox.capacity.node import NodeInfo, Resource
from agent.daemon.sandbox.templates.files import Template
from agent.daemon.storage.images import Image
from sandboxd.v1 import node_pb2


def image_message(value: Image, *, packages: bool = False) -> node_pb2.Image:
    """Return the message for an image, with its list of Debian packages if `packages` is true."""
    message = node_pb2.Image(
        name=value.name, digest=f"sha256:{value.digest}", size_bytes=value.size_bytes,
        kernel_version=value.kernel_version, min_memory_bytes=value.min_memory_bytes,
    )  # fmt: skip
    message.create_time.FromJsonString(value.created)
    if packages:
        message.packages.extend(f"{package.name}={package.version}" for package in value.packages)
    return message


def template_message(value: Template) -> node_pb2.Template:
    """Return the message for a template."""
    shape = value.shape
    return node_pb2.Template(
        name=value.digest, image=value.image, image_digest=f"sha256:{shape.image_digest}", vcpus=shape.vcpu_count,
        ram_bytes=shape.memory_bytes, snapshot_key=shape.snapshot_key, size_bytes=value.size_bytes,
        create_time=timestamp(value.create_time), use_time=timestamp(value.last_used),
    )  # fmt: skip


def node_message(info: NodeInfo, images: list[Image], version: str) -> node_pb2.Node:
    """Return the message for the node.

    :param version: of the agent.
    """
    return node_pb2.Node(
        name=info.name, version=version, region=info.region,
        state=node_pb2.Node.STATE_DRAINING if info.draining else node_pb2.Node.STATE_READY,
        state_reason=info.draining,
        vmm=info.vmm.name, vmm_version=info.vmm.version, accelerator=info.vmm.accelerator, vmm_reason=info.vmm.reason,
        cpu_millis=_resource(info.cpu), memory_bytes=_resource(info.memory), disk_bytes=_resource(info.disk),
        sandboxes=_resource(info.sandboxes), images=[image_message(value) for value in images], labels=info.labels,
        start_time=timestamp(info.start_time), kernel=info.kernel, cpu_model=info.cpu_model,
        degraded=info.degraded,
    )  # fmt: skip


def _resource(value: Resource) -> node_pb2.Resource:
    return node_pb2.Resource(
        total=value.total, allocatable=value.allocatable, allocated=value.allocated, used=value.used
    )
