// One client for the benchmark `sdk`: a line on standard input names what to do, a line on standard output has the
// milliseconds that it took, and the sandbox.
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const { Sandbox } = await import(pathToFileURL(process.argv[2]));
const size = Number(process.argv[3]);
const block = new Uint8Array(size).map((_, index) => index % 256);
let sandbox;
const work = {
  create: async () => (sandbox = await Sandbox.create({ memory: "768MiB" })),
  sh: () => sandbox.sh`true`,
  upload: () => sandbox.fs.writeFile("bench", block),
  download: async () => {
    if ((await sandbox.fs.readFile("bench")).length !== size) throw new Error("not what was written");
  },
  kill: () => sandbox.kill(),
};
for await (const line of createInterface({ input: process.stdin })) {
  const start = performance.now();
  await work[line]();
  console.log(`${performance.now() - start} ${sandbox.id}`);
}
