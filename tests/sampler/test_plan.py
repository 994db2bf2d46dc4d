from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch.nn import functional as F

from happyhorse.model.audio_vae import CHUNK, AudioVAE
from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.config import MAGIHUMAN, PONY, PRESETS, TransformerConfig
from happyhorse.model.geometry import FilmShape
from happyhorse.model.packing import Latents, PackedLayout
from happyhorse.model.run_block import run_in_place
from happyhorse.model.text_encoder import TextEncoder
from happyhorse.model.transformer import JointTransformer
from happyhorse.model.video_decoder import VideoDecoder
from happyhorse.model.video_vae import VideoVAE
from happyhorse.sampler.activations import SMALL_TENSORS, TEXT_TOKENS, activations
from happyhorse.sampler.placement import OFFLOADS, Placement, in_pieces
from happyhorse.sampler.plan import (
    Need,
    Plan,
    Room,
    Stage,
    Work,
    free_memory,
    plan_film,
    require_fit,
    room_on,
    table,
)

CPU, META = torch.device("cpu"), torch.device("meta")  # meta counts as any accelerator
HALF, WHOLE = torch.bfloat16, torch.float32


# Activations: what is planned against the tensors that the networks hold. On the meta device tensors have
# sizes and no values, so networks of full size are no work.


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
    measured: int,
    role: str,
    config: Any,
    shape: FilmShape,
    dtype: torch.dtype,
    device: torch.device = META,
    **pieces: int,
) -> None:
    planned = SMALL_TENSORS * activations(role, config, shape, dtype, device, **pieces)
    assert 1.0 <= planned / measured <= 1.4, f"planned {planned:.3g}, needed {measured:.3g}"


def shortened(config: TransformerConfig) -> TransformerConfig:
    """Three layers that differ as those of the whole network do."""
    local = (0, 1) if config.local_attn_layers else ()
    return replace(config, num_layers=3, mm_layers=(0,), gelu7_layers=(0,), local_attn_layers=local)


