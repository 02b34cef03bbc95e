"""Ranks that die or do not answer fail one call; the next one gets new ranks."""

import os
import time

import pytest
from rank_pool import RankError, Ranks

pytestmark = pytest.mark.cpu_only


def number(rank, world_size):
    return rank, os.getpid()


def die(rank, world_size, who):
    if rank == who:
        os._exit(7)
    return rank


def sleep(rank, world_size):
    time.sleep(60 * rank)


def test_the_next_call_gets_new_ranks():
    pool = Ranks(2)
    try:
        before = pool.run(number)
        for who in (0, 1):
            with pytest.raises(RankError, match=rf"rank {who} of 2 died; exit codes, .*\b7\b"):
                pool.run(die, who)
        after = pool.run(number)
        assert [rank for rank, _ in after] == [0, 1]
        assert not {pid for _, pid in before} & {pid for _, pid in after}
        with pytest.raises(RankError, match="rank 1 of 2 did not answer within 1 s"):
            pool.run(sleep, timeout=1)
        assert len(pool.run(number)) == 2
    finally:
        pool.close()
