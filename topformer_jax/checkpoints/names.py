"""A file's names brought to the model's, whichever trainer wrote them.

A reader puts the keys that lead to a state dict before its names, with "/": `state_dict/module.backbone...`. Wrappers
put prefixes before names; averages, teachers, profilers, losses and auxiliary heads add tensors. What is taken off or
left out is printed. A name that no rule knows stays as it is, so that the caller can report it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from topformer_jax.runtime import processes
from topformer_jax.runtime.errors import UserError

Shape = tuple[int, ...]
# The same modules' names in older checkpoints, and today's.
ALIASES = {
    "patch_embed": "tpm",
    "fuse_blocks": "SIM",
    "to_feat1": "local_embedding",
    "to_feat2": "global_embedding",
    "fuse2": "global_act",
}
# What DistributedDataParallel, torch.compile, Fabric, FSDP and activation checkpointing put anywhere into a name.
WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Where a file keeps its tensors, the usual places first.
STATE_DICT_KEYS = (
    *("state_dict", "model", "model_state_dict", "model_state"),
    *("net", "network", "params", "weights", "module"),
)
# Tensors that the network does not need, by what they are.
SURPLUS = {
    "of a profiler": re.compile(r"(.+\.)?total_(ops|params)"),
    "that count what was averaged": re.compile(r"n_averaged|steps"),
    "of auxiliary heads": re.compile(r"(auxiliary_head|aux_head|aux_classifier)\..+"),
    "of a loss": re.compile(r"(.+\.)?(criterion|loss(es|_\w+)?)\..+"),
}


def match_names(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Shape], source: str, meta: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Brings a file's names to the model's: without prefixes, with or without `backbone.`, without old aliases.

    Returns:
        Tensors by the model's names; those of unknown names by their own, without prefixes.

    Raises:
        UserError: two tensors of the file end up with the same name, or it holds two networks that fit.
    """
    found = {name: _find(name, shapes) for name in tensors}
    if not any(match for _, match in found.values()):
        return {name.rpartition("/")[2]: tensor for name, tensor in tensors.items()}
    chosen, others, is_average = _choose_network(tensors, found, shapes, source)
    place, slash, inner = chosen.rpartition("/")
    own, left_out = [], []  # the chosen network's names and what is left of them; all others
    for name, (prefix, match) in found.items():
        short = name.removeprefix(chosen).rpartition("/")[2]
        is_elsewhere = name.rpartition("/")[0] != place or prefix in others
        if is_elsewhere or (match is None and _is_other_network(short)):
            left_out.append(name)
        else:
            own.append((name, short))
    said = []
    if left_out or place not in ("", *STATE_DICT_KEYS[:2]):
        said.append(f"{_describe(chosen)} taken{', the averages' * is_average} ({len(own)} tensors)")
    if branches := Counter(_describe_branch(name, chosen) for name in left_out):
        counts = [f"{branch} ({count})" for branch, count in branches.items()]
        said.append(f"left out: {', '.join(counts[:4])}{', ...' * (len(counts) > 4)}")
    inside = {part for _, short in own for part in short.split(".")}
    if taken_off := [inner] * bool(inner) + [f"{word}." for word in WRAPPERS if word in inside]:
        said.append(f"taken off the names: {', '.join(taken_off)}")
    if said:
        processes.say(f"{source}: {'; '.join(said)}")
    unknown = [short for name, short in own if found[name][1] is None]
    surplus = _find_surplus(unknown, [short for _, short in own], source, meta)
    matched: dict[str, np.ndarray] = {}
    for name, short in own:
        if short in surplus:
            continue
        plain = _unwrap(short.split("."))
        match = _known_as(plain, shapes) or plain
        if match in matched:
            raise UserError(f"two tensors of {source} are {match}: {name.rpartition('/')[2]} is the second")
        matched[match] = tensors[name]
    return matched


def fill_counters(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, Shape], source: str
) -> dict[str, np.ndarray]:
    """Adds BatchNorms' counters of batches, which some trainers do not keep, where the statistics are there."""
    missing = [
        name
        for name in expected
        if name.endswith(".num_batches_tracked")
        and name not in tensors
        and name.replace("num_batches_tracked", "running_var") in tensors
    ]
    if missing:
        processes.say(f"{source}: {len(missing)} num_batches_tracked are missing, and start at 0")
    return {**tensors, **{name: np.zeros(expected[name], np.int32) for name in missing}}


def _unwrap(parts: Sequence[str]) -> str:
    return ".".join(part for part in parts if part not in WRAPPERS)


def _known_as(name: str, known: Mapping[str, Any]) -> str | None:
    """The model's name of a file's."""
    # `fuse2` is an old name of `global_act`, and a present one in the other two injections: try it as it is.
    for spelling in (name, ".".join(ALIASES.get(part, part) for part in name.split("."))):
        for candidate in (spelling, f"backbone.{spelling}", spelling.removeprefix("backbone.")):
            if candidate in known:
                return candidate
    return None


