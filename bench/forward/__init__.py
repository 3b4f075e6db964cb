"""`tandem bench forward`: what one forward of the engine costs, and how far the machine's limits are."""
