"""Define the errors that the programs raise on purpose.

    AgentError
    |-- InvalidSpec          the request can never succeed as it stands
        |-- ConfigError      the settings are not valid
    |-- NotFound             no such sandbox, process, file, image
    |-- AlreadyExists        the name, id or path is taken
    |-- InvalidState         not possible in the object's present state (AIP-216)
    |-- ResourceExhausted    no capacity on the node now, or a quota is used up
        |-- NodeDraining     the node accepts no new sandboxes
    |-- PermissionDenied     the caller is not allowed to, or the guest's kernel reports EACCES/EPERM
    |-- DeadlineExceeded     no answer in time
    |-- GuestError           the operation failed in the guest
    |-- GuestUnreachable     the link to the guest is closed, or the guest breaks the protocol
    |-- VmmError             the virtual machine monitor failed
        |-- VmmUnsupported   the monitor cannot do this operation
    |-- HostError            a resource of the host could not be created or removed
        |-- ImageDamaged     an image differs from its manifest

`reason` is the machine-readable reason of google.rpc.ErrorInfo (AIP-193); the message says what to do.
`agent.daemon.rpc.status` has the table from these types to gRPC status codes.
"""

from __future__ import annotations

from typing import ClassVar


class AgentError(Exception):
    """An error with a message for people and a reason for programs.

    :param message: what happened and what to do about it, one or two sentences.
    :param reason: UPPER_SNAKE_CASE; default: `default_reason` of the class.
    :param metadata: short strings for programs (ids, limits, errno names).
    """

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = metadata


class InvalidSpec(AgentError):
    """The request can never succeed as it stands."""

    default_reason = "INVALID_SPEC"


class ConfigError(InvalidSpec):
    """The settings are not valid; the message names the setting and says what to write instead."""

    default_reason = "INVALID_CONFIG"


class NotFound(AgentError):
    """The object of the request does not exist."""

    default_reason = "NOT_FOUND"


class AlreadyExists(AgentError):
    """An object with this name, id or path exists already."""

    default_reason = "ALREADY_EXISTS"


class InvalidState(AgentError):
    """The request is valid, but not possible in the present state of its object."""

    default_reason = "INVALID_STATE"


class ResourceExhausted(AgentError):
    """The node has no capacity for the request now, or a quota is used up."""

    default_reason = "RESOURCE_EXHAUSTED"


class NodeDraining(ResourceExhausted):
    """The node is draining and accepts no new sandboxes; try another node."""

    default_reason = "NODE_DRAINING"


class PermissionDenied(AgentError):
    """The caller is not allowed to do this."""

    default_reason = "PERMISSION_DENIED"


class DeadlineExceeded(AgentError):
    """No answer within the time allowed."""

    default_reason = "DEADLINE_EXCEEDED"


class GuestError(AgentError):
    """The operation failed in the guest."""

    default_reason = "GUEST_ERROR"


class GuestUnreachable(AgentError):
    """The link to the guest is closed or does not answer, or the guest broke the protocol."""

    default_reason = "GUEST_UNREACHABLE"


class VmmError(AgentError):
    """The virtual machine monitor did not start, ended, or refused a command."""

    default_reason = "VMM_ERROR"


class VmmUnsupported(VmmError):
    """The virtual machine monitor, as configured on this node, cannot do this operation."""

    default_reason = "VMM_UNSUPPORTED"


class HostError(AgentError):
    """A resource of the host (namespace, TAP, disk, directory) could not be created or removed."""

    default_reason = "HOST_ERROR"


class ImageDamaged(HostError):
    """A file of an image, or its manifest, was changed after the build; the image must be built again."""

    default_reason = "IMAGE_DAMAGED"