def transformer_peak(
    config: TransformerConfig, shape: FilmShape, dtype: torch.dtype, device: torch.device, piece: int = 0
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
    run_block = in_pieces(run_in_place, piece) if piece else run_in_place
    return peak(network, lambda: network(latents, text, layout, run_block=run_block))


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


@pytest.mark.parametrize(("film", "piece"), [("published", 1024), ("published, 1080p", 1024),
                                             ("published, 1080p", 4096), ("pony, large", 4096)])  # fmt: skip
@each_dtype
@pytest.mark.parametrize("variant", ["distill", "1080p_sr"])
def test_a_transformer_in_pieces_needs_what_is_planned(
    film: str, dtype: torch.dtype, variant: str, piece: int
) -> None:
    preset, shape = FILMS[film]
    config = shortened(preset.transformers[variant])
    measured = transformer_peak(config, shape, dtype, META, piece)
    assert_planned(measured, "transformer", config, shape, dtype, piece=piece)


@each_dtype
@pytest.mark.parametrize("variant", ["distill", "1080p_sr"])
def test_a_transformer_in_pieces_on_the_cpu_needs_what_is_planned(dtype: torch.dtype, variant: str) -> None:
    config, shape = shortened(PONY.transformers[variant]), FilmShape(384, 384, 51)
    measured = transformer_peak(config, shape, dtype, CPU, 1024)
    assert_planned(measured, "transformer", config, shape, dtype, CPU, piece=1024)


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


@pytest.mark.parametrize(("film", "tiles"), [("published, 1080p", 2), ("published, 1080p", 4),
                                             ("pony, large", 4)])  # fmt: skip
@each_dtype
def test_a_video_decoder_in_tiles_needs_what_is_planned(film: str, dtype: torch.dtype, tiles: int) -> None:
    preset, shape = FILMS[film]
    with META:
        network = VideoDecoder(preset.video_decoder).to(dtype)
        latents = torch.zeros(1, 48, shape.latent_frames, shape.latent_rows, shape.latent_columns)

    def decode() -> None:
        for _, _chunk in zip(range(2), network.decode_chunks(latents, tiles)):  # noqa: B905
            pass

    measured = peak(network, decode)
    assert_planned(measured, "video_decoder", preset.video_decoder, shape, dtype, tiles=tiles)


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
    assert stage.layers == tuple(layers)
    assert stage.largest == max(t.nbytes for t in state.values()) and stage.dequantized == (0, 0)


class Quantized:
    """A text encoder of two layers whose second is quantised to a byte a value."""

    part, config = "text_encoder", PONY.text_encoder
    shapes: ClassVar = {
        "embed_tokens.weight": (99, 10),
        "layers.0.a.weight": (8, 8),
        "layers.1.a.weight": (9, 10),
    }
    names: ClassVar = dict.fromkeys(shapes, "")

    def shape(self, own: str) -> torch.Size:
        return torch.Size(self.shapes[own])

    def keeps_quantized(self, own: str) -> bool:
        return own != "layers.0.a.weight"

    def kept_bytes(self, own: str, dtype: torch.dtype) -> int:
        return self.shape(own).numel() * (1 if self.keeps_quantized(own) else dtype.itemsize)


def test_quantised_weights_count_as_they_are_stored_and_one_of_them_worked_out() -> None:
    plan = plan_film({"text_encoder": Quantized()}, FilmShape(32, 32, 6), None, HALF, HALF, META)
    (stage,) = plan.stages
    assert (stage.rest, stage.layers, stage.dequantized) == (990, (128, 90), (180, 180))
    assert stage.activations(Placement()) == stage.works[0].num_bytes + 180


def test_larger_and_longer_films_need_more(pony_folder: Path) -> None:
    parts = {"transformer": pony_folder / "distill"}
    films = [((128, 128), 26), ((256, 128), 26), ((256, 256), 26), ((256, 256), 251)]
    needs = [pony_plan(parts, FilmShape(*size, latents)).need("stage").device for size, latents in films]
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
    grown = {a.role for a, b in pairs if b.works[0].num_bytes > a.works[0].num_bytes}
    assert grown == {"super_resolution", "video_decoder", "video_vae"}


# Placements

GB = 10**9
STAGES = (
    Stage("text_encoder", "text", rest=2 * GB, layers=(GB,) * 16, works=(Work(GB),)),
    Stage("transformer", "base", rest=GB, layers=(GB,) * 29, works=(Work(3 * GB), Work(GB, piece=64))),
    Stage("video_decoder", "picture", rest=GB, layers=(), works=(Work(9 * GB), Work(4 * GB, tiles=4))),
)
ON_CPU, ON_ACCELERATOR = Plan(STAGES, CPU), Plan(STAGES, META)
WHOLE_ON_IT, STREAMED = Placement(), Placement(resident=0)


def room(device: float, ram: float = 0) -> Room:
    return Room(int(device * GB), int(ram * GB))


def test_streaming_takes_two_layers_of_the_accelerator_and_the_others_of_ram() -> None:
    text, base, _ = STAGES
    assert base.need(WHOLE_ON_IT, META) == Need(33 * GB, 0)
    assert base.need(STREAMED, META) == Need(6 * GB, 29 * GB)
    assert base.need(Placement(resident=10), META) == Need(16 * GB, 19 * GB)
    assert base.need(Placement(resident=10, piece=64), META) == Need(14 * GB, 19 * GB)
    assert text.need(STREAMED, META) == Need(5 * GB, 16 * GB)


def test_streaming_on_the_cpu_takes_all_weights_and_copies_of_two_layers() -> None:
    assert STAGES[1].need(STREAMED, CPU) == Need(35 * GB, 0)
    assert [ON_CPU.need(offload).device // GB for offload in OFFLOADS] == [58, 33, 35, 31]


def test_loading_and_the_frames_take_ram_beside_an_accelerator() -> None:
    stage = replace(STAGES[2], largest=GB, in_ram=2 * GB)
    assert stage.need(WHOLE_ON_IT, META).ram == 3 * GB
    assert stage.need(WHOLE_ON_IT, CPU).ram == 0


@pytest.mark.parametrize(
    ("device", "ram", "text", "base", "picture"),
    [
        (58, 0, Placement(keep=True), Placement(keep=True), Placement(keep=True)),
        (57, 0, WHOLE_ON_IT, WHOLE_ON_IT, WHOLE_ON_IT),
        (33, 0, WHOLE_ON_IT, WHOLE_ON_IT, WHOLE_ON_IT),
        (32, 31, WHOLE_ON_IT, Placement(resident=26), WHOLE_ON_IT),  # as many as fit beside two copies
        (16, 29, Placement(resident=11), Placement(resident=10), WHOLE_ON_IT),
        (9, 29, Placement(resident=4), Placement(resident=3), Placement(tiles=4)),
        (7, 28, Placement(resident=2), Placement(resident=1), Placement(tiles=4)),
        (5, 29, STREAMED, Placement(resident=1, piece=64), Placement(tiles=4)),
    ],
)
def test_every_part_takes_the_first_placement_that_fits_and_pieces_come_last(
    device: float, ram: float, text: Placement, base: Placement, picture: Placement
) -> None:
    chosen = ON_ACCELERATOR.place("auto", room(device, ram))
    assert chosen == {"text_encoder": text, "transformer": base, "video_decoder": picture}


@pytest.mark.parametrize(("device", "ram"), [(4, 99), (5, 27), (20, 5)])
def test_nothing_is_chosen_where_nothing_fits(device: float, ram: float) -> None:
    assert ON_ACCELERATOR.place("auto", room(device, ram)) is None


def test_what_is_asked_for_is_taken_as_it_is() -> None:
    plenty = room(99, 99)
    of = {offload: ON_ACCELERATOR.place(offload, plenty) for offload in OFFLOADS}
    assert of["stage"] == dict.fromkeys(of["stage"], WHOLE_ON_IT)
    assert of["blocks"] == {"text_encoder": STREAMED, "transformer": STREAMED, "video_decoder": WHOLE_ON_IT}
    assert of["pieces"] == of["blocks"] | {"transformer": Placement(resident=0, piece=64)}
    on_cpu = ON_CPU.place("pieces", plenty)
    assert on_cpu == dict.fromkeys(of["stage"], WHOLE_ON_IT) | {"transformer": Placement(piece=64)}


def test_tiles_are_taken_only_where_they_are_needed() -> None:
    assert ON_ACCELERATOR.place("pieces", room(10, 99))["video_decoder"] == WHOLE_ON_IT
    assert ON_ACCELERATOR.place("pieces", room(9, 99))["video_decoder"] == Placement(tiles=4)
    assert ON_ACCELERATOR.place("blocks", room(9, 99)) is None


@pytest.mark.parametrize("ram", [58, 57, 33, 32, 31])
def test_on_the_cpu_streaming_is_never_chosen(ram: float) -> None:
    chosen = ON_CPU.place("auto", room(ram, ram))
    assert {placement.resident for placement in chosen.values()} == {None}
    assert chosen["transformer"].piece == (64 if ram < 33 else 0)


def test_where_memory_runs_out_the_next_step_needs_less() -> None:
    text, base, picture = STAGES
    plenty = room(99, 99)
    steps = ON_ACCELERATOR.steps_down(base, Placement(keep=True), plenty)
    assert steps == (Placement(keep=True), WHOLE_ON_IT, STREAMED, Placement(resident=0, piece=64))
    assert ON_ACCELERATOR.steps_down(base, Placement(resident=9), plenty)[1:] == steps[2:]
    assert ON_ACCELERATOR.steps_down(base, steps[-1], plenty) == steps[-1:]
    assert ON_ACCELERATOR.steps_down(base, WHOLE_ON_IT, room(99, 28)) == (WHOLE_ON_IT,), "too little RAM"
    assert ON_ACCELERATOR.steps_down(text, WHOLE_ON_IT, plenty) == (WHOLE_ON_IT, STREAMED)
    assert ON_ACCELERATOR.steps_down(picture, WHOLE_ON_IT, plenty) == (WHOLE_ON_IT, Placement(tiles=4))
    assert ON_CPU.steps_down(base, Placement(keep=True), plenty)[1:] == (WHOLE_ON_IT, Placement(piece=64))


def film(gigabytes: float, device: torch.device = META) -> Plan:
    """A film that needs so much to be made stage by stage, and as much more to be made without offload."""
    stage = Stage("transformer", "base", int(gigabytes * GB), (), (Work(0),))
    return Plan((replace(stage, role="text_encoder"), stage), device)


@pytest.mark.parametrize(
    ("asked", "device", "ram", "smaller", "words"),
    [
        ("none", 40, 0, [], "58.00 GB on meta with --offload none, 40.00 GB are free; "
                            "what would fit: --offload stage (33.00 GB on meta)"),
        ("none", 20, 40, [], "fit: --offload blocks (10.00 GB on meta and 29.00 GB of RAM)"),
        ("none", 9, 40, [], "fit: --offload pieces (5.00 GB on meta and 29.00 GB of RAM)"),
        ("none", 20, 28, [], "fit: --offload auto (5.00 GB on meta and 29.00 GB of RAM)"),
        ("none", 4, 30, [], "nothing smaller would fit"),
        ("blocks", 9, 20, [], "10.00 GB on meta and 29.00 GB of RAM with --offload blocks, "
                              "9.00 GB and 20.00 GB are free; nothing smaller would fit"),
        ("auto", 4, 40, [11, 3, 2], "5.00 GB on meta and 29.00 GB of RAM with --offload auto, .* "
                                    "what would fit: film 1$"),
        ("stage", 20, 5, [21, 20], "33.00 GB on meta with --offload stage, .*; what would fit: film 1$"),
        ("none", 20, 5, [21, 20, 10], "what would fit: film 1 with --offload stage$"),
        ("none", 40, 30, [30, 10], "fit: --offload stage .* or film 0 with --offload stage$"),
        ("auto", 4, 40, [6], "nothing smaller would fit"),
    ],
)  # fmt: skip
def test_only_what_would_fit_is_named(
    asked: str, device: float, ram: float, smaller: list[float], words: str
) -> None:
    films = [(f"film {i}", film(gigabytes)) for i, gigabytes in enumerate(smaller)]
    with pytest.raises(MemoryError, match=words.replace("(", r"\(").replace(")", r"\)")):
        require_fit(ON_ACCELERATOR, asked, films, room(device, ram))


def test_what_fits_comes_with_its_steps_down() -> None:
    chosen = require_fit(ON_ACCELERATOR, "auto", [], room(20, 30))
    assert chosen["transformer"] == (Placement(resident=14), STREAMED, Placement(resident=0, piece=64))
    assert chosen["video_decoder"] == (WHOLE_ON_IT, Placement(tiles=4))


def test_a_film_on_an_apple_gpu_is_planned_in_ram_once() -> None:
    apple = torch.device("mps")
    assert free_memory(apple) == pytest.approx(free_memory(CPU), rel=0.2)
    plan = replace(ON_ACCELERATOR, device=apple)
    on_cpu = replace(ON_ACCELERATOR, device=CPU)
    for offload in ("none", "stage", "blocks", "auto", "pieces"):
        assert plan.need(offload) == on_cpu.need(offload)
        for size in (10, 20, 30, 60):
            assert plan.place(offload, room(size, size)) == on_cpu.place(offload, room(size, size))


def test_given_memory_replaces_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {CPU: 30 * GB, META: 10 * GB}
    monkeypatch.setattr("happyhorse.sampler.plan.free_memory", sizes.__getitem__)
    assert room_on(META) == room(10, 30)
    assert room_on(META, vram=100, ram=50) == room(94, 47), "a part of it is left to others"
    assert room_on(CPU, vram=100) == room(30, 30)
    assert room_on(CPU, ram=50) == room(47, 47)


def test_the_table_has_a_line_for_every_stage_with_both_memories() -> None:
    tight = room(16, 19)
    head, text, base, picture = table(ON_ACCELERATOR, ON_ACCELERATOR.place("auto", tight), tight)
    assert head.split() == ["stage", "placement", "VRAM", "RAM", "fits"]
    assert text.split()[-3:] == ["16.00", "5.00", "yes"]
    assert "10 of 29 layers on the device" in base and base.split()[-3:] == ["16.00", "19.00", "yes"]
    assert picture.split()[-3:] == ["10.00", "0.00", "yes"]
    tight = room(4, 40)
    *_, picture = table(ON_ACCELERATOR, ON_ACCELERATOR.closest("auto", tight), tight)
    assert "4 tiles" in picture and picture.endswith(" 5.00   0.00  NO, too little VRAM")
    _, text, base, _ = table(ON_ACCELERATOR, ON_ACCELERATOR.closest("auto", room(1, 1)), room(1, 1))
    assert text.endswith("NO, too little VRAM and RAM") and base.endswith("NO, too little VRAM and RAM")
    *_, picture = table(ON_CPU, ON_CPU.closest("none", room(1, 1)), room(1, 1))
    assert picture.endswith("NO, too little RAM")
    kept = table(ON_CPU, ON_CPU.place("none", room(60, 60)), room(60, 60))
    assert [line.split()[-3:] for line in kept[1:]] == [["-", f"{49 + n}.00", "yes"] for n in (1, 3, 9)]
