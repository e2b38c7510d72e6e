"""Data sets: their tables, files, training batches and augmentation. Knows no model and no mesh."""
