import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from golden_files import GoldenFile, full_size, golden_files, relative_error, weights
from torch import nn

from happyhorse.kernels.attention import attention
from happyhorse.model import transformer
from happyhorse.model.config import MAGIHUMAN, VARIANTS, TransformerConfig
from happyhorse.model.packing import Latents, PackedLayout, patchify
from happyhorse.model.rope import rope_table
from happyhorse.model.transformer import JointTransformer

# A name of oneDNN's. What the bfloat16 runs were recorded with is not known: with these instructions they are
# met, with AMX dit_v2 is at 0.53 of the drift (limit 0.5), with AVX2 dit_v2 and dit_local are over it too.
RECORDED_WITH = "AVX512_CORE_BF16"


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


class Trace:
    """What the modules of a network put out, by the recordings' names: all tokens, without the batch."""

    def __init__(self, network: JointTransformer) -> None:
        self.pieces: dict[str, list[torch.Tensor]] = {}
        modules = {
            "embed": network.adapter,
            "out_video": network.final_linear_video, "out_audio": network.final_linear_audio,
        }  # fmt: skip
        for index, layer in enumerate(network.block.layers):
            modules[f"hidden.{index:02}"] = layer
            for name, module in {
                "attn_pre_norm": layer.attention.pre_norm, "qkvg": layer.attention.linear_qkv,
                "q_normed": layer.attention.q_norm, "k_normed": layer.attention.k_norm,
                "attn_out": layer.attention, "mlp_pre_norm": layer.mlp.pre_norm,
                "mlp_up": layer.mlp.up_gate_proj, "mlp_out": layer.mlp,
            }.items():  # fmt: skip
                modules[f"layer{index}.{name}"] = module
        for name, module in modules.items():
            module.register_forward_hook(self.keep(name))

    def keep(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
            self.pieces.setdefault(name, []).append(output[0])  # the feed-forward takes tokens in pieces

        return hook

    def outputs(self) -> dict[str, torch.Tensor]:
        got = {name: torch.cat(pieces) for name, pieces in self.pieces.items()}
        heads = got.pop("out_video"), got.pop("out_audio")
        width = max(head.shape[1] for head in heads)
        text = heads[0].new_zeros(len(got["embed"]) - sum(map(len, heads)), width)  # has no head
        padded = [nn.functional.pad(head, (0, width - head.shape[1])) for head in heads]
        return got | {"out_tokens": torch.cat((*padded, text))}


def passes_as_recorded(request: pytest.FixtureRequest) -> bool:
    """Whether a test passes where oneDNN has the instructions that the bfloat16 runs are compared on.

    Others sum up in another order and flip roundings. oneDNN chooses once in a process, so it gets its own;
    within that this is False, and the test goes on.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == RECORDED_WITH:
        return False
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": RECORDED_WITH}
    environment.pop("TEST_SUMMARY", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", request.node.nodeid]
    root = request.config.rootpath
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout
    return True


@pytest.mark.parametrize("policy", ["fp32", "ref"])
def test_golden_transformer(golden: Golden, policy: str, request: pytest.FixtureRequest) -> None:
    """Everything recorded of the forward pass, from the embeddings over the layers to the velocities."""
    if policy == "ref" and passes_as_recorded(request):
        return
    network = golden.network(torch.float32 if policy == "fp32" else torch.bfloat16)
    trace = Trace(network)
    velocity = network(golden.latents, golden.text, golden.layout)
    velocities = {f"velocity_{stream}": getattr(velocity, stream) for stream in Latents._fields}
    got = trace.outputs() | velocities
    recorded = weights(golden.tensors, f"{policy}.")
    assert {*velocities, "out_tokens", "hidden.00"} <= recorded.keys() <= got.keys()
    limits = {name: 1e-5 if policy == "fp32" else drift / 2 for name, drift in golden.drift.items()}
    for name, want in recorded.items():
        assert relative_error(got[name], want) <= limits.get(name, max(limits.values())), name


def test_golden_frame_windows(golden: Golden) -> None:
    """Which tokens the layers see: even scores and values of one token each show the weights."""
    sequence, layers = golden.layout.spans[-1][1], golden.network(torch.float32).block.layers
    want = torch.zeros(sequence, sequence, dtype=torch.bool)
    ranges = (golden.tensors.get(f"local.{side}_ranges", torch.tensor([[0, sequence]])) for side in "qk")
    for (q_start, q_stop), (k_start, k_stop) in zip(*(r.tolist() for r in ranges), strict=True):
        want[q_start:q_stop, k_start:k_stop] = True
    even, values = torch.zeros(1, 1, sequence, sequence), torch.eye(sequence).expand(1, 1, -1, -1)
    for index, layer in enumerate(layers):
        seen = attention(even, even, values, layer.attention.window(golden.layout))[0, 0] > 0
        local = index in golden.config.local_attn_layers
        assert torch.equal(seen, want if local else torch.ones_like(want)), index


@pytest.mark.parametrize("tokens", [1, 5, 7])
def test_the_feed_forward_in_pieces_is_the_whole(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """Pieces of these lengths begin and end within modalities, and one may hold several of them."""
    generator = torch.Generator().manual_seed(6)
    layers = golden.network(torch.float32).block.layers
    sequence = golden.layout.spans[-1][1]
    x = torch.randn(2, sequence, golden.config.hidden_size, generator=generator)
    monkeypatch.setattr(transformer, "piece_tokens", lambda total: total)
    whole = [layer.mlp(x, golden.layout) for layer in layers]
    monkeypatch.setattr(transformer, "piece_tokens", lambda total: tokens)  # noqa: ARG005
    for layer, want in zip(layers, whole, strict=True):
        assert relative_error(layer.mlp(x, golden.layout), want) < 1e-6


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
