"""The nodes of HappyHorse, for ComfyUI. Nothing outside this folder knows the host."""

from comfy_api.latest import ComfyExtension, io


class HappyHorseExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All node classes, in the order of a film."""
        from . import (
            compile,
            decoder,
            latent,
            latent_files,
            loader,
            lora,
            plan,
            prompt,
            sampler,
            super_resolution,
            train,
        )

        modules = (
            loader, lora, compile, plan, prompt, latent, latent_files, sampler, super_resolution, decoder,
            train,
        )  # fmt: skip
        return [node for module in modules for node in module.NODES]
