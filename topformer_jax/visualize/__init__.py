"""Images for people: labels in colour, overlays with a legend, grids, and the evaluation report."""
