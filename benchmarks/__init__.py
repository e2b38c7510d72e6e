"""Benchmarks, a script a question; each prints a table (`--json FILE` writes it) and explains itself with `--help`.

  python -m benchmarks.train_step   the training step of one device, and with --from-files fed from files
  python -m benchmarks.inference    an image to logits and to full-size labels
  python -m benchmarks.loss         cross-entropy of upsampled logits and its gradient
  python -m benchmarks.input        files to training crops
  python -m benchmarks.evaluate     files to the confusion matrix
  python -m benchmarks.start_up     seconds to the first step, and to import each command
  python -m benchmarks.tpu          memory, arithmetic and traffic of a TPU slice, by its compiler

`--peer torch` runs PyTorch beside ours in train_step, inference, loss and evaluate. Without `--config`
it is TopFormer-T for ADE20K.
"""
