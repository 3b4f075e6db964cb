"""Programs that nobody has read run behind walls, or not at all."""
