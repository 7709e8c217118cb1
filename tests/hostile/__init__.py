"""Input that means harm: no 500, nothing stored of what is refused, nothing left behind, no forged line in the log.

`EXAMPLES=100` tries a hundred times as many examples as usual, and others.
"""
