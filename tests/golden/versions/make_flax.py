"""python make_flax.py FOLDER, in an environment that has one version of flax and jax, and maybe of orbax-checkpoint."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import serialization
from recording import folder, inputs, packed, record, values

VERSION = flax.__version__
OLD_CELLS = VERSION.startswith("0.6")


def cell(cls, features):
    return cls() if OLD_CELLS else cls(features)


def rnn(cls, features, name):
    return (
        nn.RNN(cell(cls, features), cell_size=features, name=name)
        if OLD_CELLS
        else nn.RNN(cell(cls, features), name=name)
    )


class Image(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 2), padding="VALID", name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="norm")(x))
        x = nn.ConvTranspose(4, (2, 3), strides=(2, 2), padding="VALID", name="up")(x)
        return nn.Dense(5, name="dense")(x.reshape(x.shape[0], -1))


class Text(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(7, 4, name="embedding")(x)
        x = rnn(nn.OptimizedLSTMCell, 5, "lstm")(x)
        x = nn.LayerNorm(epsilon=1e-3, name="norm")(x)
        x = rnn(nn.GRUCell, 3, "gru")(x)
        return nn.Dense(2, name="dense")(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-3, name="norm")(x)
        return nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y, y)


def randomized(tree, path=""):
    if isinstance(tree, Mapping):
        return {name: randomized(below, path + "/" + name) for name, below in tree.items()}
    return jnp.asarray(values(path, tree.shape))


def checkpoints(goal, tree):
    """Flax's own checkpoints, which Orbax wrote: the whole tree in one file of a folder."""
    flax.config.update("flax_use_orbax_checkpointing", True)
    from flax.training.checkpoints import save_checkpoint

    shutil.rmtree(goal, ignore_errors=True)
    save_checkpoint(str(goal), tree, step=3)
    packed(goal)


def main(here):
    path, outputs, trees = folder(here, "flax", VERSION), {}, {}
    for name, model in (("image", Image()), ("text", Text()), ("attention", Attention())):
        x = jnp.asarray(inputs(name))
        variables = trees[name] = randomized(model.init(jax.random.PRNGKey(0), x))
        outputs[name] = model.apply(variables, x)
        (path / (name + ".msgpack")).write_bytes(serialization.to_bytes(variables))
    record(path, outputs)
    if OLD_CELLS:  # later ones write what Orbax writes
        for name, tree in trees.items():
            checkpoints(path / (name + ".checkpoints"), tree)
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        return
    path = folder(here, "orbax", ocp.__version__)
    ways = {"zarr": {"use_ocdbt": False}, "ocdbt": {"use_ocdbt": True}}
    for way, settings in ways.items():
        for name, tree in trees.items():
            goal = path / (name + "." + way)
            shutil.rmtree(goal, ignore_errors=True)
            try:
                handler = ocp.PyTreeCheckpointHandler(**settings)
            except TypeError:  # before there was OCDBT
                if way == "ocdbt":
                    continue
                handler = ocp.PyTreeCheckpointHandler()
            ocp.Checkpointer(handler).save(str(goal), tree)
            if way == "ocdbt" and not (goal / "manifest.ocdbt").exists():  # it does not heed the setting
                shutil.rmtree(goal)
                continue
            packed(goal)
    record(path, outputs)


if __name__ == "__main__":
    main(sys.argv[1])
