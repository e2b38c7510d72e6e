"""The table of the network's three sizes."""

import dataclasses

from topformer_jax.models.token_pyramid import Block


@dataclasses.dataclass(frozen=True)
class Variant:
    """One size of the network.

    Attributes:
        blocks: of the token pyramid.
        taps: the blocks (counted from 0) whose outputs are the tokens of strides 4, 8, 16 and 32.
        head_channels: of the injections and the head.
        heads: of the attention.
    """

    blocks: tuple[Block, ...]
    taps: tuple[int, ...]
    head_channels: int
    heads: int

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the tokens of strides 4, 8, 16 and 32."""
        return tuple(self.blocks[tap].channels for tap in self.taps)


def _blocks(*rows: tuple[int, int, int, int]) -> tuple[Block, ...]:
    return tuple(Block(*row) for row in rows)


VARIANTS = {
    "tiny": Variant(
        blocks=_blocks(
            (3, 1, 16, 1),
            (3, 4, 16, 2),
            (3, 3, 16, 1),
            (5, 3, 32, 2),
            (5, 3, 32, 1),
            (3, 3, 64, 2),
            (3, 3, 64, 1),
            (5, 6, 96, 2),
            (5, 6, 96, 1),
        ),
        taps=(2, 4, 6, 8),
        head_channels=128,
        heads=4,
    ),
    "small": Variant(
        blocks=_blocks(
            (3, 1, 16, 1),
            (3, 4, 24, 2),
            (3, 3, 24, 1),
            (5, 3, 48, 2),
            (5, 3, 48, 1),
            (3, 3, 96, 2),
            (3, 3, 96, 1),
            (5, 6, 128, 2),
            (5, 6, 128, 1),
            (3, 6, 128, 1),
        ),
        taps=(2, 4, 6, 9),
        head_channels=192,
        heads=6,
    ),
    "base": Variant(
        blocks=_blocks(
            (3, 1, 16, 1),
            (3, 4, 32, 2),
            (3, 3, 32, 1),
            (5, 3, 64, 2),
            (5, 3, 64, 1),
            (3, 3, 128, 2),
            (3, 3, 128, 1),
            (5, 6, 160, 2),
            (5, 6, 160, 1),
            (3, 6, 160, 1),
        ),
        taps=(2, 4, 6, 9),
        head_channels=256,
        heads=8,
    ),
}
