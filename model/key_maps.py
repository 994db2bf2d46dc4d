"""How published files name their tensors: by which names a part is recognised, and which prefixes are
stripped.

Behind its prefix every tensor is called as in our modules; only llama.cpp has names of its own.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

# llama.cpp's names of a Gemma-like encoder -> the published ones. Its converter adds 1 to all norms of such a
# model, as its RMS norm multiplies by the weight alone. Where there are two spellings both are in use.
LLAMA_CPP_LAYER = re.compile(r"(?:enc\.)?blk\.(\d+)\.(\w+)\.weight")
LLAMA_CPP_LAYER_NAMES = {
    "attn_norm": "pre_self_attn_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.o_proj",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_self_attn_layernorm",
    "attn_post_norm": "post_self_attn_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
LLAMA_CPP_NAMES = {
    "token_embd.weight": "model.encoder.embed_tokens.weight",
    "output_norm.weight": "model.encoder.norm.weight",
    "enc.output_norm.weight": "model.encoder.norm.weight",
}


def published_name(name: str) -> str:
    """The published name of a tensor that llama.cpp calls `name`; other names as they are."""
    layer = LLAMA_CPP_LAYER.fullmatch(name)
    if layer is None:
        return LLAMA_CPP_NAMES.get(name, name)
    # one that is not in the table is another model's: it keeps its name, to be reported as unknown
    return f"model.encoder.layers.{layer[1]}.{LLAMA_CPP_LAYER_NAMES.get(layer[2], layer[2])}.weight"


def added(name: str) -> float:
    """What a file has added to the values of its tensor `name`, to be taken off when that is read."""
    return 1.0 if name != published_name(name) and name.endswith("norm.weight") else 0.0


@dataclass(frozen=True)
class KeyMap:
    """One part's names. `signature` is in every file of the part, behind one of `prefixes`; the first that
    fits is the file's, and our own prefix takes its place. `optional` names need not be in a file.
    """

    signature: str
    prefixes: tuple[str, ...]
    own_prefix: str = ""
    optional: tuple[str, ...] = ()

    def prefix(self, names: Iterable[str]) -> str | None:
        """The prefix of this part's tensors, or None where they are not there."""
        names = set(map(published_name, names))
        return next((prefix for prefix in self.prefixes if prefix + self.signature in names), None)

    def own_names(self, names: Collection[str]) -> dict[str, str]:
        """Our name -> the file's name, for the tensors behind the prefix; the others belong to something
        else.
        """
        prefix = self.prefix(names)
        if prefix is None:
            return {}
        published = {published_name(name): name for name in names}
        return {
            self.own_prefix + name.removeprefix(prefix): stored
            for name, stored in published.items()
            if name.startswith(prefix)
        }


KEY_MAPS = {
    "transformer": KeyMap(
        signature="adapter.video_embedder.weight",
        prefixes=("model.diffusion_model.", "diffusion_model.", ""),
        optional=("adapter.rope.bands",),
    ),
    "text_encoder": KeyMap(
        signature="layers.0.pre_self_attn_layernorm.weight",
        prefixes=("model.encoder.", "encoder.", "model.", ""),
    ),
    "video_vae": KeyMap(signature="encoder.downsamples.0.downsamples.0.residual.2.weight", prefixes=("",)),
    "video_decoder": KeyMap(
        signature="up_blocks.0.resnets.0.conv1.conv.weight",
        prefixes=("module.decoder.", "decoder.", "module.", ""),
        own_prefix="decoder.",
    ),
    "audio_vae": KeyMap(signature="encoder.layers.0.weight_v", prefixes=("pretransform.model.", "")),
}


def recognise(names: Collection[str]) -> str | None:
    """The part whose tensors these are, or None."""
    return next((part for part, keys in KEY_MAPS.items() if keys.prefix(names) is not None), None)
