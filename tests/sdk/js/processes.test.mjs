import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { KillController, Sandbox, SandboxCommandError } from "@deno/sandbox";
import { create } from "./common.mjs";

let sb;
before(async () => {
  sb = await create({ env: { FROM_CREATE: "1" }, timeout: "10m" });
});
after(() => sb.kill());
const text = (stream) => new Response(stream).text();

test("sh: text, json, exit codes, quoting, sudo", async () => {
  assert.equal(await sb.sh`pwd`.text(), "/home/sandbox\n");
  assert.deepEqual(await sb.sh`echo '{"count": 42}'`.json(), { count: 42 });
  await assert.rejects(async () => await sb.sh`exit 42`, (error) => error instanceof SandboxCommandError && error.code === 42);
  const result = await sb.sh`exit 3`.noThrow();
  assert.deepEqual([result.status.code, result.status.success], [3, false]);
  const odd = "it's $HOME \"and\" `more` \n ünïcode";
  assert.equal(await sb.sh`printf %s ${odd}`.text(), odd);
  assert.equal(await sb.sh`printf '%s|' ${["a b", "c"]}`.text(), "a b|c|");
  assert.equal((await sb.sh`sudo id -u`.text()).trim(), "0");
  assert.equal((await sb.sh`id -u > /tmp/uid; id -u >> /tmp/uid`.sudo()).status.code, 0);
  assert.match(await sb.sh`cat /tmp/uid`.text(), /^0\n/); // the first simple command alone is root's
  const both = await sb.sh`echo out; echo err >&2`.stdout("piped");
  assert.equal(both.stdoutText, "out\n");
  assert.equal(await sb.sh`echo ${"x"} > ${"file with spaces.txt"}; cat ${"file with spaces.txt"}`.text(), "x\n");
});

test("sh: the other modifiers, one at a time", async () => {
  assert.equal((await sb.sh`pwd > /tmp/where`.cwd("/usr")).status.code, 0);
  assert.equal(await sb.sh`cat /tmp/where`.text(), "/usr\n");
  assert.equal((await sb.sh`test "$NAME" = value`.env("NAME", "value")).status.code, 0);
  const captured = await sb.sh`echo err >&2`.stderr("piped");
  assert.equal(captured.stderrText, "err\n");
  assert.equal((await sb.sh`echo out`.stdout("null")).stdout, null);
  assert.equal((await sb.sh`true`.result()).status.code, 0);
  const child = await sb.sh`exit 0`.spawn();
  assert.equal((await child.output()).status.code, 0);
  await using scoped = await sb.spawn("sleep", { args: ["30"] });
  assert.ok(scoped.pid > 1);
});

test("spawn: streams, arguments, directory, environment", async () => {
  const child = await sb.spawn("sh", {
    args: ["-c", "cat; echo $0 $A $PWD >&2; exit 7", "name"],
    stdin: "piped", stdout: "piped", stderr: "piped", cwd: "/tmp", env: { A: "value" },
  });
  assert.equal(typeof child.pid, "number");
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode("to "));
  await writer.write(new TextEncoder().encode("stdin"));
  await writer.close();
  const [out, err, status] = await Promise.all([text(child.stdout), text(child.stderr), child.status]);
  assert.equal(out, "to stdin");
  assert.equal(err, "name value /tmp\n");
  assert.deepEqual([status.success, status.code, status.signal], [false, 7, null]);
  const relative = await sb.spawn("pwd", { cwd: "..", stdout: "piped" });
  assert.equal((await relative.output()).stdoutText, "/home\n");
  const cleared = await sb.spawn("env", { clearEnv: true, env: { ONLY: "1" }, stdout: "piped" });
  assert.equal((await cleared.output()).stdoutText, "ONLY=1\n");
  const nothing = await sb.spawn("echo", { args: ["x"], stdout: "null", stderr: "null" });
  assert.equal(nothing.stdout, null);
  assert.equal((await nothing.status).code, 0);
});

test("spawn: what cannot be started", async () => {
  await assert.rejects(sb.spawn("no-such-program"), (error) => error.constructor.name === "NotFound" && error.code === "ENOENT");
  await assert.rejects(sb.spawn("/etc/passwd"), (error) => error.constructor.name === "PermissionDenied");
  await assert.rejects(sb.spawn("true", { cwd: "/nowhere" }), (error) => error.constructor.name === "NotFound");
  await assert.rejects(sb.spawn("true", { env: { "A=B": "x" } }), /environment variable/);
});

