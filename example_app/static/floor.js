// The page of the Harbour Exchange: plain JavaScript on the standard Socket.IO client.
"use strict";

const $ = (id) => document.getElementById(id);
const here = document.body.dataset.process;
const SILENT_AFTER = 3000; // ms without a tick until a process counts as silent

// ---- helpers ----

function element(tag, { text, className, ...attributes } = {}, ...children) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function log(text, mood = "") {
  const now = new Date();
  const time = element("time", { text: now.toTimeString().slice(0, 8), datetime: now.toISOString() });
  $("log").prepend(element("li", {}, time, element("span", { text, className: mood })));
  while ($("log").children.length > 200) $("log").lastChild.remove();
}

const money = (value) =>
  value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });

// ---- health of this process: by HTTP, which works even if the socket does not ----

let lastHealth = "";

function showHealth(state, status, listener, code) {
  $("health").dataset.state = $("health-chip").dataset.state = state;
  $("health-short").textContent = $("health-status").textContent = status;
  $("health-code").textContent = code ? `HTTP ${code}` : "";
  $("listener").textContent = listener;
  $("health-at").textContent = `at ${new Date().toTimeString().slice(0, 8)}`;
  const health = `${status}, listener ${listener}`;
  if (health !== lastHealth) log(`Health of process ${here}: ${health}`, state);
  lastHealth = health;
}

async function pollHealth() {
  try {
    const response = await fetch("/healthz", {
      cache: "no-store",
      signal: AbortSignal.timeout(2000),
    });
    const { status, listener } = await response.json();
    showHealth({ pass: "good", warn: "warn" }[status] ?? "bad", status, listener, response.status);
  } catch {
    showHealth("bad", "no answer", "unknown");
  }
  setTimeout(pollHealth, 1000);
}

pollHealth();

// ---- the connection ----

let floor = null; // the socket and the state of the processes

if (typeof io === "undefined") {
  $("client-missing").hidden = false;
  $("connection").textContent = "client missing";
  $("connection-chip").dataset.state = "bad";
  document.body.classList.add("clientless");
  log("The Socket.IO client for JavaScript is missing; see the top of the page.", "bad");
} else {
  floor = openFloor();
}

