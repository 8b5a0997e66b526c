"""How many connections a limit of open files leaves."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.gateway import open_files
from diptych.cluster.gateway.http_server import SPARE
from diptych.cluster.gateway.open_files import HEADROOM, OWN_FILES, connections_within, raise_file_limit
from diptych.messages.errors import ClusterError

counts = st.integers(1, 1 << 20)


@given(asked=counts, num_files=counts)
def test_all_that_may_be_open_are_files_that_may(asked, num_files):
    if num_files <= SPARE + OWN_FILES:
        with pytest.raises(ClusterError, match=f" {num_files} open files"):
            connections_within(asked, num_files)
        return
    allowed = connections_within(asked, num_files)
    assert 1 <= allowed <= asked
    assert allowed + SPARE + OWN_FILES <= num_files
    assert allowed == asked or allowed + SPARE + OWN_FILES == num_files


def test_fewer_than_asked_are_told_of(caplog):
    with caplog.at_level(logging.WARNING):
        connections_within(1000, 2000)
        assert caplog.text == ""
        connections_within(1000, 1024)
    assert f"{1024 - SPARE - OWN_FILES} connections at a time, not 1000" in caplog.text


@given(asked=counts, soft=counts, more=st.integers(0, 1 << 20))
def test_the_limit_is_raised_as_far_as_needed_and_allowed(asked, soft, more):
    limits = [(soft, soft + more)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_files.resource, "getrlimit", lambda what: limits[-1])
        patch.setattr(open_files.resource, "setrlimit", lambda what, new: limits.append(new))
        assert raise_file_limit(asked) == limits[-1][0]
    assert limits[-1] == (max(soft, min(soft + more, asked + SPARE + HEADROOM)), soft + more)
