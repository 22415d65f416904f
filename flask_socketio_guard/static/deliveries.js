/* Handles each message of guard.deliver(..., with_id=True) once, and acknowledges it.
 *
 * onDelivery(socket, "invoice", (invoice) => ...);
 *
 * The acknowledgement is what the handler returns: {error: "..."} refuses the message. One that
 * throws or rejects leaves it unacknowledged: it comes again. */
function onDelivery(socket, event, handler, remembered = 1000) {
  const known = new Map(); // what the handler makes of each, by the id of the message
  socket.on(event, async (...values) => {
    const acknowledge = values.pop();
    const id = values.pop()?.delivery_id;
    if (!id) return console.error(`${event} has no id: deliver it with with_id=True`);
    if (!known.has(id)) known.set(id, Promise.resolve().then(() => handler(...values)));
    try {
      acknowledge(await known.get(id));
    } catch (error) {
      known.delete(id);
      console.error(error);
    }
    if (known.size > remembered) known.delete(known.keys().next().value);
  });
}
if (typeof module === "object") module.exports = { onDelivery };
