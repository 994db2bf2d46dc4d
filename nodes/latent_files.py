"""Nodes that keep the LATENT of a film in a file."""

import json
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import io
from safetensors import SafetensorError, safe_open

from ..model.packing import LATENTS_FORMAT, Latents
from ..model.stream_writer import write_tensors
from ..model.video_vae import denormalize_latents
from .latent import CATEGORY, Latent, latent_output
from .latents import check_shapes, film_latent, masks, start_audio, streams
from .model import to_host

FORMAT = "happyhorse av latent 1"
SUFFIX = ".safetensors"


class HappyHorseSaveLatent(io.ComfyNode):
    """A film's latents as a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseSaveLatent",
            display_name="HappyHorse Save Latent",
            category=CATEGORY,
            description="Saves a film before it is decoded (.safetensors), to decode or enlarge later. The "
            "stock node cannot save two streams.",
            search_aliases=["save av latent", "export latent"],
            inputs=[
                io.Latent.Input("latent", tooltip="A film with sound."),
                io.String.Input("filename_prefix", default="latents/happyhorse",
                                tooltip="Folder and beginning of the name, below the output folder."),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, latent: Latent, filename_prefix: str) -> io.NodeOutput:
        video, audio = streams(latent)
        tensors = {"video": video, "audio": audio}
        if latent.get("noise_mask") is not None:
            tensors |= dict(zip(("video_mask", "audio_mask"), masks(latent), strict=True))
        extra = {"start_audio": start_audio(latent) is not None}
        folder, name, counter, subfolder = _next_file(filename_prefix)
        file = f"{name}_{counter:05}_{SUFFIX}"
        plain = {key: tensor.float().cpu() for key, tensor in tensors.items()}
        metadata = {"format": FORMAT, "extra": json.dumps(extra)} | _graph_of(cls.hidden)
        write_tensors(Path(folder, file), plain, metadata)
        shown = {"filename": file, "subfolder": subfolder, "type": "output"}
        return io.NodeOutput(ui={"latents": [shown]})


def _graph_of(hidden: Any) -> dict[str, str]:
    """The graph that made a file, as the stock nodes keep it, unless the user has switched that off."""
    if hidden is None or args.disable_metadata:
        return {}
    given = {"prompt": hidden.prompt} | (hidden.extra_pnginfo or {})
    return {name: json.dumps(value) for name, value in given.items() if value is not None}


def _next_file(prefix: str) -> tuple[str, str, int, str]:
    """Folder, name, number and subfolder of the next file of a prefix, as all the host's nodes count."""
    root = folder_paths.get_output_directory()
    if not Path(root, prefix).resolve().is_relative_to(Path(root).resolve()):
        raise ValueError(
            f"filename_prefix: files are saved below the output folder only, got {prefix!r}; "
            "give a name, or a folder and a name, without .. and without a leading /"
        )
    return folder_paths.get_save_image_path(prefix, root)[:4]


class HappyHorseLoadLatent(io.ComfyNode):
    """A film's latents from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseLoadLatent",
            display_name="HappyHorse Load Latent",
            category=CATEGORY,
            description="Loads a film that HappyHorse Save Latent has kept, or the command line "
            "(--save-latents).",
            search_aliases=["load av latent", "import latent"],
            inputs=[
                io.Combo.Input("latent", options=saved_latents(),
                               tooltip="A file of the input folder, or of output/latents."),
            ],
            outputs=[latent_output("The film, for decoding, super-resolution or a sampler.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, latent: str | None) -> bool | str:
        if latent is None or folder_paths.exists_annotated_filepath(latent):
            return True
        return f"latent: there is no file {latent!r}; save one with HappyHorse Save Latent, then press R"

    @classmethod
    def fingerprint_inputs(cls, latent: str | None) -> str:
        if latent is None:  # it comes by a link
            return "linked"
        stat = Path(folder_paths.get_annotated_filepath(latent)).stat()
        return f"{latent} {stat.st_size} {stat.st_mtime_ns}"

    @classmethod
    def execute(cls, latent: str) -> io.NodeOutput:
        return io.NodeOutput(read_latent(Path(folder_paths.get_annotated_filepath(latent))))


def saved_latents() -> list[str]:
    """Names of what may be loaded, as the host annotates them."""
    inputs = Path(folder_paths.get_input_directory())
    outputs = Path(folder_paths.get_output_directory())
    names = [file.name for file in sorted(inputs.glob(f"*{SUFFIX}"))]
    return names + [
        f"{file.relative_to(outputs).as_posix()} [output]"
        for file in sorted((outputs / "latents").rglob(f"*{SUFFIX}"))
    ]


def read_latent(path: Path) -> Latent:
    """The LATENT in a file; raises ValueError for a file of another kind or a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if metadata.get("format") not in (FORMAT, LATENTS_FORMAT):
            raise ValueError(f"its format is {metadata.get('format')!r}")
        video, audio = tensors["video"], tensors["audio"]
        if metadata["format"] == LATENTS_FORMAT:
            return _of_the_command_line(Latents(video, audio))
        latent = film_latent(video, audio)
        if "video_mask" in tensors:
            latent["noise_mask"] = NestedTensor([tensors["video_mask"], tensors["audio_mask"]])
        streams(latent)
        if json.loads(metadata["extra"])["start_audio"]:
            latent["start_audio"] = latent["samples"].unbind()[1]
        return latent
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"latent: {path.name} is not a film's latent ({error}); choose one of HappyHorse Save Latent, or "
            "of the command line's --save-latents"
        ) from error


def _of_the_command_line(kept: Latents) -> Latent:
    video, audio = kept.video.shape, kept.audio.shape
    check_shapes((video, audio[:1] + audio[:0:-1]))
    return film_latent(*to_host(kept._replace(video=denormalize_latents(kept.video))))


NODES = [HappyHorseSaveLatent, HappyHorseLoadLatent]
