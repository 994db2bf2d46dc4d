"""Which files are offered, found and missed in the host's folders of models."""

import time
from pathlib import Path

import folder_paths
import pytest

from happyhorse import pony
from happyhorse.nodes import files

FOLDERS = ("diffusion_models", "text_encoders", "vae", "checkpoints", "audio_encoders")
PONIES = {"transformer": 4, "text_encoder": 1, "video_vae": 2, "audio_vae": 1}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of models that the host looks into."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for kind in FOLDERS:
        (tmp_path / kind).mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def real(part: str) -> list[str]:
    """What is offered behind the ponies."""
    return files.choices(part)[PONIES[part] :]


@pytest.mark.parametrize("part", files.PARTS)
def test_without_any_file_there_is_the_pony(models: Path, part: str) -> None:  # noqa: ARG001
    offered = files.choices(part)
    assert len(offered) == PONIES[part] and all(name.startswith("pony") for name in offered)


def test_the_first_pony_of_the_transformers_is_distill(models: Path) -> None:  # noqa: ARG001
    assert files.choices("transformer")[:2] == ["pony: distill", "pony: base"]


def test_a_folder_of_shards_is_one_choice(models: Path) -> None:
    shards = [f"diffusion_models/distill/model-{i:05}-of-00013.safetensors" for i in (1, 2, 13)]
    put(models, *shards, "diffusion_models/distill/model.safetensors.index.json")
    put(models, "diffusion_models/distill-merger_bf16.safetensors", "diffusion_models/sub/other.safetensors")
    assert real("transformer") == ["distill", "distill-merger_bf16.safetensors", "sub/other.safetensors"]


def test_shards_without_their_index_are_not_offered(models: Path) -> None:
    put(models, "diffusion_models/base/model-00001-of-00002.safetensors")
    assert real("transformer") == []


def test_the_published_repository_cloned_into_diffusion_models_is_found(models: Path) -> None:
    clone = models / "diffusion_models" / "daVinci-MagiHuman"
    for variant in ("base", "1080p_sr"):
        put(clone / variant, "model-00001-of-00002.safetensors", "model.safetensors.index.json")
    put(clone / "turbo_vae", "TurboV3-Wan22-TinyShallow_7_7.json", "checkpoint-340000.ckpt")
    assert real("transformer") == ["daVinci-MagiHuman/1080p_sr", "daVinci-MagiHuman/base"]
    assert real("video_vae") == ["daVinci-MagiHuman/turbo_vae"]
    assert files.resolve("video_vae", "daVinci-MagiHuman/turbo_vae") == clone / "turbo_vae"


def test_the_names_of_the_older_packs_are_found(models: Path) -> None:
    put(models, "diffusion_models/540p_sr_merge_bf16.safetensors", "diffusion_models/fp8.safetensors")
    put(models, "vae/sd_audio.safetensors", "vae/Wan2.2_VAE.pth")
    for folder in ("distill", "distill_fp8"):
        put(models / "daVinci-MagiHuman" / folder, "model-00001-of-00002.safetensors")
        put(models / "daVinci-MagiHuman" / folder, "model.safetensors.index.json")
    put(models, "daVinci-MagiHuman/turbo_vae/TurboV3-Wan22-TinyShallow_7_7.json")
    put(models, "daVinci-MagiHuman/turbo_vae/checkpoint-340000.ckpt")
    put(models, "t5gemma-9b-9b-ul2/model-00001-of-00009.safetensors")
    put(models, "t5gemma-9b-9b-ul2/model.safetensors.index.json", "t5gemma-9b-9b-ul2/tokenizer.json")
    put(models, "stable-audio-open-1.0/model.safetensors", "stable-audio-open-1.0/model_config.json")
    assert real("transformer") == [
        "540p_sr_merge_bf16.safetensors", "daVinci-MagiHuman/distill", "daVinci-MagiHuman/distill_fp8",
        "fp8.safetensors",
    ]  # fmt: skip
    assert real("text_encoder") == ["t5gemma-9b-9b-ul2"]
    assert real("video_vae") == ["daVinci-MagiHuman/turbo_vae", "Wan2.2_VAE.pth"]
    assert real("audio_vae") == ["sd_audio.safetensors", "stable-audio-open-1.0"]
    for part in files.PARTS:
        for choice in real(part):
            assert files.resolve(part, choice).exists() and files.problem(part, choice) is None


def test_a_folder_with_a_second_checkpoint_offers_its_files(models: Path) -> None:
    put(models, "vae/stable-audio-open-1.0/model.safetensors", "vae/stable-audio-open-1.0/model.ckpt")
    assert real("audio_vae") == [
        "stable-audio-open-1.0/model.ckpt",
        "stable-audio-open-1.0/model.safetensors",
    ]


def test_other_files_and_other_models_folders_stay_out(models: Path) -> None:
    put(models, "vae/readme.txt", "vae/x.gguf", "vae/x.pkl", "checkpoints/sdxl.safetensors")
    put(models, "checkpoints/stable-audio-open-1.0.safetensors")
    assert real("audio_vae") == ["stable-audio-open-1.0.safetensors"]
    assert real("video_vae") == []


