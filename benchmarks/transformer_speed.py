"""Time a forward pass of the transformer against a plain matrix product of the same dtype, in the same run.

FLOPs are 2 x linear weights used x tokens, plus 4 x tokens^2 x width per layer for the attention. Usage:
`python benchmarks/transformer_speed.py [--threads 2]`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from happyhorse.model.config import TransformerConfig
from happyhorse.model.packing import Latents, PackedLayout
from happyhorse.model.transformer import JointTransformer

CONFIG = TransformerConfig(
    num_layers=8, hidden_size=1024, head_dim=128, num_query_groups=2, video_in_channels=192,
    audio_in_channels=64, text_in_channels=3584, mm_layers=(0, 7), gelu7_layers=(0,), local_attn_layers=(),
    frame_receptive_field=11, enable_attn_gating=True, coords_style="v2",
)  # fmt: skip
LATENT_SIZE, AUDIO, TEXT = (32, 16, 28), 126, 400  # 3,584 video tokens


def seconds(function: Callable[[], object], runs: int) -> float:
    """The median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def forward_flops(network: JointTransformer, layout: PackedLayout) -> float:
    """The work of one pass; in a layer with a copy per modality every token uses one of the three."""
    linear = 0
    for index, layer in enumerate(network.block.layers):
        copies = 3 if index in CONFIG.mm_layers else 1
        linear += sum(p.numel() for p in layer.parameters() if p.ndim == 2) / copies
    attention = 4 * layout.total_tokens**2 * CONFIG.hidden_size * CONFIG.num_layers
    return 2 * linear * layout.total_tokens + attention


def measure(dtype: torch.dtype, runs: int) -> tuple[float, float]:
    """Return FLOP/s of the forward pass and of the matrix product."""
    generator = torch.Generator().manual_seed(0)
    network = JointTransformer(CONFIG, compute_dtype=dtype).requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
        if name.startswith("block.") and parameter.ndim == 2:
            parameter.data = parameter.data.to(dtype)
    latents = Latents(
        torch.randn(1, 48, *LATENT_SIZE, generator=generator), torch.randn(1, AUDIO, 64, generator=generator)
    )
    text = torch.randn(1, TEXT, CONFIG.text_in_channels, generator=generator)
    layout = PackedLayout.of(latents, text, CONFIG.coords_style)
    a = torch.randn(layout.total_tokens, 1024, generator=generator).to(dtype)
    b = torch.randn(4096, 1024, generator=generator).to(dtype)
    product = 2 * layout.total_tokens * 1024 * 4096 / seconds(lambda: F.linear(a, b), 5 * runs)
    forward = forward_flops(network, layout) / seconds(lambda: network(latents, text, layout), runs)
    return forward, product


def main() -> None:
    """Print one line per dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            forward, product = measure(dtype, options.runs)
            sys.stdout.write(
                f"{dtype}: forward {forward / 1e9:.0f} GFLOP/s, product {product / 1e9:.0f} GFLOP/s, "
                f"ratio {forward / product:.2f}\n"
            )


if __name__ == "__main__":
    main()
