"""How published files name their tensors: by which names a part is recognised, and which prefixes are
stripped.

Behind its prefix every tensor is called as in our modules, so there is nothing to rename.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass


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
        names = set(names)
        return next((prefix for prefix in self.prefixes if prefix + self.signature in names), None)

    def own_names(self, names: Collection[str]) -> dict[str, str]:
        """Our name -> the file's name, for the tensors behind the prefix; the others belong to something
        else.
        """
        prefix = self.prefix(names)
        if prefix is None:
            return {}
        return {
            self.own_prefix + name.removeprefix(prefix): name for name in names if name.startswith(prefix)
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