def _find(name: str, known: Mapping[str, Any]) -> tuple[str, str | None]:
    """The keys and the prefix of a file's name, and the model's name of the rest; None for an unknown name."""
    place, slash, rest = name.rpartition("/")
    parts = rest.split(".")
    for start in range(len(parts)):
        if match := _known_as(_unwrap(parts[start:]), known):
            while parts[start] in WRAPPERS:
                start += 1
            return "".join([place, slash, *(f"{part}." for part in parts[:start])]), match
    return place + slash, None


def _choose_network(
    tensors: Mapping[str, np.ndarray],
    found: Mapping[str, tuple[str, str | None]],
    shapes: Mapping[str, Shape],
    source: str,
) -> tuple[str, set[str], bool]:
    """The prefix of the network that is taken, those of the file's others, and whether it is of averages.

    A network that fits the model's shapes comes before one of another variant, such as a teacher; averages come
    before what they are averages of; then the usual places come first.
    """
    counts = Counter(prefix for prefix, match in found.values() if match)
    networks = {prefix for prefix, count in counts.items() if 2 * count >= max(counts.values())}
    fitting = Counter(
        prefix for name, (prefix, match) in found.items() if match and tensors[name].shape == shapes[match]
    )
    best = [prefix for prefix in networks if 2 * fitting[prefix] >= counts[prefix]] or list(networks)
    averages = {prefix for prefix in best if is_averaged(prefix)}
    if "ema_state_dict/steps" in tensors:  # mmengine's EMAHook swaps the two when it saves
        averages = {prefix for prefix in best if prefix.startswith("state_dict/")}
    best = [prefix for prefix in best if prefix in averages] or best
    best = [prefix for prefix in best if _rank(prefix) == min(map(_rank, best))]
    if len(best) > 1:
        several = " and ".join(sorted(f"{_describe(prefix)} ({counts[prefix]})" for prefix in best)[:4])
        raise UserError(
            f"{source} holds {len(best)} networks that fit, {several}: torch.save the state dict of one of them to a "
            "file of its own"
        )
    return best[0], networks - {*best}, best[0] in averages


def _rank(prefix: str) -> int:
    """The place of a network's first key among the usual ones."""
    key = prefix.partition("/")[0] if "/" in prefix else ""
    return STATE_DICT_KEYS.index(key) if key in STATE_DICT_KEYS else len(STATE_DICT_KEYS)


def is_averaged(key: str) -> bool:
    """Whether a key of a file, or a prefix of its names, says that these weights are averages."""
    return not {"ema", "swa", "average", "averaged"}.isdisjoint(re.split(r"[_./]", key.lower()))


def _is_other_network(name: str) -> bool:
    """Whether a tensor that is not of the chosen network belongs to its teacher, student or average."""
    parts = name.split(".")[:-1][:2]
    return any(part in ("teacher", "student") or is_averaged(part) for part in parts)


def _describe_branch(name: str, chosen: str) -> str:
    """Where a tensor that is left out stands: its state dict, or the part of the name that tells it from `chosen`."""
    place, slash, rest = name.rpartition("/")
    if place and place != chosen.rpartition("/")[0]:
        return _describe(place + slash)
    shared = chosen if name.startswith(chosen) else place + slash
    return _describe(f"{shared}{name.removeprefix(shared).split('.')[0]}.")


def _describe(prefix: str) -> str:
    return f"{prefix.replace('/', '.')}*" if prefix else "names without a prefix"


def _find_surplus(
    unknown: Sequence[str], names: Sequence[str], source: str, meta: Mapping[str, Any]
) -> set[str]:
    """Those of the unknown names that the network does not need; says how many there are of each kind."""
    surplus: set[str] = set()
    buffers = {f"ema_{name.replace('.', '_')}" for name in names}
    if averages := buffers.intersection(unknown):
        # mmcv swaps the two at the end of an epoch, before it saves; its runner by iterations calls no such hook.
        holds = (
            "the weights as trained: a run by iterations keeps its averages in ema_*"
            if "IterBasedRunner" in str(meta.get("config"))
            else "the averages in a file of an epoch's end, the weights as trained in one of a run by iterations"
        )
        processes.say(
            f"{source}: left out {len(averages)} ema_* of mmcv's EMAHook; the plain names hold {holds}"
        )
        surplus |= averages
    said = []
    for kind, pattern in SURPLUS.items():
        if matching := [name for name in unknown if pattern.fullmatch(name)]:
            examples = ", ".join(matching[:2]) + ", ..." * (len(matching) > 2)
            said.append(f"{len(matching)} tensors {kind} ({examples})")
            surplus.update(matching)
    if said:
        processes.say(f"{source}: left out {', '.join(said)}")
    return surplus
