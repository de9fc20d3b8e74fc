import assert from "node:assert/strict";
import { after, test } from "node:test";
import { Client, Sandbox, Snapshot, Volume } from "@deno/sandbox";
import { create } from "./common.mjs";

const client = new Client();
const region = "loc";
const collect = async (pages) => {
  const found = [];
  for await (const item of await pages) found.push(item);
  return found;
};
after(async () => {
  for (const item of await collect(client.snapshots.list())) await client.snapshots.delete(item.id);
  for (const item of await collect(client.volumes.list())) await client.volumes.delete(item.id);
});

test("create, get, list, search, paginate, delete", async () => {
  const made = await client.volumes.create({ slug: "one", region, capacity: "300MB" });
  assert.equal(made.capacity, 300_941_312); // rounded up to 1 MiB
  assert.deepEqual([made.slug, made.region, made.isBootable, made.baseSnapshot], ["one", region, false, null]);
  assert.ok(made.estimatedAllocatedSize < 20e6 && made.estimatedFlattenedSize >= 0);
  assert.equal((await client.volumes.get("one")).id, made.id);
  assert.equal((await Volume.get(made.id)).slug, "one");
  assert.equal(await client.volumes.get("none"), null);
  await Volume.create({ slug: "two", region, capacity: 400_000_000 });
  await client.volumes.create({ slug: "three", region, capacity: "1GiB" });
  assert.deepEqual((await collect(client.volumes.list())).map((item) => item.slug).sort(), ["one", "three", "two"]);
  assert.deepEqual((await collect(client.volumes.list({ limit: 1 }))).length, 3);
  assert.deepEqual((await collect(client.volumes.list({ search: "t" }))).map((item) => item.slug).sort(), ["three", "two"]);
  for (const slug of ["one", "two", "three"]) await client.volumes.delete(slug);
  assert.equal(await client.volumes.get("one"), null);
  await assert.rejects(client.volumes.delete("one"), (error) => error.status === 404);
});

test("what is refused", async () => {
  await client.volumes.create({ slug: "taken", region, capacity: "300MB" });
  const refused = (options, status, code) =>
    assert.rejects(client.volumes.create({ slug: "other", region, capacity: "300MB", ...options }), (error) => {
      assert.deepEqual([error.status, error.code], [status, code], error.message);
      return true;
    });
  await refused({ slug: "taken" }, 409, "SLUG_IN_USE");
  for (const slug of ["x", "-ab", "ab-", "ab--c", "UPPER", "a".repeat(33)]) await refused({ slug }, 400, "INVALID_SLUG");
  await refused({ capacity: "100MB" }, 400, "INVALID_CAPACITY");
  await refused({ capacity: "21GiB" }, 400, "INVALID_CAPACITY");
  await refused({ region: "ams" }, 400, "REGION_NOT_AVAILABLE");
  await refused({ from: "no-such-snapshot" }, 404, "SNAPSHOT_NOT_FOUND");
  await assert.rejects(create({ volumes: { "/data": "absent" } }), (error) => error.status === 404);
  await assert.rejects(create({ volumes: { "/proc/x": "taken" } }), (error) => error.status === 400);
  await assert.rejects(create({ root: "taken" }), (error) => error.code === "VOLUME_NOT_BOOTABLE");
  await client.volumes.delete("taken");
});

test("a volume is mounted, keeps its files, and is one sandbox's at a time", async () => {
  await client.volumes.create({ slug: "data", region, capacity: "300MB" });
  const first = await create({ volumes: { "/data/one": "data" } });
  await first.fs.writeTextFile("/data/one/file", "kept");
  assert.match(await first.sh`df --output=target /data/one/file`.text(), /\/data\/one/);
  await assert.rejects(create({ volumes: { "/data": "data" } }), (error) => error.code === "VOLUME_IN_USE");
  await assert.rejects(client.volumes.delete("data"), (error) => error.code === "VOLUME_IN_USE");
  await assert.rejects(client.volumes.snapshot("data", { slug: "early" }), (error) => error.code === "VOLUME_IN_USE");
  await first.kill();
  const second = await create({ volumes: { "/home/app/data": "data" } });
  assert.equal(await second.fs.readTextFile("/home/app/data/file"), "kept");
  await second.kill();
});

test("snapshots, and volumes made of them", async () => {
  const made = await client.volumes.snapshot("data", { slug: "data-then" });
  assert.deepEqual([made.slug, made.volume.slug, made.isBootable], ["data-then", "data", false]);
  assert.equal((await Snapshot.get("data-then")).id, made.id);
  assert.equal(await client.snapshots.get("none"), null);
  assert.deepEqual((await collect(client.snapshots.list({ search: "then" }))).map((item) => item.id), [made.id]);
  const copy = await client.volumes.create({ slug: "copy", region, capacity: "1GB", from: "data-then" });
  assert.equal(copy.baseSnapshot.slug, "data-then");
  const sb = await create({ volumes: { "/mnt/copy": "copy", "/mnt/data": "data" } });
  assert.equal(await sb.fs.readTextFile("/mnt/copy/file"), "kept");
  const size = Number((await sb.sh`df -B1 --output=size /mnt/copy | tail -1`.text()).trim());
  assert.ok(size > 800_000_000, `the file system grew with its volume: ${size}`);
  await sb.kill();
  await client.volumes.delete("copy");
  await client.snapshots.delete("data-then");
  assert.equal(await client.snapshots.get("data-then"), null);
  await client.volumes.delete("data");
});

test("a volume as root keeps what is installed, a snapshot as root forgets", async () => {
  const volume = await client.volumes.create({ slug: "system", region, capacity: "2GB", from: "builtin:debian-13" });
  assert.ok(volume.isBootable);
  const first = await create({ root: "system" });
  await first.sh`echo installed | sudo tee /usr/local/bin/thing > note`;
  await first.kill();
  const snapshot = await client.volumes.snapshot("system", { slug: "system-1" });
  assert.ok(snapshot.isBootable);
  const boxes = await Promise.all([1, 2].map(() => create({ root: "system-1" })));
  for (const sb of boxes) {
    assert.equal(await sb.sh`cat /usr/local/bin/thing note`.text(), "installed\ninstalled\n");
    await sb.fs.writeTextFile("note", "changed");
  }
  await Promise.all(boxes.map((sb) => sb.kill()));
  const again = await create({ root: "system-1" });
  assert.equal(await again.fs.readTextFile("note"), "installed\n");
  await again.kill();
  const root = await create({ root: "system" });
  assert.equal(await root.fs.readTextFile("/usr/local/bin/thing"), "installed\n");
  assert.match(await root.sh`hostname`.text(), /^sbx-/);
  await root.kill();
  await client.snapshots.delete("system-1");
  await client.volumes.delete("system");
});
