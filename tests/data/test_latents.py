"""Photos and captions as the UNet meets them: encoded once, drawn from (seed, step, sample) alone."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from coeffdiff.config.schema import PhotoSettings
from coeffdiff.data.batches import LatentData, Prior, share_of
from coeffdiff.data.encoding import (
    EncodedPhoto,
    EncodedText,
    EncodedView,
    encode_photos,
    encode_texts,
    encode_unconditional,
    latent_scaling,
    sizes_of,
)
from coeffdiff.data.latent_cache import cache_folder
from coeffdiff.data.photos import read_photos
from coeffdiff.errors import ModelError
from coeffdiff.sampling.prompts import encode_prompts


def encoded_photo(h: int, w: int, level: float, captions: tuple[str, ...] = ("a", "b")) -> EncodedPhoto:
    """Every latent number of this photo is `level`, without spread: a batch shows which photo it drew."""
    view = EncodedView(torch.full((4, h, w), level), torch.zeros(4, h, w), (8 * h, 8 * w, 0, 0, 8 * h, 8 * w))
    return EncodedPhoto((view,), captions)


def text(number: float) -> EncodedText:
    return EncodedText(torch.full((77, 6), number), torch.full((5,), number))


def data(*photos: EncodedPhoto, seed: int = 0, **more) -> LatentData:
    texts = {name: text(i) for i, name in enumerate("abABC", 1)}
    return LatentData(photos, texts, lambda x: x * 10, timesteps=1000, seed=seed, **more)


def masked_photo(level: float) -> EncodedPhoto:
    """The left half of its 8 x 8 latents shows the subject."""
    photo = encoded_photo(8, 8, level)
    mask = (torch.arange(8) < 4).float().expand(1, 8, 8)
    return dataclasses.replace(photo, views=(dataclasses.replace(photo.views[0], mask=mask),))


def everything(**more) -> LatentData:
    """Two photos, one with a mask; dropped captions, a noise offset, prior preservation."""
    more = {"prior": Prior({"a": "A", "b": "B"}), **more}
    more |= {"outside_mask": 0.25, "noise_offset": 0.5, "caption_dropout": 0.5, "unconditional": text(0.0)}
    return data(encoded_photo(8, 8, 1.0), masked_photo(2.0), **more)


CLASS_PICTURES = Prior(
    {},
    tuple(encoded_photo(h, w, level, ("A", "C")) for level in (7.0, 8.0, 9.0) for h, w in ((8, 8), (12, 4))),
)


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


@pytest.mark.parametrize(
    "source",
    [
        data(encoded_photo(8, 8, 1.0), encoded_photo(8, 8, 2.0)),
        everything(),
        everything(prior=CLASS_PICTURES),
    ],
    ids=["plain", "everything", "class pictures"],
)
def test_batch_size_accumulation_and_processes_only_partition_a_step(source):
    """Eight samples of a step are the same whether drawn 8 at once, 2 x 4, or by 2 processes of 2 x 2."""
    whole = source.batch(7, range(8))
    assert whole.class_rows == (8 if source.prior else 0)
    for batch_size, accumulate, processes in ((4, 2, 1), (2, 2, 2), (1, 4, 2)):
        shares = [
            share_of(8, batch_size, micro, rank, processes)
            for micro in range(accumulate)
            for rank in range(processes)
        ]
        assert sorted(i for share in shares for i in share) == list(range(8))
        parts = [source.batch(7, share) for share in shares]
        for field in dataclasses.fields(whole):
            expected, pieces = getattr(whole, field.name), [getattr(part, field.name) for part in parts]
            if isinstance(expected, torch.Tensor):
                if field.name != "weights":  # the samples' rows, then the class's
                    pieces = [p[:batch_size] for p in pieces] + [p[batch_size:] for p in pieces]
                assert torch.equal(torch.cat(pieces), expected), field.name


def test_without_masks_and_prior_a_batch_has_its_samples_alone():
    batch = data(encoded_photo(8, 8, 1.0)).batch(0, range(3))
    assert (batch.weights, batch.class_rows, len(batch.latents)) == (None, 0, 3)


def test_each_class_row_is_its_samples_own_but_for_the_caption():
    """Row B + i: latents, noise and timestep of row i, and the class caption of the caption of row i."""
    batch = data(encoded_photo(8, 8, 1.0), encoded_photo(8, 8, 2.0), prior=Prior({"a": "B", "b": "A"})).batch(
        3, range(20)
    )
    for name in ("latents", "noise", "timesteps", "time_ids"):
        samples, classes = getattr(batch, name).chunk(2)
        assert torch.equal(samples, classes), name
    captions, class_captions = batch.pooled[:, 0].chunk(2)
    assert set(captions.tolist()) == {1, 2}
    assert torch.equal(class_captions, torch.where(captions == 1, 4, 3))  # a, b, A, B are 1, 2, 3, 4
    assert torch.equal(batch.embeds[:, 0, 0], batch.pooled[:, 0])


def test_class_pictures_come_in_the_batchs_size_with_their_own_noise_and_captions():
    """Each of three pictures gets its turn in both sizes; noise and timesteps are not the samples'."""
    photos = (encoded_photo(8, 8, 1.0), encoded_photo(12, 4, 2.0))
    source, seen = data(*photos, prior=CLASS_PICTURES), Counter()
    for step in range(60):
        batch = source.batch(step, range(4))
        samples, classes = batch.latents.chunk(2)
        assert samples.max() < 30 < 70 <= classes.min()  # levels times 10
        levels = classes[:, 0, 0, 0].int().tolist()
        assert set(batch.pooled[4:, 0].int().tolist()) <= {3, 5}
        assert not torch.equal(*batch.noise.chunk(2))
        assert not torch.equal(*batch.timesteps.chunk(2))
        seen.update((tuple(classes.shape[-2:]), level) for level in levels)
    assert set(seen) == {(size, level) for size in ((8, 8), (12, 4)) for level in (70, 80, 90)}


