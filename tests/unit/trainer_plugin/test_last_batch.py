"""The last batch of an evaluation: each rank gets its own samples, and as many batches as the others."""

from types import SimpleNamespace

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from hf_automodel_parallel.accelerate_plugin.last_batch import own_rows


@pytest.mark.parametrize("split", [False, True], ids=["batches_of_a_rank", "split_batches"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_samples_that_fill_up_the_last_batch_are_left_out(ranks, split):
    for samples in range(1, 20):
        for rows in (1, 2, 3):
            batches = BatchSampler(range(samples), rows * ranks if split else rows, drop_last=False)
            left = samples % (rows * ranks) or rows * ranks
            seen: list[int] = []
            for rank in range(ranks):
                shard = BatchSamplerShard(batches, ranks, rank, split_batches=split)
                filled = list(shard)
                with own_rows(SimpleNamespace(batch_sampler=shard)):
                    cut = list(shard)
                own = min(max(left - rows * rank, 0), rows)
                assert len(cut) == len(filled) and cut[:-1] == filled[:-1], (samples, rows, rank)
                assert cut[-1] == filled[-1][: own or rows], "a rank without samples of its own runs a full batch"
                assert list(shard) == filled, "afterwards the sampler is as it was"
                seen += [index for batch in cut[: len(cut) if own else -1] for index in batch]
            assert sorted(seen) == list(range(samples)), (samples, rows)
