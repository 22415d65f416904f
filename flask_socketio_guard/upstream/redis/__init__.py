"""Code that touches private parts of redis-py: the connections of the message queue."""