function openFloor() {
  const names = ["Ada", "Bram", "Chidi", "Dina", "Emeka", "Freya", "Goran", "Hana", "Imani", "Jonas"];
  const name =
    sessionStorage.getItem("name") ??
    `${names[Math.floor(Math.random() * names.length)]} ${Math.floor(Math.random() * 90) + 10}`;
  $("name").value = name;

  // Identifies this page as long as it is open, across reconnections and processes.
  const key =
    sessionStorage.getItem("key") ??
    Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  sessionStorage.setItem("key", key);

  const socket = io({ auth: { name, key }, reconnectionDelay: 300, reconnectionDelayMax: 2000 });
  const processes = new Map(); // process -> {pid, heard, traders}
  const lastPrices = new Map(); // pit -> [[second, price], ...]
  let pit = sessionStorage.getItem("pit");
  let wasConnected = false;

  function showConnection(state, text) {
    document.body.classList.toggle("offline", !socket.connected);
    for (const button of document.querySelectorAll("main button")) {
      button.disabled = !socket.connected;
    }
    $("connection-chip").dataset.state = state;
    $("connection").textContent = text;
  }

  function showTransport() {
    $("transport").textContent = socket.connected ? socket.io.engine.transport.name : "–";
  }

  showConnection("warn", "connecting");

  socket.on("connect", () => {
    showConnection("good", "connected");
    log(wasConnected ? "Connected again" : "Connected", "good");
    wasConnected = true;
    showTransport();
    socket.io.engine.on("upgrade", showTransport);
    join(pit ?? $("pits").firstElementChild.textContent); // a client that joins no pit is disconnected
  });
  socket.on("connect_error", (error) => {
    if (socket.active) return; // the manager reconnects, see reconnect_attempt
    showConnection("bad", "refused");
    log(`The server refused the connection: ${error.message} ${JSON.stringify(error.data ?? "")}`, "bad");
  });
  socket.on("disconnect", (reason) => {
    showConnection(socket.active ? "warn" : "bad", socket.active ? "reconnecting" : "disconnected");
    showTransport();
    log(`Disconnected: ${reason}`, "bad");
    closeQuestion();
  });
  socket.io.on("reconnect_attempt", (attempt) => {
    showConnection("warn", `reconnecting, attempt ${attempt}`);
  });

  // ---- pits, prices, trades ----

  async function join(wanted) {
    const answer = await ask("join", wanted);
    if (!answer) return;
    if (answer.pit !== pit) {
      $("tape").replaceChildren();
      $("tape-empty").hidden = false;
    }
    pit = answer.pit;
    sessionStorage.setItem("pit", pit);
    lastPrices.set(pit, answer.prices);
    $("pit-name").textContent = pit;
    for (const tab of $("pits").children) tab.setAttribute("aria-pressed", tab.textContent === pit);
    drawPrices();
    drawTraders();
  }

  // Emits an event and waits for its acknowledgement; the guard sends one for a failure, too.
  async function ask(event, ...args) {
    try {
      const answer = await socket.timeout(5000).emitWithAck(event, ...args);
      if (!answer?.error) return answer ?? {};
      log(`“${event}” failed: ${answer.error.message ?? answer.error.code}`, "bad");
    } catch {
      log(`“${event}” was not acknowledged`, "bad");
    }
    return null;
  }

  $("pits").addEventListener("click", (event) => {
    if (event.target.matches("button")) join(event.target.textContent);
  });

  function drawPrices() {
    const prices = lastPrices.get(pit) ?? [];
    if (prices.length < 2) return;
    const values = prices.map(([, value]) => value);
    const low = Math.min(...values);
    const high = Math.max(...values);
    const end = prices.at(-1)[0];
    const points = prices.map(([second, value]) => {
      const x = 600 - ((end - second) / 59) * 600;
      const y = 12 + (1 - (value - low) / (high - low || 1)) * 156;
      return `${x.toFixed(1)} ${y.toFixed(1)}`;
    });
    const line = `M${points.join("L")}`;
    $("chart-line").setAttribute("d", line);
    $("chart-area").setAttribute("d", `${line}L600 180L${points[0].split(" ")[0]} 180Z`);
    const change = values.at(-1) - values[0];
    $("price").textContent = money(values.at(-1));
    $("change").textContent = `${change < 0 ? "▼" : "▲"} ${money(Math.abs(change))}`;
    $("change").className = `change ${change < 0 ? "down" : "up"}`;
    $("range").textContent = `${money(low)} to ${money(high)}`;
  }

  function showOnTape(node) {
    $("tape-empty").hidden = true;
    $("tape").prepend(node);
    while ($("tape").children.length > 6) $("tape").lastChild.remove();
  }

  socket.on("tick", ({ process, pid, at, prices, traders, connections }) => {
    const known = processes.get(process);
    if (known && known.pid !== pid) log(`Process ${process} has a new worker, pid ${pid}`, "warn");
    processes.set(process, { pid, traders, connections, heard: performance.now() });
    if (process === here) $("process").textContent = `${process} · pid ${pid}`;
    for (const [each, value] of Object.entries(prices)) {
      const series = lastPrices.get(each) ?? [];
      // Every process sends prices; the first tick of each second counts.
      if (!series.length || series.at(-1)[0] < at) series.push([at, value]);
      while (series.length && series[0][0] < at - 59) series.shift();
      lastPrices.set(each, series);
    }
    drawPrices();
    drawTraders();
  });

  socket.on("trade", ({ who, side, lots, price }) => {
    showOnTape(
      element(
        "li",
        { className: "flash" },
        element("span", { text: who, className: "who" }),
        element("span", { text: side === "buy" ? "buys" : "sells", className: side === "buy" ? "up" : "down" }),
        element("span", { text: `${lots} lot${lots === 1 ? "" : "s"}` }),
        element("span", { text: money(price) }),
      ),
    );
  });

  $("trade").addEventListener("submit", async (event) => {
    event.preventDefault();
    const deal = await ask("trade", event.submitter?.value ?? "buy", $("lots").valueAsNumber);
    if (deal) log(`You ${deal.side} ${deal.lots} × ${deal.pit} at ${money(deal.price)}`);
  });

  // ---- contract notes: acknowledged delivery ----

  onDelivery(socket, "contract", ({ side, lots, pit: traded, price }) => {
    $("notes-empty").hidden = true;
    $("notes").prepend(
      element(
        "li",
        { className: "flash" },
        element("span", { text: `You ${side}`, className: side === "buy" ? "up" : "down" }),
        element("span", { text: `${lots} × ${traded}` }),
        element("span", { text: money(price * lots) }),
      ),
    );
    while ($("notes").children.length > 6) $("notes").lastChild.remove();
    log(`Contract note: ${side} ${lots} × ${traded}`, "good");
  });

  $("drop").addEventListener("click", () => {
    log("Disconnected for 6 seconds", "warn");
    socket.disconnect();
    setTimeout(() => socket.connect(), 6000);
  });

  // ---- traders, and questions between them ----

  function drawTraders() {
    const rows = [];
    for (const [process, { traders }] of [...processes].sort()) {
      for (const trader of traders.filter((each) => each.pit === pit)) {
        const row = element(
          "li",
          {},
          element("span", { text: trader.name, className: "who" }),
          element("span", { text: process, className: "tag", title: `on process ${process}` }),
        );
        if (trader.sid === socket.id) {
          row.append(element("span", { text: "you", className: "soft" }));
        } else {
          const button = element("button", { text: "Ask for a price", type: "button" });
          button.dataset.sid = trader.sid;
          row.append(button);
        }
        rows.push([trader.sid, row]);
      }
    }
    // Redrawn only after a change: a button that is replaced loses the focus.
    const seen = JSON.stringify(rows.map(([sid, row]) => [sid, row.textContent, socket.id]));
    if (seen === $("traders").dataset.seen) return;
    $("traders").dataset.seen = seen;
    $("traders").replaceChildren(...rows.map(([, row]) => row));
  }

  $("traders").addEventListener("click", async (event) => {
    const { sid } = event.target.dataset;
    if (sid && (await ask("ask", sid))) log("Asked for a price; the pit will see the answer");
  });

  $("rename").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("name", $("name").value);
    socket.auth.name = $("name").value;
    socket.disconnect().connect();
  });

  let pending = null; // {acknowledge, timer} of the question being shown

  function closeQuestion(answer) {
    if (!pending) return;
    clearInterval(pending.timer);
    if (answer !== undefined) pending.acknowledge(answer);
    pending = null;
    $("question").hidden = true;
  }

  socket.on("question", ({ who, pit: asked, price }, acknowledge) => {
    closeQuestion(null);
    let left = 20;
    const countDown = () => {
      $("question-left").textContent = `${left} seconds left.`;
      left -= 1;
      if (left < 0) closeQuestion();
    };
    $("question-text").textContent = `${who} asks: what is your price for a lot of ${asked}?`;
    $("answer-price").value = price;
    $("question").hidden = false;
    pending = { acknowledge, timer: setInterval(countDown, 1000) };
    countDown();
  });

  $("answer").addEventListener("submit", (event) => {
    event.preventDefault();
    closeQuestion($("answer-price").valueAsNumber);
  });
  $("decline").addEventListener("click", () => closeQuestion(null));

  socket.on("answer", ({ who, pit: asked, answer }) => {
    const text = answer === null ? "no answer" : money(answer);
    log(`${who} asked for a price of ${asked}: ${text}`, answer === null ? "warn" : "good");
  });

  // ---- processes that send ticks ----

  setInterval(() => {
    const now = performance.now();
    const silent = [];
    $("processes").replaceChildren(
      ...[...processes].sort().map(([process, { pid, connections, heard }]) => {
        const age = now - heard;
        const isSilent = age > SILENT_AFTER;
        if (isSilent) silent.push(process);
        return element(
          "li",
          {},
          element("span", { text: process, className: "tag" }),
          element("span", { text: `pid ${pid}`, className: "soft" }),
          element("span", { text: `${connections} connection${connections === 1 ? "" : "s"}`, className: "soft" }),
          element("span", {
            text: isSilent ? `silent for ${Math.floor(age / 1000)} s` : "ticking",
            className: `pulse ${isSilent ? "bad" : "good"}`,
          }),
        );
      }),
    );
    const isDeaf = socket.connected && silent.length > 0;
    const notice = `Nothing heard from ${silent.join(" and ")}: events between the processes wait.`;
    // Written only when it changes; otherwise a screen reader would repeat it four times a second.
    if (isDeaf !== ($("silence").textContent !== "")) $("silence").textContent = isDeaf ? notice : "";
  }, 250);

  return { socket, processes };
}
