"""Speed and memory of a guarded application beside the same one without the guard."""
