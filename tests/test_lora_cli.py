"""`happyhorse lora` and `--lora` on the miniature transformer."""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from happyhorse.cli import main
from happyhorse.model.checkpoint import open_checkpoint
from happyhorse.model.config import PONY
from happyhorse.model.lora import Lora, Strengths, patches, transformer_shapes
from happyhorse.model.lora_formats import open_lora
from happyhorse.model.lora_tools import low_rank
from happyhorse.option_values import parse_lora

CONFIG = PONY.transformers["base"]
SHAPES = transformer_shapes(CONFIG)
SHARED, FUSED = "block.layers.2.mlp.down_proj", "block.layers.0.attention.linear_qkv"
WIDTH, INNER = SHAPES[f"{SHARED}.weight"]
SECTIONS = {"to_q": WIDTH, "to_k": 32, "to_v": 32, "to_gate": WIDTH // 32}
RANK, TOLERANCE = 4, 1e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * sum(shape))) * 0.3


def save(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def lora(stem: str, prefix: str = "transformer.", rows: int | None = None) -> dict[str, Tensor]:
    height, width = SHAPES[f"{SHARED if stem == SHARED else FUSED}.weight"]
    return {
        f"{prefix}{stem}.lora_A.weight": random(RANK, width),
        f"{prefix}{stem}.lora_B.weight": random(rows or height, RANK),
    }


def changes(path: Path) -> dict[str, Tensor]:
    """What a file adds to weights of zero."""
    found = {}
    for name, changed in patches([(open_lora(path), Strengths())], CONFIG, SHAPES).items():
        found[name] = torch.zeros(SHAPES[name])
        for patch in changed:
            patch(found[name])
    return found


def same(a: Path, b: Path, tolerance: float = TOLERANCE) -> bool:
    one, two = changes(a), changes(b)
    assert one.keys() == two.keys() and one
    return all((one[name] - two[name]).abs().max() <= tolerance for name in one)


def run(*arguments: str | Path) -> int:
    return main(["lora", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence of a command that fails."""
    try:
        code = run(*arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err.strip()
    assert code == 2 and "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "path", "strengths"),
    [
        ("a.safetensors", "a.safetensors", Strengths()),
        ("a.safetensors:0.8", "a.safetensors", Strengths(0.8)),
        ("dir:x/a.safetensors:-1e-1", "dir:x/a.safetensors", Strengths(-0.1)),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", Strengths()),
        (r"C:\loras\a.safetensors:2:shared=0", r"C:\loras\a.safetensors", Strengths(2, shared=0)),
        ("a:0.5:video=1,audio=0.25, text=-1", "a", Strengths(0.5, 1, 0.25, -1)),
        ("a.safetensors:audio=0", "a.safetensors", Strengths(audio=0)),
        ("a:1:audio=2,blocks=0-3:0.5,4", "a", Strengths(audio=2, blocks="0-3:0.5,4")),
        ("a:1: video=2, blocks = 3", "a", Strengths(video=2, blocks=" 3")),
        ("x=1,y:z/a.safetensors:2", "x=1,y:z/a.safetensors", Strengths(2)),
    ],
)
def test_a_lora_is_given_with_its_strengths(text: str, path: str, strengths: Strengths) -> None:
    assert parse_lora(text) == Lora(Path(path), strengths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.safetensors:x", "a strength must be a number, got 'x'"),
        ("a.safetensors:", "a strength must be a number, got ''"),
        ("a:nan", "the strength of a LoRA must be a finite number, got nan"),
        ("a:1:vdeo=2", "settings are video, audio, text, shared and blocks, each once, got 'vdeo'"),
        ("a:1:foo=2,video=1", "each once, got 'foo'"),
        ("a:0.5,foo=2", "each once, got 'foo'"),
        ("a:0.5,video=0", "a colon must stand before video=, got a comma"),
        ("a.safetensors,blocks=0-3:0.5", "a colon must stand before blocks=, got a comma"),
        ("a:1:video=1:audio=2", "commas must stand between settings, got a colon in 'video=1:audio=2'"),
        ("a:1:blocks=2:0.5,video=2", "blocks= must come last, got video= behind it"),
        ("a:1:blocks=2,foo=2", "each once, got 'foo'"),
        ("a:1:blocks=2,blocks=3", "each once, got 'blocks'"),
        ("a:1:video=1,foo", "each once, got 'foo'"),
        ("a:1:video=2,foo=3", "settings are video, audio, text, shared and blocks, each once, got 'foo'"),
        ("a:1:video=1,video=2", "each once, got 'video'"),
        ("a:1:video=", "a strength must be a number, got ''"),
        ("a:1:blocks=3-1", "blocks must be layers with weights"),
        (":0.5", "the file is missing"),
    ],
)
def test_a_malformed_lora_is_quoted(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        parse_lora(text)
    assert message in str(raised.value) and repr(text) in str(raised.value)


def test_a_malformed_lora_is_one_sentence_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "x", "--lora", "a.safetensors:x"])
    assert capsys.readouterr().err.count("\n") == 1


def test_inspect_tells_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {**lora(SHARED), **lora(FUSED), "lora_te_x.alpha": torch.tensor(1.0)}
    tensors |= {"lora_te_x.lora_up.weight": random(3, 2), "lora_te_x.lora_down.weight": random(2, 3)}
    path = save(tmp_path / "style.safetensors", tensors, title="T" * 500)
    assert run("inspect", path, path, "--preset", "pony") == 0
    said = capsys.readouterr().out
    values = sum(tensor.numel() for tensor in tensors.values())
    kinds = f"style.safetensors: 3 LoRA; rank 2, 4; alpha 1; F32; {values:,} values in 7 tensors"
    assert said.count(kinds) == 2
    assert "pony: 2 of 3 matched: 1 down_proj, 1 linear_qkv" in said
    assert "layers 0, 2; one copy per modality: 1, shared: 1" in said
    assert "not used, 3 keys: lora_te_x" in said
    assert f"  title: {'T' * 100}..." in said


def test_inspect_tells_why_a_file_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", save(tmp_path / "a.safetensors", lora(SHARED))) == 2
    said = capsys.readouterr()
    assert said.out.endswith("in 2 tensors\nmagihuman: does not fit\nno metadata\n")
    assert f"changes a weight of [{WIDTH}, {INNER}], which is [15360, 20480] here" in said.err
    assert said.err.count("\n") == 1


def test_inspect_goes_on_behind_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = tmp_path / "bad.safetensors", save(tmp_path / "good.safetensors", lora(SHARED))
    none = save(tmp_path / "none.safetensors", {"x": random(3)})
    bad.write_bytes(b"no weights")
    assert run("inspect", bad, tmp_path / "missing.safetensors", good, none, "--preset", "pony") == 2
    said = capsys.readouterr()
    assert said.out.startswith("good.safetensors: 1 LoRA") and "pony: 1 of 1 matched" in said.out
    assert said.err.count("\n") == 1
    for words in ("bad.safetensors", "missing.safetensors does not exist", "none.safetensors holds no LoRA"):
        assert words in said.err


def test_generate_tells_how_much_of_a_lora_fits(
    pony_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    style = save(tmp_path / "style.safetensors", lora(SHARED))
    asked = ("--models", pony_folder, "--prompt", "x", "--out", tmp_path / "x.mp4", "--steps", 1)
    small = ("--preset", "pony", "--variant", "distill", "--seconds", 0.2, "--lora", style)
    with caplog.at_level("INFO"):
        assert main(["generate", *map(str, (*asked, *small))]) == 0
    assert caplog.messages.count("style.safetensors: 1 of 1 matched") == 1


def split_qkv(copies: int, alpha: bool) -> dict[str, Tensor]:
    tensors = {}
    for index, (word, size) in enumerate(SECTIONS.items()):
        stem = FUSED.replace("linear_qkv", word)
        tensors |= lora(stem, rows=copies * size)
        if alpha:
            tensors[f"transformer.{stem}.alpha"] = torch.tensor(2.0 + index)
    return tensors


def stem_tensors(kind: str) -> dict[str, Tensor]:
    """A file of each format under names that ComfyUI's own loaders do not know."""
    height, width = SHAPES[f"{SHARED}.weight"]
    name = f"base_model.model.{SHARED}"
    if kind == "peft":
        return lora(SHARED, "base_model.model.")
    if kind == "kohya":
        tensors = lora(SHARED, "model.diffusion_model.")
        return {**tensors, f"model.diffusion_model.{SHARED}.alpha": torch.tensor(8.0)}
    if kind == "loha":
        parts = {"w1_a": (height, RANK), "w1_b": (RANK, width), "w2_a": (height, RANK), "w2_b": (RANK, width)}
        found = {
            f"{name}.hada_{part}": random(*shape, seed=i) for i, (part, shape) in enumerate(parts.items())
        }
        return {**found, f"{name}.alpha": torch.tensor(2.0)}
    if kind == "lokr":
        return {f"{name}.lokr_w1": random(2, 4), f"{name}.lokr_w2": random(height // 2, width // 4)}
    if kind == "dora":
        found = lora(SHARED, "base_model.model.")
        return {**found, f"{name}.lora_magnitude_vector": random(height).abs() + 0.5}
    bias = SHAPES["adapter.video_embedder.bias"]
    return {f"{name}.diff": random(height, width), "adapter.video_embedder.diff_b": random(*bias)}


@pytest.mark.parametrize("kind", ["peft", "kohya", "loha", "lokr", "dora", "difference"])
def test_convert_writes_the_names_of_the_stock_loaders(kind: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", stem_tensors(kind), author="me")
    assert run("convert", source, tmp_path / "out.safetensors", "--preset", "pony") == 0
    assert same(source, tmp_path / "out.safetensors", 1e-7)
    written = load_file(tmp_path / "out.safetensors")
    assert all(key.startswith("diffusion_model.") for key in written)
    if kind == "dora":
        assert written[f"diffusion_model.{SHARED}.dora_scale"].shape == (WIDTH, 1)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"author": "me"}


def test_convert_writes_the_alpha_of_the_header_beside_the_weights(tmp_path: Path) -> None:
    settings = json.dumps({"transformer.lora_alpha": 12})
    source = save(tmp_path / "in.safetensors", lora(SHARED), lora_adapter_metadata=settings)
    assert run("convert", source, tmp_path / "out.safetensors", "--preset", "pony") == 0
    assert same(source, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")[f"diffusion_model.{SHARED}.alpha"] == 12


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
def test_convert_fuses_q_k_v_and_gate(copies: int, alpha: bool, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", split_qkv(copies, alpha))
    assert run("convert", source, tmp_path / "out.safetensors", "--preset", "pony") == 0
    written = load_file(tmp_path / "out.safetensors")
    assert written[f"diffusion_model.{FUSED}.lora_A.weight"].shape == (4 * RANK, WIDTH)
    assert same(source, tmp_path / "out.safetensors")


def test_convert_fuses_products_and_differences(tmp_path: Path) -> None:
    loha, differences = {}, {}
    for index, word in enumerate(("to_q", "to_v")):
        stem, rows = FUSED.replace("linear_qkv", word), SECTIONS[word]
        shapes = {"w1_a": (rows, RANK), "w1_b": (RANK, WIDTH), "w2_a": (rows, RANK), "w2_b": (RANK, WIDTH)}
        for number, (part, shape) in enumerate(shapes.items()):
            loha[f"{stem}.hada_{part}"] = random(*shape, seed=number)
        loha[f"{stem}.alpha"] = torch.tensor(3.0 + index)
        differences[f"{stem}.diff"] = random(3 * rows, WIDTH)
    for number, tensors in enumerate((loha, differences)):
        source, target = (
            save(tmp_path / f"in{number}.safetensors", tensors),
            tmp_path / f"{number}.safetensors",
        )
        assert run("convert", source, target, "--preset", "pony") == 0
        assert same(source, target)


def test_convert_refuses_what_the_stock_loaders_cannot_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = split_qkv(1, False)
    tensors[f"transformer.{FUSED.replace('linear_qkv', 'to_q')}.dora_scale"] = random(WIDTH, 1)
    source = save(tmp_path / "in.safetensors", tensors)
    said = refused(capsys, "convert", source, tmp_path / "out.safetensors", "--preset", "pony")
    assert "cannot become one layer, as DoRA of single sections" in said
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.fixture
def tuned(pony_folder: Path, tmp_path: Path) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    """The base pony with a change of rank 4 in three weights, and these changes."""
    base = open_checkpoint(pony_folder / "base")
    tensors = {own: base.read(own).float() for own in base.names}
    factors = {}
    for stem in (SHARED, FUSED, "adapter.text_embedder"):
        height, width = SHAPES[f"{stem}.weight"]
        factors[stem] = random(height, RANK), random(RANK, width)
        tensors[f"{stem}.weight"] += factors[stem][0] @ factors[stem][1]
    tensors["final_norm_audio.weight"] += 0.5
    return save(tmp_path / "tuned.safetensors", tensors, **base.file.metadata), factors


def test_extract_finds_what_was_added(
    tuned: tuple[Path, dict], pony_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, factors = tuned
    out = tmp_path / "out.safetensors"
    assert run("extract", path, pony_folder / "base", out, "--rank", RANK) == 0
    found = changes(out)
    for stem, (up, down) in factors.items():
        delta = up @ down
        assert (found[f"{stem}.weight"] - delta).norm() <= 0.005 * delta.norm()  # of bfloat16
    torch.testing.assert_close(found["final_norm_audio.weight"], torch.full((WIDTH,), 0.5))
    assert set(found) == {*(f"{stem}.weight" for stem in factors), "final_norm_audio.weight"}
    assert len(load_file(out)) == 2 * len(factors) + 1  # what did not change is not in the file
    with safe_open(out, "pt") as file:
        told = file.metadata()
    assert (told["family"], told["rank"], told["tuned"], told["base"]) == (
        "happyhorse", "4", "tuned.safetensors", "base",
    )  # fmt: skip
    errors = dict(
        line.split(": error of the difference ")
        for line in capsys.readouterr().out.splitlines()
        if ": error" in line
    )
    assert 0 < float(errors["down_proj"].removesuffix(" %")) < 0.5
    assert errors.keys() == {"down_proj", "linear_qkv", "text_embedder", "final_norm_audio"}
    assert errors["final_norm_audio"] == "0 %"
    assert run("inspect", out, "--preset", "pony") == 0
    assert "pony: 4 of 4 matched: " in capsys.readouterr().out


def test_extract_then_merge_is_the_tuned_model(
    tuned: tuple[Path, dict], pony_folder: Path, tmp_path: Path
) -> None:
    out, merged = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    assert run("extract", tuned[0], pony_folder / "base", out, "--rank", 8) == 0
    assert run("merge", pony_folder / "base", out, merged) == 0
    wanted, got = open_checkpoint(tuned[0]), open_checkpoint(merged)
    for name in (f"{SHARED}.weight", f"{FUSED}.weight", "adapter.text_embedder.weight"):
        error = (wanted.read(name).float() - got.read(name).float()).norm() / wanted.read(name).float().norm()
        assert error < 0.01


def test_a_lower_rank_leaves_a_larger_error(
    tuned: tuple[Path, dict], pony_folder: Path, tmp_path: Path
) -> None:
    up, down = tuned[1][SHARED]
    delta, errors = up @ down, []
    for rank in (1, 2, 3):
        out = tmp_path / f"{rank}.safetensors"
        assert run("extract", tuned[0], pony_folder / "base", out, "--rank", rank) == 0
        errors.append(float((changes(out)[f"{SHARED}.weight"] - delta).norm()))
    best = [float(torch.linalg.svdvals(delta)[rank:].norm()) for rank in (1, 2, 3)]
    assert errors == pytest.approx(best, rel=0.01)


def test_large_matrices_are_decomposed_nearly_as_well_and_always_alike() -> None:
    matrix = random(700, 40) @ random(40, 600) + 0.01 * random(700, 600, seed=3)
    state = torch.get_rng_state()
    up, down = low_rank(matrix, 16)
    assert torch.equal(torch.get_rng_state(), state)
    best = float(torch.linalg.svdvals(matrix)[16:].norm())
    assert best <= float((matrix - up @ down).norm()) <= 1.02 * best
    assert all(torch.equal(a, b) for a, b in zip((up, down), low_rank(matrix, 16), strict=True))


def test_merge_adds_the_loras_and_keeps_all_else(pony_folder: Path, tmp_path: Path) -> None:
    one = save(tmp_path / "one.safetensors", lora(SHARED))
    two = save(tmp_path / "two.safetensors", lora(FUSED))
    out = tmp_path / "out.safetensors"
    assert run("merge", pony_folder / "base", f"{one}:0.5", f"{two}:2:audio=0", out) == 0
    before, after = open_checkpoint(pony_folder / "base"), open_checkpoint(out)
    assert (after.variant, after.config) == (before.variant, before.config)
    assert after.file.metadata["note"] == before.file.metadata["note"]
    assert (
        "lora merge into base: one.safetensors:0.5; two.safetensors:2:audio=0"
        in after.file.metadata["recipe"]
    )
    for name in before.names:
        was, now = before.read(name), after.read(name)
        assert now.dtype == was.dtype
        if name == f"{SHARED}.weight":
            down, up = lora(SHARED).values()
            assert torch.equal(now, (was.float() + 0.5 * (up @ down)).to(was.dtype))
        elif name == f"{FUSED}.weight":
            changed = [not torch.equal(a, b) for a, b in zip(was.chunk(3), now.chunk(3), strict=True)]
            assert changed == [True, False, True]
        else:
            assert torch.equal(was, now)


@pytest.fixture
def quantised(pony_folder: Path, tmp_path: Path) -> Path:
    """The base pony with one weight in float8."""
    base = open_checkpoint(pony_folder / "base")
    tensors = {name: base.read(name) for name in base.names}
    tensors[f"{SHARED}.weight"] = tensors[f"{SHARED}.weight"].to(torch.float8_e4m3fn)
    return save(tmp_path / "base_fp8.safetensors", tensors, **base.file.metadata)


def test_extract_refuses_quantised_checkpoints(
    quantised: Path, pony_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = pony_folder / "base", tmp_path / "out.safetensors"
    for pair in ((quantised, dense), (dense, quantised)):
        said = refused(capsys, "extract", *pair, out, "--rank", 4)
        assert f"{quantised} is quantised" in said and "extract from the dense file" in said
    assert [file.name for file in tmp_path.iterdir()] == [quantised.name]


def test_merge_refuses_a_quantised_checkpoint(
    quantised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = quantised
    style = save(tmp_path / "a.safetensors", lora(SHARED))
    said = refused(capsys, "merge", source, style, tmp_path / "out.safetensors")
    assert "is quantised" in said and "merge into the dense file, then" in said
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_is_left_of_a_merge_that_overflows(
    pony_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = open_checkpoint(pony_folder / "base")
    source = save(
        tmp_path / "base.safetensors", {n: base.read(n).half() for n in base.names}, **base.file.metadata
    )
    style = save(tmp_path / "a.safetensors", lora(SHARED))
    said = refused(capsys, "merge", source, f"{style}:1e9", tmp_path / "out.safetensors")
    assert f"a LoRA makes {SHARED}.weight of the base transformer NaN or infinite; lower its strength" in said
    assert {file.name for file in tmp_path.iterdir()} == {"base.safetensors", "a.safetensors"}


def test_input_that_cannot_be_used_is_one_sentence(
    pony_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, style = pony_folder / "base", save(tmp_path / "a.safetensors", lora(SHARED))
    out = tmp_path / "out.safetensors"
    assert "hold the same weights; give two" in refused(capsys, "extract", base, base, out, "--rank", 4)
    assert "must be a whole number from 1 to 4096" in refused(capsys, "extract", base, base, out, "--rank", 0)
    assert "OUT must end in .safetensors" in refused(capsys, "convert", style, tmp_path / "a.txt")
    assert "is the source itself" in refused(capsys, "convert", style, style, "--overwrite")
    assert "exists; give another name, or --overwrite" in refused(
        capsys, "merge", base, style, save(tmp_path / "b.safetensors", lora(FUSED))
    )
    assert "does not exist" in refused(capsys, "inspect", tmp_path / "none.safetensors")
    assert "holds the text encoder" in refused(capsys, "merge", pony_folder / "text_encoder", style, out)
    assert "holds no LoRA" in refused(capsys, "inspect", next(base.glob("*.safetensors")))
    assert not out.exists()


BROKEN = {
    f"lora_A.weight has the shape [0, {INNER}], which holds nothing": {"lora_A.weight": random(0, INNER)},
    "lora_A.weight must be a matrix, got a single number": {"lora_A.weight": torch.tensor(1.0)},
    "alpha must be one number, got the shape [0]": {"alpha": torch.zeros(0)},
    "alpha holds NaN or infinite values": {"alpha": torch.tensor(torch.nan)},
}


@pytest.mark.parametrize("message", BROKEN)
def test_every_command_says_what_is_wrong_with_a_lora(
    message: str, pony_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {f"transformer.{SHARED}.{role}": tensor for role, tensor in BROKEN[message].items()}
    style, out = save(tmp_path / "a.safetensors", {**lora(SHARED), **changed}), tmp_path / "out.safetensors"
    generated = ("--models", pony_folder, "--prompt", "x", "--out", tmp_path / "x.mp4")
    for arguments in (
        ("lora", "inspect", style, "--preset", "pony"),
        ("lora", "convert", style, out, "--preset", "pony"),
        ("lora", "merge", pony_folder / "base", style, out),
        ("generate", "--preset", "pony", "--lora", style, *generated),
    ):
        assert main(list(map(str, arguments))) == 2
        assert message in (said := capsys.readouterr().err.strip()).splitlines()[-1]
        assert str(style) in said and "Traceback" not in said
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_nothing_is_written_into_a_source_folder(
    pony_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, style = shutil.copytree(pony_folder / "base", tmp_path / "base"), tmp_path / "lora"
    style.mkdir()
    save(style / "adapter_model.safetensors", lora(SHARED))
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    own = next(base.glob("*.safetensors"))
    for out in (own, base / "new.safetensors"):
        for arguments in (
            ("merge", base, style, out),
            ("extract", base, pony_folder / "base", out, "--rank", 4),
            ("extract", pony_folder / "base", base, out, "--rank", 4),
        ):
            said = refused(capsys, *arguments, "--overwrite")
            assert f"{out} lies in the source folder {base}" in said and "choose another folder" in said
    said = refused(capsys, "convert", style, style / "new.safetensors", "--preset", "pony")
    assert "lies in the source folder" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_a_target_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    style, out = save(tmp_path / "a.safetensors", lora(SHARED)), tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    assert run("convert", style, out, "--preset", "pony", "--overwrite") == 0
    assert same(style, out)
