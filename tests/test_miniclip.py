"""Tests of miniclip.py: pictures, captions, loss, a few steps of training, and the committed weights."""

import colorsys
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import miniclip
from miniclip import COLOURS, PAINTS, SAYINGS, SHAPES, SIDE, TEMPLATES, WORDS
from openvocab import load_clip

WEIGHTS = Path(miniclip.__file__).with_name("clip_small.pt")
CHANCE = {name: 1 / len(words) for name, words in WORDS.items()}


@pytest.fixture(scope="module")
def pictures():
    """200 pictures of a seed that no training uses: image, mask, attributes."""
    return miniclip.make_pictures(200, (7, 7, 7))


def test_pictures_are_the_same_for_a_seed_and_others_for_another():
    one, two, three = (miniclip.make_pictures(6, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two))
    assert not np.array_equal(one[0], three[0])


def test_pictures_have_the_documented_shapes_and_types(pictures):
    image, mask, attributes = pictures
    assert image.shape == (200, SIDE, SIDE, 3) and image.dtype == np.uint8
    assert mask.shape == (200, SIDE, SIDE) and mask.dtype == bool
    assert attributes.shape == (200, 3) and (attributes >= 0).all()
    assert (attributes < [len(SHAPES), len(COLOURS), len(PAINTS)]).all()


def test_every_shape_shows_on_a_plain_background():
    for index in range(len(SHAPES)):
        image, mask, _ = miniclip.make_picture(np.random.default_rng(3), index)
        assert 0.02 < mask.mean() < 0.98, list(SHAPES)[index]
        assert len(np.unique(image[0][~mask[0]], axis=0)) < (~mask[0]).sum()  # one colour, but for the object's edge


def test_the_hue_of_an_object_is_that_of_its_colour(pictures):
    image, mask, attributes = pictures
    for picture, inside, (_, colour, _) in zip(image, mask, attributes):
        hue, saturation, _ = list(COLOURS.values())[colour]
        seen_hue, seen_saturation, _ = colorsys.rgb_to_hsv(*picture[inside].mean(0) / 255)
        if saturation == 0:
            assert seen_saturation < 0.05
        else:
            assert seen_saturation > 0.2 and abs((seen_hue - hue + 0.5) % 1 - 0.5) < 0.03


def test_plain_is_flat_and_every_other_texture_has_both_colours():
    x, y = np.random.default_rng(0).uniform(0, 60, (2, 20_000))
    for name, *_ in PAINTS:
        share = miniclip.texture(name, x, y)
        assert share.min() >= 0 and share.max() <= 1
        assert share.std() == 0 if name == "plain" else 0.2 < share.mean() < 0.7 and share.std() > 0.3, name
    with pytest.raises(KeyError, match="choose from"):
        miniclip.texture("stripes", x, y)


def test_captions_name_what_they_should_and_nothing_else(pictures):
    rng = np.random.default_rng(0)
    for number, attributes in enumerate(pictures[2]):
        saying = SAYINGS[number % len(SAYINGS)]
        tokens = miniclip.caption(attributes, saying, TEMPLATES[number % len(TEMPLATES)], rng).split()
        for told, actual, words in zip(saying, attributes, WORDS.values()):
            named = [i for i, names in enumerate(words) if any(name in tokens for name in names)]
            assert named == ([actual] if told else []), tokens


def test_truth_agrees_with_a_loop(pictures):
    attributes = pictures[2][:40]
    for saying in SAYINGS:
        loop = [[all(a == b for a, b, told in zip(one, other, saying) if told) for other in attributes]
                for one in attributes]
        assert np.array_equal(miniclip.truth(attributes, saying), loop)


def test_loss_is_the_usual_one_where_every_caption_is_true_of_one_picture():
    a, b = F.normalize(torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    logits, target = 9 * a @ b.T, torch.arange(8)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert torch.allclose(miniclip.contrastive_loss(a, b, 9, torch.eye(8, dtype=torch.bool)), expected)
    same = torch.ones(8, 8, dtype=torch.bool)
    assert miniclip.contrastive_loss(a[:1].expand(8, -1), b[:1].expand(8, -1), 9, same).abs() < 1e-6


def test_augmentation_keeps_shape_and_range(pictures):
    model, _ = miniclip.build()
    x = miniclip.to_input(pictures[0][:32], model)
    y = miniclip.augment(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape and y.isfinite().all() and y.abs().max() < 5


def test_a_few_steps_lower_the_loss(pictures):
    torch.manual_seed(0)
    model, tokenizer = miniclip.build()
    losses = miniclip.train(model, tokenizer, pictures[0], pictures[2], steps=12, seed=0, batch=32)
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1


def test_committed_weights_are_small_and_fit_open_clips_model():
    assert os.path.getsize(WEIGHTS) <= 8e6
    state = torch.load(WEIGHTS, weights_only=True)
    model, _ = miniclip.build()
    model.load_state_dict(state)  # strict: every key matches
    assert all((v.isfinite().all() and (v.dtype == torch.half) == v.is_floating_point()) or v.dtype == torch.int64
               for v in state.values())
    assert 1e6 <= sum(p.numel() for p in model.visual.parameters()) <= 1.5e6


def test_committed_weights_know_fresh_pictures_by_words(pictures):
    accuracy = miniclip.zero_shot(*load_clip(miniclip.NAME, WEIGHTS), pictures[0], pictures[2])
    assert all(accuracy[name] > 3 * CHANCE[name] for name in WORDS), accuracy  # by over nine standard deviations
