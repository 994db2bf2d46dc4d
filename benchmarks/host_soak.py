"""Make many small films on one ComfyUI server, changing sizes, inputs, variants, super-resolution, weight
formats and LoRAs, and watch its memory.

Prints the anonymous memory of the server after every round of all settings. The first round warms up; exits
with 1 if the mean over the last round is more than 2 % above that over the second, or if a prompt fails.
Needs the environment of the host tests. Usage: `python benchmarks/host_soak.py [--prompts 200]`.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from happyhorse.model.checkpoint import open_checkpoint
from happyhorse.model.convert import convert
from happyhorse.model.stream_writer import write_tensors
from happyhorse.pony import pony_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "nodes"))

from host import Client, Prompt, PromptError, Server, serve

MB = 1e6
GROWTH = 1.02
SIZES = ((64, 64), (128, 96), (96, 160))
SECONDS = (0.2, 0.52)
INPUTS = ("text", "image", "audio", "image and audio", "film")
STAGES = ("distill", "base", "540p_sr", "1080p_sr")
# of the distilled transformer: its file, and whether it has a LoRA
WEIGHTS = (("pony: distill", False), ("distill-fp8.safetensors", False), ("distill-q4_0.gguf", True),
           ("pony: distill", True), ("distill-fp8.safetensors", True))  # fmt: skip
LORA, LORA_LAYER = "soak.safetensors", "diffusion_model.block.layers.2.mlp.down_proj"
Inputs = dict[str, Any]


class Graph:
    """A prompt that grows by one node at a time."""

    def __init__(self) -> None:
        self.nodes: Prompt = {}

    def add(self, kind: str, **inputs: Any) -> list[Any]:
        """A node, and the link to its first output."""
        key = str(len(self.nodes) + 1)
        self.nodes[key] = {"class_type": kind, "inputs": inputs}
        return [key, 0]

    def model(self, name: str, lora: bool = False) -> list[Any]:
        """A transformer of the pony."""
        model = self.add("HappyHorseLoadModel", model=name, weight_dtype="default", variant="auto")
        if not lora:
            return model
        return self.add("HappyHorseLoraLoader", model=model, lora_name=LORA, strength=0.5)


def settings() -> list[Inputs]:
    """One round: every input with every stage; sizes, lengths and decoders change from film to film."""
    films = itertools.product(STAGES, INPUTS)
    decoders = ("pony", "pony: turbo")
    return [
        {
            "given": given,
            "stage": stage,
            "size": SIZES[index % 3],
            "seconds": SECONDS[index % 2],
            "decoder": decoders[index // 2 % 2],
        }
        for index, (stage, given) in enumerate(films)
    ]


def film(seed: int, given: str, stage: str, size: tuple[int, int], seconds: float, decoder: str) -> Prompt:
    """The prompt of one film."""
    graph, model = Graph(), ("pony: base", False) if stage == "base" else WEIGHTS[seed % len(WEIGHTS)]
    clip = graph.add(
        "HappyHorseLoadTextEncoder", text_encoder="pony", weight_dtype="default", device="default"
    )
    text = graph.add("HappyHorseTextEncode", clip=clip, prompt=f"a red circle bounces slow , take {seed} .")
    encoder = graph.add("HappyHorseLoadVideoVAE", vae="pony", weight_dtype="default")
    audio_vae = graph.add("HappyHorseLoadAudioVAE", audio_vae="pony")
    latent, image, sound = start(graph, given, size, seconds, encoder, audio_vae)
    guided = {"negative": text} if stage == "base" else {}
    latent = graph.add(
        "HappyHorseSampler", model=graph.model(*model), positive=text,
        latent=latent, seed=seed, steps=3, denoise=0.7 if given == "film" else 1.0, **guided,
    )  # fmt: skip
    if stage.endswith("_sr"):
        frame = {} if image is None else {"vae": encoder, "image": image}
        latent = graph.add(
            "HappyHorseSuperResolution", model=graph.model(f"pony: {stage}"), positive=text, latent=latent,
            size="custom", seed=seed, width=2 * size[0], height=2 * size[1], steps=2, **frame,
        )  # fmt: skip
    vae = graph.add("HappyHorseLoadVideoVAE", vae=decoder, weight_dtype="default")
    decode(graph, {"latent": latent, "vae": vae, "audio_vae": audio_vae} | sound, streamed=seed % 2 == 0)
    return graph.nodes


def start(
    graph: Graph, given: str, size: tuple[int, int], seconds: float, encoder: list[Any], audio_vae: list[Any]
) -> tuple[list[Any], list[Any] | None, Inputs]:
    """The latent that sampling begins with, the first frame if there is one, and the decoder's sound."""
    shape = {"aspect": "custom", "width": size[0], "height": size[1]}
    if given == "film":
        video = graph.add("LoadVideo", file="film.mp4")
        inputs = {"vae": encoder, "audio_vae": audio_vae, "video": video}
        return graph.add("HappyHorseFilmToFilm", **inputs, **shape), None, {}
    latent = graph.add("HappyHorseEmptyLatent", **shape, seconds=seconds, batch_size=1)
    image, sound = None, {}
    if "image" in given:
        image = graph.add("LoadImage", image="image.png")
        latent = graph.add("HappyHorseImageToFilm", latent=latent, vae=encoder, image=image)
    if "audio" in given:
        mode = "hold" if given == "audio" else "start"
        latent = graph.add(
            "HappyHorseAudioToFilm", latent=latent, audio_vae=audio_vae,
            audio=graph.add("LoadAudio", audio="sound.wav"), mode=mode, encoding="mean", seed=1,
        )  # fmt: skip
        sound = {"audio": [latent[0], 1]} if mode == "hold" else {}
    return latent, image, sound


