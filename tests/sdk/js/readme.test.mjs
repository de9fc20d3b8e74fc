// The examples of the SDK's own README, with local endpoints and a test internet in the place of the real ones.
import assert from "node:assert/strict";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { Writable } from "node:stream";
import { test } from "node:test";
import { Sandbox, SandboxCommandError } from "@deno/sandbox";
import { get, memory } from "./common.mjs";

const options = { memory };

test("quick start, snippets, output, quoting, errors, files", async () => {
  await using sandbox = await Sandbox.create(options);
  await sandbox.sh`ls -lh /`;
  assert.equal(await sandbox.deno.eval(`
    const a = 1;
    const b = 2;
    a + b;
  `), 3);
  assert.equal(await sandbox.sh`pwd`.text(), "/home/sandbox\n");
  const filename = "file with spaces.txt";
  const content = "Hello, world!";
  await sandbox.sh`echo ${content} > ${filename}`;
  await sandbox.sh`touch file1.txt file2.txt file3.txt`;
  const files = ["file1.txt", "file2.txt", "file3.txt"];
  await sandbox.sh`rm ${files}`;
  assert.equal((await sandbox.sh`echo '{"count": 42}'`.json()).count, 42);
  try {
    await sandbox.sh`exit 42`;
    assert.fail("it must throw");
  } catch (error) {
    assert.ok(error instanceof SandboxCommandError);
    assert.equal(error.code, 42);
  }
  const result = await sandbox.sh`exit 1`.noThrow();
  assert.deepEqual([result.status.code, result.status.success], [1, false]);
  await sandbox.env.set("API_KEY", "secret-key-123");
  await sandbox.env.set("NODE_ENV", "production");
  assert.equal((await sandbox.sh`echo $API_KEY`.text()).trim(), "secret-key-123");
  await sandbox.sh`printf '\\x89PNG\\x00\\xff' > binary-file.png`;
  const binary = await sandbox.sh`cat binary-file.png`.stdout("piped");
  assert.deepEqual([...binary.stdout], [0x89, 0x50, 0x4e, 0x47, 0, 0xff]);
  assert.equal(binary.stdoutText.length, 6);
});

test("output streamed into a local file, uploads", async () => {
  await using sandbox = await Sandbox.create(options);
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "sdk-"));
  try {
    await sandbox.fs.writeTextFile("big.txt", "#".repeat(5_000_000));
    const child = await sandbox.spawn("cat", { args: ["big.txt"], stdout: "piped" });
    const file = fs.createWriteStream(path.join(folder, "copy.txt"));
    await child.stdout.pipeTo(Writable.toWeb(file));
    assert.ok((await child.status).success);
    assert.equal(fs.statSync(path.join(folder, "copy.txt")).size, 5_000_000);
    await sandbox.fs.upload(path.join(folder, "copy.txt"), "./readme-copy.md");
    assert.equal((await sandbox.fs.stat("readme-copy.md")).size, 5_000_000);
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
});

test("a web server, published", async () => {
  await using sandbox = await Sandbox.create({ ...options, allowNet: ["web.example"] });
  await sandbox.fs.writeTextFile("package.json", JSON.stringify({ name: "demo", private: true, type: "module" }));
  await sandbox.fs.writeTextFile("server.js", `import http from "node:http";
    http.createServer((req, res) => res.end(JSON.stringify({ now: new Date().toISOString(), path: req.url })))
      .listen(3000, () => console.log("listening on :3000"));`);
  await using server = await sandbox.deno.run({ entrypoint: "server.js" });
  assert.equal(await server.httpReady, true);
  const publicUrl = await sandbox.exposeHttp({ port: 3000 });
  const answer = JSON.parse((await get(`${publicUrl}/time`)).text);
  assert.equal(answer.path, "/time");
  assert.ok(Date.parse(answer.now) > 0);
});

test("REPL, SSH, timeouts", async () => {
  const sandbox = await Sandbox.create({ ...options, timeout: "5m" });
  const repl = await sandbox.deno.repl();
  await repl.eval("const x = 42;");
  await repl.eval("const y = 8;");
  assert.equal(await repl.eval("x + y"), 50);
  const { hostname, username } = await sandbox.exposeSsh();
  assert.ok(hostname && username);
  await sandbox.close();
  const reconnected = await Sandbox.connect(sandbox.id);
  await reconnected.sh`echo 'Still alive!'`;
  await reconnected.kill();
  await assert.rejects(Sandbox.connect(sandbox.id));
});
