"""What `check` finds in a data set, and what `train` says about its labels when it starts."""
