"""Clients: connections, admission, handshakes, send queues, broadcasts and the drain."""
