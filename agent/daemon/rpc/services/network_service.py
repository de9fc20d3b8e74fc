"""Serve NetworkService (network.proto)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from agent.common.aio import cancel_and_wait
from agent.common.errors import AgentError, GuestUnreachable, InvalidSpec
from agent.common.telemetry import STREAM_BYTES
from agent.daemon.guestlink.stream import CallStream
from agent.daemon.rpc.convert.guest_values import guest_int, guest_text
from agent.daemon.rpc.services.streams import first_message, recv_or_fail
from agent.daemon.sandbox.service import SandboxService
from guest.wire import Frame
from sandboxd.v1 import network_pb2 as pb
from sandboxd.v1 import network_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_OUT = STREAM_BYTES.labels("dial", "from_guest")
_IN = STREAM_BYTES.labels("dial", "to_guest")


class NetworkServicer(network_pb2_grpc.NetworkServiceServicer):
    """Servicer of NetworkService, over the links to the guests."""

    def __init__(self, sandboxes: SandboxService) -> None:
        self._sandboxes = sandboxes

    async def Dial(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.DialRequest], context: Context
    ) -> AsyncIterator[pb.DialResponse]:
        """See network.proto."""
        first = await first_message(request_iterator, "open")
        op, params = _target(first.open)
        channel = self._sandboxes.channel(first.open.sandbox_id)
        async with channel.stream(op, **params) as stream:
            feeder = asyncio.create_task(_feed(stream, request_iterator))
            try:
                while (frame := await recv_or_fail(stream, feeder)) is not None:
                    if frame[0] is Frame.DATA:
                        _OUT.inc(len(frame[1]))
                        yield pb.DialResponse(data=frame[1])
                    elif frame[0] is Frame.EVENT:
                        yield pb.DialResponse()
                    elif frame[0] is Frame.EOF:
                        yield pb.DialResponse(eof=True)
            finally:
                await cancel_and_wait(feeder)

    async def WaitForListener(  # noqa: N802
        self, request: pb.WaitForListenerRequest, context: Context
    ) -> pb.Listener:
        """See network.proto."""
        channel = self._sandboxes.channel(request.sandbox_id)
        found = await channel.call("proc.listener", timeout_s=None, id=request.process_id)
        return pb.Listener(host=guest_text(found, "host"), port=guest_int(found, "port", 1, 65535))

    async def GetCertificateAuthority(  # noqa: N802
        self, request: pb.GetCertificateAuthorityRequest, context: Context
    ) -> pb.CertificateAuthority:
        """See network.proto."""
        return pb.CertificateAuthority(certificate_pem=await self._sandboxes.ca_certificate(request.sandbox_id))


def _target(opened: pb.DialRequest.Open) -> tuple[str, dict[str, object]]:
    """Return the guest's operation and its parameters.

    :raises InvalidSpec: neither a process alone nor a valid host and port.
    """
    if opened.process_id and not opened.port and not opened.host:
        return "proc.channel", {"id": opened.process_id}
    if opened.process_id or not 1 <= opened.port <= 65535 or len(opened.host) > 255 or "\0" in opened.host:
        raise InvalidSpec(f"cannot dial port {opened.port}; give a port from 1 to 65535, or a process_id alone")
    return "net.dial", {"host": opened.host or "127.0.0.1", "port": opened.port}


async def _feed(stream: CallStream, requests: AsyncIterator[pb.DialRequest]) -> None:
    """Send the client's bytes to the guest.

    :raises AgentError: a message is not valid; the guest's call is ended first.
    """
    try:
        async for request in requests:
            if request.data:
                _IN.inc(len(request.data))
                await stream.send(Frame.DATA, request.data)
        await stream.send_eof()
    except GuestUnreachable:
        return  # recv_or_fail reports it
    except AgentError:
        stream.end()
        raise
