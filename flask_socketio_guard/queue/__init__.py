"""Messages between processes: the way out, the way in, and the transports between them."""
