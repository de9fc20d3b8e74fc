"""What 0.1.0 kept as JSON beside its database is read as it was; what is damaged is refused, or made again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from agent.common.errors import HostError, NotFound
from agent.common.policy.secret import CaPair
from agent.daemon.sandbox.machine.vm_shape import Shape
from agent.daemon.sandbox.templates import files
from agent.daemon.sandbox.templates.files import TemplateDamaged
from agent.daemon.storage.secrets.vault import StoredSecrets, Vault
from agent.daemon.storage.volumes import Volume, Volumes

ID = "vol-0123456789abcdef"
VOLUME = (
    '{"id": "vol-0123456789abcdef", "slug": "data", "tenant": "acme", "capacity_bytes": 16777216, '
    '"create_time": 1790000000.25, "image": "default", "origin": ["snp-0123456789abcdef", "base"]}\n'
)
SHAPE = Shape("ab" * 32, 2, 1124073472, "quiet", "qemu 10", "vsock", 2)
# As json.dumps(..., indent=1, sort_keys=True) wrote it.
MANIFEST = """{
 "create_time": 1790000000.25,
 "files": {
  "ram": {
   "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
   "size_bytes": 1
  }
 },
 "image": "default",
 "schema": 1,
 "shape": {
  "cmdline": "quiet",
  "image_digest": "%s",
  "link": "vsock",
  "memory_bytes": 1124073472,
  "slots": 2,
  "snapshot_key": "qemu 10",
  "vcpu_count": 2
 }
}
""" % ("ab" * 32)


def volumes(tmp_path: Path, text: str) -> Volumes:
    directory = tmp_path / ID
    directory.mkdir()
    (directory / "facts.json").write_text(text)
    (directory / "disk.img").touch()
    found = Volumes(tmp_path)
    found.open()
    return found


def test_facts_of_a_volume(tmp_path: Path) -> None:
    expected = Volume(ID, "data", "acme", 16777216, 1790000000.25, "default", ("snp-0123456789abcdef", "base"))
    assert volumes(tmp_path, VOLUME).find("acme", "data", "vol-") == expected


def test_facts_without_origin(tmp_path: Path) -> None:
    text = VOLUME.replace('["snp-0123456789abcdef", "base"]', "null")
    assert volumes(tmp_path, text).find("acme", ID, "vol-").origin is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", VOLUME.replace("16777216", '"16M"'), VOLUME.replace('"slug"', '"slog"'),
     VOLUME.replace(', "base"', ""), VOLUME.replace("0123456789abcdef", "0000000000000000", 1), "[" * 100_000],
)  # fmt: skip
def test_a_damaged_volume_is_left_out_and_left_alone(tmp_path: Path, text: str) -> None:
    found = volumes(tmp_path, text)
    with pytest.raises(NotFound):
        found.find("acme", "data", "vol-")
    assert (tmp_path / ID / "facts.json").read_text() == text


@pytest.fixture
def template(tmp_path: Path) -> Path:
    (tmp_path / "ram").write_bytes(b"x")
    (tmp_path / "manifest.json").write_text(MANIFEST)
    return tmp_path


def test_the_manifest_of_a_template(template: Path) -> None:
    found = files.verify(template, SHAPE)
    assert (found.shape, found.image, found.create_time) == (SHAPE, "default", 1790000000.25)
    files.write_manifest(template, SHAPE, "default", 1790000000.25)
    assert (template / "manifest.json").read_text() == MANIFEST


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"schema": 1}', "[" * 100_000, MANIFEST.replace('"schema": 1', '"schema": 2'),
     MANIFEST.replace('"slots": 2', '"slots": "2"'), MANIFEST.replace('"vcpu_count"', '"cpus"'),
     MANIFEST.replace('"slots": 2', '"slots": 2, "numa": 1'), MANIFEST.replace('"ram"', '"rom"'),
     MANIFEST.replace('"ram"', '"r\\u0000m"'), MANIFEST.replace("1790000000.25", '"now"'),
     MANIFEST.replace('"size_bytes": 1', '"size_bytes": null')],
)  # fmt: skip
def test_a_damaged_manifest_of_a_template(template: Path, text: str) -> None:
    assert text != MANIFEST
    (template / "manifest.json").write_text(text)
    with pytest.raises(TemplateDamaged, match="manifest"):
        files.read(template)


def seal(directory: Path, text: bytes) -> Vault:
    vault = Vault(directory)
    vault.open()
    nonce = os.urandom(12)
    sealed = AESGCM((directory / "node.key").read_bytes()).encrypt(nonce, text, b"sbx-1")
    (directory / "sbx-1.sealed").write_bytes(nonce + sealed)
    return vault


async def test_sealed_values(tmp_path: Path) -> None:
    text = json.dumps({"values": {"KEY": "\u00e9"}, "ca": {"certificate_pem": "c", "key_pem": "k"}})
    assert await seal(tmp_path, text.encode()).get("sbx-1") == StoredSecrets({"KEY": "\u00e9"}, CaPair("c", "k"))
    text = json.dumps({"values": {"KEY": "v"}, "ca": None})
    assert await seal(tmp_path, text.encode()).get("sbx-1") == StoredSecrets({"KEY": "v"})


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff", b'{"values": {"KEY": 1}, "ca": null}', b'{"values": {}, "ca": {"key_pem": ""}}']
)
async def test_damaged_values(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(HostError, match="cannot be decrypted"):
        await seal(tmp_path, text).get("sbx-1")
