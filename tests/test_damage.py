"""Damaged and hostile files: each gives the right result or one line, whatever its bits, types, sizes and names are."""
