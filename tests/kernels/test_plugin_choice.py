"""Which layers take the plugin, from times alone; no device has given any yet."""

from __future__ import annotations

import pytest
from igate_edge.kernels.plugin_choice import RUNS, Times, choose, gather

from igate_edge.errors import InputError

SLOW, FAST = (1.0, 1.02, 0.99, 1.01, 1.0), (0.8, 0.81, 0.79, 0.8, 0.8)


def test_only_what_is_faster_takes_the_plugin() -> None:
    times = {"fast": Times(SLOW, FAST), "slow": Times(FAST, SLOW), "same": Times(SLOW, SLOW)}
    choice = choose(times)
    assert choice.layers == ("fast",)
    assert choice.why == {
        "fast": "plugin 0.8000 ms, TensorRT 1.0000 ms: the plugin is faster",
        "slow": "plugin 1.0000 ms, TensorRT 0.8000 ms: not faster by 5%",
        "same": "plugin 1.0000 ms, TensorRT 1.0000 ms: not faster by 5%",
    }


def test_the_margin_decides() -> None:
    times = {"a": Times(SLOW, tuple(ms * 0.96 for ms in SLOW))}
    assert choose(times, margin=0.05).layers == ()
    assert choose(times, margin=0.03).layers == ("a",)


def test_noise_is_no_gain() -> None:
    """The median gains 20 %, but a quarter of the plugin's runs are as slow as the engine's quick ones."""
    choice = choose({"a": Times((0.7, 1.0, 1.0, 1.3), (0.6, 0.8, 0.8, 1.1))})
    assert choice.layers == ()
    assert choice.why["a"].endswith("their runs overlap")


def test_too_few_runs_decide_nothing() -> None:
    few = Times(SLOW[: RUNS - 1], FAST)
    assert choose({"a": few, "b": Times(SLOW, ())}).layers == ()
    assert choose({"b": Times(SLOW, ())}).why["b"] == "not compared: 5 and 0 runs, 4 needed"
    choice = choose({"a": Times(SLOW, (*FAST, 0.0))})
    assert (choice.layers, choice.why["a"]) == ((), "not compared: a run of 0 ms was not measured")
    assert choose({}).layers == ()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_time_must_be_a_time(bad: float) -> None:
    with pytest.raises(InputError, match="not a number of milliseconds: a:"):
        choose({"a": Times((*SLOW, bad), FAST)})


def test_a_margin_must_be_a_share() -> None:
    with pytest.raises(InputError, match="not a margin"):
        choose({}, margin=1.0)


def test_layers_are_found_by_name_with_their_reformats() -> None:
    own = [
        ("conv1/conv1 + conv1/relu", 0.5),
        ("Reformatting CopyNode for Input Tensor 0 to conv1/conv1 + conv1/relu", 0.25),
        ("conv10/conv10", 2.0),
        ("pool", 9.0),
    ]
    ours = [("conv1", 0.5), ("Reformatting CopyNode for Output Tensor 0 to conv1", 0.125), ("conv10", 1.0)]
    assert gather(["conv1", "conv10"], [own, own], [ours]) == {
        "conv1": Times((0.75, 0.75), (0.625,)),
        "conv10": Times((2.0, 2.0), (1.0,)),
    }


def test_a_name_with_a_slash_is_the_longest_one() -> None:
    run = [("site/a/conv", 1.0), ("site/b", 3.0)]
    assert gather(["site", "site/a"], [run], [run]) == {
        "site": Times((3.0,), (3.0,)),
        "site/a": Times((1.0,), (1.0,)),
    }


def test_what_tensorrt_fused_over_two_layers_is_not_compared() -> None:
    run = [("a/conv || b/conv", 1.0), ("a/relu", 0.1), ("c/conv", 1.0)]
    assert gather("abc", [run], [run]) == {"a": Times((), ()), "b": Times((), ()), "c": Times((1.0,), (1.0,))}


def test_a_layer_that_one_run_lacks_is_not_compared() -> None:
    assert gather("a", [[("a/conv", 1.0)], []], [[("a", 1.0)]])["a"] == Times((), (1.0,))


@pytest.mark.parametrize("margin", [None, "0.1", float("nan"), 1.0, -0.1, True])
def test_a_margin_that_is_none(margin: object) -> None:
    with pytest.raises(InputError, match="not a margin"):
        choose({}, margin)  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [None, [], {"a": None}, {"a": (1.0,)}])
def test_times_that_are_none(times: object) -> None:
    with pytest.raises(InputError, match="not the times of layers"):
        choose(times)  # type: ignore[arg-type]


@pytest.mark.parametrize("ms", [None, "1", float("inf"), -1.0])
def test_a_time_that_is_no_number(ms: object) -> None:
    with pytest.raises(InputError, match="a: .*measure again"):
        choose({"a": Times((1.0,), (ms,))})  # type: ignore[arg-type]