def test_captions_are_dropped_as_often_as_asked_and_nothing_else_changes():
    """Half of 400 captions make way for the unconditional; photos, noise and the other captions stay."""
    photos = (encoded_photo(8, 8, 1.0), encoded_photo(8, 8, 2.0))
    whole = data(*photos).batch(5, range(400))
    batch = data(*photos, caption_dropout=0.5, unconditional=text(0.0)).batch(5, range(400))
    dropped = batch.pooled[:, 0] == 0
    assert 0.43 < dropped.float().mean() < 0.57
    assert torch.equal(batch.embeds[~dropped], whole.embeds[~dropped])
    assert not batch.embeds[dropped].any()
    for name in ("latents", "noise", "timesteps", "time_ids"):
        assert torch.equal(getattr(batch, name), getattr(whole, name)), name
    assert not data(*photos, caption_dropout=1.0, unconditional=text(0.0)).batch(5, range(50)).pooled.any()


def test_dropping_a_caption_leaves_the_class_its_own():
    batch = data(
        encoded_photo(8, 8, 1.0),
        caption_dropout=1.0,
        unconditional=text(0.0),
        prior=Prior({"a": "A", "b": "B"}),
    ).batch(0, range(8))
    assert batch.pooled[:8].unique().tolist() == [0]
    assert set(batch.pooled[8:].unique().tolist()) == {3, 4}


def test_a_noise_offset_is_one_constant_a_channel():
    """Of spread 0.5, other for every sample, channel and step; latents and timesteps stay."""
    photo = encoded_photo(8, 8, 1.0)
    plain, offset = data(photo).batch(5, range(300)), data(photo, noise_offset=0.5).batch(5, range(300))
    added = offset.noise - plain.noise
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-6)
    assert added[:, :, 0, 0].std().item() == pytest.approx(0.5, abs=0.05)
    assert len(added[:, :, 0, 0].flatten().unique()) == 1200
    assert torch.equal(offset.latents, plain.latents)
    assert torch.equal(offset.timesteps, plain.timesteps)
    again = data(photo, noise_offset=0.5).batch(6, range(300)).noise - data(photo).batch(6, range(300)).noise
    assert not torch.allclose(again[:, :, 0, 0], added[:, :, 0, 0])


