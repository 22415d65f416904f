/* Clients of the standard JavaScript library that drop, move and acknowledge late.
 *
 * node delivery_crowd.mjs <client module> <deliveries.js> <URLs, by comma> <names, by comma>
 *
 * Says on stdout, a line of JSON each, what they had; "calm" on stdin has them behave. */
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";

const [module, helper, urls, names] = process.argv.slice(2);
const { io } = createRequire(import.meta.url)(module);
const onDelivery = new Function(`${readFileSync(helper, "utf8")}; return onDelivery;`)();
const servers = urls.split(",");
const between = (least, most) => least + Math.random() * (most - least);
const anyServer = () => servers[Math.floor(Math.random() * servers.length)];
const say = (what) => console.log(JSON.stringify({ ...what, now: Date.now() }));
let isCalm = false;

/* Forgets what it had whenever it leaves. */
function careless(name) {
  const socket = io(anyServer(), { forceNew: true, query: { identity: name }, timeout: 3000 });
  let leaving = setTimeout(() => isCalm || leave(), between(500, 8000));
  function leave() {
    clearTimeout(leaving);
    socket.off();
    socket.disconnect();
    say({ kind: "lost", name });
    setTimeout(() => careless(name), between(0, 500));
  }
  socket.on("disconnect", leave);
  socket.on("connect_error", leave);
  socket.on("news", (value, { delivery_id: id, attempt }, acknowledge) => {
    say({ kind: "copy", name, id, attempt, value });
    const answer = () => {
      if (!socket.connected) return;
      acknowledge();
      say({ kind: "acknowledged", name, id });
    };
    const fate = isCalm ? 1 : Math.random();
    if (fate < 0.05) leave();
    else if (fate < 0.1) return;
    else if (fate < 0.2) setTimeout(answer, between(200, 2000));
    else answer();
  });
}

/* Handles each message once, over all its connections. */
function careful(name) {
  const socket = io(anyServer(), { forceNew: true, query: { identity: name }, timeout: 3000 });
  const drop = () => {
    if (!isCalm) socket.io.engine.close();
    setTimeout(drop, between(500, 8000));
  };
  setTimeout(drop, between(500, 8000));
  socket.on("disconnect", () => {
    say({ kind: "lost", name });
    socket.io.uri = anyServer();
    // The client comes back by itself, unless the server has shown it out.
    if (!socket.active) setTimeout(() => socket.connect(), 300);
  });
  const done = new Map(); // whether it was handled, by value
  const ids = new Map();
  socket.on("news", (value, { delivery_id: id, attempt }) => {
    say({ kind: "copy", name, id, attempt, value });
    if (done.get(value)) say({ kind: "acknowledged", name, id });
    else done.set(value, false);
    ids.set(value, id);
  });
  onDelivery(socket, "news", async (value) => {
    if (!isCalm && Math.random() < 0.1) await new Promise((go) => setTimeout(go, 1500));
    done.set(value, true);
    say({ kind: "handled", name, id: ids.get(value) });
    if (socket.connected) say({ kind: "acknowledged", name, id: ids.get(value) });
  });
}

names.split(",").forEach((name, index) => (index % 2 ? careful : careless)(name));
createInterface({ input: process.stdin })
  .on("line", () => (isCalm = true))
  .on("close", () => process.exit());
