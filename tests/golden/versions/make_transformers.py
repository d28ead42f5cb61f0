"""python make_transformers.py FOLDER, in an environment that has transformers 4, torch, jax and flax.

Each model is made in Flax with random weights and given to torch by Hugging Face's own conversion.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

os.environ.update(USE_TF="0", JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers as hf
from flax import serialization
from recording import folder, record, values
from safetensors.torch import save_file
from transformers.modeling_flax_pytorch_utils import load_flax_weights_in_pytorch_model

if jax.__version_info__ >= (0, 4, 35):  # where `clip` has lost the name that T5 gives the bound
    clip = jnp.clip
    jnp.clip = lambda x, low=None, high=None, a_max=None: clip(x, low, a_max if high is None else high)

CONFIGS = {
    "bert": hf.BertConfig(
        vocab_size=11,
        hidden_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=7,
        max_position_embeddings=9,
        type_vocab_size=3,
    ),
    "gpt2": hf.GPT2Config(
        vocab_size=11, n_positions=9, n_embd=6, n_layer=2, n_head=2, n_inner=7, bos_token_id=0, eos_token_id=1
    ),
    "vit": hf.ViTConfig(
        hidden_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=7,
        image_size=8,
        patch_size=4,
        num_channels=3,
    ),
    "t5": hf.T5Config(
        vocab_size=11, d_model=6, d_kv=5, d_ff=7, num_layers=2, num_heads=3, relative_attention_num_buckets=8
    ),
}
CLASSES = {
    "bert": (hf.FlaxBertModel, hf.BertModel),
    "gpt2": (hf.FlaxGPT2LMHeadModel, hf.GPT2LMHeadModel),
    "vit": (hf.FlaxViTModel, hf.ViTModel),
    "t5": (hf.FlaxT5Model, hf.T5Model),
}
TOKENS = np.random.RandomState(1).randint(2, 11, (2, 5)).astype(np.int32)
PIXELS = np.random.RandomState(2).uniform(-1, 1, (2, 3, 8, 8)).astype(np.float32)


def randomized(tree, path=""):
    if isinstance(tree, Mapping):
        return {name: randomized(below, path + "/" + name) for name, below in tree.items()}
    return jnp.asarray(values(path, tree.shape))


def arguments(name, of):
    if name == "vit":
        return {"pixel_values": of(PIXELS)}
    if name == "t5":
        return {"input_ids": of(TOKENS), "decoder_input_ids": of(TOKENS[:, ::-1].copy())}
    return {"input_ids": of(TOKENS)}


def main(here):
    path, outputs = folder(here, "transformers", hf.__version__), {}
    for name, (in_flax, in_torch) in CLASSES.items():
        model = in_flax(CONFIGS[name], seed=0)
        model.params = randomized(model.params)
        twin = load_flax_weights_in_pytorch_model(in_torch(CONFIGS[name]), model.params).eval()
        y = np.asarray(model(**arguments(name, jnp.asarray))[0])
        with torch.no_grad():
            theirs = twin(
                **arguments(name, lambda x: torch.from_numpy(x).long() if x.dtype == np.int32 else torch.from_numpy(x))
            )[0].numpy()
        assert np.abs(y - theirs).max() < 1e-5 * max(1, np.abs(y).max()), name
        outputs[name] = y
        (path / (name + ".msgpack")).write_bytes(serialization.to_bytes(model.params))
        state, seen = {}, set()
        for key, tensor in twin.state_dict().items():
            if tensor.data_ptr() not in seen:  # as save_pretrained leaves tied weights out
                seen.add(tensor.data_ptr())
                state[key] = tensor.contiguous()
        save_file(state, str(path / (name + ".safetensors")), metadata={"format": "pt"})
    record(path, outputs, {name: PIXELS if name == "vit" else TOKENS for name in outputs})


if __name__ == "__main__":
    main(sys.argv[1])
