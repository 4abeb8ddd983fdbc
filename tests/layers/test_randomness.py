"""Random numbers of a forward that depend on nothing else."""

import torch

from bnguard.layers.randomness import RandomStream, seeded

CPU = torch.device("cpu")


def test_a_stream_goes_on_where_it_was_left_and_disturbs_no_other():
    torch.manual_seed(7)
    whole = torch.rand(4)
    outside = torch.get_rng_state()
    stream, drawn = RandomStream(7, CPU), []
    for _ in range(2):
        with stream.drawn_from():
            drawn.append(torch.rand(2))
        with seeded(1, CPU):
            torch.rand(5)
    assert torch.equal(torch.cat(drawn), whole)
    assert torch.equal(torch.get_rng_state(), outside)


def test_a_stream_knows_whether_it_was_drawn_from():
    with seeded(3, CPU) as stream:
        pass
    assert stream.is_untouched
    with seeded(3, CPU) as stream:
        torch.rand(1)
    assert not stream.is_untouched
