import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { after, before, test } from "node:test";
import { create } from "./common.mjs";

// The internet of these tests has web.example and others, see tests/support/internet.
const value = "sk-real-value-0123456789";
const digest = createHash("sha256").update(value).digest("hex");
let sb;
before(async () => {
  sb = await create({
    allowNet: ["web.example", "*.web.example:443", "api.example"],
    secrets: { KEY: { hosts: ["api.example"], value } },
    port: 3000,
    ssh: true,
  });
});
after(() => sb.kill());

test("options port and ssh", () => {
  assert.match(sb.url, /^https:\/\/[a-z0-9]+\.localhost/);
  assert.match(sb.ssh.username, /^[a-z0-9]{25}$/);
  assert.equal(typeof sb.ssh.hostname, "string");
});

test("fetch reaches what is allowed, and nothing else", async () => {
  const answer = await sb.fetch("https://web.example/headers", { headers: { "x-a": "1" } });
  assert.equal(answer.status, 200);
  assert.match(await answer.text(), /x-a/i);
  const plain = await sb.fetch("http://web.example/headers");
  assert.equal(plain.status, 200);
  await assert.rejects(sb.fetch("https://evil.example/"), TypeError);
  await assert.rejects(sb.fetch("http://10.1.2.3/"), TypeError);
  await assert.rejects(sb.fetch("http://169.254.169.254/latest"), TypeError);
  await assert.rejects(sb.fetch("https://nowhere.example/"), TypeError);
});

test("fetch: methods, bodies, redirects", async () => {
  const posted = await sb.fetch("https://web.example/echo", { method: "POST", body: "x".repeat(100_000) });
  assert.equal(posted.status, 200);
  assert.equal((await posted.text()).length, 100_000);
  const followed = await sb.fetch("https://web.example/redirect?to=/headers");
  assert.equal(followed.status, 200);
  const manual = await sb.fetch("https://web.example/redirect?to=/headers", { redirect: "manual" });
  assert.equal(manual.status, 302);
  assert.match(manual.headers.get("location"), /headers/);
  await assert.rejects(sb.fetch("https://web.example/redirect?to=https://evil.example/"), TypeError);
  const head = await sb.fetch("https://web.example/headers", { method: "HEAD" });
  assert.equal(head.status, 200);
  assert.equal(await head.text(), "");
  const large = await sb.fetch("https://web.example/stream?n=5000000");
  assert.equal((await large.arrayBuffer()).byteLength, 5_000_000);
  const dropped = await sb.fetch("https://web.example/stream?n=50000000");
  // Without an Error the SDK throws if it heard of the stream before it looked at the answer, and never cancels it.
  await dropped.body.cancel(new Error("enough"));
  const controller = new AbortController();
  const slow = sb.fetch("https://web.example/slow?pause=30", { signal: controller.signal });
  setTimeout(() => controller.abort(), 200);
  await assert.rejects(slow, (error) => error.name === "AbortError");
});

test("a secret is a placeholder inside, and its value at the approved host", async () => {
  const seen = (await sb.sh`echo $KEY`.text()).trim();
  assert.notEqual(seen, value);
  assert.ok(seen.length > 0);
  await sb.fs.writeTextFile("ask.sh", 'curl -sS --fail -H "x-key: $KEY" https://api.example/digest');
  assert.equal((await sb.sh`bash ask.sh`.text()).trim(), digest);
  const fetched = await sb.fetch("https://api.example/digest", { headers: { "x-key": seen } });
  assert.equal(await fetched.text(), digest);
  const elsewhere = await sb.fetch("https://web.example/digest", { headers: { "x-key": seen } });
  assert.equal(await elsewhere.text(), createHash("sha256").update(seen).digest("hex"));
});

test("a sandbox without an allow list reaches the internet, one with an empty list nothing", async () => {
  const open = await create();
  const closed = await create({ allowNet: [] });
  try {
    assert.equal((await open.fetch("https://evil.example/")).status, 200);
    await assert.rejects(closed.fetch("https://web.example/"), TypeError);
    await assert.rejects(async () => await closed.sh`curl -sS --max-time 5 https://web.example/`);
  } finally {
    await Promise.all([open.kill(), closed.kill()]);
  }
});
