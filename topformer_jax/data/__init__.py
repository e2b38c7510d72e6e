"""Data: what the sets are. Knows no model and no mesh."""
