"""Classifier-free guidance with a scale of its own for each condition (InstructPix2Pix, arXiv 2211.09800, eq. 3)."""

from torch import Tensor


def two_scale(
    v_null: Tensor, v_image: Tensor, v_both: Tensor, scale_image: float | Tensor, scale_text: float | Tensor
) -> Tensor:
    """v(0, 0) + scale_image [v(0, image) - v(0, 0)] + scale_text [v(text, image) - v(0, image)], [B, ...].

    The image is absent from the first branch, so it guides even where both texts are empty; guiding with the image
    in every branch would cancel there.

    Args:
        v_null: velocity under the null text and the null image, [B, ...].
        v_image: under the null text and the image.
        v_both: under the text and the image.
        scale_image: guidance scale of the image, a number or [B]; 1 is no extra guidance.
        scale_text: guidance scale of the text.
    """
    image = _rows(scale_image, v_null) * (v_image - v_null)
    text = _rows(scale_text, v_null) * (v_both - v_image)
    return v_null + image + text


def _rows(scale: float | Tensor, like: Tensor) -> float | Tensor:
    if isinstance(scale, Tensor) and scale.ndim:
        return scale.to(like).view(-1, *[1] * (like.ndim - 1))  # [B, 1, ...]
    return scale
