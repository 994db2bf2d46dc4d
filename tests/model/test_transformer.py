import pytest
import torch
from golden_files import GoldenFile, full_size, golden_files, relative_error, weights

from happyhorse.model.config import MAGIHUMAN, VARIANTS, TransformerConfig
from happyhorse.model.packing import Latents, PackedLayout, patchify
from happyhorse.model.rope import rope_table
from happyhorse.model.transformer import JointTransformer


def load(
    config: TransformerConfig, state: dict[str, torch.Tensor], compute_dtype: torch.dtype
) -> JointTransformer:
    with torch.device("meta"):
        network = JointTransformer(config, compute_dtype=compute_dtype)
    network.load_state_dict(state, strict=True, assign=True)
    return network.requires_grad_(False)


class Golden:
    """One recorded forward pass with what is needed to repeat it."""

    def __init__(self, file: GoldenFile) -> None:
        meta, self.tensors = file.config, file.tensors()
        names = ("coords_style", "frame_receptive_field")
        self.config = TransformerConfig.from_dict(meta["arch"] | {name: meta[name] for name in names})
        self.drift = meta["ref_vs_fp32_rel_l2"]
        self.latents = Latents(self.tensors["in.video_latent"], self.tensors["in.audio_latent"])
        self.text = self.tensors["in.text_embed"][:, : meta["text_len"]]
        self.layout = PackedLayout.of(self.latents, self.text, self.config.coords_style)

    def network(self, compute_dtype: torch.dtype) -> JointTransformer:
        return load(self.config, weights(self.tensors), compute_dtype)


@pytest.fixture(scope="module", params=golden_files("dit"), ids=str)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_golden_packing_and_rope(golden: Golden) -> None:
    tensors, layout = golden.tensors, golden.layout
    rows = [patchify(golden.latents.video)[0], golden.latents.audio[0], golden.text[0]]
    for (start, stop), got in zip(layout.spans, rows, strict=True):
        want = tensors["pack.token_sequence"][start:stop]
        assert torch.equal(got, want[:, : got.shape[1]])
        assert not want[:, got.shape[1] :].any()
    modality = torch.cat([torch.full((stop - start,), i) for i, (start, stop) in enumerate(layout.spans)])
    assert torch.equal(modality, tensors["pack.modality_mapping"])
    assert torch.equal(layout.coordinates(), tensors["pack.coords_mapping"])
    bands = tensors["weights.adapter.rope.bands"]
    assert relative_error(rope_table(layout.coordinates(), bands), tensors["rope"]) < 1e-5


@pytest.mark.parametrize("policy", ["fp32", "ref"])
def test_golden_transformer(golden: Golden, policy: str) -> None:
    hidden = {}

    def record(index: int, layer, x: torch.Tensor) -> torch.Tensor:
        hidden[index] = layer(x)
        return hidden[index]

    network = golden.network(torch.float32 if policy == "fp32" else torch.bfloat16)
    velocity = network(golden.latents, golden.text, golden.layout, run_block=record)
    limits = {key: 1e-5 if policy == "fp32" else drift / 2 for key, drift in golden.drift.items()}
    for key, got in zip(("velocity_video", "velocity_audio"), velocity, strict=True):
        assert relative_error(got, golden.tensors[f"{policy}.{key}"]) <= limits[key], key
    for index, got in hidden.items():
        want = golden.tensors.get(f"{policy}.hidden.{index:02}")
        if want is not None:
            assert relative_error(got[0], want) <= max(limits.values()), f"after layer {index}"


def test_golden_first_layer(golden: Golden) -> None:
    tensors, network = golden.tensors, golden.network(torch.float32)
    got = {}
    layer = network.block.layers[0]

    def keep(name: str):
        return lambda _module, _inputs, output: got.__setitem__(name, output[0])

    for name, module in {
        "attn_pre_norm": layer.attention.pre_norm, "qkvg": layer.attention.linear_qkv,
        "q_normed": layer.attention.q_norm, "k_normed": layer.attention.k_norm, "attn_out": layer.attention,
        "mlp_pre_norm": layer.mlp.pre_norm, "mlp_up": layer.mlp.up_gate_proj, "mlp_out": layer.mlp,
    }.items():  # fmt: skip
        module.register_forward_hook(keep(f"layer0.{name}"))
    network.adapter.register_forward_hook(keep("embed"))
    network(golden.latents, golden.text, golden.layout)
    recorded = {name: tensors[f"fp32.{name}"] for name in got if f"fp32.{name}" in tensors}
    assert "embed" in recorded
    for name, want in recorded.items():
        assert relative_error(got[name], want) < 1e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_size_names_shapes_and_counts_are_the_published_ones(variant: str) -> None:
    published = full_size("dit")
    config = MAGIHUMAN.transformers[variant]
    with torch.device("meta"):
        network = JointTransformer(config)
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes == {name: entry["shape"] for name, entry in published["parameters"].items()}
    assert sum(p.numel() for p in network.parameters()) == published["parameter_count"]["total"]
    expected = published["variants"][variant]
    assert config.coords_style == expected["coords_style"]
    assert list(config.local_attn_layers) == expected["local_attn_layers"]
    if expected["local_attn_layers"]:
        assert config.frame_receptive_field == expected["frame_receptive_field"]
    own = config.to_dict() | {"num_heads_q": config.num_heads, "num_heads_kv": config.num_query_groups}
    for name, value in published["config"].items():
        if name in own and name != "local_attn_layers":
            assert list(own[name]) == value if isinstance(value, list) else own[name] == value, name
