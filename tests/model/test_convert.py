"""`happyhorse convert`: what the new files hold, what other libraries read in them, and what it refuses."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import shutil
import sys
from pathlib import Path

import pytest
import torch
from full_disk import disk_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_networks import random_weight
from torch import Tensor

from happyhorse import __version__, cli
from happyhorse.model import convert as convert_module
from happyhorse.model.checkpoint import BLOCK_LINEAR, Checkpoint, load, load_tokenizer, open_checkpoint
from happyhorse.model.config import PONY, VARIANTS, TransformerConfig
from happyhorse.model.convert import FORMATS, convert, suffix_of, velocity_error
from happyhorse.model.gguf_blocks import BLOCKS
from happyhorse.model.quant import QuantizedWeight
from happyhorse.model.stream_writer import StreamWriter
from happyhorse.model.transformer import JointTransformer

gguf = pytest.importorskip("gguf")
State = dict[str, Tensor]

# the full model's width, heads and text states divided by 8; it too has rows that are no whole GGUF blocks
EIGHTH = TransformerConfig(
    num_layers=2, hidden_size=640, head_dim=16, num_query_groups=8, video_in_channels=192,
    audio_in_channels=64, text_in_channels=448, mm_layers=(0,), gelu7_layers=(0,), local_attn_layers=(1,),
    frame_receptive_field=11, enable_attn_gating=True, coords_style="v2",
)  # fmt: skip


@pytest.fixture(scope="module")
def eighth(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A transformer of an eighth of the width in float32, with rows of very different size."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = JointTransformer(EIGHTH).state_dict()
    state = {}
    for name, tensor in shapes.items():
        if name == "adapter.rope.bands":
            continue
        state[name] = random_weight(name, torch.empty(tensor.shape), generator)
        if BLOCK_LINEAR.match(name):
            state[name] *= torch.rand(len(tensor), 1, generator=generator) * 2
    path = tmp_path_factory.mktemp("eighth") / "distill.safetensors"
    save_file(state, path, {"config": json.dumps(EIGHTH.to_dict())})
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def small(pony_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The pony's transformer with its weights as float32 that bfloat16 cannot hold."""
    state = load_file(pony_folder / "distill" / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in filter(BLOCK_LINEAR.match, state):
        noise = torch.randn(state[name].shape, generator=generator)
        state[name] = state[name].float() * (1 + 0.01 * noise)
    path = tmp_path_factory.mktemp("small") / "distill.safetensors"
    save_file(state, path, {"config": json.dumps(PONY.transformers["distill"].to_dict())})
    return open_checkpoint(path)


def run(source: Checkpoint, folder: Path, to: str) -> tuple[Path, dict[str, convert_module.WeightError]]:
    target = folder / f"converted_{to}{suffix_of(to)}"
    return target, convert(source, target, to, "happyhorse test")


def stored_values(path: Path, name: str) -> Tensor:
    """A tensor of a converted file, read by other people's libraries alone."""
    if path.suffix == ".gguf":
        reader = gguf.GGUFReader(path)
        tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        shape = reader.get_field(f"comfy.gguf.orig_shape.{name}")
        return values.reshape(shape.contents() if shape else tensor.shape.tolist()[::-1])
    with safe_open(path, "pt") as file:
        values, scale = file.get_tensor(name).float(), f"{name}_scale"
        return values * file.get_tensor(scale) if scale in file.keys() else values  # noqa: SIM118


def reference(weight: Tensor, to: str) -> Tensor:
    """What the format's own quantiser makes of a matrix."""
    if to == "bf16":
        return weight.to(torch.bfloat16).float()
    if to in ("fp8", "fp8_tensor"):
        largest = weight.double().abs()
        scale = (largest.amax(dim=1, keepdim=True) if to == "fp8" else largest.amax()) / 448
        return ((weight / scale).float().to(torch.float8_e4m3fn).double() * scale).float()
    kind = gguf.GGMLQuantizationType[FORMATS[to]]
    blocks = gguf.quants.quantize(weight.reshape(-1, 32).numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(blocks, kind)).reshape(weight.shape)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# Errors


@pytest.mark.parametrize("to", list(FORMATS))
@pytest.mark.parametrize("which", ["pony", "eighth of the width"])
def test_a_format_costs_no_more_than_its_own_quantiser_and_velocities_follow(
    which: str, to: str, small: Checkpoint, eighth: Checkpoint, tmp_path: Path
) -> None:
    source = small if which == "pony" else eighth
    target, errors = run(source, tmp_path, to)
    linears = [own for own in source.names if BLOCK_LINEAR.match(own)]
    assert len(linears) == 4 * source.config.num_layers
    want = [source.read(own) for own in linears]
    ours = [stored_values(target, own) for own in linears]
    best = [reference(weight, to) for weight in want]
    for own, got, own_best, exact in zip(linears, ours, best, want, strict=True):
        error = relative(got, exact)
        assert error == pytest.approx(errors[own].relative, rel=1e-3), own
        assert error <= 1.1 * relative(own_best, exact), own
    got, own_best, exact = (torch.cat([weight.flatten() for weight in each]) for each in (ours, best, want))
    weight, own_quantiser = relative(got, exact), relative(own_best, exact)
    velocity = velocity_error(source, target)
    figures = f"weight error {weight:.3%}, own quantiser {own_quantiser:.3%}, velocity error {velocity:.3%}"
    sys.stdout.write(f"{which}, {to}: {figures}\n")
    assert 0 < velocity <= 3 * weight


@pytest.mark.parametrize("to", list(FORMATS))
def test_what_is_no_matrix_of_a_layer_keeps_every_bit(small: Checkpoint, tmp_path: Path, to: str) -> None:
    target, _ = run(small, tmp_path, to)
    others = [own for own in small.names if not BLOCK_LINEAR.match(own)]
    assert len(others) == 7 + 4 + 6 * 4
    for own in others:
        assert torch.equal(stored_values(target, own), small.read(own)), own
    opened = open_checkpoint(target)
    assert opened.names.keys() == small.names.keys() and opened.config == small.config
    assert {own for own in opened.quantized} == (set(small.names) - set(others) if to != "bf16" else set())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", list(FORMATS))
def test_what_is_no_matrix_of_a_layer_keeps_its_dtype(
    small: Checkpoint, tmp_path: Path, stored: torch.dtype, to: str
) -> None:
    state = {own: small.read(own).to(stored) for own in small.names}
    save_file(state, tmp_path / "base.safetensors", {"config": json.dumps(small.config.to_dict())})
    target, _ = run(open_checkpoint(tmp_path / "base.safetensors"), tmp_path, to)
    opened = open_checkpoint(target)
    assert {opened.read(own).dtype for own in state if not BLOCK_LINEAR.match(own)} == {stored}


# Sources


def scaled(weight: Tensor, kind: torch.dtype, per_row: bool) -> tuple[Tensor, Tensor]:
    largest = 448 if kind == torch.float8_e4m3fn else 127
    scale = (weight.abs().amax(dim=1, keepdim=True) if per_row else weight.abs().max()) / largest
    values = weight / scale
    return (values.round() if kind == torch.int8 else values).to(kind), scale


def write_source(kind: str, small: Checkpoint, folder: Path) -> Checkpoint:
    """The weights as people publish them."""
    path = folder / f"base_{kind}.safetensors"
    state = {own: small.read(own) for own in small.names}
    for own in filter(BLOCK_LINEAR.match, list(state)):
        layer = own.removesuffix(".weight")
        if kind in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
            state[own] = state[own].to(getattr(torch, kind))
        elif kind == "one scale":
            state[own], state[f"{own}.__fp8_scale"] = scaled(state[own], torch.float8_e4m3fn, False)
        elif kind == "int8":
            state[own], state[f"{layer}.weight_scale"] = scaled(state[own], torch.int8, True)
            note = json.dumps({"format": "int8_tensorwise"}).encode()
            state[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(note), dtype=torch.uint8)
    save_file(state, path, {"config": json.dumps(small.config.to_dict())})
    return open_checkpoint(path)


KINDS = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "one scale", "int8"]