def test_masks_become_weights():
    """1 on the subject, 0.25 outside, 1 everywhere in a photo without a mask."""
    batch = data(encoded_photo(8, 8, 1.0), masked_photo(2.0), outside_mask=0.25).batch(0, range(20))
    assert batch.weights.shape == (20, 1, 8, 8)
    masked = batch.latents[:, 0, 0, 0] == 20
    assert 0 < masked.sum() < 20
    assert (batch.weights[~masked] == 1).all()
    expected = torch.tensor([1.0] * 4 + [0.25] * 4).expand(1, 8, 8)
    assert all(torch.equal(weights, expected) for weights in batch.weights[masked])


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


def test_photos_are_encoded_once_and_then_read_from_the_cache(tmp_path, micro_pipeline):
    """The second time nothing is computed and every number is the same."""
    photos = folder_of(tmp_path, square=(70, 70), tall=(40, 90))
    first, log = encode(photos, micro_pipeline, tmp_path / "cache")
    assert log == [False, False]
    second, log = encode(photos, micro_pipeline, tmp_path / "cache")
    assert log == [True, True]
    assert torch.equal(first[0].views[0].mean, second[0].views[0].mean)
    assert first[0].bucket == (4, 8, 8)
    assert first[1].bucket == (4, 12, 4)  # 32 x 96 pixels
    assert first[1].views[0].time_ids[:2] == (90, 40)  # the photo's own height and width


def test_the_latents_are_the_vaes(tmp_path, micro_pipeline):
    """What is stored is vae.encode of the rendered photo, pixels in [-1, 1]."""
    photos = folder_of(tmp_path, square=(64, 64))
    stored = encode(photos, micro_pipeline, tmp_path / "cache")[0][0].views[0]
    pixels = torch.tensor(list(Image.open(photos[0].path).get_flattened_data()), dtype=torch.float32)
    pixels = (pixels / 127.5 - 1).view(1, 64, 64, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        posterior = micro_pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(stored.mean, posterior.mean[0])
    torch.testing.assert_close(stored.std, posterior.std[0])


def test_another_photo_crop_or_vae_is_encoded_anew(tmp_path, micro_pipeline):
    """The cache goes by content: changed pixels, a changed crop and a changed VAE each miss it."""
    photos, cache = folder_of(tmp_path, wide=(128, 64)), tmp_path / "cache"
    encode(photos, micro_pipeline, cache)
    assert encode(photos, micro_pipeline, cache, crop="center")[1] == [False]
    with torch.no_grad():
        micro_pipeline.vae.encoder.conv_in.bias.add_(0.1)
    assert encode(photos, micro_pipeline, cache)[1] == [False]
    Image.new("RGB", (128, 64), "red").save(photos[0].path)
    assert encode(read_photos(tmp_path).photos, micro_pipeline, cache)[1] == [False]


def test_masks_are_cached_with_their_photo(tmp_path, micro_pipeline):
    """Brought down to the latents' size; read back; another mask, or none, is another entry."""
    photos, cache = folder_of(tmp_path, square=(128, 128)), tmp_path / "cache"
    bare, _ = encode(photos, micro_pipeline, cache)
    assert bare[0].views[0].mask is None
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 72, 128))  # 72 of 128 pixels are 4.5 of 8 latents
    mask.save(tmp_path / "square.mask.png")
    photos = read_photos(tmp_path).photos
    first, log = encode(photos, micro_pipeline, cache)
    assert log == [False]
    expected = torch.tensor([1, 1, 1, 1, 128 / 255, 0, 0, 0]).expand(1, 8, 8)
    torch.testing.assert_close(first[0].views[0].mask, expected)
    assert torch.equal(first[0].views[0].mean, bare[0].views[0].mean)
    second, log = encode(photos, micro_pipeline, cache)
    assert log == [True]
    assert torch.equal(second[0].views[0].mask, first[0].views[0].mask)
    flipped, _ = encode(photos, micro_pipeline, cache, flip=True, augmentations=2)
    assert torch.equal(flipped[0].views[0].mask, flipped[0].views[1].mask.flip(2))
    mask.paste(255, (0, 0, 128, 128))
    mask.save(tmp_path / "square.mask.png")
    changed, log = encode(read_photos(tmp_path).photos, micro_pipeline, cache)
    assert log == [False]
    assert (changed[0].views[0].mask == 1).all()
    assert encode(read_photos(tmp_path, masks=False).photos, micro_pipeline, cache)[1] == [True]