def test_gguf_files_of_transformers_and_text_encoders_are_offered(models: Path) -> None:
    put(models, "diffusion_models/gguf/distill-Q4_0.gguf", "text_encoders/t5gemma-9b-9b-ul2-Q6_K.gguf")
    assert real("transformer") == ["gguf/distill-Q4_0.gguf"]
    assert real("text_encoder") == ["t5gemma-9b-9b-ul2-Q6_K.gguf"]


def test_both_slashes_resolve(models: Path) -> None:
    put(models, "diffusion_models/sub/distill.safetensors")
    file = models / "diffusion_models" / "sub" / "distill.safetensors"
    assert files.resolve("transformer", "sub/distill.safetensors") == file
    assert files.resolve("transformer", "sub\\distill.safetensors") == file


@pytest.mark.parametrize(
    "choice", ["../secret.safetensors", "/etc/passwd", "C:\\x.safetensors", "C:x", ".", "a\0b", "n" * 5000]
)
def test_only_what_lies_in_the_folders_is_resolved(models: Path, choice: str) -> None:
    put(models, "secret.safetensors")
    with pytest.raises(FileNotFoundError, match="transformer"):
        files.resolve("transformer", choice)


@pytest.mark.parametrize("choice", ["", "  ", None, 3, ["1", 0]])
def test_what_is_no_name_is_a_problem(models: Path, choice: object) -> None:  # noqa: ARG001
    assert "must be the name of a file or folder" in files.problem("audio_vae", choice)


@pytest.mark.parametrize(
    "part, choice, folder, source",
    [
        ("transformer", "distill.safetensors", "diffusion_models", "GAIR/daVinci-MagiHuman, folder distill"),
        ("transformer", "540p_sr_merge.safetensors", "diffusion_models", "folder 540p_sr"),
        ("transformer", "mine.safetensors", "diffusion_models", "folder distill or "),
        ("text_encoder", "t5gemma-9b-9b-ul2", "text_encoders", "google/t5gemma-9b-9b-ul2"),
        ("video_vae", "Wan2.2_VAE.pth", "vae", "Wan-AI/Wan2.2-TI2V-5B, file Wan2.2_VAE.pth"),
        ("video_vae", "turbo_vae", "vae", "GAIR/daVinci-MagiHuman, folder turbo_vae"),
        ("audio_vae", "sd_audio.safetensors", "vae", "stabilityai/stable-audio-open-1.0"),
    ],
)
def test_a_missing_file_is_named_with_its_folder_and_source(
    models: Path, part: str, choice: str, folder: str, source: str
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.resolve(part, choice)
    message = str(caught.value)
    assert repr(choice) in message and str(models / folder) in message and source in message
    assert files.problem(part, choice) == message


def test_a_file_in_another_folder_is_pointed_at(models: Path) -> None:
    put(models, "diffusion_models/here/distill.safetensors")
    assert "'here/distill.safetensors' was" in files.problem("transformer", "there/distill.safetensors")


def test_an_unknown_pony_is_told_the_known_ones(models: Path) -> None:  # noqa: ARG001
    with pytest.raises(FileNotFoundError, match="pony: distill, pony: base"):
        files.resolve("transformer", "pony: turbo")


def test_every_pony_is_written_where_the_command_line_keeps_it(
    models: Path,  # noqa: ARG001
    pony_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "happyhorse" / f"pony-{pony.version()}"
    home.parent.mkdir(parents=True)
    home.symlink_to(pony_folder)
    assert files.resolve("transformer", "pony") == home / "distill"
    assert files.resolve("transformer", "pony: 1080p_sr") == home / "1080p_sr"
    assert files.resolve("text_encoder", "pony") == home / "text_encoder"
    assert files.resolve("video_vae", "pony") == home / "wan22_vae.safetensors"
    assert files.resolve("video_vae", "pony: turbo") == home / "turbo_vae"
    assert files.resolve("audio_vae", "pony") == home / "audio_vae"


def test_a_replaced_file_has_another_fingerprint(models: Path) -> None:
    file = models / "vae" / "Wan2.2_VAE.pth"
    assert files.fingerprint("video_vae", file.name) == "missing"
    file.write_bytes(b"one")
    before = files.fingerprint("video_vae", file.name)
    assert files.fingerprint("video_vae", file.name) == before
    file.write_bytes(b"three")
    assert files.fingerprint("video_vae", file.name) != before


def test_a_replaced_shard_changes_the_fingerprint_of_its_folder(models: Path) -> None:
    folder = models / "diffusion_models" / "base"
    put(folder, "model-00001-of-00001.safetensors", "model.safetensors.index.json")
    before = files.fingerprint("transformer", "base")
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"new")
    assert files.fingerprint("transformer", "base") != before


def test_a_list_that_cannot_be_made_is_the_pony(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str) -> list[str]:
        raise PermissionError(kind)

    monkeypatch.setattr(folder_paths, "get_filename_list", broken)
    assert files.choices("audio_vae") == ["pony"]


def test_a_thousand_files_are_listed_in_a_blink(models: Path) -> None:
    put(models, *(f"diffusion_models/folder{i % 100}/model{i}.safetensors" for i in range(1000)))
    assert len(real("transformer")) == 1000  # fills the host's cache
    start = time.perf_counter()
    files.choices("transformer")
    assert time.perf_counter() - start < 0.1
