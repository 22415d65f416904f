// A client that wants a WebSocket only, and is refused; prints what it is told, and when, as JSON.
// node refused_client.mjs <client module> <URL>
import { createRequire } from "node:module";

const [clientModule, url] = process.argv.slice(2);
const { io } = createRequire(import.meta.url)(clientModule);
const began = performance.now();
const socket = io(url, { transports: ["websocket"], reconnection: false });
const told = (message) => {
  console.log(JSON.stringify({ message, milliseconds: performance.now() - began }));
  process.exit(0);
};
socket.on("connect", () => told("connected"));
socket.on("connect_error", (error) => told(error.message));