def test_pictures_are_encoded_in_the_sizes_that_are_asked_for(tmp_path, micro_pipeline):
    """Two photos of two buckets; a third picture in both of them."""
    photos = encode(folder_of(tmp_path, square=(70, 70), tall=(40, 90)), micro_pipeline, tmp_path / "cache")[
        0
    ]
    assert sizes_of(photos) == [(64, 64), (32, 96)]
    (tmp_path / "class").mkdir()
    other = folder_of(tmp_path / "class", wide=(90, 40))
    for size, photo in zip(sizes_of(photos), photos, strict=True):
        whole = PhotoSettings(augmentations=1, cache=tmp_path / "cache")
        (shown,) = encode_photos(
            other, [("a",)], micro_pipeline.vae, whole, resolution=64, step=32, seed=0, size=size
        )
        assert shown.bucket == photo.bucket


def test_no_caption_is_what_guidance_calls_none(micro_pipeline):
    """Zeros as in SDXL, or the empty prompt in a model whose pipeline says so: the negative of encode_prompts."""
    for zeros in (True, False):
        micro_pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        expected = encode_prompts(micro_pipeline, ["a dog"], guidance=5.0)["a dog"]
        found = encode_unconditional(micro_pipeline)
        assert torch.equal(found.embeds, expected.negative_text)
        assert torch.equal(found.pooled, expected.negative_pooled)
        assert found.embeds.any().item() is not zeros


def test_a_damaged_cache_entry_is_made_again(tmp_path, micro_pipeline):
    """Truncated or foreign cache files are no error and no danger."""
    photos, cache = folder_of(tmp_path, square=(64, 64)), tmp_path / "cache"
    good = encode(photos, micro_pipeline, cache)[0][0].views[0].mean
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    again, log = encode(photos, micro_pipeline, cache)
    assert log == [False]
    assert torch.equal(again[0].views[0].mean, good)


@pytest.mark.parametrize("place", ["first", "middle", "last", "header", "length"])
def test_a_cache_entry_with_one_changed_byte_is_made_again(tmp_path, micro_pipeline, place):
    """Among the numbers too, where the file format itself notices nothing."""
    photos, cache = folder_of(tmp_path, square=(64, 64)), tmp_path / "cache"
    good = encode(photos, micro_pipeline, cache)[0][0].views[0]
    (entry,) = cache.iterdir()
    content = bytearray(entry.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    at = {
        "first": begin,
        "middle": (begin + len(content)) // 2,
        "last": -1,
        "header": begin // 2,
        "length": 0,
    }[place]
    content[at] ^= 1
    entry.write_bytes(content)
    (again,), log = encode(photos, micro_pipeline, cache)
    assert log == [False]
    assert torch.equal(again.views[0].mean, good.mean) and torch.equal(again.views[0].std, good.std)
    assert encode(photos, micro_pipeline, cache)[1] == [True]


def test_another_entrys_file_is_not_used(tmp_path, micro_pipeline):
    """Somebody renames or copies files in the cache: an entry counts under its own name only."""
    photos, cache = folder_of(tmp_path, one=(64, 64), two=(64, 64)), tmp_path / "cache"
    first, _ = encode(photos, micro_pipeline, cache)
    one, two = cache.iterdir()
    two.write_bytes(one.read_bytes())
    again, log = encode(photos, micro_pipeline, cache)
    assert sorted(log) == [False, True]
    assert all(torch.equal(a.views[0].mean, b.views[0].mean) for a, b in zip(first, again, strict=True))


def test_hostile_cache_entries_are_made_again(tmp_path, micro_pipeline):
    """Sound files with other shapes, other names, NaN, no digest, or nothing but size."""
    photos, cache = folder_of(tmp_path, square=(64, 64)), tmp_path / "cache"
    encode(photos, micro_pipeline, cache)
    (entry,) = cache.iterdir()
    nan = torch.full((4, 8, 8), torch.nan)
    for tensors in (
        {"mean": nan, "std": nan.clone()},
        {"mean": torch.ones(()), "std": torch.ones(())},
        {"mean": torch.ones(4, 8, 8)},
        {},
    ):
        save_file(tensors, entry, {"digest": "0" * 32})
        assert encode(photos, micro_pipeline, cache)[1] == [False]
    with entry.open("r+b") as file:
        file.truncate(2**33)
    assert encode(photos, micro_pipeline, cache)[1] == [False]


def test_what_a_kill_left_in_the_cache_goes_after_a_day(tmp_path, micro_pipeline):
    photos, cache = folder_of(tmp_path, square=(64, 64)), tmp_path / "cache"
    cache.mkdir()
    for name, age in ((".a.safetensors.0badcafe", 2), (".b.safetensors.0badcafe", 0)):
        (cache / name).touch()
        os.utime(cache / name, (time.time() - age * 86_400,) * 2)
    encode(photos, micro_pipeline, cache)
    assert [path.name for path in cache.glob(".*")] == [".b.safetensors.0badcafe"]


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, micro_pipeline):
    """A file where the cache folder should be: encoding goes on without it."""
    photos = folder_of(tmp_path, square=(64, 64))
    (tmp_path / "cache").write_text("in the way")
    assert encode(photos, micro_pipeline, tmp_path / "cache")[1] == [False]


