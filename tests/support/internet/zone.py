"""The names and addresses of the test internet."""

from __future__ import annotations

UPLINK4, INTERNET4 = "44.0.0.2", "44.0.0.1"
UPLINK6, INTERNET6 = "2a0a:ffff::2", "2a0a:ffff::1"
RESOLVER = "45.0.0.53"
WEB, WEB6 = "45.0.0.10", "2a0a:1::10"
API = "45.0.0.11"
EVIL = "45.0.0.66"
METADATA = "169.254.169.254"
PRIVATE = "10.1.2.3"

# What each name is answered with; an alias where the value is a name.
ZONE: dict[str, list[str] | str] = {
    "web.example": [WEB, WEB6],
    "other.example": [WEB, WEB6],  # a second customer of the same CDN address
    "api.example": [API],
    "second-api.example": [API],
    "evil.example": [EVIL],
    "sub.web.example": ["45.0.0.12"],
    "a.b.web.example": ["45.0.0.12"],
    "xn--bcher-kva.example": ["45.0.0.13"],
    "six.example": ["2a0a:1::14"],
    "private.example": [PRIVATE],
    "meta.example": [METADATA],
    "loop.example": ["127.0.0.1"],
    "uplink.example": [UPLINK4],
    "mapped.example": ["::ffff:10.1.2.3"],
    "cname-private.example": "internal.example",
    "internal.example": ["10.1.2.4"],
    "mixed.example": [WEB, "10.0.0.1"],
    "cdn.example": "edge.cdn-net.example",
    "edge.cdn-net.example": [WEB],
    "ssh.example": ["45.0.0.20"],
    "smtp.example": ["45.0.0.21"],
    "grpc.example": ["45.0.0.22"],
    "raw.example": ["45.0.0.23"],
    "proxy.example": ["45.0.0.24"],
    "badcert.example": ["45.0.0.25"],
    "git.example": [WEB],
    "closed.example": ["45.0.0.26"],
}
REBINDING = "rebind.example"  # each lookup of it: a public address once, then a private one
REBINDING_ADDRESSES = ("45.0.0.15", PRIVATE)
SERVICE = "web.example"  # has an HTTPS record, with an encrypted hello's key and hints to a private address
ECH_KEY = b"\x00\x04test"
CERTIFIED = [name for name in ZONE if name not in ("badcert.example",)] + [REBINDING, "evil.example"]
HTTP_PORTS, HTTPS_PORTS = (80, 8080), (443, 8443)
GRPC_PORT, RAW_PORT, PROXY_PORT, SSH_PORT, SMTP_PORT, ECHO_PORT = 50051, 9443, 3128, 22, 25, 7000
