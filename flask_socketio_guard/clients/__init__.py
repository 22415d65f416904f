"""Who is there: connections, admission, what waits to be sent to them, their end."""