def test_random_crops_differ_and_share_a_bucket(tmp_path, micro_pipeline):
    """Four augmentations with random crop and flip: different latents of one size."""
    photos = folder_of(tmp_path, wide=(160, 80))
    (photo,), _ = encode(photos, micro_pipeline, tmp_path / "c", crop="random", flip=True, augmentations=4)
    assert len(photo.views) == 4
    assert {tuple(view.mean.shape) for view in photo.views} == {(4, 8, 8)}
    assert not torch.equal(photo.views[0].mean, photo.views[1].mean)
    assert len({view.time_ids for view in photo.views}) > 1


def test_latents_that_are_not_finite_are_named(tmp_path, micro_pipeline):
    """A VAE that overflows or is damaged would train on NaN; which of both, and what to do."""
    photos = folder_of(tmp_path, square=(64, 64))
    with torch.no_grad():
        micro_pipeline.vae.encoder.conv_in.bias.fill_(float("nan"))
    with pytest.raises(
        ModelError, match=r"not finite in torch.float32.*in encoder\.conv_in\.bias: it is damaged"
    ):
        encode(photos, micro_pipeline, tmp_path / "cache")
    micro_pipeline.vae.to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"not finite in torch.bfloat16.*sdxl-vae-fp16-fix"):
        encode(photos, micro_pipeline, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_texts_are_encoded_once_each(micro_pipeline):
    """Duplicates collapse; embeddings and pooled output are encode_prompt's own."""
    texts = encode_texts(micro_pipeline, ["a photo of sks", "a dog", "a photo of sks"])
    assert list(texts) == ["a photo of sks", "a dog"]
    with torch.no_grad():
        embeds, _, pooled, _ = micro_pipeline.encode_prompt("a dog", do_classifier_free_guidance=False)
    assert torch.equal(texts["a dog"].embeds, embeds[0])
    assert torch.equal(texts["a dog"].pooled, pooled[0])
    assert not torch.equal(texts["a dog"].pooled, texts["a photo of sks"].pooled)


def test_scaling_follows_the_vaes_config(micro_pipeline):
    """The scaling factor alone, or (x - mean) * factor / std where a model has them."""
    vae, ones = micro_pipeline.vae, torch.ones(4, 2, 2)
    torch.testing.assert_close(latent_scaling(vae)(ones), ones * vae.config.scaling_factor)
    vae.register_to_config(latents_mean=[0.5, 0, 0, 0], latents_std=[2.0, 1, 1, 1], scaling_factor=4.0)
    scaled = latent_scaling(vae)(ones)
    torch.testing.assert_close(scaled[:, 0, 0], torch.tensor([1.0, 4.0, 4.0, 4.0]))


def test_the_cache_lives_where_the_system_keeps_caches(monkeypatch, tmp_path):
    """XDG_CACHE_HOME is honoured; a folder in the settings wins."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(PhotoSettings().cache) == tmp_path / "coeffdiff" / "latents"
    assert cache_folder(PhotoSettings(cache=tmp_path / "here").cache) == tmp_path / "here"
