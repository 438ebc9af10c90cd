"""What the options of `edgekd bench` ask of the stopwatch."""

import pytest

from edgekd.bench.bench import How
from edgekd.pipeline import bench
from edgekd.records import EdgeKDError


def test_ratios_are_to_be_known_within_five_percent_and_ten_if_it_must_be_quick():
    assert bench.how_of(10, None, quick=False, within=None) == How(seconds=10, within=5)
    quick = bench.how_of(3, None, quick=True, within=None)
    assert (quick.within, quick.seconds, quick.least, quick.enough) == (10, 3, 200, 200)
    assert quick.throughput
    assert (quick.idle_s, quick.cold, quick.stages) == ((), 0, False)
    assert bench.how_of(3, None, quick=True, within=2.5).within == 2.5
    assert bench.how_of(3, None, quick=False, within=20).within == 20


def test_a_long_watch_takes_all_of_its_seconds():
    for quick in (True, False):
        how = bench.how_of(10, 600, quick=quick, within=None)
        assert (how.seconds, how.within) == (600, None)


def test_rounds_of_two_end_by_their_seconds():
    """They are compared round by round: `compare` says when that is enough."""
    how = bench.a_round(2, None)
    assert (how.seconds, how.within, how.throughput) == (2, None, False)
    assert bench.a_round(2, 60).seconds == 60


@pytest.mark.parametrize(
    ("given", "message"),
    [({"against": "onnxruntime", "host": "pi"}, "leave --host out"),
     ({"against": "onnxruntime", "within": 5.0}, "--rounds and --tolerance: leave --within out"),
     ({"duration": 60.0, "within": 5.0}, "--duration takes all of its seconds: leave --within")],
)  # fmt: skip
def test_options_that_exclude_each_other(given, message):
    none = dict.fromkeys(("against", "host", "within", "duration"))
    bench.check_options(**none)
    with pytest.raises(EdgeKDError, match=message):
        bench.check_options(**none | given)
