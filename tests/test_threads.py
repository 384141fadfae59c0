"""The threads of a step: fewer where that is faster, all again when they are."""

from nanogpt.native.threads import LONG_WAITS, REST, TRIAL, Threads

ENOUGH = REST + 2 * TRIAL
"""Steps within which a trial begins and ends."""


def work(threads: Threads, steps: int, seconds, long_waits: int = 0) -> list[int]:
    """Note steps that take seconds(threads), long waits for several threads. Returns their threads."""
    counts = []
    for _ in range(steps):
        counts.append(threads.count)
        threads.note(seconds(threads.count), long_waits if threads.count > 1 else 0)
    return counts


def alone(count: int) -> float:
    return 1 / count


def beside_another(count: int) -> float:
    return 1 / count if count == 1 else 3.0


def test_without_long_waits_nothing_is_tried():
    threads = Threads(8)
    assert set(work(threads, 3 * ENOUGH, alone)) == {8}


def test_long_waits_of_a_usual_step_start_no_trial():
    threads = Threads(2)
    assert set(work(threads, 3 * ENOUGH, beside_another, long_waits=LONG_WAITS)) == {2}


def test_threads_that_wait_for_a_core_become_fewer_at_once():
    threads = Threads(2)
    counts = work(threads, 4 * TRIAL, beside_another, long_waits=10)
    assert counts == [2] * TRIAL + [1] * 3 * TRIAL


def test_they_become_more_again_when_the_other_program_ends():
    threads = Threads(2)
    work(threads, 4 * TRIAL, beside_another, long_waits=10)
    counts = work(threads, 2 * ENOUGH, alone)
    assert counts[0] == 1
    assert counts[-1] == 2


def test_while_it_runs_more_threads_cost_a_few_steps_now_and_then():
    threads = Threads(2)
    counts = work(threads, 10 * ENOUGH, beside_another, long_waits=10)
    assert counts[-1] == 1
    assert 2 in counts[ENOUGH:]
    assert counts.count(2) <= 10 * TRIAL + TRIAL


def test_many_threads_are_halved_as_long_as_that_helps():
    threads = Threads(12)
    counts = work(threads, 4 * ENOUGH, lambda count: {12: 9.0, 6: 5.0, 3: 2.0, 1: 4.0}.get(count, 9.0), 10)
    assert [count for number, count in enumerate(counts) if count not in counts[:number]] == [12, 6, 3, 1]
    assert max(set(counts), key=counts.count) == 3


def test_waits_that_fewer_threads_do_not_shorten_leave_all():
    threads = Threads(4)
    counts = work(threads, 2 * REST, alone, long_waits=10)
    assert set(counts) == {4, 2}
    assert counts.count(2) == 2 * TRIAL


def test_a_few_slow_steps_of_a_trial_do_not_decide_it():
    threads = Threads(2)
    work(threads, TRIAL, beside_another, long_waits=10)
    for number in range(TRIAL):
        threads.note(100.0 if number < TRIAL // 2 - 1 else 1.0, 0)
    assert threads.count == 1
