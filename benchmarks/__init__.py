"""Speed and memory of an application with the guard, compared with the same one without it."""
