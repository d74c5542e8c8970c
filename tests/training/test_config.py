"""Settings: what they decide, what is left to the backbone and the recipe, and which are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_training import AVAILABLE, TINY
from torch import nn

from igate_edge.backbones import BACKBONES
from igate_edge.errors import InputError
from igate_edge.training.config import TrainConfig, digest, make_backbone, make_tasks
from igate_edge.training.stages import penalty


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", BACKBONES)
def test_without_a_width_a_backbone_has_its_own(name: str) -> None:
    with torch.device("meta"):
        assert parameters(make_backbone(TrainConfig(backbone=name))) == parameters(BACKBONES[name]())  # type: ignore[operator]


def test_width_is_what_the_backbone_counts() -> None:
    with torch.device("meta"):
        half = make_backbone(TrainConfig(backbone="mobilenet_v2", width=0.5))
        assert parameters(half) == parameters(BACKBONES["mobilenet_v2"](width=0.5))  # type: ignore[operator]
        assert make_backbone(TrainConfig(width=24)).conv1.weight.shape[0] == 24  # type: ignore[union-attr]
        assert make_backbone(TrainConfig(backbone="pyramid_net", width=6)).down4[0].out_channels == 12  # type: ignore


@pytest.mark.parametrize(
    ("backbone", "width", "words"),
    [
        ("densenet_tiny", 8, "densenet_tiny takes no width.*drop it"),
        ("efficientnet_lite0", 1.0, "efficientnet_lite0 takes no width"),
        ("mobilenet_v2", 32, "multiplier.*got 32.*0.05 to 4"),
        ("resnet18", 0.5, "channels of the first stage: got 0.5.*whole number"),
        ("resnet50", 24.5, "whole number"),
    ],
)
def test_a_width_that_the_backbone_cannot_have(backbone: str, width: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        TrainConfig(backbone=backbone, width=width)


#: What runs stored before budget_kind, sparsity_weight, gate_lr and single_steps existed.
STORED: dict[str, Any] = json.loads(
    """{"tasks": ["semseg", "depth", "normals"], "backbone": "resnet18", "width": 32, "size": [96, 128], "batch": 16,
    "lr": 0.002, "fork_lr": 0.001, "search_lr": 0.0003, "weight_decay": 0.01, "plain_steps": 1500, "fork_steps": 300,
    "search_steps": 300, "final_steps": 1500, "balance_steps": 300, "budget": 0.25, "granule": 0, "tie": "stage",
    "balance": "gradnorm", "weights": {}, "class_weights": false, "recipe": "forked", "seed": 0, "head_width": 32,
    "log_every": 20, "checkpoint_every": 200, "label_stride": 2}"""
)


def test_stored_settings_stay_valid_and_keep_their_key() -> None:
    config = TrainConfig.from_json(STORED)
    assert config.as_json() == STORED and digest(config.as_json()) == digest(STORED)
    assert (config.kind, config.strength, config.optim(0.1).gate_lr) == ("hard", 1.0, 0.02)


def test_round_trip() -> None:
    for config in (TINY, TrainConfig(), replace(TINY, budget_kind="l1", gate_lr=0.5, budget={"semseg": 0.1})):
        assert TrainConfig.from_json(json.loads(json.dumps(config.as_json()))) == config


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"stepz": 3}, "unknown setting stepz"),
        ({"backbone": "vgg"}, "unknown backbone 'vgg'"),
        ({"budget_kind": "soft"}, "unknown budget_kind 'soft'.*hard, hinge, l1"),
        ({"budget": 1.5}, "share of channels: 1.5"),
        ({"lr": "0.1"}, "setting lr has a wrong type: '0.1'"),
        ({"batch": True}, "setting batch has a wrong type"),
        ({"gate_lr": -1.0}, "must be positive: gate_lr -1.0"),
        ({"size": [64]}, "size or batch"),
        ({"size": ["64", "64"]}, "setting size holds a wrong type"),
        ({"tasks": [1]}, "setting tasks holds a wrong type"),
        ({"budget": {"depth": "x"}}, "setting budget holds a wrong type"),
        ({"weights": {"depth": True}}, "setting weights holds a wrong type"),
        ({"weights": {"depth": math.nan}}, "0 or more: the weight of depth nan"),
        ({"lr": math.inf}, "must be positive: lr inf"),
        ({"fork_lr": -1}, "must be positive: fork_lr -1"),
        ({"plain_steps": 0}, "must be positive: plain_steps 0"),
        ({"log_every": 0}, "must be positive: log_every 0"),
        ({"weight_decay": -1}, "0 or more: weight_decay -1"),
        ({"seed": 2**63}, "seed is out of range: 9223372036854775808"),
        ({"width": math.nan}, "channels of the first stage: got nan"),
    ],
)
def test_wrong_settings(data: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        TrainConfig.from_json(data)


def test_tasks_that_the_data_lacks() -> None:
    with pytest.raises(InputError, match="no task edges: it has semseg"):
        make_tasks(TrainConfig(tasks=("edges",)), AVAILABLE)
    with pytest.raises(InputError, match="a weight for no task: dept"):
        make_tasks(TrainConfig(weights={"dept": 2.0}), AVAILABLE)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "HardFraction(target=0.25, weight=1.0, cost='uniform', ramp=0.6)"),
        ({"recipe": "paper", "sparsity_weight": 3.0}, "SparsityHinge(tau=0.25, weight=3.0, ramp=0.0)"),
        ({"budget_kind": "l1", "sparsity_weight": 0.5}, "L1Gates(weight=0.5, ramp=0.0)"),
        ({"recipe": "paper", "budget_kind": "hard"}, "HardFraction(target=0.25, weight=1.0, cost='uniform', ramp=0.6)"),
    ],
)
def test_every_budget_can_be_chosen(settings: dict[str, Any], kind: str) -> None:
    chosen: Any = penalty(TrainConfig(**settings))(0.5)
    assert repr(chosen.func) == kind and chosen.keywords == {"progress": 0.5}
