"""The message queue between processes: outbox, listener and what a transport must provide."""
