"""Photos and captions as the UNet meets them: encoded once, drawn from (seed, step, sample) alone."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from PIL import Image

from coeffdiff.config import PhotoSettings
from coeffdiff.data import latents
from coeffdiff.data.latents import (
    EncodedPhoto,
    EncodedText,
    EncodedView,
    LatentData,
    encode_photos,
    encode_texts,
    latent_scaling,
    share_of,
)
from coeffdiff.data.photos import read_photos
from coeffdiff.errors import ModelError


def encoded_photo(h: int, w: int, level: float, captions: tuple[str, ...] = ("a", "b")) -> EncodedPhoto:
    """Every latent number of this photo is `level`, without spread: a batch shows which photo it drew."""
    view = EncodedView(torch.full((4, h, w), level), torch.zeros(4, h, w), (8 * h, 8 * w, 0, 0, 8 * h, 8 * w))
    return EncodedPhoto((view,), captions)


def data(*photos: EncodedPhoto, seed: int = 0) -> LatentData:
    texts = {name: EncodedText(torch.full((77, 6), i), torch.full((5,), i)) for i, name in enumerate("ab", 1)}
    return LatentData(photos, texts, lambda x: x * 10, timesteps=1000, seed=seed)


def folder_of(tmp_path, **sizes):
    for i, (name, size) in enumerate(sizes.items()):
        Image.radial_gradient("L").resize(size).convert("RGB").rotate(20 * i).save(tmp_path / f"{name}.png")
    return read_photos(tmp_path).photos


def encode(photos, pipe, cache, **changes):
    settings = PhotoSettings(augmentations=changes.pop("augmentations", 1), cache=cache, **changes)
    captions = [("a photo",)] * len(photos)
    log: list[bool] = []
    result = encode_photos(
        photos,
        captions,
        pipe.vae,
        settings,
        resolution=64,
        step=32,
        seed=0,
        on_photo=lambda photo, cached: log.append(cached),
    )
    return result, log


def test_batch_size_accumulation_and_processes_only_partition_a_step():
    """Eight samples of a step are the same whether drawn 8 at once, 2 x 4, or by 2 processes of 2 x 2."""
    source = data(encoded_photo(8, 8, 1.0), encoded_photo(8, 8, 2.0))
    whole = source.batch(7, range(8))
    for batch_size, accumulate, processes in ((4, 2, 1), (2, 2, 2), (1, 4, 2)):
        shares = [
            share_of(8, batch_size, micro, rank, processes)
            for micro in range(accumulate)
            for rank in range(processes)
        ]
        assert sorted(i for share in shares for i in share) == list(range(8))
        parts = [source.batch(7, share) for share in shares]
        for field in dataclasses.fields(whole):
            values = [getattr(part, field.name) for part in parts]
            if field.name == "captions":
                assert sum(values, ()) == whole.captions
                continue
            joined = torch.cat(values)
            assert torch.equal(joined, getattr(whole, field.name)), field.name


def test_a_share_beyond_the_step_is_refused():
    """A step of 4 samples has no third micro-batch of 2."""
    with pytest.raises(IndexError):
        share_of(4, 2, 2, 0, 1)


def test_steps_samples_and_seeds_draw_differently():
    """Another step, sample or seed gives other noise and (almost surely) another timestep."""
    photo = encoded_photo(8, 8, 1.0)
    noises = [
        data(photo, seed=seed).batch(step, [sample]).noise
        for seed, step, sample in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0))
    ]
    for i, one in enumerate(noises):
        assert all(not torch.equal(one, other) for other in noises[i + 1 :])
    timesteps = torch.cat([data(photo).batch(step, range(16)).timesteps for step in range(50)])
    assert timesteps.min() < 20
    assert timesteps.max() > 980


def test_a_step_has_one_bucket_drawn_in_proportion_to_its_photos():
    """Three square photos and one tall one: about three steps in four are square, and none is mixed."""
    photos = [encoded_photo(8, 8, float(i)) for i in range(3)] + [encoded_photo(12, 4, 9.0)]
    drawn = Counter(data(*photos).batch(step, range(2)).latents.shape[-2:] for step in range(400))
    assert set(drawn) == {(8, 8), (12, 4)}
    assert 0.68 < drawn[torch.Size((8, 8))] / 400 < 0.82


def test_every_photo_and_caption_gets_its_turn():
    """Over 300 draws each of three photos and two captions appears in about its share."""
    source = data(*(encoded_photo(8, 8, float(i)) for i in (1, 2, 3)))
    batch = source.batch(0, range(300))
    photos = Counter((batch.latents[:, 0, 0, 0] / 10).round().int().tolist())
    captions = Counter(batch.pooled[:, 0].int().tolist())
    assert set(photos) == {1, 2, 3}
    assert min(photos.values()) > 70
    assert set(captions) == {1, 2}
    assert min(captions.values()) > 110
    assert torch.equal(batch.embeds[:, 0, 0], batch.pooled[:, 0])  # both embeddings are of the same caption


def test_the_posterior_is_sampled_and_scaled():
    """mean 2, std 3 and a scaling of 10 give latents of mean 20 and deviation 30."""
    view = EncodedView(torch.full((4, 50, 50), 2.0), torch.full((4, 50, 50), 3.0), (1, 2, 3, 4, 5, 6))
    batch = data(EncodedPhoto((view,), ("a",))).batch(0, range(4))
    assert batch.latents.mean().item() == pytest.approx(20, abs=0.5)
    assert batch.latents.std().item() == pytest.approx(30, abs=0.5)
    assert batch.time_ids.tolist() == [[1, 2, 3, 4, 5, 6]] * 4


def test_photos_are_encoded_once_and_then_read_from_the_cache(tmp_path, tiny_pipeline):
    """The second time nothing is computed and every number is the same."""
    photos = folder_of(tmp_path, square=(70, 70), tall=(40, 90))
    first, log = encode(photos, tiny_pipeline, tmp_path / "cache")
    assert log == [False, False]
    second, log = encode(photos, tiny_pipeline, tmp_path / "cache")
    assert log == [True, True]
    assert torch.equal(first[0].views[0].mean, second[0].views[0].mean)
    assert first[0].bucket == (4, 8, 8)
    assert first[1].bucket == (4, 12, 4)  # 32 x 96 pixels
    assert first[1].views[0].time_ids[:2] == (90, 40)  # the photo's own height and width


def test_the_latents_are_the_vaes(tmp_path, tiny_pipeline):
    """What is stored is vae.encode of the rendered photo, pixels in [-1, 1]."""
    photos = folder_of(tmp_path, square=(64, 64))
    stored = encode(photos, tiny_pipeline, tmp_path / "cache")[0][0].views[0]
    pixels = torch.tensor(list(Image.open(photos[0].path).get_flattened_data()), dtype=torch.float32)
    pixels = (pixels / 127.5 - 1).view(1, 64, 64, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        posterior = tiny_pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(stored.mean, posterior.mean[0])
    torch.testing.assert_close(stored.std, posterior.std[0])


def test_another_photo_crop_or_vae_is_encoded_anew(tmp_path, tiny_pipeline):
    """The cache goes by content: changed pixels, a changed crop and a changed VAE each miss it."""
    photos, cache = folder_of(tmp_path, wide=(128, 64)), tmp_path / "cache"
    encode(photos, tiny_pipeline, cache)
    assert encode(photos, tiny_pipeline, cache, crop="center")[1] == [False]
    with torch.no_grad():
        tiny_pipeline.vae.encoder.conv_in.bias.add_(0.1)
    assert encode(photos, tiny_pipeline, cache)[1] == [False]
    Image.new("RGB", (128, 64), "red").save(photos[0].path)
    assert encode(read_photos(tmp_path).photos, tiny_pipeline, cache)[1] == [False]


def test_a_damaged_cache_entry_is_made_again(tmp_path, tiny_pipeline):
    """Truncated or foreign cache files are no error and no danger."""
    photos, cache = folder_of(tmp_path, square=(64, 64)), tmp_path / "cache"
    good = encode(photos, tiny_pipeline, cache)[0][0].views[0].mean
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    again, log = encode(photos, tiny_pipeline, cache)
    assert log == [False]
    assert torch.equal(again[0].views[0].mean, good)


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, tiny_pipeline):
    """A file where the cache folder should be: encoding goes on without it."""
    photos = folder_of(tmp_path, square=(64, 64))
    (tmp_path / "cache").write_text("in the way")
    assert encode(photos, tiny_pipeline, tmp_path / "cache")[1] == [False]


def test_random_crops_differ_and_share_a_bucket(tmp_path, tiny_pipeline):
    """Four augmentations with random crop and flip: different latents of one size."""
    photos = folder_of(tmp_path, wide=(160, 80))
    (photo,), _ = encode(photos, tiny_pipeline, tmp_path / "c", crop="random", flip=True, augmentations=4)
    assert len(photo.views) == 4
    assert {tuple(view.mean.shape) for view in photo.views} == {(4, 8, 8)}
    assert not torch.equal(photo.views[0].mean, photo.views[1].mean)
    assert len({view.time_ids for view in photo.views}) > 1


def test_latents_that_are_not_finite_are_named(tmp_path, tiny_pipeline):
    """A VAE that overflows would train on NaN; it is named with what to do."""
    photos = folder_of(tmp_path, square=(64, 64))
    with torch.no_grad():
        tiny_pipeline.vae.encoder.conv_in.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"not finite.*sdxl-vae-fp16-fix"):
        encode(photos, tiny_pipeline, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_texts_are_encoded_once_each(tiny_pipeline):
    """Duplicates collapse; embeddings and pooled output are encode_prompt's own."""
    texts = encode_texts(tiny_pipeline, ["a photo of sks", "a dog", "a photo of sks"])
    assert list(texts) == ["a photo of sks", "a dog"]
    with torch.no_grad():
        embeds, _, pooled, _ = tiny_pipeline.encode_prompt("a dog", do_classifier_free_guidance=False)
    assert torch.equal(texts["a dog"].embeds, embeds[0])
    assert torch.equal(texts["a dog"].pooled, pooled[0])
    assert not torch.equal(texts["a dog"].pooled, texts["a photo of sks"].pooled)


def test_scaling_follows_the_vaes_config(tiny_pipeline):
    """The scaling factor alone, or (x - mean) * factor / std where a model has them."""
    vae, ones = tiny_pipeline.vae, torch.ones(4, 2, 2)
    torch.testing.assert_close(latent_scaling(vae)(ones), ones * vae.config.scaling_factor)
    vae.register_to_config(latents_mean=[0.5, 0, 0, 0], latents_std=[2.0, 1, 1, 1], scaling_factor=4.0)
    scaled = latent_scaling(vae)(ones)
    torch.testing.assert_close(scaled[:, 0, 0], torch.tensor([1.0, 4.0, 4.0, 4.0]))


def test_the_cache_lives_where_the_system_keeps_caches(monkeypatch, tmp_path):
    """XDG_CACHE_HOME is honoured; a folder in the settings wins."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert latents.cache_folder(PhotoSettings()) == tmp_path / "coeffdiff" / "latents"
    assert latents.cache_folder(PhotoSettings(cache=tmp_path / "here")) == tmp_path / "here"
