"""Every error that the agent raises on purpose.

    AgentError
    |-- InvalidSpec          the request can never succeed as it stands
        |-- ConfigError      the settings are not valid
    |-- NotFound             no such sandbox, process, file, image
    |-- AlreadyExists        the name, id or path is taken
    |-- InvalidState         right request, wrong moment (AIP-216)
    |-- ResourceExhausted    the node has no room for it now
        |-- NodeDraining     the node takes no sandboxes any more
    |-- PermissionDenied     the caller may not, or the guest's kernel says EACCES/EPERM
    |-- DeadlineExceeded     it did not answer in time
    |-- GuestError           the guest answered, and what it did failed
    |-- GuestUnreachable     the link to the guest is gone or talks nonsense
    |-- VmmError             the virtual machine monitor failed
        |-- VmmUnsupported   it cannot do that
    |-- HostError            a resource of the host could not be made or removed
        |-- ImageDamaged     an image on the host is not what its manifest states

`reason` is the machine-readable word of google.rpc.ErrorInfo (AIP-193); the message says what to do.
`agent.daemon.rpc.status` holds the one table from these types to gRPC status codes.
"""

from __future__ import annotations

from typing import ClassVar


class AgentError(Exception):
    """An error with a message for people and a reason for programs.

    :param message: what happened and what to do about it, one or two sentences.
    :param reason: UPPER_SNAKE_CASE; the class's own default where omitted.
    :param metadata: short strings that a program may want (ids, limits, errno names).
    """

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = metadata


class InvalidSpec(AgentError):
    """The request can never be granted as it stands."""

    default_reason = "INVALID_SPEC"


class ConfigError(InvalidSpec):
    """The settings are not valid; the message names the setting and says what to write instead."""

    default_reason = "INVALID_CONFIG"


class NotFound(AgentError):
    """What the request names does not exist."""

    default_reason = "NOT_FOUND"


class AlreadyExists(AgentError):
    """What the request would make exists already."""

    default_reason = "ALREADY_EXISTS"


class InvalidState(AgentError):
    """The request is valid, but not in the state that its object is in."""

    default_reason = "INVALID_STATE"


class ResourceExhausted(AgentError):
    """The node, or a quota, has no room for the request now."""

    default_reason = "RESOURCE_EXHAUSTED"


class NodeDraining(ResourceExhausted):
    """The node is stopping; another one may have room."""

    default_reason = "NODE_DRAINING"


class PermissionDenied(AgentError):
    """The caller may not do this."""

    default_reason = "PERMISSION_DENIED"


class DeadlineExceeded(AgentError):
    """No answer within the time allowed."""

    default_reason = "DEADLINE_EXCEEDED"


class GuestError(AgentError):
    """The guest carried out the request and it failed there."""

    default_reason = "GUEST_ERROR"


class GuestUnreachable(AgentError):
    """The link to the guest is closed, silent, or broke the protocol."""

    default_reason = "GUEST_UNREACHABLE"


class VmmError(AgentError):
    """The virtual machine monitor could not start, stopped, or refused a command."""

    default_reason = "VMM_ERROR"


class VmmUnsupported(VmmError):
    """The virtual machine monitor, as it is set up here, cannot do that."""

    default_reason = "VMM_UNSUPPORTED"


class HostError(AgentError):
    """A host resource (namespace, tap, disk, directory) could not be made or removed."""

    default_reason = "HOST_ERROR"


class ImageDamaged(HostError):
    """A file of an image, or its manifest, is not what the build left; it must be built again."""

    default_reason = "IMAGE_DAMAGED"
