"""What clients send: handlers, their order and bounds, callbacks."""
