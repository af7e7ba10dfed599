"""VQTokenizer: an image tokenizer that is a network of the VQGAN family, from its checkpoint to codes and pictures.

Codes are sensitive to the encoder's arithmetic, hence ``encoder_precision`` is a property of the tokenizer and stands
in its file: float32 (exact, the default), tf32 or bfloat16 (convolutions on a GPU's matrix units). The quantiser and
the decoder always compute in float32.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megat2i.files import DataFileError
from megat2i.tokenizers.kmeans import nearest
from megat2i.tokenizers.tokenizer_file import REMEDY, tokenizer_file_content, write_tokenizer_file
from megat2i.tokenizers.vqgan import Architecture, Decoder, Encoder, Norm
from megat2i.weights_file import read_checkpoint

PRECISIONS = ("float32", "tf32", "bfloat16")
PIXELS = {"cpu": 2 * 256**2, "cuda": 16 * 256**2}  # in one pass: enough to keep the device busy
SCORES = {"cpu": 2**24, "cuda": 2**28}  # of the quantiser at once


class VQTokenizer(nn.Module):
    """Base class: a member says its ``kind``, ``sizes`` and ``crop``, and overrides what is different in it."""

    kind: str
    crop = "center"
    sizes: dict[str, Architecture] = {}  # published ones by name

    def __init__(self, architecture: Architecture, image_size: int = 256, encoder_precision: str = "float32"):
        super().__init__()
        if encoder_precision not in PRECISIONS:
            raise ValueError(f"encoder_precision {encoder_precision!r} is none of {', '.join(PRECISIONS)}")
        if image_size < 1 or image_size % architecture.stride:
            raise ValueError(f"image size {image_size} is not a multiple of {architecture.stride} pixels")
        self.stride, self.codebook_size = architecture.stride, architecture.codes
        self.image_size, self.encoder_precision = image_size, encoder_precision
        self.grid = (image_size // self.stride, image_size // self.stride)
        self.checkpoint: dict[str, str | bool] = {}  # where the weights come from
        self.encoder = Encoder(architecture)
        self.quant_conv = nn.Conv2d(architecture.z_channels, architecture.embed_dim, 1)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(architecture.codes, architecture.embed_dim)
        self.post_quant_conv = nn.Conv2d(architecture.embed_dim, architecture.z_channels, 1)
        self.decoder = Decoder(architecture, self._norm_factory(architecture))

    # What a member of the family may override

    @classmethod
    def architecture(cls, config: str) -> Architecture:
        """The architecture that ``config`` means. ValueError where it means none."""
        if config not in cls.sizes:
            raise ValueError(f"{cls.kind} size {config!r} is none of {', '.join(cls.sizes)}")
        return cls.sizes[config]

    @staticmethod
    def weights(tensors: dict[str, Tensor], path: str | Path, ema: bool) -> dict[str, Tensor]:
        """The model's tensors among those of a checkpoint, under the names used here. Raises DataFileError."""
        if ema:
            raise DataFileError(path, "averaged weights are not known in files of this kind", "Leave ema out")
        return tensors

    def _norm_factory(self, architecture: Architecture) -> Callable[[int], nn.Module]:
        """Makes the norms of the decoder, given their channels."""
        return Norm

    def _vectors(self, latents: Tensor) -> Tensor:
        """What is compared with the codebook, of vectors float32 [N, d]."""
        return latents

    # Opening and saving

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        config: str | dict | None = None,
        ema: bool = False,
        image_size: int = 256,
        encoder_precision: str = "float32",
    ) -> "VQTokenizer":
        """The tokenizer with the weights in ``path``, on the CPU. Nothing in the file is executed.

        path: safetensors, or what torch.save wrote: the bare state dict or a training checkpoint.
        config: what the file must hold: the name of a published size, or what ``architecture`` accepts; None takes
        what the tensors say.
        ema: take the averaged weights of a training checkpoint.
        Raises DataFileError where the file is not this model, ValueError for a wrong argument.
        """
        wanted = None if config is None else cls.architecture(config)
        tensors, sha256 = read_checkpoint(path)
        tensors = cls.weights(tensors, path, ema)
        name = config if isinstance(config, str) else None
        model = cls._build(path, tensors, wanted, name, image_size, encoder_precision)
        model.checkpoint = {"name": Path(path).name, "sha256": sha256, "ema": ema}
        return model

    @classmethod
    def from_file(cls, path: str | Path, tensors: dict[str, Tensor], metadata: dict, sha256: str) -> "VQTokenizer":
        """The tokenizer in an opened file that ``save`` wrote. Raises DataFileError."""
        image_size, precision = metadata.get("image_size"), metadata.get("encoder_precision")
        if type(image_size) is not int or precision not in PRECISIONS:
            problem = f"image_size {image_size!r} or encoder_precision {precision!r} is not one that we write"
            raise DataFileError(path, problem, REMEDY)
        try:
            model = cls._build(path, tensors, None, None, image_size, precision)
        except DataFileError:
            raise
        except ValueError as error:
            raise DataFileError(path, str(error), REMEDY) from error
        model.checkpoint, model.sha256 = metadata.get("checkpoint", {}), sha256
        return model

    @classmethod
    def _build(cls, path, tensors, wanted: Architecture | None, name: str | None, image_size, precision):
        found = _deduce(cls, path, tensors)
        with torch.device("meta"):  # no time for random weights
            model = cls(wanted or found, image_size, precision)
        expected = model.state_dict()
        wrong = [key for key, value in tensors.items() if key in expected and value.shape != expected[key].shape]
        faults = [
            *(f"{key} is {list(tensors[key].shape)}, expected {list(expected[key].shape)}" for key in wrong),
            *(f"{key} is missing" for key in sorted(expected.keys() - tensors.keys())),
            *(f"{key} is unknown" for key in sorted(tensors.keys() - expected.keys())),
        ]
        if faults:
            what = f"not a {cls.kind} {name or ''}".rstrip() + f" model: {faults[0]}"
            what += f" (and {len(faults) - 1} more differences)" if len(faults) > 1 else ""
            size = next((size for size, architecture in cls.sizes.items() if architecture == found), None)
            remedy = f"Its sizes are those of {size}" if size and wanted else "Pass the file that belongs to the model"
            raise DataFileError(path, what, remedy)
        for key, value in tensors.items():
            if not value.is_floating_point() or not value.isfinite().all():
                raise DataFileError(path, f"{key} holds {value.dtype} that are not finite numbers", "Get it again")
        # Copies: the file may be mapped, and must not be needed or able to change afterwards.
        model.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in tensors.items()}, assign=True)
        return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hexadecimal) of the file it was opened from, or that ``save`` will write."""
        return hashlib.sha256(self._content()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the safetensors file that ``load_image_tokenizer`` opens, atomically; its SHA-256 is ``sha256``."""
        write_tokenizer_file(path, self._content())

    def _content(self) -> bytes:
        tensors = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        metadata = {
            "kind": self.kind,
            "image_size": self.image_size,
            "encoder_precision": self.encoder_precision,
            "checkpoint": self.checkpoint,
        }
        return tokenizer_file_content(tensors, metadata)

    # Images to codes and back

    @property
    def device(self) -> torch.device:
        return self.quantize.embedding.weight.device

    def encode(self, images: Tensor) -> Tensor:
        """Codes int64 [B, h * w] of ``images`` uint8 [B, 3, H, W], on the device of the images.

        H and W are multiples of ``stride``; h = H / stride, w = W / stride, row by row.
        """
        problem = f"{images.dtype} {list(images.shape)}"
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images uint8 [B, 3, H, W], got {problem}")
        batch, _, height, width = images.shape
        if height % self.stride or width % self.stride or not height * width:
            raise ValueError(f"expected images whose sides are multiples of {self.stride} pixels, got {problem}")
        codes = torch.empty(batch, height // self.stride * (width // self.stride), dtype=torch.long, device=self.device)
        for part, out in _passes(images, codes, height * width, self.device):
            out.copy_(self.quantise(self.latents(part)))
        return codes.to(images.device)

    @torch.inference_mode()
    def latents(self, images: Tensor) -> Tensor:
        """What the quantiser gets of ``images`` uint8 [B, 3, H, W]: float32 [B, d, h, w]."""
        if self.encoder_precision == "tf32" and self.device.type != "cuda":
            raise ValueError(f"encoder precision tf32 needs a CUDA device, the tokenizer is on {self.device}")
        pixels = images.to(self.device).to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1
        with arithmetic(self.device, "tf32" if self.encoder_precision == "tf32" else "ieee"):
            if self.encoder_precision == "bfloat16":
                low = {name: value.bfloat16() for name, value in self.encoder.state_dict().items()}
                encoded = functional_call(self.encoder, low, (pixels.bfloat16(),)).float()
            else:
                encoded = self.encoder(pixels)
        with arithmetic(self.device, "ieee"):
            return self.quant_conv(encoded)

    @torch.inference_mode()
    def quantise(self, latents: Tensor) -> Tensor:
        """The nearest codes, int64 [B, h * w], of ``latents`` float32 [B, d, h, w]."""
        vectors = self._vectors(latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]))
        rows = max(1, SCORES[self.device.type] // self.codebook_size)
        with arithmetic(self.device, "ieee"):
            codes = [nearest(part, self._codebook)[0] for part in vectors.split(rows)]
        return torch.cat(codes).reshape(len(latents), -1)

    @property
    def _codebook(self) -> Tensor:
        return self._vectors(self.quantize.embedding.weight)

    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images uint8 [B, 3, h * stride, w * stride] of ``codes`` [B, h * w], on the device of the codes.

        grid: (h, w); needed where the image is not square.
        """
        codes, (rows, columns) = codes.long(), self._check(codes, grid)
        height, width = rows * self.stride, columns * self.stride
        images = torch.empty(len(codes), 3, height, width, dtype=torch.uint8, device=self.device)
        for part, out in _passes(codes, images, height * width, self.device):
            pixels = self.decode_float(part, (rows, columns))
            out.copy_(((pixels + 1) * 127.5).round().clamp(0, 255))
        return images.to(codes.device)

    @torch.inference_mode()
    def decode_float(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The decoder's output for ``codes`` [B, h * w]: float32 [B, 3, H, W], about -1..1, in one pass."""
        grid = self._check(codes, grid)
        vectors = nn.functional.embedding(codes.long().to(self.device), self._codebook)
        quantised = vectors.unflatten(1, grid).permute(0, 3, 1, 2)
        with arithmetic(self.device, "ieee"):
            return self.decoder(self.post_quant_conv(quantised), quantised)

    def _check(self, codes: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        """The grid of ``codes``; ValueError where they do not fill it or are none of this codebook."""
        if codes.ndim != 2 or codes.dtype.is_floating_point:
            raise ValueError(f"expected integer codes [B, rows * columns], got {codes.dtype} {list(codes.shape)}")
        side = math.isqrt(codes.shape[1])
        rows, columns = grid or (side, side)
        if rows * columns != codes.shape[1] or rows < 1:
            problem = f"{codes.shape[1]} codes do not fill a grid of {rows} x {columns}"
            raise ValueError(f"{problem}: pass grid=(rows, columns)")
        if codes.numel():
            low, high = int(codes.long().min()), int(codes.long().max())
            if low < 0 or high >= self.codebook_size:
                raise ValueError(f"codes {low} to {high} are outside 0..{self.codebook_size - 1}")
        return rows, columns


def _deduce(cls: type[VQTokenizer], path, tensors: dict[str, Tensor]) -> Architecture:
    try:
        return Architecture.of(tensors)
    except KeyError as error:
        problem = f"{error.args[0]} is missing"
    except (IndexError, ValueError) as error:  # tensors of another number of dimensions, or of odd sizes
        problem = f"the shapes of its tensors are those of no such model ({error})"
    raise DataFileError(path, f"not a {cls.kind} model: {problem}", "Pass the file that belongs to the model")


def _passes(inputs: Tensor, outputs: Tensor, pixels: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(part of ``inputs``, part of ``outputs``) of every pass over a batch of images of so many ``pixels`` each."""
    size = max(1, PIXELS[device.type] // pixels)
    return zip(inputs.split(size), outputs.split(size), strict=True) if len(inputs) else iter(())


@contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """float32 products as "ieee" says or rounded to "tf32", whatever the process chose; its choice is restored."""
    backends = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = precision
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
