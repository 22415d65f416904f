"""What is known of what happens: one record for each fact, and who is told of it."""
