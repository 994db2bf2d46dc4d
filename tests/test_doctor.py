"""`happyhorse doctor`: plans with and without files, for given memory, and into a pipe that closes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from happyhorse import cli
from happyhorse.doctor import PublishedPart
from happyhorse.model.checkpoint import open_checkpoint
from happyhorse.model.config import MAGIHUMAN, PONY

Lines = list[str]


def doctor(capsys: pytest.CaptureFixture[str], folder: Path, *options: str, code: int = 0) -> Lines:
    assert cli.main(["doctor", "--models", str(folder), *options]) == code
    return capsys.readouterr().out.splitlines()


def stages(lines: Lines) -> dict[str, tuple[str, float, float, str]]:
    """Of each stage the placement, both memories and whether it fits."""
    head = next(i for i, line in enumerate(lines) if line.startswith("stage"))
    end = next(i for i, line in enumerate(lines) if line.startswith(("fits", "does not fit")))
    rows = (re.split(r"  +", line) for line in lines[head + 1 : end])
    return {
        name: (place, *(float(n) if n != "-" else 0 for n in both), fits) for name, place, *both, fits in rows
    }


def test_a_film_is_planned_without_any_files_for_the_memory_that_is_given(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = doctor(capsys, tmp_path, "--size", "1080p", "--seconds", "5", "--vram", "12", "--ram", "32")
    assert "device cuda: 11.3 GB to use; RAM: 30.1 GB" in lines[2]
    assert any(line.startswith("1920x1088 from 448x256, 5 s") and "computed" in line for line in lines)
    plan = stages(lines)
    assert list(plan) == ["text encoder", "image", "base", "super-resolution", "picture", "sound"]
    assert all(vram <= 11.28 and ram <= 30.08 and fits == "yes" for _, vram, ram, fits in plan.values())
    assert "layers on the device" in plan["base"][0] and plan["base"][2] > 10
    assert "pieces of" in plan["super-resolution"][0] and "tiles" in plan["picture"][0]
    assert lines[-1] == "fits: --offload auto does this"


def test_more_memory_needs_no_pieces_and_less_does_not_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--size", "1080p", "--ram", "64")
    plenty = stages(doctor(capsys, tmp_path, *options, "--vram", "48"))
    assert {place for place, *_ in plenty.values()} == {"on the device"}
    assert plenty["super-resolution"][1] > plenty["base"][1] > 30
    lines = doctor(capsys, tmp_path, *options, "--vram", "6", code=1)
    assert stages(lines)["super-resolution"][3] == "NO, too little VRAM"
    assert lines[-2:] == [
        "does not fit; what would: --size 540p or --size 256p",
        "in generate: --sr 540p for 540p, no --sr for 256p",
    ]
    lines = doctor(capsys, tmp_path, "--size", "256p", "--ram", "8", "--vram", "12", code=1)
    assert stages(lines)["base"][3] == "NO, too little RAM"
    assert lines[-2:] == [
        "does not fit; what would: files in q5_0",
        "files in q5_0: happyhorse convert SOURCE OUT --to q5_0, for each transformer and the text encoder",
    ]
    lines = doctor(capsys, tmp_path, "--size", "256p", "--ram", "1", "--vram", "1", code=1)
    assert lines[-1] == "does not fit, nor does anything smaller"


def test_what_would_fit_keeps_the_length_and_the_placement_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--size", "1080p", "--seconds", "4", "--ram", "64", "--vram", "6", "--offload", "blocks")
    lines = doctor(capsys, tmp_path, *options, code=1)
    (cures,) = (line.partition("; what would: ")[2].split(" or ") for line in lines if "what would" in line)
    assert cures == [f"--size {size} --seconds 4 --offload blocks" for size in ("540p", "256p")]
    for cure in cures:
        assert doctor(capsys, tmp_path, "--ram", "64", "--vram", "6", *cure.split())[-1].startswith("fits")
    lines = doctor(
        capsys, tmp_path, "--size", "256p", "--vram", "16", "--ram", "40", "--offload", "none", code=1
    )
    assert any("what would: --offload auto" in line for line in lines)


def test_what_was_not_found_is_one_line_before_a_plan_and_a_list_without_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = doctor(capsys, tmp_path, "--size", "256p", "--vram", "99", "--ram", "99")
    assert lines[3:5] == [f"no files in {tmp_path}: published sizes are taken", ""]
    for options in ((), ("--size", "256p", "--model", str(tmp_path / "distill"))):
        lines = doctor(capsys, tmp_path, *options, "--vram", "99", "--ram", "99")
        assert any(
            line.startswith(f"audio_vae: none in {tmp_path}; it is published as stabilityai/")
            for line in lines
        )
        assert not any("*" in line for line in lines)


def test_a_file_that_is_given_is_taken_for_the_variant_that_it_is(
    capsys: pytest.CaptureFixture[str], pony_folder: Path
) -> None:
    given = ("--preset", "pony", "--model", str(pony_folder / "base"))
    lines = doctor(capsys, pony_folder, *given, "--sr-model", str(pony_folder / "540p_sr"))
    found = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert found["base"] == str(pony_folder / "base") and found["540p_sr"] == str(pony_folder / "540p_sr")
    for name in ("distill", "1080p_sr"):
        assert found[name].startswith(str(pony_folder / name))
    lines = doctor(capsys, pony_folder, "--preset", "pony", "--model", str(pony_folder / "540p_sr"))
    told = [
        line for line in lines if str(pony_folder / "540p_sr") in line and "is the variant '540p_sr'" in line
    ]
    assert [line.partition(":")[0] for line in told] == ["base", "distill"]


@pytest.mark.parametrize("weights", ["fp8", "q8_0", "q5_0", "q4_0"])
def test_weights_in_fewer_bits_take_less(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, weights: str
) -> None:
    bits = {"fp8": 8, "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5}[weights]
    options = ("--size", "256p", "--vram", "99", "--ram", "99", "--offload", "stage")
    base, few = (
        stages(doctor(capsys, tmp_path, *options, *w))["base"][1] for w in ([], ["--weights", weights])
    )
    linears, worked_out = 30.57 - 0.11, 1.26  # in bfloat16; those of the largest feed-forward worked out
    assert base - few == pytest.approx(linears * (1 - bits / 16) - worked_out, abs=0.15)


@pytest.mark.parametrize(("name", "file"), [("distill", "distill"), ("text_encoder", "text_encoder")])
def test_the_published_sizes_are_those_of_a_file(pony_folder: Path, name: str, file: str) -> None:
    checkpoint, published = open_checkpoint(pony_folder / file), PublishedPart.of(name, PONY, "bf16")
    for own in checkpoint.names:
        assert published.kept_bytes(own, torch.bfloat16) == checkpoint.kept_bytes(own, torch.bfloat16)
    assert set(published.names) == set(checkpoint.names)


def test_the_full_size_transformer_takes_what_is_published() -> None:
    part = PublishedPart.of("distill", MAGIHUMAN, "bf16")
    assert sum(part.kept_bytes(own, torch.bfloat16) for own in part.names) / 1e9 == pytest.approx(
        30.6, abs=0.1
    )


def test_files_are_planned_with_where_there_are_any(
    capsys: pytest.CaptureFixture[str], pony_folder: Path
) -> None:
    options = ("--preset", "pony", "--size", "256x128", "--device", "cpu")
    lines = doctor(capsys, pony_folder, *options)
    assert not any("published sizes" in line for line in lines)
    assert all(vram == 0 and 0 < ram < 1 for _, vram, ram, _ in stages(lines).values())
    assert any("published sizes, transformers" in line
               for line in doctor(capsys, pony_folder, *options, "--weights", "fp8"))  # fmt: skip


def test_all_sizes_are_listed_without_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = doctor(capsys, tmp_path, "--vram", "24")
    sizes = [line.split()[0] for line in lines if re.match(r"\d+x\d+ ", line)]
    assert sizes == 3 * [f"{width}x{height}" for width, height in MAGIHUMAN.sizes.values()]


def test_a_pipe_that_closes_is_no_error(pony_folder: Path) -> None:
    command = [sys.executable, "-m", "happyhorse", "doctor", "--preset", "pony", "--models", str(pony_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--size", "720p", "must be 256p, 540p, 1080p or look like 448x256"),
     ("--vram", "0", "a number of GB above 0, got '0'"),
     ("--ram", "much", "a number of GB above 0, got 'much'")],
)  # fmt: skip
def test_options_that_make_no_sense_are_one_sentence(
    capsys: pytest.CaptureFixture[str], option: str, value: str, words: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["doctor", option, value])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--size", "256p", "--seconds", "0"), "seconds must be"),
     (("--device", "cpu", "--vram", "12"), "--vram: the device 'cpu' works in RAM")],
)  # fmt: skip
def test_what_generate_refuses_is_refused_here_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: Lines, words: str
) -> None:
    assert cli.main(["doctor", "--models", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_what_would_fit_in_another_way_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--size", "1080p", "--vram", "8", "--ram", "32", "--offload", "none")
    lines = doctor(capsys, tmp_path, *options, code=1)
    assert any(line.startswith("does not fit; what would: --offload auto with files in") for line in lines)


@pytest.mark.parametrize("device", [[], ["--device", "cpu"]], ids=["default", "named"])
def test_vram_of_a_cpu_is_refused_for_a_film(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: Lines
) -> None:
    monkeypatch.setattr(cli, "default_device", lambda: torch.device("cpu"))
    film = ["generate", "--prompt", "a", "--out", str(tmp_path / "film.mp4"), "--vram", "8", *device]
    assert cli.main(film) == 2
    error = capsys.readouterr().err
    assert "--vram: the device 'cpu' works in RAM" in error and "--ram" in error
    assert error.count("\n") == 1


def test_pieces_that_were_asked_for_are_not_put_down_to_short_memory(
    capsys: pytest.CaptureFixture[str], pony_folder: Path, tmp_path: Path
) -> None:
    film = ["generate", "--preset", "pony", "--models", str(pony_folder), "--device", "cpu", "--prompt", "a",
            "--size", "128x128", "--seconds", "0.2", "--steps", "1",
            "--out", str(tmp_path / "film.mp4")]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("happyhorse.sampler.plan.PIECES", (64,))
        assert cli.main([*film, "--offload", "pieces"]) == 0
    told = capsys.readouterr().err
    assert "works in pieces: transformer: on the device, pieces of 64 tokens (" in told
    assert "memory is short" not in told
