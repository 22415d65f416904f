// A client that does as the protocols say; prints what it saw as JSON.
// node strict_client.mjs <client module> <URL>
import http from "node:http";
import { createRequire } from "node:module";

const [clientModule, url] = process.argv.slice(2);
const { io } = createRequire(import.meta.url)(clientModule);
const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });

function request(path, method, connection) {
  return new Promise((resolve) => {
    const sent = http.request(url + path, { agent, method, headers: connection ? { connection } : {} });
    sent.on("response", (answer) => answer.resume().on("end", () => resolve(answer.statusCode)));
    sent.on("error", (error) => resolve(error.message));
    sent.end();
  });
}

async function statuses(path, method) {
  const seen = [];
  for (let i = 0; i < 10; i++) {
    for (const connection of ["close", null, "close, TE", null]) {
      seen.push(await request(path, method, connection));
    }
  }
  return [...new Set(seen)];
}

function refusal(namespace, transport) {
  return new Promise((resolve) => {
    const socket = io(url + namespace, { transports: [transport], reconnection: false });
    socket.on("connect", () => (resolve("connected"), socket.disconnect()));
    socket.on("connect_error", (error) => (resolve(error.message ?? null), socket.disconnect()));
  });
}

console.log(
  JSON.stringify({
    page: await statuses("/", "GET"),
    poll: await statuses("/socket.io/?EIO=4&transport=polling", "GET"),
    post: await statuses("/socket.io/?EIO=4&transport=polling&sid=unknown", "POST"),
    namespace: [await refusal("/nowhere", "polling"), await refusal("/nowhere", "websocket")],
  }),
);
process.exit(0);