@pytest.mark.parametrize("to", ["bf16", "fp8", "q8_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_that_is_read_can_be_converted(
    small: Checkpoint, tmp_path: Path, kind: str, to: str
) -> None:
    source = write_source(kind, small, tmp_path)
    target, errors = run(source, tmp_path, to)
    copied = to == "fp8" and kind in ("float8_e4m3fn", "one scale")
    for own in filter(BLOCK_LINEAR.match, source.names):
        stored = source.read(own)
        values = stored.dequantize(torch.float32) if isinstance(stored, QuantizedWeight) else stored.float()
        want = values if copied else reference(values, to)
        got = stored_values(target, own)
        if to == "fp8" and not copied:  # its scales are float32: a value in the middle may go the other way
            nearest = (want - values).abs() + 1e-6 * values.abs()
            assert bool(((got - values).abs() <= nearest).all()), own
        else:
            assert relative(got, want) < 1e-6, own
        assert (errors[own].change == 0) == (
            copied or (to == "bf16" and kind in ("bfloat16", *KINDS[3:5]))
        ), own


@pytest.mark.parametrize("to", ["fp8", "q8_0", "q5_0", "q4_0"])
def test_a_weight_that_is_in_the_format_already_is_copied(small: Checkpoint, tmp_path: Path, to: str) -> None:
    once, _ = run(small, tmp_path, to)
    (tmp_path / "again").mkdir()
    twice, errors = run(open_checkpoint(once), tmp_path / "again", to)
    assert {error.change for error in errors.values()} == {0.0}
    first, second = open_checkpoint(once), open_checkpoint(twice)
    for own in filter(BLOCK_LINEAR.match, first.names):
        one, two = first.read(own), second.read(own)
        assert torch.equal(one.data.view(torch.uint8), two.data.view(torch.uint8)), own
        assert to != "fp8" or torch.equal(one.scale, two.scale), own


@pytest.mark.parametrize("to", ["q8_0", "q5_0", "q4_0"])
def test_gguf_goes_back_to_other_formats(small: Checkpoint, tmp_path: Path, to: str) -> None:
    first, _ = run(small, tmp_path, to)
    second, _ = run(open_checkpoint(first), tmp_path, "bf16")
    for own in filter(BLOCK_LINEAR.match, small.names):
        assert torch.equal(stored_values(second, own), reference(stored_values(first, own), "bf16")), own


@pytest.mark.parametrize("to", list(FORMATS))
def test_slices_change_nothing(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    target, _ = run(small, tmp_path, to)
    whole = target.read_bytes()
    monkeypatch.setattr(convert_module, "SLICE_VALUES", 1)  # so 256 rows each
    run(small, tmp_path, to)
    assert target.read_bytes() == whole
    copy, _ = run(open_checkpoint(target), tmp_path / "..", to)  # slices of quantised weights
    left, right = open_checkpoint(target), open_checkpoint(copy)
    for own in filter(BLOCK_LINEAR.match, left.names):
        assert torch.equal(stored_values(target, own), stored_values(copy, own)), own
    assert left.names.keys() == right.names.keys()
    copy.unlink()


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize("columns", [424, 512])
def test_blocks_of_a_source_are_cut_where_they_end(
    monkeypatch: pytest.MonkeyPatch, kind: str, columns: int
) -> None:
    monkeypatch.setattr(convert_module, "SLICE_VALUES", 1)
    block = BLOCKS[kind]
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (512 * columns // block.values * block.num_bytes,), generator=generator)
    data = data.to(torch.uint8) if columns % block.values else data.to(torch.uint8).reshape(512, -1)
    weight = QuantizedWeight(data, None, kind, torch.Size((512, columns)))
    pieces = [piece.dequantize(torch.float32) for piece in convert_module._slices(weight)]
    assert [piece.shape[0] for piece in pieces] == [256, 256]
    assert torch.equal(torch.cat(pieces).nan_to_num(), weight.dequantize(torch.float32).nan_to_num())


def test_the_hash_does_not_depend_on_how_the_source_is_cut(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("int8", "one scale", "float32"):
        source, told = write_source(kind, small, tmp_path), set()
        for size in (1, 1 << 22):
            monkeypatch.setattr(convert_module, "SLICE_VALUES", size)
            target, _ = run(source, tmp_path, "bf16")
            told.add(open_checkpoint(target, variant="base").file.metadata["source_sha256"])
        assert len(told) == 1, kind


def test_a_matrix_that_fills_no_blocks_stays_as_it_is(pony_folder: Path) -> None:
    source = open_checkpoint(pony_folder / "distill")
    odd = dataclasses.replace(source.file.tensors["block.layers.1.mlp.down_proj.weight"], shape=(5, 7))
    tensors = {**source.file.tensors, "block.layers.1.mlp.down_proj.weight": odd}
    file = type("File", (), {"tensors": tensors})()
    source = dataclasses.replace(source, file=file)
    assert convert_module._kind(source, "block.layers.1.mlp.down_proj.weight", "q8_0") == "BF16"
    assert convert_module._kind(source, "block.layers.2.mlp.down_proj.weight", "q8_0") == "Q8_0"


# Metadata


@pytest.mark.parametrize("to", list(FORMATS))
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_says_what_it_is_and_where_it_comes_from(
    pony_folder: Path, tmp_path: Path, variant: str, to: str
) -> None:
    target, _ = run(open_checkpoint(pony_folder / variant), tmp_path, to)
    opened = open_checkpoint(target)
    assert (opened.variant, opened.config) == (variant, PONY.transformers[variant])
    told = opened.file.metadata
    assert told["family"] == "happyhorse" and told["source"] == variant
    with safe_open(pony_folder / variant / "model.safetensors", "pt") as file:
        assert told["note"] == file.metadata()["note"]
    assert told["recipe"] == (
        f"happyhorse test, convert --to {to}: "
        f"matrices of the layers in {FORMATS[to]}, all else as in the source"
    )
    assert len(told["source_sha256"]) == 64 and int(told["source_sha256"], 16)


def test_the_source_hash_is_of_the_weights_not_of_their_packing(small: Checkpoint, tmp_path: Path) -> None:
    state = {own: small.read(own).clone() for own in small.names}
    header = {"config": json.dumps(small.config.to_dict())}

    def digest(folder: Path, state: State, to: str = "bf16") -> str:
        folder.mkdir(exist_ok=True)
        names = list(state)
        weight_map = {}
        for index in range(3):
            part = {f"model.diffusion_model.{name}": state[name] for name in names[index::3]}
            save_file(part, folder / f"{index}.safetensors", header)
            weight_map |= dict.fromkeys(part, f"{index}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        target, _ = run(open_checkpoint(folder, variant="distill"), tmp_path, to)
        return open_checkpoint(target, variant="distill").file.metadata["source_sha256"]

    target, _ = run(small, tmp_path, "bf16")
    single = open_checkpoint(target).file.metadata["source_sha256"]
    assert digest(tmp_path / "shards", state) == digest(tmp_path / "shards", state, "q8_0") == single
    state["block.layers.2.mlp.down_proj.weight"][-1, -1] += 1
    assert digest(tmp_path / "changed", state) != single


def test_the_same_source_makes_the_same_file(small: Checkpoint, tmp_path: Path) -> None:
    for to in FORMATS:
        target, _ = run(small, tmp_path, to)
        first = target.read_bytes()
        run(small, tmp_path, to)
        assert target.read_bytes() == first, to


# The other parts


@pytest.mark.parametrize("to", list(FORMATS))
def test_a_text_encoder_becomes_one_file_with_its_tokenizer_and_without_the_decoder(
    pony_folder: Path, tmp_path: Path, to: str
) -> None:
    published = load_file(pony_folder / "text_encoder" / "model.safetensors")
    state = {f"model.encoder.{name}": tensor.to(torch.bfloat16) for name, tensor in published.items()}
    decoder = {f"model.decoder.layers.0.{i}.weight": torch.ones(500, 500) for i in range(4)}
    folder, elsewhere = tmp_path / "t5gemma", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    config = {"config": json.dumps(PONY.text_encoder.to_dict())}
    save_file(state | decoder, folder / "model.safetensors", config)
    shutil.copy(pony_folder / "text_encoder" / "tokenizer.json", folder)
    source = open_checkpoint(folder)
    target, _ = run(source, elsewhere, to)
    assert target.stat().st_size < sum(tensor.nbytes for tensor in state.values()) + 50_000
    opened = open_checkpoint(target)
    assert (opened.part, opened.config) == ("text_encoder", PONY.text_encoder)
    prompt = "A grey horse, ünter the moon"
    assert load_tokenizer(opened).encode(prompt) == load_tokenizer(source).encode(prompt)
    tokens = torch.tensor([load_tokenizer(opened).encode(prompt)[0]])
    states = [load(part, torch.float32)(tokens) for part in (opened, source)]
    limit = {"bf16": 0, "fp8": 0.08, "fp8_tensor": 0.08, "q8_0": 0.02, "q5_0": 0.13, "q4_0": 0.26}[to]
    assert relative(*states) <= limit
    again, _ = run(opened, tmp_path, to)  # the tokenizer comes from the header now
    assert load_tokenizer(open_checkpoint(again)).encode(prompt) == load_tokenizer(source).encode(prompt)


@pytest.mark.parametrize("to", ["bf16", "q8_0"])
def test_no_token_of_the_tokenizer_is_taken_for_the_hash(pony_folder: Path, tmp_path: Path, to: str) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(pony_folder / "text_encoder", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in ("#" * 64, "0" * 64):
        tokenizer["model"]["vocab"][token] = len(tokenizer["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    target, _ = run(open_checkpoint(folder), tmp_path, to)
    told = open_checkpoint(target).file.metadata
    assert json.loads(told["tokenizer"]) == tokenizer and len(bytes.fromhex(told["source_sha256"])) == 32


VAES = {
    "video_vae": "wan22_vae.safetensors",
    "video_decoder": "turbo_vae",
    "audio_vae": "audio_vae",
}


@pytest.mark.parametrize("part", list(VAES))
def test_a_vae_becomes_one_file_in_bfloat16_and_nothing_less(
    pony_folder: Path, tmp_path: Path, part: str
) -> None:
    source = open_checkpoint(pony_folder / VAES[part])
    target, _ = run(source, tmp_path, "bf16")
    opened = open_checkpoint(target)
    assert (opened.part, opened.config) == (part, source.config)
    assert target.stat().st_size < 0.6 * sum(source.read(own).float().nbytes for own in source.names)
    for own in source.names:
        want, got = source.read(own), opened.read(own)
        assert torch.equal(got, want.to(got.dtype)), own
        assert (got.dtype == torch.bfloat16) == (want.numel() > max(want.shape)), own
    load(opened, torch.float32)
    words = part.replace("_", " ")
    for to in ("fp8", "q8_0"):
        with pytest.raises(ValueError, match=f"the {words} is only converted to bf16, not to {to}"):
            run(source, tmp_path, to)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


# The command


class Outcome:
    """What the command did in `folder`."""

    def __init__(self, *arguments: object) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                self.code = cli.main(["convert", *map(str, arguments)])
            except SystemExit as stop:  # the parser's way
                self.code = stop.code
        self.lines = out.getvalue().splitlines()
        self.sentence = err.getvalue().replace("\r", "\n").strip().splitlines()[-1] if err.getvalue() else ""

    def assert_refused(self, *words: str) -> None:
        assert self.code == 2 and self.sentence.startswith("happyhorse"), self.sentence
        assert [word for word in words if word not in self.sentence] == [], self.sentence
        assert not self.lines


def test_the_command_tells_the_errors_layer_by_layer_and_of_the_velocity(
    pony_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "a.safetensors"
    outcome = Outcome(pony_folder / "distill", target, "--to", "fp8", "--check")
    assert outcome.code == 0, outcome.sentence
    *layers, total, path, velocity = outcome.lines
    assert [line.partition(": ")[0] for line in layers] == [f"block.layers.{i}" for i in range(6)]
    for line in layers:
        names = [part.split()[0] for part in line.partition(": ")[2].split(", ")]
        assert names == ["linear_qkv", "linear_proj", "up_gate_proj", "down_proj"]
    assert total.startswith("weight error 2.") and total.endswith(" % in 24 of 59 tensors")
    assert path == f"{target}: {target.stat().st_size / 1e6:.2f} MB"
    assert velocity.startswith("velocity error ") and 1 < float(velocity.split()[2]) < 8
    program = open_checkpoint(target).file.metadata["recipe"].partition(",")[0]
    assert program == f"happyhorse {__version__}"


REFUSED = {
    "another ending": (["distill", "x.gguf", "--to", "fp8"], ["must end in .safetensors", "got 'x.gguf'"]),
    "another ending of GGUF": (["distill", "x.sft", "--to", "q8_0"], ["must end in .gguf", "got 'x.sft'"]),
    "no such format": (["distill", "x.gguf", "--to", "q3_k"], ["--to", "'q3_k'", "bf16", "q4_0"]),
    "no format": (["distill", "x.gguf"], ["required", "--to"]),
    "no such source": (["absent", "x.gguf", "--to", "q8_0"], ["absent does not exist", "give a"]),
    "a folder of models": (
        [".", "x.safetensors", "--to", "bf16"],
        ["is a folder of models; give one of those in it: distill, text_encoder, wan22"],
    ),
    "no such folder": (
        ["distill", "absent/x.gguf", "--to", "q8_0"],
        ["the folder", "absent does not exist; create it"],
    ),
    "a folder": (["distill", "taken.gguf", "--to", "q8_0"], ["taken.gguf is a folder; give the name"]),
    "there already": (
        ["distill", "there.gguf", "--to", "q8_0"],
        ["there.gguf exists; give another name, or --overwrite"],
    ),
    "the source itself": (
        ["wan22_vae.safetensors", "wan22_vae.safetensors", "--to", "bf16", "--overwrite"],
        ["wan22_vae.safetensors is the source itself; give another name"],
    ),
    "a new file in the source folder": (
        ["shards/distill", "shards/distill/x.gguf", "--to", "q8_0"],
        ["x.gguf lies in the source folder", "distill, whose files must stay as they are; choose another"],
    ),
    "a file of the source folder": (
        ["shards/distill", "shards/distill/model.safetensors", "--to", "fp8", "--overwrite"],
        ["model.safetensors lies in the source folder", "distill, whose files must stay", "choose another"],
    ),
    "no known part": (
        ["foreign.safetensors", "x.gguf", "--to", "q8_0"],
        ["foreign.safetensors holds 1 tensors of no known part (a.b"],
    ),
    "not finite": (
        ["nan.safetensors", "x.gguf", "--to", "q8_0", "--variant", "base"],
        ["block.layers.3.mlp.down_proj.weight of the base transformer holds NaN", "download it again"],
    ),
    "too large": (
        ["large.safetensors", "x.gguf", "--to", "q4_0", "--variant", "base"],
        ["block.layers.3.mlp.down_proj.weight holds values up to 1e+30, too large for Q4_0; convert to bf16"],
    ),
    "incomplete": (
        ["lacking.safetensors", "x.gguf", "--to", "q4_0", "--variant", "base"],
        ["lacking.safetensors does not fit the base transformer", "1 missing (final_norm_audio.weight)"],
    ),
    "unknown variant": (
        ["lacking.safetensors", "x.gguf", "--to", "q4_0"],
        ["cannot tell which variant", "--variant"],
    ),
    "another variant": (
        ["distill", "x.gguf", "--to", "q4_0", "--variant", "base"],
        ["is the variant 'distill' by its header, but 'base' is asked for"],
    ),
    "a VAE in fp8": (
        ["wan22_vae.safetensors", "x.safetensors", "--to", "fp8"],
        ["the video vae is only converted to bf16, not to fp8"],
    ),
    "a check without velocities": (
        ["text_encoder", "x.gguf", "--to", "q4_0", "--check"],
        ["--check compares velocities, which the text encoder has not; leave it out"],
    ),
    "no tokenizer": (["bare", "x.gguf", "--to", "q4_0"], ["tokenizer.json does not exist", "put the token"]),
}

HARMFUL = ("the source itself", "a new file in the source folder", "a file of the source folder")


@pytest.fixture(scope="module")
def sources(pony_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pony, and sources that cannot be used."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("distill", "text_encoder", "wan22_vae.safetensors"):
        (folder / name).symlink_to(pony_folder / name)
    shutil.copytree(pony_folder / "distill", folder / "shards" / "distill")
    save_file({"a.b": torch.ones(3)}, folder / "foreign.safetensors")
    (folder / "bare").mkdir()
    shutil.copy(pony_folder / "text_encoder" / "model.safetensors", folder / "bare")
    config = {"config": json.dumps(PONY.transformers["base"].to_dict())}
    state = load_file(pony_folder / "base" / "model.safetensors")
    name = "block.layers.3.mlp.down_proj.weight"
    for kind, value in (("nan", float("nan")), ("large", 1e30)):
        damaged = state[name].clone()
        damaged[-1, -1] = value
        save_file(state | {name: damaged}, folder / f"{kind}.safetensors", config)
    del state["final_norm_audio.weight"]
    save_file(state, folder / "lacking.safetensors", config)
    return folder


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_converted_is_refused_in_a_sentence_and_leaves_nothing(
    sources: Path, tmp_path: Path, case: str
) -> None:
    (tmp_path / "taken.gguf").mkdir()
    (tmp_path / "there.gguf").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    (source, *options), words = REFUSED[case]
    target = (sources if case in HARMFUL else tmp_path) / options[0]
    harmed = target.read_bytes() if target.is_file() else None
    Outcome(sources / source, target, *options[1:]).assert_refused(*words)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.gguf").read_bytes() == b"old"
    assert not list(sources.glob("**/.*"))
    assert (target.read_bytes() if target.is_file() else None) == harmed


def test_overwrite_replaces_the_file(sources: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.gguf"
    target.write_bytes(b"old")
    assert Outcome(sources / "distill", target, "--to", "q8_0", "--overwrite").code == 0
    assert open_checkpoint(target).variant == "distill" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("num_bytes", [0, 100_000, 2_000_000])
@pytest.mark.parametrize("to", ["fp8", "q8_0"])
def test_a_disk_that_fills_up_is_told_and_the_old_file_stays(
    sources: Path, tmp_path: Path, to: str, num_bytes: int
) -> None:
    target = tmp_path / f"a{suffix_of(to)}"
    target.write_bytes(b"old")
    with disk_of(num_bytes):
        outcome = Outcome(sources / "distill", target, "--to", to, "--overwrite")
    words = "the file could not be written: file too large (it needs 0.003"
    outcome.assert_refused(words, "GB are free); free some space or choose another folder", str(target))
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == b"old"


def test_ctrl_c_leaves_nothing(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = StreamWriter.write

    def interrupt(writer: StreamWriter, name: str, tensor: Tensor) -> None:
        write(writer, name, tensor)
        if "layers.3." in name:
            assert list(tmp_path.glob(".*")), "the unfinished file must be there"
            raise KeyboardInterrupt

    monkeypatch.setattr(StreamWriter, "write", interrupt)
    outcome = Outcome(sources / "distill", tmp_path / "a.gguf", "--to", "q8_0")
    assert outcome.code == 130 and outcome.sentence == "happyhorse: interrupted; no file was written"
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_checking_tells_that_the_file_is_whole(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "_velocity", interrupt)
    target = tmp_path / "a.gguf"
    outcome = Outcome(sources / "distill", target, "--to", "q8_0", "--check")
    words = f"{target} is written and whole, only its check was not finished"
    assert outcome.code == 130 and outcome.sentence == f"happyhorse: interrupted; {words}"
    load(open_checkpoint(target), torch.bfloat16)


def _convert_until(
    layer: str, source: Path, target: Path, begun: "multiprocessing.synchronize.Event"
) -> None:
    write = StreamWriter.write

    def stop(writer: StreamWriter, name: str, tensor: Tensor) -> None:
        if layer in name:
            begun.set()
            multiprocessing.Event().wait()
        write(writer, name, tensor)

    StreamWriter.write = stop
    convert(open_checkpoint(source), target, "q8_0", "happyhorse test")


def test_a_run_killed_half_way_leaves_no_file_and_the_next_one_succeeds(
    sources: Path, tmp_path: Path
) -> None:
    context, target = multiprocessing.get_context("spawn"), tmp_path / "a.gguf"
    begun = context.Event()
    process = context.Process(target=_convert_until, args=("layers.3.", sources / "distill", target, begun))
    process.start()
    assert begun.wait(60)
    process.kill()
    process.join()
    assert not target.exists() and len(list(tmp_path.iterdir())) == 1
    assert Outcome(sources / "distill", target, "--to", "q8_0").code == 0
    assert list(tmp_path.iterdir()) == [target]
    load(open_checkpoint(target), torch.bfloat16)
