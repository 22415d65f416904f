"""What everything stands on: greenlets or threads, supervised tasks, deadlines."""
