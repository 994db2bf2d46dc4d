"""GGUF: blocks against the gguf package's own, files as that package writes them, names, and damage."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from safetensors.torch import load_file

from happyhorse.model.gguf_blocks import BLOCKS, SLICE_VALUES, dequantize_blocks
from happyhorse.model.gguf_file import TYPES, GgufFile
from happyhorse.model.key_maps import KEY_MAPS, added, recognise
from happyhorse.model.quant import QuantizedWeight

WRITABLE = ("Q8_0", "Q5_0", "Q4_0")  # those that the gguf package can also quantise to
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where blocks hold float16, if not only in front


def random_blocks(kind: str, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Blocks of random bytes [count, bytes], but with scales as weights have them."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count, BLOCKS[kind].num_bytes), dtype=np.uint8)
    for start in SCALES.get(kind, (0,)):
        scales = generator.standard_normal((count, 1)).astype(np.float16) * np.float16(0.01)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks


def reference(blocks: NDArray[np.uint8], kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks, GGMLQuantizationType[kind]))


def bits(values: torch.Tensor) -> torch.Tensor:
    """To compare -0.0 with 0.0 and NaN with NaN."""
    return values.view(torch.int32)


def write(path: Path, arrays: Mapping[str, tuple[NDArray, str]], **strings: str) -> Path:
    """A file as the gguf package writes it: (data, type) by name, and this program's metadata."""
    writer = gguf.GGUFWriter(path, "happyhorse")
    for key, value in strings.items():
        writer.add_string(f"happyhorse.{key}", value)
    for name, (data, kind) in arrays.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    return finish(writer)


