"""Many short requests of every kind through one embedded service: does anything grow with their number?"""
