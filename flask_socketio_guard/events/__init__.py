"""Events from clients: validation, ordering, rate limits, handlers and acknowledgements."""
