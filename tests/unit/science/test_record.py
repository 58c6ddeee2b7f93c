"""A record's identity is what was learnt."""

import dataclasses

import numpy as np
import pytest
from kiridashi.errors import InputError
from kiridashi_server.bank.record import decode_descriptor, decode_scores, encode_arrays
from tiny_science import make_record


def test_the_id_does_not_depend_on_when_or_how_fast():
    assert make_record().id == make_record(created="2027-05-05T00:00:00+00:00", seconds=99.0).id


@pytest.mark.parametrize(
    "change",
    [
        {"task": "other"},
        {"fingerprint": "other"},
        {"layout": "other"},
        {"head": np.ones((3, 4))},
        {"scores": {"a": np.arange(4, dtype=np.float32), "b": np.zeros(6, dtype=np.float32)}},
    ],
)
def test_the_id_depends_on_what_was_learnt(change):
    assert make_record(**change).id != make_record().id


def test_arrays_survive_encoding_and_their_order_does_not_matter():
    record = make_record()
    blobs = encode_arrays(record)
    assert {name: values.tolist() for name, values in decode_scores(blobs["scores"]).items()} == {
        name: values.tolist() for name, values in record.scores.items()
    }
    assert decode_descriptor(blobs["descriptor"])["head_weight"].tolist() == record.head_weight.tolist()
    reordered = dataclasses.replace(record, scores=dict(reversed(record.scores.items())))
    assert encode_arrays(reordered) == encode_arrays(record)


def test_arrays_that_are_none_are_refused():
    with pytest.raises(ValueError, match="SafetensorError"):
        decode_scores(b"nonsense")


def test_contradictory_shapes_are_refused():
    with pytest.raises(InputError, match="head_bias"):
        dataclasses.replace(make_record(), head_bias=np.zeros(7, dtype=np.float32))
    with pytest.raises(InputError, match="no scores"):
        dataclasses.replace(make_record(), scores={})
