"""Files for other runtimes: a checkpoint's network, its weights and their description, in one file.

    network          the function that a file computes, from the model's own modules
    onnx_graph       a traced JAX program as an ONNX graph
    onnx_file, litert_file, stablehlo_file    one format each: `write` gives a file's bytes, `open_bytes` runs them
    exported         an exported file in Python: a function of images
    verification     compares a file in its own runtime with the model

The packages of a format are imported when it is used; a missing one is one line.
"""

from topformer_jax.exporters.exported import Exported as Exported, open_exported as open_exported
