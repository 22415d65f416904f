"""What touches private parts of redis-py: the connection under the queue."""
