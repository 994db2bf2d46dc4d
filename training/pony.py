"""The recipe of the pony: its stages one after the other, each resumable, each leaving its part in the pack.

`happyhorse train pony` (or `make pony`) runs it. Every stage reads what those before it left.
"""

import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from types import MappingProxyType

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from .. import pony
from ..model.checkpoint import load, open_checkpoint
from ..model.config import PONY
from ..model.prompt import Tokenizer
from ..model.tiny_tokenizer import tiny_tokenizer
from ..model.transformer import JointTransformer
from ..model.weight_files import open_weights
from ..sampler.parts import open_part
from ..sampler.plan import room_on
from .audio_vae import AudioVAEStage, finished
from .data.clip import SIZE
from .data.pool import Progress, VideoPool, training_clip_attributes
from .data.world import heads_in_hats
from .dmd2 import Dmd2Settings, Dmd2Stage
from .evaluate import film_path, prompts_for
from .flow import FlowSettings, FlowStage, initialise
from .generators import checksum, generator
from .loop import Stage, progress_bar, train
from .lora import LoraSettings
from .lora_run import LoraJob, accelerator_on, prepare_lora, train_lora
from .measure import measure_all, write_render
from .patch_codec import PatchCodec, fit
from .super_resolution import (
    PairData,
    PairsInTurns,
    SuperResolutionSettings,
    SuperResolutionStage,
)
from .video_vae import WHOLE, VideoDecoderStage, VideoVAEStage
from .world_data import Encode, WorldData, encode_clips

log = logging.getLogger(__name__)
CODEC = "codec.safetensors"
ROUNDS = {"video_vae": 3, "video_decoder": 13}  # of so many steps, each with falling learning rates
STAGE_OF = {"text_encoder": "base", "540p_sr": "super_resolution", "codec": "video_vae"}  # called otherwise

IMAGE, BEGINNING = 0.4, 6  # a bounce learns to go on from an image by way of longer beginnings
SOUND = 0.35  # a mouth learns its sound where it is held: with .12 it hardly did in 3000 updates

LORA_BATCH, LORA_RATE, LORA_PARTS = 4, 1.5e-3, ("attention",)  # with "mlp" other films suffer more


