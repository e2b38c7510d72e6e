"""Benchmarks, one script per question; each prints a table (`--json FILE` writes it) and has `--help`.

  python -m benchmarks.train_step    the training step of one device
  python -m benchmarks.inference     an image to logits and to full-size labels; exported files
  python -m benchmarks.loss          cross-entropy of upsampled logits and its gradient
  python -m benchmarks.evaluate      files to the confusion matrix
  python -m benchmarks.input         files to training crops
  python -m benchmarks.plan          canvases and padding of an evaluation
  python -m benchmarks.page          the page of topformer_jax.demo in Chromium
  python -m benchmarks.side_by_side  a training and PyTorch's, step by step
  python -m benchmarks.gpu           the figures of one GPU in one go: these and more, within nine minutes
  python -m benchmarks.compile       memory, traffic and kernels on TPUs or GPUs that are not here, by their compilers

`--peer torch` runs PyTorch too. The default of `--config` is TopFormer-T for ADE20K.
"""
