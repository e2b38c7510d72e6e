"""Tests, one file a module; parity.py is what they share."""
