"""Products with float8 weights on matrix units that multiply float8 numbers, beside their torch reference.

The activations are quantised anew for every product, with one scale per token. Letters: M tokens, K inputs,
N outputs.
"""

import sys

import torch
from torch import Tensor

ACTIVATIONS = torch.float8_e4m3fn  # the weights may be e5m2, but two e5m2 factors are not multiplied
LARGEST = 448.0  # of float8_e4m3fn
MULTIPLE = 16  # matrix units take K and N in such multiples only


def has_scaled_matmul(device: torch.device) -> bool:
    """Whether a device multiplies float8 numbers in hardware: NVIDIA's from the RTX 40 and H100 on."""
    if device.type != "cuda" or torch.version.hip:  # AMD's float8 is partly another one, and untested here
        return False
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor) >= (8, 9)


def scaled_linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return x (weight * scale)^T: `x` [..., K], `weight` [N, K] in float8 -> [..., N] in the dtype of `x`.

    `scale` is float32 of [] or [N, 1], or None. Any K and N work; multiples of 16 need no copy of the weight.
    """
    outputs, inputs = weight.shape
    if not x.numel():
        return x.new_empty((*x.shape[:-1], outputs))
    weight, scale = pad_linear(weight, scale, next_multiple(outputs), next_multiple(inputs))
    tokens, token_scale = quantize_tokens(x.flatten(0, -2), weight.shape[1])
    product = scaling_rows if _takes_row_scales(weight, x.dtype) else scaling_after
    return product(tokens, token_scale, weight, scale, x.dtype)[:, :outputs].unflatten(0, x.shape[:-1])


def next_multiple(size: int, of: int = MULTIPLE) -> int:
    """The smallest multiple that is not below `size`."""
    return -(-size // of) * of


def pad_linear(
    weight: Tensor, scale: Tensor | None, rows: int, columns: int, copies: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Add zeros to a weight [copies * N, K], so that each copy has so many rows and columns.

    A `scale` of one per row grows with it. What has the size is returned as it is.
    """
    copy = weight.unflatten(0, (copies, -1))
    if copy.shape[1:] == (rows, columns):
        return weight, scale
    wide = weight.new_zeros(copies, rows, columns)
    wide[:, : copy.shape[1], : copy.shape[2]] = copy
    if scale is not None and scale.ndim:
        scale, _ = pad_linear(scale, None, rows, 1, copies)
    return wide.flatten(0, 1), scale


def quantize_tokens(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """[M, K] -> float8 [M, columns], the rest being zeros, and the scale of each token, float32 [M, 1]."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    # in the dtype of x, so that no tensor of the size of x is made in float32; what its rounding adds to 448
    # is less than float8 rounds away
    factor = (LARGEST / largest).clamp(max=torch.finfo(x.dtype).max).to(x.dtype)
    tokens, _ = pad_linear((x * factor).to(ACTIVATIONS), None, len(x), columns)
    return tokens, factor.float().reciprocal()


def scaling_rows(
    tokens: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product [M, N] by a kernel that takes a scale for each token and each row of the weight."""
    row_scale = token_scale.new_ones(()) if scale is None else scale
    row_scale = row_scale.expand(len(weight), 1).reshape(1, -1).contiguous()
    return torch._scaled_mm(tokens, weight.t(), scale_a=token_scale, scale_b=row_scale, out_dtype=dtype)


def scaling_after(
    tokens: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same by the kernel that all hardware has, of one scale for each factor; more come after it."""
    one = token_scale.new_ones(())
    whole = one if scale is None or scale.ndim else scale
    # the product itself is beyond float16's range
    product_dtype = torch.float32 if dtype is torch.float16 else dtype
    out = torch._scaled_mm(tokens, weight.t(), scale_a=one, scale_b=whole, out_dtype=product_dtype)
    out *= token_scale
    if scale is not None and scale.ndim:
        out *= scale.t()
    return out.to(dtype)


def _takes_row_scales(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel of such scales: for H100 and its kin yes, on others not in every build."""
    if weight.device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(weight.device)
    hopper = (properties.major, properties.minor) == (9, 0) and sys.platform != "win32"
    return hopper and weight.dtype is torch.float8_e4m3fn and dtype is torch.bfloat16


def scaled_linear_reference(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """The same by its definition: the activations quantised alike, the product in float32."""
    tokens, token_scale = quantize_tokens(x.flatten(0, -2), x.shape[-1])
    values = weight.float() if scale is None else weight.float() * scale
    return ((tokens.float() * token_scale) @ values.t()).to(x.dtype).unflatten(0, x.shape[:-1])
