"""The foundation of the guard: runtimes (greenlets or threads), supervised tasks, deadlines."""
