"""Starts ComfyUI with the arguments given; `launch_host.py where` prints in which folder it was found."""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]


def find_comfyui() -> Path | None:
    """The ComfyUI checkout to test on: $COMFYUI_PATH, else the one this pack lies in, else ~/comfy/ComfyUI.

    A $COMFYUI_PATH that is no checkout raises FileNotFoundError.
    """
    if asked := os.environ.get("COMFYUI_PATH"):
        if not _is_checkout(Path(asked)):
            raise FileNotFoundError(
                f"COMFYUI_PATH must be a ComfyUI checkout, but {asked}/main.py does not exist"
            )
        return Path(asked).resolve()
    around = [PACK.parent.parent] if PACK.parent.name == "custom_nodes" else []
    return next(filter(_is_checkout, [*around, Path.home() / "comfy" / "ComfyUI"]), None)


def _is_checkout(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def define_torchvision_ops() -> None:
    """Declare the operators that torchvision's Python part asks for, unless its native library brings them.

    torchvision's wheels are built for one PyTorch; with another build its import fails without this.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    for library in Path(spec.origin).parent.glob("_C.*") if spec else ():
        try:
            torch.ops.load_library(library)
            return
        except OSError:
            pass
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    define_torchvision_ops.keep = fragment  # the operators vanish with it


def main() -> None:
    """Print where ComfyUI is, or run it in this process."""
    try:
        comfyui = find_comfyui()
    except FileNotFoundError as error:
        sys.exit(str(error))
    if sys.argv[1:] == ["where"]:
        sys.stdout.write(f"{comfyui}\n" if comfyui else "")
        return
    define_torchvision_ops()
    sys.path[0] = str(comfyui)
    sys.argv[0] = str(comfyui / "main.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
