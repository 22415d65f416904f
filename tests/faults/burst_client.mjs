// Asks for bursts with socket.io-client and prints what came of each, as JSON.
import { createRequire } from "node:module";

const [module, transport, plan] = process.argv.slice(2);
const { io } = createRequire(import.meta.url)(module);
const { port, emitter, clients, where, count, size, patience } = JSON.parse(plan);
const url = (number) => `http://127.0.0.1:${number}`;
const options = { transports: [transport], forceNew: true, reconnection: false };

function listener(namespace, auth) {
  const socket = io(url(port) + namespace, { ...options, auth });
  const found = { socket, next: 0, isOrdered: true, ended: null };
  socket.on("burst", (number) => {
    found.isOrdered &&= number === found.next;
    found.next += 1;
  });
  socket.on("disconnect", (reason) => (found.ended = reason));
  socket.on("connect_error", (error) => (found.ended = `refused: ${error.message}`));
  return found;
}
const connected = (socket) =>
  socket.connected ? undefined : new Promise((resolve) => socket.once("connect", resolve));

const isGreeting = where === "connect";
const all = Array.from({ length: clients }, () =>
  listener(isGreeting ? "/greeted" : "/", isGreeting ? { count, size } : undefined),
);
if (!isGreeting) {
  await Promise.all(all.map(({ socket }) => connected(socket)));
  const isRoom = clients > 1;
  const room = `room ${process.pid}`;
  if (isRoom) await Promise.all(all.map(({ socket }) => socket.emitWithAck("join", room)));
  const asker = emitter === port ? all[0].socket : io(url(emitter), options);
  await connected(asker);
  asker.emit("please", where, count, size, isRoom ? room : all[0].socket.id);
}
const until = Date.now() + patience * 1000;
while (Date.now() < until && all.some((one) => one.next < count && !one.ended)) {
  await new Promise((resolve) => setTimeout(resolve, 20));
}
console.log(
  JSON.stringify(all.map(({ next, isOrdered, ended }) => ({ received: next, isOrdered, ended }))),
);
all.forEach(({ socket }) => socket.disconnect());
setTimeout(() => process.exit(0), 50);
