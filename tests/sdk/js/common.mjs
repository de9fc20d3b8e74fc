// What all suites need: a sandbox, and clients that reach *.localhost.
import https from "node:https";
import { Sandbox } from "@deno/sandbox";

export const memory = "768MiB";

export function create(options = {}) {
  return Sandbox.create({ memory, ...options });
}

// Every exposed name leads to this machine; resolvers that know *.localhost are not everywhere.
export const lookup = (_name, options, callback) =>
  options.all ? callback(null, [{ address: "127.0.0.1", family: 4 }]) : callback(null, "127.0.0.1", 4);

export function get(url, options = {}) {
  return new Promise((resolve, reject) => {
    const request = https.request(url, { lookup, agent: false, ...options }, (response) => {
      const chunks = [];
      response.on("data", (chunk) => chunks.push(chunk));
      response.on("end", () =>
        resolve({ status: response.statusCode, headers: response.headers, text: Buffer.concat(chunks).toString() })
      );
      response.on("error", reject);
    });
    request.on("error", reject);
    request.end(options.body);
  });
}

export async function until(condition, seconds = 20) {
  const end = Date.now() + seconds * 1000;
  while (!(await condition())) {
    if (Date.now() > end) throw new Error("not in time");
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

export async function collect(iterable) {
  const found = [];
  for await (const item of iterable) found.push(item);
  return found;
}
