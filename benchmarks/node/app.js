// app.py once more, on Node's Socket.IO: the same events, answered and emitted in the same way.
//
// Environment variables:
//   BENCH_PORT: The port of the loopback interface to listen on.
//   BENCH_REDIS_URL: The Redis server of the adapter; without it, the adapter is the one in memory.
//   BENCH_CHANNEL: Prefix of the channels there.
//
// node --expose-gc app.js

import { once } from "node:events";
import { createServer } from "node:http";
import { setTimeout as sleep } from "node:timers/promises";

import { createAdapter } from "@socket.io/redis-adapter";
import { createClient } from "redis";
import { Server } from "socket.io";

const PAYLOAD = "x".repeat(100);

const { BENCH_PORT, BENCH_REDIS_URL, BENCH_CHANNEL } = process.env;

// The runner asks for "/" to learn that this process serves; Socket.IO takes its own path before.
const http = createServer((_, response) => response.end("up"));
const io = new Server(http); // engine ws and no permessage-deflate, as everything else by default

let publisher;
if (BENCH_REDIS_URL) {
  publisher = createClient({ url: BENCH_REDIS_URL });
  const subscriber = publisher.duplicate();
  for (const client of [publisher, subscriber]) {
    client.on("error", (error) => {
      throw error; // a measurement without Redis is worth nothing
    });
    await client.connect();
  }
  io.adapter(createAdapter(publisher, subscriber, { key: BENCH_CHANNEL }));
}

/** Seconds of the monotonic clock that the processes of one machine share. */
const monotonic = () => Number(process.hrtime.bigint()) / 1e9;

/** Seconds of CPU that this process has used so far, all its threads together. */
const cpu = () => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1e6;
};

io.on("connection", (socket) => {
  socket.on("stats", (collect, reply) => {
    if (collect) globalThis.gc();
    const { wsEngine, perMessageDeflate } = io.engine.opts;
    reply({
      pid: process.pid,
      cpu: cpu(),
      runtime: "node",
      guarded: false,
      limited: false,
      sessions: io.engine.clientsCount,
      adapter: io.of("/").adapter.constructor.name,
      engine: wsEngine.name,
      deflate: Boolean(perMessageDeflate),
    });
  });

  socket.on("echo", (text, reply) => reply(text));

  socket.on("join", (room, reply) => {
    socket.join(room);
    reply(room);
  });

  socket.on("publish", (number) => io.emit("news", number, PAYLOAD));

  socket.on("emit_many", async (count, reply) => {
    const cpuBefore = cpu();
    const startedAt = monotonic();
    for (let number = 0; number < count; number++) io.to("elsewhere").emit("tick", PAYLOAD);
    const calledAt = monotonic();
    await publisher.ping(); // commands of one connection are answered in turn
    const publishedAt = monotonic();
    await sleep(100); // lets the subscriber read back what was published, which is CPU as well
    reply({
      calls: calledAt - startedAt,
      published: publishedAt - startedAt,
      cpu: cpu() - cpuBefore,
    });
  });

  socket.on("burst", (room, count) => {
    for (let number = 0; number < count; number++) io.to(room).emit("tick", number, 0, PAYLOAD);
  });

  socket.on("stream", async (room, rate, count) => {
    const startedAt = monotonic();
    for (let number = 0; number < count; number++) {
      const left = startedAt + number / rate - monotonic();
      await sleep(Math.max(0, 1000 * left));
      io.to(room).emit("tick", number, monotonic(), PAYLOAD);
    }
  });
});

http.listen(Number(BENCH_PORT), "127.0.0.1");
await once(http, "listening");
