"""Whether this machine can run the nodes: one clear line instead of a traceback."""

import importlib.util
import re
import sys

MINIMUM = (0, 33)
PACKAGES = ("torch", "safetensors", "einops", "av", "numpy", "PIL", "tokenizers", "tqdm", "psutil")


def require_host(version: str | None = None) -> None:
    """Raise ImportError where ComfyUI is too old or a package is missing; the message says what to do.

    `version` is ComfyUI's, by default that of the running one.
    """
    if version is None:
        version = getattr(sys.modules.get("comfyui_version"), "__version__", "") or _installed_version()
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if found < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise ImportError(
            f"HappyHorse needs ComfyUI {wanted} or newer, found {version or 'an unknown one'}; update it"
        )
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"HappyHorse needs the packages {', '.join(missing)}, which are not installed; run "
            f"{sys.executable} -m pip install -r requirements.txt in its folder"
        )


def _installed_version() -> str:
    try:
        from comfyui_version import __version__
    except ImportError:
        return ""
    return __version__
