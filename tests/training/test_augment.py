import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bn_jax.fields import ConfigError
from bn_jax.training import augment
from bn_jax.training.augment import AUGMENTATIONS, CropAndFlip


def numbered(n, h, w, c=1):
    """Images without a 0, in which each pixel has a value of its own."""
    pixels = 1 + np.arange(h * w * c).reshape(h, w, c)
    return np.stack([pixels + 1000 * i for i in range(n)]).astype(np.int32)


def found(image, crop, padding):
    """Offsets and flip of a crop, searched for in all crops that there are."""
    p = padding
    padded = np.pad(image, ((p, p), (p, p), (0, 0)))
    h, w = crop.shape[:2]
    return [
        (top, left, flip)
        for top in range(padded.shape[0] - h + 1)
        for left in range(padded.shape[1] - w + 1)
        for flip in (False, True)
        if np.array_equal(
            padded[top : top + h, left : left + w][:, :: -1 if flip else 1], crop
        )
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_each_image_is_a_crop_of_its_padded_self(dtype):
    images = (numbered(20, 5, 7, 2) % 251 + 1).astype(dtype)
    changed = np.asarray(jax.jit(CropAndFlip(padding=2))(jax.random.key(0), images))
    assert changed.shape == images.shape and changed.dtype == dtype
    places = [found(i, c, 2) for i, c in zip(images, changed, strict=True)]
    assert all(len(place) == 1 for place in places)
    assert len(set(sum(places, []))) > 10  # not the same for all


def test_all_offsets_occur_alike_and_half_are_flipped():
    # Expected number of each of 3 x 3 offsets: 2000 / 9 = 222, sd sqrt(222 * 8/9) = 14.
    n, image = 2000, numbered(1, 3, 3)
    images = np.repeat(image, n, axis=0)
    changed = np.asarray(jax.jit(CropAndFlip(padding=1))(jax.random.key(1), images))
    crops, counts = np.unique(changed, axis=0, return_counts=True)
    places = [found(image[0], crop, 1)[0] for crop in crops]
    assert len(places) == 18
    number = np.zeros((3, 3, 2))
    for (top, left, flip), count in zip(places, counts, strict=True):
        number[top, left, int(flip)] = count
    np.testing.assert_allclose(number.sum(-1), n / 9, atol=5 * 14)
    assert abs(number[..., 1].sum() / n - 0.5) < 5 * 0.5 / n**0.5
    # Flips do not depend on offsets.
    np.testing.assert_allclose(number, n / 18, atol=5 * 10.5)


def test_key_and_position_decide():
    images, change = numbered(8, 6, 6), jax.jit(CropAndFlip(padding=3))
    key = jax.random.key(2)
    whole = np.asarray(change(key, images))
    np.testing.assert_array_equal(whole, change(key, images))
    assert not np.array_equal(whole, change(jax.random.key(3), images))
    # A part of the batch is changed as in the whole, wherever it is computed.
    np.testing.assert_array_equal(whole[3:], change(key, images[3:], first=3))
    parts = jax.pmap(
        lambda part: change(key, part, first=2 * lax.axis_index("i")), axis_name="i"
    )(images.reshape(4, 2, 6, 6, 1))
    np.testing.assert_array_equal(whole, np.reshape(parts, whole.shape))


def test_changes_are_the_same_in_loops_under_vmap_and_over_a_mesh():
    images, change = numbered(8, 6, 6), jax.jit(CropAndFlip(padding=2, size=5))
    keys = jax.random.split(jax.random.key(4), 3)
    expected = np.stack([change(key, images) for key in keys])
    mapped = jax.jit(jax.vmap(change, in_axes=(0, None)))(keys, images)
    np.testing.assert_array_equal(expected, mapped)

    @jax.jit
    def loop(keys, images):
        def body(carry):
            i, changed = carry
            return i + 1, changed.at[i].set(change(keys[i], images))

        zeros = jnp.zeros(expected.shape, images.dtype)
        return lax.while_loop(lambda carry: carry[0] < 3, body, (0, zeros))[1]

    np.testing.assert_array_equal(expected, loop(keys, images))
    mesh = jax.make_mesh((4,), ("batch",), (AxisType.Auto,))
    by_batch = NamedSharding(mesh, PartitionSpec("batch"))
    sharded = jax.jit(change, out_shardings=by_batch)(
        keys[0], jax.device_put(images, by_batch)
    )
    np.testing.assert_array_equal(expected[0], sharded)


def test_evaluation_sees_the_middle_of_the_same_size():
    images = numbered(2, 6, 8)
    same = CropAndFlip(padding=4)
    np.testing.assert_array_equal(same.centre(images), images)
    smaller = CropAndFlip(padding=2, size=4)
    assert (smaller.side(6), same.side(6)) == (4, 6)
    np.testing.assert_array_equal(smaller.centre(images), images[:, 1:5, 2:6])
    changed = jax.eval_shape(smaller, jax.random.key(0), images)
    assert changed.shape == (2, 4, 4, 1)
    # 9 x 9 of 10 x 12 pixels, padding included: no row above and one column at the left
    # are left out.
    expected = np.pad(images, ((0, 0), (2, 1), (1, 0), (0, 0)))
    larger = CropAndFlip(padding=2, size=9)
    np.testing.assert_array_equal(larger.centre(images), expected)


def test_without_flip_and_padding_only_the_place_changes():
    images = numbered(30, 4, 4)
    change = jax.jit(CropAndFlip(padding=0, size=3, flip=False))
    changed = change(jax.random.key(5), images)
    for image, crop in zip(images, np.asarray(changed), strict=True):
        ((_, _, flip),) = found(image, crop, 0)
        assert not flip
    nothing = jax.jit(CropAndFlip(padding=0, flip=False))(jax.random.key(5), images)
    np.testing.assert_array_equal(nothing, images)


def test_names_make_hashable_functions():
    made = AUGMENTATIONS.make("crop_and_flip:size=24,flip=false")
    assert made == CropAndFlip(4, 24, False) and hash(made) == hash(
        CropAndFlip(4, 24, False)
    )
    assert AUGMENTATIONS.canonical("crop_and_flip:padding=4,size=none") == (
        "crop_and_flip"
    )
    images = numbered(2, 3, 3)
    none = AUGMENTATIONS.make("none")
    assert none(jax.random.key(0), images) is images is none.centre(images)
    assert none.side(3) == 3
    augment.AUGMENTATIONS.make("none").check((1, 1, 1))
    augment.AUGMENTATIONS.make("crop_and_flip:size=36").check((28, 28, 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("crop", r"expected one of none, crop_and_flip"),
        ("crop_and_flip:size=37", r"size=37.*28 x 28 .*padding=4; .* at most 36$"),
        ("crop_and_flip:size=0", r"size=0; expected an integer at least 1, or none"),
        ("crop_and_flip:padding=-1", r"padding=-1; expected an integer 0 or greater"),
        ("crop_and_flip:padding=28", r"padding=28.*28 pixels.*expected less padding$"),
        ("crop_and_flip:padding=4,size=4", r"crops of 4 pixels.*less padding$"),
        ("crop_and_flip:flip=maybe", r"flip=maybe; expected true or false"),
        ("none:padding=2", r"none takes no options"),
    ],
)
def test_bad_augmentations_are_refused_in_one_line(text, words):
    with pytest.raises(ConfigError, match=words) as error:
        augment.AUGMENTATIONS.make(text).check((28, 28, 1))
    assert "\n" not in str(error.value)
