"""Commands that look after what is stored, each a module."""
