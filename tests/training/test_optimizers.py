import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax.fields import ConfigError
from bn_jax.training.optimizers import OPTIMIZERS, make_optimizer, make_schedule


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields that optimizers read."""

    optimizer: str = "sgd"
    schedule: str = "constant"
    trained: str = "all"
    learning_rate: Any = 0.1
    weight_decay: Any = 0.0
    decay: str = "kernels"
    clip_norm: Any = 0.0
    rate_factors: str = ""
    seed: Any = 0
    epochs: int = 4
    of_optimizer: Any = None

    def traced(self, field):
        return (self.of_optimizer or {}) if field == "optimizer" else {}


PARAMS = {
    "dense": {"bias": np.float32([1, 2]), "kernel": np.float32([[3, -4], [5, 6]])},
    "norm": {"bias": np.float32([0, 1]), "scale": np.float32([1, 2])},
}
GRADIENTS = {
    "dense": {"bias": np.float32([0.1, 0.2]), "kernel": np.float32([[1, 2], [-3, 4]])},
    "norm": {"bias": np.float32([0.3, 0.3]), "scale": np.float32([0.4, -0.5])},
}


def steps(optimizer, number=3):
    """Updates of some steps with the same gradients, and the state after them."""

    @jax.jit
    def all_steps():
        state, every = optimizer.init(PARAMS), []
        for _ in range(number):
            updates, state = optimizer.update(GRADIENTS, state, PARAMS)
            every.append(updates)
        return every, state

    return all_steps()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Config(), optax.sgd(0.1)),
        (Config("sgd:momentum=0.9"), optax.sgd(0.1, momentum=0.9)),
        (
            Config("sgd:momentum=0.9,nesterov=true"),
            optax.sgd(0.1, momentum=0.9, nesterov=True),
        ),
        (Config("adam"), optax.adam(0.1)),
        (Config("adam:b1=0.5,epsilon=1e-5"), optax.adam(0.1, b1=0.5, eps=1e-5)),
        (
            Config("adamw:b2=0.9", weight_decay=0.2, decay="all"),
            optax.adamw(0.1, b2=0.9, weight_decay=0.2),
        ),
        (Config("rmsprop:decay=0.5"), optax.rmsprop(0.1, decay=0.5)),
        (
            Config("lamb", weight_decay=0.2, decay="all"),
            optax.lamb(0.1, weight_decay=0.2),
        ),
        (
            Config("lion:b2=0.5", weight_decay=0.2, decay="all"),
            optax.lion(0.1, b2=0.5, weight_decay=0.2),
        ),
        # A run of 4 epochs of 5 steps.
        (Config(schedule="cosine"), optax.sgd(optax.cosine_decay_schedule(0.1, 20))),
    ],
)
def test_names_are_those_of_optax_to_the_last_bit(config, expected):
    optimizer = make_optimizer(config, steps_per_epoch=5)
    chex.assert_trees_all_equal(steps(optimizer), steps(expected))


def test_frozen_parameters_add_one_part_after_the_optimizer():
    def update(updates, state, params=None):
        zero = jax.tree.map(np.zeros_like, PARAMS["dense"])
        return {**updates, "dense": zero}, state

    zeroed = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    optimizer = make_optimizer(
        Config("sgd:momentum=0.9", trained="norms"), steps_per_epoch=5
    )
    expected = optax.chain(optax.sgd(0.1, momentum=0.9), zeroed)
    chex.assert_trees_all_equal(steps(optimizer), steps(expected))


def test_traced_values_go_before_those_of_the_text():
    def first_and_second(rate, momentum, decay, clip):
        config = Config(
            "sgd:momentum=0.5",
            learning_rate=rate,
            weight_decay=decay,
            clip_norm=clip,
            of_optimizer={"momentum": momentum},
        )
        optimizer = make_optimizer(config, steps_per_epoch=5)
        state, every = optimizer.init(PARAMS), []
        for _ in range(2):
            updates, state = optimizer.update(GRADIENTS, state, PARAMS)
            every.append(updates["dense"]["kernel"])
        return every

    given = np.float32([[0.1, 0.9, 0, 99], [0.2, 0, 0.1, 99], [1, 0, 0, 1]]).T
    first, second = jax.jit(jax.vmap(first_and_second))(*given)
    g, p = GRADIENTS["dense"]["kernel"], PARAMS["dense"]["kernel"]
    # Squares: 0.05 + 30 + 0.18 + 0.41.
    clipped = g / np.sqrt(30.64)
    expected = [-0.1 * g, -0.2 * (g + 0.1 * p), -clipped]
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    expected[0] = expected[0] * 1.9
    np.testing.assert_allclose(second, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("decay", ["kernels", "all"])
def test_weight_decay_is_of_kernels_or_of_all(name, decay):
    config = Config(name, weight_decay=0.2, decay=decay)
    without = dataclasses.replace(config, weight_decay=0.0)
    (with_decay,), _ = steps(make_optimizer(config, steps_per_epoch=5), 1)
    (without,), _ = steps(make_optimizer(without, steps_per_epoch=5), 1)
    # SGD adds 0.2 p to the gradient, AdamW to the update before the rate scales it.
    for layer, params in PARAMS.items():
        for part, p in params.items():
            decays = decay == "all" or part == "kernel"
            np.testing.assert_allclose(
                with_decay[layer][part] - without[layer][part],
                -0.1 * 0.2 * p * decays,
                atol=1e-6,
            )


def test_decay_of_adam_is_part_of_the_gradient_that_it_normalises():
    config = Config("adam", weight_decay=100.0)
    (updates,), _ = steps(make_optimizer(config, steps_per_epoch=5), 1)
    # The first step of Adam is the sign of the gradient, here that of 100 p.
    np.testing.assert_allclose(
        updates["dense"]["kernel"], -0.1 * np.sign(PARAMS["dense"]["kernel"]), rtol=1e-4
    )


def test_clipping_measures_what_learns():
    config = Config(learning_rate=1.0, clip_norm=0.1, trained="norms")
    (updates,), _ = steps(make_optimizer(config, steps_per_epoch=5), 1)
    # Squares of norms: 0.18 + 0.41 = 0.59.
    for part, g in GRADIENTS["norm"].items():
        np.testing.assert_allclose(
            updates["norm"][part], -0.1 * g / np.sqrt(0.59), rtol=1e-5
        )
    assert not updates["dense"]["kernel"].any()
    loose = Config(clip_norm=0.8, trained="norms")
    (updates,), _ = steps(make_optimizer(loose, steps_per_epoch=5), 1)
    np.testing.assert_allclose(
        updates["norm"]["scale"], -0.1 * GRADIENTS["norm"]["scale"], rtol=1e-6
    )


def test_rate_factors_scale_decay_too():
    config = Config(
        weight_decay=0.2, decay="all", rate_factors="scale=0.5;norm=3", clip_norm=1e9
    )
    (updates,), _ = steps(make_optimizer(config, steps_per_epoch=5), 1)
    for path, factor in (("norm/scale", 0.5), ("norm/bias", 3), ("dense/kernel", 1)):
        layer, part = path.split("/")
        g, p = GRADIENTS[layer][part], PARAMS[layer][part]
        np.testing.assert_allclose(
            updates[layer][part], -0.1 * factor * (g + 0.2 * p), rtol=1e-5
        )


def test_nesterov_by_hand():
    config = Config("sgd:momentum=0.5,nesterov=true", learning_rate=1.0)
    (first, second), _ = steps(make_optimizer(config, steps_per_epoch=5), 2)
    g = GRADIENTS["dense"]["bias"]
    # v1 = g, v2 = 1.5 g; updates g + 0.5 v.
    np.testing.assert_allclose(first["dense"]["bias"], -1.5 * g, rtol=1e-6)
    np.testing.assert_allclose(second["dense"]["bias"], -1.75 * g, rtol=1e-6)


RUN = [0, 1, 2, 3, 5, 10, 12, 15, 19, 20, 30]  # of 20 steps


def half_cosine(share):
    return (1 + np.cos(np.pi * share)) / 2


@pytest.mark.parametrize(
    ("schedule", "rate_at"),
    [
        ("constant", lambda t: 1),
        ("constant:warmup_epochs=0.5", lambda t: min(t / 2, 1)),  # 2.5 steps, to even
        ("cosine", lambda t: half_cosine(min(t / 20, 1))),
        ("cosine:end=0.1", lambda t: 0.1 + 0.9 * half_cosine(min(t / 20, 1))),
        (
            "cosine:warmup_epochs=1",
            lambda t: t / 5 if t < 5 else half_cosine(min((t - 5) / 15, 1)),
        ),
        ("linear:end=0.5", lambda t: 1 - 0.5 * min(t / 20, 1)),
        (
            "linear:warmup_epochs=2",
            lambda t: t / 10 if t < 10 else 1 - min((t - 10) / 10, 1),
        ),
        ("steps", lambda t: 1 if t < 10 else 0.1 if t < 15 else 0.01),
        (
            "steps:warmup_epochs=1,at=0.6,factor=0.5",
            lambda t: t / 5 if t < 5 else 1 if t < 12 else 0.5,
        ),
        # Both shares, 12 and 12.2 steps, are the same step.
        ("steps:at=0.6x0.61,factor=0.5", lambda t: 1 if t < 12 else 0.25),
    ],
)
def test_schedules_have_their_closed_form(schedule, rate_at):
    config = Config(schedule=schedule, learning_rate=jnp.float32(0.3))
    rates = jax.jit(
        jax.vmap(lambda t: jnp.asarray(make_schedule(config, steps_per_epoch=5)(t)))
    )(jnp.array(RUN))
    np.testing.assert_allclose(rates, [0.3 * rate_at(t) for t in RUN], atol=1e-6)


def test_optimizer_follows_the_schedule_of_a_traced_rate():
    def updates(rate):
        config = Config(schedule="steps:at=0.25", epochs=2, learning_rate=rate)
        every, _ = steps(make_optimizer(config, steps_per_epoch=2), 2)
        return [update["dense"]["bias"] for update in every]

    first, second = jax.vmap(updates)(jnp.float32([0.5, 1.0]))
    g = GRADIENTS["dense"]["bias"]
    np.testing.assert_allclose(first, [-0.5 * g, -g], rtol=1e-6)
    np.testing.assert_allclose(second, [-0.05 * g, -0.1 * g], rtol=1e-5)


def initialized(config):
    """The shapes of the state of an optimizer; what does not fit is refused here."""
    return jax.eval_shape(make_optimizer(config, steps_per_epoch=1).init, PARAMS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "sgdm"}, r"expected one of sgd, adam, .*did you mean sgd"),
        ({"optimizer": "sgd:nesterov=true"}, r"without momentum; .*sgd:momentum=0.9"),
        ({"optimizer": "sgd:momentum=1.1"}, r"momentum=1.1; expected a number in \[0,"),
        ({"optimizer": "adam:b1=1"}, r"b1=1; expected a number in \[0, 1\)"),
        ({"optimizer": "adam:beta1=0.5"}, "no option 'beta1'; adam takes b1=0.9"),
        ({"schedule": "step"}, r"expected one of constant, .*did you mean steps"),
        ({"schedule": "cosine:end=2"}, r"end=2; expected a number in \[0, 1\]"),
        ({"schedule": "cosine:warmup_epochs=4"}, r"=4 in a run of 4 epochs; .*shorter"),
        ({"schedule": "constant:warmup_epochs=inf"}, r"=inf in a run of 4 epochs"),
        ({"schedule": "steps:at=0.7x0.3"}, r"at=0.7x0.3'; .*ascending order"),
        ({"schedule": "steps:at=1"}, r"at=1; .*each a number greater than 0 and less"),
        (
            {"schedule": "steps:warmup_epochs=2"},
            r"=2', with a first step down after 2 epochs; .*ends before",
        ),
        ({"trained": "norm"}, r"expected one of all, norms, random"),
        ({"trained": "norms:also=dense3"}, r"expected a layer of the model: dense, no"),
        ({"rate_factors": "gain=2"}, r"'gain', which matches no parameter"),
    ],
)
def test_bad_choices_are_refused_in_one_line(changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        initialized(Config(**changes))
    assert "\n" not in str(error.value)


def test_choices_that_fit_are_not_refused():
    for name in OPTIMIZERS:
        config = Config(name, trained="random", rate_factors="norm=2", clip_norm=1.0)
        assert initialized(config)


def test_averages_that_are_parameters_move_by_their_gradient_alone():
    config = Config(
        optimizer="adamw",
        weight_decay=0.1,
        decay="all",
        clip_norm=0.5,
        rate_factors="norm=0.1",
        trained="all:gamma=false",
    )
    optimizer = make_optimizer(config, steps_per_epoch=1)
    affine = {"scale": jnp.ones(2), "bias": jnp.ones(2)}
    plain = {"norm": affine, "dense": {"kernel": jnp.ones((2, 2))}}
    products = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    params = {**plain, "norm": {**affine, "moving_products": products}}

    def step(params):
        gradients = jax.tree.map(lambda p: 10 * p, params)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    moved = step(params)
    np.testing.assert_array_equal(moved["norm"].pop("moving_products"), -9 * products)
    # To the others it is as if there were none.
    chex.assert_trees_all_equal(moved, step(plain))
    np.testing.assert_array_equal(moved["norm"]["scale"], 1)
    assert (moved["norm"]["bias"] != 1).all()