def finish(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


# Blocks


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_random_bytes_hold_the_values_of_the_gguf_package_to_the_bit(kind: str) -> None:
    blocks = random_blocks(kind, 600)
    want = reference(blocks, kind)
    assert bits(dequantize_blocks(torch.from_numpy(blocks), kind, torch.float32)).equal(bits(want))
    rows = torch.from_numpy(blocks).reshape(20, 3, -1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = dequantize_blocks(rows, kind, dtype)
        assert got.dtype == dtype and got.equal(want.to(dtype).reshape(20, 3, -1))
    flat = dequantize_blocks(torch.from_numpy(blocks).flatten(), kind, torch.float32)
    assert flat.equal(want.flatten())


@pytest.mark.parametrize("kind", WRITABLE)
def test_what_the_gguf_package_quantises_comes_back_as_it_dequantises_it(kind: str) -> None:
    weight = np.random.default_rng(1).standard_normal((48, 96)).astype(np.float32)
    stored = gguf.quants.quantize(weight, GGMLQuantizationType[kind])
    got = dequantize_blocks(torch.from_numpy(stored), kind, torch.float32)
    assert bits(got).equal(bits(reference(stored, kind)))
    error = float((got - torch.from_numpy(weight)).norm() / torch.from_numpy(weight).norm())
    assert error < {"Q8_0": 0.01, "Q5_0": 0.07, "Q4_0": 0.13}[kind]


@pytest.mark.parametrize("kind", BLOCKS)
def test_sizes_of_blocks_are_those_of_the_gguf_package(kind: str) -> None:
    assert (BLOCKS[kind].values, BLOCKS[kind].num_bytes) == gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert {GGMLQuantizationType[name].value: name for name in TYPES.values()} == TYPES


def test_a_weight_of_several_slices_is_the_same_as_its_parts() -> None:
    block = BLOCKS["Q4_0"]
    data = torch.from_numpy(random_blocks("Q4_0", SLICE_VALUES // block.values + 5))
    whole = dequantize_blocks(data, "Q4_0", torch.bfloat16)
    for rows in (slice(0, 7), slice(-9, None)):
        assert whole[rows].equal(dequantize_blocks(data[rows], "Q4_0", torch.bfloat16))


@pytest.mark.parametrize("data", [torch.zeros(3, 19, dtype=torch.uint8), torch.zeros(3, 18)], ids=str)
def test_data_that_is_no_whole_blocks_is_refused(data: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Q4_0 data must be uint8 with a multiple of 18 bytes in its last"):
        dequantize_blocks(data, "Q4_0", torch.float32)


# Files


def test_a_file_of_every_type_is_read(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    dense = generator.standard_normal((6, 32)).astype(np.float32)
    brain = torch.from_numpy(dense).bfloat16()
    blocks = {kind: random_blocks(kind, 12).reshape(4, -1) for kind in BLOCKS}
    file = GgufFile(
        write(
            tmp_path / "all.gguf",
            {
                "f32": (dense, "F32"),
                "f16": (dense.astype(np.float16), "F16"),
                "bf16": (brain.view(torch.uint8).numpy(), "BF16"),
                "vector": (dense[0], "F32"),
                **{kind: (data, kind) for kind, data in blocks.items()},
            },
            config='{"a": 1}',
            variant="distill",
        )
    )
    assert file.path == tmp_path / "all.gguf" and not file.absent
    assert file.metadata == {
        "general.architecture": "happyhorse", "config": '{"a": 1}', "variant": "distill"
    }  # fmt: skip
    assert file.read("f32").equal(torch.from_numpy(dense)) and file.read("vector").shape == (32,)
    assert file.read("f16").equal(torch.from_numpy(dense).half())
    assert file.read("bf16").dtype == torch.bfloat16 and file.read("bf16").equal(brain)
    for kind, data in blocks.items():
        shape, weight = (4, 3 * BLOCKS[kind].values), file.read(kind)
        assert (file.tensors[kind].shape, file.tensors[kind].dtype) == (shape, kind)
        assert isinstance(weight, QuantizedWeight) and weight.format == kind and weight.shape == shape
        assert weight.data.equal(torch.from_numpy(data)) and weight.scale is None
        assert bits(weight.dequantize(torch.float32)).equal(bits(reference(data, kind)))


def test_shapes_types_and_values_are_those_of_the_gguf_packages_own_reader(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.gguf",
        {"a.weight": (random_blocks("Q6_K", 6).reshape(3, -1), "Q6_K"),
         "b": (np.arange(24, dtype=np.float32).reshape(2, 3, 4), "F32")},
    )  # fmt: skip
    file, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert list(file.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info, read = file.tensors[tensor.name], file.read(tensor.name)
        assert info.shape == tuple(map(int, reversed(tensor.shape)))
        assert info.dtype == tensor.tensor_type.name
        assert torch.equal(getattr(read, "data", read), torch.from_numpy(tensor.data.copy()))


@pytest.mark.parametrize(("kind", "shape"), [("Q4_K", (64, 36)), ("Q8_0", (8, 6, 16)), ("Q8_0", (4, 96))])
def test_a_tensor_stored_flat_has_the_shape_recorded_for_it(
    tmp_path: Path, kind: str, shape: tuple[int, ...]
) -> None:
    block, count = BLOCKS[kind], int(np.prod(shape))
    width = 256 if count % 256 == 0 else block.values
    data = random_blocks(kind, count // block.values).reshape(count // width, -1)
    writer = gguf.GGUFWriter(tmp_path / "flat.gguf", "happyhorse")
    writer.add_array("comfy.gguf.orig_shape.w", list(shape))
    writer.add_tensor("w", data, raw_dtype=GGMLQuantizationType[kind])
    file = GgufFile(finish(writer))
    weight = file.read("w")
    assert file.tensors["w"].shape == weight.shape == shape
    assert weight.data.ndim == (1 if shape[-1] % block.values else 2)  # whole rows stay rows
    want = reference(data, kind).reshape(shape)
    assert bits(weight.dequantize(torch.float32)).equal(bits(want))
    if weight.data.ndim == 2:
        assert weight.rows(torch.tensor([2, 0]), torch.float32).equal(want[[2, 0]])


def test_a_tensor_may_be_written_to_and_the_file_stays_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"a": (np.ones((2, 4), np.float32), "F32")})
    before = path.read_bytes()
    tensor = GgufFile(path).read("a")
    tensor.add_(1)
    assert path.read_bytes() == before and GgufFile(path).read("a").eq(1).all()


def test_values_that_are_not_used_are_passed_over(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "t5")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bé", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0])
    writer.add_bool("t5.flag", True)
    writer.add_float64("t5.epsilon", 1e-6)
    writer.add_string("tokenizer.ggml.model", "t5")
    writer.add_name("an encoder")
    writer.add_string("config", "of another program")
    writer.add_tensor("a", np.ones(2, np.float32))
    file = GgufFile(finish(writer))
    assert file.metadata == {"general.architecture": "t5", "general.name": "an encoder"}
    assert file.read("a").tolist() == [1, 1]


# Damage


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write(
        tmp_path / "model.gguf",
        {
            "a.weight": (random_blocks("Q8_0", 16).reshape(8, -1), "Q8_0"),
            "b": (np.ones(40, np.float32), "F32"),
        },
        note="x" * 60,
    )


def refused(path: Path, *parts: str) -> None:
    """Opening it fails with one sentence that names the file and holds all the parts."""
    with pytest.raises(ValueError) as caught:
        GgufFile(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and ";" in text
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("content", [b"", b"GG", b"not a GGUF at all", b"PK\3\4" + bytes(60)])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    refused(path, "is not a GGUF file")


def test_another_version_and_another_byte_order_are_refused(sound: Path) -> None:
    content = sound.read_bytes()
    for version in (struct.pack("<I", 1), struct.pack("<I", 4), struct.pack(">I", 3)):
        sound.write_bytes(content[:4] + version + content[8:])
        refused(sound, f"of version {int.from_bytes(version, 'little')} ", "versions 2 and 3 are read")


def test_a_header_that_ends_early_is_refused_wherever_it_ends(sound: Path) -> None:
    content = sound.read_bytes()
    end = content.rindex(b"b" + struct.pack("<IQ", 1, 40)) + 1 + 4 + 8 + 4 + 8
    for length in range(4, end):
        sound.write_bytes(content[:length])
        refused(sound, "ends in the middle of its header", f"({length:,} bytes)")


def test_data_that_ends_early_is_refused_with_the_tensors_name(sound: Path) -> None:
    content = sound.read_bytes()
    size = len(content) - (-160 % 32)
    for missing, name in ((1, "b"), (160 + 32, "a.weight")):
        sound.write_bytes(content[: size - missing])
        refused(sound, f"ends in the middle of {name}", f"{size - missing:,} of at least")


def test_a_type_that_is_not_read_is_refused_with_what_is(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"blk.w": (np.zeros((2, 84), np.uint8), "Q2_K")})
    refused(path, "blk.w is stored as Q2_K", *TYPES.values())
    content = path.read_bytes()
    place = content.index(b"blk.w") + 5 + 4 + 16
    path.write_bytes(content[:place] + struct.pack("<I", 250) + content[place + 4 :])
    refused(path, "blk.w is stored as the unknown type 250")


Change = Callable[[bytes], bytes]


def put(before: bytes, at: int, value: bytes) -> Change:
    """Change the bytes `at` behind the last place that holds `before`."""

    def change(content: bytes) -> bytes:
        start = content.rindex(before) + len(before) + at
        return content[:start] + value + content[start + len(value) :]

    return change


FIRST, LAST, NOTE = b"a.weight", struct.pack("<Q", 1) + b"b", b"happyhorse.note"
# behind a tensor's name stand the number of dimensions, these, type and offset: a.weight has two, b has one;
# behind that of a value its kind, for a string its length, for an array the kind and number of its items
DAMAGE: dict[str, tuple[Change, str]] = {
    "larger than its place": (put(FIRST, 12, struct.pack("<Q", 9)), "a.weight, Q8_0 [9, 64], reaches into b"),
    "rows that are no blocks": (put(FIRST, 4, struct.pack("<Q", 48)), "a.weight has the shape [8, 48], but"),
    "no values": (put(LAST, 4, bytes(8)), "b has the shape [0], but F32 needs at least one"),
    "too many dimensions": (put(FIRST, 0, struct.pack("<I", 99)), "holds a tensor of 99 dimensions"),
    "enormous": (put(LAST, 4, struct.pack("<Q", 1 << 62)), "ends in the middle of b"),
    "off its place": (put(LAST, 16, struct.pack("<Q", 7)), "a place for b that is no multiple of 32"),
    "not UTF-8": (put(b"a.weigh", 0, b"\xff"), "a string that is not UTF-8"),
    "unknown value": (put(NOTE, 0, struct.pack("<I", 77)), "a value of the unknown kind 77"),
    "nested arrays": (put(NOTE, 0, struct.pack("<IIQ", 9, 9, 1)), "a value of the unknown kind 9"),
    "endless strings": (put(NOTE, 0, struct.pack("<IIQ", 9, 8, 1 << 60)), "in the middle of its header"),
    "endless numbers": (put(NOTE, 0, struct.pack("<IIQ", 9, 5, 1 << 60)), "in the middle of its header"),
    "endless string": (put(NOTE, 4, struct.pack("<Q", 1 << 62)), "in the middle of its header"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_header_that_contradicts_itself_is_refused(sound: Path, case: str) -> None:
    change, said = DAMAGE[case]
    sound.write_bytes(change(sound.read_bytes()))
    refused(sound, said, "download it again")


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    one = np.ones(8, np.float32)
    path = write(tmp_path / "x.gguf", {"first": (one, "F32"), "other": (one, "F32")})
    path.write_bytes(path.read_bytes().replace(b"other", b"first"))
    refused(path, "is damaged", "the tensor first twice")


@pytest.mark.parametrize("alignment", [0, 12, 1])
def test_an_impossible_alignment_is_refused(tmp_path: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "happyhorse")
    writer.add_uint32("general.alignment", alignment)
    writer.add_tensor("a", np.ones(8, np.float32))
    refused(finish(writer), f"the alignment {alignment}")


@pytest.mark.parametrize("shape", [[5, 5], [0, 7], [-8, -16]])
def test_a_recorded_shape_of_another_size_is_refused(tmp_path: Path, shape: list[int]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "happyhorse")
    writer.add_array("comfy.gguf.orig_shape.w", shape)
    writer.add_tensor("w", random_blocks("Q8_0", 4).reshape(4, -1), raw_dtype=GGMLQuantizationType.Q8_0)
    refused(finish(writer), "w holds 128 values, but the shape recorded for it is", str(shape)[1:-1])


# Names

# our names -> those that llama.cpp gives the encoder of a T5Gemma, of which T5 and Gemma 2 are the two halves
LAYER = {
    "pre_self_attn_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_o",
    "post_self_attn_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "enc.output_norm.weight"}


def llama_cpp_name(own: str) -> str:
    if own in TOP:
        return TOP[own]
    _, number, rest = own.split(".", 2)
    return f"enc.blk.{number}.{LAYER[rest.removesuffix('.weight')]}.weight"


def as_gemma_2(name: str) -> str:
    return name.removeprefix("enc.").replace("attn_o.", "attn_output.")


def as_other_spelling(name: str) -> str:
    return name.replace("post_attention_norm", "attn_post_norm").replace("post_ffw_norm", "ffn_post_norm")


@pytest.fixture(scope="module")
def encoder(pony_folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the pony's text encoder under our own names."""
    state = load_file(pony_folder / "text_encoder/model.safetensors")
    return {own: state[name] for own, name in KEY_MAPS["text_encoder"].own_names(state).items()}


@pytest.mark.parametrize("spelling", [str, as_gemma_2, as_other_spelling])
def test_llama_cpp_names_are_told_and_their_norms_too(
    encoder: dict[str, torch.Tensor], spelling: Callable[[str], str]
) -> None:
    names = {own: spelling(llama_cpp_name(own)) for own in encoder}
    listed = [*names.values(), "dec.blk.0.attn_q.weight", "output.weight"]
    assert recognise(listed) == "text_encoder"
    assert KEY_MAPS["text_encoder"].own_names(listed) == names
    assert {own for own, name in names.items() if added(name)} == {own for own in encoder if "norm" in own}


@pytest.mark.parametrize("prefix", ["", "model.encoder.", "encoder.", "model."])
def test_nothing_was_added_to_the_norms_of_published_names(
    encoder: dict[str, torch.Tensor], prefix: str
) -> None:
    names = {own: prefix + own for own in encoder}
    assert (
        KEY_MAPS["text_encoder"].own_names([*names.values(), "model.decoder.norm.weight"]).items()
        >= names.items()
    )
    assert not any(map(added, names.values()))


def test_tensors_of_other_models_in_llama_cpps_names_are_not_passed_over() -> None:
    listed = ["enc.blk.0.attn_norm.weight", "enc.blk.0.attn_rel_b.weight"]
    assert list(KEY_MAPS["text_encoder"].own_names(listed)) == [
        "layers.0.pre_self_attn_layernorm.weight", "layers.0.attn_rel_b.weight"
    ]  # fmt: skip
