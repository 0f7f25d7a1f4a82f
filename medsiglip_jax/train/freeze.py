"""Which parameters train: the tree in two parts, a stack of blocks cut above its frozen ones.

The frozen part has no gradient and no optimiser state. A tower whose first k blocks are frozen
keeps them under "frozen_blocks" beside "encoderblock"; the model runs the two one after the other,
and the backward pass ends at the cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from medsiglip_jax.model import tree

Params = dict[str, Any]
FROZEN_STACK = "/frozen_blocks/"


@dataclass(frozen=True)
class Partition:
    """How a tree is split; works on any tree with these paths, of arrays or of their shardings.

    Attributes:
        frozen: paths of the frozen parameters, after the cut.
        depths: for each tower that is cut ("img/Transformer") its number of frozen first blocks.
    """

    frozen: frozenset[str]
    depths: tuple[tuple[str, int], ...] = ()

    def split(self, params: Params) -> tuple[Params, Params]:
        """Returns (trainable, frozen); `join` makes of them a tree that the model takes."""
        cut = self._cut(params)
        frozen = {path: cut.pop(path) for path in list(cut) if path in self.frozen}
        return tree.unflatten(cut), tree.unflatten(frozen)

    def whole(self, params: Params) -> Params:
        """A joined tree with its stacks in one piece again."""
        flat = tree.flatten(params)
        for path in [path for path in flat if FROZEN_STACK in path]:
            trainable = path.replace(FROZEN_STACK, tree.STACK)
            flat[trainable] = jnp.concatenate([flat.pop(path), flat[trainable]])
        return tree.unflatten(flat)

    def _cut(self, params: Params) -> dict[str, Any]:
        depths, cut = dict(self.depths), {}
        for path, leaf in tree.items(params):
            depth = depths.get(path.split(tree.STACK)[0]) if tree.STACK in path else None
            if depth:
                cut[path.replace(tree.STACK, FROZEN_STACK)] = leaf[:depth]
                leaf = leaf[depth:]
            cut[path] = leaf
        return cut


def join(trainable: Params, frozen: Params) -> Params:
    """The tree that the model takes."""
    return tree.unflatten({**tree.flatten(trainable), **tree.flatten(frozen)})


def partition(patterns: Sequence[str], params: Params) -> Partition:
    """Freezes every parameter that one of the regexes matches.

    Args:
        patterns: matched in full against "/"-joined paths; blocks are "…/encoderblock_0/…" and so
            on. "img/.*" is the image tower, "img/Transformer/encoderblock_(1?[0-9]|2[0-2])/.*" its
            first 23 blocks.
        params: arrays or their shapes.

    Raises:
        ValueError: a pattern matches nothing, nothing is left to train, or the frozen blocks of a
            tower are not its first ones.
    """
    rules = [(pattern, True) for pattern in patterns]
    flags = tree.match_layers([*rules, (".*", False)], params)
    if all(all(values) for values in flags.values()):
        raise ValueError(f"freeze={list(patterns)} leaves nothing to train")
    depths = _depths(flags)
    frozen = set()
    for path, values in flags.items():
        depth = depths.get(path.split(tree.STACK)[0], 0) if tree.STACK in path else 0
        if depth and values[0]:
            frozen.add(path.replace(tree.STACK, FROZEN_STACK))
        if values[-1]:
            frozen.add(path)
    return Partition(frozenset(frozen), tuple(sorted(depths.items())))


def _depths(flags: dict[str, list[bool]]) -> dict[str, int]:
    depths: dict[str, int] = {}
    for path, values in flags.items():
        depth = sum(values)
        if depth in (0, len(values)):
            continue
        tower = path.split(tree.STACK)[0]
        if not all(values[:depth]) or depths.setdefault(tower, depth) != depth:
            raise ValueError(
                f"freeze matches blocks of {path} that are not the first ones, or not as many as "
                f"of the other parameters of {tower}; freeze blocks 0 to k-1 as a whole"
            )
    return depths