def decode(graph: Graph, inputs: Inputs, streamed: bool) -> None:
    """A VIDEO that is decoded while it is saved, or pictures and sound that stock nodes make one of."""
    if streamed:
        video = graph.add("HappyHorseDecodeVideo", **inputs)
    else:
        whole = graph.add("HappyHorseDecode", **inputs)[0]
        video = graph.add("CreateVideo", images=[whole, 0], audio=[whole, 1], fps=[whole, 2])
    graph.add("SaveVideo", video=video, filename_prefix="soak", format="auto", codec="auto")


def write_inputs(client: Client, folder: Path) -> None:
    """Put an image, a sound and a film into the server's input folder."""
    pixels = np.arange(96 * 128 * 3, dtype=np.uint8).reshape(96, 128, 3)
    Image.fromarray(pixels).save(folder / "image.png")
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes((8000 * np.sin(np.arange(44100) / 32)).astype(np.int16).tobytes())
    (made,) = client.run(film(0, "text", "distill", (64, 64), 0.52, "pony: turbo")).files
    (folder / "film.mp4").write_bytes(made.read_bytes())
    for name in ("image.png", "sound.wav", "film.mp4"):
        client.put(folder / name)


def write_models(base: Path) -> None:
    """Put quantised transformers and a LoRA into the server's folders of models."""
    source, folder = open_checkpoint(pony_folder() / "distill"), base / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    for name, to in (("distill-fp8.safetensors", "fp8"), ("distill-q4_0.gguf", "q4_0")):
        convert(source, folder / name, to, "soak")
    rows, columns = source.shape(LORA_LAYER.removeprefix("diffusion_model.") + ".weight")
    (base / "models" / "loras").mkdir()
    up, down = torch.randn(rows, 4), torch.randn(4, columns) / columns
    write_tensors(
        base / "models" / "loras" / LORA,
        {f"{LORA_LAYER}.lora_B.weight": up, f"{LORA_LAYER}.lora_A.weight": down},
    )


def server_folder(work: Path) -> Path:
    """A base directory for the server, with models."""
    write_models(work / "server")
    return work / "server"


def anonymous_memory(server: Server) -> int:
    """Bytes of the server that no file stands behind; all of its memory where that is not told apart."""
    memory = psutil.Process(server.process.pid).memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def levels(server: Server, client: Client, prompts: int) -> Iterator[int]:
    """Make films, and yield the server's memory after each; the files are thrown away."""
    chosen = itertools.islice(itertools.cycle(settings()), prompts)
    for seed, setting in enumerate(chosen, 1):
        for file in client.run(film(seed, **setting)).files:
            file.unlink()
        yield anonymous_memory(server)


def report(measured: list[int], size: int) -> bool:
    """Say how the rounds compare; True if memory has grown."""
    rounds = [measured[first : first + size] for first in range(0, len(measured), size)]
    rounds = [statistics.mean(part) for part in rounds if len(part) == size]
    if len(rounds) < 3:
        sys.stdout.write(f"{len(rounds)} whole rounds: three are needed to tell growth\n")
        return False
    growth = rounds[-1] / rounds[1] - 1
    sys.stdout.write(
        f"second round {rounds[1] / MB:.0f} MB, last round {rounds[-1] / MB:.0f} MB, growth {growth:.2%}\n"
    )
    return rounds[-1] > GROWTH * rounds[1]


def main() -> int:
    """Make the films; 1 if memory grows or a prompt fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    prompts, size, measured = parser.parse_args().prompts, len(settings()), []
    with (
        tempfile.TemporaryDirectory() as work,
        serve(server_folder(Path(work))) as server,
        Client(server) as client,
    ):
        try:
            write_inputs(client, Path(work))
            for level in levels(server, client, prompts):
                measured.append(level)
                if len(measured) % size == 0:
                    mean = statistics.mean(measured[-size:])
                    sys.stdout.write(
                        f"{len(measured)} prompts: {level / MB:.0f} MB, mean {mean / MB:.0f} MB\n"
                    )
                    sys.stdout.flush()
        except (PromptError, TimeoutError) as error:
            sys.stdout.write(f"prompt {len(measured) + 1} failed: {error}\n{server.log_text()}\n")
            return 1
    return int(report(measured, size))


if __name__ == "__main__":
    sys.exit(main())
