import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import WebSocket from "ws";
import { create, get, lookup, until } from "./common.mjs";

let sb;
before(async () => {
  sb = await create();
});
after(() => sb.kill());

test("eval", async () => {
  assert.equal(await sb.deno.eval("const a = 1; const b: number = 2; a + b;"), 3);
  await assert.rejects(sb.deno.eval("throw new RangeError('no')"), (error) => error instanceof RangeError && /no/.test(error.message));
});

test("a REPL keeps its state, speaks TypeScript, and awaits", async () => {
  const repl = await sb.deno.repl({ stderr: "null", scriptArgs: ["one"] });
  await repl.eval("const x = 42;");
  await repl.eval("const y = 8;");
  assert.equal(await repl.eval("x + y"), 50);
  await repl.eval("interface Point { x: number } const p: Point = { x: 1 };");
  assert.deepEqual(await repl.eval("p"), { x: 1 });
  assert.equal(await repl.eval("await new Promise((resolve) => setTimeout(() => resolve('late'), 50))"), "late");
  assert.deepEqual(await repl.eval("[1, null, 'ä', true, {a: [2]}]"), [1, null, "ä", true, { a: [2] }]);
  assert.equal(await repl.eval("undefined"), null);
  assert.equal(await repl.eval("() => 1"), null);
  assert.equal(await repl.eval("const _ = 'mine'; 5"), 5);
  assert.equal(await repl.eval("6"), 6);
  assert.equal(await repl.eval("Deno.args[0]"), "one");
  await assert.rejects(repl.eval("let let = 1"), SyntaxError);
  await assert.rejects(repl.eval("nothing.here"), ReferenceError);
  await assert.rejects(repl.eval("const ring = {}; ring.ring = ring; ring"), TypeError);
  await assert.rejects(repl.eval("throw 'text'"), /text/);
  await assert.rejects(repl.eval("await Deno.readTextFile('/nope')"), (error) => error.constructor.name === "NotFound");
  await repl.eval("function add(a: number, b: number) { return a + b }; async function later(v) { return v }");
  assert.equal(await repl.call("add", 1, 2), 3);
  assert.equal(await repl.call("later", "v"), "v");
  assert.deepEqual(await repl.call("(...list) => list", "'\"\\\u2028", { k: 1 }), ["'\"\\\u2028", { k: 1 }]);
  assert.equal(await repl.call("(a: number, b: number) => a * b", 3, 4), 12);
  await repl.close();
  await assert.rejects(repl.eval("1"), (error) => error.code === "ENOENT");
  await repl.close();
});

test("code in every extension", async () => {
  const sources = {
    js: "console.log(Deno.args[0], 'js')", mjs: "import 'node:fs'; console.log(Deno.args[0], 'mjs')",
    ts: "const t: string = 'ts'; console.log(Deno.args[0], t)", mts: "const t: string = 'mts'; console.log(Deno.args[0], t)",
    cjs: "const fs = require('node:fs'); console.log(process.argv[2], 'cjs')",
    cts: "const t: string = 'cts'; console.log(process.argv[2], t)",
    jsx: "const React = {createElement: (n) => n}; console.log(Deno.args[0], <jsx/>)",
    tsx: "const React = {createElement: (n: string) => n}; console.log(Deno.args[0], <tsx/>)",
  };
  await Promise.all(Object.entries(sources).map(async ([extension, code]) => {
    const child = await sb.deno.run({ code, extension, scriptArgs: ["arg"], stdout: "piped", stderr: "piped" });
    const result = await child.output();
    assert.equal(result.stdoutText, `arg ${extension}\n`, result.stderrText);
    assert.ok(result.status.success);
  }));
  await until(async () => (await sb.sh`ls /tmp | grep -c deno- || true`.text()).trim() === "0"); // the code's files are gone
});

test("an entrypoint with input, directory and environment", async () => {
  await sb.fs.mkdir("project");
  await sb.fs.writeTextFile("project/main.ts", `
    const input = await new Response(Deno.stdin.readable).text();
    console.log(JSON.stringify({ input, cwd: Deno.cwd(), env: Deno.env.get("X"), args: Deno.args }));`);
  const child = await sb.deno.run({
    entrypoint: "main.ts", cwd: "project", env: { X: "y" }, scriptArgs: ["a", "b c"], stdin: "piped", stdout: "piped",
  });
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode("typed"));
  await writer.close();
  assert.deepEqual(JSON.parse((await child.output()).stdoutText), {
    input: "typed", cwd: "/home/sandbox/project", env: "y", args: ["a", "b c"],
  });
  const failing = await sb.deno.run({ code: "Deno.exit(9)" });
  assert.equal(await failing.httpReady, false);
  assert.equal((await failing.status).code, 9);
});

