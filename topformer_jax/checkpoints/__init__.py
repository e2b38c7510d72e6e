"""Checkpoints: reads and writes files and folders, and loads them into models.

    torch_format         .pth files of the official code
    safetensors_format   .safetensors files
    orbax_store          checkpoint folders of a model or of a training run
    load                 chooses the format, and loads a checkpoint into a model, strictly
    origin               classes and settings of a checkpoint, and how those of a command differ

Every format reads and writes the same: a model's tensors by official name in this package's layout, and metadata.
"""

from topformer_jax.checkpoints.load import (
    describe_origin as describe_origin,
    fresh_names as fresh_names,
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