@dataclass(frozen=True)
class Recipe:
    """`runs` keeps the checkpoints; trained parts are written to `out`, laid out as the pack's own pony.

    `clips` are in memory while the video VAE is trained, of one size and of twice that; latents of
    `latent_clips` train the transformers, `batch` films of each world in an update; the LoRA of a new thing
    sees `lora_clips` of it, and of what the base knows. Transformers and light decoder compute in `dtype`.
    """

    runs: Path
    out: Path = pony.FOLDER
    device: str = "cpu"
    compiled: bool = False
    dtype: torch.dtype = torch.float32
    steps: dict[str, int] = field(
        default_factory=lambda: {
            "audio_vae": 3500, "video_vae": 2000, "video_decoder": 1500, "base": 3000,
            "continuation": 800, "settling": 600, "distill": 400, "super_resolution": 5000, "lora": 1000,
        }
    )  # fmt: skip
    clips: tuple[int, int] = (500, 80)
    codec_films: int = 300
    latent_clips: int = 4000
    large_latent_clips: int = 2400
    encoded_clips: int = 800
    lora_clips: tuple[int, int] = (20, 96)
    batch: int = 16
    seed: int = 0

    def run(self, stages: Iterable[str]) -> None:
        """Run the named stages; see `STAGES`."""
        for name in stages:
            STAGES[name](self)

    def train(self, name: str, stage: Stage, start: int | None = None) -> None:
        """Train `stage` to its end; `start` is the checksum of trained weights that it begins with."""
        steps, folder = self.steps[name] * ROUNDS.get(name, 1), name
        if start is not None:
            folder += f"-{start:08x}"
        with progress_bar(name) as on_step:
            train(stage, self.runs / folder, steps, on_step=on_step, title=name)

    def write(self, name: str, module: nn.Module, sources: Mapping[str, str] = MappingProxyType({})) -> None:
        """Leave a trained part in the pack, with the `checksums` of what it was trained with."""
        pony.write_part(self.out, name, module, "trained on two procedural worlds: docs/pony.md", sources)

    def trained(self, name: str) -> nn.Module:
        """A part that an earlier stage has left, float32 on the CPU; stages move what they train."""
        self.require(name)
        return load(open_checkpoint(self.out / pony.FILES[name]), torch.float32)

    def file(self, name: str) -> Path:
        """Where the codec or a part is."""
        return self.runs / CODEC if name == "codec" else self.out / pony.FILES[name]

    def checksums(self, *names: str) -> dict[str, str]:
        """Those of the files of parts, or of the codec."""
        return {name: f"{zlib.crc32(self.file(name).read_bytes()):08x}" for name in names}

    def require(self, *names: str) -> dict[str, str]:
        """The `checksums` of what a stage needs; raises FileNotFoundError for the first that is missing.

        Raises ValueError for one that was trained with another network than the one that is there. The codec
        is looked at where it is among the names; else all must have been trained with the same one.
        """
        for name in names:
            if not self.file(name).exists():
                elsewhere = "give the folder of runs that made the parts (--runs), or " * (name == "codec")
                raise FileNotFoundError(
                    f"{self.file(name)} is missing; {elsewhere}run `happyhorse train pony "
                    f"{STAGE_OF.get(name, name)}` first"
                )
        there = {*names, *(part for part in pony.FILES if self.file(part).exists())}
        now = {name: (found, self.file(name)) for name, found in self.checksums(*there).items()}
        for name in names:
            for source, told in made_with(self.file(name)).items():
                found, file = now.setdefault(source, (told, self.file(name)))
                if told != found:
                    raise ValueError(
                        f"{self.file(name)} was trained with another {source.replace('_', ' ')} than that of "
                        f"{file}; give the folders that it was trained in (--runs, --out), or run "
                        f"`happyhorse train pony {STAGE_OF.get(name, name)}` again"
                    )
        return {name: now[name][0] for name in names}

    def folder(self, name: str, *told: object) -> Path:
        """A folder in the runs, another one for anything else that is told."""
        return self.runs / f"{name}-{zlib.crc32(repr(told).encode()):08x}"

    @cached_property
    def pool(self) -> VideoPool:
        """Pictures for the video stages."""
        with _bar("clips") as progress:
            return VideoPool(*self.clips, progress)

    @cached_property
    def codec(self) -> PatchCodec:
        """What the video latents are to be."""
        path = self.runs / CODEC
        if not path.exists():
            self.runs.mkdir(parents=True, exist_ok=True)
            random = Random("codec")
            films = (self.pool.crops(1, WHOLE, random) for _ in range(self.codec_films))
            fit(films, generator(self.seed, "codec")).save(path)
        return PatchCodec.from_file(path)

    def data(self, films: int) -> WorldData:
        """Latents of training clips with their captions, so many films of a world in a batch."""
        encoders = {"video": self.codec.encode, "audio": self.trained("audio_vae").encode}
        latents = self._encoded("latents", self.latent_clips, encoders, ("codec", "audio_vae"))
        self.__dict__.pop("pool", None)  # a gigabyte that is no longer needed
        return WorldData(latents, self.tokenizer, films, self.seed)

    def encoded_latents(self) -> Mapping[str, Tensor]:
        """Latents of the first training clips as the VAE encodes them, which blurs what moves."""
        encoders = {"video": self.trained("video_vae").encode, "audio": self.trained("audio_vae").encode}
        return self._encoded("encoded_latents", self.encoded_clips, encoders, ("video_vae", "audio_vae"))

    def large_latents(self) -> Tensor:
        """Video latents of the first training clips at twice the size."""
        encoders, size = {"video": self.codec.encode}, (2 * SIZE[0], 2 * SIZE[1])
        return self._encoded("large_latents", self.large_latent_clips, encoders, ("codec",), size)["video"]

    def _encoded(
        self,
        name: str,
        count: int,
        encoders: Mapping[str, Encode],
        sources: Sequence[str],
        size: tuple[int, int] = SIZE,
    ) -> Mapping[str, Tensor]:
        told = ", ".join(f"{source} {found}" for source, found in self.checksums(*sources).items())
        with _bar(name.replace("_", " ")) as progress, torch.inference_mode():
            return encode_clips(self.runs / f"{name}.safetensors", count, encoders, told, size, progress)

    @property
    def lora(self) -> Path:
        """The LoRA of a new thing, made for the base as it is now by the settings of now."""
        parts = ("base", "text_encoder", "video_vae", "audio_vae")
        files = self.require(*parts).values()
        learnt = (self.steps["lora"], LORA_BATCH, LORA_RATE, LORA_PARTS, self.seed, self.dtype)
        return self.folder("lora", *files, self.lora_clips, *learnt) / "hat.safetensors"

    @property
    def accelerator(self) -> Accelerator:
        """One that makes an update of a batch of each world."""
        return accelerator_on(torch.device(self.device), batches=2)

    @property
    def tokenizer(self) -> Tokenizer:
        """The pony's tokenizer."""
        return Tokenizer(tiny_tokenizer(PONY.text_encoder.vocab_size))

    @property
    def negative(self) -> Tensor:
        """The tokens [1, L] that stand for no prompt."""
        return torch.tensor([self.tokenizer.encode(PONY.negative_prompt)[0]])


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` is quick with it: accelerators, CPUs with AVX512-BF16."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # new in PyTorch 2.10
    fast = device.type != "cpu" or capabilities.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def made_with(path: Path) -> dict[str, str]:
    """The checksums of what a part was trained with, as far as its file tells them."""
    return json.loads(open_weights(path).metadata.get("made_with", "{}"))


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    with tqdm(desc=title) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def train_audio_vae(recipe: Recipe) -> None:
    """The Oobleck VAE, on sounds alone."""
    stage = AudioVAEStage(
        PONY.audio_vae,
        recipe.steps["audio_vae"],
        seed=recipe.seed,
        device=recipe.device,
        compiled=recipe.compiled,
    )
    recipe.train("audio_vae", stage)
    recipe.write("audio_vae", finished(stage.vae, stage.sounds[:100, None].expand(-1, 2, -1)))


def train_video_vae(recipe: Recipe) -> None:
    """The Wan2.2 VAE, towards the latents of the codec."""
    stage = VideoVAEStage(
        PONY.video_vae, recipe.codec, recipe.pool, recipe.steps["video_vae"], recipe.seed, recipe.device
    )
    sources = recipe.checksums("codec")
    recipe.train("video_vae", stage)
    recipe.write("video_vae", stage.trained(), sources)


def train_video_decoder(recipe: Recipe) -> None:
    """The light decoder, on the same latents."""
    sources = recipe.require("codec")
    stage = VideoDecoderStage(
        PONY.video_decoder,
        recipe.codec,
        recipe.pool,
        recipe.steps["video_decoder"],
        recipe.seed,
        recipe.device,
        recipe.dtype,
        recipe.compiled,
    )
    recipe.train("video_decoder", stage)
    recipe.write("video_decoder", stage.trained(), sources)


def train_base(recipe: Recipe) -> None:
    """The base transformer together with its text encoder, by flow matching, in three phases.

    How a film goes on from a given beginning shows at high noise, where the second phase is spent; the third
    is for what that did to low noise.
    """
    sources = recipe.require("audio_vae", "codec")
    transformer = JointTransformer(PONY.transformers["base"], compute_dtype=recipe.dtype)
    text_encoder = pony.build("text_encoder")
    initialise(transformer, recipe.seed)
    initialise(text_encoder, recipe.seed + 1)
    steps = recipe.steps
    first = FlowSettings(
        steps["base"],
        recipe.seed,
        image=IMAGE,
        beginning=BEGINNING,
        audio=SOUND,
        first_frame=2.0,
    )
    later = replace(first, muon_lr=0.01, adam_lr=1.3e-3, ema=0.99)
    going_on = replace(later, steps=steps["continuation"], seed=recipe.seed + 1, shift=20.0, image=0.8)
    settling = replace(later, steps=steps["settling"], seed=recipe.seed + 2)
    data, start = recipe.data(recipe.batch), None
    for name, settings in {"base": first, "continuation": going_on, "settling": settling}.items():
        stage = FlowStage(
            transformer, data, recipe.negative, settings, recipe.accelerator, text_encoder, recipe.compiled
        )
        recipe.train(name, stage, start)
        stage.ema.copy_to(stage.networks)
        start = checksum(*stage.networks.parameters())
    recipe.write("base", transformer, sources)
    recipe.write("text_encoder", text_encoder, recipe.checksums("base"))


def train_distill(recipe: Recipe) -> None:
    """The few-step student of the base, by DMD-2."""
    sources = recipe.require("audio_vae", "base", "text_encoder", "codec")
    base = JointTransformer(PONY.transformers["base"], compute_dtype=recipe.dtype)
    base.load_state_dict(recipe.trained("base").state_dict())
    stage = Dmd2Stage(
        base,
        recipe.data(recipe.batch // 3),
        recipe.negative,
        Dmd2Settings(recipe.seed, video_guidance=3.0, audio_guidance=1.2, image=IMAGE, beginning=BEGINNING),
        recipe.accelerator,
        recipe.trained("text_encoder"),
        recipe.compiled,
    )
    recipe.train("distill", stage)
    recipe.write("distill", stage.trained(), sources)


def train_super_resolution(recipe: Recipe) -> None:
    """One super-resolution transformer for both variants; in the larger one it sees windows of frames.

    Half of the small films are as the codec has them, and nearly as the transformers make them; the others
    went through the VAE, as films that users give.
    """
    sources = recipe.require("audio_vae", "video_vae", "text_encoder", "codec")
    transformer = JointTransformer(PONY.transformers["540p_sr"], compute_dtype=recipe.dtype)
    initialise(transformer, recipe.seed)
    small, large = recipe.data(recipe.batch // 4), recipe.large_latents()
    encoded = recipe.encoded_latents()
    stage = SuperResolutionStage(
        transformer,
        PairsInTurns(
            PairData(small.latents, large, recipe.tokenizer, small.size, recipe.seed),
            PairData(encoded, large[: recipe.encoded_clips], recipe.tokenizer, small.size, recipe.seed),
        ),
        recipe.negative,
        SuperResolutionSettings(recipe.steps["super_resolution"], recipe.seed, negative=0.0),
        recipe.accelerator,
        recipe.trained("text_encoder"),
        recipe.compiled,
        recipe.codec.pixel_metric,
    )
    recipe.train("super_resolution", stage)
    stage.ema.copy_to(stage.networks)
    recipe.write("540p_sr", transformer, sources)


def train_new_thing(recipe: Recipe) -> None:
    """A LoRA of a hat, which the base has never seen, from a folder of clips such as users have.

    Clips of what it knows are among them, without which all heads would get the new thing.
    """
    device, out = torch.device(recipe.device), recipe.lora
    if out.exists():
        return
    clips = out.parent / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    new, known = recipe.lora_clips
    wanted = [*heads_in_hats()[:new], *map(training_clip_attributes, range(known))]
    prompts = prompts_for(wanted, "lora", clips)
    for prompt in prompts:
        path = film_path(clips, "text", "lora", prompt.seed)
        write_render(prompt, path)
        path.with_suffix(".txt").write_text(f"{prompt.text}\n", encoding="utf-8")
    settings = LoraSettings(recipe.steps["lora"], parts=LORA_PARTS, rate=LORA_RATE, seed=recipe.seed)
    job = LoraJob(
        clips, out, out.parent / "run", prompts[0].shape, settings, PONY.negative_prompt, batch=LORA_BATCH
    )
    parts = {"transformer": "base", **{name: name for name in ("text_encoder", "video_vae", "audio_vae")}}
    checkpoints = {role: open_part(name, recipe.out / pony.FILES[name]) for role, name in parts.items()}
    room = room_on(device)
    with (
        prepare_lora(job, checkpoints, device, recipe.dtype, room, lambda *_: None) as stage,
        progress_bar("lora") as on_step,
    ):
        train_lora(job, stage, on_step)


def measure_films(recipe: Recipe) -> None:
    """Films of held-out prompts, judged; reports and contact sheets in the runs, by the parts' checksums."""
    files = recipe.require(*(name for name in pony.FILES if name != "1080p_sr")).values()
    if not recipe.lora.exists():
        raise FileNotFoundError(
            f"the LoRA of these parts, {recipe.lora}, is missing; run `happyhorse train pony lora` first"
        )
    device = torch.device(recipe.device)
    folder = recipe.folder("measured", *files, zlib.crc32(recipe.lora.read_bytes()), device.type)
    log.info("figures, films and reports: %s; what is there is not measured again", folder)
    measure_all(recipe.out, folder, device, recipe.lora, recipe.lora_clips[0])


STAGES: dict[str, Callable[[Recipe], None]] = {
    "audio_vae": train_audio_vae,
    "video_vae": train_video_vae,
    "video_decoder": train_video_decoder,
    "base": train_base,
    "distill": train_distill,
    "super_resolution": train_super_resolution,
    "lora": train_new_thing,
    "measure": measure_films,
}
