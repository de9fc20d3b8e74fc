"""Who uses a volume: one sandbox at a time, by the volume's id."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.common.errors import InvalidSpec, InvalidState
from agent.daemon.storage.volumes import VOLUME, Volumes
from tests.support.daemon_fakes import record, spec


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    made = Volumes(tmp_path / "volumes")
    made.open()
    return made


async def test_a_volume_has_one_user_at_a_time(volumes: Volumes) -> None:
    one, two = [await volumes.create("t", slug, 16 << 20) for slug in ("one", "two")]
    volumes.attach("sbx-1", (one.id,))
    volumes.attach("sbx-1", (one.id,))
    with pytest.raises(InvalidState, match="in use by sbx-1") as caught:
        volumes.attach("sbx-2", (two.id, one.id))
    assert caught.value.reason == "VOLUME_IN_USE"
    assert [volumes.user(each) for each in (one, two)] == ["sbx-1", ""]  # all or none
    with pytest.raises(InvalidState, match="end that first"):
        await volumes.delete("t", "one", VOLUME)
    with pytest.raises(InvalidSpec, match="root and be mounted"):
        volumes.attach("sbx-2", (two.id, two.id))
    for _ in range(2):
        volumes.detach("sbx-1")
    volumes.attach("sbx-2", (two.id, one.id))
    assert [volumes.user(each) for each in (one, two)] == ["sbx-2", "sbx-2"]


@pytest.mark.parametrize(
    ("root", "expected"),
    [("", ("vol-a", "vol-b")), ("snp-c", ("vol-a", "vol-b")), ("vol-c", ("vol-a", "vol-b", "vol-c"))],
)
def test_the_volumes_of_a_sandbox_are_those_that_it_writes_to(root: str, expected: tuple[str, ...]) -> None:
    kept = record(spec=spec(root=root, volumes=(("/a", "vol-a"), ("/b", "vol-b"))))
    assert kept.volume_ids == expected
