"""Files for other runtimes: a checkpoint's network, its weights and what describes them, in one file.

    network          the function that a file computes, from the model's own modules
    onnx_graph       an ONNX graph while it is written; `onnx_rules` translates a traced JAX program into one
    onnx_file, litert_file, stablehlo_file    one format each: `write` gives a file's bytes, `open_bytes` runs them
    litert_operations    resizes and poolings as LiteRT's own
    exported         what any exported file is in Python: a function of images that carries its description
    prediction       labels of pictures of any size from a file, for `predict` and `evaluate`
    verification     a file in its own runtime against the model

The packages of a format are imported when it is used; a missing one is one line.
"""

from topformer_jax.exporters.exported import Exported as Exported, open_exported as open_exported
