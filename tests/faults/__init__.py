"""What is promised holds when parts fail: real processes and servers, faults between and in them, and a ledger.

`make faults` runs campaigns of rounds; the short form is part of `make test`. See docs/guarantees.md.
"""
