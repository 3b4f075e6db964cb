"""Training and measurement of the bundled model pair (a Llama target and its distilled draft).

Holds the code that makes `tandem/models` from nothing; the serving code does not import it.
"""
