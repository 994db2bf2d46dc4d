import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from happyhorse.model.audio_vae import CHUNK, AudioVAE
from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.config import MAGIHUMAN, PONY, PRESETS, TransformerConfig
from happyhorse.model.geometry import FilmShape
from happyhorse.model.packing import Latents, PackedLayout
from happyhorse.model.text_encoder import TextEncoder
from happyhorse.model.transformer import JointTransformer
from happyhorse.model.video_decoder import VideoDecoder
from happyhorse.model.video_vae import VideoVAE
from happyhorse.sampler.placement import OFFLOADS
from happyhorse.sampler.plan import (
    SMALL_TENSORS,
    TEXT_TOKENS,
    Plan,
    Stage,
    activations,
    plan_film,
    require_fit,
)

CPU, META = torch.device("cpu"), torch.device("meta")  # meta counts as any accelerator
HALF, WHOLE = torch.bfloat16, torch.float32


# Activations: what is planned against the tensors that the networks hold. On the meta device tensors have
# sizes and no values, so networks of full size are no work.


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all living tensors made while it is active, but for those of `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known = {id_of(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._views: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and id_of(tensor) not in self._known:
                self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage, num_bytes = id_of(tensor), tensor.untyped_storage().nbytes()
        if storage not in self._views:
            self._now += num_bytes
            self.peak = max(self.peak, self._now)
        self._views[storage] = self._views.get(storage, 0) + 1
        weakref.finalize(tensor, self._forget, storage, num_bytes)

    def _forget(self, storage: int, num_bytes: int) -> None:
        self._views[storage] -= 1
        if not self._views[storage]:
            del self._views[storage]
            self._now -= num_bytes


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak(module: nn.Module, run: Callable[[], object]) -> int:
    with torch.no_grad(), LiveBytes(module) as live:
        run()
    return live.peak


@pytest.fixture(autouse=True)
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device attention makes its result alone, as a fused kernel does."""
    own = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q) if q.device == META else own(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def assert_planned(
    measured: int, role: str, config: Any, shape: FilmShape, dtype: torch.dtype, device: torch.device = META
) -> None:
    planned = SMALL_TENSORS * activations(role, config, shape, dtype, device)
    assert 1.0 <= planned / measured <= 1.4, f"planned {planned:.3g}, needed {measured:.3g}"


def shortened(config: TransformerConfig) -> TransformerConfig:
    """Three layers that differ as those of the whole network do."""
    local = (0, 1) if config.local_attn_layers else ()
    return replace(config, num_layers=3, mm_layers=(0,), gelu7_layers=(0,), local_attn_layers=local)


def transformer_peak(
    config: TransformerConfig, shape: FilmShape, dtype: torch.dtype, device: torch.device
) -> int:
    with device:
        network = JointTransformer(config, compute_dtype=dtype)
        video = torch.zeros(
            1, config.latent_channels, shape.latent_frames, shape.latent_rows, shape.latent_columns
        )
        latents = Latents(video, torch.zeros(1, shape.audio_latents, config.audio_in_channels))
        text = torch.zeros(1, TEXT_TOKENS, config.text_in_channels)
    for name, parameter in network.named_parameters():
        if name.startswith("block.") and parameter.ndim == 2:
            parameter.data = parameter.data.to(dtype)
    layout = PackedLayout.of(latents, text, config.coords_style)
    return peak(network, lambda: network(latents, text, layout))


FILMS = {
    "published, short": (MAGIHUMAN, FilmShape(448, 256, 6)),
    "published": (MAGIHUMAN, FilmShape(448, 256, 126)),
    "published, long": (MAGIHUMAN, FilmShape(384, 288, 751)),
    "published, 1080p": (MAGIHUMAN, FilmShape(1920, 1088, 126)),
    "pony, short": (PONY, FilmShape(160, 96, 6)),
    "pony": (PONY, FilmShape(128, 128, 51)),
    "pony, large": (PONY, FilmShape(512, 512, 126)),
}
each_film = pytest.mark.parametrize("film", list(FILMS))
each_dtype = pytest.mark.parametrize("dtype", [HALF, WHOLE], ids=str)


@each_film
@each_dtype
@pytest.mark.parametrize("variant", ["distill", "1080p_sr"])
def test_a_transformer_needs_what_is_planned(film: str, dtype: torch.dtype, variant: str) -> None:
    preset, shape = FILMS[film]
    config = shortened(preset.transformers[variant])
    assert_planned(transformer_peak(config, shape, dtype, META), "transformer", config, shape, dtype)


@each_dtype
@pytest.mark.parametrize("variant", ["distill", "1080p_sr"])
def test_a_transformer_on_the_cpu_needs_what_is_planned(dtype: torch.dtype, variant: str) -> None:
    config, shape = shortened(PONY.transformers[variant]), FilmShape(384, 384, 51)
    measured = transformer_peak(config, shape, dtype, CPU)
    assert_planned(measured, "transformer", config, shape, dtype, CPU)


@each_dtype
@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_text_encoder_needs_what_is_planned_for_a_usual_prompt(preset: str, dtype: torch.dtype) -> None:
    config, shape = PRESETS[preset].text_encoder, FilmShape(32, 32, 6)
    with META:
        network = TextEncoder(replace(config, num_hidden_layers=2)).to(dtype)
        tokens = torch.zeros(1, TEXT_TOKENS, dtype=torch.int64)
    assert_planned(peak(network, lambda: network(tokens)), "text_encoder", config, shape, dtype)


@each_film
@each_dtype
@pytest.mark.parametrize("kind", ["video_decoder", "video_vae"])
def test_a_video_decoder_needs_what_is_planned(film: str, dtype: torch.dtype, kind: str) -> None:
    preset, shape = FILMS[film]
    config = getattr(preset, kind)
    with META:
        network = {"video_decoder": VideoDecoder, "video_vae": VideoVAE}[kind](config).to(dtype)

    def decode() -> None:
        with META:
            latents = torch.zeros(1, 48, shape.latent_frames, shape.latent_rows, shape.latent_columns)
        for _, _chunk in zip(range(4), network.decode_chunks(latents)):  # noqa: B905  # no later one is larger
            pass  # the chunk is there while the next one is made, as when a film is written

    assert_planned(peak(network, decode), "video_decoder", config, shape, dtype)


@each_film
@each_dtype
def test_the_encoder_of_images_needs_what_is_planned(film: str, dtype: torch.dtype) -> None:
    preset, shape = FILMS[film]
    with META:
        network = VideoVAE(preset.video_vae).to(dtype)

    def encode() -> None:
        network.encode(torch.zeros(1, 3, 1, shape.height, shape.width, device=META))

    assert_planned(peak(network, encode), "video_vae", preset.video_vae, shape, dtype)


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("audio_latents", [6, 51, 126, 251, 751])
def test_the_audio_vae_needs_what_is_planned(preset: str, audio_latents: int) -> None:
    config, shape = PRESETS[preset].audio_vae, FilmShape(32, 32, audio_latents)
    with META:
        network, latents = AudioVAE(config), torch.zeros(1, audio_latents, config.latent_dim)
        waveform = torch.zeros(1, config.io_channels, audio_latents * config.samples_per_latent)
    assert_planned(peak(network, lambda: network.decode(latents)), "audio_vae", config, shape, WHOLE)
    if audio_latents > CHUNK:
        assert_planned(peak(network, lambda: network.encode(waveform)), "audio_vae", config, shape, WHOLE)


# Weights and films


def pony_plan(
    parts: dict[str, Path], shape: FilmShape, large: FilmShape | None = None, device: torch.device = CPU
) -> Plan:
    opened = {role: open_checkpoint(path) for role, path in parts.items()}
    return plan_film(opened, shape, large, HALF, WHOLE, device)


def test_the_plan_counts_the_weights_exactly(pony_folder: Path) -> None:
    shape = FilmShape(128, 128, 26)
    plan = pony_plan({"transformer": pony_folder / "distill"}, shape, device=META)
    state = load(open_checkpoint(pony_folder / "distill"), HALF).state_dict()
    (stage,) = plan.stages
    assert stage.weights == sum(t.nbytes for t in state.values())
    layers = [sum(t.nbytes for n, t in state.items() if n.startswith(f"block.layers.{i}.")) for i in range(6)]
    assert (stage.layers, stage.largest_layer) == (sum(layers), max(layers))


def test_larger_and_longer_films_need_more(pony_folder: Path) -> None:
    parts = {"transformer": pony_folder / "distill"}
    films = [((128, 128), 26), ((256, 128), 26), ((256, 256), 26), ((256, 256), 251)]
    needs = [pony_plan(parts, FilmShape(*size, latents)).on_device("stage") for size, latents in films]
    assert needs == sorted(set(needs))


def test_super_resolution_decides_over_the_size_of_all_stages_but_the_first_transformer_and_the_sound(
    pony_folder: Path,
) -> None:
    parts = {"transformer": "distill", "super_resolution": "540p_sr", "video_decoder": "turbo_vae",
             "video_vae": "wan22_vae.safetensors", "audio_vae": "audio_vae"}  # fmt: skip
    shape = FilmShape(128, 128, 26)
    paths = {role: pony_folder / name for role, name in parts.items()}
    plain, enlarged = pony_plan(paths, shape), pony_plan(paths, shape, FilmShape(256, 256, 26))
    pairs = zip(plain.stages, enlarged.stages, strict=True)
    grown = {a.name for a, b in pairs if b.activations > a.activations}
    assert grown == {"super resolution", "video decoder", "video vae"}


# Placements

GB = 10**9
STAGES = (
    Stage("text encoder", weights=18 * GB, activations=GB, layers=16 * GB, largest_layer=GB),
    Stage("transformer", weights=30 * GB, activations=3 * GB, layers=29 * GB, largest_layer=GB),
)
ON_CPU, ON_ACCELERATOR = Plan(STAGES, CPU), Plan(STAGES, META)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set how many GB of RAM and of an accelerator are free."""

    def set_free(ram: float, accelerator: float = 0) -> None:
        sizes = {CPU: ram * GB, META: accelerator * GB}
        monkeypatch.setattr("happyhorse.sampler.plan.free_memory", lambda device: int(sizes[device]))

    return set_free


def test_streaming_takes_two_layers_of_the_accelerator_and_the_others_of_ram() -> None:
    assert [ON_ACCELERATOR.on_device(offload) for offload in OFFLOADS] == [51 * GB, 33 * GB, 6 * GB]
    assert [ON_ACCELERATOR.in_ram(offload) for offload in OFFLOADS] == [0, 0, 31 * GB]


def test_streaming_on_the_cpu_takes_all_weights_and_copies_of_two_layers() -> None:
    assert [ON_CPU.on_device(offload) for offload in OFFLOADS] == [51 * GB, 33 * GB, 35 * GB]
    assert [ON_CPU.in_ram(offload) for offload in OFFLOADS] == [0, 0, 0]


@pytest.mark.parametrize(
    ("accelerator", "ram", "offload"),
    [(51, 0, "none"), (50, 0, "stage"), (33, 0, "stage"), (32, 31, "blocks"), (32, 30, None),
     (6, 31, "blocks"), (5, 99, None)],
)  # fmt: skip
def test_the_fastest_placement_that_fits_is_chosen(
    free: Callable[..., None], accelerator: int, ram: int, offload: str | None
) -> None:
    free(ram, accelerator)
    assert ON_ACCELERATOR.choose() == offload
    if offload:
        assert require_fit(ON_ACCELERATOR, "auto", []) == offload


@pytest.mark.parametrize(("ram", "offload"), [(51, "none"), (50, "stage"), (33, "stage"), (32, None)])
def test_on_the_cpu_streaming_is_never_chosen(
    free: Callable[..., None], ram: int, offload: str | None
) -> None:
    free(ram)
    assert ON_CPU.choose() == offload


def film(gigabytes: float, device: torch.device = META) -> Plan:
    """A film that needs so much to be made stage by stage, and as much more to be made without offload."""
    return Plan((Stage("text encoder", gigabytes * GB, 0), Stage("transformer", gigabytes * GB, 0)), device)


@pytest.mark.parametrize(
    ("asked", "accelerator", "ram", "smaller", "words"),
    [
        ("none", 40, 0, [], "51.00 GB on meta with --offload none, 40.00 GB are free; "
                            "what would fit: --offload stage (33.00 GB on meta)"),
        ("none", 20, 40, [], "fit: --offload blocks (6.00 GB on meta and 31.00 GB of RAM)"),
        ("none", 20, 30, [], "nothing smaller would fit"),
        ("blocks", 20, 30, [], "6.00 GB on meta and 31.00 GB of RAM with --offload blocks, "
                               "20.00 GB and 30.00 GB are free; nothing smaller would fit"),
        ("auto", 5, 40, [11, 5, 4], "6.00 GB on meta and 31.00 GB of RAM with --offload blocks, .* "
                                    "what would fit: film 1$"),
        ("stage", 20, 30, [21, 20], "33.00 GB on meta with --offload stage, .*; what would fit: film 1$"),
        ("none", 20, 30, [21, 20, 10], "what would fit: film 1 with --offload stage$"),
        ("none", 40, 30, [30, 10], "fit: --offload stage .* or film 0 with --offload stage$"),
        ("auto", 5, 40, [6], "nothing smaller would fit"),
    ],
)  # fmt: skip
def test_only_what_would_fit_is_named(
    free: Callable[..., None], asked: str, accelerator: float, ram: float, smaller: list[float], words: str
) -> None:
    free(ram, accelerator)
    films = [(f"film {i}", film(gigabytes)) for i, gigabytes in enumerate(smaller)]
    with pytest.raises(MemoryError, match=words.replace("(", r"\(").replace(")", r"\)")):
        require_fit(ON_ACCELERATOR, asked, films)


def test_a_film_too_large_for_the_cpu_is_measured_by_its_cheapest_placement(
    free: Callable[..., None],
) -> None:
    free(20)
    with pytest.raises(MemoryError, match=r"33.00 GB on cpu with --offload stage, 20.00 GB are free"):
        require_fit(ON_CPU, "auto", [])
