"""Plans of attack: repeatable, spread over targets and phases, and short enough to fit into the run."""

from tests.chaos.attacks import (
    ENDING,
    PHASES,
    RECOVERING,
    START,
    STOPPED,
    STOPPED_PHASES,
    draw_kills,
    draw_stops,
    rollouts_needed,
)


def test_a_seed_gives_one_plan_and_another_seed_another() -> None:
    assert draw_kills(20, 7) == draw_kills(20, 7)
    assert draw_kills(20, 7) != draw_kills(20, 8)


def test_twenty_kills_reach_every_kind_of_process_and_every_phase() -> None:
    for seed in range(20):
        attacks = draw_kills(20, seed)
        assert {attack.target for attack in attacks} == {*ENDING, *RECOVERING}
        assert {attack.phase for attack in attacks} - {START} == set(PHASES)


def test_a_start_is_attacked_only_after_an_attack_that_ended_the_run() -> None:
    attacks = draw_kills(100, 1)
    before = [attacks[i - 1].target for i, attack in enumerate(attacks) if attack.phase == START]
    assert before
    assert set(before) <= set(ENDING)


def test_every_process_is_stopped_in_every_phase_once() -> None:
    pairs = [(attack.target, attack.phase) for attack in draw_stops(STOPPED, STOPPED_PHASES, 3)]
    assert sorted(pairs) == sorted((target, phase) for target in STOPPED for phase in STOPPED_PHASES)


def test_ten_stops_reach_every_process_and_every_phase() -> None:
    for seed in range(20):
        attacks = draw_stops(STOPPED, STOPPED_PHASES, seed, 10)
        assert {attack.target for attack in attacks} == set(STOPPED)
        assert {attack.phase for attack in attacks} == set(STOPPED_PHASES)


def test_a_plan_fits_into_its_rollouts_and_the_last_rollout_is_saved() -> None:
    attacks = draw_kills(20, 5)
    assert rollouts_needed(attacks) > max(attack.rollout for attack in attacks) + 1
    assert rollouts_needed(attacks) % 2 == 0
