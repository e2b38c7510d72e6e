"""Tests, one file a module; parity.py and torch_reference.py are what they share."""
