import assert from "node:assert/strict";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { after, before, test } from "node:test";
import { collect, create } from "./common.mjs";

let sb, dir;
before(async () => {
  sb = await create();
});
after(() => sb.kill());
const names = (entries) => entries.map((entry) => entry.name).sort();
const rejectsWith = (name, code) => (error) => {
  assert.equal(error.constructor.name, name, `${error.constructor.name}: ${error.message}`);
  if (code) assert.equal(error.code, code);
  return true;
};

test("text and bytes come back as they were written", async () => {
  await sb.fs.writeTextFile("t.txt", "grüße, 世界 🌍");
  assert.equal(await sb.fs.readTextFile("t.txt"), "grüße, 世界 🌍");
  const bytes = new Uint8Array(300_000).map((_, index) => (index * 7) % 256);
  await sb.fs.writeFile("b.bin", bytes);
  assert.deepEqual(await sb.fs.readFile("b.bin"), bytes);
  await sb.fs.writeFile("empty", new Uint8Array());
  assert.equal((await sb.fs.readFile("empty")).length, 0);
  assert.equal(await sb.fs.readTextFile("/home/app/t.txt"), "grüße, 世界 🌍");
});

test("streams are written, and their errors fail the write", async () => {
  await sb.fs.writeFile("s.bin", new Blob(["abc", "def"]).stream());
  assert.equal(await sb.fs.readTextFile("s.bin"), "abcdef");
  await sb.fs.writeTextFile("s.txt", ReadableStream.from(["a", "ä", "b"]));
  assert.equal(await sb.fs.readTextFile("s.txt"), "aäb");
  const broken = new ReadableStream({ pull: (controller) => controller.error(new RangeError("no more")) });
  await assert.rejects(sb.fs.writeFile("broken", broken), /no more/);
  const slow = new ReadableStream({
    async start(controller) {
      for (let index = 0; index < 5; index++) {
        controller.enqueue(new Uint8Array([index]));
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      controller.close();
    },
  });
  await sb.fs.writeFile("slow", slow);
  assert.deepEqual([...(await sb.fs.readFile("slow"))], [0, 1, 2, 3, 4]);
});

test("options of writing", async () => {
  await sb.fs.writeTextFile("o.txt", "one", { createNew: true });
  await assert.rejects(sb.fs.writeTextFile("o.txt", "two", { createNew: true }), rejectsWith("AlreadyExists", "EEXIST"));
  await sb.fs.writeTextFile("o.txt", "+two", { append: true });
  assert.equal(await sb.fs.readTextFile("o.txt"), "one+two");
  await assert.rejects(sb.fs.writeTextFile("absent", "x", { create: false }), rejectsWith("NotFound", "ENOENT"));
  await sb.fs.writeTextFile("o.txt", "x", { mode: 0o600 });
  assert.equal((await sb.fs.stat("o.txt")).mode & 0o7777, 0o600);
  await sb.fs.writeTextFile("plain.txt", "x");
  assert.equal((await sb.fs.stat("plain.txt")).mode & 0o7777, 0o644);
});

test("aborted calls reject with AbortError", async () => {
  const controller = new AbortController();
  const never = new ReadableStream({ pull: () => new Promise(() => {}) });
  const writing = sb.fs.writeFile("aborted", never, { signal: controller.signal });
  setTimeout(() => controller.abort(), 100);
  await assert.rejects(writing, (error) => error.name === "AbortError");
  await sb.fs.writeFile("big", new Uint8Array(30 << 20));
  const second = new AbortController();
  const reading = sb.fs.readFile("big", { signal: second.signal });
  setTimeout(() => second.abort(), 5);
  await assert.rejects(reading, (error) => error.name === "AbortError");
  const third = new AbortController();
  const text = sb.fs.readTextFile("big", { signal: third.signal });
  setTimeout(() => third.abort(), 5);
  await assert.rejects(text, (error) => error.name === "AbortError");
  await sb.fs.remove("big");
  assert.equal(await sb.fs.readTextFile("t.txt", { signal: new AbortController().signal }), "grüße, 世界 🌍");
});

test("directories", async () => {
  await sb.fs.mkdir("d/e/f", { recursive: true });
  await assert.rejects(sb.fs.mkdir("d"), rejectsWith("AlreadyExists", "EEXIST"));
  await sb.fs.mkdir("d", { recursive: true });
  await sb.fs.mkdir("m", { mode: 0o700 });
  assert.equal((await sb.fs.stat("m")).mode & 0o7777, 0o700);
  await sb.fs.writeTextFile("d/file", "");
  await sb.fs.symlink("file", "d/link");
  const entries = await collect(sb.fs.readDir("d"));
  assert.deepEqual(names(entries), ["e", "file", "link"]);
  for (const entry of entries) {
    assert.equal([entry.isFile, entry.isDirectory, entry.isSymlink].filter(Boolean).length, 1);
  }
  await assert.rejects(collect(sb.fs.readDir("d/file")));
  await assert.rejects(sb.fs.remove("d"), (error) => error.code === "ENOTEMPTY");
  await sb.fs.remove("d", { recursive: true });
  await assert.rejects(sb.fs.stat("d"), rejectsWith("NotFound", "ENOENT"));
  await assert.rejects(sb.fs.remove("d"), rejectsWith("NotFound", "ENOENT"));
});

test("facts of files", async () => {
  await sb.fs.writeTextFile("f", "12345");
  const info = await sb.fs.stat("f");
  assert.equal(info.size, 5);
  assert.ok(info.isFile && !info.isDirectory && !info.isSymlink);
  assert.ok(info.mtime instanceof Date && Math.abs(info.mtime - Date.now()) < 60_000);
  assert.deepEqual([info.uid, info.gid], [1000, 1000]);
  for (const name of ["dev", "ino", "nlink", "rdev", "blksize", "blocks"]) assert.equal(typeof info[name], "number");
  const device = await sb.fs.stat("/dev/null");
  assert.ok(device.isCharDevice && !device.isFile && device.rdev > 0);
  await sb.sh`mkfifo pipe`;
  assert.ok((await sb.fs.lstat("pipe")).isFifo);
  await sb.fs.symlink("f", "l");
  assert.ok((await sb.fs.lstat("l")).isSymlink);
  assert.ok((await sb.fs.stat("l")).isFile);
});

test("modes, owners and times", async () => {
  await sb.fs.writeTextFile("c", "x");
  await sb.fs.chmod("c", 0o751);
  assert.equal((await sb.fs.stat("c")).mode & 0o7777, 0o751);
  await sb.fs.chown("c", null, 1000);
  await assert.rejects(sb.fs.chown("c", 0, null), rejectsWith("PermissionDenied", "EPERM"));
  const then = new Date("2020-02-03T04:05:06.789Z");
  await sb.fs.utime("c", then, new Date("2021-01-01T00:00:00Z"));
  const info = await sb.fs.stat("c");
  assert.equal(info.atime.toISOString(), then.toISOString());
  assert.equal(info.mtime.toISOString(), "2021-01-01T00:00:00.000Z");
  await sb.fs.truncate("c", 10);
  assert.equal((await sb.fs.stat("c")).size, 10);
  await sb.fs.truncate("c");
  assert.equal((await sb.fs.stat("c")).size, 0);
});

test("umask", async () => {
  const before = await sb.fs.umask();
  assert.equal(before, 0o022);
  assert.equal(await sb.fs.umask(0o077), before);
  await sb.fs.writeTextFile("masked", "x");
  await sb.fs.mkdir("maskeddir");
  assert.equal((await sb.fs.stat("masked")).mode & 0o777, 0o600);
  assert.equal((await sb.fs.stat("maskeddir")).mode & 0o777, 0o700);
  assert.equal(await sb.fs.umask(before), 0o077);
});

test("copies, links and renames", async () => {
  await sb.fs.writeTextFile("src", "data", { mode: 0o640 });
  await sb.fs.copyFile("src", "dst");
  assert.equal(await sb.fs.readTextFile("dst"), "data");
  assert.equal((await sb.fs.stat("dst")).mode & 0o777, 0o640);
  await sb.fs.link("src", "hard");
  assert.equal((await sb.fs.stat("hard")).nlink, 2);
  await sb.fs.symlink("src", "soft", { type: "file" });
  assert.equal(await sb.fs.readLink("soft"), "src");
  assert.equal(await sb.fs.realPath("soft"), "/home/sandbox/src");
  await sb.fs.rename("dst", "src2");
  await assert.rejects(sb.fs.stat("dst"), rejectsWith("NotFound", "ENOENT"));
  await assert.rejects(sb.fs.rename("none", "x"), rejectsWith("NotFound", "ENOENT"));
  await sb.fs.symlink("loop", "loop");
  await assert.rejects(sb.fs.readTextFile("loop"), (error) => error.code === "ELOOP");
});

test("temporary files", async () => {
  const file = await sb.fs.makeTempFile({ prefix: "pre", suffix: ".suf" });
  assert.match(file, /^\/tmp\/pre.*\.suf$/);
  const folder = await sb.fs.makeTempDir({ dir: "/home/sandbox" });
  assert.ok((await sb.fs.stat(folder)).isDirectory);
  assert.match(folder, /^\/home\/sandbox\//);
  assert.ok((await sb.fs.stat(await sb.fs.makeTempFile())).isFile);
});

test("rights are those of the user", async () => {
  await assert.rejects(sb.fs.readTextFile("/etc/shadow"), rejectsWith("PermissionDenied", "EACCES"));
  await assert.rejects(sb.fs.writeTextFile("/etc/new", "x"), rejectsWith("PermissionDenied", "EACCES"));
  await assert.rejects(sb.fs.mkdir("/etc/new"), rejectsWith("PermissionDenied", "EACCES"));
  await assert.rejects(sb.fs.remove("/etc/passwd"), rejectsWith("PermissionDenied", "EACCES"));
  await assert.rejects(collect(sb.fs.readDir("/root")), rejectsWith("PermissionDenied", "EACCES"));
  await assert.rejects(sb.fs.readFile("/tmp"), (error) => error.code === "EISDIR");
});

test("open files", async () => {
  const file = await sb.fs.open("h", { read: true, write: true, create: true });
  assert.equal(await file.write(new TextEncoder().encode("hello world")), 11);
  assert.equal(await file.seek(-5, 2), 6);
  const buffer = new Uint8Array(20);
  assert.equal(await file.read(buffer), 5);
  assert.equal(new TextDecoder().decode(buffer.subarray(0, 5)), "world");
  assert.equal(await file.read(buffer), null);
  assert.equal(await file.seek(2n, 0), 2);
  assert.equal(await file.seek(1, 1), 3);
  await file.truncate(4);
  assert.equal((await file.stat()).size, 4);
  await file.truncate();
  assert.equal((await file.stat()).size, 0);
  await file.sync();
  await file.syncData();
  await file.utime(new Date(1000), new Date(2000));
  assert.equal((await file.stat()).mtime.getTime(), 2000);
  await assert.rejects(file.seek(-1, 0), (error) => error.code === "EINVAL");
  await file.close();
  await assert.rejects(file.stat(), rejectsWith("BadResource", "EBADF"));
});

test("options of opening", async () => {
  await assert.rejects(sb.fs.open("no-such-file"), rejectsWith("NotFound", "ENOENT"));
  const appended = await sb.fs.open("a", { append: true, create: true });
  await appended.write(new TextEncoder().encode("1"));
  await appended.close();
  const again = await sb.fs.open("a", { append: true });
  await again.write(new TextEncoder().encode("2"));
  await again.close();
  assert.equal(await sb.fs.readTextFile("a"), "12");
  await assert.rejects(sb.fs.open("a", { write: true, createNew: true }), rejectsWith("AlreadyExists", "EEXIST"));
  const emptied = await sb.fs.open("a", { write: true, truncate: true });
  await emptied.close();
  assert.equal((await sb.fs.stat("a")).size, 0);
  const moded = await sb.fs.open("moded", { write: true, create: true, mode: 0o666 });
  await moded.close();
  assert.equal((await sb.fs.stat("moded")).mode & 0o777, 0o644);
  const reading = await sb.fs.open("a");
  await assert.rejects(reading.write(new Uint8Array(1)), rejectsWith("BadResource", "EBADF"));
  await reading.close();
  const created = await sb.fs.create("created");
  await created.write(new TextEncoder().encode("xyz"));
  await created.seek(0, 0);
  assert.equal(await new Response(created.readable).text(), "xyz");
});

test("readable and writable of an open file", async () => {
  const out = await sb.fs.create("streamed");
  await new Blob([new Uint8Array(500_000).fill(65)]).stream().pipeTo(out.writable);
  const back = await sb.fs.open("streamed");
  const text = await new Response(back.readable).text();
  assert.equal(text.length, 500_000);
});

test("locks", async () => {
  const one = await sb.fs.create("lock");
  const two = await sb.fs.open("lock");
  await one.lock(true);
  let taken = false;
  const waiting = two.lock(true).then(() => (taken = true));
  await new Promise((resolve) => setTimeout(resolve, 300));
  assert.equal(taken, false);
  assert.equal(await sb.fs.readTextFile("lock"), ""); // other calls go on
  await one.unlock();
  await waiting;
  await two.unlock();
  await one.lock();
  await two.lock(false);
  await one.close();
  await two.close();
});

test("walk", async () => {
  await sb.fs.mkdir("w/sub/deep", { recursive: true });
  for (const name of ["w/a.txt", "w/b.md", "w/sub/c.txt", "w/sub/deep/d.txt"]) await sb.fs.writeTextFile(name, name);
  await sb.fs.symlink("sub", "w/tosub");
  const paths = async (options) => (await collect(sb.fs.walk("w", options))).map((entry) => entry.path).sort();
  const all = ["w", "w/a.txt", "w/b.md", "w/sub", "w/sub/c.txt", "w/sub/deep", "w/sub/deep/d.txt", "w/tosub"];
  assert.deepEqual(await paths(), all);
  assert.equal((await collect(sb.fs.walk("w")))[0].path, "w");
  assert.deepEqual(await paths({ maxDepth: 1 }), ["w", "w/a.txt", "w/b.md", "w/sub", "w/tosub"]);
  assert.deepEqual(await paths({ includeFiles: false, includeSymlinks: false }), ["w", "w/sub", "w/sub/deep"]);
  assert.deepEqual(await paths({ includeDirs: false, exts: [".txt"] }), ["w/a.txt", "w/sub/c.txt", "w/sub/deep/d.txt"]);
  assert.deepEqual(await paths({ exts: ["md"] }), ["w/b.md"]);
  assert.deepEqual(await paths({ match: [/SUB\/[^/]+\.txt$/i] }), ["w/sub/c.txt"]);
  assert.deepEqual(await paths({ skip: [/sub/] }), ["w", "w/a.txt", "w/b.md"]);
  const followed = await paths({ followSymlinks: true, includeDirs: false });
  assert.equal(followed.filter((found) => found.endsWith("c.txt")).length, 2);
  await assert.rejects(collect(sb.fs.walk("none")), rejectsWith("NotFound", "ENOENT"));
  for await (const _ of sb.fs.walk("/usr/lib")) break; // a reader that leaves
});

test("expandGlob", async () => {
  const found = async (glob, options) => (await collect(sb.fs.expandGlob(glob, options))).map((entry) => entry.path).sort();
  const at = (...list) => list.map((name) => `/home/sandbox/${name}`);
  assert.deepEqual(await found("w/*.txt"), at("w/a.txt"));
  assert.deepEqual(await found("w/**/*.txt"), at("w/a.txt", "w/sub/c.txt", "w/sub/deep/d.txt"));
  assert.deepEqual(await found("w/{a,b}.*"), at("w/a.txt", "w/b.md"));
  assert.deepEqual(await found("w/+(a|b).txt"), at("w/a.txt"));
  assert.deepEqual(await found("*.TXT", { root: "/home/sandbox/w", caseInsensitive: true }), at("w/a.txt"));
  assert.deepEqual(await found("w/**/*.txt", { exclude: ["w/sub"] }), at("w/a.txt"));
  assert.deepEqual(await found("w/sub/*", { includeDirs: false }), at("w/sub/c.txt"));
  assert.deepEqual(await found("w/s*/"), at("w/sub"));
  assert.deepEqual(await found("nothing/*"), []);
});

test("names of all kinds", async () => {
  for (const name of ["with space", "ünïcödé-世界", "quote'\"`$", "-dash", "new\nline", "a".repeat(255)]) {
    await sb.fs.writeTextFile(`/tmp/${name}`, name);
    assert.equal(await sb.fs.readTextFile(`/tmp/${name}`), name);
    await sb.fs.remove(`/tmp/${name}`);
  }
  await assert.rejects(sb.fs.writeTextFile("a".repeat(300), ""), (error) => error.code === "ENAMETOOLONG");
  await assert.rejects(sb.fs.readTextFile("nul\0"), /NUL/);
  await assert.rejects(sb.fs.readTextFile(""), Error);
});

test("upload and download", async () => {
  const local = fs.mkdtempSync(path.join(os.tmpdir(), "sdk-"));
  try {
    fs.mkdirSync(path.join(local, "proj/inner"), { recursive: true });
    fs.writeFileSync(path.join(local, "proj/one.txt"), "1");
    fs.writeFileSync(path.join(local, "proj/inner/two.bin"), Buffer.alloc(200_000, 7));
    fs.symlinkSync("one.txt", path.join(local, "proj/link"));
    await sb.fs.upload(path.join(local, "proj"), ".");
    assert.equal(await sb.fs.readTextFile("proj/one.txt"), "1");
    assert.equal((await sb.fs.readFile("proj/inner/two.bin")).length, 200_000);
    assert.equal(await sb.fs.readLink("proj/link"), "one.txt");
    await sb.fs.upload(path.join(local, "proj/one.txt"), "copy.txt");
    assert.equal(await sb.fs.readTextFile("copy.txt"), "1");
    fs.mkdirSync(path.join(local, "back"));
    await sb.fs.download("proj", path.join(local, "back"));
    const back = fs.readdirSync(path.join(local, "back"), { recursive: true }).map(String).sort();
    assert.ok(back.some((name) => name.endsWith("inner/two.bin")), back.join());
    await sb.fs.download("copy.txt", path.join(local, "copy.txt"));
    assert.equal(fs.readFileSync(path.join(local, "copy.txt"), "utf8"), "1");
  } finally {
    fs.rmSync(local, { recursive: true });
  }
});

test("a file of 100 MB, and 200 MB in one message", async () => {
  const hundred = new Uint8Array(100_000_000).fill(3);
  await sb.fs.writeFile("/tmp/hundred", new Blob([hundred]).stream());
  assert.equal((await sb.fs.stat("/tmp/hundred")).size, 100_000_000);
  await assert.rejects(sb.fs.readFile("/tmp/hundred"), /in pieces/); // ws takes 100 MiB of base64 at most
  const child = await sb.spawn("cat", { args: ["/tmp/hundred"], stdout: "piped" });
  let total = 0;
  for await (const chunk of child.stdout) total += chunk.length;
  assert.equal(total, 100_000_000);
  await sb.fs.remove("/tmp/hundred");
  await sb.fs.writeFile("/tmp/two-hundred", new Uint8Array(200_000_000));
  assert.equal((await sb.fs.stat("/tmp/two-hundred")).size, 200_000_000);
  await sb.fs.remove("/tmp/two-hundred");
});
