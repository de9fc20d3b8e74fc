"""Install the supported release of Cloud Hypervisor: over HTTPS, verified by digest, atomically."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import ssl
import threading
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO

from agent.common.atomic_file import replacement
from agent.common.errors import InvalidSpec, VmmError
from agent.daemon.vmm.cloud_hypervisor.binary import MAJOR_VERSION, NAME

URL = (
    f"https://github.com/cloud-hypervisor/cloud-hypervisor/releases/download/v{MAJOR_VERSION}.0/cloud-hypervisor-static"
)
_MAX_BYTES = 128 << 20
_READ_BYTES = 1 << 20
_READ_TIMEOUT_S = 30.0


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to HTTPS only."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        try:
            _require_https(newurl)
        except InvalidSpec:
            fp.close()  # urllib closes it only for redirects that it follows
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_https(url: str) -> None:
    if not url.lower().startswith("https://"):
        raise InvalidSpec(f"{NAME} is only downloaded over HTTPS, not from {url}")


async def install(tools_dir: Path, sha256: str, url: str = URL, *, context: ssl.SSLContext | None = None) -> Path:
    """Download the binary into `tools_dir` unless it is there already; return its path.

    :param sha256: expected digest of the binary, in hexadecimal, from a trusted source. There is no default.
    :param context: certificates to trust; None: the system's.
    :raises InvalidSpec: the digest is malformed, or the URL is not HTTPS.
    :raises VmmError: the download failed (DOWNLOAD_FAILED) or has another digest (DIGEST_MISMATCH). Nothing is left.
    """
    if re.fullmatch(r"[0-9a-fA-F]{64}", sha256) is None:
        raise InvalidSpec(
            f"installing {NAME} needs the SHA-256 digest of the release, in 64 hexadecimal digits: give --sha256, or "
            "set vmm.download_sha256"
        )
    _require_https(url)
    target = tools_dir / NAME
    cancelled = threading.Event()
    work = asyncio.ensure_future(asyncio.to_thread(_install, target, sha256.lower(), url, context, cancelled))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        cancelled.set()
        await asyncio.wait({work})  # the thread ends after at most one more read, and removes its file
        with contextlib.suppress(Exception):
            work.result()
        raise
    return target


def _install(target: Path, sha256: str, url: str, context: ssl.SSLContext | None, cancelled: threading.Event) -> None:
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacement(target, mode=0o755, durable=True) as draft:
            found = _download(url, context, draft.file, cancelled)
            if found != sha256:
                raise VmmError(f"{url} has the SHA-256 digest {found}, not {sha256}", reason="DIGEST_MISMATCH")
    except (OSError, HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # the error is the open response, too
        raise VmmError(f"cannot download {url}: {error}", reason="DOWNLOAD_FAILED") from error


def _download(url: str, context: ssl.SSLContext | None, file: IO[bytes], cancelled: threading.Event) -> str:
    digest, size = hashlib.sha256(), 0
    https = urllib.request.HTTPSHandler(context=context or ssl.create_default_context())
    opener = urllib.request.build_opener(_HttpsOnly(), https)
    with opener.open(url, timeout=_READ_TIMEOUT_S) as answer:
        stated = answer.headers.get("Content-Length")
        while data := answer.read(_READ_BYTES):
            size += len(data)
            if cancelled.is_set() or size > _MAX_BYTES:
                raise VmmError(f"the download of {url} was given up after {size} bytes", reason="DOWNLOAD_FAILED")
            digest.update(data)
            file.write(data)
    if stated is not None and stated != str(size):
        raise VmmError(f"{url} broke off after {size} of {stated} bytes", reason="DOWNLOAD_FAILED")
    return digest.hexdigest()