test("watch tells of restarts", async () => {
  await sb.fs.writeTextFile("watched.ts", "console.log('version one'); setInterval(() => {}, 1000);");
  const child = await sb.deno.run({ entrypoint: "watched.ts", watch: true, stdout: "piped", stderr: "piped" });
  const reader = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
  let seen = "";
  const pump = (async () => {
    for (let part; !(part = await reader.read()).done;) seen += part.value;
  })();
  await until(() => seen.includes("version one"));
  let restarts = 0;
  child.addEventListener("restart", () => restarts++);
  // Deno prints before it watches: on a loaded host, a change that comes too early is one that it never sees.
  await until(async () => {
    await sb.fs.writeTextFile("watched.ts", "console.log('version two'); setInterval(() => {}, 1000);");
    await new Promise((resolve) => setTimeout(resolve, 2000));
    return seen.includes("version two");
  }, 50);
  await until(() => restarts >= 1);
  await child.kill("SIGKILL");
  await pump;
});

test("a server: httpReady, fetch, exposed by port and by process", async () => {
  const server = await sb.deno.run({
    code: `Deno.serve({ port: 8000, hostname: "127.0.0.1" }, async (request) => {
      if (request.headers.get("upgrade") === "websocket") {
        const { socket, response } = Deno.upgradeWebSocket(request);
        socket.onmessage = (event) => socket.send("echo " + event.data);
        return response;
      }
      const url = new URL(request.url);
      if (url.pathname === "/stream") {
        const body = new ReadableStream({ async start(controller) {
          for (let i = 0; i < 3; i++) { controller.enqueue(new TextEncoder().encode("part" + i + ";")); await new Promise((r) => setTimeout(r, 50)); }
          controller.close();
        }});
        return new Response(body);
      }
      return Response.json({ method: request.method, path: url.pathname, host: request.headers.get("host"), body: await request.text() });
    });`,
  });
  assert.equal(await server.httpReady, true);
  const direct = await server.fetch("http://any.host/path?q=1", { method: "POST", body: "payload" });
  assert.deepEqual(await direct.json(), { method: "POST", path: "/path", host: "any.host", body: "payload" });
  const url = await sb.exposeHttp({ port: 8000 });
  assert.match(url, /^https:\/\/[a-z0-9]{25}\.localhost:\d+$/);
  const answer = await get(`${url}/hello`, { method: "PUT", body: "up", headers: { "content-length": 2 } });
  assert.equal(answer.status, 200);
  assert.deepEqual(JSON.parse(answer.text), { method: "PUT", path: "/hello", host: new URL(url).host, body: "up" });
  assert.equal((await get(`${url}/stream`)).text, "part0;part1;part2;");
  const byProcess = await sb.exposeHttp(server);
  assert.equal(JSON.parse((await get(`${byProcess}/p`)).text).path, "/p");
  const socket = new WebSocket(url.replace("https", "wss"), { lookup });
  await new Promise((resolve, reject) => socket.on("open", resolve).on("error", reject));
  socket.send("hi");
  assert.equal(String(await new Promise((resolve) => socket.on("message", resolve))), "echo hi");
  socket.close();
  await assert.rejects(get(url.replace(/\/\/[a-z0-9]{25}/, "//" + "a".repeat(25))));
  const empty = await sb.exposeHttp({ port: 9 });
  assert.equal((await get(empty)).status, 502);
  await server.kill("SIGKILL");
});

test("node, npm and npx are there", async () => {
  assert.match(await sb.sh`node --version && npm --version`.text(), /^v\d+/);
  assert.match(await sb.sh`git --version; curl --version | head -1; deno --version | head -1; python3 --version`.text(), /git.*\ncurl.*\ndeno.*\nPython/);
});

test("VS Code needs what the image lacks", async () => {
  await assert.rejects(sb.exposeVscode(), /code-server/);
  // With a stand-in under that name, all but the editor itself is the real thing.
  await sb.fs.writeTextFile("code-server", `#!/bin/sh
    if [ "$1" = --install-extension ]; then echo "$2" >> /tmp/extensions; exit 0; fi
    echo "$@" > /tmp/arguments; echo "$DENO_DEPLOY_SANDBOX_TOKEN" > /tmp/token
    exec deno eval "Deno.serve({ port: \${2##*:}, hostname: '127.0.0.1' }, () => new Response('an editor'))"`, { mode: 0o755 });
  await sb.sh`sudo mv code-server /usr/local/bin/`;
  const code = await sb.exposeVscode("/home/sandbox", {
    extensions: ["a.b", "c.d"], editorSettings: { "editor.tabSize": 3 },
  });
  await until(async () => (await get(code.url)).text === "an editor");
  assert.equal(await sb.fs.readTextFile("/tmp/extensions"), "a.b\nc.d\n");
  assert.match(await sb.fs.readTextFile("/tmp/arguments"), /--auth none .*\/home\/sandbox/);
  assert.ok((await sb.fs.readTextFile("/tmp/token")).startsWith("ddo_"));
  assert.match(await sb.fs.readTextFile(".local/share/code-server/User/settings.json"), /"editor.tabSize":\s*3/);
  await code.kill("SIGKILL");
  assert.equal((await code.status).signal, "SIGKILL");
});
