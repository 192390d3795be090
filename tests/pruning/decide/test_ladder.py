"""Where an event's candidate sets begin, by what passed before."""

import json

import torch

from dynaprune.pruning.decide.ladder import Ladder
from dynaprune.pruning.decide.trial_rules import TrialRules
from dynaprune.pruning.decide.trials import Trials


class Redundant:
    """A model that can lose ``free`` units, and suffers from each further one."""

    def __init__(self, free):
        self.free, self.tried = free, []

    def __call__(self, size):
        if size is not None:
            self.tried.append(size)
        base = 1 + torch.rand(256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return base + max(0, (size or 0) - self.free)


def sizes_of(trials, model, wish, kind="blocks"):
    model.tried.clear()
    trials.run(1, wish, model, kind)
    return list(model.tried)


def test_the_next_event_begins_where_the_last_one_passed():
    trials, model = Trials(TrialRules()), Redundant(30)
    assert sizes_of(trials, model, 100) == [100, 50, 25]
    assert sizes_of(trials, model, 100) == [25]
    assert sizes_of(trials, model, 100) == [50, 25]
    model.free = 3
    assert sizes_of(trials, model, 100) == [25, 12, 6]
    assert sizes_of(trials, model, 100) == [3]
    assert sizes_of(trials, model, 100) == [6, 3]


def test_a_wish_is_never_exceeded_and_does_not_hold_the_ladder_down():
    trials, model = Trials(TrialRules()), Redundant(1000)
    assert sizes_of(trials, model, 100) == [100]
    assert sizes_of(trials, model, 5) == [5]
    assert sizes_of(trials, model, 500) == [200]


def test_kinds_of_units_have_ladders_of_their_own():
    trials, model = Trials(TrialRules()), Redundant(2)
    assert sizes_of(trials, model, 16, "neurons") == [16, 8, 4]
    assert sizes_of(trials, model, 16, "blocks") == [16, 8, 4]
    model.free = 0
    assert sizes_of(trials, model, 16, "neurons") == [2, 1]
    assert sizes_of(trials, model, 16, "neurons") == [1]
    assert sizes_of(trials, model, 16, "blocks") == [2, 1]


def test_an_event_that_tests_nothing_leaves_it():
    trials, model = Trials(TrialRules()), Redundant(30)
    sizes_of(trials, model, 100)
    trials.state.spent = 1e9
    assert sizes_of(trials, model, 100) == [] and trials.ladder.begins == {"blocks": 25}


def test_it_is_saved_and_states_without_one_begin_anew():
    trials, model = Trials(TrialRules()), Redundant(30)
    sizes_of(trials, model, 100)
    saved = json.loads(json.dumps(trials.state_dict()))
    resumed = Trials(TrialRules())
    resumed.load_state_dict(saved)
    assert resumed.ladder == trials.ladder == Ladder({"blocks": 25}) and resumed.state == trials.state
    del saved["ladder"]
    resumed.load_state_dict(saved)
    assert resumed.ladder == Ladder()
