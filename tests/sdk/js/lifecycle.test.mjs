import assert from "node:assert/strict";
import { test } from "node:test";
import { Client, InvalidTokenError, Sandbox } from "@deno/sandbox";
import { create, memory, until } from "./common.mjs";

const client = new Client();
const listed = async (labels) => {
  const found = [];
  for await (const item of await client.sandboxes.list(labels ? { labels } : undefined)) found.push(item);
  return found;
};

test("create, list by labels, connect, kill", async () => {
  const sb = await create({ labels: { job: "x y", kind: "a" }, timeout: "5m" });
  assert.match(sb.id, /^sbx_[a-z]{3}_[0-9a-hjkmnp-z]{20}$/);
  const mine = await listed({ job: "x y" });
  assert.deepEqual(mine.map((item) => [item.id, item.status, item.labels.kind, item.region]), [[sb.id, "running", "a", "loc"]]);
  assert.ok(!Number.isNaN(new Date(mine[0].createdAt).getTime()));
  assert.deepEqual(await listed({ job: "none" }), []);
  await sb.close();
  await sb.closed;
  const again = await Sandbox.connect(sb.id);
  assert.equal(await again.sh`echo alive`.text(), "alive\n");
  await again.kill();
  await assert.rejects(Sandbox.connect(sb.id), (error) => error.status === 404);
  assert.deepEqual(await listed({ job: "x y" }), []);
});

test("a session's sandbox ends with its first client, and not with others", async () => {
  const first = await create({ labels: { session: "1" } });
  const second = await Sandbox.connect(first.id);
  await second.close();
  assert.equal(await first.sh`echo here`.text(), "here\n");
  const third = await Sandbox.connect(first.id);
  await first.close();
  await third.closed;
  await until(async () => (await listed({ session: "1" })).length === 0);
});

test("timeouts end a sandbox, extend moves the end", async () => {
  const short = await create({ timeout: "3s" });
  await short.closed;
  await assert.rejects(Sandbox.connect(short.id), (error) => error.status === 404);
  const session = await create();
  const end = await session.extendTimeout("2m");
  assert.ok(end > Date.now() + 60_000 && end <= Date.now() + 125_000, String(end));
  await session.close();
  await new Promise((resolve) => setTimeout(resolve, 1000));
  const kept = await Sandbox.connect(session.id); // it has an end of its own now
  assert.ok((await kept.extendTimeout("100m")) < Date.now() + 31 * 60_000);
  await kept.kill();
});

test("pending calls reject when the sandbox is killed", async () => {
  const sb = await create({ timeout: "5m" });
  const other = await Sandbox.connect(sb.id);
  const waiting = other.sh`sleep 100`.noThrow().then(() => "ended", (error) => error.constructor.name);
  await new Promise((resolve) => setTimeout(resolve, 300));
  await sb.kill();
  assert.equal(await waiting, "ConnectionClosedError");
});

test("two sandboxes in one process do not mix", async () => {
  const pair = await Promise.all([create(), create()]);
  const texts = await Promise.all(pair.flatMap((sb, index) =>
    Array.from({ length: 5 }, () => sb.sh`for i in 1 2 3; do echo ${"box" + index}; done`.text())
  ));
  texts.forEach((text, index) => assert.equal(text, `box${Math.floor(index / 5)}\n`.repeat(3)));
  await Promise.all(pair.map((sb) => sb.kill()));
});

test("twenty at once", async () => {
  const boxes = await Promise.all(Array.from({ length: 20 }, () => create({ memory: "768MiB" })));
  assert.equal(new Set(boxes.map((sb) => sb.id)).size, 20);
  const names = await Promise.all(boxes.map((sb) => sb.sh`hostname`.text()));
  assert.equal(new Set(names).size, 20);
  await Promise.all(boxes.map((sb) => sb.kill()));
});

test("what is refused", async () => {
  await assert.rejects(create({ token: "ddo_wrong" }), InvalidTokenError);
  await assert.rejects(create({ labels: { "bad key!": "x" } }), (error) => error.status === 400 && /label/.test(error.message));
  await assert.rejects(create({ allowNet: ["http://not a host"] }), (error) => error.status === 400);
  await assert.rejects(create({ env: { "A=B": "x" } }));
  await assert.rejects(Sandbox.connect("sbx_loc_00000000000000000000"), (error) => error.status === 404 && error.code === "SANDBOX_NOT_FOUND");
  await assert.rejects(Sandbox.create({ memory: "8GiB" }));
  const sb = await create();
  await assert.rejects(sb.deno.deploy("app", { entrypoint: "main.ts" }), /404|NOT_SUPPORTED/);
  await sb.kill();
  for (const call of [() => client.layers.get("x"), () => client.revisions.get("x"), () => client.apps.create({ slug: "x" })]) {
    const answer = await call().catch((error) => error);
    assert.ok(answer === null || answer.code === "NOT_SUPPORTED", String(answer));
  }
  const apps = client.apps.list();
  await assert.rejects(async () => { for await (const _ of await apps) break; }, (error) => error.status === 404 && error.code === "NOT_SUPPORTED");
});

test("options of the client: token, organization, endpoints, debug", async () => {
  const endpoint = process.env.DENO_SANDBOX_ENDPOINT;
  const sb = await create({
    token: process.env.DENO_DEPLOY_TOKEN, org: "tests", apiEndpoint: endpoint, sandboxEndpoint: () => endpoint, debug: false,
  });
  assert.equal(await sb.sh`echo ok`.text(), "ok\n");
  const again = await Sandbox.connect({ id: sb.id, sandboxEndpoint: endpoint, token: process.env.DENO_DEPLOY_TOKEN });
  await again.kill();
  await assert.rejects(create({ org: "others" }), (error) => error.code === "WRONG_ORG");
  const own = new Client({ token: process.env.DENO_DEPLOY_TOKEN, apiEndpoint: endpoint });
  assert.equal(await own.volumes.get("none"), null);
});

test("memory as number, and in other units", async () => {
  const sb = await Sandbox.create({ memory: 768 * 1024 * 1024 });
  assert.ok(await sb.sh`true`);
  await sb.kill();
  assert.equal(memory, "768MiB");
});
