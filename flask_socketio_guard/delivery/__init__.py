"""Acknowledged delivery: messages are kept until a client acknowledges them, at least once."""
