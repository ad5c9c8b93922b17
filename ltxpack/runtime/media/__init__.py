"""Files seen and heard: pictures in, one video with sound out. Knows no latents (spec 04, section 4; 06, section 7)."""

from ltxpack.runtime.media.images import check_crf, load_image, prepare_image
from ltxpack.runtime.media.mp4 import VideoWriter, check_output, frame_rate
from ltxpack.runtime.media.yuv import to_i420

__all__ = [
    "VideoWriter",
    "check_crf",
    "check_output",
    "frame_rate",
    "load_image",
    "prepare_image",
    "to_i420",
]
