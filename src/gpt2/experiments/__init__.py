"""Many trainings at once: one pool of worker processes, and where its jobs come from."""
