"""Checkpoints: a file or a folder of some format on one side, a model on the other.

    torch_format         .pth files of the official code: names, layouts, reading and writing
    safetensors_format   .safetensors files
    orbax_store          checkpoint folders: of one model, and of a training run
    load                 which format a path has, and "this checkpoint into that model", strictly
    origin               what a checkpoint says of its classes and settings, and where a command differs

Every format reads and writes the same: a model's tensors by official name in this package's layout, and metadata.
A model's variables have the official names themselves, so what a reader returns needs no further mapping.
"""

from topformer_jax.checkpoints.load import (
    describe_origin as describe_origin,
    load_model as load_model,
    load_segmenter as load_segmenter,
    load_state_dict as load_state_dict,
    read_checkpoint as read_checkpoint,
    write_checkpoint as write_checkpoint,
)
from topformer_jax.checkpoints.orbax_store import (
    CheckpointStore as CheckpointStore,
    read_model as read_model,
    save_model as save_model,
)
from topformer_jax.checkpoints.origin import (
    Weights as Weights,
    check_label_rules as check_label_rules,
    print_differences as print_differences,
    read_names as read_names,
)
