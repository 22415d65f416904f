"""Many clients in all patterns at once, for half an hour: nothing lost, nothing kept."""
