"""How fast Switchboard is, measured beside others under the same load; README.md says how it is run and read."""