test("signals", async () => {
  const child = await sb.spawn("sleep", { args: ["100"] });
  await child.kill("SIGTERM");
  const status = await child.status;
  assert.deepEqual([status.code, status.signal, status.success], [143, "SIGTERM", false]);
  await child.kill(); // one that has ended is no error
  const tree = await sb.spawn("bash", { args: ["-c", "sleep 100 & wait"] });
  await tree.kill("SIGKILL");
  assert.equal((await tree.status).code, 137);
  const trapped = await sb.spawn("bash", { args: ["-c", "trap 'echo got; exit 5' USR1; echo ready; while :; do sleep 0.05; done"], stdout: "piped" });
  const reader = trapped.stdout.getReader();
  assert.match(new TextDecoder().decode((await reader.read()).value), /ready/);
  await trapped.kill("SIGUSR1");
  assert.equal((await trapped.status).code, 5);
  const doomed = await sb.spawn("sleep", { args: ["100"] });
  await assert.rejects(doomed.kill("SIGBOGUS"), TypeError);
  await doomed.kill("SIGKILL");
  const controller = new KillController();
  const command = sb.sh`sleep 30`.signal(controller.signal); // .text() after it would forget the signal (0.13.2)
  setTimeout(() => controller.kill(), 200);
  await assert.rejects(async () => await command);
  const aborter = new AbortController();
  const aborted = await sb.spawn("sleep", { args: ["30"], signal: aborter.signal });
  aborter.abort();
  assert.equal((await aborted.status).success, false);
});

test("a process that does not read its input, and a reader that leaves", async () => {
  const child = await sb.spawn("true", { stdin: "piped" });
  const writer = child.stdin.getWriter();
  await writer.write(new Uint8Array(100_000)).catch(() => {});
  assert.equal((await child.status).code, 0);
  const yes = await sb.spawn("yes", { stdout: "piped" });
  const reader = yes.stdout.getReader();
  await reader.read();
  await reader.cancel("enough");
  await yes.kill("SIGKILL");
  assert.equal((await yes.status).signal, "SIGKILL");
  const behind = await sb.spawn("sh", { args: ["-c", "sleep 60 & echo started"], stdout: "piped" });
  assert.equal((await behind.output()).stdoutText, "started\n"); // although something keeps the pipe open
});

test("much output, and a reader that is slow", async () => {
  const child = await sb.spawn("head", { args: ["-c", "20000000", "/dev/zero"], stdout: "piped" });
  let total = 0;
  for await (const chunk of child.stdout) {
    total += chunk.length;
    if (total % 7 === 0) await new Promise((resolve) => setTimeout(resolve, 1));
  }
  assert.equal(total, 20_000_000);
  assert.ok((await child.status).success);
});

test("out of memory", async () => {
  const script = "import os\nb=[]\nwhile True: b.append(os.urandom(1)*50_000_000)";
  const child = await sb.spawn("python3", { args: ["-c", script], stderr: "null" });
  const status = await child.status;
  assert.deepEqual([status.code, status.signal, status.oom], [137, "SIGKILL", true]);
});

test("environment", async () => {
  assert.equal(await sb.env.get("FROM_CREATE"), "1");
  await sb.env.set("API_KEY", "secret-key ä");
  assert.equal(await sb.env.get("API_KEY"), "secret-key ä");
  assert.equal((await sb.sh`echo $API_KEY`.text()).trim(), "secret-key ä");
  assert.equal((await sb.env.toObject()).HOME, "/home/sandbox");
  assert.ok((await sb.env.toObject()).DENO_DEPLOY_ORGANIZATION_ID);
  await sb.env.delete("API_KEY");
  assert.equal(await sb.env.get("API_KEY"), undefined);
  await sb.env.delete("LANG");
  assert.equal(await sb.sh`echo "[$LANG]"`.text(), "[]\n");
  await assert.rejects(sb.env.set("A=B", "x"));
});

test("another client sees the same sandbox", async () => {
  const other = await Sandbox.connect({ id: sb.id }).catch(() => Sandbox.connect(sb.id));
  await sb.fs.writeTextFile("shared", "by the first");
  assert.equal(await other.fs.readTextFile("shared"), "by the first");
  await other.env.set("SHARED", "yes");
  assert.equal(await sb.env.get("SHARED"), "yes");
  await other.close();
  assert.equal(await sb.fs.readTextFile("shared"), "by the first");
});

test("a thousand short processes", async () => {
  let done = 0;
  const worker = async () => {
    while (done < 1000) {
      done++;
      const child = await sb.spawn("true", { stdout: "null", stderr: "null" });
      assert.equal((await child.status).code, 0);
    }
  };
  await Promise.all(Array.from({ length: 8 }, worker));
});

test("memory is what was asked for", async () => {
  const total = Number((await sb.sh`awk '/MemTotal/ {print $2}' /proc/meminfo`.text()).trim());
  assert.ok(total > 700 * 1024 && total <= 800 * 1024, String(total));
});
