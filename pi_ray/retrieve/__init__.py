"""Equation 3: the examples of a row are the bank rows whose answers score highest against its own.

Rows enter as a `neighbours.Bank`; ids and scores leave. data/ calls it from Ray workers; it imports config/ and the
nouns at the top.
"""
