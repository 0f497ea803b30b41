"""Frozen encoders: local weights only, the same embeddings every time, statistics and way back as
promised.
"""

import pytest
import torch

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.encoders import build_encoder
from ebwm_scale.data.encoders.pca import fit_pca, to_patches
from ebwm_scale.data.encoders.pretrained import patch_tokens


def frames(n=6, height=32, width=32, seed=0):
    """Smooth random frames, uint8."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 3, 4, 4, generator=generator)
    return (
        (torch.nn.functional.interpolate(small, (height, width), mode="bilinear") * 255)
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .contiguous()
    )


def test_pca_components_are_white_ordered_and_the_best_reconstruction():
    data = frames(200)
    encoder, share = fit_pca(data.split(64), patch=8, components=6, height=32, width=32)
    components = encoder.encode(data).view(-1, 6)
    assert encoder.dimension == 16 * 6 and torch.allclose(
        components.mean(0), torch.zeros(6), atol=1e-4
    )
    assert torch.allclose(torch.cov(components.T), torch.eye(6), atol=1e-3)
    patches = to_patches(data, 8).flatten(0, 1)
    centred = patches - patches.mean(0)
    singular = torch.linalg.svd(centred, full_matrices=False)
    assert share == pytest.approx(
        float(singular.S[:6].square().sum() / singular.S.square().sum()), abs=1e-4
    )
    best = patches.mean(0) + (centred @ singular.Vh[:6].T) @ singular.Vh[:6]
    back = to_patches(encoder.decode(encoder.encode(data)), 8).flatten(0, 1)
    assert (back - best.clamp(0, 1)).abs().max() < 1.1 / 255  # up to rounding to bytes
    assert torch.equal(encoder.groups(), torch.arange(6).repeat(16))


def test_pca_parameters_make_the_same_encoder():
    encoder, _ = fit_pca([frames(50)], patch=8, components=6, height=32, width=32)
    again = build_encoder(
        "pca", encoder.settings, height=32, width=32, parameters=encoder.parameters()
    )
    assert torch.equal(encoder.encode(frames(3, seed=1)), again.encode(frames(3, seed=1)))


def test_all_components_lose_nothing():
    encoder, share = fit_pca([frames(80, 16, 16)], patch=4, components=48, height=16, width=16)
    data = frames(5, 16, 16, seed=3)
    assert (
        share == pytest.approx(1)
        and (encoder.decode(encoder.encode(data)).int() - data.int()).abs().max() <= 2
    )


def test_frames_of_one_colour_are_no_division_by_zero():
    encoder, _ = fit_pca(
        [torch.full((4, 16, 16, 3), 100, dtype=torch.uint8)],
        patch=8,
        components=2,
        height=16,
        width=16,
    )
    assert not encoder.encode(frames(2, 16, 16)).any()


def test_what_no_training_frame_showed_is_not_magnified():
    """Training frames that differ in a single number vary in one direction."""
    grey = torch.full((32, 16, 16, 3), 100, dtype=torch.uint8)
    grey[:, :8] += torch.arange(32, dtype=torch.uint8).view(32, 1, 1, 1)
    encoder, _ = fit_pca([grey], patch=8, components=6, height=16, width=16)
    assert encoder.num_varying() == 1
    unseen = encoder.encode(frames(20, 16, 16))
    assert unseen.abs().max() < 50
    assert torch.equal(unseen.view(20, 4, 6)[..., 1:], torch.zeros(20, 4, 5))
    back = encoder.decode(encoder.encode(grey))
    assert (back.int() - grey.int()).abs().max() <= 1


def test_a_transformers_backbone_gives_its_pooled_output(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="the package transformers is not installed"
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
        )
    ).eval()
    model.save_pretrained(tmp_path / "dino")
    encoder = build_encoder("transformers", {"path": str(tmp_path / "dino")}, height=28, width=28)
    data = frames(3, 28, 28)
    images = data.permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = model(images).pooler_output
    assert encoder.dimension == 24 and torch.allclose(encoder.encode(data), expected, atol=1e-5)
    assert encoder.decode(encoder.encode(data)) is None and not any(
        p.requires_grad for p in encoder.model.parameters()
    )


def test_other_weights_than_a_dataset_was_made_with_are_refused(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="the package transformers is not installed"
    )
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        transformers.Dinov2Model(config).save_pretrained(tmp_path / name)
    made_with = build_encoder(
        "transformers", {"path": str(tmp_path / "a")}, height=28, width=28
    ).settings
    assert build_encoder("transformers", made_with, height=28, width=28).settings == made_with
    with pytest.raises(DataError, match="use the same weights"):
        build_encoder(
            "transformers", made_with | {"path": str(tmp_path / "b")}, height=28, width=28
        )


def test_a_stable_diffusion_vae_gives_its_latent_mean_and_goes_back(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the package diffusers is not installed")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    encoder = build_encoder("sd-vae", {"path": str(tmp_path / "vae")}, height=32, width=32)
    data = frames(3)
    with torch.no_grad():
        expected = vae.encode(data.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
    embeddings = encoder.encode(data)
    assert encoder.dimension == 4 * 4 * 4 and torch.allclose(
        embeddings, expected.flatten(1), atol=1e-5
    )
    assert torch.equal(encoder.groups(), torch.arange(4).repeat_interleave(16))
    assert (
        encoder.decode(embeddings).shape == data.shape
        and encoder.decode(embeddings).dtype == torch.uint8
    )


@pytest.mark.parametrize("grid", [1, 2])
def test_the_bundled_backbone_works_offline(grid):
    pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the package efficientnet-lite-pytorch is not installed"
    )
    encoder = build_encoder("efficientnet", {"grid": grid}, height=64, width=64)
    data = frames(3, 64, 64)
    embeddings = encoder.encode(data)
    assert embeddings.shape == (3, 1280 * grid * grid) and torch.allclose(
        embeddings[1:], encoder.encode(data[1:]), atol=1e-4
    )
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-2


def test_a_timm_model_gives_its_pooled_features(tmp_path):
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm does not load: {' '.join(str(error).split())[:100]}")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    encoder = build_encoder(
        "timm",
        {"model": "vit_tiny_patch16_224", "path": str(tmp_path / "vit.pth")},
        height=224,
        width=224,
    )
    data = frames(2, 224, 224)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
    with torch.no_grad():
        assert torch.allclose(
            encoder.encode(data),
            model((data.permute(0, 3, 1, 2).float() / 255 - mean) / std),
            atol=1e-5,
        )


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("nonsense", {}, "unknown; allowed: pca, raw, sd-vae"),
        ("sd-vae", {}, "needs a local folder"),
        ("transformers", {"path": "/nowhere"}, "needs a local folder"),
        ("timm", {}, "needs the name of a model|needs the package timm|timm"),
        ("pca", {}, "no parameters yet"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(name, settings, expected):
    with pytest.raises(DataError, match=expected) as error:
        build_encoder(name, settings, height=32, width=32)
    assert "\n" not in str(error.value)


def test_patches_are_the_parts_of_a_frame_row_by_row():
    data = frames(40)
    whole, _ = fit_pca([data], patch=8, components=6, height=32, width=32)
    patches, _ = fit_pca([data], patch=8, components=6, height=32, width=32, patches=True)
    assert whole.grid is None and patches.grid == (4, 4) and patches.dimension == 6
    assert torch.equal(patches.encode(data).flatten(1), whole.encode(data))
    assert torch.equal(patches.decode(patches.encode(data)), whole.decode(whole.encode(data)))
    assert torch.equal(patches.groups(), torch.arange(6))
    changed = data[:1].clone()
    changed[:, 8:16, 24:] = 0  # second row, fourth column
    moved = (patches.encode(changed) != patches.encode(data[:1])).any(2)[0]
    assert moved.nonzero().flatten().tolist() == [7]


def test_raw_patches_come_back_without_loss_even_from_float16():
    data = torch.randint(0, 256, (3, 16, 24, 3), dtype=torch.uint8)
    for patches, shape in ((True, (3, 24, 48)), (False, (3, 1152))):
        encoder = build_encoder("raw", {"patch": 4}, height=16, width=24, patches=patches)
        embeddings = encoder.encode(data)
        assert embeddings.shape == shape and len(encoder.groups()) == encoder.dimension
        assert torch.equal(encoder.decode(embeddings.half().float()), data)
    with pytest.raises(DataError, match="raw patch is 5: must divide"):
        build_encoder("raw", {"patch": 5}, height=16, width=24)


def test_an_sd_vae_gives_squares_of_its_latent(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = dict(block_out_channels=[4] * 4, norm_num_groups=1, layers_per_block=1)
    model = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        **blocks,
    )
    model.save_pretrained(tmp_path / "vae")
    settings = {"path": str(tmp_path / "vae")}
    whole = build_encoder("sd-vae", dict(settings), height=32, width=64)
    patches = build_encoder("sd-vae", dict(settings), height=32, width=64, patches=True)
    assert patches.grid == (2, 4) and patches.dimension == 16 and patches.settings["patch"] == 2
    data = frames(2, 32, 64)
    latent = whole.encode(data).view(2, 4, 4, 8)
    found = patches.encode(data)
    assert torch.equal(found[:, 5].view(2, 4, 2, 2), latent[:, :, 2:4, 2:4])
    assert torch.equal(patches.decode(found), whole.decode(whole.encode(data)))
    with pytest.raises(DataError, match="sd-vae patch is 3: must divide the latent's height 4"):
        build_encoder("sd-vae", settings | {"patch": 3}, height=32, width=64, patches=True)


def test_a_vision_backbone_gives_its_patch_tokens_and_no_others(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        num_register_tokens=3,
    )
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "dino")
    encoder = build_encoder(
        "transformers", {"path": str(tmp_path / "dino")}, height=28, width=42, patches=True
    )
    assert encoder.grid == (2, 3) and encoder.dimension == 16
    data = frames(2, 28, 42)
    images = data.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
    with torch.no_grad():
        hidden = encoder.model((images - mean) / std).last_hidden_state
    assert hidden.shape[1] == 1 + 3 + 6
    assert torch.allclose(encoder.encode(data), hidden[:, 4:], atol=1e-6)
    assert encoder.decode(encoder.encode(data)) is None


def test_a_map_of_features_is_a_grid_and_a_vector_is_none():
    images = torch.zeros(2, 3, 32, 64)
    hidden = torch.arange(2 * 5 * 4 * 8.0).view(2, 5, 4, 8)
    grid, patches = patch_tokens(hidden, images, None, "timm")
    assert grid == (4, 8) and torch.equal(patches[:, 9], hidden[:, :, 1, 1])
    with pytest.raises(DataError, match="no grid of patches that can be told; leave --patches out"):
        patch_tokens(torch.zeros(2, 7), images, 16, "timm")
    with pytest.raises(DataError, match="gives 5 tokens for 2 x 4 patches of 16 x 16 pixels"):
        patch_tokens(torch.zeros(2, 5, 3), images, 16, "timm")
