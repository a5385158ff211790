import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from bn_jax.folding import fold
from bn_jax.measures.gap import gap
from bn_jax.measures.layer_calls import layer_calls
from bn_jax.measures.population import batch_moments, exact_statistics
from bn_jax.measures.uncertainty import monte_carlo_batch_norm
from bn_jax.nnx import BatchNorm

X, LABELS = jnp.ones((4, 3)), jnp.zeros(4, int)
MODEL = nnx.Sequential(
    nnx.Linear(3, 3, rngs=nnx.Rngs(0)), BatchNorm(3, rngs=nnx.Rngs(0))
)
GRAPH, STATE = nnx.split(MODEL)


def predict(state, x):
    model = nnx.merge(GRAPH, state)
    model.eval()
    return model(x)


TOOLS = {
    "layer_calls": lambda v: layer_calls(predict, v, X),
    "batch_moments": lambda v: batch_moments(predict, v, X),
    "exact_statistics": lambda v: exact_statistics(predict, v, X, batch_size=2),
    "gap": lambda v: gap(predict, v, X, LABELS, measure_on=X, batch_size=2),
    "monte_carlo": lambda v: monte_carlo_batch_norm(
        predict, v, X, X, jax.random.key(0), num_passes=2, batch_size=2
    ),
    "fold": lambda v: fold(predict, v, X),
}


@pytest.mark.parametrize(
    ("variables", "given"),
    [
        (MODEL, "a Sequential of Flax NNX"),
        (STATE, "a State of Flax NNX"),
        (nnx.to_pure_dict(STATE), "a mapping of layers"),
        ([X], "a list"),
    ],
    ids=["module", "state", "dict", "list"],
)
@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_no_linen_models_is_refused_in_words(tool, variables, given):
    with pytest.raises(ValueError, match=f"^variables are {given}; .*a Linen model of"):
        TOOLS[tool](variables)
