"""Parsing DNS questions and building answers. Pure. RFC 1035, 6891, 8914, 9460."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.svcbbase
import dns.rrset
from dns.rdtypes.svcbbase import ParamKey

from agent.common.policy.hosts import same_or_none

MAX_UDP_BYTES = 1232
ADDRESS_TYPES = frozenset({dns.rdatatype.A, dns.rdatatype.AAAA})
_SERVICE_TYPES = frozenset({dns.rdatatype.SVCB, dns.rdatatype.HTTPS})
# Types that are looked up for an allowed name. Others get an empty answer.
_OTHER_TYPES = frozenset(
    {
        dns.rdatatype.MX, dns.rdatatype.TXT, dns.rdatatype.SRV, dns.rdatatype.CAA, dns.rdatatype.NS,
        dns.rdatatype.SOA, dns.rdatatype.CNAME, dns.rdatatype.NAPTR, dns.rdatatype.TLSA, dns.rdatatype.SSHFP,
    }
)  # fmt: skip
LOOKED_UP = ADDRESS_TYPES | _SERVICE_TYPES | _OTHER_TYPES
# Keys for encrypted ClientHello, which would hide the server name, and addresses that no policy has checked. MANDATORY
# goes, too, since it could list these.
_REMOVED = frozenset({ParamKey.ECH, ParamKey.IPV4HINT, ParamKey.IPV6HINT, ParamKey.MANDATORY})


class MalformedMessage(Exception):
    """The message is not a question. `answer` is the response to send, if any."""

    def __init__(self, answer: bytes | None) -> None:
        super().__init__("malformed DNS message")
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Question:
    """A message with one question. `name` is normalised, None if it is not a host name; `text` is the name as sent."""

    message: dns.message.Message
    name: str | None
    text: str
    kind: dns.rdatatype.RdataType


def parse(data: bytes) -> Question:
    """Parse a message.

    :raises MalformedMessage: it is not a query with one question of class IN.
    """
    try:
        message = dns.message.from_wire(data)
    except (dns.exception.DNSException, ValueError, OverflowError):
        # No answer to a response or to less than a header; otherwise FORMERR with the same id.
        answer = data[:2] + b"\x80\x01" + bytes(8) if len(data) >= 12 and not data[2] & 0x80 else None
        raise MalformedMessage(answer) from None
    if message.flags & dns.flags.QR:
        raise MalformedMessage(None)
    if message.opcode() != dns.opcode.QUERY or len(message.question) != 1:
        code = dns.rcode.FORMERR if message.opcode() == dns.opcode.QUERY else dns.rcode.NOTIMP
        raise MalformedMessage(data[:2] + bytes([0x80 | (data[2] & 0x78), code]) + bytes(8))
    question = message.question[0]
    if question.rdclass != dns.rdataclass.IN:
        raise MalformedMessage(data[:2] + bytes([0x80, dns.rcode.REFUSED]) + bytes(8))
    text = question.name.to_text(omit_final_dot=True)
    return Question(message, same_or_none(text), text, question.rdtype)


def _response(question: Question, code: dns.rcode.Rcode) -> dns.message.Message:
    response = dns.message.make_response(question.message, recursion_available=True, our_payload=MAX_UDP_BYTES)
    response.set_rcode(code)
    return response


def refuse(question: Question, why: str, code: dns.rcode.Rcode = dns.rcode.NXDOMAIN) -> dns.message.Message:
    """Return a denial: NXDOMAIN with the reason as extended error (RFC 8914, "Prohibited").

    Not REFUSED: at that, resolvers of C libraries retry, and programs report a temporary failure.
    """
    response = _response(question, code)
    if question.message.edns >= 0:
        option = dns.edns.EDEOption(dns.edns.EDECode.PROHIBITED, why)
        response.use_edns(0, payload=MAX_UDP_BYTES, options=[option])
    return response


def empty(question: Question, code: dns.rcode.Rcode = dns.rcode.NOERROR) -> dns.message.Message:
    """Return a response without records."""
    return _response(question, code)


def with_addresses(question: Question, addresses: Iterable[str], ttl_s: float) -> dns.message.Message:
    """Return a response with these addresses as direct records of the name, without its aliases (CNAME)."""
    response = _response(question, dns.rcode.NOERROR)
    owner = question.message.question[0].name
    response.answer.append(dns.rrset.from_text_list(owner, int(ttl_s), "IN", question.kind, list(addresses)))
    return response


def with_records(question: Question, records: dns.rrset.RRset, ttl_s: float) -> dns.message.Message:
    """Return a response with these records, SVCB and HTTPS ones without parameters that would bypass the proxy."""
    response = _response(question, dns.rcode.NOERROR)
    owner = question.message.question[0].name
    cleaned = [_cleaned(record) if question.kind in _SERVICE_TYPES else record for record in records]
    response.answer.append(dns.rrset.from_rdata_list(owner, int(ttl_s), cleaned))
    return response


def _cleaned(record: dns.rdata.Rdata) -> dns.rdata.Rdata:
    assert isinstance(record, dns.rdtypes.svcbbase.SVCBBase)
    params = {key: value for key, value in record.params.items() if key not in _REMOVED}
    alpn = params.get(ParamKey.ALPN)
    if isinstance(alpn, dns.rdtypes.svcbbase.ALPNParam):  # HTTP/3 is QUIC, which is dropped
        kept = [protocol for protocol in alpn.ids if not protocol.startswith(b"h3")]
        params.pop(ParamKey.ALPN)
        if kept:
            params[ParamKey.ALPN] = dns.rdtypes.svcbbase.ALPNParam(kept)  # type: ignore[no-untyped-call]
        else:
            params.pop(ParamKey.NO_DEFAULT_ALPN, None)
    return type(record)(record.rdclass, record.rdtype, record.priority, record.target, params)


def to_wire(question: Question, response: dns.message.Message, *, udp: bool) -> bytes:
    """Serialize a response; over UDP, truncate it (TC) to the size that the client accepts."""
    if not udp:
        return response.to_wire(max_size=65535)
    payload = question.message.payload if question.message.edns >= 0 else 512
    limit = min(max(payload, 512), MAX_UDP_BYTES)
    try:
        return response.to_wire(max_size=limit)
    except dns.exception.TooBig:
        cut = _response(question, response.rcode())
        cut.flags |= dns.flags.TC
        return cut.to_wire(max_size=limit)
