"""ComfyUI-HappyHorse: joint audio-video films from the daVinci-MagiHuman weights, in ComfyUI and from the
command line.
"""

from typing import Any

__version__ = "0.1.0"
WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """Return the extension for ComfyUI; the nodes are imported only here."""
    from .host_check import require_host

    require_host()
    from .nodes import HappyHorseExtension

    return HappyHorseExtension()
