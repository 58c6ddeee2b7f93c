"""The science on the real backbone and a shipped task: bank, evidence, composition, cut, recovery, with few steps."""

import numpy as np
import pytest
from kiridashi_server.amp.learning import ScoreSettings
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.learning import learn_record
from kiridashi_server.compose.composition import compose
from kiridashi_server.compose.selection import select
from kiridashi_server.graph.cost import CostModel
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.iterations import RecoverSettings, accuracy, recover_cut
from kiridashi_server.similarity.descriptor import Descriptor
from kiridashi_server.similarity.evidence import weigh
from kiridashi_server.similarity.measure import DEFAULT_MEASURE, find_measure
from kiridashi_server.tasks import load_shipped

SIZE = 32


@pytest.fixture(scope="module")
def backbone():
    return Backbone.load(image_size=SIZE)


@pytest.fixture(scope="module")
def records(backbone):
    settings = ScoreSettings(iterations=4, batch_size=16)
    return [
        learn_record(backbone, load_shipped(name, SIZE), settings, 0) for name in ("gestures", "hands-a", "animals")
    ]


def test_records_of_real_tasks_hold_what_the_bank_needs(backbone, records, bank):
    for record in records:
        assert bank.add(record)
        assert {name: len(values) for name, values in record.scores.items()} == backbone.layout.sizes
        assert record.taylor.keys() == record.scores.keys()
        assert record.outcomes.keys() == {"dense", "masked_50%", "masked_30%"}
    assert np.mean([record.outcomes["dense"] for record in records]) > 1.5 / 12
    assert [record.task for record in bank.list(backbone_fingerprint=backbone.fingerprint)] == [
        "animals",
        "gestures",
        "hands-a",
    ]


def test_scores_of_different_tasks_agree_more_than_chance_and_are_not_the_same(backbone, records):
    def ranks(values):
        return np.argsort(np.argsort(values))

    first, second = (records[i].scores for i in (0, 1))
    correlations = [np.corrcoef(ranks(first[name]), ranks(second[name]))[0, 1] for name in first]
    assert 0.3 < np.mean(correlations) < 0.999


def test_one_cut_of_a_new_task_works_and_repair_is_what_makes_it_work(backbone, records):
    task = load_shipped("sports", SIZE)
    few, test = task.split("train").few_shot(6, 0), task.split("test")
    features = run_batched(backbone.program, to_input(backbone, few.images)).numpy()
    evidence = weigh(
        records,
        Descriptor(features, few.labels),
        find_measure(DEFAULT_MEASURE),
        fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
    )
    composition = compose(evidence, records)
    costs = CostModel.from_tracking(backbone.tracking)
    plan = select(composition.scores, backbone.layout, costs, 0.4)
    assert 0.38 < costs.parameters(plan.counts) / costs.parameters({}) <= 0.4
    with_repair, without = (
        accuracy(
            recover_cut(
                backbone, plan, few, classes=12, settings=RecoverSettings(iterations=5, repair=repair), seed=0
            ).model,
            backbone,
            test,
        )
        for repair in (True, False)
    )
    assert with_repair > 2 / 12
    assert with_repair > without
