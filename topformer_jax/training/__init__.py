"""What the loop of `train.py` calls: the step, the optimizer, the run and its work directory, a graceful end."""
