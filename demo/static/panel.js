// The "Break it" panel, which uses the socket that floor.js has opened.
"use strict";

if (floor && $("faults")) {
  const { socket, processes } = floor;

  socket.on("demo:question", (acknowledge) => acknowledge("yes"));

  // Prefer a client of another process: its acknowledgement arrives through the listener.
  function someClient() {
    const others = [...processes].filter(([process]) => process !== here);
    return others.flatMap(([, { traders }]) => traders)[0]?.sid ?? socket.id;
  }

  async function raiseInHandler() {
    const started = performance.now();
    try {
      const answer = await socket.timeout(5000).emitWithAck("demo:raise");
      const took = Math.round(performance.now() - started);
      log(`The handler raised. Acknowledged after ${took} ms: ${JSON.stringify(answer)}`, "good");
    } catch {
      log("The handler raised, and the client received no answer", "bad");
    }
  }

  async function flood() {
    const wanted = 2000;
    const answers = await Promise.allSettled(
      Array.from({ length: wanted }, () => socket.timeout(20000).emitWithAck("demo:slow")),
    );
    const values = answers.map(({ value }) => value ?? {});
    const running = Math.max(...values.map((value) => value.running ?? 0));
    const handled = values.filter((value) => value.running).length;
    log(
      `Sent ${wanted} slow events: at most ${running} ran at a time, ${handled} were handled`,
      handled === wanted ? "good" : "bad",
    );
  }

  function sendRubbish() {
    socket.io.engine.write("2[this is no JSON");
    log("Sent a malformed packet", "warn");
  }

  const byClient = { handler: raiseInHandler, flood, malformed: sendRubbish };

  async function inject(fault, label) {
    if (byClient[fault]) return byClient[fault]();
    try {
      const response = await fetch(`/demo/${fault}`, {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Break-It": "yes" },
        body: JSON.stringify({ sid: someClient() }),
      });
      if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
      log(`${label}: done`, "warn");
    } catch (error) {
      log(`${label}: could not be done, ${error.message}`, "bad");
    }
  }

  $("faults").addEventListener("click", (event) => {
    const { fault } = event.target.dataset;
    if (fault) inject(fault, event.target.textContent);
  });
}
