"""Arguments of a model's own forward that the trial of its plan did not give."""

from __future__ import annotations

import torch
from torch import nn

from hf_automodel_parallel.accelerate_plugin.untried_arguments import warn_of_untried


class Masked(nn.Module):
    def forward(self, input_ids, head_mask=None, labels=None, normalise=False):
        return input_ids


def test_each_is_named_once(caplog):
    model = Masked()
    warn_of_untried(model, frozenset({"input_ids"}))
    ids = torch.zeros(1, 2)
    model(ids, labels=ids, normalise=False, head_mask=None)
    assert not caplog.records
    model(ids, torch.ones(2))
    model(ids, head_mask=torch.ones(2))
    model(ids, normalise=True)
    assert [record.getMessage().partition("given ")[2].partition(",")[0] for record in caplog.records] == [
        "head_mask",
        "normalise",
    ]
